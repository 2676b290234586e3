"""What goes wrong with a request, as OpenAI's clients know it: a status and an error object."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is answered with an error; its message is for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Say what was given, what is allowed, what to do.

        `param` is the field that is wrong; `code` is for programs; `retry_after` seconds.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        named[429] = "rate_limit_error"
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return named.get(self.status, fallback)

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never be answered as it is."""
    return ApiError(400, " ".join(message.split()), param=param, code=code)


NO_ROOM = "The server has no room for answers of this tenant. Try again later."
FAILED = "The server failed while it wrote this answer. It goes on; send the request again."
STOPPED = "The server stops. Send the request to another, or later."
NOT_KEPT = (
    "What was learned last could not be written, and is lost.\n"
    "Make room in the folder of --learn.keep, or name another."
)

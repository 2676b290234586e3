"""What a server is told when it starts. Imports no torch and no web library."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ttspec.errors import OptionError

MAX_CHOICES = 64
"""Answers of one request: prompts times `n`."""
MAX_MESSAGES = 2048
MAX_LOGPROBS = 20
"""Likely tokens that are told of beside one that came."""
MAX_STOPS = 16
MAX_TOOLS = 128
BODY_SECONDS = 20
"""In which a request's body must have come."""
SLOW_READER_SECONDS = 60
"""That a client has, after the deadline, to read its stream."""
BODY_BYTES = 64 * 1024
"""Of a request's body, whatever the context."""
BODY_BYTES_PER_TOKEN = 32
"""More than a token of text takes in JSON: a larger body has no room in a row."""


DraftMetrics = Literal["none", "summary", "detailed"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, who may ask, and how much it takes on."""

    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs --api-key-file."""
    port: int = 8000
    """Port to listen at; 0 takes a free one, which the first line of output tells."""
    api_key_file: Path | None = None
    """Who may ask: one name and hash of a key a line, as --add-key writes them."""
    served_model_name: str | None = None
    """What requests call the model; left out, what --target says, without its folder."""
    rows: int = 8
    """Answers that are written side by side, if that many fit into memory."""
    context: int = 4096
    """Tokens of a prompt and its answer together, at most the target's own context."""
    queue: int = 64
    """Answers that may wait for a row; who comes then is told to come again (429)."""
    deadline: float = 600.0
    """Seconds that an answer may take, waiting included; then it fails (504)."""
    drain: float = 60.0
    """Seconds that running answers have to end after SIGTERM."""
    per_request_spec_decode_metrics: DraftMetrics = "summary"
    """What a response's metrics.speculative_decoding tells: detailed has every round."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise OptionError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}.")

        check("port", 0 <= self.port < 65536, "0 to 65535")
        check("rows", self.rows >= 1, "1 or more")
        check("context", self.context >= 16, "16 or more")
        check("queue", self.queue >= 0, "0 or more")
        check("deadline", 0 < self.deadline < 1e6, "above 0 seconds")
        check("drain", 0 <= self.drain < 1e6, "0 seconds or more")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def require_keys(self) -> None:
        """Refuse to be reached from elsewhere by anybody.

        Raises:
            OptionError: The address is not this machine's own, and there are no keys.
        """
        if not self.is_local and self.api_key_file is None:
            raise OptionError(
                f"host is {self.host}, which others can reach, and there are no API keys.\n"
                "Give --api-key-file, or listen at 127.0.0.1."
            )

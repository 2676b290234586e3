"""API keys: whose they are, and whether a request has one.

A file has one key a line, `NAME sha256:HASH`; the keys themselves are nowhere. They are drawn here,
with 256 random bits, so nobody finds one by trying hashes, and a slow hash (scrypt) would only let
strangers keep the server busy. Every hash of the file is compared, each in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from ttspec.errors import DataError, OptionError

PREFIX = "sk-ttspec-"
ANYBODY = "-"
"""The tenant where there are no keys."""
_NAME = re.compile(r"(?!-(?:\s|$))[A-Za-z0-9._@-]{1,64}")
"""Any but `ANYBODY`."""
_LINE = re.compile(rf"({_NAME.pattern})\s+sha256:([0-9a-f]{{64}})")


@dataclass(frozen=True, slots=True)
class Keys:
    """Names and hashes. A name is a tenant; it may have several keys."""

    entries: tuple[tuple[str, bytes], ...]

    def tenant(self, key: str) -> str | None:
        """Whose key it is; None is nobody's."""
        given, found = _hash(key), None
        for name, known in self.entries:  # to the end, whatever is found
            if hmac.compare_digest(given, known):
                found = name
        return found

    @property
    def names(self) -> list[str]:
        """Of the tenants."""
        return list(dict.fromkeys(name for name, _ in self.entries))


def read_keys(path: Path) -> Keys:
    """Keys of a file.

    Raises:
        DataError: It cannot be read, has a line of another form, or no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DataError(
            f"{path} cannot be read: {reason}.\nMake it with: ttspec serve --api-key-file {path} "
            "--add-key NAME"
        ) from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:  # what it says is not repeated: it may be a key
            raise DataError(
                f"{path}, line {number} is no key; allowed is NAME sha256:HASH.\n"
                "Add keys with --add-key NAME, which shows a key once and keeps its hash."
            )
        entries.append((match[1], bytes.fromhex(match[2])))
    if not entries:
        raise DataError(f"{path} has no keys.\nAdd one with --add-key NAME.")
    return Keys(tuple(entries))


def add_key(path: Path, name: str) -> str:
    """Draw a key, and add its hash to a file that only its owner may read.

    Returns:
        The key, which nobody can tell again.

    Raises:
        OptionError: The name is not allowed.
        DataError: The file is there and is none of keys, or it cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"add_key is {name!r}; allowed are up to 64 letters, digits and any of . _ @ - "
            "but - alone."
        )
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        written = path.read_bytes() if path.exists() else b""
        if written.strip():
            read_keys(path)
        begin = "" if written[-1:] in (b"", b"\n") else "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(f"{begin}{name} sha256:{_hash(key).hex()}\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}.\nName a file in a folder that is there, "
            "and where writing is allowed."
        ) from error
    return key


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

"""API keys: key files, their renewal without a restart, and the key of a request.

No message contains a key; it names the line, or the position in the list.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydantic import SecretStr

logger = logging.getLogger(__name__)

COMMENT = "#"
NAME = re.compile(r"([\w.-]{1,64}):[ \t]+", re.ASCII)
SHARE = re.compile(r"[ \t]+(100|[1-9]\d?)%")
UNNAMED = "unnamed"
"""The name of keys without one."""
CHECK_SECONDS = 1.0
"""Time between two looks at the key file."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that clients may send.

    Attributes:
        digest: SHA-256 of the key.
        name: of its holder, in the log and the metrics; keys may share one, for a rotation.
        share: the largest part of `max_requests` that the concurrent requests of this name may take.

    """

    digest: bytes
    name: str = UNNAMED
    share: float = 1.0


def fault_of(key: str) -> str | None:
    """Describe why a key cannot match an `Authorization: Bearer KEY` header; None for a valid key."""
    if not key:
        return "is blank"
    if any(character.isspace() for character in key):
        return "holds a blank; a key is one word"
    if not (key.isascii() and key.isprintable()):
        return "holds a character that is not printable ASCII, which no header can carry"
    if key.startswith(COMMENT):
        return f"begins with {COMMENT}, which begins a comment in a key file"
    return None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a key file: `KEY`, `NAME: KEY` or `NAME: KEY SHARE%` a line; blank lines and comments (#) are skipped.

    Raises:
        SettingsError: a line holds no usable key, there is no key at all, or the file is not UTF-8 text.
        OSError: the file cannot be read.

    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    keys = []
    for number, line in enumerate(text.split("\n"), 1):
        if not (key := line.strip()) or key.startswith(COMMENT):
            continue
        name, share = UNNAMED, 1.0
        if match := NAME.match(key):
            name, key = match[1], key[match.end() :]
        if match := SHARE.search(key):
            share, key = int(match[1]) / 100, key[: match.start()] + key[match.end() :]
        if fault := fault_of(key):
            raise SettingsError(f"{path}, line {number}: the key {fault}; write one key a line, comments after #")
        keys.append(ApiKey(_digest(key), name, share))
    if not keys:
        raise SettingsError(f"{path} holds no key; write one key a line, or leave the option out")
    return tuple(keys)


class ApiKeys:
    """The keys of a server. Those of a file are read again when the file changes.

    Args:
        keys: from the settings.
        file: a key file, or None.

    Raises:
        SettingsError, OSError: as `read_keys`.

    """

    def __init__(self, keys: Sequence[SecretStr], file: Path | None) -> None:
        self._fixed = tuple(ApiKey(_digest(key.get_secret_value())) for key in keys)
        self._file = file
        self._keys = self._fixed
        self._version: tuple[int, int, int] | None = None
        self._next_check = 0.0
        if file is not None:
            self._version = _version_of(file)
            self._keys += read_keys(file)

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def find(self, authorization: str) -> ApiKey | None:
        """Give the key of an `Authorization` header, or None."""
        if self._file is not None and time.monotonic() >= self._next_check:
            self._renew(self._file)
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]  # all, for a constant time
        return matches[0] if matches and scheme.lower() == "bearer" else None

    def reload(self) -> None:
        """Read the key file again. After an error, which is logged, the old keys stay valid."""
        if self._file is not None:
            self._version = None
            self._renew(self._file)

    def _renew(self, file: Path) -> None:
        """Read the key file if it has changed."""
        self._next_check = time.monotonic() + CHECK_SECONDS
        try:
            version = _version_of(file)
            if version == self._version:
                return
            keys = read_keys(file)
        except (OSError, SettingsError) as error:
            logger.error("the keys are still the old ones: %s", error)
            return
        self._keys, self._version = self._fixed + keys, version
        logger.warning("%s was read again; number of keys: %d", file, len(keys))


def _version_of(file: Path) -> tuple[int, int, int]:
    """Give what changes with the content of a file; links are followed, as in volumes of Kubernetes."""
    status = file.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

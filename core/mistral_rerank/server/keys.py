"""API keys: reading a key file, and validation of keys.

No message contains a key; it names the line, or the position in the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_rerank.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

COMMENT = "#"


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


def read_keys(path: Path) -> tuple[str, ...]:
    """Read a key file: one key a line; blank lines and lines that begin with # are skipped.

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
        key = line.strip()
        if not key or key.startswith(COMMENT):
            continue
        if fault := fault_of(key):
            raise SettingsError(f"{path}, line {number}: the key {fault}; write one key a line, comments after #")
        keys.append(key)
    if not keys:
        raise SettingsError(f"{path} holds no key; write one key a line, or leave the option out")
    return tuple(keys)

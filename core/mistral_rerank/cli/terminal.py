"""Text of others on the terminal and in JSON: what could steer a terminal or reorder a line is shown escaped."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

from rich.console import Console

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""C0 and C1 controls without tab and line feed, line separators, and what overrides the direction of text."""


def printable(text: str) -> str:
    r"""Show control characters as Python escapes, such as `\x1b`; other characters stay as they are."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_line(record: object) -> str:
    """Give one line of JSON that is safe on a terminal, and in ASCII where standard output is not UTF-8."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    line = json.dumps(record, ensure_ascii=ascii_only)
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


class Terminal(Console):
    """A console whose strings are text alone: no markup, no emoji codes, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Any:
        """See `Console.render_str`."""
        return super().render_str(printable(text), **options)


class PrintableFormatter(logging.Formatter):
    """Formats log records for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return printable(super().format(record))

"""Maps error responses of endpoints to exceptions, whose messages hold no keys and no texts of the request."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mistral_rerank.errors import (
    AuthenticationError,
    EndpointUnreachableError,
    InvalidReplyError,
    ModelRetiredError,
    NotFoundError,
    QuotaExceededError,
    RateLimitError,
    RemoteError,
    RemoteInputTooLongError,
    RequestRefusedError,
    RequestTooLargeError,
    ServerError,
)
from mistral_rerank.protocols.replies import holds_scores
from mistral_rerank.protocols.urls import shown_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mistral_rerank.remote.transport import Response

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504})

KINDS: dict[int, tuple[type[RemoteError], str]] = {
    401: (
        AuthenticationError,
        "give a valid api_key; a vendor's variable, such as NVIDIA_API_KEY, goes to that vendor's hosts alone",
    ),
    402: (QuotaExceededError, "the account has no credits left"),
    403: (AuthenticationError, "the key may not use this model or endpoint"),
    404: (NotFoundError, "check base_url, protocol and model"),
    410: (ModelRetiredError, "choose another model"),
    413: (RequestTooLargeError, "send less at once: lower max_passages, or shorten the passages"),
    429: (RateLimitError, "wait, or set requests_per_minute"),
}
TOO_LONG = re.compile(
    r"exceeds? (the )?maximum allowed|maximum context length|must have less than \d+ tokens"
    r"|maximum allowed token size|input (is )?too long",
    re.IGNORECASE,
)
TOO_MANY = re.compile(
    r"batch size|too many (passages|documents|texts|inputs)|at most \d+ (items|passages|documents|texts)"
    r"|maximum (number|allowed number) of (passages|documents|texts)",
    re.IGNORECASE,
)
LIMIT = re.compile(r"(?:at most|maximum|max|limit|up to|no more than)\D{0,60}?(\d{1,6})", re.IGNORECASE)
UNKNOWN_MODEL = re.compile(
    r"\bmodel\b.{0,200}?(not found|not exist|not (available|supported|served|loaded|deployed)"
    r"|is unknown|unsupported)|(no such|unknown|invalid|unsupported|available) models?\b|Model(NotFound|NotDeployed)",
    re.IGNORECASE | re.DOTALL,
)
BACKEND_STATUS = re.compile(r"Backend returned (\d{3})")
REQUEST_IDS = ("nvcf-reqid", "x-request-id", "request-id")
MESSAGE_LENGTH = 300
LONGEST = 600
"""Characters of a message that are used; an error shows fewer."""
SHORTEST = 4
"""Shorter secrets and texts are not removed, because any message may contain them."""
WINDOW = 16
"""A run of this many characters that also occurs in a text counts as quoted from it."""


def to_error(response: Response, *, url: str, request_id: str, hide: Callable[[str], str]) -> RemoteError:
    """Make the exception of a response whose status, or whose body in spite of status 200, is an error.

    `request_id` is this client's, used if the endpoint gave none; `hide` removes texts and keys from its message.
    """
    body = _decoded(response.content)
    text = response.content.decode("utf-8", "replace").strip()
    if text.startswith(("<", "{", "[")):  # a web page, or JSON without a message
        text = ""
    raw_message = message_of(body) or text or response.headers.get("www-authenticate", "")
    message = _short(hide(raw_message))
    status = response.status
    if status == 502 and (backend_status := BACKEND_STATUS.search(raw_message)):
        status = int(backend_status[1])
    kind, advice = _kind(_code(body) if status == 200 else status, raw_message)
    location = response.headers.get("location")
    if 300 <= status < 400 and location:
        advice = f"it redirects to {_short(hide(shown_url(location)))}; set base_url to that address"
    endpoint_id = next((response.headers[name] for name in REQUEST_IDS if name in response.headers), None)
    if endpoint_id is None and isinstance(body, dict) and isinstance(body.get("requestId"), str):
        endpoint_id = body["requestId"]
    return kind(
        f"{shown_url(url)} answered {status}"
        + (" with an error" if status == 200 else "")
        + (f": {message}" if message else "")
        + (f" ({advice})" if advice else ""),
        status=status,
        request_id=(endpoint_id or request_id)[:MESSAGE_LENGTH],
        retry_after=retry_after(response.headers),
    )


def is_retryable(error: RemoteError) -> bool:
    """Whether the same request may succeed when it is sent again."""
    return error.status in RETRYABLE or isinstance(error, EndpointUnreachableError | InvalidReplyError)


def is_error_body(content: bytes) -> bool:
    """Whether a body holds an error message and no scores."""
    body = _decoded(content)
    return isinstance(body, dict) and not holds_scores(body) and message_of(body) != ""


def says_unknown_model(error: RemoteError, url: str) -> bool:
    """Whether the error says that the endpoint does not serve the model, rather than the route."""
    message = str(error).partition(" answered ")[2].partition(" (check ")[0].replace(urlsplit(url).path, "")
    return error.status in (200, 400, 404, 422) and UNKNOWN_MODEL.search(message) is not None


def passage_limit(error: RequestTooLargeError, sent: int) -> int | None:
    """Read an endpoint's limit of passages from its refusal of `sent` passages; half of them where it gives none.

    None where the request had too many bytes, not too many passages.
    """
    message = str(error).partition(" answered ")[2]
    if TOO_MANY.search(message) is None:
        return None
    limit = LIMIT.search(message)
    return int(limit[1]) if limit and 0 < int(limit[1]) < sent else max(1, sent // 2)


def message_of(body: object) -> str:
    """Extract the message of a decoded error body, in any of the shapes that rerank servers use.

    Validation errors repeat the input, so only their locations and messages are used.
    """
    if isinstance(body, str):
        return body
    if isinstance(body, list):
        return "; ".join(filter(None, (message_of(entry) for entry in body)))
    if not isinstance(body, dict):
        return ""
    if isinstance(body.get("msg"), str):
        location = ".".join(str(part) for part in body.get("loc") or ())
        return f"{location}: {body['msg']}" if location else body["msg"]
    messages = (message_of(body.get(name)) for name in ("detail", "message", "error", "errors", "title", "reason"))
    return next(filter(None, messages), "")


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Read the seconds to wait from `Retry-After-Ms`, or from `Retry-After` as seconds or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        until = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def _kind(status: int, message: str) -> tuple[type[RemoteError], str]:
    if status in (400, 413, 422) and TOO_MANY.search(message):
        return KINDS[413]
    if status in (400, 413, 422) and TOO_LONG.search(message):
        return RemoteInputTooLongError, "set overflow='truncate', or shorten the passage"
    if status in KINDS:
        return KINDS[status]
    return (ServerError, "") if status >= 500 else (RequestRefusedError, "")


def _code(body: Any) -> int:
    """Find the status that an error body states, for a response with status 200."""
    for holder in (body, body.get("error")):
        for name in ("status", "status_code", "code"):
            if isinstance(holder, dict) and isinstance(holder.get(name), int) and 400 <= holder[name] < 600:
                return int(holder[name])
    return 400


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MESSAGE_LENGTH else f"{line[:MESSAGE_LENGTH]}..."


def redact(message: str, *, secrets: Iterable[str], texts: Iterable[str]) -> str:
    """Give a message on one line, without secrets, parts of texts and control characters.

    Texts are searched for in plain form and as JSON strings, whole and in part.
    """
    line = _line(message[:LONGEST])
    for secret in secrets:
        if len(secret) >= SHORTEST:
            line = line.replace(secret, "**********")
    forms = {form for text in texts for form in _forms(text)}
    for form in forms:
        if len(form) < WINDOW:
            line = line.replace(form, "[text]")
    quoted = _quoted(line, "\n".join(form for form in forms if len(form) >= WINDOW))
    return "".join(
        "[text]" if hidden and (i == 0 or not quoted[i - 1]) else "" if hidden else line[i]
        for i, hidden in enumerate(quoted)
    )


def _quoted(line: str, texts: str) -> list[bool]:
    """Mark the characters of a line in runs of at least `WINDOW` characters that also occur in the texts."""
    quoted, half = [False] * len(line), WINDOW // 2
    for at in range(0, len(line) - half + 1, half):
        if line[at : at + half] in texts:  # every quoted run contains such a piece
            for start in range(max(0, at - half), at + 1):
                if len(run := line[start : start + WINDOW]) == WINDOW and run in texts:
                    quoted[start : start + WINDOW] = [True] * WINDOW
    return quoted


def _forms(text: str) -> set[str]:
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return {line for form in forms if len(line := _line(form)) >= SHORTEST}


def _line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())

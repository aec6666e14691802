"""One log line a request, as text or JSON, and the format of the server's other lines."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal

from typing_extensions import override

logger = logging.getLogger(__name__)

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
PROBES = frozenset(("/health", "/v1/health/live", "/v1/health/ready", "/metrics", "/v1/metrics"))
"""Paths that are asked every few seconds, and not logged."""


@dataclass(slots=True)
class RequestRecord:
    """What is logged of a request; None and 0 where it was refused earlier.

    Attributes:
        id: the reply's `X-Request-Id`.
        method: of HTTP.
        route: the template of the path.
        status: of the reply; 0 if the connection broke before it.
        key: the name of the client's key.
        protocol: of the body.
        model: or the adapter, on a server with several.
        passages: their number.
        tokens: that the model read.
        queue_ms: from the call of the model to its first batch.
        compute_ms: from there to the last score.
        total_ms: from the headers to the reply.

    """

    id: str
    method: str
    route: str = "other"
    status: int = 0
    key: str | None = None
    protocol: str | None = None
    model: str | None = None
    passages: int = 0
    tokens: int = 0
    queue_ms: float | None = None
    compute_ms: float | None = None
    total_ms: float = 0.0


record_of_request: ContextVar[RequestRecord] = ContextVar("record_of_request")


def current_record() -> RequestRecord:
    """Give the record of the current request, also in the events of its call of the model; else one that is dropped."""
    return record_of_request.get(None) or RequestRecord("", "")


def log_request(record: RequestRecord) -> None:
    """Log one line."""
    fields = {
        name: round(value, 1) if isinstance(value, float) else value
        for name, value in asdict(record).items()
        if value is not None
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.info("request %s", text, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """Formats each log record as one line of JSON."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= {"message": "request", **fields} if fields else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Formats log records as text, with control characters escaped: a client chooses parts of some messages."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(
            line if line.isprintable() else line.encode("unicode_escape").decode()
            for line in super().format(record).split("\n")
        )


def log_config(level: LogLevel, log_format: LogFormat) -> dict[str, Any]:
    """Give the configuration of `logging`: all lines on stderr in one format."""
    formatters: dict[LogFormat, dict[str, Any]] = {
        "text": {"()": TextFormatter, "fmt": "%(asctime)s %(levelname)s %(message)s"},
        "json": {"()": JsonFormatter},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatters[log_format]},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "mistral_rerank": {"level": level.upper()},
            "uvicorn": {"level": level.upper()},
            "uvicorn.access": {"level": "ERROR"},  # the request's own line replaces it
        },
    }

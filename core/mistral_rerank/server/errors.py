"""Maps exceptions to one error object that the clients of all protocols can read.

NVIDIA's clients read `title` and `detail`, OpenAI-style ones `message`, `type` and `code`, TEI's `error` and
`error_type`. No message repeats the content of a request. `is_temporary` says of an error whether to try again.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mistral_rerank import errors
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.protocols.protocol import describe_fields
from mistral_rerank.remote.error_mapping import RETRYABLE, is_retryable
from mistral_rerank.server.public_errors import public_message

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import Scope

logger = logging.getLogger(__name__)

TEI_PATH = "/rerank"
OVERLOADED_IS_429 = frozenset((TEI_PATH, "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking"))
"""Paths of protocols whose vendors answer 429 when they are overloaded; NVIDIA's and vLLM's answer 503."""
TEI_TYPES = {413: "Validation", 422: "Validation", 424: "Backend", 429: "Overloaded", 503: "Overloaded"}

STATUS: tuple[tuple[type[errors.RerankError], int], ...] = (
    (errors.InvalidInputError, 422),
    (errors.RerankerClosedError, 503),
    (errors.RateLimitError, 429),
    (errors.DeadlineExceededError, 504),
    (errors.RemoteError, 502),
)
"""Statuses of the reranker's errors; the first match counts, and any other error is a 500."""


def route_path(scope: Scope) -> str:
    """Give the path of a request without the prefix of a proxy (`root_path`)."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class ErrorBody(BaseModel):
    """The body of every response with a status of 400 or higher."""

    object: str = "error"
    status: int
    title: str
    message: str
    type: str
    code: int
    detail: str
    error: str | None = None
    error_type: str | None = None


def error_response(path: str, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Make the response with the error object.

    Args:
        path: of the request; TEI's path gets TEI's two fields.
        status: the HTTP status.
        message: the problem and its solution.
        headers: of the response.

    """
    title = HTTPStatus(status).phrase
    body = ErrorBody(
        status=status, title=title, message=message, type=title.lower().replace(" ", "_"), code=status, detail=message
    )
    if path == TEI_PATH:
        body = body.model_copy(update={"error": message, "error_type": TEI_TYPES.get(status, "Backend")})
    return JSONResponse(body.model_dump(exclude_none=True), status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Make expected exceptions give the error object; `RequestContext` handles unexpected ones."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(errors.RerankError, _reranker)


async def _http(request: Request, error: Any) -> JSONResponse:
    hints = {404: "no such route; see /openapi.json", 405: "this route takes another method; see /openapi.json"}
    known = error.detail if error.detail != HTTPStatus(error.status_code).phrase else None
    message = known or hints.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return error_response(route_path(request.scope), error.status_code, message, headers=error.headers)


async def _validation(request: Request, error: Any) -> JSONResponse:
    problems = error.errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        return error_response(route_path(request.scope), 400, "the body is not valid JSON")
    fields = [problem | {"loc": _fields_of(problem["loc"])} for problem in problems]
    return error_response(route_path(request.scope), 422, f"{describe_fields(fields)}; see /openapi.json for what fits")


def _fields_of(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Remove FastAPI's part of a location, and the detected protocol."""
    return tuple(part for part in location if part not in ("body", *PROTOCOLS))


async def _reranker(request: Request, error: Any) -> JSONResponse:
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    if status >= 500 or isinstance(error, errors.RemoteError):
        logger.error("%s: %s", type(error).__name__, error)
    seconds = math.ceil(getattr(error, "retry_after", None) or 1)  # of the endpoint, if it has said so
    headers = {"Retry-After": str(seconds)} if status in (429, 503) else None
    return error_response(route_path(request.scope), status, public_message(error), headers=headers)


def is_temporary(error: BaseException | None) -> bool:
    """Whether an error of loading a model, or of an endpoint, may not occur again later."""
    while error is not None:
        if isinstance(error, errors.RemoteError):
            return is_retryable(error) or isinstance(error, errors.DeadlineExceededError)
        if type(error).__name__ == "OfflineModeIsEnabled":
            return False  # the model hub's client may not use the network
        if isinstance(error, ConnectionError | TimeoutError | MemoryError | httpx.TransportError):
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in RETRYABLE:
            return True  # an error of httpx, or of the model hub's client
        if type(error).__name__ == "OutOfMemoryError":
            return True  # torch's; the server does not import it
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False

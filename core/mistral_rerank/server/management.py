"""Routes beside the rerank ones: models, health, metrics, versions and the web page."""

from __future__ import annotations

import secrets
from importlib import resources
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from typing_extensions import TypedDict

from mistral_rerank._version import __version__
from mistral_rerank.server.errors import ErrorBody

if TYPE_CHECKING:
    from mistral_rerank.server.models import Selection
    from mistral_rerank.server.service import Service

management = APIRouter(tags=["management"])


class Model(TypedDict):
    """A model in the form of OpenAI's API."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str


class Models(TypedDict):
    """A list of models."""

    object: Literal["list"]
    data: list[Model]


class TeiInfo(TypedDict):
    """The fields of text-embeddings-inference's `/info` that apply to this server."""

    model_id: str
    model_type: dict[Literal["reranker"], dict[str, dict[str, str | int]]]
    max_concurrent_requests: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str


class Health(TypedDict):
    """The health reply of a NIM."""

    object: Literal["health.response"]
    message: str
    status: Literal["live", "ready"]


class Version(TypedDict):
    """Versions of this software and of the API."""

    release: str
    api: str


class ModelInfo(TypedDict):
    """A model in the form of a NIM."""

    modelUrl: str
    shortName: str


class Metadata(TypedDict):
    """The metadata of a NIM."""

    version: str
    modelInfo: list[ModelInfo]


@management.get("/v1/models", responses={401: {"model": ErrorBody}})
async def models(request: Request) -> Models:
    """List the models and their adapters, in the form of OpenAI's API."""
    service: Service = request.app.state.service
    return {"object": "list", "data": [_described(selection, service) for selection in service.models.selections]}


@management.get("/v1/models/{model:path}", responses={status: {"model": ErrorBody} for status in (401, 404)})
async def model(model: str, request: Request) -> Model:
    """Describe a model by its id or an alias, or an adapter by its name."""
    service: Service = request.app.state.service
    return _described(service.find_model(model), service)


def _described(selection: Selection, service: Service) -> Model:
    return {
        "id": selection.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mistral-rerank",
        "root": selection.model.name,
    }


@management.get("/info", responses={401: {"model": ErrorBody}})
async def info(request: Request) -> TeiInfo:
    """Give the default model and the limits, for TEI's clients."""
    service: Service = request.app.state.service
    return {
        "model_id": service.models.default.name,
        "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        "max_concurrent_requests": service.settings.max_requests,
        "max_client_batch_size": service.settings.max_passages,
        "auto_truncate": True,
        "version": __version__,
    }


@management.get("/v1/health/live")
async def live() -> Health:
    """Report that the process is running."""
    return {"object": "health.response", "message": "Service is live.", "status": "live"}


@management.get("/v1/health/ready", responses={503: {"model": ErrorBody}})
async def ready(request: Request) -> Health:
    """Report whether the default model is loaded and the server is not shutting down."""
    if why := request.app.state.service.not_ready:
        raise HTTPException(503, why, {"Retry-After": "1"})
    return {"object": "health.response", "message": "Service is ready.", "status": "ready"}


@management.get("/health", responses={503: {"model": ErrorBody}})
async def health(request: Request) -> Health:
    """Report readiness, at the path of vLLM and TEI."""
    return await ready(request)


@management.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
@management.get("/v1/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Give the Prometheus metrics."""
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@management.get("/v1/version")
async def version() -> Version:
    """Give the version of this software."""
    return {"release": __version__, "api": "v1"}


@management.get("/v1/metadata", responses={401: {"model": ErrorBody}})
async def metadata(request: Request) -> Metadata:
    """Give the version and the models."""
    names = (model.name for model in request.app.state.service.models.all)
    return {"version": __version__, "modelInfo": [{"modelUrl": name, "shortName": name} for name in names]}


@management.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """Give the web page, which may load nothing from other hosts."""
    nonce = secrets.token_urlsafe(16)
    text = resources.files("mistral_rerank.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(text.replace("{{nonce}}", nonce), headers=headers)

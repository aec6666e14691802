"""The application: the routes of all protocols, for one reranker or several models."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from mistral_rerank._version import __version__
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.protocols.cohere import CohereReply
from mistral_rerank.protocols.nvidia import RankingBody, RankingReply
from mistral_rerank.protocols.tei import TeiRank
from mistral_rerank.protocols.vllm import ScoreBody, ScoreReply
from mistral_rerank.protocols.voyage import VoyageReply
from mistral_rerank.server.errors import ErrorBody, add_error_handlers
from mistral_rerank.server.json_body import JsonRoute
from mistral_rerank.server.management import management
from mistral_rerank.server.middleware import Admission, BearerKeys, RequestContext
from mistral_rerank.server.request_bodies import RerankBody, RerankOrTeiBody  # noqa: TC001 - FastAPI reads the annotations
from mistral_rerank.server.request_log import current_record
from mistral_rerank.server.service import CLIENT_CLOSED_REQUEST, ClientGoneError, Service
from mistral_rerank.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from mistral_rerank.protocols.protocol import Body, Message
    from mistral_rerank.reranker import Reranker
    from mistral_rerank.settings import RerankSettings

logger = logging.getLogger(__name__)

PROTOCOL_OF = {protocol.body: protocol for protocol in reversed(PROTOCOLS.values())}
"""Jina and Cohere have the same bodies and replies, which count as Cohere's."""
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)
}
RANKING: dict[int | str, dict[str, Any]] = {200: {"model": RankingReply}}
SCORE: dict[int | str, dict[str, Any]] = {200: {"model": ScoreReply}}
RERANK: dict[int | str, dict[str, Any]] = {200: {"model": CohereReply | VoyageReply}}
RERANK_OR_TEI: dict[int | str, dict[str, Any]] = {200: {"model": CohereReply | VoyageReply | list[TeiRank]}}


inference = APIRouter(tags=["rerank"], responses=FAILURES, route_class=JsonRoute)


@inference.post("/v1/ranking", summary="NVIDIA's protocol", responses=RANKING)
async def rank(body: RankingBody, request: Request) -> Response:
    """Give raw logits and probabilities, best first."""
    return await _answer(body, request)


@inference.post(
    "/v1/retrieval/{path:path}/reranking", summary="NVIDIA's protocol, at the hosted API's path", responses=RANKING
)
async def rank_as_hosted(path: str, body: RankingBody, request: Request) -> Response:  # noqa: ARG001 - any will do
    """Give raw logits and probabilities, best first."""
    return await _answer(body, request)


@inference.post("/v1/ranking/{model:path}", summary="NVIDIA's protocol, with the model in the path", responses=RANKING)
async def rank_with(model: str, body: RankingBody, request: Request) -> Response:
    """Give raw logits and probabilities, best first."""
    return await _answer(body if body.model else body.model_copy(update={"model": model}), request)


@inference.post("/v1/rerank", summary="Cohere's, Jina's, vLLM's or Voyage's protocol", responses=RERANK)
@inference.post("/v2/rerank", summary="Cohere's, Jina's, vLLM's or Voyage's protocol", responses=RERANK)
@inference.post("/reranking", summary="The same, at llama.cpp's path", responses=RERANK)
@inference.post("/v1/reranking", summary="The same, at llama.cpp's path", responses=RERANK)
async def rerank(body: RerankBody, request: Request) -> Response:
    """Give probabilities, best first; raw logits for `use_activation: false`."""
    return await _answer(body, request)


@inference.post("/rerank", summary="TEI's protocol, or one of those at /v1/rerank", responses=RERANK_OR_TEI)
async def rerank_or_tei(body: RerankOrTeiBody, request: Request) -> Response:
    """Give probabilities, best first; raw logits for `raw_scores: true`."""
    return await _answer(body, request)


@inference.post("/score", summary="vLLM's score API", responses=SCORE)
@inference.post("/v1/score", summary="vLLM's score API", responses=SCORE)
async def score(body: ScoreBody, request: Request) -> Response:
    """Give the probability of each pair, in the request's order; raw logits for `use_activation: false`."""
    service: Service = request.app.state.service
    if service.settings.strict:
        await _refuse_other_fields(body, request)
    current_record().protocol = "vllm"
    return JSONResponse(await service.score(body, request))


async def _answer(body: Body, request: Request) -> Response:
    service: Service = request.app.state.service
    if service.settings.strict:
        await _refuse_other_fields(body, request)
    rerank_request, protocol = body.request(), PROTOCOL_OF[type(body)]
    current_record().protocol = protocol.name
    reply = await service.rerank(rerank_request, request)
    return JSONResponse(protocol.write_reply(rerank_request, reply))


async def _refuse_other_fields(body: Message, request: Request) -> None:
    others = set(await request.json()) - set(type(body).model_fields)
    if others:
        raise HTTPException(400, f"{len(others)} fields beside {', '.join(type(body).model_fields)}; leave them out")


def create_app(reranker: Reranker | Mapping[str, RerankSettings], settings: ServerSettings | None = None) -> FastAPI:
    """Make the application for a reranker, which the caller closes, or for several models, which it opens itself.

    The model, of several the first, is loaded in the background when the application starts; the others on first use.
    `app.state.service` has the limits and the state.

    Args:
        reranker: local or remote; or the settings of several by the names that requests select them with. Local ones
            should share batches.
        settings: names, keys and limits; None for those of the environment.

    Raises:
        SettingsError: a setting is invalid, or a name is ambiguous.
        CheckpointError: one of several models has no such folder, or nothing says how it is read.

    """
    service = Service(reranker, settings or ServerSettings())

    @asynccontextmanager
    async def warm(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.warmup())
        loading.add_done_callback(_log_failure)
        yield
        loading.cancel()
        await asyncio.wait({loading})
        await service.models.aclose()

    layers = [
        Middleware(RequestContext, service=service, routes=[*inference.routes, *management.routes]),
        Middleware(BearerKeys, service=service),
        Middleware(Admission, service=service),
    ]
    if service.settings.cors_origins:
        origins = service.settings.cors_origins
        layers.insert(0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    app = FastAPI(
        title="mistral-rerank",
        version=__version__,
        docs_url=None,  # Swagger's page loads scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        lifespan=warm,
        middleware=layers,
    )
    app.state.service = service
    app.include_router(inference)
    app.include_router(management)
    add_error_handlers(app)
    app.add_exception_handler(ClientGoneError, _client_gone)
    _describe_limits(app.openapi(), service.settings.max_passages)
    return app


def _describe_limits(document: dict[str, Any], max_passages: int) -> None:
    """Write the maximum number of passages into the OpenAPI document."""
    for protocol in PROTOCOLS.values():
        fields = document["components"]["schemas"][protocol.body.__name__]["properties"]
        passages = next(fields[name] for name in ("passages", "documents", "texts") if name in fields)
        passages["maxItems"] = min(max_passages, passages["maxItems"])
    for field in ("text_1", "text_2"):
        document["components"]["schemas"]["ScoreBody"]["properties"][field]["anyOf"][1]["maxItems"] = min(
            max_passages, 10_000
        )


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _log_failure(loading: asyncio.Task[None]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        logger.error("the model cannot be loaded: %s", error)

"""An MCP server with one tool, `rerank`, on standard input and output.

Source: https://modelcontextprotocol.io/specification
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Annotated

from mcp.server import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, CallToolResult, ListToolsResult, TextContent, Tool, ToolAnnotations
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mistral_rerank._deadline import in_thread
from mistral_rerank._version import __version__
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.protocols.protocol import describe_fields
from mistral_rerank.server.public_errors import public_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mcp.server import ServerRequestContext
    from mcp_types import CallToolRequestParams, PaginatedRequestParams

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.scores import Ranking
    from mistral_rerank.settings import RerankSettings

    Opening = asyncio.Future[Reranker]
    Context = ServerRequestContext[Opening]

logger = logging.getLogger(__name__)

TOOL = "rerank"
DESCRIPTION = (
    "Rank passages by how well they answer a question, best first. Use it to choose among search results, excerpts of "
    "files or notes before you read or quote them. Each passage is read together with the question."
)


def _from_json(passages: object) -> object:
    """Read a list that a client sent as a JSON string."""
    if isinstance(passages, str):
        with suppress(ValueError, RecursionError):
            return json.loads(passages)
    return passages


class Arguments(BaseModel):
    """The arguments of a call."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(description="the question, as a whole sentence if possible")
    passages: Annotated[list[str], BeforeValidator(_from_json)] = Field(description="the texts to rank")
    top_n: int = Field(5, ge=1, description="most results")
    min_score: float = Field(0.0, ge=0, le=1, description="lowest probability of a result")
    highlight: bool = Field(
        False, description="give the sentence of each result that answers best, instead of the whole passage"
    )


class InstructedArguments(Arguments):
    """The arguments of a call of a model that takes an instruction."""

    instruction: str = Field("", description="what counts as relevant, if it is not just an answer to the question")


class Result(BaseModel):
    """One passage of a result."""

    index: int = Field(description="position in passages, from 0")
    probability: float = Field(description="that the passage answers the question, 0 to 1")
    text: str = Field(description="the passage, or its best sentence")


class Results(BaseModel):
    """The results of a call, best first."""

    results: list[Result]


def takes_instruction(settings: RerankSettings) -> bool:
    """Whether the model takes an instruction, or at an endpoint the protocol that is set. No weights are loaded.

    Raises:
        CheckpointError: there is no such checkpoint, or nothing says how it is read.

    """
    if settings.backend == "remote":
        return settings.protocol != "auto" and PROTOCOLS[settings.protocol].takes_instruction
    from mistral_rerank.local.checkpoints.detection import read_config
    from mistral_rerank.local.checkpoints.loading import find_checkpoint

    return read_config(find_checkpoint(settings.named_model), settings.rerank_config).prompt.takes_instruction


def create_server(open_reranker: Callable[[], Reranker], *, with_instruction: bool) -> Server[Opening]:
    """Make the server. The reranker is opened in the background when it starts, and closed when it ends.

    Args:
        open_reranker: is called in a thread; it may load the model.
        with_instruction: whether the tool has the argument `instruction`.

    """
    arguments = InstructedArguments if with_instruction else Arguments
    tool = Tool(
        name=TOOL,
        title="Rerank passages",
        description=DESCRIPTION,
        input_schema=arguments.model_json_schema(),
        output_schema=Results.model_json_schema(),
        annotations=ToolAnnotations(read_only_hint=True, idempotent_hint=True),
    )

    @asynccontextmanager
    async def opened(_server: Server[Opening]) -> AsyncIterator[Opening]:
        opening = asyncio.wrap_future(in_thread(open_reranker))
        opening.add_done_callback(_log_failure)
        try:
            yield opening
        finally:
            with suppress(Exception):  # logged
                await (await opening).aclose()

    async def list_tools(_context: Context, _params: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=[tool])

    async def call_tool(context: Context, params: CallToolRequestParams) -> CallToolResult:
        if params.name != TOOL:
            raise MCPError(INVALID_PARAMS, f"there is no such tool; there is {TOOL}")
        try:
            checked = arguments.model_validate(params.arguments or {})
        except ValidationError as error:
            return _failure(describe_fields(error.errors(include_input=False, include_url=False)))
        try:
            return _success(await _rank(await asyncio.shield(context.lifespan_context), checked))
        except Exception as error:
            message = public_message(error)
            if message != str(error):
                logger.error("%s: %s", type(error).__name__, error)
            return _failure(message)

    return Server(
        "mistral-rerank", version=__version__, lifespan=opened, on_list_tools=list_tools, on_call_tool=call_tool
    )


async def _rank(reranker: Reranker, arguments: Arguments) -> Ranking:
    instruction = getattr(arguments, "instruction", "") or None
    ranking = await reranker.arank(
        arguments.query,
        arguments.passages,
        top_n=arguments.top_n,
        min_score=arguments.min_score,
        instruction=instruction,
    )
    if arguments.highlight:
        texts = [ranked.text for ranked in ranking]
        ranking.mark(await reranker.ahighlight(arguments.query, texts, instruction=instruction))
    return ranking


def _success(ranking: Ranking) -> CallToolResult:
    results = [
        Result(
            index=ranked.index,
            probability=float(f"{ranked.score.probability:.3g}"),  # an agent pays for further digits
            text=ranked.text[slice(*ranked.highlight)] if ranked.highlight else ranked.text,
        )
        for ranked in ranking
    ]
    content = Results(results=results)
    return CallToolResult(content=[_text(content.model_dump_json())], structured_content=content.model_dump())


def _failure(message: str) -> CallToolResult:
    return CallToolResult(content=[_text(message)], is_error=True)


def _text(text: str) -> TextContent:
    return TextContent(type="text", text=text)


def _log_failure(opening: Opening) -> None:
    if not opening.cancelled() and (error := opening.exception()) is not None:
        logger.error("the model cannot be opened: %s", error)


def serve(settings: RerankSettings) -> None:
    """Serve until standard input ends. Standard output carries the protocol alone; the log is on standard error.

    Raises:
        CheckpointError: there is no such checkpoint, or nothing says how it is read.

    """

    def open_and_load() -> Reranker:
        reranker = settings.open()
        if settings.backend == "local":  # a request to an endpoint may cost something
            try:
                reranker.score_pairs([("warm", "up")])
            except Exception as error:  # the next call tries again
                logger.error("the model cannot be loaded: %s", error)
        return reranker

    server = create_server(open_and_load, with_instruction=takes_instruction(settings))

    async def run() -> None:
        async with stdio_server() as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for a line of input
    asyncio.run(run())

"""`RerankMiddleware`: reranks the results of an agent's tools before the agent reads them; needs `langchain`."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain.agents.middleware import AgentMiddleware
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from typing_extensions import override

from langchain_mistral_rerank.rerank import MistralRerank

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from langchain.agents.middleware import ToolCallRequest
    from langchain_core.documents import BaseDocumentCompressor
    from langgraph.types import Command

RESULTS = "results"
"""Key of the list of results in a JSON object of a search tool."""


class RerankMiddleware(AgentMiddleware):
    """Reranks the results of tools with the query of each tool call.

        agent = create_agent(model, tools=[search], middleware=[RerankMiddleware(MistralRerank(top_n=5))])

    Results are a list of documents as the artifact, of text blocks or of strings; or a JSON list, or a JSON object with
    a list under "results", whose entries are strings or objects. Anything else reaches the agent as it is.

    Args:
        compressor: reranks; None for `MistralRerank()`.
        tools: names of the tools whose results are reranked; None for all that have the argument.
        query_argument: the argument of a tool call that is the query.

    """

    def __init__(
        self,
        compressor: BaseDocumentCompressor | None = None,
        *,
        tools: Collection[str] | None = None,
        query_argument: str = "query",
    ) -> None:
        super().__init__()
        self._compressor = MistralRerank() if compressor is None else compressor
        self._names, self._query_argument = tools, query_argument

    @override
    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        message = handler(request)
        results, query = _read_results(message), self._query(request)
        if results is None or query is None:
            return message
        return results.selected(self._compressor.compress_documents(results.documents, query))

    @override
    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        message = await handler(request)
        results, query = _read_results(message), self._query(request)
        if results is None or query is None:
            return message
        return results.selected(await self._compressor.acompress_documents(results.documents, query))

    def _query(self, request: ToolCallRequest) -> str | None:
        """Give the query of a call; None if its results are not reranked."""
        query = request.tool_call["args"].get(self._query_argument)
        is_chosen = self._names is None or request.tool_call["name"] in self._names
        return query if is_chosen and isinstance(query, str) and query.strip() else None


@dataclass(frozen=True, slots=True)
class _Results:
    """The results of a tool call.

    Attributes:
        message: of the tool.
        documents: one for each result, for the compressor.
        entries: the results as the message holds them; empty if the documents are its artifact. The document of an
            entry has its position as id.
        around: the JSON object that holds them; None if they are the content itself.

    """

    message: ToolMessage
    documents: list[Document]
    entries: list[Any]
    around: dict[str, Any] | None = None

    def selected(self, documents: Sequence[Document]) -> ToolMessage:
        """Give the message with these documents alone, in their order."""
        if not self.entries:
            content = "\n\n".join(document.page_content for document in documents)
            return self.message.model_copy(update={"content": content, "artifact": list(documents)})
        entries: Any = [self.entries[int(document.id or 0)] for document in documents]
        if isinstance(self.message.content, str):
            whole = entries if self.around is None else self.around | {RESULTS: entries}
            entries = json.dumps(whole, ensure_ascii=False)
        return self.message.model_copy(update={"content": entries})


def _read_results(message: ToolMessage | Command[Any]) -> _Results | None:
    """Read the results of a tool; None if there are no two of them."""
    if not isinstance(message, ToolMessage) or message.status == "error":
        return None
    artifact = message.artifact
    if isinstance(artifact, list) and len(artifact) > 1 and all(isinstance(each, Document) for each in artifact):
        return _Results(message, artifact, [])
    content: Any = message.content
    if isinstance(content, str):
        with suppress(ValueError, RecursionError):
            content = json.loads(content)
    around = content if isinstance(content, dict) else None
    entries = content if around is None else around.get(RESULTS)
    if not isinstance(entries, list) or len(entries) < 2:
        return None
    texts = [_text_of(entry) for entry in entries]
    documents = [Document(text, id=str(position)) for position, text in enumerate(texts) if text]
    return _Results(message, documents, entries, around) if len(documents) == len(entries) else None


def _text_of(entry: object) -> str:
    """Give the text of a result: of an object, its strings."""
    if isinstance(entry, dict):
        values = [value for key, value in entry.items() if key not in {"id", "type", "url"}]
        return "\n".join(value for value in values if isinstance(value, str))
    return entry if isinstance(entry, str) else ""

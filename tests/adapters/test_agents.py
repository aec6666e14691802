"""Reranking for agents of LangChain and LangGraph: middleware, a retriever tool, a node. The LLM is scripted."""

import asyncio
import json
from typing import TypedDict

import pytest
from langchain.agents import create_agent
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolCall
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import BaseTool, create_retriever_tool, tool
from langgraph.graph import END, START, StateGraph
from support import FailingReranker, LengthReranker

from langchain_mistral_rerank import MistralRerank
from langchain_mistral_rerank.middleware import RerankMiddleware
from mistral_rerank import ScoringError

TEXTS = ["bb", "a", "dddd", "ccc"]
BEST = ["dddd", "ccc"]


class Script(FakeMessagesListChatModel):
    """Calls a tool once, then answers."""

    def bind_tools(self, tools, **_):
        return self


def agent(called: BaseTool, middleware: RerankMiddleware | None = None, arguments: dict | None = None):
    call = ToolCall(name=called.name, args=arguments or {"query": "q"}, id="1")
    script = Script(responses=[AIMessage("", tool_calls=[call]), AIMessage("done")])
    return create_agent(script, tools=[called], middleware=[middleware] if middleware else [])


def tool_message(called: BaseTool, middleware: RerankMiddleware | None = None, arguments: dict | None = None):
    """The tool's message that the agent reads."""
    state = agent(called, middleware, arguments).invoke({"messages": [HumanMessage("hello")]})
    return state["messages"][-2]


def reranking(top_n: int = 2, **options) -> RerankMiddleware:
    return RerankMiddleware(MistralRerank(reranker=LengthReranker(), top_n=top_n), **options)


def search_tool(output) -> BaseTool:
    @tool
    def search(query: str):
        """Search."""
        return output

    return search


class Listed(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(text, id=text) for text in TEXTS]


@pytest.mark.parametrize(
    ("output", "reranked"),
    [
        ([{"title": text, "rank": 1} for text in TEXTS], [{"title": text, "rank": 1} for text in BEST]),
        ({"query": "q", "results": TEXTS}, {"query": "q", "results": BEST}),
        (json.dumps(TEXTS), BEST),
    ],
)
def test_json_results_of_a_tool_are_reranked_and_keep_their_form(output, reranked):
    assert json.loads(tool_message(search_tool(output), reranking()).content) == reranked


def test_text_blocks_of_a_tool_are_reranked():
    blocks = [{"type": "text", "text": text} for text in TEXTS]
    assert tool_message(search_tool(blocks), reranking()).content == [{"type": "text", "text": text} for text in BEST]


def test_documents_of_a_retriever_tool_are_reranked_with_their_artifact():
    search = create_retriever_tool(Listed(), "search", "Search.", response_format="content_and_artifact")
    message = tool_message(search, reranking())
    assert message.content == "dddd\n\nccc"
    assert [document.id for document in message.artifact] == BEST
    assert message.artifact[0].metadata["relevance_score"] > 0.9


@pytest.mark.parametrize(
    ("output", "options", "arguments"),
    [
        ("one text", {}, {"query": "q"}),
        ({"answer": 42}, {}, {"query": "q"}),
        ([1, 2, 3], {}, {"query": "q"}),
        (["only one"], {}, {"query": "q"}),
        (TEXTS, {"tools": ["other"]}, {"query": "q"}),
        (TEXTS, {"query_argument": "question"}, {"query": "q"}),
        (TEXTS, {}, {"query": " "}),
    ],
)
def test_anything_else_reaches_the_agent_as_it_is(output, options, arguments):
    search = search_tool(output)
    assert (
        tool_message(search, reranking(**options), arguments).content == tool_message(search, None, arguments).content
    )


def test_a_failing_reranker_keeps_the_order_of_the_tool_if_it_may():
    failing = MistralRerank(reranker=FailsAtOnce(ScoringError("broken")), top_n=2, on_error="keep_order")
    message = tool_message(search_tool(json.dumps(TEXTS)), RerankMiddleware(failing))
    assert json.loads(message.content) == TEXTS[:2]


class FailsAtOnce(FailingReranker):
    def score_pairs(self, pairs, **_):
        raise self.error


def test_an_agent_reranks_without_blocking_the_event_loop():
    state = asyncio.run(agent(search_tool(json.dumps(TEXTS)), reranking()).ainvoke({"messages": [HumanMessage("x")]}))
    assert json.loads(state["messages"][-2].content) == BEST


class Runs(BaseCallbackHandler):
    def __init__(self):
        self.parents = {}

    def on_chain_start(self, serialized, inputs, *, name=None, parent_run_id=None, **_):
        self.parents[name] = parent_run_id


def test_reranking_is_a_run_under_the_run_of_the_agent():
    runs = Runs()
    agent(search_tool(TEXTS), reranking()).invoke({"messages": [HumanMessage("hello")]}, {"callbacks": [runs]})
    assert runs.parents["MistralRerank"] is not None


def test_a_retriever_that_reranks_is_a_tool():
    compressor = MistralRerank(reranker=LengthReranker(), top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Listed())
    assert tool_message(create_retriever_tool(retriever, "search", "Search.")).content == "dddd\n\nccc"


class State(TypedDict):
    query: str
    documents: list[Document]


@pytest.mark.parametrize("is_async", [False, True])
def test_the_runnable_is_a_node_of_a_graph(is_async):
    compressor = MistralRerank(reranker=LengthReranker(), top_n=2)
    builder = StateGraph(State)
    builder.add_node("rerank", RunnableParallel(documents=compressor.as_runnable()))
    builder.add_edge(START, "rerank")
    builder.add_edge("rerank", END)
    graph = builder.compile()
    state = {"query": "q", "documents": [Document(text) for text in TEXTS]}
    result = asyncio.run(graph.ainvoke(state)) if is_async else graph.invoke(state)
    assert [document.page_content for document in result["documents"]] == BEST
    assert result["query"] == "q"

"""Traces of a rerank call: OpenInference's spans, each framework's own events, OpenTelemetry."""

import asyncio
import json

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever as LlamaIndexRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from openinference.instrumentation.langchain import LangChainInstrumentor
from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from support import LengthReranker

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank import InvalidInputError, ScoringError


class Broken(LengthReranker):
    def score_pairs(self, pairs, *, overflow=None):
        raise ScoringError("no")


class Stuck(LengthReranker):
    async def ascore_pairs(self, pairs, *, overflow=None):
        await asyncio.sleep(60)


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


class Found(LangChainRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(page_content="a"), Document(page_content="ccc"), Document(page_content="bb")]


def retriever(**options):
    compressor = langchain_mistral_rerank.MistralRerank(**{"reranker": LengthReranker(), "top_n": 2} | options)
    return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Found())


@pytest.fixture
def langchain_traced(provider):
    LangChainInstrumentor().instrument(tracer_provider=provider)
    yield
    LangChainInstrumentor().uninstrument()


def reranker_span(exporter):
    spans = {span.context.span_id: span for span in exporter.get_finished_spans()}
    (span,) = [s for s in spans.values() if s.attributes.get("openinference.span.kind") == "RERANKER"]
    return span, spans.get(span.parent.span_id) if span.parent else None


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_langchain_shows_a_reranker_span_under_the_retriever(way, langchain_traced, exporter):
    chain = retriever(trace_run_type="reranker")
    reranked = chain.invoke("q") if way == "sync" else await chain.ainvoke("q")
    assert [document.page_content for document in reranked] == ["ccc", "bb"]
    span, parent = reranker_span(exporter)
    assert span.name == "MistralRerank"
    assert parent.name == "ContextualCompressionRetriever"
    expected = {
        "reranker.query": "q",
        "reranker.model_name": "length",
        "reranker.top_k": 2,
        "reranker.input_documents.1.document.content": "ccc",
        "reranker.output_documents.0.document.content": "ccc",
    }
    assert {name: span.attributes[name] for name in expected} == expected
    assert span.attributes["reranker.output_documents.0.document.score"] == pytest.approx(0.9526, abs=1e-4)
    assert "reranker.output_documents.2.document.content" not in span.attributes


def test_langchain_ends_the_span_of_a_failed_call_as_an_error(langchain_traced, exporter):
    with pytest.raises(ScoringError):
        retriever(trace_run_type="reranker", reranker=Broken()).invoke("q")
    assert reranker_span(exporter)[0].status.status_code is StatusCode.ERROR


async def test_langchain_ends_the_span_of_a_cancelled_call_as_an_error(langchain_traced, exporter):
    task = asyncio.create_task(retriever(trace_run_type="reranker", reranker=Stuck()).ainvoke("q"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reranker_span(exporter)[0].status.status_code is StatusCode.ERROR


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.events = []

    def on_chain_start(self, serialized, inputs, **rest):
        self.events.append(("start", rest.get("name"), inputs))

    def on_chain_end(self, outputs, **_):
        self.events.append(("end", outputs))

    def on_chain_error(self, error, **_):
        self.events.append(("error", type(error)))


async def test_langchain_callbacks_see_query_model_and_documents():
    for way in ("sync", "async"):
        recorder = Recorder()
        chain, config = retriever(), {"callbacks": [recorder]}
        reranked = chain.invoke("q", config) if way == "sync" else await chain.ainvoke("q", config)
        (_, name, inputs), (_, outputs) = recorder.events
        assert name == "MistralRerank"
        assert (inputs["query"], inputs["model"], inputs["top_n"], len(inputs["documents"])) == ("q", "length", 2, 3)
        assert outputs == {"documents": reranked}


def test_langchain_traces_no_call_with_a_blank_query():
    recorder = Recorder()
    with pytest.raises(InvalidInputError):
        langchain_mistral_rerank.MistralRerank().compress_documents([], " ", callbacks=[recorder])
    assert recorder.events == []


class Nodes(LlamaIndexRetriever):
    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in ("a", "ccc", "bb")]


def engine(**options):
    postprocessor = llama_index_mistral_rerank.MistralRerank(**{"reranker": LengthReranker(), "top_n": 2} | options)
    return RetrieverQueryEngine.from_args(Nodes(), llm=MockLLM(), node_postprocessors=[postprocessor])


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_llama_index_shows_a_reranker_span_under_the_query(way, provider, exporter):
    LlamaIndexInstrumentor().instrument(tracer_provider=provider)
    try:
        query_engine = engine()
        answer = query_engine.query("q") if way == "sync" else await query_engine.aquery("q")
    finally:
        LlamaIndexInstrumentor().uninstrument()
    assert [node.node.text for node in answer.source_nodes] == ["ccc", "bb"]
    span, parent = reranker_span(exporter)
    assert span.name == f"MistralRerank.{'_' if way == 'sync' else '_a'}postprocess_nodes"
    assert "RetrieverQueryEngine" in parent.name
    assert parent.attributes["openinference.span.kind"] == "CHAIN"
    expected = {
        "reranker.query": "q",
        "reranker.model_name": "length",
        "reranker.top_k": 2,
        "reranker.input_documents.1.document.content": "ccc",
        "reranker.output_documents.0.document.content": "ccc",
    }
    assert {name: span.attributes[name] for name in expected} == expected


class Events(BaseEventHandler):
    seen: list[str]

    @classmethod
    def class_name(cls):
        return "Events"

    def handle(self, event, **_):
        if "ReRank" in event.class_name():
            self.seen.append(event.class_name())


@pytest.fixture
def events():
    handler, root = Events(seen=[]), get_dispatcher()
    root.add_event_handler(handler)
    yield handler.seen
    root.event_handlers.remove(handler)


async def test_llama_index_events_are_balanced_on_success_empty_input_and_error(events):
    nodes = [NodeWithScore(node=TextNode(text="a"))]
    for options, items in (({}, nodes), ({}, []), ({"reranker": Broken()}, nodes), ({"top_n": None}, nodes)):
        instance = llama_index_mistral_rerank.MistralRerank(**{"reranker": LengthReranker()} | options)
        for way in ("sync", "async"):
            try:
                if way == "sync":
                    instance.postprocess_nodes(items, query_str="q")
                else:
                    await instance.apostprocess_nodes(items, query_str="q")
            except ScoringError:
                assert "reranker" in options
            assert events == ["ReRankStartEvent", "ReRankEndEvent"]
            events.clear()
    with pytest.raises(InvalidInputError):
        instance.postprocess_nodes(nodes, query_str=" ")
    assert events == []


def test_llama_index_callbacks_see_the_reranking():
    handler = LlamaDebugHandler(print_trace_on_end=False)
    instance = llama_index_mistral_rerank.MistralRerank(reranker=LengthReranker(), top_n=1)
    instance.callback_manager = CallbackManager([handler])
    instance.postprocess_nodes([NodeWithScore(node=TextNode(text=text)) for text in ("a", "bb")], query_str="q")
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert (start.payload["query_str"], start.payload["model_name"], start.payload["top_k"]) == ("q", "length", 1)
    assert [node.node.text for node in end.payload["nodes"]] == ["bb"]


@pytest.fixture
def otel(provider, monkeypatch):
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))


@pytest.mark.parametrize("telemetry", ["off", "spans", "content"])
async def test_the_core_span_holds_texts_only_if_requested(telemetry, otel, exporter):
    instance = langchain_mistral_rerank.MistralRerank(reranker=LengthReranker(), telemetry=telemetry, top_n=1)
    documents = [Document(page_content="secret a"), Document(page_content="secret")]
    instance.compress_documents(documents, "secret q")
    await instance.acompress_documents(documents, "secret q")
    spans = exporter.get_finished_spans()
    assert len(spans) == (0 if telemetry == "off" else 2)
    for span in spans:
        assert span.attributes["gen_ai.operation.name"] == "rerank"
        assert span.attributes["reranker.top_k"] == 1
        assert span.attributes["gen_ai.rerank.candidate.count"] == 2
        assert ("secret" in json.dumps(dict(span.attributes))) is (telemetry == "content")


def test_a_failed_call_ends_its_span_as_an_error(otel, exporter):
    instance = langchain_mistral_rerank.MistralRerank(reranker=Broken(), telemetry="spans")
    with pytest.raises(ScoringError):
        instance.rerank("q", [Document(page_content="a")])
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR


def test_langchain_shows_the_error_in_the_outputs_of_the_run():
    recorder = Recorder()
    chain = retriever(reranker=Broken(), on_error="keep_order")
    reranked = chain.invoke("q", {"callbacks": [recorder]})
    (outputs,) = [event[1] for event in recorder.events if event[0] == "end"]
    assert outputs == {"documents": reranked, "rerank_error": "ScoringError"}


def test_openinference_shows_the_kept_order_in_langchain(provider, exporter):
    LangChainInstrumentor().instrument(tracer_provider=provider)
    try:
        chain = retriever(reranker=Broken(), on_error="keep_order", trace_run_type="reranker")
        chain.invoke("q")
    finally:
        LangChainInstrumentor().uninstrument()
    span, _ = reranker_span(exporter)
    assert span.attributes["mistral_rerank.kept_order"] is True
    assert span.attributes["error.type"] == "ScoringError"
    assert span.attributes["reranker.output_documents.0.document.content"] == "a"
    assert "reranker.output_documents.0.document.score" not in span.attributes


def test_llama_index_shows_the_kept_order_in_openinference(provider, exporter):
    LlamaIndexInstrumentor().instrument(tracer_provider=provider)
    try:
        engine(reranker=Broken(), on_error="keep_order").query("q")
    finally:
        LlamaIndexInstrumentor().uninstrument()
    span, _ = reranker_span(exporter)
    assert "ScoringError" in span.attributes["reranker.output_documents.0.document.metadata"]


def test_llama_index_callbacks_see_the_error_of_a_kept_order():
    handler = LlamaDebugHandler(print_trace_on_end=False)
    instance = llama_index_mistral_rerank.MistralRerank(reranker=Broken(), on_error="keep_order")
    instance.callback_manager = CallbackManager([handler])
    instance.postprocess_nodes(Nodes()._retrieve("q"), query_str="q")
    ((_, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert str(end.payload["exception"]) == "no"


def test_the_core_span_says_that_the_order_was_kept(otel, exporter):
    for reranker in (Broken(), LengthReranker()):
        instance = langchain_mistral_rerank.MistralRerank(reranker=reranker, on_error="keep_order", telemetry="spans")
        instance.rerank("q", [Document(page_content="a")])
    kept, ranked = exporter.get_finished_spans()
    assert (kept.attributes["mistral_rerank.kept_order"], kept.attributes["error.type"]) == (True, "ScoringError")
    assert "mistral_rerank.kept_order" not in ranked.attributes

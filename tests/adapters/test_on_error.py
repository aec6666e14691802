"""`on_error="keep_order"`: a late or failing reranker leaves the retriever's order, in both frameworks."""

import asyncio
import copy
import logging
import pickle
import threading

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from remote.endpoint import Endpoint, gives, hangs
from support import LengthReranker

import langchain_mistral_rerank
import llama_index_mistral_rerank
import mistral_rerank.adapters
from mistral_rerank import InputTooLongError, RerankerClosedError, ScoringError, SettingsError
from mistral_rerank.errors import DeadlineExceededError, RemoteInputTooLongError, ServerError
from mistral_rerank.scores import UNSCORED

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
TEXTS = ["a", "ccc", "bb"]
SOON = 0.05


class Broken(LengthReranker):
    """Fails with each error once, and then works."""

    def __init__(self, *errors):
        super().__init__()
        self.errors = list(errors)

    def score_pairs(self, pairs, *, overflow=None):
        if self.errors:
            raise self.errors.pop(0)
        return super().score_pairs(pairs)


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch):
    monkeypatch.setattr(mistral_rerank.adapters, "_logged", set())


def wrap(adapter, texts):
    if adapter is LANGCHAIN:
        return [Document(page_content=text) for text in texts]
    return [NodeWithScore(node=TextNode(text=text)) for text in texts]


def both_ways(instance, items):
    """The results of the framework's own synchronous and asynchronous method."""
    if isinstance(instance, LANGCHAIN):
        yield instance.compress_documents(items, "q")
        yield asyncio.run(instance.acompress_documents(items, "q"))
    else:
        yield instance.postprocess_nodes(items, query_str="q")
        yield asyncio.run(instance.apostprocess_nodes(items, query_str="q"))


def text_of(item):
    return item.page_content if isinstance(item, Document) else item.node.text


def metadata_of(item):
    return item.metadata if isinstance(item, Document) else item.node.metadata


@BOTH
def test_a_failing_reranker_leaves_the_retrievers_order_marked_and_counted(adapter, caplog):
    instance = adapter(reranker=Broken(*[ScoringError("no")] * 2), top_n=2, min_score=0.9, on_error="keep_order")
    items = wrap(adapter, TEXTS)
    before = copy.deepcopy(items)
    for reranked in both_ways(instance, items):
        assert [text_of(item) for item in reranked] == ["a", "ccc"]
        assert [metadata_of(item) for item in reranked] == [{"rerank_error": "ScoringError"}] * 2
    assert items == before
    assert instance.kept_orders == {"ScoringError": 2}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "reranking with length failed, and the retriever's order is kept: ScoringError: no" in record.message


@BOTH
def test_without_the_option_the_error_is_raised(adapter):
    instance = adapter(reranker=Broken(*[ScoringError("no")] * 2))
    for _ in range(2):
        with pytest.raises(ScoringError):
            next(both_ways(instance, wrap(adapter, TEXTS)))
    assert instance.kept_orders == {}


@BOTH
def test_the_next_call_is_ranked_and_bears_no_mark(adapter):
    broken = Broken(ScoringError("no"))
    instance = adapter(reranker=broken, on_error="keep_order")
    kept, ranked = both_ways(instance, wrap(adapter, TEXTS))
    assert [text_of(item) for item in kept] == ["a", "ccc", "bb"]
    again = next(both_ways(instance, kept))
    for result in (ranked, again):
        assert [text_of(item) for item in result] == ["ccc", "bb", "a"]
        assert all("rerank_error" not in metadata_of(item) for item in result)


@BOTH
def test_each_cause_is_logged_once(adapter, caplog):
    errors = [ScoringError("no"), ServerError("down"), RuntimeError("secret passage")] * 3
    instance = adapter(reranker=Broken(*errors), on_error="keep_order")
    for _ in errors:
        instance.rerank("q", wrap(adapter, TEXTS))
    assert instance.kept_orders == {"ScoringError": 3, "ServerError": 3, "RuntimeError": 3}
    assert len(caplog.records) == 3
    assert "secret" not in caplog.text  # the message of a foreign error may hold a text


@BOTH
@pytest.mark.parametrize(
    "error",
    [
        InputTooLongError("pair 0"),
        RemoteInputTooLongError("pair 0"),
        RerankerClosedError("closed"),
        SettingsError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_of_the_caller_are_raised_all_the_same(adapter, error):
    instance = adapter(reranker=Broken(error), on_error="keep_order")
    with pytest.raises(type(error)):
        next(both_ways(instance, wrap(adapter, TEXTS)))
    with pytest.raises(ValueError, match="question is empty"):
        instance.rerank(" ", wrap(adapter, TEXTS))
    with pytest.raises(ValueError, match="top_n is -1"):
        instance.rerank("q", wrap(adapter, TEXTS), top_n=-1)


@BOTH
def test_a_hanging_endpoint_leaves_the_retrievers_order_at_the_deadline(adapter):
    with Endpoint(hangs) as endpoint:
        instance = adapter(backend="remote", base_url=endpoint.url, deadline=SOON, on_error="keep_order")
        for reranked in both_ways(instance, wrap(adapter, TEXTS)):
            assert [text_of(item) for item in reranked] == TEXTS
        assert instance.kept_orders == {"RemoteDeadlineExceededError": 2}
        instance.on_error = "raise"
        with pytest.raises(DeadlineExceededError):
            next(both_ways(instance, wrap(adapter, TEXTS)))
        instance.unload()


@BOTH
def test_an_endpoint_that_is_down_leaves_the_retrievers_order(adapter):
    with Endpoint(gives(500, {"detail": "down"})) as endpoint:
        instance = adapter(backend="remote", base_url=endpoint.url, retries=0, on_error="keep_order")
        for reranked in both_ways(instance, wrap(adapter, TEXTS)):
            assert [text_of(item) for item in reranked] == TEXTS
        assert instance.kept_orders == {"ServerError": 2}
        instance.unload()


@BOTH
def test_opening_the_reranker_counts_against_the_deadline(adapter, monkeypatch):
    release = threading.Event()

    def opens(_):
        assert release.wait(60)
        return LengthReranker()

    monkeypatch.setattr(adapter, "open", opens)
    instance = adapter(model=f"opened late by {adapter.__module__}", deadline=SOON, on_error="keep_order")
    for reranked in both_ways(instance, wrap(adapter, TEXTS)):
        assert [text_of(item) for item in reranked] == TEXTS
    release.set()
    assert [ranked.text for ranked in instance.rerank("q", wrap(adapter, TEXTS), deadline=60)] == ["ccc", "bb", "a"]
    instance.unload()


@BOTH
def test_rerank_gives_the_error_beside_unscored_passages(adapter):
    error = ScoringError("no")
    instance = adapter(reranker=Broken(error), on_error="keep_order", top_n=None)
    kept, ranked = (instance.rerank("q", wrap(adapter, TEXTS)) for _ in range(2))
    assert kept.error is error
    assert [(passage.index, passage.score) for passage in kept] == [(index, UNSCORED) for index in range(3)]
    assert ranked.error is None


@BOTH
def test_the_options_survive_copies_and_are_checked(adapter):
    instance = adapter(deadline=0.2, on_error="keep_order")
    for twin in (instance.model_copy(), pickle.loads(pickle.dumps(instance))):
        assert (twin.deadline, twin.on_error) == (0.2, "keep_order")
    for options in ({"deadline": 0}, {"on_error": "ignore"}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            adapter(**options)


def test_llama_index_keeps_the_retrievers_scores_and_hides_the_mark_from_models():
    nodes = [NodeWithScore(node=TextNode(text=text), score=score) for text, score in (("a", 0.9), ("ccc", 0.4))]
    broken = Broken(ScoringError("no"))
    instance = LLAMA_INDEX(reranker=broken, on_error="keep_order", keep_retrieval_score=True)
    kept = instance.postprocess_nodes(nodes, query_str="q")
    assert [node.score for node in kept] == [0.9, 0.4]
    assert kept[0].node.metadata == {"rerank_error": "ScoringError", "retrieval_score": 0.9}
    assert kept[0].node.get_content(MetadataMode.EMBED) == kept[0].node.get_content(MetadataMode.LLM) == "a"


def test_langchain_adds_no_score_and_keeps_that_of_an_earlier_step():
    documents = [Document(page_content="a", metadata={"relevance_score": 0.7}), Document(page_content="b")]
    instance = LANGCHAIN(reranker=Broken(ScoringError("no")), on_error="keep_order")
    kept = instance.compress_documents(documents, "q")
    assert [document.metadata.get("relevance_score") for document in kept] == [0.7, None]

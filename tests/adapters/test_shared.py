"""What holds for both adapters alike."""

import asyncio
import copy
import gc
import pickle
import threading
import tracemalloc
import weakref

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from support import LengthReranker

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank import InvalidInputError, Reranker, RerankerClosedError

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])


def wrap(adapter, texts):
    if adapter is LANGCHAIN:
        return [Document(page_content=text) for text in texts]
    return [NodeWithScore(node=TextNode(text=text)) for text in texts]


def call(adapter, texts, query="q"):
    """Run the framework's own synchronous method; give the texts and scores that come back."""
    items = wrap(type(adapter), texts)
    if isinstance(adapter, LANGCHAIN):
        return [(d.page_content, d.metadata["relevance_score"]) for d in adapter.compress_documents(items, query)]
    return [(n.node.text, n.score) for n in adapter.postprocess_nodes(items, query_str=query)]


async def acall(adapter, texts, query="q"):
    items = wrap(type(adapter), texts)
    if isinstance(adapter, LANGCHAIN):
        reranked = await adapter.acompress_documents(items, query)
        return [(d.page_content, d.metadata["relevance_score"]) for d in reranked]
    return [(n.node.text, n.score) for n in await adapter.apostprocess_nodes(items, query_str=query)]


@BOTH
async def test_core_and_adapters_give_the_same_order_and_scores(adapter, length_reranker):
    texts = ["bb", "a", "dddd", "bb", "", "ccc"]
    expected = [(ranked.text, ranked.score.probability) for ranked in length_reranker.rank("q", texts, top_n=4)]
    instance = adapter(reranker=length_reranker, top_n=4)
    assert call(instance, texts) == expected
    assert await acall(instance, texts) == expected


@BOTH
async def test_rerank_returns_positions_and_accepts_options_of_one_call(adapter, length_reranker):
    instance = adapter(reranker=length_reranker, top_n=1)
    items = wrap(adapter, ["bb", "a", "dddd"])
    assert [ranked.index for ranked in instance.rerank("q", items)] == [2]
    reranked = instance.rerank("q", items, top_n=None, min_score=0.8)
    assert [(ranked.index, ranked.text, ranked.score.logit) for ranked in reranked] == [
        (2, "dddd", 4.0),
        (0, "bb", 2.0),
    ]
    assert await instance.arerank("q", items, top_n=None, min_score=0.8) == reranked
    assert instance.top_n == 1


@BOTH
async def test_a_blank_query_is_refused_even_without_items(adapter, length_reranker):
    for texts in ([], ["a"]):
        with pytest.raises(InvalidInputError, match="question is empty|needs a query"):
            call(adapter(reranker=length_reranker), texts, " ")
        with pytest.raises(InvalidInputError, match="question is empty|needs a query"):
            await acall(adapter(reranker=length_reranker), texts, " ")
    assert length_reranker.calls == 0


@BOTH
def test_options_are_checked_when_they_change(adapter):
    instance = adapter()
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        instance.top_n = -1
    with pytest.raises(ValueError, match="topn"):
        adapter(topn=3)


def test_two_adapters_on_one_model_share_its_weights(tiny):
    options = {"model": str(tiny), "device": "cpu", "dtype": "float32"}
    one, two, other = LANGCHAIN(**options, top_n=1), LLAMA_INDEX(**options), LANGCHAIN(**options, max_length=64)
    assert one.use() is two.use()
    assert one.use() is not other.use()
    assert one.model_copy().use() is copy.deepcopy(two).use() is one.use()
    held = weakref.ref(one.use())
    one.unload()
    del one, two
    gc.collect()
    assert held() is None


def test_unloading_frees_the_weights_for_every_adapter_until_the_next_call(tiny):
    options = {"model": str(tiny), "device": "cpu", "dtype": "float32"}
    one, two = LANGCHAIN(**options), LLAMA_INDEX(**options)
    before, opened = call(one, ["a", "bb"]), two.use()
    one.unload()
    with pytest.raises(RerankerClosedError):
        opened.score_pairs([("q", "p")])
    assert call(two, ["a", "bb"]) == before
    two.unload()


@BOTH
async def test_pickles_and_copies_are_small_and_rank_alike(adapter, tiny):
    instance = adapter(model=str(tiny), device="cpu", dtype="float32", top_n=3)
    for use in (lambda: None, lambda: call(instance, ["a", "bb"])):
        use()
        packed = pickle.dumps(instance)
        assert len(packed) < 10_000
        assert b"safetensors" not in packed
        for twin in (pickle.loads(packed), copy.deepcopy(instance), instance.model_copy()):
            assert (twin.model, twin.top_n) == (instance.model, 3)
            assert call(twin, ["a", "bb", "cc"]) == call(instance, ["a", "bb", "cc"])
    assert len(pickle.dumps(instance)) < 10_000
    assert await acall(pickle.loads(pickle.dumps(instance)), ["a", "bb"]) == call(instance, ["a", "bb"])
    instance.unload()


@BOTH
def test_a_pickle_of_an_adapter_with_a_custom_reranker_holds_no_weights(adapter, tiny_reranker):
    instance = adapter(reranker=tiny_reranker)
    call(instance, ["a"])
    packed = pickle.dumps(instance)
    assert len(packed) < 10_000
    assert call(pickle.loads(packed), ["a", "bb"]) == call(instance, ["a", "bb"])
    assert copy.deepcopy(instance).use() is tiny_reranker


@BOTH
async def test_200_concurrent_calls_each_get_their_documents(adapter, tiny, pairs):
    instance = adapter(model=str(tiny), device="cpu", dtype="float32", top_n=None)
    jobs = [[f"{number} {passage}" for _, passage in pairs[number : number + 3]] for number in range(200)]
    reranked = await asyncio.gather(*(acall(instance, texts, f"question {n}") for n, texts in enumerate(jobs)))
    assert [sorted(text for text, _ in answer) for answer in reranked] == [sorted(texts) for texts in jobs]
    assert reranked[:20] == [call(instance, texts, f"question {n}") for n, texts in enumerate(jobs[:20])]
    instance.unload()


@BOTH
def test_memory_is_flat_over_200_calls(adapter, length_reranker):
    instance, texts = adapter(reranker=length_reranker), ["some words " * 20] * 20
    for _ in range(50):
        call(instance, texts)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(200):
        call(instance, texts)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000  # one call's documents alone are about 30 kB; kept, they would be 6 MB


class Stuck(Reranker):
    """Waits until it is cancelled, and tells."""

    model_name = "stuck"

    def __init__(self):
        self.cancelled = False

    def score_pairs(self, pairs, *, overflow=None):
        raise NotImplementedError

    async def ascore_pairs(self, pairs, *, overflow=None):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@BOTH
async def test_cancelling_a_call_cancels_the_scoring_at_once(adapter):
    stuck = Stuck()
    task = asyncio.create_task(acall(adapter(reranker=stuck), ["a"]))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert stuck.cancelled


@BOTH
async def test_opening_the_reranker_does_not_block_the_event_loop(adapter, monkeypatch):
    def opens(_):
        opened_on.append(threading.current_thread())
        return LengthReranker()

    opened_on = []
    monkeypatch.setattr(adapter, "open", opens)
    mine = adapter(model=f"opened in another thread by {adapter.__module__}")
    assert len(await acall(mine, ["a", "bb"])) == len(await acall(mine, ["a", "bb"])) == 2
    assert len(opened_on) == 1
    assert opened_on[0] is not threading.current_thread()


@BOTH
async def test_async_calls_take_no_thread_of_the_default_executor(adapter, length_reranker, monkeypatch):
    loop = asyncio.get_running_loop()

    def refuse(*_):
        raise AssertionError("the default executor was used")

    monkeypatch.setattr(loop, "run_in_executor", refuse)
    assert len(await acall(adapter(reranker=LengthReranker()), ["a", "bb"])) == 2

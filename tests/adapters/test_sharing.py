"""How long adapters share a model, and what makes two adapters share one."""

import gc
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_mistral_rerank
import llama_index_mistral_rerank
import mistral_rerank.local.reranker
from mistral_rerank import RerankSettings
from mistral_rerank._sharing import KEPT_SECONDS, SharedRerankers

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank


@pytest.fixture
def options(tiny):
    options = {"model": str(tiny), "device": "cpu", "dtype": "float32"}
    yield options
    LANGCHAIN(**options).unload()


@pytest.fixture
def loads(monkeypatch):
    """Every loading of a checkpoint, counted at its door."""

    class Counted(mistral_rerank.local.reranker.LoadedCheckpoint):
        def __init__(self, model, **rest):
            counted.append(model)
            super().__init__(model, **rest)

    counted = []
    monkeypatch.setattr(mistral_rerank.local.reranker, "LoadedCheckpoint", Counted)
    return counted


def first(adapter):
    texts = ["a", "bb", "ccc"]
    if isinstance(adapter, LANGCHAIN):
        return adapter.compress_documents([Document(page_content=text) for text in texts], "q")[0].page_content
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    return adapter.postprocess_nodes(nodes, query_str="q")[0].node.get_content()


def test_settings_of_the_other_backend_do_not_make_another_load(options):
    remote_only = [{"timeout": 3.0}, {"retries": 0}, {"api_key": "k", "backend": "local"}, {"max_concurrency": 1}]
    adapters = [LANGCHAIN(**options, **extra) for extra in remote_only] + [LLAMA_INDEX(**options)]
    assert len({id(adapter.use()) for adapter in adapters}) == 1
    remote = {"backend": "remote", "base_url": "http://h", "model": "m"}
    one, two = LANGCHAIN(**remote, device="cpu"), LANGCHAIN(**remote, cache_size=3, dtype="float16")
    assert one.use() is two.use()
    assert one.use() is not LANGCHAIN(**remote, timeout=3.0).use()


def test_mini_by_name_and_by_default_are_one_model():
    assert (
        LANGCHAIN(device="cpu", dtype="float32").use() is LLAMA_INDEX(model="mini", device="cpu", dtype="float32").use()
    )


def test_adapters_made_anew_for_each_request_load_the_model_once(options, loads):
    def request(number):
        kind = LANGCHAIN if number % 2 else LLAMA_INDEX
        return first(kind(**options, timeout=60.0 + number % 8, top_n=1 + number % 3))  # 16 adapters in turn

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(request, range(400)))
    gc.collect()
    answers += [request(number) for number in range(16)]
    assert len(set(answers)) == 1
    assert loads == [options["model"]]


def test_unload_frees_a_kept_model_at_once(options, loads):
    held = weakref.ref(LANGCHAIN(**options).use())
    first(LANGCHAIN(**options))
    gc.collect()
    assert held() is not None
    LLAMA_INDEX(**options).unload()
    gc.collect()
    assert held() is None
    first(LANGCHAIN(**options))
    assert len(loads) == 2


def test_no_more_released_models_are_kept_than_allowed(options):
    shared = SharedRerankers(models=2)
    settings = [RerankSettings(**options, cache_size=size) for size in range(3)]
    rerankers = [weakref.ref(shared.get(one)) for one in settings]
    gc.collect()
    assert [one() is None for one in rerankers] == [True, False, False]
    shared.get(settings[1])
    shared.get(settings[0])
    gc.collect()
    assert [shared.is_open(one) for one in settings] == [True, True, False]


def test_a_model_that_an_adapter_holds_is_not_freed(options):
    shared = SharedRerankers(models=1)
    holder = shared.get(RerankSettings(**options))
    shared.get(RerankSettings(**options, cache_size=1))
    gc.collect()
    assert shared.get(RerankSettings(**options)) is holder


def test_a_released_model_is_freed_when_its_time_is_over(options):
    freed = threading.Event()
    shared = SharedRerankers(seconds=0.05)
    weakref.finalize(shared.get(RerankSettings(**options)), freed.set)
    assert freed.wait(20)
    assert not shared.is_open(RerankSettings(**options))


def test_a_later_use_keeps_a_model_longer(options, monkeypatch):
    shared, now = SharedRerankers(), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shared.get(RerankSettings(**options))
    shared.get(RerankSettings(**options, cache_size=1))
    now += KEPT_SECONDS - 1
    shared.get(RerankSettings(**options))
    now += 1
    shared._release()
    gc.collect()
    assert shared.is_open(RerankSettings(**options))
    assert not shared.is_open(RerankSettings(**options, cache_size=1))


def test_a_second_load_with_other_settings_is_logged(options, caplog):
    shared = SharedRerankers()
    caplog.set_level(logging.WARNING, "mistral_rerank")
    shared.get(RerankSettings(**options))
    shared.get(RerankSettings(**options, timeout=1.0))
    assert caplog.messages == []
    shared.get(RerankSettings(**options, cache_size=7))
    (message,) = caplog.messages
    assert options["model"] in message
    assert message.endswith("cache_size")


@pytest.mark.parametrize("backend", ["local", "remote"])
def test_a_closed_reranker_is_replaced_on_the_next_use(options, backend):
    adapter = LANGCHAIN(**options, base_url="http://h", protocol="tei", backend=backend)
    closed = adapter.use()
    closed.close()
    assert adapter.use() is not closed
    assert not adapter.use().is_closed
    adapter.unload()


@pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX])
def test_both_adapters_prepare_passages(adapter, options, tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "rerank.json").write_text('{"template": "Passage: {passage}\\nQuestion: {query}"}')
    made = adapter(**options | {"model": str(tmp_path), "passage_cache": "1MiB"})
    texts = ["The glacier moved slowly down the valley.", "Yeast makes dough rise."]
    items = (
        [Document(page_content=text) for text in texts]
        if adapter is LANGCHAIN
        else [NodeWithScore(node=TextNode(text=text)) for text in texts]
    )
    made.prepare(items)
    assert made.use().passage_cache_info().misses == 2
    made.rerank("What moved?", items)
    assert made.use().passage_cache_info().hits == 2
    made.unload()

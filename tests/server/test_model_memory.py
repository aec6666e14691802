"""Which models are loaded and freed, and when, with stand-ins for models."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support import LengthReranker

from mistral_rerank import CheckpointError, SettingsError
from mistral_rerank.server.model_memory import ModelMemory
from mistral_rerank.server.prometheus import Metrics

SIZE = 100


class Sized(LengthReranker):
    """Takes 100 bytes, and loads when it may."""

    def __init__(self, may_load: asyncio.Event | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.may_load, self.error = may_load, error
        self.is_loading = False

    def weight_bytes(self) -> int:
        return SIZE

    async def ascore_pairs(self, pairs, *, overflow=None):
        self.is_loading = True
        if self.may_load is not None:
            await self.may_load.wait()
        if self.error is not None:
            raise self.error
        return self.score_pairs(pairs)


class Memory(ModelMemory):
    """Records the rerankers that it opens by the names of their models."""

    def __init__(self, limit: int | None = None) -> None:
        self.metrics = Metrics()
        super().__init__(limit, self.metrics)
        self.opened: list[tuple[str, Sized]] = []

    def call(self, name: str, **options: object):
        def open_reranker() -> Sized:
            self.opened.append((name, Sized(**options)))
            return self.opened[-1][1]

        return self.use(name, open_reranker)

    async def call_once(self, name: str, **options: object) -> Sized:
        async with self.call(name, **options) as reranker:
            return reranker

    @property
    def loads(self) -> list[str]:
        return [name for name, _ in self.opened]

    def is_loading(self, name: str) -> bool:
        return any(reranker.is_loading for other, reranker in self.opened if other == name)

    @property
    def in_memory(self) -> set[str]:
        return {name for name, reranker in self.opened if not reranker.is_closed}


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds; the size of a model is read in a thread."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_seconds() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(within_seconds())


def test_concurrent_first_calls_load_a_model_once():
    async def test() -> None:
        memory, may_load = Memory(), asyncio.Event()
        calls = [asyncio.create_task(memory.call_once("a", may_load=may_load)) for _ in range(5)]
        await until(lambda: memory.is_loading("a"))
        may_load.set()
        assert len({id(reranker) for reranker in await asyncio.gather(*calls)}) == 1
        assert memory.loads == ["a"]
        assert 'mistral_rerank_model_loads_total{model="a"} 1.0' in memory.metrics.text().decode()

    run(test)


def test_without_a_limit_all_models_stay():
    async def test() -> None:
        memory = Memory()
        for name in "abcab":
            await memory.call_once(name)
        assert memory.loads == ["a", "b", "c"]
        await memory.aclose()
        assert memory.in_memory == set()

    run(test)


def test_the_least_recently_used_model_is_freed():
    async def test() -> None:
        memory = Memory(2 * SIZE)
        for name in "abac":
            await memory.call_once(name)
        assert memory.in_memory == {"a", "c"}
        await memory.call_once("b")
        assert (memory.in_memory, memory.loads) == ({"b", "c"}, ["a", "b", "c", "b"])
        metrics = memory.metrics.text().decode()
        sizes = {name: f'mistral_rerank_model_weight_bytes{{model="{name}"}} ' for name in "abc"}
        assert sizes["a"] + "0.0" in metrics
        assert sizes["b"] + "100.0" in metrics
        assert sizes["c"] + "100.0" in metrics

    run(test)


def test_an_idle_model_is_freed_before_a_busy_one():
    async def test() -> None:
        memory = Memory(2 * SIZE)
        async with memory.call("a") as busy:
            await memory.call_once("b")
            await memory.call_once("c")
            assert memory.in_memory == {"a", "c"}
            assert not busy.is_closed

    run(test)


def test_a_busy_model_is_freed_after_its_calls_and_its_next_calls_load_it_again():
    async def test() -> None:
        memory = Memory(SIZE)
        async with memory.call("a") as busy:
            other = asyncio.create_task(memory.call_once("b"))
            await until(lambda: "a" not in memory._current)  # it is chosen
            again = asyncio.create_task(memory.call_once("a"))
            await until(lambda: memory.loads == ["a", "b", "a"])
            assert not busy.is_closed
            assert not other.done()
            assert not again.done()
        await asyncio.gather(other, again)
        assert busy.is_closed
        assert (memory.loads, memory.in_memory) == (["a", "b", "a"], {"a"})

    run(test)


def test_other_models_are_used_while_one_is_loaded():
    async def test() -> None:
        memory, may_load = Memory(2 * SIZE), asyncio.Event()
        loading = asyncio.create_task(memory.call_once("a", may_load=may_load))
        await until(lambda: memory.is_loading("a"))
        await memory.call_once("b")
        assert not loading.done()
        may_load.set()
        await loading
        assert memory.in_memory == {"a", "b"}

    run(test)


def test_a_load_goes_on_without_its_caller_and_serves_the_next():
    async def test() -> None:
        memory, may_load = Memory(SIZE), asyncio.Event()
        first = asyncio.create_task(memory.call_once("a", may_load=may_load))
        await until(lambda: memory.is_loading("a"))
        first.cancel()
        await asyncio.wait({first})
        may_load.set()
        await memory.call_once("a")
        assert memory.loads == ["a"]

    run(test)


def test_after_a_failed_load_the_next_call_tries_again():
    async def test() -> None:
        memory = Memory(SIZE)
        failing = [memory.call_once("a", error=CheckpointError("no weights")) for _ in range(2)]
        results = await asyncio.gather(*failing, return_exceptions=True)
        assert [str(error) for error in results] == ["no weights"] * 2
        assert memory.in_memory == set()
        await memory.call_once("a")
        await memory.call_once("b")
        assert memory.loads == ["a", "a", "b"]

    run(test)


def test_a_model_over_the_limit_is_refused_and_frees_no_other():
    async def test() -> None:
        memory = Memory(SIZE)
        await memory.call_once("a")
        memory._limit = SIZE - 1
        with pytest.raises(SettingsError, match="the model b has 100B of weights, over model_memory, 99B"):
            await memory.call_once("b")
        assert memory.in_memory == {"a"}

    run(test)


def test_closing_cancels_loads_and_closes_models():
    async def test() -> None:
        memory = Memory(2 * SIZE)
        await memory.call_once("a")
        loading = asyncio.create_task(memory.call_once("b", may_load=asyncio.Event()))
        await until(lambda: memory.is_loading("b"))
        await memory.aclose()
        assert memory.in_memory == set()
        with pytest.raises(asyncio.CancelledError):
            await loading

    run(test)

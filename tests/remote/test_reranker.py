import asyncio
import contextlib
import gc
import pickle
import threading
import time

import httpx
import pytest
from remote.endpoint import Endpoint, expected, gives, hangs, logit_of, speaks

from mistral_rerank import (
    InvalidInputError,
    RemoteReranker,
    RerankerClosedError,
    Score,
    SettingsError,
    errors,
    open_reranker,
)
from mistral_rerank.protocols import PROTOCOLS

PASSAGES = [f"passage {number}" for number in range(100)]


@pytest.fixture
def nim():
    with Endpoint(speaks("nvidia")) as endpoint:
        yield endpoint


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_gives_the_same_ranking(protocol):
    with (
        Endpoint(speaks(protocol)) as endpoint,
        open_reranker("m", backend="remote", base_url=endpoint.url, protocol=protocol) as reranker,
    ):
        found, right = reranker.rank("q", PASSAGES), expected(PASSAGES)
    assert [place.index for place in found] == [place.index for place in right]
    assert [place.score.logit for place in found] == pytest.approx([place.score.logit for place in right], abs=1e-9)
    assert [place.score.probability for place in found] == [place.score.probability for place in right]


@pytest.mark.parametrize(
    ("protocol", "path", "tried"),
    [
        ("nvidia", "/v1/ranking", 1),
        ("jina", "/v1/rerank", 2),
        ("nvidia", "/v1/ranking/m", 3),
        ("nvidia", "/v1/retrieval/m/reranking", 4),
        ("jina", "/rerank", 5),
        ("tei", "/rerank", 6),
        ("jina", "/v1/reranking", 7),
        ("jina", "/reranking", 8),
        ("jina", "/v1/reranks", 9),
        ("jina", "/v3/rerank", 10),
    ],
)
def test_auto_finds_the_protocol_once_and_remembers_it(protocol, path, tried):
    with (
        Endpoint(speaks(protocol, path=path)) as endpoint,
        open_reranker("m", backend="remote", base_url=endpoint.url) as reranker,
    ):
        first = reranker.rank("q", PASSAGES[:3])
        assert len(endpoint.requests) == tried
        assert reranker.rank("q", PASSAGES[:3]) == first
    assert [place.index for place in first] == [place.index for place in expected(PASSAGES[:3])]
    assert [request.path for request in endpoint.requests[tried - 1 :]] == [path, path]


def test_auto_sends_one_request_at_a_time_until_it_knows():
    with (
        Endpoint(speaks("tei", most=32)) as endpoint,
        open_reranker("m", backend="remote", base_url=endpoint.url) as reranker,
    ):
        assert [p.index for p in reranker.rank("q", PASSAGES)] == [p.index for p in expected(PASSAGES)]
        assert [request.path for request in endpoint.requests].count("/v1/ranking") == 1


def test_auto_that_finds_nothing_says_what_it_tried():
    with (
        Endpoint(gives(404, b"not here")) as endpoint,
        open_reranker("m", backend="remote", base_url=endpoint.url) as reranker,
        pytest.raises(errors.NotFoundError, match=r"/v1/ranking, .*/v1/rerank, .*/rerank"),
    ):
        reranker.rank("q", ["one"])


def test_auto_reports_the_refusal_that_came_from_the_right_route():
    with (
        Endpoint(gives(404, b""), [gives(422, {"detail": "model m is not loaded"})]) as endpoint,
        open_reranker("m", backend="remote", base_url=endpoint.url) as reranker,
        pytest.raises(errors.RequestRefusedError, match="not loaded"),
    ):
        reranker.rank("q", ["one"])


def test_auto_stops_at_a_route_that_understood_and_refused_for_length():
    body = {"error": "Input length 600 exceeds maximum allowed token size 512"}
    with (
        Endpoint(gives(400, body)) as endpoint,
        open_reranker("m", backend="remote", base_url=endpoint.url, overflow="error") as reranker,
        pytest.raises(errors.InputTooLongError, match="512"),
    ):
        reranker.rank("q", ["one"])
    assert len(endpoint.requests) == 1
    assert endpoint.bodies[0]["truncate"] == "NONE"


def test_without_a_model_a_nim_is_asked_for_its_own_once(nim):
    nim.script.append(gives(200, {"object": "list", "data": [{"id": "served"}]}))
    with open_reranker(backend="remote", base_url=nim.url, protocol="nvidia") as reranker:
        reranker.rank("q", ["one"])
        reranker.rank("q", ["two"])
    assert [request.path for request in nim.requests] == ["/v1/models", "/v1/ranking", "/v1/ranking"]
    assert [body["model"] for body in nim.bodies] == ["served", "served"]


def test_a_nim_that_is_not_ready_to_list_its_model_is_asked_again(nim):
    nim.script += [gives(503, b""), gives(422, {"detail": "model: Field required"})]
    nim.script.append(gives(200, {"object": "list", "data": [{"id": "served"}]}))
    with open_reranker(backend="remote", base_url=nim.url, protocol="nvidia") as reranker:
        with pytest.raises(errors.RequestRefusedError):
            reranker.rank("q", ["one"])
        reranker.rank("q", ["two"])
    assert nim.bodies[-1]["model"] == "served"


def test_without_a_model_the_first_request_goes_alone(nim):
    listed = threading.Event()

    def lists(exchange):
        time.sleep(0.2)  # others would be there by now
        assert len(nim.requests) == 1
        listed.set()
        exchange.respond(200, {"object": "list", "data": [{"id": "served"}]})

    nim.script.append(lists)
    with open_reranker(backend="remote", base_url=nim.url, protocol="nvidia") as reranker:
        reranker.rank("q", [f"passage {n}" for n in range(100)])
    assert listed.is_set()
    assert {body["model"] for body in nim.bodies} == {"served"}
    assert len(nim.bodies) > 1


def test_without_a_model_and_without_a_list_none_is_named(nim):
    nim.script.append(gives(404, b""))
    with open_reranker(backend="remote", base_url=nim.url, protocol="nvidia") as reranker:
        reranker.rank("q", ["one"])
    assert "model" not in nim.bodies[0]


@pytest.mark.parametrize(
    ("count", "settings", "sizes"),
    [
        (20, {}, [20]),
        (100, {}, [4, 32, 32, 32]),
        (512, {}, [64] * 8),
        (100, {"max_concurrency": 1}, [100]),
        (1100, {"max_concurrency": 1}, [76, 512, 512]),
        (100, {"max_passages": 10}, [10] * 10),
        (100, {"max_passages": 2000, "protocol": "tei"}, [4, 32, 32, 32]),
        (100, {"max_passages": 2000, "protocol": "tei", "max_concurrency": 1}, [100]),
    ],
)
def test_a_call_is_split_within_the_limits_and_over_the_concurrency(count, settings, sizes):
    protocol = settings.get("protocol", "nvidia")
    passages = [f"passage {number}" for number in range(count)]
    with Endpoint(speaks(protocol)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, **({"protocol": "nvidia"} | settings)) as reranker:
            scores = reranker.score_pairs([("q", passage) for passage in passages])
    assert [score.logit for score in scores] == [logit_of(passage) for passage in passages]
    assert sorted(len(PROTOCOLS[protocol].read_request(body).passages) for body in endpoint.bodies) == sizes


def test_a_call_is_split_by_bytes(nim):
    passages = [f"{number}" + "é" * 1_000_000 for number in range(4)]
    with RemoteReranker("m", base_url=nim.url, protocol="nvidia") as reranker:
        assert [place.index for place in reranker.rank("q", passages)] == [p.index for p in expected(passages)]
    assert [len(body["passages"]) for body in nim.bodies] == [1, 1, 1, 1]
    assert max(int(request.headers["content-length"]) for request in nim.requests) < 4_000_000


def test_pairs_of_several_questions_come_back_in_order(nim):
    pairs = [(f"question {number % 3}", f"passage {number % 7}") for number in range(40)]
    with RemoteReranker("m", base_url=nim.url, protocol="nvidia") as reranker:
        assert reranker.score_pairs(pairs) == [Score.from_logit(logit_of(passage)) for _, passage in pairs]
        assert asyncio.run(reranker.ascore_pairs(pairs)) == reranker.score_pairs(pairs)
    assert {body["query"]["text"] for body in nim.bodies} == {"question 0", "question 1", "question 2"}


def test_nothing_to_rank_sends_nothing(nim):
    with RemoteReranker("m", base_url=nim.url) as reranker:
        assert reranker.rank("q", []) == []
        assert reranker.score_pairs([]) == []
        assert asyncio.run(reranker.ascore_pairs([])) == []
        with pytest.raises(InvalidInputError):
            reranker.rank(" ", ["one"])
    assert nim.requests == []


def test_a_text_that_is_no_unicode_is_refused(nim):
    with RemoteReranker("m", base_url=nim.url) as reranker, pytest.raises(InvalidInputError, match="surrogate"):
        reranker.rank("q", ["\ud800"])


def test_event_loops_one_after_the_other_and_threads_at_once(nim):
    right = expected(PASSAGES)
    with RemoteReranker("m", base_url=nim.url, protocol="nvidia") as reranker:
        for _ in range(3):
            assert asyncio.run(reranker.arank("q", PASSAGES)) == right
        found = []
        threads = [threading.Thread(target=lambda: found.append(reranker.rank("q", PASSAGES))) for _ in range(16)] + [
            threading.Thread(target=lambda: found.append(asyncio.run(reranker.arank("q", PASSAGES)))) for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [right] * 32


async def test_200_tasks_each_get_their_own(nim):
    async with RemoteReranker("m", base_url=nim.url, protocol="nvidia") as reranker:
        lists = [[f"{number}/{place}" for place in range(3)] for number in range(200)]
        found = await asyncio.gather(*(reranker.arank(f"q {number}", texts) for number, texts in enumerate(lists)))
    assert found == [expected(texts) for texts in lists]


async def test_cancelling_closes_the_connection():
    asked, gone = threading.Event(), threading.Event()

    def waits_for_the_end(exchange):
        asked.set()
        with contextlib.suppress(OSError):
            exchange.handler.connection.settimeout(20)
            if exchange.handler.connection.recv(1) == b"":
                gone.set()
        exchange.handler.close_connection = True

    with Endpoint(waits_for_the_end) as endpoint:
        async with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia") as reranker:
            task = asyncio.create_task(reranker.arank("q", ["one"]))
            assert await asyncio.to_thread(asked.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(gone.wait, 20)


async def test_a_failed_batch_cancels_its_siblings():
    with Endpoint(hangs, [gives(403, {"detail": "no"})]) as endpoint:
        async with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia") as reranker:
            with pytest.raises(errors.AuthenticationError):
                await reranker.arank("q", PASSAGES)


def test_closed_means_closed_and_twice_is_harmless(nim):
    reranker = RemoteReranker("m", base_url=nim.url)
    reranker.rank("q", ["one"])
    reranker.close()
    reranker.close()
    asyncio.run(reranker.aclose())
    for ask in (lambda: reranker.rank("q", ["one"]), lambda: asyncio.run(reranker.arank("q", ["one"]))):
        with pytest.raises(RerankerClosedError):
            ask()


def test_closing_ends_the_wait_of_other_threads(nim):
    reranker = RemoteReranker("m", base_url=nim.url, protocol="nvidia", retries=5)
    nim.then = gives(503, {})
    caught = []

    def ask():
        try:
            reranker.rank("q", ["one"])
        except errors.RerankError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not nim.requests:
        pass
    reranker.close()
    thread.join()
    assert [type(error) for error in caught] == [RerankerClosedError]


def test_a_forgotten_reranker_frees_its_threads(nim):
    reranker = RemoteReranker("m", base_url=nim.url)
    reranker.rank("q", PASSAGES)
    del reranker
    gc.collect()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("mistral-rerank-remote")]:
        thread.join(20)
        assert not thread.is_alive()


def test_an_injected_transport_takes_the_place_of_the_network():
    def response(request: httpx.Request) -> httpx.Response:
        assert request.headers["x-team"] == "search"
        assert request.headers["user-agent"].startswith("mistral-rerank/")
        return httpx.Response(200, json=[{"index": 0, "score": 2.0}])

    fake = httpx.MockTransport(response)
    with RemoteReranker(
        "m", base_url="http://tei", protocol="tei", headers={"X-Team": "search"}, transport=fake
    ) as reranker:
        assert reranker.score_pairs([("q", "p")]) == [Score.from_logit(2.0)]
        assert asyncio.run(reranker.ascore_pairs([("q", "p")])) == [Score.from_logit(2.0)]


def test_a_pickle_opens_to_the_same_settings(nim):
    with RemoteReranker("m", base_url=nim.url, protocol="nvidia", max_passages=2) as reranker:
        data = pickle.dumps(reranker)
    assert len(data) < 10_000
    with pickle.loads(data) as again:
        assert again.rank("q", PASSAGES[:4]) == expected(PASSAGES[:4])
    assert len(nim.requests) == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"overflow": "chunk"}, "chunk"),
        ({"protocol": "nim"}, "protocol"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"base_url": "nim:8000"}, "base_url"),
        ({"base_url": None, "protocol": "tei"}, "base_url"),
        ({"api_key": "two\nlines"}, "api_key"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings, named):
    with pytest.raises(SettingsError, match=named):
        open_reranker("m", **({"backend": "remote", "base_url": "http://h"} | settings))


def test_the_unit_of_scores_can_be_said(nim):
    with Endpoint(gives(200, [{"index": 0, "score": 2.0}])) as endpoint:
        options = {"backend": "remote", "base_url": f"{endpoint.url}/rerank"}
        with open_reranker("m", **options, score_unit="logit") as reranker:
            assert reranker.score_pairs([("q", "p")]) == [Score.from_logit(2.0)]
        with open_reranker("m", **options, retries=0) as reranker, pytest.raises(errors.InvalidReplyError):
            reranker.score_pairs([("q", "p")])

"""Keys, queue, time, disconnects and the way down."""

import asyncio
import platform
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from command import run
from pydantic import ValidationError
from server.running import commanded, running
from support import LengthReranker
from typer.testing import CliRunner

from mistral_rerank import CheckpointError, LocalReranker, Score
from mistral_rerank._version import __version__
from mistral_rerank.cli import app
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.server.middleware import OPEN_PATHS
from mistral_rerank.server.settings import ServerSettings
from mistral_rerank.settings import describe

BODY = {"query": "q", "documents": ["a", "bbb"]}


class HeldReranker(LengthReranker):
    """Answers the first pair at once, as the warm-up, and later ones when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go, self.cancelled = threading.Event(), threading.Event(), threading.Event()

    async def ascore_pairs(self, pairs, *, overflow=None) -> list[Score]:
        if pairs != [("warm", "up")]:
            self.entered.set()
            try:
                await asyncio.to_thread(self.go.wait, 30)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return self.score_pairs(pairs)


def in_background(call):
    """Run a call in a thread; returns a function that waits for its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()

    def result():
        thread.join(30)
        return results[0]

    return result


def test_keys_guard_everything_that_is_not_open():
    with running(LengthReranker(), api_keys="first, second") as url, httpx.Client(base_url=url) as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path, methods in paths.items():
            for method in methods:
                reply = client.request(method, path, json=BODY)
                assert (reply.status_code == 401) == (path not in OPEN_PATHS), path
                if reply.status_code == 401:
                    assert reply.headers["WWW-Authenticate"] == "Bearer"
                    assert reply.json()["object"] == "error"
        assert client.post("/nowhere").status_code == 401
        for key, status in {"first": 200, "second": 200, "third": 401, "first second": 401}.items():
            sent = {"Authorization": f"Bearer {key}"}
            assert client.post("/v1/rerank", json=BODY, headers=sent).status_code == status, key
        assert client.post("/v1/rerank", json=BODY, headers={"Authorization": "Basic first"}).status_code == 401


@pytest.mark.parametrize("keys", [",", "first,", [""]])
def test_blank_keys_are_refused_rather_than_leave_the_server_open(keys: object):
    with pytest.raises(ValidationError, match="blank"):
        ServerSettings(api_keys=keys)


@pytest.mark.parametrize("keys", ["", " ", "secret,,other"])
def test_blank_keys_of_the_environment_are_refused_and_none_is_shown(keys: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MISTRAL_RERANK_SERVER_API_KEYS", keys)
    with pytest.raises(ValidationError, match="blank") as caught:
        ServerSettings()
    assert "blank" in describe(caught.value)
    assert "secret" not in describe(caught.value)


def test_without_keys_any_authorization_is_ignored():
    with running(LengthReranker()) as url:
        reply = httpx.post(url + "/v1/rerank", json=BODY, headers={"Authorization": "Bearer **********"})
    assert reply.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(chunked: bool):
    content = b'{"query": "q", "documents": ["' + b"a" * 5000 + b'"]}'
    with running(LengthReranker(), max_body_bytes=3000) as url:
        reply = httpx.post(
            url + "/v1/rerank",
            content=iter([content[:2000], content[2000:]]) if chunked else content,
            headers={"content-type": "application/json"},
        )
    assert reply.status_code == 413
    assert "3000 bytes" in reply.json()["message"]


class MeasuredReranker(HeldReranker):
    """Its model has computed 1,000 tokens in a second."""

    max_length = 2000

    def observe(self, observer) -> None:
        observer.ran_batch(1, 1000, 1.0)


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/rerank", 429), ("/v2/rerank", 429), ("/rerank", 429), ("/v1/ranking", 503), ("/score", 503)],
)
def test_a_full_queue_says_when_its_work_is_done_with_the_status_of_the_protocol(path: str, status: int):
    held = MeasuredReranker()
    with running(held, max_requests=1) as url:
        # 3 passages of 1,000 tokens, and 3 that are cut at 2,000
        body = BODY | {"documents": ["a" * 3995] * 3 + ["a" * 100_000] * 3}
        first = in_background(lambda: httpx.post(url + "/v1/rerank", json=body, timeout=30))
        assert held.entered.wait(10)
        second = httpx.post(url + path, json=BODY)
        metrics = httpx.get(url + "/metrics").text
        held.go.set()
        assert first().status_code == 200
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 200
    assert (second.status_code, second.headers["Retry-After"]) == (status, "9")
    assert "mistral_rerank_queue_tokens 9000.0" in metrics


def test_work_that_cannot_be_done_in_time_is_not_begun():
    held = MeasuredReranker()
    with running(held, timeout=10) as url:
        large, small = ({"query": "q", "documents": ["a" * 3995] * number} for number in (6, 1))
        first = in_background(lambda: httpx.post(url + "/v1/rerank", json=large, timeout=30))
        assert held.entered.wait(10)
        refused = httpx.post(url + "/v1/rerank", json=large)  # 12 s, in turn with the first
        second = in_background(lambda: httpx.post(url + "/v1/rerank", json=small, timeout=30))  # 2 s
        while "mistral_rerank_queue_size 2.0" not in (metrics := httpx.get(url + "/metrics").text):
            pass
        held.go.set()
        assert [first().status_code, second().status_code] == [200, 200]
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "6")
    assert "about 12 s" in refused.json()["message"]
    assert 'mistral_rerank_rejections_total{reason="deadline"} 1.0' in metrics


def test_an_idle_server_begins_any_work():
    held = MeasuredReranker()
    held.go.set()
    with running(held, timeout=10) as url:
        body = {"query": "q", "documents": ["a" * 8000] * 20}
        assert httpx.post(url + "/v1/rerank", json=body).status_code == 200


def test_a_request_that_takes_too_long_is_a_504_and_leaves_the_queue():
    held = HeldReranker()
    with running(held, timeout=0.2) as url:
        reply = httpx.post(url + "/v1/rerank", json=BODY)
        assert reply.status_code == 504
        assert held.cancelled.wait(10)
        held.go.set()


def test_the_work_of_a_client_that_has_gone_is_dropped():
    held = HeldReranker()
    with running(held) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/rerank", json=BODY, timeout=httpx.Timeout(10, read=0.2))
        assert held.cancelled.wait(10)
        held.go.set()
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 200
        metrics = httpx.get(url + "/metrics").text
    assert 'mistral_rerank_rejections_total{reason="disconnected"} 1.0' in metrics
    assert 'status="499"' in metrics
    assert "mistral_rerank_cancelled_passages_total 2.0" in metrics


def test_a_client_that_does_not_ask_gets_the_overflow_that_the_server_was_given():
    class Noting(LengthReranker):
        def score_pairs(self, pairs, *, overflow=None):
            asked.append(overflow)
            return super().score_pairs(pairs)

        async def ascore_pairs(self, pairs, *, overflow=None):
            return self.score_pairs(pairs, overflow=overflow)

    asked: list[str | None] = []
    with running(Noting()) as url:
        asked.clear()
        httpx.post(url + "/v1/rerank", json=BODY).raise_for_status()
        nim = {"query": {"text": "q"}, "passages": [{"text": "a"}], "truncate": "NONE"}
        httpx.post(url + "/v1/ranking", json=nim).raise_for_status()
    assert asked == [None, "error"]


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (lambda url: httpx.post(url + "/v1/rerank", json=BODY), 401),
        (lambda url: httpx.post(url + "/v1/rerank", content=b"x" * 200, headers={"Authorization": "Bearer k"}), 413),
    ],
)
def test_a_refusal_counts_under_its_route(request_of, status: int):
    with running(LengthReranker(), api_keys="k", max_body_bytes=100) as url:
        assert request_of(url).status_code == status
        assert f'requests_total{{route="/v1/rerank",status="{status}"}} 1.0' in httpx.get(url + "/metrics").text


def test_it_is_alive_but_not_ready_until_the_model_is_loaded():
    class Loading(HeldReranker):
        async def ascore_pairs(self, pairs, *, overflow=None):
            await asyncio.to_thread(self.go.wait)
            return self.score_pairs(pairs)

    loading = Loading()
    with running(loading) as url:
        assert httpx.get(url + "/v1/health/live").status_code == 200
        reply = httpx.get(url + "/v1/health/ready")
        assert "mistral_rerank_ready 0.0" in httpx.get(url + "/metrics").text
        loading.go.set()
        assert (reply.status_code, reply.json()["message"]) == (503, "Service is loading the model.")
        while httpx.get(url + "/v1/health/ready").status_code != 200:
            time.sleep(0.01)
        assert "mistral_rerank_ready 1.0" in httpx.get(url + "/metrics").text


def wait_until_ready_or_gone(url: str) -> None:
    while httpx.get(url + "/v1/health/ready").status_code == 503:
        pass


def test_a_model_that_cannot_be_loaded_stops_the_server():
    class Broken(LengthReranker):
        async def ascore_pairs(self, pairs, *, overflow=None):
            await asyncio.to_thread(go.wait)
            raise CheckpointError("no weights")

    go = threading.Event()
    with running(Broken()) as url:
        assert httpx.get(url + "/v1/health/ready").status_code == 503
        go.set()
        with pytest.raises(httpx.TransportError):
            wait_until_ready_or_gone(url)


def test_metrics_tell_of_every_stage(tiny: Path):
    with LocalReranker(str(tiny), device="cpu", share_batches=True) as reranker, running(reranker) as url:
        while httpx.get(url + "/v1/health/ready").status_code != 200:
            time.sleep(0.01)
        reply = httpx.post(url + "/v1/rerank", json=BODY).json()
        httpx.post(url + "/v1/rerank", json={})
        text = httpx.get(url + "/v1/metrics").text
    assert 'mistral_rerank_requests_total{route="/v1/rerank",status="200"} 1.0' in text
    assert 'mistral_rerank_requests_total{route="/v1/rerank",status="422"} 1.0' in text
    assert f"mistral_rerank_prompt_tokens_total {float(reply['usage']['total_tokens'])}" in text
    assert reply["usage"]["total_tokens"] > 0
    assert "mistral_rerank_queue_size 0.0" in text
    for name in ("queue_duration_seconds", "tokenization_duration_seconds", "inference_duration_seconds"):
        assert f"mistral_rerank_{name}_count 2.0" in text, name  # the warm-up and the request
    assert "mistral_rerank_batch_size_sum 3.0" in text
    assert "mistral_rerank_batch_tokens_sum" in text
    assert 'mistral_rerank_request_duration_seconds_count{route="/v1/rerank"} 2.0' in text
    assert "mistral_rerank_request_passages_sum 2.0" in text
    assert "process_resident_memory_bytes" in text
    assert f'mistral_rerank_build_info{{python="{platform.python_version()}",version="{__version__}"}} 1.0' in text


def test_a_refusal_for_length_does_not_wait_for_the_model(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    entered, go, compute = threading.Event(), threading.Event(), RerankModel.logits

    def held(self, *arguments):
        if is_ready:
            entered.set()
            go.wait(30)
        return compute(self, *arguments)

    is_ready = []
    monkeypatch.setattr(RerankModel, "logits", held)
    long = {"query": {"text": "q"}, "passages": [{"text": "a word " * 100_000}]}
    with LocalReranker(str(tiny), device="cpu", share_batches=True, max_length=64) as reranker:
        with running(reranker) as url:
            while httpx.get(url + "/v1/health/ready").status_code != 200:
                time.sleep(0.01)
            is_ready.append(True)
            first = in_background(lambda: httpx.post(url + "/v1/rerank", json=BODY, timeout=30))
            assert entered.wait(10)
            refused = httpx.post(url + "/v1/ranking", json=long)
            go.set()
            assert first().status_code == 200
    assert (refused.status_code, "exceeds maximum allowed" in refused.json()["message"]) == (422, True)


@pytest.mark.parametrize(
    ("options", "length", "threads"), [([], 2048, None), (["--max-length", "8192", "--threads", "3"], 8192, 3)]
)
def test_a_served_model_has_a_lower_limit_and_the_threads_of_its_container(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], length: int, threads: int | None
):
    served = []
    monkeypatch.setattr("mistral_rerank.server.lifecycle.serve", lambda reranker, *_, **__: served.append(reranker))
    monkeypatch.setattr("mistral_rerank.local.threads.set_threads", served.append)
    found = CliRunner().invoke(app, ["serve", "--model", str(tiny), *options])
    assert found.exception is None, found.output
    assert [served[0], served[1].max_length] == [threads, length]


@pytest.fixture
def process(tiny: Path):
    """The command itself, serving a tiny model on a free port."""
    with commanded("--model", str(tiny)) as server:
        yield server


def test_sigterm_answers_what_was_begun_and_ends(process):
    documents = [f"{number} words of a passage " * 30 for number in range(900)]
    body = {"query": "q", "documents": documents}
    reply = in_background(lambda: httpx.post(process.url + "/v1/rerank", json=body, timeout=60))
    while "mistral_rerank_queue_size 1.0" not in httpx.get(process.url + "/metrics").text:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    while (ready := httpx.get(process.url + "/v1/health/ready")).status_code == 200:
        pass
    refused = httpx.post(process.url + "/v1/rerank", json=BODY)
    assert (ready.status_code, ready.json()["message"]) == (503, "Service is shutting down.")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert len(reply().json()["results"]) == 900
    assert process.wait(20) == 0


def test_a_taken_port_is_one_clear_line(tiny: Path):
    with running(LengthReranker()) as url:
        port = url.rsplit(":", 1)[1]
        second = run("serve", "--model", tiny, "--port", port)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith(f"mistral-rerank: cannot serve at 127.0.0.1:{port}")
    assert "Traceback" not in second.stderr

"""Replicas on Ray Serve: what happens to requests when one dies, or all are told to stop. That each answers as one process does, test_routes shows."""

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from server.running import LOOPBACK, commanded, descendants, listening, ray_cluster, replicated
from support import LengthReranker

from mistral_rerank import RemoteReranker, RerankSettings, Score, SettingsError
from mistral_rerank.server.settings import ServerSettings

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'mistral-rerank[cluster]'")

from mistral_rerank.server.cluster import ClusterSettings, deployment, serve_cluster  # noqa: E402

QUERIES = [f"question {number}" for number in range(12)]
PASSAGES = ["a", "bbb", "cc"]


class HeldReranker(LengthReranker):
    """Notes in a folder which process has which question, and answers once there is a file `go`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    async def ascore_pairs(self, pairs, *, overflow=None) -> list[Score]:
        (self.folder / f"{pairs[0][0]} at {os.getpid()}").touch()
        if pairs[0][0] in QUERIES:
            await asyncio.to_thread(self.wait)
        return self.score_pairs(pairs)

    def wait(self) -> None:
        while not (self.folder / "go").exists():
            time.sleep(0.01)


@pytest.fixture
def held(tmp_path: Path):
    """The URL of two replicas, and the folder of their notes."""
    with replicated(partial(HeldReranker, tmp_path)) as url:
        while len(list(tmp_path.glob("route at *"))) < 2:  # until the router knows both
            httpx.post(f"{url}/v1/rerank", json={"query": "route", "documents": PASSAGES}, timeout=60)
        yield url, tmp_path


def wait_for_all(folder: Path, calls: Iterable[Future]) -> dict[str, int]:
    """Wait until each question is at a replica; gives which has which."""
    while len(notes := list(folder.glob("question * at *"))) < len(QUERIES):
        assert not any(call.done() for call in calls), "answered before it may be"
        time.sleep(0.01)
    return {query: int(pid) for query, pid in (note.name.split(" at ") for note in notes)}


def test_a_replica_that_dies_takes_only_what_it_was_answering(held):
    url, folder = held
    body = {"documents": PASSAGES}
    with ThreadPoolExecutor(len(QUERIES)) as pool:
        calls = {
            query: pool.submit(httpx.post, f"{url}/v1/rerank", json=body | {"query": query}, timeout=60)
            for query in QUERIES
        }
        at = wait_for_all(folder, calls.values())
        assert len(set(at.values())) == 2
        dead = at[QUERIES[0]]
        os.kill(dead, 9)
        for query in [query for query in QUERIES if at[query] == dead]:
            assert calls[query].result().status_code >= 500
        (folder / "go").touch()
        for query in [query for query in QUERIES if at[query] != dead]:
            reply = calls[query].result()
            assert [place["index"] for place in reply.json()["results"]] == [1, 2, 0]


def test_our_client_completes_what_a_dead_replica_was_answering(held):
    url, folder = held
    with RemoteReranker("length", base_url=url, protocol="cohere", timeout=120) as remote:
        with ThreadPoolExecutor(len(QUERIES)) as pool:
            calls = [pool.submit(remote.rank, query, PASSAGES) for query in QUERIES]
            os.kill(wait_for_all(folder, calls)[QUERIES[0]], 9)
            (folder / "go").touch()
            assert [[place.index for place in call.result()] for call in calls] == [[1, 2, 0]] * len(QUERIES)


def test_a_cluster_of_its_own_listens_on_loopback_alone_and_answers_what_was_begun_before_sigterm(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MISTRAL_RERANK_CLUSTER_CPUS", "0.1")
    body = {"query": "q", "documents": [f"{number} words of a passage " * 30 for number in range(200)]}
    with commanded("--cluster", "--model", str(tiny)) as server, ThreadPoolExecutor(4) as pool:
        if Path("/proc/net/tcp").exists():  # on Linux
            addresses = listening(descendants(server.pid))
            assert addresses
            assert addresses <= LOOPBACK
        calls = [pool.submit(httpx.post, server.url + "/v1/rerank", json=body, timeout=60) for _ in range(4)]
        while "mistral_rerank_queue_size 4.0" not in httpx.get(server.url + "/metrics").text:
            assert not any(call.done() for call in calls), "answered before the signal"
        server.send_signal(signal.SIGTERM)
        assert [len(call.result().json()["results"]) for call in calls] == [200] * 4
        assert server.wait(30) == 0


def test_an_application_that_is_already_on_the_cluster_stays(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    from ray import serve

    url = ray_cluster()
    other = deployment(LengthReranker, ServerSettings(), ClusterSettings(cpus=0.1))
    serve.run(other, name="other", route_prefix="/other")
    try:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        monkeypatch.setenv("MISTRAL_RERANK_CLUSTER_CPUS", "0.1")
        with commanded("--cluster", "--model", str(tiny), ready=False) as server:
            while "mistral-rerank" not in (applications := serve.status().applications):
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.1)
            assert "other" in applications
            server.terminate()
            assert server.wait(60) == 0
        assert set(serve.status().applications) == {"other"}
        reply = httpx.post(f"{url}/other/v1/rerank", json={"query": "q", "documents": PASSAGES})
        assert [place["index"] for place in reply.json()["results"]] == [1, 2, 0]
    finally:
        serve.delete("other")


def test_settings_that_a_cluster_cannot_keep_are_refused():
    for settings in ({"uds": "/tmp/socket"}, {"forwarded_allow_ips": "*"}, {"threads": 2}):
        with pytest.raises(SettingsError, match="leave it out"):
            serve_cluster(RerankSettings(), ServerSettings(**settings), ClusterSettings(), host="127.0.0.1", port=9)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"cluster": {"min_replicas": 3, "max_replicas": 2}}, "under min_replicas"),
        ({"cluster": {"replicas": 3}}, "replicas"),
        ({"servers": {}}, "servers"),
    ],
)
def test_a_configuration_file_that_does_not_fit_is_refused(args: dict, says: str):
    from mistral_rerank.server.cluster import application

    with pytest.raises(ValidationError, match=says):
        application(args)

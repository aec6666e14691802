"""Forked children answer, locally and remotely, whatever the parent's threads are doing at the moment of the fork."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from remote.endpoint import Endpoint, speaks

from mistral_rerank import LocalReranker, RerankerClosedError, SettingsError
from mistral_rerank._forks import ForkLock
from mistral_rerank._sharing import shared
from mistral_rerank.local.engine.engine import Engine
from mistral_rerank.remote.reranker import RemoteReranker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")

PASSAGES = [f"The glacier moved slowly past stone {number}." for number in range(6)]
SECONDS = 60


def in_children(work, number):
    """Fork so many children at once, run `work` in each, and count those that came back with True in time."""
    children = []
    for _ in range(number):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if work() is True else 1)
            finally:
                os._exit(2)
        children.append(child)
    answered, deadline = 0, time.monotonic() + SECONDS
    for child in children:
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < deadline:
            time.sleep(0.002)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, 9)
            os.waitpid(child, 0)
        answered += bool(done) and status == 0
    return answered


def in_child(work):
    return in_children(work, 1) == 1


@contextmanager
def under_load(reranker, threads=2):
    stopped = threading.Event()

    def work():
        while not stopped.is_set():
            reranker.rank("who moved?", PASSAGES)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in running:
            thread.join(SECONDS)


@pytest.fixture
def local(tiny):
    with LocalReranker(str(tiny), device="cpu", dtype="float32") as reranker:
        yield reranker


@pytest.fixture
def remote():
    with Endpoint(speaks("nvidia")) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", timeout=30) as reranker:
            yield reranker


@pytest.fixture(params=["local", "remote"])
def either(request):
    return request.getfixturevalue(request.param)


def test_a_child_answers_after_its_parent_has(either):
    expected = either.rank("who moved?", PASSAGES)
    assert in_child(lambda: either.rank("who moved?", PASSAGES) == expected)
    assert either.rank("who moved?", PASSAGES) == expected


def test_a_child_of_a_child_answers(either):
    expected = either.rank("who moved?", PASSAGES)

    def work():
        return either.rank("who moved?", PASSAGES) == expected and in_child(
            lambda: either.rank("who moved?", PASSAGES) == expected
        )

    assert in_child(work)


def test_a_hundred_forks_under_load(local, remote):
    expected = [reranker.rank("who moved?", PASSAGES) for reranker in (local, remote)]
    with under_load(local), under_load(remote):

        def work():
            return [one.rank("who moved?", PASSAGES) for one in (local, remote)] == expected

        assert [in_children(work, 10) for _ in range(10)] == [10] * 10


def test_the_children_of_a_fork_pool_answer(either):
    expected = [ranked.index for ranked in either.rank("who moved?", PASSAGES)]
    global _shared
    _shared = either
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map_async(_rank_shared, range(6)).get(SECONDS) == [expected] * 6


def _rank_shared(_):
    return [ranked.index for ranked in _shared.rank("who moved?", PASSAGES)]


def test_the_asynchronous_calls_of_a_child_answer(either):
    import asyncio

    expected = asyncio.run(either.arank("who moved?", PASSAGES))
    assert in_child(lambda: asyncio.run(either.arank("who moved?", PASSAGES)) == expected)


def test_a_child_can_close_what_it_inherited_and_its_parent_goes_on(either):
    expected = either.rank("who moved?", PASSAGES)

    def work():
        either.close()
        with pytest.raises(RerankerClosedError):
            either.rank("who moved?", PASSAGES)
        return True

    assert in_child(work)
    assert either.rank("who moved?", PASSAGES) == expected


def test_what_is_closed_stays_closed_in_a_child(either):
    either.close()

    def work():
        with pytest.raises(RerankerClosedError):
            either.rank("who moved?", PASSAGES)
        return True

    assert in_child(work)


def test_the_parents_waiting_calls_are_the_parents_alone(tiny, monkeypatch):
    loading, may_go_on = threading.Event(), threading.Event()
    engine = Engine(lambda: loading.set() or may_go_on.wait(SECONDS) or 1 / 0, batch_tokens=9, share_batches=False)
    monkeypatch.setattr("mistral_rerank._forks.LONGEST_WAIT", 0.0)  # the load holds its lock
    waiting = engine.submit([("q", "a")])
    assert loading.wait(SECONDS)
    assert in_child(lambda: not engine._threads and not engine._stage._jobs and engine._inbox.empty())
    may_go_on.set()
    assert waiting.exception(SECONDS) is not None  # what the load gives is no scorer


def test_the_adapters_lock_is_free_in_a_child():
    def work():
        with shared._lock:
            return True

    held, release = threading.Event(), threading.Event()

    def hold():
        with shared._lock:
            held.set()
            release.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(SECONDS)
    assert in_child(work)
    release.set()
    thread.join(SECONDS)


def test_a_fork_waits_until_the_lock_is_free():
    lock, seen = ForkLock(), []
    entered, release = threading.Event(), threading.Event()

    def hold():
        with lock:
            entered.set()
            release.wait(SECONDS)
            seen.append("done")

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(SECONDS)
    threading.Timer(0.05, release.set).start()
    assert in_child(lambda: seen == ["done"])
    thread.join(SECONDS)


def test_a_model_on_an_accelerator_says_in_a_child_what_to_do():
    refusal = SettingsError("start workers with 'spawn'")
    engine = Engine(lambda: None, batch_tokens=9, share_batches=False, in_child=refusal)

    def work():
        with pytest.raises(SettingsError, match="spawn"):
            engine.submit([("q", "a")])
        engine.close()
        return True

    assert in_child(work)


SCRIPT = """
import os, sys
from mistral_rerank import LocalReranker
reranker = LocalReranker(sys.argv[1], device="cpu", dtype="float32")
reranker.rank("who?", ["me " * 90, "you " * 90] * 40)
before = dict(os.environ)
child = os.fork()
reranker.rank("who?", ["me", "you"])
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert dict(os.environ) == before
print("done", flush=True)
"""


def test_a_fork_prints_no_warning_and_both_processes_exit_cleanly(tiny):
    done = run(SCRIPT, tiny)
    assert (done.returncode, done.stdout.split()) == (0, ["done", "done"])
    assert "tokenizers" not in done.stderr
    assert "Error" not in done.stderr


EXIT = """
import sys, threading
from mistral_rerank import LocalReranker
reranker = LocalReranker(sys.argv[1], device="cpu", dtype="float32")
def work():
    try:
        while True:
            reranker.rank("who?", ["me " * 90, "you " * 90] * 40)
    except Exception as error:
        print(type(error).__name__, flush=True)
reranker.warmup()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
reranker.rank("who?", ["me"])
"""


def test_the_interpreter_exits_cleanly_while_calls_run(tiny):
    done = run(EXIT, tiny)
    assert done.returncode == 0
    assert "Fatal" not in done.stderr
    assert "Traceback" not in done.stderr


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=4 * SECONDS
    )


APPLICATION = """
import json, os
from mistral_rerank import LocalReranker
from mistral_rerank.remote.reranker import RemoteReranker
rerankers = {
    "local": LocalReranker(os.environ["TINY"], device="cpu", dtype="float32"),
    "remote": RemoteReranker("m", base_url=os.environ["ENDPOINT"], protocol="nvidia"),
}
passages = ["me", "you and", "they are here"]
expected = {name: [p.index for p in one.rank("who?", passages)] for name, one in rerankers.items()}
def application(environ, start_response):
    name = environ["PATH_INFO"].strip("/")
    found = [p.index for p in rerankers[name].rank("who?", passages)]
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"worker": os.getpid(), "right": found == expected[name]}).encode()]
"""


def test_gunicorn_with_preload_answers_from_every_worker(tiny, tmp_path):
    pytest.importorskip("gunicorn")
    (tmp_path / "preloaded.py").write_text(APPLICATION)
    socket_file = tmp_path / "socket"
    with Endpoint(speaks("nvidia")) as endpoint:
        environment = os.environ | {"TINY": str(tiny), "ENDPOINT": endpoint.url}
        command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"unix:{socket_file}"]
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen([*command, "preloaded"], cwd=tmp_path, env=environment, stderr=log)
        try:
            client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket_file)), timeout=SECONDS)
            deadline = time.monotonic() + 2 * SECONDS
            while not socket_file.exists():
                assert server.poll() is None, Path(tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            workers = {"local": set(), "remote": set()}
            for _ in range(200):
                for name, seen in workers.items():
                    answer = client.get(f"http://server/{name}", headers={"Connection": "close"}).json()
                    assert answer["right"]
                    seen.add(answer["worker"])
                if all(len(seen) == 2 for seen in workers.values()):
                    break
            assert [len(seen) for seen in workers.values()] == [2, 2]
        finally:
            server.terminate()
            assert server.wait(SECONDS) == 0

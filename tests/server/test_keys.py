"""Key files and lists of keys: what is a key, what is refused, that no message shows one, and renewal under load."""

import asyncio
import os
import signal
import threading
import time

import httpx
import pytest
from pydantic import ValidationError
from server.running import commanded, running
from support import LengthReranker
from typer.testing import CliRunner

from mistral_rerank.cli import app
from mistral_rerank.server import keys as api_keys
from mistral_rerank.server.keys import ApiKeys
from mistral_rerank.server.settings import ServerSettings
from mistral_rerank.settings import describe


@pytest.fixture
def serve_with(tmp_path, monkeypatch):
    """A function that starts `serve` with a key file of this content; gives the keys, or the refusal."""
    served = []

    def serve(_, settings, **options):
        served.append(ApiKeys(settings.api_keys, settings.api_key_file))

    monkeypatch.setattr("mistral_rerank.server.lifecycle.serve", serve)

    def call(content: bytes) -> ApiKeys | str:
        file = tmp_path / "keys"
        file.write_bytes(content)
        arguments = ["serve", "--backend", "remote", "--base-url", "http://127.0.0.1:9", "--api-key-file", str(file)]
        found = CliRunner().invoke(app, arguments)
        if found.exception is not None:
            return str(found.exception)
        return served[0]

    return call


@pytest.mark.parametrize(
    "content",
    [
        b"# keys of team A\nfirst\n\n  # and B\n second \n",
        b"\xef\xbb\xbffirst\r\nsecond\r\n",
    ],
)
def test_a_key_file_holds_one_key_a_line_beside_comments(serve_with, content):
    keys = serve_with(content)
    assert all(keys.find(f"Bearer {key}") for key in ("first", "second"))
    assert not any(keys.find(f"Bearer {key}") for key in ("", "#", "third", "# keys of team A"))


def test_a_key_file_may_name_keys_and_limit_their_share(serve_with):
    keys = serve_with(b"plain\nteam-a: first\nteam-a: a:second=  25%\nteam-b:third\n")
    found = {key: keys.find(f"Bearer {key}") for key in ("plain", "first", "a:second=", "team-b:third")}
    assert [(key.name, key.share) for key in found.values()] == [
        ("unnamed", 1.0),
        ("team-a", 1.0),
        ("team-a", 0.25),
        ("unnamed", 1.0),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"first\nsecret key\n", "line 2: the key holds a blank"),
        (b"first\nsecret # of team A\n", "line 2: the key holds a blank"),
        ("first\n\nsecret\u00e9\n".encode(), "line 3: the key holds a character that is not printable ASCII"),
        (b"secret\x07\n", "line 1: the key holds a character that is not printable ASCII"),
        (b"# secret\n", "holds no key"),
        ("secret\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_keys_that_cannot_match_are_refused_by_their_line_and_not_shown(serve_with, content, says):
    refusal = serve_with(content)
    assert says in refusal
    assert "secret" not in refusal


@pytest.mark.parametrize("keys", ["first,secret key", "first,secret\u00e9", "first,sec\x00ret", "first,#secret"])
def test_lists_of_keys_are_as_strict_as_files(keys, monkeypatch):
    monkeypatch.setattr("os.environ", {"MISTRAL_RERANK_SERVER_API_KEYS": keys})
    for given in ({}, {"api_keys": keys}, {"api_keys": keys.split(",")}):
        with pytest.raises(ValidationError, match="key 2") as caught:
            ServerSettings(**given)
        assert "sec" not in describe(caught.value)


def test_a_byte_order_mark_before_the_environments_keys_is_no_part_of_one(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_SERVER_API_KEYS", "\ufefffirst,second")
    assert [key.get_secret_value() for key in ServerSettings().api_keys] == ["first", "second"]


BODY = {"query": "q", "documents": ["a", "bbb"]}


def status_with(url: str, key: str) -> int:
    return httpx.post(url + "/v1/rerank", json=BODY, headers={"Authorization": f"Bearer {key}"}).status_code


def replace(file, content: str) -> None:
    """Replace a file at once, as Kubernetes replaces the files of a mounted Secret."""
    new = file.with_suffix(".new")
    new.write_text(content)
    new.replace(file)


def test_a_rotation_under_load_refuses_no_valid_request(tmp_path, monkeypatch):
    monkeypatch.setattr(api_keys, "CHECK_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text("team: old\n")
    statuses, stop = [], threading.Event()
    valid = ["old"]

    def send() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                headers = {"Authorization": f"Bearer {valid[0]}"}
                statuses.append(client.post(url + "/v1/rerank", json=BODY, headers=headers).status_code)

    with running(LengthReranker(), api_key_file=file) as url:
        clients = [threading.Thread(target=send) for _ in range(4)]
        for client in clients:
            client.start()
        for content, key in (
            ("team: old\nteam: new\n", "new"),
            ("team: new\n", "new"),
            ("team: new\nother: x\n", "new"),
        ):
            replace(file, content)
            assert status_with(url, key) == 200
            valid[0] = key
            sent = len(statuses)
            while len(statuses) < sent + 20:  # so that no client holds an earlier key
                time.sleep(0.001)
        stop.set()
        for client in clients:
            client.join()
        metrics = httpx.get(url + "/metrics").text
        assert set(statuses) == {200}
        assert status_with(url, "old") == 401
    assert f'mistral_rerank_key_requests_total{{key="team",status="200"}} {len(statuses) + 3}.0' in metrics


def test_a_key_file_that_is_wrong_leaves_the_old_keys(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(api_keys, "CHECK_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text("first\n")
    with running(LengthReranker(), api_key_file=file) as url:
        for content in ("", "two words\n"):
            replace(file, content)
            assert status_with(url, "first") == 200
        file.unlink()
        assert status_with(url, "first") == 200
        file.write_text("second\n")
        assert [status_with(url, key) for key in ("first", "second")] == [401, 200]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_sighup_reads_the_key_file_and_the_server_stays(tiny, tmp_path):
    file = tmp_path / "keys"
    file.write_text("first\n")
    with commanded("--model", str(tiny), "--api-key-file", str(file)) as server:
        times = file.stat()
        file.write_text("secon\n")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # what a look at its time would miss
        assert status_with(server.url, "first") == 200
        server.send_signal(signal.SIGHUP)
        while status_with(server.url, "secon") == 401:
            time.sleep(0.01)
        assert status_with(server.url, "first") == 401
        assert server.poll() is None


def test_a_key_may_take_only_its_share_of_the_queue(tmp_path):
    entered, go = threading.Event(), threading.Event()

    class Held(LengthReranker):
        async def ascore_pairs(self, pairs, *, overflow=None):
            if pairs != [("warm", "up")]:
                entered.set()
                await asyncio.to_thread(go.wait, 30)
            return self.score_pairs(pairs)

    file = tmp_path / "keys"
    file.write_text("batch: slow 25%\nweb: fast\n")
    statuses = []
    with running(Held(), api_key_file=file, max_requests=4) as url:
        first = threading.Thread(target=lambda: statuses.append(status_with(url, "slow")))
        first.start()
        assert entered.wait(10)
        assert status_with(url, "slow") == 429
        second = threading.Thread(target=lambda: statuses.append(status_with(url, "fast")))
        second.start()
        go.set()
        first.join()
        second.join()
    assert statuses == [200, 200]

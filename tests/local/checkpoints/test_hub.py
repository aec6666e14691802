"""Downloads from a hub: a server on this machine that speaks its protocol, and counts what is requested."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny_config
from transformers import MistralForSequenceClassification

from mistral_rerank import LocalReranker

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNREAD = [
    *("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"),
    *("model.fp16.safetensors", "modeling.py", "trainer_state.json", "tokenizer.model", "vocab.json"),
    *("onnx/model.onnx", "onnx/model.safetensors", "openvino/config.json", "eval/results.json"),
]


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories of one commit.

    Attributes:
        fetched: the content of these files was sent, as REPOSITORY/FILE.

    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        for name, folder in self.server.repositories.items():
            if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                return self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            if path == f"api/models/{name}/tree/{COMMIT}":
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                return self._send(json.dumps([self._entry(folder, file) for file in files]).encode())
            prefix = f"{name}/resolve/{COMMIT}/"
            if path.startswith(prefix) and (folder / path.removeprefix(prefix)).is_file():
                content = (folder / path.removeprefix(prefix)).read_bytes()
                if self.command == "GET":
                    self.server.fetched.append(f"{name}/{path.removeprefix(prefix)}")
                return self._send(content)
        return self._send(b"", status=404)

    do_GET = do_HEAD  # noqa: N815

    def _entry(self, folder: Path, file: Path) -> dict[str, object]:
        content = file.read_bytes()
        oid, path = hashlib.sha1(content).hexdigest(), file.relative_to(folder).as_posix()
        return {"type": "file", "oid": oid, "size": len(content), "path": path}

    def _send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    server = Hub({f"org/{name}": tmp_path / name for name in ("base", "adapter", "whole")})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def score(model: str, hub: Hub, cache: Path, *, offline: bool = False) -> tuple[float, str]:
    """Score a pair in a process of its own, whose hub is the server; return the logit and stderr."""
    code = (
        "from mistral_rerank import LocalReranker\n"
        f"with LocalReranker({model!r}, device='cpu', dtype='float32') as reranker:\n"
        "    print(reranker.score_pairs([('who?', 'me')])[0].logit)"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout), done.stderr


def add_unread_files(folder: Path) -> None:
    for name in UNREAD:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}", "utf-8")


def test_of_a_base_only_the_shards_of_the_used_layers_are_downloaded(tiny, tokenizer, tmp_path, hub):
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    MistralForSequenceClassification(tiny_config(len(tokenizer), num_hidden_layers=32)).save_pretrained(
        base, max_shard_size="200KB"
    )
    tokenizer.save_pretrained(base)
    model = MistralForSequenceClassification.from_pretrained(base, num_hidden_layers=16)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(adapter, save_embedding_layers=False)
    settings = {"base": {"kind": "pretrained", "name": "org/base", "layers": 16}}
    (adapter / "rerank.json").write_text(json.dumps(settings), "utf-8")
    for folder in (base, adapter):
        add_unread_files(folder)
    shards = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    used = {file for name, file in shards.items() if ".layers." not in name or int(name.split(".")[2]) < 16}
    assert len(used) < len(set(shards.values()))

    logit, messages = score("org/adapter", hub, tmp_path / "cache")
    weights = [name for name in hub.fetched if name.endswith(("safetensors", "bin", "onnx"))]
    assert sorted(weights) == sorted(["org/adapter/adapter_model.safetensors", *(f"org/base/{file}" for file in used)])
    assert {name.split("/")[-1] for name in hub.fetched} - used == {
        *("adapter_config.json", "rerank.json", "adapter_model.safetensors", "config.json"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert "fetching org/base (" in messages

    fetched = list(hub.fetched)
    assert score("org/adapter", hub, tmp_path / "cache")[0] == logit
    assert score("org/adapter", hub, tmp_path / "cache", offline=True)[0] == logit
    assert hub.fetched == fetched
    with LocalReranker(str(adapter), base=str(base), device="cpu", dtype="float32") as reranker:
        assert reranker.score_pairs([("who?", "me")])[0].logit == logit


def test_of_a_whole_model_its_weights_configuration_and_tokenizer_are_downloaded(tiny, tmp_path, hub):
    whole = tmp_path / "whole"
    whole.mkdir()
    for file in tiny.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    read = {f"org/whole/{file.name}" for file in whole.iterdir()}
    add_unread_files(whole)
    logit, _ = score("org/whole", hub, tmp_path / "cache")
    assert set(hub.fetched) <= read
    assert len(hub.fetched) == len(set(hub.fetched))
    assert "org/whole/model.safetensors" in hub.fetched
    with LocalReranker(str(tiny), device="cpu", dtype="float32") as reranker:
        assert reranker.score_pairs([("who?", "me")])[0].logit == logit

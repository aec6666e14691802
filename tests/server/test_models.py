"""Several models in one real server: requests select one by its name, and it is loaded on first use."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from server.running import commanded, running, wait_until_ready
from support import LengthReranker, make_adapter, tiny_config
from transformers import MistralForSequenceClassification
from typer.testing import CliRunner

from mistral_rerank import CheckpointError, RerankSettings, SettingsError, open_reranker
from mistral_rerank.cli import app
from mistral_rerank.server.app import create_app
from mistral_rerank.server.settings import ServerSettings

QUERY, PASSAGES = "who wrote it", ["she wrote it", "nobody knows", "it opened later"]
NVIDIA = {"query": {"text": QUERY}, "passages": [{"text": text} for text in PASSAGES]}
BODIES = {
    "/v1/ranking": NVIDIA,
    "/v2/rerank": {"query": QUERY, "documents": PASSAGES},
    "/rerank": {"query": QUERY, "documents": PASSAGES},
    "/score": {"text_1": QUERY, "text_2": PASSAGES},
}
BODY = BODIES["/v2/rerank"]


@pytest.fixture(scope="module")
def folders(tiny: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three checkpoints with different random weights."""
    folders = {"a": tiny}
    for seed, name in enumerate("bc", 1):
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        MistralForSequenceClassification(tiny_config(len(tokenizer))).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
        (folders[name] / "rerank.json").write_text("{}")
    return folders


def settings(folder: Path, **others: object) -> RerankSettings:
    return RerankSettings(model=folder, device="cpu", dtype="float32", **others)


@pytest.fixture
def models(folders) -> dict[str, RerankSettings]:
    return {name: settings(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def scores(folders) -> dict[str, list[float]]:
    """The probability of each passage from each model."""
    found = {}
    for name, folder in folders.items():
        with settings(folder).open() as reranker:
            found[name] = [score.probability for score in reranker.score_pairs([(QUERY, text) for text in PASSAGES])]
    return found


@pytest.fixture(scope="module")
def size(tiny: Path) -> int:
    with settings(tiny).open() as reranker:
        return reranker.weight_bytes()


def probabilities(reply: httpx.Response) -> list[float]:
    """Those of the passages, in the order of the request."""
    assert reply.status_code == 200, reply.text
    body = reply.json()
    results = body.get("results") or body.get("rankings") or body["data"]
    ordered = sorted(results, key=lambda each: each["index"])
    return [each["probability"] if "probability" in each else each["score"] for each in ordered]


def metric(client: httpx.Client, name: str, **labels: object) -> float:
    described = ",".join(f'{key}="{value}"' for key, value in labels.items())
    start = f"mistral_rerank_{name}{{{described}}} "
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


@pytest.mark.parametrize("path", BODIES)
def test_each_model_answers_in_every_protocol_with_its_own_scores(path, models, scores):
    with running(models) as url, httpx.Client(base_url=url, timeout=60) as client:
        for name, expected in scores.items():
            reply = client.post(path, json=BODIES[path] | {"model": name})
            assert probabilities(reply) == pytest.approx(expected, abs=1e-6)
            assert reply.json().get("model", name) == name
        assert probabilities(client.post(path, json=BODIES[path])) == pytest.approx(scores["a"], abs=1e-6)
        unknown = client.post(path, json=BODIES[path] | {"model": "d"})
        assert (unknown.status_code, "there is a, b, c" in unknown.json()["message"]) == (404, True)
    assert len({tuple(each) for each in scores.values()}) == 3


def test_the_first_model_is_the_default_and_aliases_are_its_own(models, scores):
    with running(models, aliases="rerank-v3.5") as url, httpx.Client(base_url=url, timeout=60) as client:
        tei = client.post("/rerank", json={"query": QUERY, "texts": PASSAGES}).json()  # names no model
        assert tei[0]["score"] == pytest.approx(max(scores["a"]), abs=1e-6)
        reply = client.post("/v2/rerank", json=BODY | {"model": "rerank-v3.5"})
        assert probabilities(reply) == pytest.approx(scores["a"], abs=1e-6)
        assert probabilities(client.post("/v1/ranking/b", json=NVIDIA)) == pytest.approx(scores["b"], abs=1e-6)
        assert [(model["id"], model["root"]) for model in client.get("/v1/models").json()["data"]] == [
            (name, name) for name in models
        ]
        assert client.get("/v1/models/b").json()["id"] == "b"
        assert client.get("/v1/models/d").status_code == 404
        assert [each["shortName"] for each in client.get("/v1/metadata").json()["modelInfo"]] == list(models)
        assert client.get("/info").json()["model_id"] == "a"


def test_the_first_model_is_loaded_at_startup_and_the_others_once_on_first_use(models, scores):
    with running(models) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until_ready(client)
        assert [metric(client, "model_loads_total", model=name) for name in models] == [1.0, 0.0, 0.0]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: client.post("/v2/rerank", json=BODY | {"model": "b"}), range(8)))
        assert [probabilities(reply) for reply in replies] == [pytest.approx(scores["b"], abs=1e-6)] * 8
        assert [metric(client, "model_loads_total", model=name) for name in models] == [1.0, 1.0, 0.0]
        assert metric(client, "model_requests_total", model="b", status=200) == 8.0


def test_under_a_limit_the_least_recently_used_model_is_freed_and_scores_the_same_later(models, scores, size):
    with running(models, model_memory=2 * size) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until_ready(client)
        for name in "babca":
            reply = client.post("/v2/rerank", json=BODY | {"model": name})
            assert probabilities(reply) == pytest.approx(scores[name], abs=1e-6)
        assert [metric(client, "model_loads_total", model=name) for name in models] == [2.0, 1.0, 1.0]
        assert [metric(client, "model_weight_bytes", model=name) for name in models] == [size, 0.0, size]


def test_a_limit_of_one_model_serves_all_of_them_at_once(models, scores, size):
    with running(models, model_memory=size) as url, httpx.Client(base_url=url, timeout=60) as client:
        with ThreadPoolExecutor(6) as pool:
            names = list("abcabc")
            replies = list(pool.map(lambda name: client.post("/v2/rerank", json=BODY | {"model": name}), names))
    assert [probabilities(reply) for reply in replies] == [pytest.approx(scores[name], abs=1e-6) for name in names]


def test_a_model_that_cannot_be_loaded_stops_no_other_and_is_tried_again(models, scores, folders, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["b"].iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with running({"a": models["a"], "b": settings(broken)}) as url, httpx.Client(base_url=url, timeout=60) as client:
        failed = client.post("/v2/rerank", json=BODY | {"model": "b"})
        assert (failed.status_code, failed.json()["message"]) == (
            500,
            "the model is unusable; the server's log says why",
        )
        assert probabilities(client.post("/v2/rerank", json=BODY)) == pytest.approx(scores["a"], abs=1e-6)
        assert client.get("/health").status_code == 200
        weights = "model.safetensors"
        (broken / weights).write_bytes((folders["b"] / weights).read_bytes())
        repaired = client.post("/v2/rerank", json=BODY | {"model": "b"})
        assert probabilities(repaired) == pytest.approx(scores["b"], abs=1e-6)


def test_a_model_over_the_limit_is_refused(folders, models, size, caplog):
    half = RerankSettings(model=folders["a"], device="cpu", dtype="bfloat16")
    served = {"a": half, "b": models["b"]}
    with running(served, model_memory=size - 1) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v2/rerank", json=BODY | {"model": "b"}).status_code == 500
        assert client.post("/v2/rerank", json=BODY | {"model": "a"}).status_code == 200
    assert "the model b has" in caplog.text


def test_adapters_of_one_model_are_models_too(folders, scores, tmp_path):
    adapter = make_adapter(tmp_path / "legal", folders["b"], 0)
    with settings(folders["b"], adapters={"legal": adapter}).open() as reranker:
        pairs = [(QUERY, text) for text in PASSAGES]
        expected = [score.probability for score in reranker.score_pairs(pairs, adapter="legal")]
    models = {"a": settings(folders["a"]), "b": settings(folders["b"], adapters={"legal": adapter})}
    with running(models) as url, httpx.Client(base_url=url, timeout=60) as client:
        for name, own in (("legal", expected), ("b", scores["b"]), ("a", scores["a"])):
            reply = client.post("/v2/rerank", json=BODY | {"model": name})
            assert (reply.json()["model"], probabilities(reply)) == (name, pytest.approx(own, abs=1e-5))
        roots = {model["id"]: model["root"] for model in client.get("/v1/models").json()["data"]}
    assert roots == {"a": "a", "b": "b", "legal": "b"}


def test_models_of_an_endpoint_are_selected_there(scores, models):
    with running(models) as upstream:
        remote = {
            name: RerankSettings(backend="remote", base_url=upstream, protocol="cohere", model=model)
            for name, model in (("first", "a"), ("second", "b"))
        }
        with running(remote, model_memory=1) as url, httpx.Client(base_url=url, timeout=60) as client:
            for name, own in (("first", "a"), ("second", "b")):
                reply = client.post("/v2/rerank", json=BODY | {"model": name})
                assert (reply.json()["model"], probabilities(reply)) == (name, pytest.approx(scores[own], abs=1e-6))


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (("a", "b"), {"model_id": "c"}, "several models have names; give at least one, and leave model_id out"),
        ((), {}, "give at least one"),
        (("a", "b"), {"aliases": "b"}, "b names the model and an adapter, or two of them"),
    ],
)
def test_ambiguous_names_are_refused(models, names, options, says):
    with pytest.raises(SettingsError, match=says):
        create_app({name: models[name] for name in names}, ServerSettings(**options))


def test_a_limit_for_a_single_reranker_is_refused():
    with pytest.raises(SettingsError, match="model_memory is for several models"):
        create_app(LengthReranker(), ServerSettings(model_memory="1GiB"))


def test_a_folder_that_is_missing_or_unreadable_is_refused_at_startup(models, tmp_path):
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    for folder in (empty, damaged):
        folder.mkdir()
    (damaged / "config.json").write_text("{}")
    (damaged / "rerank.json").write_text("{")
    for folder, says in ((tmp_path / "no", "no folder"), (empty, "no checkpoint"), (damaged, "rerank.json")):
        with pytest.raises(CheckpointError, match=says):
            create_app({"a": models["a"], "b": settings(folder)}, ServerSettings())


def test_weight_bytes_are_those_of_the_loaded_parameters(folders, size):
    model = MistralForSequenceClassification.from_pretrained(folders["a"], dtype=torch.float32)
    assert size == sum(parameter.nbytes for parameter in model.parameters())
    with open_reranker(folders["a"], device="cpu", dtype="bfloat16") as reranker:
        assert reranker.weight_bytes() == size // 2
    assert LengthReranker().weight_bytes() == 0


def test_the_command_serves_models_by_name_and_logs_them(folders, scores):
    options = [f"--model={name}={folder}" for name, folder in folders.items()]
    with commanded(*options, "--dtype", "float32", "--model-memory", "1GiB") as server:
        reply = httpx.post(server.url + "/v2/rerank", json=BODY | {"model": "c"}, timeout=60)
        server.terminate()
        assert server.wait(30) == 0
        log = server.stderr.read()
    assert probabilities(reply) == pytest.approx(scores["c"], abs=1e-5)
    assert "model=c passages=3" in log


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "a=x", "--model", "a=y"], "with its own name"),
        (["--model", "x", "--model", "b=y"], "NAME=MODEL"),
        (["--model", "a=", "--model", "b=y"], "NAME=MODEL"),
        (["--model", "a=mini", "--model", "b=mini", "--cluster"], "start a cluster for each model"),
        (["--model", "a=mini", "--model", "b=./no-such-folder"], "there is no folder './no-such-folder'"),
    ],
)
def test_options_that_name_no_models_are_refused(options, says, monkeypatch):
    monkeypatch.setattr("mistral_rerank.local.threads.set_threads", lambda _: None)
    done = CliRunner().invoke(app, ["serve", *options])
    assert isinstance(done.exception, (SettingsError, CheckpointError))
    assert says in str(done.exception)


def test_settings_of_one_checkpoint_are_those_of_the_first_model(monkeypatch):
    served = {}
    monkeypatch.setattr("mistral_rerank.server.lifecycle.serve", lambda models, *_, **__: served.update(models))
    monkeypatch.setattr("mistral_rerank.local.threads.set_threads", lambda _: None)
    monkeypatch.setenv("MISTRAL_RERANK_RERANK_CONFIG", "family")
    options = ["--adapter", "legal=x", "--base", "y", "--dtype", "float32", "--max-length", "64"]
    done = CliRunner().invoke(app, ["serve", "--model", "a=one", "--model", "b=two=2", *options])
    assert done.exception is None, done.output
    first, second = served["a"], served["b"]
    assert (first.model, first.base, first.adapters, first.rerank_config) == ("one", "y", (("legal", "x"),), "family")
    assert (second.model, second.base, second.adapters, second.rerank_config) == ("two=2", None, (), None)
    assert [first.share_batches, second.share_batches] == [True, True]
    assert (second.dtype, second.max_length) == ("float32", 64)


def test_a_folder_with_an_equals_sign_is_a_model_without_a_name(monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr("mistral_rerank.server.lifecycle.serve", lambda reranker, *_, **__: served.append(reranker))
    monkeypatch.setattr("mistral_rerank.local.threads.set_threads", lambda _: None)
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    done = CliRunner().invoke(app, ["serve", "--model", str(folder)])
    assert done.exception is None, done.output
    assert served[0].model_name == str(folder)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v2/rerank", BODY | {"max_tokens_per_doc": 64}, "this model takes no limits; leave it out"),
        ("/v1/ranking", NVIDIA | {"instruction": "find it"}, "this model takes no instruction; leave it out"),
        ("/score", BODIES["/score"] | {"instruction": "find it"}, "this model takes no instruction; leave it out"),
    ],
)
def test_an_option_that_a_reranker_of_ones_own_lacks_is_a_422(path, body, says):
    class Own(LengthReranker):
        async def ascore_pairs(self, pairs, *, overflow=None):
            return self.score_pairs(pairs)

    with running(Own()) as url:
        reply = httpx.post(url + path, json=body)
    assert (reply.status_code, reply.json()["message"]) == (422, says)

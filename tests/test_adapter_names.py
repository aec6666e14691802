"""An adapter is selected by its name from every entrance."""

import httpx
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from server.running import commanded, running
from support import LengthReranker, make_adapter
from typer.testing import CliRunner

from langchain_mistral_rerank import MistralCrossEncoder
from langchain_mistral_rerank import MistralRerank as LangChainRerank
from llama_index_mistral_rerank import MistralRerank as LlamaIndexRerank
from mistral_rerank import RemoteReranker, SettingsError, open_reranker
from mistral_rerank.cli import app

QUERY, PASSAGES = "who wrote it", ["she wrote it", "nobody knows", "it opened later"]
ADAPTERS = ("legal", "medical")
BODIES = {
    "/v1/ranking": {"query": {"text": QUERY}, "passages": [{"text": text} for text in PASSAGES]},
    "/v2/rerank": {"query": QUERY, "documents": PASSAGES},
    "/rerank": {"query": QUERY, "documents": PASSAGES},
    "/score": {"text_1": QUERY, "text_2": PASSAGES},
}


class Recorder(LengthReranker):
    """Has adapters, and records the adapter of each call."""

    adapters = ADAPTERS

    def __init__(self) -> None:
        super().__init__()
        self.used: list[str | None] = []

    async def ascore_pairs(self, pairs, *, overflow=None, instruction=None, adapter=None):
        self.used.append(adapter)
        return self.score_pairs(pairs)


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: make_adapter(folder / name, tiny, number) for number, name in enumerate(ADAPTERS)}
    return {"model": tiny, "adapters": adapters, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def scores(settings):
    """The probability of each passage from each adapter and the model itself."""
    with open_reranker(**settings) as reranker:
        return {
            name: {each.text: each.score.probability for each in reranker.rank(QUERY, PASSAGES, adapter=name)}
            for name in (None, *ADAPTERS)
        }


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_langchain_and_llama_index_take_an_adapter_and_share_the_weights(name, settings, scores):
    compressor = LangChainRerank(**settings, adapter=name)
    documents = compressor.compress_documents([Document(text) for text in PASSAGES], QUERY)
    assert {each.page_content: each.metadata[compressor.score_key] for each in documents} == scores[name]
    postprocessor = LlamaIndexRerank(**settings, adapter=name)
    ranked = postprocessor.postprocess_nodes(
        [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES], query_str=QUERY
    )
    assert {node.text: node.score for node in ranked} == scores[name]
    encoder = MistralCrossEncoder(**settings, adapter=name)
    assert encoder.score([(QUERY, text) for text in PASSAGES]) == pytest.approx(
        [scores[name][text] for text in PASSAGES]
    )
    assert (
        compressor.use() is postprocessor.use() is encoder.use() is LangChainRerank(**settings, adapter="legal").use()
    )
    assert LangChainRerank(**settings, adapter="legal") != LangChainRerank(**settings, adapter="medical")
    assert LlamaIndexRerank.from_dict(postprocessor.to_dict()) == postprocessor


@pytest.mark.parametrize("path", BODIES)
def test_the_server_takes_an_adapter_as_the_model_in_every_protocol(path):
    recorder = Recorder()
    with running(recorder, aliases="other") as url:
        replies = [
            httpx.post(url + path, json=BODIES[path] | model)
            for model in ({"model": "legal"}, {"model": "length"}, {"model": "other"}, {}, {"model": "unknown"})
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 200, 404]
    assert "length, other, legal, medical" in replies[-1].text
    assert recorder.used[-4:] == ["legal", None, None, None]
    names = [reply.json().get("model") for reply in replies[:4]]
    assert names in (["legal", "length", "length", "length"], [None] * 4)


def test_the_server_lists_the_adapters_as_models():
    with running(Recorder(), aliases="other") as url, httpx.Client(base_url=url) as client:
        models = client.get("/v1/models").json()["data"]
        assert [(model["id"], model["root"]) for model in models] == [(n, "length") for n in ("length", *ADAPTERS)]
        assert client.get("/v1/models/medical").json() == models[2]
        assert client.get("/v1/models/other").json() == models[0]
        assert client.get("/v1/models/unknown").status_code == 404


def test_an_adapter_with_the_name_of_the_model_is_refused():
    with (
        pytest.raises(SettingsError, match="legal names the model and an adapter"),
        running(Recorder(), aliases="legal"),
    ):
        pass


def test_an_adapter_of_a_remote_call_is_the_model_of_its_request():
    recorder = Recorder()
    with running(recorder) as url, RemoteReranker("length", base_url=url) as remote:
        remote.rank(QUERY, PASSAGES)
        remote.rank(QUERY, PASSAGES, adapter="medical")
        LangChainRerank(reranker=remote, adapter="legal").compress_documents([Document("a")], QUERY)
    assert recorder.used[-3:] == [None, "medical", "legal"]


def test_the_command_serves_adapters(settings, scores):
    options = [f"--adapter={name}={folder}" for name, folder in settings["adapters"].items()]
    with commanded("--model", str(settings["model"]), "--dtype", "float32", *options) as server:
        reply = httpx.post(server.url + "/v2/rerank", json=BODIES["/v2/rerank"] | {"model": "medical"}).json()
    probabilities = {PASSAGES[each["index"]]: each["relevance_score"] for each in reply["results"]}
    assert probabilities == pytest.approx(scores["medical"], abs=1e-5)


@pytest.mark.parametrize("option", ["legal", "=folder", "legal="])
def test_an_option_without_a_name_or_a_folder_is_refused(option):
    done = CliRunner().invoke(app, ["serve", "--adapter", option])
    assert isinstance(done.exception, SettingsError)
    assert "give NAME=FOLDER" in str(done.exception)

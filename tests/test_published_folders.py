"""A folder as published needs no flag: every interface gives the score that Python gives."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from fastapi.testclient import TestClient
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from typer.testing import CliRunner

from langchain_mistral_rerank import MistralRerank as LangChainRerank
from llama_index_mistral_rerank import MistralRerank as LlamaIndexRerank
from mistral_rerank import open_reranker
from mistral_rerank.benchmark import bench
from mistral_rerank.cli import app
from mistral_rerank.server.app import create_app

QUERY = "When was the bridge built?"
PASSAGES = [
    "The bridge was built by the city in 1797.",
    "The bridge opened later, near the sea.",
    "Nobody knows the bridge.",
]
PAIRS = [(QUERY, passage) for passage in PASSAGES]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums on every machine; how a checkpoint is read does not depend on it."""
    monkeypatch.setenv("MISTRAL_RERANK_DEVICE", "cpu")
    monkeypatch.setenv("MISTRAL_RERANK_DTYPE", "float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder with the one question."""
    folder = tmp_path_factory.mktemp("beir")
    corpus = [{"_id": str(number), "text": text} for number, text in enumerate(PASSAGES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": QUERY}) + "\n")
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Logits in the reply of `serve`, which runs in this process."""
    replies: list[Any] = []

    def answer(reranker, settings, **options):
        with TestClient(create_app(reranker, settings)) as client:
            body = {"query": {"text": QUERY}, "passages": [{"text": text} for text in PASSAGES]}
            replies.append(client.post("/v1/ranking", json=body).json())

    monkeypatch.setattr("mistral_rerank.server.lifecycle.serve", answer)
    run("serve", "--model", folder)
    rankings = {ranking["index"]: ranking["logit"] for ranking in replies[0]["rankings"]}
    return [rankings[index] for index in range(len(PASSAGES))]


def evaluated(folder: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Logits that `evaluate` stores; its report is left out."""
    monkeypatch.setattr("mistral_rerank.evaluation.evaluate.write_report", lambda *_: None)
    run("evaluate", "--model", folder, "--data", data, "--out", out)
    (scored,) = map(json.loads, (out / "scores" / f"{data.name}.jsonl").read_text().splitlines())
    logits = dict(zip(scored["passages"], scored["logits"], strict=True))
    return [logits[str(index)] for index in range(len(PASSAGES))]


def timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Logits that `bench` compares with other libraries."""
    timings = []
    alternate = bench.alternate

    def recorded(*arguments, **options):
        timings.extend(alternate(*arguments, **options))
        return timings

    monkeypatch.setattr(bench, "make_pairs", lambda *_, **__: PAIRS)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_, **__: 1e12)
    monkeypatch.setattr(bench, "alternate", recorded)
    run("bench", "--model", folder, "--workload", "nq", "--rounds", "1")
    return list(timings[0].logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_interface_scores_a_published_folder_as_python_does(name, data, tmp_path, monkeypatch):
    folder = FAMILIES[name](tmp_path)
    with open_reranker(folder) as reranker:
        scores = reranker.score_pairs(PAIRS)
    logits = [score.logit for score in scores]
    assert len(set(logits)) == len(PAIRS)
    compressor, postprocessor = LangChainRerank(model=folder), LlamaIndexRerank(model=folder)
    documents = compressor.compress_documents([Document(text) for text in PASSAGES], QUERY)
    by_langchain = {document.page_content: document.metadata["relevance_score"] for document in documents}
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    by_llama_index = {node.text: node.score for node in postprocessor.postprocess_nodes(nodes, query_str=QUERY)}
    expected = pytest.approx({text: s.probability for text, s in zip(PASSAGES, scores, strict=True)}, abs=1e-6)
    assert by_langchain == expected
    assert by_llama_index == expected
    assert served(folder, monkeypatch) == pytest.approx(logits, abs=1e-5)
    assert evaluated(folder, data, tmp_path / "out", monkeypatch) == pytest.approx(logits, abs=1e-5)
    assert timed(folder, monkeypatch) == pytest.approx(logits, abs=1e-5)

"""Whole evaluations: by value with a stand-in, and stopped and resumed in a process of their own."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from command import run_code
from support import FACTS, LengthReranker

from mistral_rerank import InvalidInputError, ScoringError, SettingsError
from mistral_rerank.evaluation.evaluate import evaluate, reordered, sample_queries
from mistral_rerank.evaluation.metrics import per_query
from mistral_rerank.evaluation.run_files import read_run
from mistral_rerank.evaluation.workspace import EvaluationSettings

EVALUATE = """
import os, signal, sys
from pathlib import Path
import torch
from mistral_rerank import LocalReranker
from mistral_rerank.evaluation.evaluate import evaluate
from mistral_rerank.evaluation.workspace import EvaluationSettings

model, out, at_once, stop, *data = sys.argv[1:]
torch.set_num_threads(1)  # as many each time: their number shows in the last bits

def notify(what, done, total):
    if stop in (what, f"{what} {done}"):
        os.kill(os.getpid(), signal.SIGKILL)

with LocalReranker(model, device="cpu", dtype="float32") as reranker:
    settings = EvaluationSettings(data=data, top_k=7, queries=12, questions_at_once=int(at_once))
    evaluate(reranker, settings, Path(out), notify=notify)
"""


@pytest.fixture
def small(tmp_path):
    """Four questions: one that the stand-in helps, one that it harms, one without results, one of grades."""
    folder = tmp_path / "small"
    (folder / "qrels").mkdir(parents=True)
    corpus = {
        "a": "sun",
        "b": "sun and more of it",
        "c": "sun and more of it, and yet more",
        "d": "moon",
        "e": "moon, seen over the hills",
    }
    queries = {"q1": "sun", "q2": "moon", "q3": "zzz", "q4": "sun moon"}
    qrels = [("q1", "c", 1), ("q2", "d", 1), ("q3", "a", 1), ("q4", "b", 1), ("q4", "c", 3)]
    for name, texts in (("corpus", corpus), ("queries", queries)):
        lines = (json.dumps({"_id": i, "text": text}) for i, text in texts.items())
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = "".join(f"{q}\t{d}\t{grade}\n" for q, d, grade in qrels)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


def files_of(out):
    """What has to be equal, byte for byte."""
    names = [
        "results.json",
        "queries.jsonl",
        *(f.relative_to(out) for kind in ("first_stage", "reranked") for f in (out / kind).iterdir()),
    ]
    return {str(name): (out / name).read_bytes() for name in names}


def test_files_and_figures_of_an_evaluation(small, tmp_path):
    notes = []
    out = tmp_path / "out"
    found = evaluate(
        LengthReranker(),
        EvaluationSettings(data=(small,), top_k=3),
        out,
        reranker_settings={"dtype": "float32"},
        notify=lambda *note: notes.append(note),
    )
    before, after = (read_run(out / kind / "small.trec") for kind in ("first_stage", "reranked"))
    assert [passage for passage, _ in after["q1"]] == ["c", "b", "a"]
    assert [passage for passage, _ in after["q2"]] == ["e", "d"]
    assert "q3" not in after
    assert all({p for p, _ in after[q]} == {p for p, _ in before[q]} for q in before)
    qrels = {"q1": {"c": 1}, "q2": {"d": 1}, "q3": {"a": 1}, "q4": {"b": 1, "c": 3}}
    old, new = per_query(qrels, before, recall_at=3), per_query(qrels, after)
    of_set, mean = found
    for name in ("nDCG@10", "Recall@5", "MRR", "P@1"):
        assert of_set.first_stage[name] == pytest.approx(sum(old[q][name] for q in qrels) / 4)
        assert of_set.reranked[name] == pytest.approx(sum(new[q][name] for q in qrels) / 4)
        assert mean.gain[name].mean == pytest.approx(of_set.reranked[name] - of_set.first_stage[name])
        assert mean.gain[name].low <= mean.gain[name].mean <= mean.gain[name].high
    assert of_set.ceiling == pytest.approx(sum(old[q]["Recall@3"] for q in qrels) / 4)
    assert of_set.by_depth[0] == of_set.first_stage
    assert of_set.by_depth[3] == of_set.reranked
    written = json.loads((out / "results.json").read_text())
    assert written["settings"]["reranker"] == {"dtype": "float32"}
    assert written["settings"]["data"] == ["small"]
    assert written["figures"][0]["reranked"] == of_set.reranked
    assert [json.loads(line)["query"] for line in (out / "queries.jsonl").read_text().splitlines()] == sorted(qrels)
    assert ("small: reranking", 4, 4) in notes
    labels = {
        r["query"]: dict(zip(r["passages"], r["labels"], strict=True))
        for r in map(json.loads, (out / "scores" / "small.jsonl").read_text().splitlines())
    }
    assert labels["q1"] == {"a": 0, "b": 0, "c": 1}
    assert not (tmp_path / "out.partial").exists()


def test_the_mean_is_that_of_the_sets_and_wins_are_counted(small, tmp_path):
    shutil.copytree(small, tmp_path / "other")
    (tmp_path / "other" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td\t1\n")
    one, two, mean = evaluate(LengthReranker(), EvaluationSettings(data=(small, tmp_path / "other")), tmp_path / "out")
    assert (mean.name, mean.queries) == ("mean", 5)
    assert mean.reranked["MRR"] == pytest.approx((one.reranked["MRR"] + two.reranked["MRR"]) / 2)
    assert (two.wins, two.losses) == (0, 1)
    assert (mean.wins, mean.losses) == (one.wins + two.wins, one.losses + two.losses)
    assert two.gain["MRR"].low == two.gain["MRR"].high == -0.5


def test_only_the_first_candidates_are_reordered():
    ranking = [("a", 4.0), ("b", 3.0), ("c", 2.0), ("d", 1.0)]
    logits = [0.0, 5.0, 5.0, 9.0]
    assert [p for p, _ in reordered(ranking, logits, depth=3)] == ["b", "c", "a", "d"]
    assert [p for p, _ in reordered(ranking, logits, depth=4)] == ["d", "b", "c", "a"]
    assert [p for p, _ in reordered(ranking, logits, depth=0)] == ["a", "b", "c", "d"]
    for depth in range(5):
        scores = [score for _, score in reordered(ranking, logits, depth=depth)]
        assert sorted(set(scores), reverse=True) == scores


def test_a_sample_is_the_seeds_and_no_larger_than_the_set(facts):
    assert sample_queries(facts, 5, seed=0) == sample_queries(facts, 5, seed=0)
    assert sample_queries(facts, 5, seed=0) != sample_queries(facts, 5, seed=1)
    assert sample_queries(facts, 1000, seed=0) == sorted(facts.queries)
    moved = replace(facts, queries=dict(reversed(facts.queries.items())))
    assert sample_queries(moved, 5, seed=0) == sample_queries(facts, 5, seed=0)


def test_a_candidate_with_the_questions_own_id_is_kept_unless_asked(small, tmp_path):
    (small / "corpus.jsonl").write_text('{"_id": "q1", "text": "sun"}\n{"_id": "c", "text": "sun, sun"}\n')
    (small / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tc\t1\n")
    for drop, expected in ((False, {"q1", "c"}), (True, {"c"})):
        settings = EvaluationSettings(data=(small,), top_k=2, drop_same_id=drop)
        evaluate(LengthReranker(), settings, tmp_path / str(drop))
        assert {p for p, _ in read_run(tmp_path / str(drop) / "first_stage" / "small.trec")["q1"]} == expected


def test_the_candidates_of_one_evaluation_are_a_first_stage_of_the_next(small, tmp_path):
    evaluate(LengthReranker(), EvaluationSettings(data=(small,)), tmp_path / "one")
    again = EvaluationSettings(data=(small,), first_stage=str(tmp_path / "one" / "reranked"))
    (found, _) = evaluate(LengthReranker(), again, tmp_path / "two")
    assert found.first_stage == found.reranked


class StopsAfter(LengthReranker):
    """Fails at the call after so many."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def score_pairs(self, pairs, *, overflow=None):
        if self.calls == self.most:
            raise ScoringError("out of memory")
        return super().score_pairs(pairs, overflow=overflow)


def test_what_is_scored_is_not_scored_again(small, tmp_path):
    settings = EvaluationSettings(data=(small,))
    with pytest.raises(ScoringError):
        evaluate(StopsAfter(3), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    scored = (tmp_path / "out.partial" / "scores" / "small.jsonl").read_text().splitlines()
    assert [json.loads(line)["query"] for line in scored] == ["q1", "q2", "q3"]  # q3 has no candidates
    rest = LengthReranker()
    evaluate(rest, settings, tmp_path / "out")
    whole = LengthReranker()
    evaluate(whole, settings, tmp_path / "whole")
    assert whole.calls - rest.calls == 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_questions_scored_together_share_calls_and_score_as_alone(small, tmp_path):
    alone, together, stopped = LengthReranker(), LengthReranker(), StopsAfter(2)
    evaluate(alone, EvaluationSettings(data=(small,)), tmp_path / "alone")
    evaluate(together, EvaluationSettings(data=(small,), questions_at_once=2), tmp_path / "together")
    assert alone.calls - together.calls == 1  # q1 and q2 in one; q3 has no candidates
    names = ("queries.jsonl", "reranked/small.trec", "first_stage/small.trec")
    assert all((tmp_path / "alone" / n).read_bytes() == (tmp_path / "together" / n).read_bytes() for n in names)
    with pytest.raises(ScoringError):
        evaluate(stopped, EvaluationSettings(data=(small,), questions_at_once=2), tmp_path / "stopped")
    scored = (tmp_path / "stopped.partial" / "scores" / "small.jsonl").read_text().splitlines()
    assert [json.loads(line)["query"] for line in scored] == ["q1", "q2"]


def test_other_settings_do_not_go_on_from_a_partial_run(small, tmp_path):
    with pytest.raises(ScoringError):
        evaluate(StopsAfter(2), EvaluationSettings(data=(small,)), tmp_path / "out")
    with pytest.raises(SettingsError, match=r"another reranker, top_k; remove it"):
        evaluate(
            LengthReranker(),
            EvaluationSettings(data=(small,), top_k=3),
            tmp_path / "out",
            reranker_settings={"dtype": "x"},
        )


def test_other_data_under_the_same_name_does_not_either(small, tmp_path):
    with pytest.raises(ScoringError):
        evaluate(StopsAfter(2), EvaluationSettings(data=(small,)), tmp_path / "out")
    (small / "corpus.jsonl").write_text('{"_id": "x", "text": "sun"}\n')
    with pytest.raises(InvalidInputError, match="which the corpus of small lacks"):
        evaluate(LengthReranker(), EvaluationSettings(data=(small,)), tmp_path / "out")


def test_an_existing_folder_and_two_sets_of_one_name_are_refused(small, tmp_path):
    with pytest.raises(SettingsError, match="exists; give another --out"):
        evaluate(LengthReranker(), EvaluationSettings(data=(small,)), small)
    with pytest.raises(SettingsError, match="two data folders are called 'small'"):
        evaluate(LengthReranker(), EvaluationSettings(data=(small, small)), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    again = tmp_path_factory.mktemp("data") / "again"
    shutil.copytree(FACTS, again)
    return FACTS, again


AT_ONCE = (1, 8)


@pytest.fixture(scope="module", params=AT_ONCE)
def at_once(request):
    return request.param


@pytest.fixture(scope="module")
def wholes(tiny, twice, tmp_path_factory):
    """Both runs without a stop, in a new interpreter with hashes of its own."""
    outs = {number: tmp_path_factory.mktemp("whole") / "out" for number in AT_ONCE}
    code = "import sys"
    for number, out in outs.items():
        arguments = [str(argument) for argument in (tiny, out, number, "never", *twice)]
        code += f"\nsys.argv[1:] = {arguments}\n{EVALUATE}"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=300)
    return {number: files_of(out) for number, out in outs.items()}


@pytest.fixture(scope="module")
def whole(wholes, at_once):
    return wholes[at_once]


@pytest.mark.parametrize("stop", ["facts: reranking 5", "again: first stage", "again: reranking 12"])
def test_a_killed_run_resumes_to_the_same_bytes(tiny, twice, at_once, whole, tmp_path, stop):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert run_code(EVALUATE, tiny, out, at_once, stop, *twice).returncode == -9
    assert not out.exists()
    for scores in (partial / "scores").iterdir():
        with scores.open("a") as file:
            file.write('{"query": "half a li')
    resumed = run_code(EVALUATE, tiny, out, at_once, "never", *twice)
    assert resumed.returncode == 0, resumed.stderr
    assert files_of(out) == whole

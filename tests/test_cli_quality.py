"""`evaluate` and `calibrate` as their users run them."""

import json
import shutil
import zlib

import pytest
from command import assert_refused, run
from remote.endpoint import Endpoint, speaks
from support import FACTS, split_facts


@pytest.fixture(scope="module")
def on_tiny(tiny):
    return "--model", tiny, "--device", "cpu", "--dtype", "float32"


@pytest.fixture(scope="module")
def evaluated(on_tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return out, run("evaluate", "--data", FACTS, "--out", out, "--queries", 15, "--top-k", 6, *on_tiny)


def test_evaluate_prints_the_figures_and_writes_a_folder(evaluated):
    out, found = evaluated
    assert found.returncode == 0
    assert found.stderr.split() == ["wrote", str(out) + ";", "open", str(out / "report.html")]
    figures = json.loads((out / "results.json").read_text())["figures"][0]
    rows = [line.split() for line in found.stdout.splitlines()]
    assert rows[0][-2:] == ["ceiling", "R@6"]
    assert rows[1][:6] == ["facts", "15", "nDCG@10", f"{figures['first_stage']['nDCG@10']:.4f}", f"{figures['reranked']['nDCG@10']:.4f}", f"{figures['gain']['nDCG@10']['mean']:+.4f}"]  # fmt: skip
    assert rows[2][0] == "Recall@5"
    assert rows[2][-1] == f"{figures['ceiling']:.4f}"
    assert {file.name for file in out.iterdir()} == {"first_stage", "scores", "reranked", "queries.jsonl", "results.json", "timing.json", "report.html"}  # fmt: skip


def test_calibrate_takes_the_split_that_it_is_told(tiny, tmp_path):
    data, copy = split_facts(tmp_path / "facts"), tmp_path / "copy"
    chosen = ("--model", tiny, "--out", copy, "--top-k", 3, "--device", "cpu", "--dtype", "float32")
    assert_refused(run("calibrate", "--data", data, *chosen), "found: test, train")
    assert_refused(run("calibrate", "--data", data, "--split", "dev", *chosen), "qrels/dev.tsv (found: test, train)")
    read = run("calibrate", "--data", data, "--split", "test", *chosen)  # a random model may order nothing
    assert read.returncode == 0 or "do not score higher" in read.stderr


def test_calibrate_goes_on_from_an_evaluation(evaluated, tiny, tmp_path):
    out, _ = evaluated
    copy = shutil.copytree(tiny, tmp_path / "mine")
    scores = out / "scores" / "facts.jsonl"
    chosen = "--method", "platt", "--precision", 0.1, "--report", tmp_path / "page.html"
    lines = scores.read_text().splitlines()
    turned = []
    for line in lines:  # a random model orders nothing, so let the relevant ones score high
        record = json.loads(line)
        record["logits"] = [logit + 5 * label for logit, label in zip(record["logits"], record["labels"], strict=True)]
        turned.append(json.dumps(record))
    (tmp_path / "facts.jsonl").write_text("\n".join(turned))
    found = run("calibrate", "--data", tmp_path / "facts.jsonl", "--held-out", scores, "--model", copy, *chosen)
    assert (found.returncode, found.stderr) == (0, f"wrote {copy / 'rerank.json'}\n")
    stored = json.loads((copy / "rerank.json").read_text())["calibration"]
    assert stored["fitted_on"] == ["facts"]
    assert 0 < stored["threshold"] < 1
    assert "facts (held out)" in found.stdout
    assert (
        f"threshold: probability {stored['threshold']:.4f}, for a precision of 0.1; use it as min_score" in found.stdout
    )
    assert "before, bin by bin" in (tmp_path / "page.html").read_text()
    info = run("info", "--model", copy, "--device", "cpu")
    assert f"probability {stored['threshold']:.4f}" in info.stdout


def test_a_remote_reranker_over_a_remote_first_stage(tmp_path):
    def embeds(exchange):
        vectors = [[float(zlib.crc32(text.encode()) % 97), 1.0] for text in exchange.request.body["input"]]
        exchange.respond(200, {"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)]})

    with Endpoint(speaks("nvidia")) as reranker, Endpoint(embeds) as encoder:
        found = run(
            *("evaluate", "--data", FACTS, "--out", tmp_path / "out", "--queries", 3, "--top-k", 4),
            *("--first-stage", f"hybrid:nvidia/embed@{encoder.url}"),
            *("--backend", "remote", "--base-url", reranker.url),
        )
    assert found.returncode == 0, found.stderr
    assert {body["input_type"] for body in encoder.bodies} == {"query", "passage"}
    assert len(reranker.bodies) >= 3
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["reranker"] == {"backend": "remote", "base_url": reranker.url}
    assert not (tmp_path / "out" / "vectors").exists()


def test_a_bi_encoder_baseline_reranks_the_same_candidates(tmp_path):
    def embeds(exchange):
        data = [{"index": i, "embedding": [len(text), 1.0]} for i, text in enumerate(exchange.request.body["input"])]
        exchange.respond(200, {"data": data})

    with Endpoint(embeds) as encoder:
        found = run(
            *("evaluate", "--data", FACTS, "--out", tmp_path / "out", "--queries", 3, "--top-k", 4),
            *("--bi-encoder", f"m@{encoder.url}"),
        )
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["model"] == f"m@{encoder.url}"
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    assert timing["median_seconds_of_a_query_by_depth"] == {}  # vectors are cached, so a second run takes no time
    assert "Not timed" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("evaluate", "--data", "/not/there", "--out", "OUT"), "not a BEIR folder"),
        (("evaluate", "--data", FACTS, "--out", FACTS), "exists; give another --out"),
        (("evaluate", "--data", FACTS, "--out", "OUT", "--first-stage", "bm52"), "give bm25, dense:MODEL"),
        (("evaluate", "--data", FACTS, "--out", "OUT", "--top-k", 0), "top_k: input should be greater"),
        (("evaluate", "--data", FACTS, "--out", "OUT", "--model", "/not/there"), "there is no folder '/not/there'"),
        (
            ("evaluate", "--data", FACTS, "--out", "OUT", "--first-stage", "dense:x@http://127.0.0.1:9"),
            "check base_url",
        ),
        (("calibrate", "--data", FACTS), "give --out, and a changed copy"),
        (("calibrate", "--data", FACTS, "--out", "OUT", "--precision", 80), "it is a share"),
        (("calibrate", "--data", FACTS, "--out", "OUT", "--method", "x"), "give platt or temperature"),
        (("calibrate", "--data", "/not/there.jsonl", "--out", "OUT"), "/not/there.jsonl"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments, hint, tmp_path):
    found = run(*(tmp_path / "out" if argument == "OUT" else argument for argument in arguments))
    assert_refused(found, hint)

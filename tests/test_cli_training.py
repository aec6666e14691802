"""`mine` and `train` as their users run them."""

import json
import re

import pytest
from command import assert_refused, run
from remote.endpoint import Endpoint
from support import FACTS, split_facts


def embeds(exchange):
    """Vectors that say how many letters of the alphabet's first half and second half a text has."""
    halves = [
        [sum(letter in half for letter in text.lower()) + 1.0 for half in ("abcdefghijklm", "nopqrstuvwxyz")]
        for text in exchange.request.body["input"]
    ]
    data = [{"index": i, "embedding": half} for i, half in enumerate(halves)]
    exchange.respond(200, {"data": data})


def test_groups_that_a_model_finds_hard_are_mined_and_trained_on(tiny, tmp_path):
    data, groups, out = split_facts(tmp_path / "facts"), tmp_path / "groups.jsonl", tmp_path / "out"
    with Endpoint(embeds) as encoder:
        mined = run(
            *("mine", "--data", data, "--teacher", f"m@{encoder.url}", "--first-stage", f"hybrid:m@{encoder.url}"),
            *("--questions", 4, "--negatives", 4, "--depth", 12, "--out", groups),
            *("--model", tiny, "--device", "cpu", "--dtype", "float32"),
        )
    assert (mined.returncode, mined.stdout) == (0, "")
    assert mined.stderr.startswith("facts: 8 groups, ")  # of the split to train on
    read = [json.loads(line) for line in groups.read_text().splitlines()]
    assert {(len(group["queries"]), len(group["passages"])) for group in read} == {(4, 8)}
    trained = run(
        *("train", "--base", tiny, "--layers", 2, "--data", groups, "--data", groups, "--validation", data),
        *("--max-queries", 24),
        *("--groups-per-step", 4, "--save-steps", 2, "--patience", 9, "--device", "cpu", "--out", out),
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.splitlines()[-1].startswith(f"wrote {out}; try: ")
    assert re.search(
        r"^step 1 of 3, loss \d.*, [\d,]+ tokens, [\d,]+ a second, 0 h \d\d min left$", trained.stderr, re.M
    )
    record = json.loads((out / "training.json").read_text())
    assert record["settings"]["data"] == ["groups.jsonl", "groups.jsonl"]
    assert (record["settings"]["max_queries"], record["validation_groups"]) == (24, 8)
    assert (record["groups"], record["steps"], list(record["validation"])) == (12, 3, ["2", "3"])
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("rerank.json", "training.json", "training.svg"),
    }


def test_an_early_exit_is_fitted_used_and_priced(tiny, tmp_path):
    out, on_cpu = tmp_path / "out", ("--device", "cpu", "--dtype", "float32")
    fitted = run(
        "early-exit", "--model", tiny, "--data", FACTS, "--max-queries", 30, "--epochs", 2, "--out", out, *on_cpu
    )
    assert fitted.returncode == 0, fitted.stderr
    what, how_well = fitted.stdout.splitlines()
    assert what == "early exit after layer 1, fitted on 27 questions of facts"
    assert how_well.startswith("of 3 questions that it was not fitted on, ")
    assert fitted.stderr.splitlines()[-1].startswith(f"wrote {out}; ")
    assert what.removeprefix("early exit ") in run("info", "--model", out, *on_cpu).stdout
    ranked = run("rank", "who?", "--json", "--model", out, "--cascade-depth", 2, *on_cpu, stdin="me\nyou\nher\nhim\n")
    assert len({json.loads(line)["text"] for line in ranked.stdout.splitlines()}) == 4
    bench = ("bench", "--workload", "nq", "--rounds", 1, "--passages", 4, "--json", "--model", out, *on_cpu)
    report = json.loads(run(*bench, "--cascade-depth", 2).stdout)
    ((baseline,),) = (row["against"] for row in report["rows"])
    assert baseline["name"] == "without cascade depth 2"
    assert baseline["largest_difference"] > 1e-3
    assert report["machine"]["model"].endswith("on cpu in float32, cascade depth 2")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("mine", "--data", FACTS, "--teacher", "nobody", "--out", "OUT"), "no embedding model 'nobody'"),
        (("mine", "--data", FACTS, "--teacher", "nobody", "--out", FACTS), "exists; give another file"),
        (("early-exit", "--data", FACTS), "give --out"),
        (
            ("early-exit", "--data", FACTS, "--max-queries", 9, "--out", "OUT"),
            "9 questions to fit on; give at least 20",
        ),
        (("train", "--data", FACTS, "--out", "OUT"), "give a base to train on"),
        (("train", "--base", "smollm2-135m", "--data", FACTS, "--patience", 1, "--out", "OUT"), "patience counts"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments, hint, tmp_path):
    found = run(*(tmp_path / "out" if argument == "OUT" else argument for argument in arguments))
    assert_refused(found, hint)
    assert list(tmp_path.iterdir()) == []

"""Workloads by value, alternating rounds, and real baselines with the same weights."""

import json

import pytest
import torch
from command import run as run_command

from mistral_rerank import SettingsError
from mistral_rerank.benchmark.bench import SHAPES, _Counter, _Linears, bench, make_pairs
from mistral_rerank.benchmark.timing import alternate, kendall_tau, latencies, matmul_peak


class Recorder:
    def __init__(self, name, log):
        self.name, self._log = name, log

    def score(self, pairs):
        self._log.append(self.name)
        return [float(len(passage)) for _, passage in pairs]


def test_a_workload_has_its_lengths_and_is_the_same_every_time():
    pairs = make_pairs(SHAPES["hotpotqa"], questions=3, passages=200)
    assert pairs == make_pairs(SHAPES["hotpotqa"], questions=3, passages=200)
    assert len(pairs) == 600
    assert len({query for query, _ in pairs}) == 3
    assert {len(query.split()) for query, _ in pairs} == {18}
    lengths = [len(passage.split()) for _, passage in pairs]
    assert sum(lengths) / 600 == pytest.approx(46, rel=0.1)
    assert max(lengths) > 2 * min(lengths)
    assert {len(passage.split()) for _, passage in make_pairs(SHAPES["equal"], questions=1, passages=9)} == {100}


def test_baselines_alternate_and_the_first_round_does_not_count():
    log = []
    timings = alternate([Recorder("a", log), Recorder("b", log)], [("q", "one"), ("q", "three")], rounds=3)
    assert log == ["a", "b"] * 4
    assert [(timing.name, len(timing.seconds), timing.logits) for timing in timings] == [
        ("a", 3, (3.0, 5.0)),
        ("b", 3, (3.0, 5.0)),
    ]


def test_latencies_are_taken_call_by_call():
    calls = []
    median, p95 = latencies(calls.append, [[("q", "p")], [("q", "r")]])
    assert calls == [[("q", "p")], [("q", "r")]]
    assert 0 < median <= p95
    assert latencies(calls.append, [[("q", "p")]])[1] > 0


def test_kendalls_tau_counts_orders():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_the_peak_is_operations_over_the_time_of_the_best_pass(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 5.0, 6.0, 7.0, 9.0, 20.0])  # start; then check, start and end of each pass
    monkeypatch.setattr("mistral_rerank.benchmark.timing.time.perf_counter", lambda: next(clock))
    work = 2 * 16 * 64 * 32 + 2 * 16 * 32 * 64
    assert (
        matmul_peak([(64, 32), (32, 64)], rows=16, dtype=torch.float32, device=torch.device("cpu"), seconds=8.0)
        == work / 2
    )


def test_operations_are_those_that_are_computed(tiny):
    """Of the last layer, keys and values of all 40 tokens, and the rest where 3 sequences end."""
    linears = _Linears.of(str(tiny), None)
    counter = _Counter()
    counter.ran_batch(3, 40, 0.1)
    keys = 2 * 2 * 64 * 16
    rest = 2 * (2 * 64 * 64 + 3 * 64 * 128)
    assert len(linears.layer) == 7
    assert linears.operations(counter) == 40 * (linears.layers - 1) * (keys + rest) + 40 * keys + 3 * rest


OPTIONS = {"device": "cpu", "dtype": "float32", "workloads": ["nq"], "rounds": 1, "calls": 0}


def test_a_baseline_scores_what_we_score(tiny):
    report = bench(str(tiny), against=["transformers"], questions=2, passages=4, **OPTIONS)
    (row,) = report.rows
    (baseline,) = row.against
    assert (row.pairs, report.latency) == (8, {})
    assert row.pairs_per_second > 0
    assert row.tokens_per_second > row.pairs_per_second
    assert row.computed < 1, "a question's passages share it"
    assert row.share_of_peak > 0
    assert baseline.largest_difference < 1e-3
    assert baseline.kendall_tau == 1


def test_sentence_transformers_scores_mini_as_we_do():
    (row,) = bench("mini", against=["sentence-transformers"], questions=1, passages=4, **OPTIONS).rows
    assert row.against[0].largest_difference < 1e-3
    assert row.against[0].kendall_tau == 1


def test_unknown_names_are_in_the_error(tiny):
    with pytest.raises(SettingsError, match="bing: not a workload"):
        bench(str(tiny), workloads=["bing"])
    with pytest.raises(SettingsError, match="bong: not known"):
        bench(str(tiny), device="cpu", against=["bong"])


def test_the_command_prints_tables_and_json(tiny):
    command = ["bench", "--model", str(tiny), "--workload", "equal", "--rounds", "1", "--questions", "1"]
    shown = run_command(*command, "--passages", "3")
    assert shown.returncode == 0, shown.stderr
    assert "computed/real" in shown.stdout
    assert "p95" in shown.stdout
    report = json.loads(run_command(*command, "--passages", "3", "--json").stdout)
    assert [row["workload"] for row in report["rows"]] == ["equal"]
    wrong = run_command(*command, "--against", "bong")
    assert wrong.returncode != 0
    assert "Traceback" not in wrong.stderr

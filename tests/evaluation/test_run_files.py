import itertools

import numpy as np
import pytest
import pytrec_eval

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.run_files import distinct, read_run, write_run


def test_equal_scores_become_distinct_in_32_bits_and_keep_their_order():
    close = 1.0 + 1e-12
    ranking = distinct([("a", close), ("b", 1.0), ("c", 1.0), ("d", 0.0), ("e", 0.0), ("f", -3.5)])
    scores = [np.float32(score) for _, score in ranking]
    assert [passage for passage, _ in ranking] == list("abcdef")
    assert all(first > second for first, second in itertools.pairwise(scores))
    assert [float(score) for score in scores] == pytest.approx([1, 1, 1, 0, 0, -3.5], abs=1e-6)


def test_scores_that_rise_are_pressed_down():
    assert [passage for passage, _ in distinct([("a", 1.0), ("b", 2.0)])] == ["a", "b"]
    (_, first), (_, second) = distinct([("a", 1.0), ("b", 2.0)])
    assert first > second


def test_trec_eval_reads_a_written_run_in_our_order(tmp_path):
    run = {"q1": distinct([("a", 0.1), ("z", 0.1), ("b", 0.1)]), "q2": distinct([("ü", 1e-7)])}
    write_run(run, tmp_path / "r.trec", tag="t")
    assert read_run(tmp_path / "r.trec") == run
    assert (tmp_path / "r.trec").read_text("utf-8").splitlines()[0] == "q1 Q0 a 1 0.1 t"
    with (tmp_path / "r.trec").open(encoding="utf-8") as lines:
        theirs = pytrec_eval.parse_run(lines)
    found = pytrec_eval.RelevanceEvaluator({"q1": {"z": 1}}, {"recip_rank"}).evaluate(theirs)
    assert found["q1"]["recip_rank"] == 0.5


def test_equal_scores_of_a_foreign_run_go_by_its_ranks(tmp_path):
    (tmp_path / "r").write_text("q Q0 b 2 1.0 x\n\nq Q0 a 1 1.0 x\nq Q0 c 3 7 x\n")
    assert [passage for passage, _ in read_run(tmp_path / "r")["q"]] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("q Q0 a 1 1.0 x\nq a 1.0\n", "r:2: expected"),
        ("q Q0 a one 1.0 x\n", "r:1: expected"),
        ("q Q0 a 1 1.0 x\nq Q0 a 2 0.5 x\n", "r:2: passage 'a' of query 'q' comes twice"),
    ],
)
def test_what_is_wrong_with_a_run_is_named_by_line(tmp_path, content, hint):
    (tmp_path / "r").write_text(content)
    with pytest.raises(InvalidInputError, match=hint):
        read_run(tmp_path / "r")


def test_an_id_with_a_space_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="'a b' holds white space"):
        write_run({"q": [("a b", 1.0)]}, tmp_path / "r", tag="t")
    assert list(tmp_path.iterdir()) == []

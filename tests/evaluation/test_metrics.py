import math
import random

import numpy as np
import pytest
import pytrec_eval

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.metrics import MEASURES, interval, mean, per_query, reliability, resampled_means
from mistral_rerank.evaluation.run_files import distinct


@pytest.mark.parametrize("seed", range(20))
def test_measures_are_pytrec_evals_whatever_ties_gaps_and_grades(seed):
    rng = random.Random(seed)
    docs = [f"d{i}" for i in range(30)]
    qrels = {f"q{i}": {d: rng.choice([0, 0, 1, 2, 3]) for d in rng.sample(docs, 8)} for i in range(25)}
    raw = {
        query: [(d, rng.choice([0.5, 0.5, 0.25, rng.random()])) for d in rng.sample(docs, rng.randint(1, 20))]
        for query in qrels
        if rng.random() < 0.8
    }
    run = {query: distinct(sorted(ranking, key=lambda place: -place[1])) for query, ranking in raw.items()}
    found = per_query(qrels, run, recall_at=20)
    reference = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.1,5,20", "recip_rank", "P.1"}).evaluate(
        {query: {d: -float(rank) for rank, (d, _) in enumerate(ranking)} for query, ranking in run.items()}
    )
    assert len(raw) < len(qrels)
    assert list(found) == list(qrels)
    for query in qrels:
        for name, key in {**MEASURES, "Recall@20": "recall_20"}.items():
            assert found[query][name] == pytest.approx(reference.get(query, {}).get(key, 0.0), abs=1e-6)
    for name, key in MEASURES.items():
        expected = sum(reference.get(query, {}).get(key, 0.0) for query in qrels) / len(qrels)
        assert mean(found, name) == pytest.approx(expected, abs=1e-6)


def test_measures_by_value():
    found = per_query({"q": {"a": 1, "b": 2, "z": 0}}, {"q": [("z", 3.0), ("b", 2.0), ("a", 1.0)]})
    gain, ideal = 2 / np.log2(3) + 1 / np.log2(4), 2 / np.log2(2) + 1 / np.log2(3)
    assert found["q"] == pytest.approx(
        {"nDCG@10": gain / ideal, "Recall@5": 1.0, "Recall@1": 0.0, "MRR": 0.5, "P@1": 0.0}, abs=1e-6
    )


def test_the_ceiling_may_be_recall_at_5_itself():
    assert per_query({"q": {"a": 1}}, {"q": [("a", 1.0)]}, recall_at=5)["q"]["Recall@5"] == 1.0


def test_a_query_that_is_not_judged_counts_for_nothing():
    assert list(per_query({"q": {"a": 1}}, {"q": [("a", 1.0)], "other": [("a", 1.0)]})) == ["q"]


def test_the_same_seed_gives_the_same_interval_and_another_set_another_one():
    gains = [0.0, 0.1, -0.2, 0.5, 0.0, 0.3]
    one, two = (resampled_means(gains, seed=1, name="a") for _ in range(2))
    assert (one == two).all()
    assert (one != resampled_means(gains, seed=2, name="a")).any()
    assert (one != resampled_means(gains, seed=1, name="b")).any()


def test_the_interval_is_that_of_the_normal_approximation_for_many_queries():
    gains = np.random.default_rng(0).normal(0.02, 0.2, 3000)
    found = interval(float(gains.mean()), resampled_means(gains.tolist(), seed=0, name="x"))
    half = 1.96 * gains.std() / np.sqrt(len(gains))
    assert found.mean == gains.mean()
    assert (found.low, found.high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.03 * half)


def test_equal_gains_leave_no_doubt():
    found = interval(0.25, resampled_means([0.25] * 7, seed=0, name="x"))
    assert (found.low, found.high) == (0.25, 0.25)


def test_calibration_errors_by_value():
    found = reliability([0.9, 0.1, 0.2, 0.8], [1, 0, 1, 1], bins=2)
    assert [(b.pairs, b.probability, b.share) for b in found.bins] == [
        (2, pytest.approx(0.15), 0.5),
        (2, pytest.approx(0.85), 1.0),
    ]
    assert found.ece == pytest.approx(0.5 * 0.35 + 0.5 * 0.15)
    assert found.brier == pytest.approx((0.01 + 0.01 + 0.64 + 0.04) / 4)
    assert found.nll == pytest.approx(-(math.log(0.9) * 2 + math.log(0.2) + math.log(0.8)) / 4)
    assert (found.pairs, found.relevant) == (4, 0.75)


def test_bins_hold_equal_numbers():
    found = reliability((np.arange(150) / 1500).tolist(), [0] * 150)
    assert [b.pairs for b in found.bins] == [10] * 15
    assert sum(b.pairs for b in reliability([0.5] * 37, [1] * 37).bins) == 37


def test_true_probabilities_have_almost_no_error():
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    assert reliability(p.tolist(), (rng.random(p.size) < p).astype(int).tolist()).ece < 0.006


def test_certainty_that_is_wrong_is_finite():
    assert reliability([0.0], [1]).nll == pytest.approx(-math.log(1e-15))


@pytest.mark.parametrize(("p", "y"), [([], []), ([0.5], [1, 0]), ([0.5], [2])])
def test_what_cannot_be_measured_is_refused(p, y):
    with pytest.raises(InvalidInputError):
        reliability(p, y)

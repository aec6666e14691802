import numpy as np
import pytest

from mistral_rerank import InvalidInputError, SettingsError
from mistral_rerank.calibration.fit import (
    LabelledPairs,
    calibrate,
    check_choices,
    fit,
    outcomes,
    pick_threshold,
    probabilities,
)
from mistral_rerank.evaluation.metrics import reliability
from mistral_rerank.local.checkpoints.config import Calibration
from mistral_rerank.scores import Score

SCALE, BIAS = 0.4, -1.3


def synthetic(seed, count=40_000, name="made"):
    """Logits whose true probability is sigmoid(SCALE * logit + BIAS)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(1, 5, count)
    labels = rng.random(count) < 1 / (1 + np.exp(-(SCALE * logits + BIAS)))
    return LabelledPairs(name, tuple(logits.tolist()), tuple(labels.astype(int).tolist()))


def test_a_known_scale_and_bias_are_found_again():
    pairs = synthetic(0)
    assert fit(pairs.logits, pairs.labels) == pytest.approx((SCALE, BIAS), abs=0.03)


def test_the_fit_is_the_maximum_of_the_likelihood():
    pairs = synthetic(1, count=500)
    scale, bias = fit(pairs.logits, pairs.labels)
    x, y = np.array(pairs.logits), np.array(pairs.labels)
    targets = np.where(y > 0, (y.sum() + 1) / (y.sum() + 2), 1 / (len(y) - y.sum() + 2))
    rest = targets - probabilities(pairs.logits, scale=scale, bias=bias)
    assert [rest.sum(), (rest * x).sum()] == pytest.approx([0, 0], abs=1e-6)


def test_a_temperature_has_no_bias():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 5, 40_000)
    labels = (rng.random(logits.size) < 1 / (1 + np.exp(-logits / 3))).astype(int)
    assert fit(logits.tolist(), labels.tolist(), method="temperature") == (pytest.approx(1 / 3, abs=0.02), 0.0)


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_separable_pairs_give_a_finite_map_that_keeps_the_order(method):
    scale, _ = fit([-1000.0, -1.0, 1.0, 1000.0], [0, 0, 1, 1], method=method)
    assert 0 < scale < np.inf


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_one_label_alone_is_refused(labels):
    with pytest.raises(InvalidInputError, match="pairs of both kinds"):
        fit([1.0, 2.0, 3.0], labels)


def test_scores_that_are_upside_down_are_refused():
    with pytest.raises(InvalidInputError, match="do not score higher"):
        fit([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1])


def test_the_map_is_the_rerankers_own_and_keeps_the_order():
    logits = [-800.0, -3.0, -2.9999, 0.0, 7.5, 800.0]
    found = probabilities(logits, scale=SCALE, bias=BIAS)
    expected = [Score.from_logit(logit, scale=SCALE, bias=BIAS).probability for logit in logits]
    assert found == pytest.approx(expected, abs=1e-12)
    assert (np.diff(found) > 0).all()


def test_calibration_mends_pairs_that_were_not_fitted():
    fitted, other = synthetic(3), synthetic(4)
    result = calibrate([fitted], precision=0.8)
    (_, held_out) = outcomes([fitted], [other], Calibration(), result)
    assert held_out.name == "made (held out)"
    assert held_out.before.ece > 0.1
    assert held_out.after.ece < 0.01
    assert held_out.after.brier < held_out.before.brier
    assert held_out.after.nll < held_out.before.nll
    assert held_out.precision == pytest.approx(0.8, abs=0.02)
    kept = probabilities(other.logits, scale=result.scale, bias=result.bias) >= result.threshold
    assert held_out.reached == kept.sum()
    assert held_out.recall == pytest.approx(np.array(other.labels)[kept].sum() / sum(other.labels))
    assert held_out.at_threshold.startswith(f"{held_out.reached} pairs, precision 0.")


def test_before_is_what_the_checkpoint_had():
    pairs = synthetic(5, count=200)
    (found,) = outcomes([pairs], [], Calibration(scale=2.0, bias=1.0), calibrate([pairs]))
    expected = reliability(probabilities(pairs.logits, scale=2.0, bias=1.0).tolist(), pairs.labels)
    assert found.before == expected
    assert (found.reached, found.at_threshold) == (None, "")


def test_collections_are_fitted_together_and_named():
    one, two = synthetic(6, count=300, name="one"), synthetic(7, count=200, name="two")
    result = calibrate([one, two])
    assert (result.fitted_on, result.pairs, result.threshold) == (("one", "two"), 500, None)
    assert (result.scale, result.bias) == fit(one.logits + two.logits, one.labels + two.labels)
    names = [o.name for o in outcomes([one, two], [one, two], Calibration(), result)]
    assert names == ["one", "two", "all fitted", "one (held out)", "two (held out)", "all held out"]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [(1.0, 0.85), (0.75, 0.55), (0.6, 0.35), (0.4, 0.1), (0.1, 0.1)],
)
def test_the_threshold_is_the_lowest_that_keeps_the_precision(precision, expected):
    found = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    labels = [1, 0, 1, 1, 0, 0, 0, 0, 1]
    if precision == 0.6:
        labels[5] = 1
    assert pick_threshold(found, labels, precision=precision) == pytest.approx(expected)


def test_equal_probabilities_are_kept_or_left_out_together():
    assert pick_threshold([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0], precision=0.9) == pytest.approx(0.7)


def test_a_precision_that_nothing_reaches_says_what_is_reached():
    with pytest.raises(InvalidInputError, match=r"0\.9 on these pairs \(the best is 0\.667\)"):
        pick_threshold([0.9, 0.8, 0.7], [0, 1, 1], precision=0.9)


@pytest.mark.parametrize(
    ("method", "precision", "hint"),
    [("isotonic", None, "give platt"), ("platt", 80, "a share"), ("platt", 0.0, "a share")],
)
def test_choices_without_sense_are_refused(method, precision, hint):
    with pytest.raises(SettingsError, match=hint):
        check_choices(method, precision)

import math

import numpy as np
import pytest

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.reliability import reliability


def test_figures_by_value():
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

"""Calibration of probabilities: expected calibration error, Brier score, log loss and the reliability table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

BINS = 15
SMALLEST = 1e-15
"""Probabilities are clipped to this distance from 0 and 1 before the logarithm."""


@dataclass(frozen=True, slots=True)
class Bin:
    """One row of the reliability table.

    Attributes:
        pairs: number of pairs.
        probability: their mean probability.
        share: share of relevant pairs.

    """

    pairs: int
    probability: float
    share: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """How well the probabilities of labelled pairs are calibrated.

    Attributes:
        pairs: number of pairs.
        relevant: share of relevant pairs.
        ece: expected calibration error: the mean over pairs of |mean probability - share relevant| of their bin.
        brier: the mean squared difference from the label.
        nll: the mean negative log likelihood, in nats.
        bins: of equally many pairs, by rising probability.

    """

    pairs: int
    relevant: float
    ece: float
    brier: float
    nll: float
    bins: tuple[Bin, ...]


def reliability(probabilities: Sequence[float], labels: Sequence[int], *, bins: int = BINS) -> Reliability:
    """Compare probabilities with labels in `bins` bins of equal numbers of pairs.

    Args:
        probabilities: (pairs,), in [0, 1].
        labels: (pairs,), 1 for relevant.
        bins: at most this many; fewer for fewer pairs.

    Raises:
        InvalidInputError: there are no pairs, or a label is neither 0 nor 1.

    Source: equal-mass bins as in Nguyen and O'Connor 2015, arXiv 1508.05154.

    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if p.size == 0 or p.shape != y.shape:
        raise InvalidInputError(f"{p.size} probabilities with {y.size} labels; give one label a pair, and some pairs")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InvalidInputError("a label is neither 0 nor 1")
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    table = tuple(Bin(int(part.size), float(p[part].mean()), float(y[part].mean())) for part in parts)
    clipped = np.clip(p, SMALLEST, 1 - SMALLEST)
    return Reliability(
        pairs=int(p.size),
        relevant=float(y.mean()),
        ece=sum(part.pairs * abs(part.probability - part.share) for part in table) / p.size,
        brier=float(np.mean((p - y) ** 2)),
        nll=float(-np.mean(y * np.log(clipped) + (1 - y) * np.log(1 - clipped))),
        bins=table,
    )

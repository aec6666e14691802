"""Probabilities that mean something: an order-keeping map fitted on judged pairs, and a threshold for a precision.

The map is sigmoid(scale * logit + bias) with scale > 0, so that no ranking changes. Two parameters are Platt's, one
(bias 0) is a temperature. Fitted are the held-out pairs that a user will meet: candidates of a first stage, of which
few are relevant. Another first stage, depth or domain has another share of relevant ones, and wants another fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.evaluation.reliability import Reliability, reliability
from mistral_rerank.local.checkpoint import Calibration
from mistral_rerank.training.judged_pairs import pooled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mistral_rerank.training.judged_pairs import JudgedPairs

Method = Literal["platt", "temperature"]

MOST_STEPS = 100
SMALLEST_STEP = 1e-10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a calibration does to a collection of pairs.

    Attributes:
        name: of the collection.
        before: the reliability under the old calibration.
        after: under the new one.
        kept: how many pairs reach the threshold; None where there is none.
        precision: the share of relevant ones among them; None where none reaches it.
        recall: the share of the relevant pairs that reach it; None where there are none.

    """

    name: str
    before: Reliability
    after: Reliability
    kept: int | None
    precision: float | None
    recall: float | None

    @property
    def at_threshold(self) -> str:
        """What the threshold does here, in words."""
        if self.kept is None:
            return ""
        if self.precision is None:
            return "no pair reaches it"
        recall = "" if self.recall is None else f", recall {self.recall:.3f}"
        return f"{self.kept} pairs, precision {self.precision:.3f}{recall}"


def fit(logits: Sequence[float], labels: Sequence[int], *, method: Method = "platt") -> tuple[float, float]:
    """Fit the map by maximum likelihood, with Platt's targets, which keep it finite on separable pairs.

    Args:
        logits: (pairs,).
        labels: (pairs,), 1 for relevant, else 0.
        method: "platt" fits scale and bias, "temperature" the scale alone.

    Returns:
        Scale, above 0, and bias.

    Raises:
        InvalidInputError: one label alone occurs, or relevant pairs do not score higher than the others.

    Source: Platt 1999, by Newton's method as in Lin, Lin and Weng, Machine Learning 68, 2007.

    """
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    relevant = int(y.sum())
    if not 0 < relevant < y.size:
        raise InvalidInputError(f"{relevant} of {y.size} pairs are relevant; a calibration needs pairs of both kinds")
    targets = np.where(y > 0, (relevant + 1) / (relevant + 2), 1 / (y.size - relevant + 2))
    columns = np.stack([x, np.ones_like(x)], axis=1) if method == "platt" else x[:, None]
    weights = np.zeros(columns.shape[1])
    loss = _loss(columns @ weights, targets)
    for _ in range(MOST_STEPS):
        p = 1 / (1 + np.exp(-np.clip(columns @ weights, -500, 500)))
        gradient = columns.T @ (p - targets)
        curvature = (columns * (p * (1 - p))[:, None]).T @ columns + 1e-12 * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        size, new = 1.0, _loss(columns @ (weights - step), targets)
        while new > loss and size > SMALLEST_STEP:
            size /= 2
            new = _loss(columns @ (weights - size * step), targets)
        if size <= SMALLEST_STEP:
            break
        weights, loss = weights - size * step, new
        if float(np.max(np.abs(size * step))) < SMALLEST_STEP:
            break
    scale, bias = float(weights[0]), float(weights[1]) if method == "platt" else 0.0
    if scale <= 0:
        raise InvalidInputError(
            "relevant pairs do not score higher than the others here, so no order-keeping calibration fits; "
            "check the labels and the model" + ("" if method == "platt" else ", or use --method platt")
        )
    return scale, bias


def _loss(z: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    return float(np.sum(np.logaddexp(0, z) - targets * z))


def probabilities(logits: Sequence[float], *, scale: float, bias: float) -> NDArray[np.float64]:
    """Map logits as the reranker does."""
    z = scale * np.asarray(logits, dtype=np.float64) + bias
    return np.asarray(np.exp(-np.logaddexp(0, -z)))


def pick_threshold(found: Sequence[float], labels: Sequence[int], *, precision: float) -> float:
    """Give the lowest probability at or above which at least this share of the pairs is relevant.

    Args:
        found: probabilities (pairs,).
        labels: (pairs,), 1 for relevant, else 0.
        precision: the wanted share, above 0 and at most 1.

    Returns:
        The middle between the last probability that is kept and the next one below it.

    Raises:
        InvalidInputError: no threshold reaches it; it says what the best reaches.

    """
    p, y = np.asarray(found, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    order = np.argsort(-p, kind="stable")
    p, y = p[order], y[order]
    shares = np.cumsum(y) / np.arange(1, y.size + 1)
    ends = np.append(p[:-1] > p[1:], True)  # equal probabilities are kept or left out together
    good = np.flatnonzero(ends & (shares >= precision))
    if good.size == 0:
        best = float(shares[ends].max())
        raise InvalidInputError(
            f"no threshold reaches a precision of {precision:g} on these pairs (the best is {best:.3f}); "
            "ask for less, or give more pairs"
        )
    last = int(good[-1])
    return float((p[last] + p[last + 1]) / 2) if last + 1 < p.size else float(p[last])


def calibrate(
    fitted: Sequence[JudgedPairs], *, method: Method = "platt", precision: float | None = None
) -> Calibration:
    """Fit the map on all pairs together, and pick the threshold.

    Raises:
        InvalidInputError: as `fit` and `pick_threshold`.

    """
    together = pooled("all", fitted)
    logits, labels = together.logits, together.labels
    scale, bias = fit(logits, labels, method=method)
    threshold = None
    if precision is not None:
        threshold = pick_threshold(
            probabilities(logits, scale=scale, bias=bias).tolist(), labels, precision=precision
        )
    return Calibration(
        scale=scale,
        bias=bias,
        threshold=threshold,
        precision=precision,
        fitted_on=tuple(pairs.name for pairs in fitted),
        pairs=len(labels),
    )


def outcomes(
    fitted: Sequence[JudgedPairs], held_out: Sequence[JudgedPairs], old: Calibration, new: Calibration
) -> list[Outcome]:
    """Say what the new calibration does to each collection, and to all that were fitted on, and to all held out."""
    made = [outcome(pairs, old, new) for pairs in fitted]
    if len(fitted) > 1:
        made.append(outcome(pooled("all fitted", fitted), old, new))
    made += [outcome(replace(pairs, name=f"{pairs.name} (held out)"), old, new) for pairs in held_out]
    if len(held_out) > 1:
        made.append(outcome(pooled("all held out", held_out), old, new))
    return made


def outcome(pairs: JudgedPairs, old: Calibration, new: Calibration) -> Outcome:
    """Say what the new calibration does to a collection of pairs."""
    before = probabilities(pairs.logits, scale=old.scale, bias=old.bias)
    after = probabilities(pairs.logits, scale=new.scale, bias=new.bias)
    labels = np.asarray(pairs.labels)
    kept = after >= new.threshold if new.threshold is not None else None
    return Outcome(
        name=pairs.name,
        before=reliability(before.tolist(), pairs.labels),
        after=reliability(after.tolist(), pairs.labels),
        kept=None if kept is None else int(kept.sum()),
        precision=None if kept is None or not kept.any() else float(labels[kept].mean()),
        recall=None if kept is None or not labels.any() else float(kept[labels == 1].mean()),
    )


def check_choices(method: str, precision: float | None) -> Method:
    """Refuse a method or precision that makes no sense, before anything is scored.

    Raises:
        SettingsError: saying what to give.

    """
    if precision is not None and not 0 < precision <= 1:
        raise SettingsError(f"precision is {precision:g}; it is a share, so give more than 0 and at most 1")
    if method not in ("platt", "temperature"):
        raise SettingsError(f"the method {method!r} is not known; give platt or temperature")
    return "platt" if method == "platt" else "temperature"

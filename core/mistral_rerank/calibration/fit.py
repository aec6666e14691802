"""Platt scaling and temperature scaling of logits, and a threshold for a precision.

The probability is sigmoid(scale * logit + bias) with scale > 0, so rankings do not change. Platt scaling fits both
parameters, temperature scaling fits the scale and keeps the bias at 0. Fit on pairs that the model was not trained on
and that look like the later use: the share of relevant pairs depends on the first stage, its depth and the domain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.evaluation.metrics import Reliability, reliability
from mistral_rerank.local.checkpoints.config import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

Method = Literal["platt", "temperature"]


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """Uncalibrated logits (pairs,) of a data set or file, with their labels (pairs,): 1 for relevant, else 0."""

    name: str
    logits: tuple[float, ...]
    labels: tuple[int, ...]


def pooled(name: str, collections: Sequence[LabelledPairs]) -> LabelledPairs:
    """Concatenate collections."""
    return LabelledPairs(
        name,
        tuple(logit for pairs in collections for logit in pairs.logits),
        tuple(label for pairs in collections for label in pairs.labels),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The effect of a calibration on a collection of labelled pairs.

    Attributes:
        before: reliability under the old calibration.
        after: reliability under the new one.
        reached: number of pairs that reach the threshold; None without a threshold.
        precision: share of relevant pairs among those; None if no pair reaches the threshold.
        recall: share of the relevant pairs that reach the threshold; None if no pair is relevant.

    """

    name: str
    before: Reliability
    after: Reliability
    reached: int | None
    precision: float | None
    recall: float | None

    @property
    def at_threshold(self) -> str:
        """The effect of the threshold, for people."""
        if self.reached is None:
            return ""
        if self.precision is None:
            return "no pair reaches it"
        recall = "" if self.recall is None else f", recall {self.recall:.3f}"
        return f"{self.reached} pairs, precision {self.precision:.3f}{recall}"


def minimize(loss: Callable[[Tensor], Tensor], start: Sequence[float]) -> list[float]:
    """Minimize a smooth loss of a few float64 parameters by L-BFGS, until its gradient is below 1e-11.

    The loss has to be a mean over the data, not a sum.
    """
    parameters = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=200, tolerance_grad=1e-11, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return [float(value) for value in parameters.detach()]


def fit(logits: Sequence[float], labels: Sequence[int], *, method: Method = "platt") -> tuple[float, float]:
    """Fit scale and bias by maximum likelihood with Platt's targets, which keep them finite on separable pairs.

    Raises:
        InvalidInputError: all labels are equal, or relevant pairs do not score higher than the others.

    Source: Platt 1999; targets as in Lin, Lin and Weng, Machine Learning 68, 2007.

    """
    relevant, irrelevant = sum(labels), len(labels) - sum(labels)
    if not relevant or not irrelevant:
        raise InvalidInputError(
            f"{relevant} of {len(labels)} pairs are relevant; a calibration needs pairs of both kinds"
        )
    x = torch.tensor(logits, dtype=torch.float64)
    mean, deviation = float(x.mean()) if method == "platt" else 0.0, float(x.std()) or 1.0
    columns = torch.stack([(x - mean) / deviation, torch.ones_like(x)], dim=1)[:, : 2 if method == "platt" else 1]
    positive, negative = (relevant + 1) / (relevant + 2), 1 / (irrelevant + 2)
    targets = torch.tensor([positive if label else negative for label in labels], dtype=torch.float64)
    slope, *intercept = minimize(
        lambda parameters: binary_cross_entropy_with_logits(columns @ parameters, targets), [0.0] * columns.shape[1]
    )
    scale = slope / deviation
    bias = sum(intercept) - scale * mean
    if scale <= 0:
        raise InvalidInputError(
            "relevant pairs do not score higher than the others here, so no calibration with a scale above 0 fits; "
            "check the labels and the model" + ("" if method == "platt" else ", or use --method platt")
        )
    return scale, bias


def probabilities(logits: Sequence[float], *, scale: float, bias: float) -> NDArray[np.float64]:
    """Give sigmoid(scale * logit + bias), (pairs,), as the reranker does."""
    z = scale * np.asarray(logits, dtype=np.float64) + bias
    return np.asarray(np.exp(-np.logaddexp(0, -z)))


def pick_threshold(probabilities: Sequence[float], labels: Sequence[int], *, precision: float) -> float:
    """Give the lowest threshold that reaches a precision: the share of relevant pairs among those that reach it.

    It is the middle between the lowest probability that is kept and the next one below it.

    Raises:
        InvalidInputError: no threshold reaches it; the message has the best precision.

    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    order = np.argsort(-p, kind="stable")
    p, y = p[order], y[order]
    precisions = np.cumsum(y) / np.arange(1, y.size + 1)
    last_of_equals = np.append(p[:-1] > p[1:], True)  # equal probabilities are kept or dropped together
    candidates = np.flatnonzero(last_of_equals & (precisions >= precision))
    if candidates.size == 0:
        best = float(precisions[last_of_equals].max())
        raise InvalidInputError(
            f"no threshold reaches a precision of {precision:g} on these pairs (the best is {best:.3f}); "
            "ask for less, or give more pairs"
        )
    last = int(candidates[-1])
    return float((p[last] + p[last + 1]) / 2) if last + 1 < p.size else float(p[last])


def calibrate(
    collections: Sequence[LabelledPairs], *, method: Method = "platt", precision: float | None = None
) -> Calibration:
    """Fit scale and bias on all pairs together, and pick the threshold for a precision; see both for errors."""
    pairs = pooled("all", collections)
    scale, bias = fit(pairs.logits, pairs.labels, method=method)
    threshold = None
    if precision is not None:
        calibrated = probabilities(pairs.logits, scale=scale, bias=bias).tolist()
        threshold = pick_threshold(calibrated, pairs.labels, precision=precision)
    return Calibration(
        scale=scale,
        bias=bias,
        threshold=threshold,
        precision=precision,
        fitted_on=tuple(collection.name for collection in collections),
        pairs=len(pairs.labels),
    )


def outcomes(
    fitted: Sequence[LabelledPairs], held_out: Sequence[LabelledPairs], old: Calibration, new: Calibration
) -> list[Outcome]:
    """Measure the new calibration on each collection, on all that were fitted on, and on all held out."""
    collections = list(fitted)
    if len(fitted) > 1:
        collections.append(pooled("all fitted", fitted))
    collections += [replace(pairs, name=f"{pairs.name} (held out)") for pairs in held_out]
    if len(held_out) > 1:
        collections.append(pooled("all held out", held_out))
    return [_outcome(pairs, old, new) for pairs in collections]


def _outcome(pairs: LabelledPairs, old: Calibration, new: Calibration) -> Outcome:
    before = probabilities(pairs.logits, scale=old.scale, bias=old.bias)
    after = probabilities(pairs.logits, scale=new.scale, bias=new.bias)
    labels = np.asarray(pairs.labels)
    reached = None if new.threshold is None else after >= new.threshold
    return Outcome(
        name=pairs.name,
        before=reliability(before.tolist(), pairs.labels),
        after=reliability(after.tolist(), pairs.labels),
        reached=None if reached is None else int(reached.sum()),
        precision=None if reached is None or not reached.any() else float(labels[reached].mean()),
        recall=None if reached is None or not labels.any() else float(reached[labels == 1].mean()),
    )


def check_choices(method: str, precision: float | None) -> Method:
    """Raise `SettingsError` for an invalid method or precision, before anything is scored."""
    if precision is not None and not 0 < precision <= 1:
        raise SettingsError(f"precision is {precision:g}; it is a share, so give more than 0 and at most 1")
    if method not in ("platt", "temperature"):
        raise SettingsError(f"the method {method!r} is not known; give platt or temperature")
    return cast("Method", method)

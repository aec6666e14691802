"""Scores the batches of a data frame library: Ray Data, Spark, Dask or pandas."""

from __future__ import annotations

from typing import Any, TypeVar

from mistral_rerank._sharing import shared
from mistral_rerank.settings import RerankSettings

Batch = TypeVar("Batch", bound=Any)


class PairScorer:
    """Adds the columns "logit", "probability" and "tokens" to batches with the columns "query" and "passage".

        dataset.map_batches(PairScorer, fn_constructor_kwargs={"model": "mini"}, compute=ActorPoolStrategy(size=4))

    A copy or pickle contains the settings only. A process loads the model once, at its first batch, and keeps it for
    five minutes after the last one.

    Args:
        settings: fields of `RerankSettings`.

    Raises:
        SettingsError: a setting is unknown or invalid.

    """

    def __init__(self, **settings: Any) -> None:
        self._settings = RerankSettings(**settings)

    def __call__(self, batch: Batch) -> Batch:
        """Score a batch, a pandas data frame or a dict of columns; give a copy with the further columns.

        Raises:
            InvalidInputError: a text is not a string, or a question is blank.

        """
        scores = shared.get(self._settings).score_pairs(list(zip(batch["query"], batch["passage"], strict=True)))
        scored: Batch = batch.copy()
        for name in ("logit", "probability", "tokens"):
            scored[name] = [getattr(score, name) for score in scores]
        return scored

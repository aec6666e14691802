"""Where a run's examples come from: data sets with a cap and a weight, such as `my-domain@500@2x`."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.beir import load_beir, qrels_files
from mistral_rerank.training.groups import Group, read_groups
from mistral_rerank.training.mining import mine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.evaluation.beir import BeirDataset

_WRITTEN = re.compile(r"(?P<path>.+?)(@(?P<max_queries>\d+))?(@(?P<weight>\d*\.?\d+)x)?", re.DOTALL)


class Source(BaseModel):
    """A data set of a run; written `PATH`, `PATH@500` (questions at most), `PATH@2x` (weight) or `PATH@500@2x`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="a BEIR folder, or a .jsonl of groups")
    max_queries: int | None = Field(default=None, ge=1, description="questions taken of it at most")
    weight: float = Field(default=1.0, gt=0, description="how often an epoch sees each of its groups")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        written = _WRITTEN.fullmatch(str(value))
        return {"path": value} if written is None else {k: v for k, v in written.groupdict().items() if v is not None}

    @property
    def name(self) -> str:
        """The written form without the folders above: what a record may say."""
        cap = "" if self.max_queries is None else f"@{self.max_queries}"
        return f"{self.path.name}{cap}{'' if self.weight == 1 else f'@{self.weight:g}x'}"

    def load(self, *splits: str) -> BeirDataset:
        """Read a BEIR folder; of several judged splits, the first of these names that is there."""
        there = qrels_files(self.path)
        split = next((name for name in splits if name in there), None) if len(there) > 1 else None
        return load_beir(self.path, split=split)

    def groups(self, *splits: str, questions: int, negatives: int, random_negatives: int, seed: int) -> list[Group]:
        """Read its groups, or draw those of a folder, within the cap and as often as the weight says.

        Raises:
            InvalidInputError: it cannot be read, or is too small.

        """
        if self.path.suffix == ".jsonl":
            return weighted(self._kept(seed), self.weight, seed)
        mined = mine(
            self.load(*splits),
            questions=questions,
            negatives=negatives,
            random_negatives=random_negatives,
            max_queries=self.max_queries,
            seed=seed,
        )
        return weighted(mined.groups, self.weight, seed)

    def _kept(self, seed: int) -> list[Group]:
        """Read a file of groups up to the cap, in an order that the seed decides."""
        groups = read_groups(self.path)
        if self.max_queries is None:
            return groups
        random.Random(f"{seed}/{self.path.name}").shuffle(groups)  # noqa: S311 - sampling, not security
        kept, count = [], 0
        for group in groups:
            count += len(group.queries)
            if count > self.max_queries:
                break
            kept.append(group)
        if not kept:
            raise InvalidInputError(
                f"the groups of {self.path} hold more than {self.max_queries} questions each; raise the cap"
            )
        return kept


def weighted(groups: Sequence[Group], weight: float, seed: int) -> list[Group]:
    """Repeat groups: 2 gives each twice, 0.5 a random half, 2.5 each twice and a half three times."""
    whole, part = divmod(weight, 1.0)
    chosen = random.Random(seed).sample(list(groups), round(part * len(groups)))  # noqa: S311 - no security
    return [*groups] * int(whole) + chosen

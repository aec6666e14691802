"""Questions and passages of given lengths, made of ordinary words: speed depends on lengths, not on sense.

Lengths are in words; a word is about one token and a quarter. The means of `nq`, `hotpotqa` and `fiqa` are those of
the BEIR paper (arXiv 2104.08663, table 1); passages vary around them as log-normal lengths with sigma 0.6 do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistral_rerank.reranker import Pair

WORDS = (  # noqa: SIM905 - easier to read than a list
    "water light night river stone paper music market engine window garden letter winter number people country "
    "system energy method result surface history language machine problem theory weather village teacher student "
    "doctor patient kitchen bridge island planet season animal forest metal signal pattern picture station captain "
    "the of and to in is that for it with as was on are by this from at which have not be an or their more after "
    "before under between large small early late found made given known used called moved built grew turned kept"
).split()


@dataclass(frozen=True, slots=True)
class Shape:
    """How long the texts of a workload are, in words.

    Attributes:
        question: words of a question.
        passage: mean words of a passage.
        sigma: of the logarithm of a passage's length; 0 for equal lengths.

    """

    question: int
    passage: int
    sigma: float = 0.6


SHAPES = {
    "nq": Shape(9, 79),
    "hotpotqa": Shape(18, 46),
    "fiqa": Shape(11, 132),
    "long-question": Shape(240, 120),
    "equal": Shape(10, 100, sigma=0.0),
}


def make_pairs(shape: Shape, *, questions: int, passages: int, seed: int = 0) -> list[Pair]:
    """Give the pairs of some questions with as many passages each, one question after another."""
    rng = random.Random(seed)  # noqa: S311 - sampling, not security
    pairs = []
    for _ in range(questions):
        question = _text(rng, shape.question)
        for _ in range(passages):
            factor = rng.lognormvariate(-(shape.sigma**2) / 2, shape.sigma)  # of mean 1
            pairs.append((question, _text(rng, max(1, round(shape.passage * factor)))))
    return pairs


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))

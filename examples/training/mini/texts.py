"""The texts of the training sets: passages, questions and sentences, and their embeddings by two bi-encoders."""

import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mistral_rerank.evaluation.datasets import BeirDataset, load_beir
from mistral_rerank.sentences import sentence_spans

Kind = Literal["questions", "passages"]
Vectors = NDArray[np.float32]

SETS = {
    "squad_du": 99_999,
    "squadshifts_wiki": 99_999,
    "boolq_test": 99_999,
    "selqa": 99_999,
    "medquad": 4000,
    "techdocs_faq": 99_999,
    "stackexchange_small": 99_999,
    "covidqa_deepset": 99_999,
    "bioasq_6_8": 99_999,
    "tatqa_text": 99_999,
    "quotesum_dev": 99_999,
    "dstc9_faq": 1500,
    "fever_eraser": 2500,
}
"""The most questions of each set in one pass."""
SMALL = {
    "squad_du": 44,
    "squadshifts_wiki": 44,
    "boolq_test": 64,
    "selqa": 32,
    "medquad": 84,
    "techdocs_faq": 36,
    "stackexchange_small": 36,
    "covidqa_deepset": 20,
    "bioasq_6_8": 52,
    "tatqa_text": 4,
    "quotesum_dev": 4,
    "dstc9_faq": 12,
    "fever_eraser": 12,
}
"""The questions of each set in one small pass."""
IN_SENTENCES = "squad_du", "squadshifts_wiki"
"""Sets whose passages are also split into sentences."""
SHORT = 25
"""Characters; a shorter sentence is most often an abbreviation."""
TEACHERS = "minilm", "e5"
"""The bi-encoders: all-MiniLM-L6-v2 and multilingual-e5-small."""


def is_held_out(text: str) -> bool:
    """Say whether an article or a passage is one of the 3% that are never trained on."""
    return int(hashlib.md5(text.encode()).hexdigest(), 16) % 100 < 3


def cut(text: str, characters: int = 1500) -> str:
    """Cut a long passage at a space."""
    return text if len(text) <= characters else text[:characters].rsplit(" ", 1)[0]


def sentences(text: str) -> list[str]:
    """Split a text into sentences; a short one is joined with the next."""
    joined: list[str] = []
    for start, end in sentence_spans(text):
        if joined and len(joined[-1]) < SHORT:
            joined[-1] += " " + text[start:end]
        else:
            joined.append(text[start:end])
    return joined


@cache
def dataset(data: Path, name: str) -> BeirDataset:
    """Read a training set."""
    return load_beir(data / name)


@cache
def titled(data: Path, name: str) -> dict[str, tuple[str, str]]:
    """Read the title and the text of every passage of a set, by id."""
    file = next((data / name).glob("corpus.jsonl*"))
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return {record["_id"]: (record["title"], record["text"]) for record in records}


def all_texts(data: Path) -> tuple[list[str], list[str]]:
    """List every question and every passage or sentence that needs an embedding."""
    questions: dict[str, None] = {}
    passages: dict[str, None] = {}
    for name in SETS:
        texts = dataset(data, name)
        questions |= dict.fromkeys(texts.queries.values())
        passages |= dict.fromkeys(map(cut, texts.corpus.values()))
        if name in IN_SENTENCES:
            for title, text in titled(data, name).values():
                for sentence in sentences(text):
                    passages |= {sentence: None, f"{title}: {sentence}": None}
    return list(questions), list(passages)


class Embeddings(Protocol):
    """Vectors of length 1 by both bi-encoders."""

    def of(self, kind: Kind, texts: list[str]) -> Vectors:
        """Return (2, texts, 384) float32."""


class StoredEmbeddings:
    """The vectors of all texts, as `embed.py` wrote them."""

    def __init__(self, folder: Path) -> None:
        self._rows = {
            kind: {text: row for row, text in enumerate(json.loads((folder / f"{kind}.json").read_text("utf-8")))}
            for kind in ("questions", "passages")
        }
        self._vectors = {
            kind: [np.load(folder / f"{teacher}-{kind}.npy", mmap_mode="r") for teacher in TEACHERS]
            for kind in self._rows
        }

    def of(self, kind: Kind, texts: list[str]) -> Vectors:
        """Return (2, texts, 384) float32."""
        rows = [self._rows[kind][text] for text in texts]
        return np.stack([vectors[rows].astype(np.float32) for vectors in self._vectors[kind]])


def cosines(embeddings: Embeddings, questions: list[str], passages: list[str]) -> Vectors:
    """Return (2, questions, passages) float32."""
    return embeddings.of("questions", questions) @ embeddings.of("passages", passages).transpose(0, 2, 1)


def standardized_sum(cosines: Vectors) -> Vectors:
    """Add both teachers' cosines, standardized over a question's passages: (questions, passages)."""
    spread = cosines.std(-1, keepdims=True) + 1e-6
    total: Vectors = ((cosines - cosines.mean(-1, keepdims=True)) / spread).sum(0)
    return total

"""Ways to score the same pairs with the same weights: ours, and other libraries as their users call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.local.checkpoints.detection import read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from mistral_rerank.local.checkpoints.config import CheckpointConfig
    from mistral_rerank.reranker import Pair, Reranker


class Baseline(Protocol):
    """Something that scores pairs."""

    name: str

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Give the logits, in input order."""


class Ours:
    """A reranker of this library."""

    def __init__(self, reranker: Reranker, *, name: str = "mistral-rerank") -> None:
        self.name, self._reranker = name, reranker

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Baseline.score`."""
        return [score.logit for score in self._reranker.score_pairs(pairs)]


class SentenceTransformers:
    """`CrossEncoder.predict` of sentence-transformers: batches of 32 pairs, sorted by length, padded.

    Args:
        folder: a whole checkpoint, as `export` writes it.
        dtype: what to run in.
        name: of the baseline.

    Raises:
        MissingDependencyError: the extra `dense` is not installed.

    """

    def __init__(self, folder: Path, dtype: torch.dtype, *, name: str = "sentence-transformers") -> None:
        self.name = name
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise MissingDependencyError.of("dense", error) from error
        import torch

        self._split = _halves(read_config(folder))
        self._model: Any = CrossEncoder(
            str(folder),
            device="cpu",
            trust_remote_code=False,
            activation_fn=torch.nn.Identity(),
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        )

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Baseline.score`."""
        halves = [self._split(pair) for pair in pairs]
        found = self._model.predict(halves, batch_size=32, show_progress_bar=False, convert_to_tensor=True)
        logits: list[float] = found.float().tolist()
        return logits


class Transformers:
    """Batches of pairs in input order, padded: the loop of FlagEmbedding's and rerankers' model classes.

    Args:
        folder: a whole checkpoint, as `export` writes it.
        dtype: what to run in.
        rows: pairs of a batch.

    """

    name = "transformers, input order"

    def __init__(self, folder: Path, dtype: torch.dtype, *, rows: int = 16) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._rows = rows
        self._prompt = read_config(folder).prompt
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        ).eval()

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Baseline.score`."""
        import torch

        logits: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(pairs), self._rows):
                texts = [self._prompt.format(*pair).text for pair in pairs[start : start + self._rows]]
                batch = self._tokenizer(texts, padding=True, return_tensors="pt")
                logits += self._model(**batch, use_cache=False).logits.squeeze(-1).float().tolist()
        return logits


def _in_float32(folder: Path, _: torch.dtype) -> SentenceTransformers:
    import torch

    return SentenceTransformers(folder, torch.float32, name="sentence-transformers in float32")


BASELINES: dict[str, Callable[[Path, torch.dtype], Baseline]] = {
    "sentence-transformers": SentenceTransformers,
    "sentence-transformers-float32": _in_float32,
    "transformers": Transformers,
}


def open_baselines(names: Sequence[str], folder: Path, dtype: torch.dtype) -> list[Baseline]:
    """Load the named peers.

    Raises:
        SettingsError: a name is not known.

    """
    if unknown := sorted(set(names) - BASELINES.keys()):
        raise SettingsError(f"{', '.join(unknown)}: not known here; compare with {', '.join(BASELINES)}")
    return [BASELINES[name](folder, dtype) for name in names]


def _halves(config: CheckpointConfig) -> Callable[[Pair], tuple[str, str]]:
    """Cut a prompt's text in two, since a `CrossEncoder` takes nothing but pairs and puts their tokens in a row."""
    prompt = config.prompt

    def split(pair: Pair) -> tuple[str, str]:
        query, passage = pair
        text = prompt.format(query, passage)
        cut = text.passage_end if prompt.passage_first else text.passage_start
        return text.text[:cut], text.text[cut:]

    return split

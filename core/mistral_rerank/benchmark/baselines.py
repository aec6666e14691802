"""Implementations that score the same pairs with the same weights: ours, and other libraries as users call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.local.checkpoints.detection import read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.scores import Pair


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

    `folder` is a whole checkpoint, as `export` writes it.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, name: str = "sentence-transformers"
    ) -> None:
        self.name = name
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise MissingDependencyError.of("dense", error) from error
        import torch

        self._prompt = read_config(folder).prompt
        self._model: Any = CrossEncoder(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            activation_fn=torch.nn.Identity(),
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        )

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Baseline.score`."""
        halves = [self._halves(pair) for pair in pairs]
        predicted = self._model.predict(halves, batch_size=32, show_progress_bar=False, convert_to_tensor=True)
        logits: list[float] = predicted.float().tolist()
        return logits

    def _halves(self, pair: Pair) -> tuple[str, str]:
        """Cut the prompt in two, since a `CrossEncoder` concatenates the tokens of a pair without a template."""
        prompt = self._prompt.format(*pair)
        cut = prompt.passage_end if self._prompt.passage_first else prompt.passage_start
        return prompt.text[:cut], prompt.text[cut:]


class Transformers:
    """Padded batches of `rows` pairs in input order: the loop of FlagEmbedding's and rerankers' model classes.

    `folder` is a whole checkpoint, as `export` writes it.
    """

    name = "transformers, input order"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, *, rows: int = 16) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._rows, self._device = rows, device
        self._prompt = read_config(folder).prompt
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        self._model = model.to(device).eval()

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Baseline.score`."""
        import torch

        logits: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(pairs), self._rows):
                texts = [self._prompt.format(*pair).text for pair in pairs[start : start + self._rows]]
                batch = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._device)
                logits += self._model(**batch, use_cache=False).logits.squeeze(-1).float().tolist()
        return logits


def _float32_sentence_transformers(folder: Path, _: torch.dtype, device: torch.device) -> SentenceTransformers:
    import torch

    return SentenceTransformers(folder, torch.float32, device, name="sentence-transformers in float32")


BASELINES: dict[str, Callable[[Path, torch.dtype, torch.device], Baseline]] = {
    "sentence-transformers": SentenceTransformers,
    "sentence-transformers-float32": _float32_sentence_transformers,
    "transformers": Transformers,
}


def open_baselines(names: Sequence[str], folder: Path, dtype: torch.dtype, device: torch.device) -> list[Baseline]:
    """Load the named baselines.

    Raises:
        SettingsError: a name is not known.
        MissingDependencyError: the extra `dense` is not installed, for sentence-transformers.

    """
    if unknown := sorted(set(names) - BASELINES.keys()):
        raise SettingsError(f"{', '.join(unknown)}: not known here; compare with {', '.join(BASELINES)}")
    return [BASELINES[name](folder, dtype, device) for name in names]

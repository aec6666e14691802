"""Rerank retrieved passages with a Mistral-architecture cross-encoder.

from mistral_rerank import open_reranker

reranker = open_reranker("mini")
best = reranker.rank("Who wrote Faust?", passages, top_n=3)
"""

from typing import TYPE_CHECKING

from mistral_rerank._version import __version__
from mistral_rerank.errors import (
    CheckpointError,
    InputTooLongError,
    InvalidInputError,
    MissingDependencyError,
    RemoteError,
    RerankerClosedError,
    RerankError,
    ScoringError,
    SettingsError,
)
from mistral_rerank.pair_scorer import PairScorer
from mistral_rerank.reranker import PassageLimits, Reranker
from mistral_rerank.scores import Pair, RankedPassage, Score
from mistral_rerank.settings import RerankSettings, open_reranker

if TYPE_CHECKING:
    from mistral_rerank.local.reranker import LocalReranker
    from mistral_rerank.remote.reranker import RemoteReranker

__all__ = [
    "CheckpointError",
    "InputTooLongError",
    "InvalidInputError",
    "LocalReranker",
    "MissingDependencyError",
    "Pair",
    "PairScorer",
    "PassageLimits",
    "RankedPassage",
    "RemoteError",
    "RemoteReranker",
    "RerankError",
    "RerankSettings",
    "Reranker",
    "RerankerClosedError",
    "Score",
    "ScoringError",
    "SettingsError",
    "__version__",
    "open_reranker",
]


def __getattr__(name: str) -> object:
    """Load what needs torch or httpx on first use."""
    if name == "LocalReranker":
        from mistral_rerank.local.reranker import LocalReranker

        return LocalReranker
    if name == "RemoteReranker":
        from mistral_rerank.remote.reranker import RemoteReranker

        return RemoteReranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

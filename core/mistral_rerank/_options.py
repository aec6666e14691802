"""Names and values of options: suggestions for unknown names, and other libraries' types as plain values."""

from __future__ import annotations

import os
from difflib import get_close_matches
from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter, ValidationError

from mistral_rerank.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Collection

_BYTES = TypeAdapter(ByteSize)

PEER_NAMES = {
    "api_base": "base_url",
    "auth_token": "api_key",
    "batch_size": "batch_tokens",
    "cohere_api_key": "api_key",
    "context_size": "max_length",
    "endpoint": "base_url",
    "jina_api_key": "api_key",
    "k": "top_n",
    "max_batch_size": "max_passages",
    "max_retries": "retries",
    "max_tokens_per_doc": "max_length",
    "model_id": "model",
    "model_id_or_path": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "nvidia_api_key": "api_key",
    "nvidia_base_url": "base_url",
    "pinecone_api_key": "api_key",
    "rank_fields": "metadata_keys",
    "request_timeout": "timeout",
    "score_threshold": "min_score",
    "similarity_cutoff": "min_score",
    "similarity_top_k": "top_n",
    "threshold": "min_score",
    "top_k": "top_n",
    "torch_dtype": "dtype",
    "truncate": "overflow",
    "truncate_text": "overflow",
    "truncation": "overflow",
    "url": "base_url",
    "use_fp16": "dtype",
    "voyage_api_key": "api_key",
}
"""Options of NVIDIARerank, CohereRerank, VoyageAIRerank, SentenceTransformerRerank and others, with ours."""

RANKING_OPTIONS = ("top_n", "min_score", "max_gap", "deadline")
"""Arguments of `rank`, and options of an adapter."""


def suggest(name: str, known: Collection[str]) -> str:
    """Suggest one of `known`, as the end of a message; "" without a suggestion."""
    lower = name.lower()
    close = get_close_matches(lower, [*known, *RANKING_OPTIONS], n=1, cutoff=0.7)
    meant = PEER_NAMES.get(lower) or (close[0] if close else None)
    if meant in known:
        return f"; did you mean {meant}?"
    if meant in RANKING_OPTIONS:
        return f"; {meant} is an option of an adapter or an argument of rank()"
    return ""


def parse_bytes(size: str | int) -> int:
    """Return the bytes of a size such as "1GiB", "500MB" or 4096.

    Raises:
        SettingsError: it is none.

    """
    try:
        return int(_BYTES.validate_python(size))
    except ValidationError as error:
        raise SettingsError(
            f"the size {size!r} is not known; give bytes, or a number with a unit like '1GiB'"
        ) from error


def plain(value: object) -> object:
    """Convert a path to a string, a numpy scalar to a Python number, `torch.device` and `torch.dtype` to names.

    Any other value is returned unchanged. Neither numpy nor torch is imported.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in {"device", "dtype"}:
        return str(value).removeprefix("torch.")
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value

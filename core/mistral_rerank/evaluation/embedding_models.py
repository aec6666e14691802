"""Embedding models by name: the prefixes, pooling and normalization that their model cards ask for.

A model without a preset is used as its sentence-transformers folder says, or without prefixes at an endpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import SettingsError
from mistral_rerank.evaluation.encoders import EndpointEncoder, LocalEncoder, Preset

if TYPE_CHECKING:
    from mistral_rerank.evaluation.encoders import Encoder

NVIDIA_API = "https://integrate.api.nvidia.com/v1"
BGE = "Represent this sentence for searching relevant passages: "
QWEN = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


def _nim(name: str, model: str, base_url: str = NVIDIA_API) -> Preset:
    return Preset(name, model, pooling=None, base_url=base_url, input_type=True)


def _e5(name: str) -> Preset:
    return Preset(name, f"intfloat/{name}", "query: ", "passage: ")


DRAGON = "facebook/dragon-plus-{}-encoder"
PRESETS: tuple[Preset, ...] = (
    # the first stages of the rerank-qa-mistral-4b card, beside BM25
    _nim("nv-embed-qa", "NV-Embed-QA", "https://ai.api.nvidia.com/v1/retrieval/nvidia"),
    _nim("nv-embedqa-e5-v5", "nvidia/nv-embedqa-e5-v5"),
    _e5("e5-large-unsupervised"),
    _e5("e5-large"),
    Preset("dragon", DRAGON.format("query"), pooling="cls", normalize=False, passage_model=DRAGON.format("context")),
    Preset("bge-large-en", "BAAI/bge-large-en", BGE, pooling="cls"),
    Preset("gtr-t5-large", "sentence-transformers/gtr-t5-large"),
    Preset("contriever", "facebook/contriever", normalize=False),
    Preset("gte-large", "thenlper/gte-large"),
    # common models
    _nim("llama-nemotron-embed-1b-v2", "nvidia/llama-nemotron-embed-1b-v2"),
    *(Preset(name.lower(), f"sentence-transformers/{name}") for name in ("all-MiniLM-L6-v2", "all-mpnet-base-v2")),
    *(
        Preset(f"bge-{size}-en-v1.5", f"BAAI/bge-{size}-en-v1.5", BGE, pooling="cls")
        for size in ("small", "base", "large")
    ),
    Preset("bge-m3", "BAAI/bge-m3", pooling="cls"),
    *(_e5(name) for name in ("e5-small-v2", "e5-base-v2", "e5-large-v2", "multilingual-e5-large")),
    Preset("arctic-embed-l-v2.0", "Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", pooling="cls"),
    Preset("nomic-embed-text-v1.5", "nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
    Preset(
        "embeddinggemma-300m", "google/embeddinggemma-300m", "task: search result | query: ", "title: none | text: "
    ),
    *(
        Preset(f"qwen3-embedding-{size}", f"Qwen/Qwen3-Embedding-{size.upper()}", QWEN, pooling="lasttoken")
        for size in ("0.6b", "4b", "8b")
    ),
)


def find_preset(name: str) -> Preset | None:
    """Give the preset with that name or model id, in any case; None if there is none."""
    return next((preset for preset in PRESETS if name.lower() in (preset.name, preset.model.lower())), None)


def open_encoder(
    name: str, *, query_prefix: str | None = None, passage_prefix: str | None = None, device: str | None = None
) -> Encoder:
    """Open the embedding model of that name.

    Args:
        name: of a preset, a folder, a hub id, or `NAME@URL` for an embeddings endpoint.
        query_prefix: prepended to questions, instead of the preset's.
        passage_prefix: prepended to passages, likewise.
        device: of a model on this machine; None for the best available.

    Raises:
        SettingsError: there is none, or the URL is unusable.

    """
    if name.startswith(("http://", "https://")):
        raise SettingsError("name the model that the endpoint serves: dense:NAME@URL")
    model, _, url = name.rpartition("@") if "://" in name else (name, "", "")
    folder = Path(model).expanduser()
    preset = find_preset(model)
    prefixes: dict[str, Any] = {"query_prefix": query_prefix, "passage_prefix": passage_prefix}
    overrides = {field: prefix for field, prefix in prefixes.items() if prefix is not None}
    if preset is None and not url and not folder.is_dir() and "/" not in model:
        known = ", ".join(preset.name for preset in PRESETS)
        raise SettingsError(f"there is no embedding model {model!r}; give a folder, a hub id, or one of: {known}")
    if preset is None and url:
        preset = Preset(model, model, input_type=model.startswith("nvidia/"))
    elif preset is None and overrides:
        preset = Preset(model, model, pooling=None, normalize=False)
    if preset is not None:
        preset = replace(preset, **overrides)
        if base_url := url or preset.base_url:
            return EndpointEncoder(preset, base_url)
    if folder.is_dir():
        return LocalEncoder(preset, model=str(folder), device=device)
    return LocalEncoder(preset, model=model if preset is None else None, device=device)

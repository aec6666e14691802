"""Embedding models by name: the prefixes, pooling and normalization that their model cards ask for.

A model without a preset is used as its sentence-transformers folder says, or without prefixes at an endpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NVIDIA_API = "https://integrate.api.nvidia.com/v1"
BGE = "Represent this sentence for searching relevant passages: "
QWEN = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


@dataclass(frozen=True, slots=True)
class Preset:
    """How to use one embedding model for retrieval.

    Attributes:
        name: used in `dense:NAME`.
        model: a hub id, or the name at an endpoint.
        query_prefix: prepended to every question.
        passage_prefix: prepended to every passage.
        pooling: of the token states; None if the endpoint does it.
        normalize: whether embeddings are scaled to length 1, so that the dot product is the cosine.
        passage_model: the passage encoder, if it is another model.
        base_url: of the endpoint that serves it; None for a model on this machine.
        input_type: whether requests carry `input_type` (`query` or `passage`), as NVIDIA's endpoints require.

    """

    name: str
    model: str
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Literal["mean", "cls", "lasttoken"] | None = "mean"
    normalize: bool = True
    passage_model: str | None = None
    base_url: str | None = None
    input_type: bool = False


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
    Preset("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
    Preset("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
    *(Preset(name, f"BAAI/{name}", BGE, pooling="cls") for name in ("bge-small-en-v1.5", "bge-base-en-v1.5")),
    Preset("bge-large-en-v1.5", "BAAI/bge-large-en-v1.5", BGE, pooling="cls"),
    Preset("bge-m3", "BAAI/bge-m3", pooling="cls"),
    *(_e5(name) for name in ("e5-small-v2", "e5-base-v2", "e5-large-v2", "multilingual-e5-large")),
    Preset("gte-modernbert-base", "Alibaba-NLP/gte-modernbert-base", pooling="cls"),
    Preset("arctic-embed-l-v2.0", "Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", pooling="cls"),
    Preset("mxbai-embed-large-v1", "mixedbread-ai/mxbai-embed-large-v1", BGE, pooling="cls"),
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
    wanted = name.lower()
    return next((preset for preset in PRESETS if wanted in (preset.name, preset.model.lower())), None)

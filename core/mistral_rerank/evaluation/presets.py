"""Dense first stages by name: what each model wants before its texts, and how its vectors are made.

The prefixes are those of the model cards; MTEB's registry has the same. A model that is not here is used as its
folder says (sentence-transformers), or with bare texts (an endpoint).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NVIDIA_API = "https://integrate.api.nvidia.com/v1"
SEARCHING = "Represent this sentence for searching relevant passages: "
WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


@dataclass(frozen=True, slots=True)
class Preset:
    """How to use one embedding model for retrieval.

    Attributes:
        name: what `dense:NAME` calls it.
        model: a hub id, or the name at an endpoint.
        query_prefix: goes before every question.
        passage_prefix: goes before every passage.
        pooling: how the token states become one vector; None where the endpoint does it.
        normalize: whether vectors are scaled to length 1, so that their product is the cosine.
        passage_model: the encoder of passages, where it is another one.
        base_url: the endpoint that serves it; None for a model on this machine.
        input_type: whether the endpoint is told what a text is (`query` or `passage`), as NVIDIA's are.

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


PRESETS: tuple[Preset, ...] = (
    # the first stages of the rerank-qa-mistral-4b card, beside BM25
    _nim("nv-embed-qa", "NV-Embed-QA", "https://ai.api.nvidia.com/v1/retrieval/nvidia"),
    _nim("nv-embedqa-e5-v5", "nvidia/nv-embedqa-e5-v5"),
    _e5("e5-large-unsupervised"),
    _e5("e5-large"),
    Preset(
        "dragon",
        "facebook/dragon-plus-query-encoder",
        pooling="cls",
        normalize=False,
        passage_model="facebook/dragon-plus-context-encoder",
    ),
    Preset("bge-large-en", "BAAI/bge-large-en", SEARCHING, pooling="cls"),
    Preset("gtr-t5-large", "sentence-transformers/gtr-t5-large"),
    Preset("contriever", "facebook/contriever", normalize=False),
    Preset("contriever-msmarco", "facebook/contriever-msmarco", normalize=False),
    Preset("gte-large", "thenlper/gte-large"),
    # today's common ones
    _nim("llama-nemotron-embed-1b-v2", "nvidia/llama-nemotron-embed-1b-v2"),
    Preset("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
    Preset("all-minilm-l12-v2", "sentence-transformers/all-MiniLM-L12-v2"),
    Preset("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
    Preset(
        "multi-qa-mpnet-base-dot-v1",
        "sentence-transformers/multi-qa-mpnet-base-dot-v1",
        pooling="cls",
        normalize=False,
    ),
    *(
        Preset(f"bge-{size}-en-v1.5", f"BAAI/bge-{size}-en-v1.5", SEARCHING, pooling="cls")
        for size in ("small", "base", "large")
    ),
    Preset("bge-m3", "BAAI/bge-m3", pooling="cls"),
    *(_e5(f"e5-{size}-v2") for size in ("small", "base", "large")),
    *(_e5(f"multilingual-e5-{size}") for size in ("small", "base", "large")),
    *(Preset(f"gte-{size}", f"thenlper/gte-{size}") for size in ("small", "base")),
    Preset("gte-modernbert-base", "Alibaba-NLP/gte-modernbert-base", pooling="cls"),
    *(
        Preset(f"arctic-embed-{size}", f"Snowflake/snowflake-arctic-embed-{size}", SEARCHING, pooling="cls")
        for size in ("xs", "s", "m", "l", "m-v1.5")
    ),
    Preset("arctic-embed-l-v2.0", "Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", pooling="cls"),
    Preset("mxbai-embed-large-v1", "mixedbread-ai/mxbai-embed-large-v1", SEARCHING, pooling="cls"),
    Preset("nomic-embed-text-v1.5", "nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
    Preset("modernbert-embed-base", "nomic-ai/modernbert-embed-base", "search_query: ", "search_document: "),
    Preset("granite-embedding-english-r2", "ibm-granite/granite-embedding-english-r2", pooling="cls"),
    Preset(
        "embeddinggemma-300m", "google/embeddinggemma-300m", "task: search result | query: ", "title: none | text: "
    ),
    *(
        Preset(f"qwen3-embedding-{size}", f"Qwen/Qwen3-Embedding-{size.upper()}", WEB_SEARCH, pooling="lasttoken")
        for size in ("0.6b", "4b", "8b")
    ),
)


def find_preset(name: str) -> Preset | None:
    """Give the preset of that name, or of a model with that id; None where there is none."""
    wanted = name.lower()
    return next((preset for preset in PRESETS if wanted in (preset.name, preset.model.lower())), None)

"""Known rerankers that do not say in their own folders how they are read: prompt, head, pooling, limit.

A family is recognized by the name of the folder or of the hub's repository, together with the architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistral_rerank.local.checkpoints.config import Calibration, CheckpointConfig

if TYPE_CHECKING:
    from pathlib import Path

LORA = "LoRA"
"""Stands for the architecture of an adapter, whose base may be any."""

QWEN_CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
QWEN_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
QWEN3_TASK = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment "
    "(0 for not relevant, 1 for relevant).\nRelevance:"
)
MXBAI_START = QWEN_CHAT.format(system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
MXBAI_END = ("\n", "document: {passage}", "\n", MXBAI_TASK, QWEN_ANSWER)
GEMMA_TASK = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
CONTEXTUAL = (
    "Check whether a given document contains information helpful to answer the query.\n"
    "<Document> {passage}\n<Query> {query}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints that are read alike.

    Attributes:
        name: of the family.
        names: matches the names of its folders and repositories, in lower case.
        architectures: of its checkpoints, as in config.json; the one-label classifiers are conversions.
        config: how they are read.

    """

    name: str
    names: str
    architectures: tuple[str, ...]
    config: CheckpointConfig


def _chat(name: str, names: str, architecture: str, **settings: Any) -> Family:
    """Describe a language model with a chat template, and its conversion to a one-label classifier."""
    architectures = f"{architecture}ForCausalLM", f"{architecture}ForSequenceClassification"
    config = CheckpointConfig(add_special_tokens=False, append_eos=False, **settings)
    return Family(name, names, architectures, config)


def _mxbai(size: str, estimated_max: float) -> Family:
    return _chat(
        f"mxbai-rerank-{size}-v2",
        rf"mxbai-rerank-{size}-v2",
        "Qwen2",
        template=(MXBAI_START, "query: {query}", *MXBAI_END),
        instruction_template=(MXBAI_START, "instruction: {instruction}\nquery: {query}", *MXBAI_END),
        true_token="1",  # noqa: S106
        false_token="0",  # noqa: S106
        calibration=Calibration(bias=-estimated_max / 2),
    )


FAMILIES = (
    _chat(
        "Qwen3-Reranker",
        r"qwen3-reranker",
        "Qwen3",
        template=QWEN_CHAT.format(system=QWEN3_TASK)
        + "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}"
        + QWEN_ANSWER
        + "<think>\n\n</think>\n\n",
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        true_token="yes",  # noqa: S106
        false_token="no",  # noqa: S106
    ),
    _chat(
        "zerank",
        r"zerank-(1|1-small|2)\b",
        "Qwen3",
        template=QWEN_CHAT.format(system="{query}") + "{passage}" + QWEN_ANSWER,
        strip=True,
        true_token="Yes",  # noqa: S106
        max_length=32768,
        calibration=Calibration(scale=0.2),
    ),
    _mxbai("base", 9),
    _mxbai("large", 12),
    _chat(
        "ctxl-rerank-v2",
        r"ctxl-rerank-v2",
        "Qwen3",
        template=CONTEXTUAL + " ??",
        instruction_template=CONTEXTUAL + " {instruction} ??",
        true_token=0,
    ),
    _chat(
        "bge-reranker-v2-gemma",
        r"bge-reranker-v2-gemma",
        "Gemma",
        template=("<bos>", "A: {query}", "\n", "B: {passage}", "\n", "{instruction}"),
        instruction=GEMMA_TASK,
        true_token="Yes",  # noqa: S106
        max_length=1024,
    ),
    Family(
        "llama-nemotron-rerank",
        r"",
        ("LlamaBidirectionalForSequenceClassification",),
        CheckpointConfig(append_eos=False, attention="bidirectional", pooling="mean"),
    ),
    Family(
        "RankLLaMA, RankMistral",
        r"rank-?(llama|mistral)",
        (LORA,),
        CheckpointConfig(
            template=("<s>", "query: {query}", "<s>", "document: {passage}"),
            add_special_tokens=False,
            append_eos=False,
            max_length=4096,
        ),
    ),
)


NOT_READ = {
    r"bge-reranker-v2-minicpm-layerwise": "its layers have a head each, and its architecture is remote code, which is "
    "never run",
    r"bge-reranker-v2\.5-gemma2-lightweight": "it merges tokens between layers, in remote code, which is never run",
    r"nemotron.*rerank": "its prompt and pooling are in remote code, which is never run; rerank_config can say them",
}
"""Known rerankers that are refused, and why, by the names of their folders and repositories."""


def why_not_read(folder: Path) -> str | None:
    """Return why a known reranker is refused; None for other checkpoints."""
    return next((reason for names, reason in NOT_READ.items() if re.search(names, _name(folder))), None)


def find_family(folder: Path, architectures: Any) -> Family | None:
    """Return the family of a checkpoint's folder, or None.

    Args:
        folder: named by the user, or the snapshot of a hub's repository.
        architectures: as in config.json, or `[LORA]`.

    """
    name = _name(folder)
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    matches = (
        family
        for family in FAMILIES
        if architectures[0] in family.architectures and re.search(family.names, name) is not None
    )
    return next(matches, None)


def _name(folder: Path) -> str:
    """Return the name of a folder, or of the repository of a snapshot, in lower case."""
    folder = folder.resolve()
    return (folder.parent.parent if folder.parent.name == "snapshots" else folder).name.lower()

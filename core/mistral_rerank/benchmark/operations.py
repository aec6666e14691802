"""The operations of a forward's linear layers, counted from a checkpoint's shapes and the tokens that were computed."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mistral_rerank.local.checkpoints.loading import open_checkpoint
from mistral_rerank.reranker import Observer


class ComputedTokens(Observer):
    """Adds up the sequences and tokens that forwards compute."""

    def __init__(self) -> None:
        self.sequences = self.tokens = 0

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:  # noqa: ARG002 - the observer's form
        """See `Observer.ran_batch`."""
        self.sequences += sequences
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class Linears:
    """The linear layers of a checkpoint's backbone.

    Attributes:
        layer: (outputs, inputs) of those of a layer: queries, keys, values, and the others.
        layers: how many layers.
        ends: whether the last layer computes only keys and values for all tokens, as it does where the last one is
            pooled and the architecture is known.

    """

    layer: tuple[tuple[int, int], ...]
    layers: int
    ends: bool

    @classmethod
    def of(cls, model: str, base: str | None) -> Linears:
        """Read the shapes from a checkpoint's configuration; arguments as in `open_checkpoint`."""
        checkpoint = open_checkpoint(model, base=base)
        config = json.loads(((checkpoint.base or checkpoint.folder) / "config.json").read_text("utf-8"))
        width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        keys = head * config.get("num_key_value_heads", heads)
        attention = (head * heads, width), (keys, width), (keys, width), (width, head * heads)
        known = config["model_type"] in ("mistral", "llama") and not checkpoint.config.pooling_config.mean
        layers = checkpoint.layers or config["num_hidden_layers"]
        return cls((*attention, (inner, width), (inner, width), (width, inner)), layers, known)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of all."""
        return [*self.layer] * self.layers

    def operations(self, counted: ComputedTokens) -> int:
        """Count the multiplications and additions of some forwards."""
        whole = sum(2 * outputs * inputs for outputs, inputs in self.layer)
        if not self.ends:
            return counted.tokens * self.layers * whole
        seen = sum(2 * outputs * inputs for outputs, inputs in self.layer[1:3])
        last = counted.tokens * seen + counted.sequences * (whole - seen)
        return counted.tokens * (self.layers - 1) * whole + last

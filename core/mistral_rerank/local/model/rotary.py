"""Rotary embeddings whose frequencies depend on a sequence's length: dynamic NTK scaling and LongRoPE.

transformers takes that length from the largest position in a batch, and its dynamic NTK scaling also keeps the
frequencies of the longest sequence so far. So sequences are batched with others of the same frequencies alone
(`same_frequencies`), and every forward starts from its own length (`forget_lengths`). Other kinds of scaling are the
same at every length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


def same_frequencies(config: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Group sequences by their rotary frequencies.

    Args:
        config: of the backbone, as transformers reads it.
        lengths: tokens of each sequence.

    Returns:
        Positions in `lengths`, each in one list.

    """
    scalings = list(_by_length(config))
    if not scalings:
        return [list(range(len(lengths)))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, length in enumerate(lengths):
        # dynamic NTK scaling has frequencies for each length over the limit, LongRoPE one set for all of them
        key = tuple(0 if length <= limit else length if each else 1 for limit, each in scalings)
        groups.setdefault(key, []).append(position)
    return list(groups.values())


def forget_lengths(backbone: nn.Module) -> None:
    """Make dynamic NTK scaling go by the sequence at hand, whatever was read before it."""
    for module in backbone.modules():
        if any(map(_is_longest, vars(module))):
            module.register_forward_pre_hook(_forget)


def _forget(rotary: nn.Module, _arguments: object) -> None:
    for name in filter(_is_longest, list(vars(rotary))):
        setattr(rotary, name, 0)


def _is_longest(name: str) -> bool:
    return name.endswith("max_seq_len_cached")


def _by_length(config: Any) -> Iterator[tuple[int, bool]]:
    """Give the limit of each scaling that depends on the length, and whether each length over it differs."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for scaling in (parameters, *parameters.values()):  # some architectures have one for each kind of layer
        kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
        if kind == "dynamic":
            yield config.max_position_embeddings, True
        elif kind == "longrope":
            yield scaling["original_max_position_embeddings"], False

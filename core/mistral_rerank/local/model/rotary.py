"""Rotary embedding: applying it, and the frequencies that depend on a sequence's length.

Dynamic NTK scaling and LongRoPE change the frequencies of long sequences. transformers takes the length from the
largest position in a batch, and its dynamic NTK scaling remembers the longest sequence so far. So a batch holds
sequences with the same frequencies only (`same_frequencies`), and `forget_lengths` resets what is remembered before
every forward. Other kinds of scaling do not depend on the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

_LONGEST_SEEN = "max_seq_len_cached"
"""The end of the names of attributes in which transformers remembers the longest sequence."""


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (tokens, heads, width) by their positions; `cos` and `sin` are (tokens, 1, width)."""
    half = states.shape[-1] // 2
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def same_frequencies(config: Any, lengths: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """Group sequences by their rotary frequencies.

    Args:
        config: transformers' config of the backbone.
        lengths: tokens of each sequence.

    Returns:
        The positions in `lengths` of each group, under a key that is equal for equal frequencies.

    """
    scalings = list(_length_dependent_scalings(config))
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, length in enumerate(lengths):
        key = tuple([0 if length <= limit else length if each_differs else 1 for limit, each_differs in scalings])
        groups.setdefault(key, []).append(position)
    return groups


def depends_on_length(config: Any) -> bool:
    """Tell whether the frequencies depend on a sequence's length; `config` as in `same_frequencies`."""
    return any(_length_dependent_scalings(config))


def forget_lengths(backbone: nn.Module) -> None:
    """Make dynamic NTK scaling depend on the current sequence only, not on earlier ones."""
    for module in backbone.modules():
        if any(name.endswith(_LONGEST_SEEN) for name in vars(module)):
            module.register_forward_pre_hook(_reset_longest_seen)


def _reset_longest_seen(rotary: nn.Module, _arguments: object) -> None:
    for name in list(vars(rotary)):
        if name.endswith(_LONGEST_SEEN):
            setattr(rotary, name, 0)


def _length_dependent_scalings(config: Any) -> Iterator[tuple[int, bool]]:
    """Yield the length above which each scaling changes the frequencies.

    With it comes whether each length above has its own frequencies (dynamic NTK), or all share one set (LongRoPE).
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for scaling in (parameters, *parameters.values()):  # some architectures have one for each type of layer
        kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
        if kind == "dynamic":
            yield config.max_position_embeddings, True
        elif kind == "longrope":
            yield scaling["original_max_position_embeddings"], False

"""Keys and values that are kept between forwards, so that a long sequence can be computed in chunks.

A chunk attends to the kept keys and to its own, which is what one causal forward of the whole sequence computes.
Between two chunks other sequences can run. With a sliding window only the keys that later tokens reach are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_rerank.local.model.attention import attend

if TYPE_CHECKING:
    from mistral_rerank.local.model.cached_prefixes import CachedPrefix


class KeyValues:
    """Keys and values of the first tokens of one sequence, in every layer.

    Args:
        layers: the number of layers.
        window: the sliding window, in tokens, the token itself included; None for no window.
        cos: (1, length of the sequence, head width), of the rotary embedding: its frequencies depend on the length.
        sin: likewise.
        cached: keys and values of the first tokens, which do not run again.
        keeps_all: whether keys that no later token reaches are kept too.

    Attributes:
        tokens: the number of tokens that have run.

    """

    def __init__(
        self,
        layers: int,
        window: int | None,
        cos: Tensor,
        sin: Tensor,
        *,
        cached: CachedPrefix | None = None,
        keeps_all: bool = False,
    ) -> None:
        self.tokens = 0 if cached is None else cached.tokens
        self.window, self.layers, self._keeps_all = window, range(layers), keeps_all
        self._cos, self._sin = cos, sin
        self._kept: list[tuple[Tensor, Tensor]] = []
        if cached is not None:
            reached = slice(self.first_kept(self.tokens), None)
            self._kept = [
                (key[None, reached].transpose(1, 2), value[None, reached].transpose(1, 2))
                for key, value in zip(cached.keys, cached.values, strict=True)
            ]

    def first_kept(self, tokens: int) -> int:
        """Return the first of so many tokens whose keys are kept."""
        return 0 if self.window is None or self._keeps_all else max(0, tokens - self.window + 1)

    def copy_to(self, prefix: CachedPrefix) -> None:
        """Copy the keys and values of the first tokens, if all are kept."""
        for layer, (key, value) in enumerate(self._kept):
            for copied, states in ((prefix.keys, key), (prefix.values, value)):
                copied[layer] = states[0, :, : prefix.tokens].transpose(0, 1)

    def rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return `cos` and `sin` of the next tokens; those beyond the sequence, the padding, get zeros."""
        padding = max(0, self.tokens + tokens - self._cos.shape[1])
        rows = slice(self.tokens, self.tokens + tokens)
        cos, sin = (torch.nn.functional.pad(part[:, rows], (0, 0, 0, padding)) for part in (self._cos, self._sin))
        return cos, sin

    def join(self, layer: int, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the kept keys and values of a layer with those of the next tokens; keep the first `tokens` of these.

        Arguments and results are (1, key heads, tokens, width). Layers come in order.
        """
        padding = key.shape[2] - tokens
        if layer < len(self._kept):
            key, value = (torch.cat(parts, 2) for parts in zip(self._kept[layer], (key, value), strict=True))
        else:
            self._kept.append((key, value))
        stop = key.shape[2] - padding
        start = self.first_kept(stop)
        self._kept[layer] = (key, value)
        if start or padding:  # a slice would hold the memory of the whole
            self._kept[layer] = key[:, :, start:stop].clone(), value[:, :, start:stop].clone()
        return key, value


class ChunkAttention:
    """Attention of the next tokens of a sequence, a `RowAttention` whose layers are called in order.

    Args:
        kept: keys and values of the tokens before; those of this chunk are added.
        tokens: of the chunk, padding included.
        last: (1,) int64, index of the chunk's last real token.

    """

    def __init__(self, kept: KeyValues, tokens: int, last: Tensor) -> None:
        self._kept, self._layers = kept, iter(kept.layers)
        self._last, self._tokens = last, int(last) + 1
        keys = torch.arange(kept.first_kept(kept.tokens), kept.tokens + tokens, device=last.device)
        queries = keys[-tokens:, None]
        self._mask = keys <= queries
        if kept.window is not None:
            self._mask &= keys > queries - kept.window

    def all_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `RowAttention.all_tokens`."""
        return self._attend(query, key, value, self._mask, scaling)

    def last_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `RowAttention.last_tokens`."""
        return self._attend(query, key, value, self._mask[self._last], scaling)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
        key, value = self._kept.join(next(self._layers), key, value, self._tokens)
        return attend(query, key, value, mask, scaling)[0].transpose(0, 1)

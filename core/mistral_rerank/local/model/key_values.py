"""Keys and values that are kept between forwards, so that a long sequence can be computed in chunks.

A chunk attends to the kept keys and to its own, which is what one causal forward of the whole sequence computes.
Between two chunks other sequences can run. With a sliding window only the keys that later tokens reach are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_rerank.local.model.attention import attend


class KeyValues:
    """Keys and values of the first tokens of one sequence, in every layer.

    Args:
        layers: the number of layers.
        window: the sliding window, in tokens, the token itself included; None for no window.
        cos: (1, length of the sequence, head width), of the rotary embedding: its frequencies depend on the length.
        sin: likewise.

    Attributes:
        tokens: the number of tokens that have run.

    """

    def __init__(self, layers: int, window: int | None, cos: Tensor, sin: Tensor) -> None:
        self.tokens = 0
        self.window, self.layers = window, range(layers)
        self._cos, self._sin = cos, sin
        self._kept: list[tuple[Tensor, Tensor]] = []

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
        start = 0 if self.window is None else max(0, stop - self.window + 1)
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
        first = 0 if kept.window is None else max(0, kept.tokens - kept.window + 1)
        keys = torch.arange(first, kept.tokens + tokens, device=last.device)
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

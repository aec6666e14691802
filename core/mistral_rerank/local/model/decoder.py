"""The parameters of a Mistral decoder, under the names that transformers gives them.

`PackedBackbone` has a forward of its own and needs of a model its parameters, its rotary embedding and its config.
With these modules nothing of transformers is imported, which takes longer than the import of PyTorch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from typing_extensions import TypedDict

from mistral_rerank.local.checkpoints.trust import COUNT_LIMIT

Count = Annotated[int, Field(ge=1, le=COUNT_LIMIT)]
Size = Annotated[int, Field(ge=1, le=2**40)]


class RopeParameters(TypedDict):
    """The rotary embedding, without scaling."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    rope_theta: Annotated[float, Field(gt=0, le=2**40)]
    rope_type: Literal["default"]


class DecoderConfig(BaseModel):
    """The keys of config.json that matter to inference. No key has a default: those of transformers may change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_type: Literal["mistral"]
    dtype: Literal["float32", "bfloat16", "float16"]
    hidden_act: Literal["silu"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    head_dim: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    max_position_embeddings: Size
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)]
    rope_parameters: RopeParameters
    sliding_window: Size | None


class Decoder(nn.Module):
    """A Mistral decoder, to be taken apart by `PackedBackbone`; it has no forward."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _Norm(config)
        self.rotary_emb = RotaryEmbedding(config)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions, without scaling."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._theta, self._width = config.rope_parameters["rope_theta"], config.head_dim

    def forward(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (1, tokens, width) of positions (1, tokens), in the dtype of the states."""
        exponents = torch.arange(0, self._width, 2, dtype=torch.int64, device=positions.device).float() / self._width
        angles = positions[:, :, None].float() * (1.0 / self._theta**exponents)
        both_halves = torch.cat((angles, angles), dim=-1)
        return both_halves.cos().to(states.dtype), both_halves.sin().to(states.dtype)


class _Linear(nn.Module):
    """A linear's weight without an initial value: `nn.Linear` would load PyTorch's compiler for that on "meta"."""

    bias = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))


class _Norm(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.variance_epsilon = config.rms_norm_eps


class _Attention(nn.Module):
    is_causal = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        queries, keys = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = _Linear(config.hidden_size, queries)
        self.k_proj = _Linear(config.hidden_size, keys)
        self.v_proj = _Linear(config.hidden_size, keys)
        self.o_proj = _Linear(queries, config.hidden_size)


class _MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = _Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = _Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = nn.SiLU()


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(config), _MLP(config)
        self.input_layernorm, self.post_attention_layernorm = _Norm(config), _Norm(config)

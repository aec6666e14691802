"""The lower layers of a Mistral with LoRA on all linear layers and a head, for rows of a passage and its questions."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SCALING = 2.0
"""LoRA alpha over the rank, as in mini."""


class Model(torch.nn.Module):
    """A reranker that is trained: `merge` once for each step, then `forward` for each micro-batch.

    Args:
        base: a transformers folder of a Mistral.
        layers: how many of its layers are used.
        rank: of LoRA.
        init: an adapter to start from, of the same or a smaller rank; None starts at the base.
        device: where to compute.
        dtype: of the matrix products; the LoRA matrices are float32.

    """

    def __init__(
        self, base: Path, layers: int, rank: int, init: Path | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        config = json.loads((base / "config.json").read_text("utf-8"))
        self._heads, self._key_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._width, self._eps = config["head_dim"], config["rms_norm_eps"]
        self._layers, self._dtype = layers, dtype
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(base.glob("*.safetensors")):
            tensors |= load_file(file)
        self._weights = {name: tensor.to(device) for name, tensor in tensors.items() if _layer_of(name) < layers}
        start = load_file(init / "adapter_model.safetensors") if init else {}
        torch.manual_seed(0)
        self.adapters = torch.nn.ParameterDict()
        for layer in range(layers):
            for linear in LINEARS:
                name = f"layers.{layer}.{linear}"
                self._add_adapter(name, rank, start, device)
        head = start.get("base_model.model.score.weight", torch.zeros(1, config["hidden_size"]))
        self.head = torch.nn.Parameter(head.float().to(device))
        theta, width = config["rope_parameters"]["rope_theta"], self._width
        self._frequencies = theta ** -(torch.arange(0, width, 2, device=device).float() / width)
        self._merged: dict[str, torch.Tensor] = {}

    def _add_adapter(self, name: str, rank: int, start: dict[str, torch.Tensor], device: torch.device) -> None:
        """Add the LoRA matrices of a linear layer; those to start from fill the first rows of the rank."""
        rows, columns = self._weights[f"model.{name}.weight"].shape
        down, up = torch.empty(rank, columns), torch.zeros(rows, rank)
        torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        key = f"base_model.model.model.{name}.lora_"
        if f"{key}A.weight" in start:
            known = start[f"{key}A.weight"].shape[0]
            down[:known] = start[f"{key}A.weight"].float()
            up[:, :known] = start[f"{key}B.weight"].float()
        self.adapters[name.replace(".", "/") + "/A"] = torch.nn.Parameter(down.to(device))
        self.adapters[name.replace(".", "/") + "/B"] = torch.nn.Parameter(up.to(device))

    def merge(self) -> None:
        """Add the LoRA updates to the weights for the next forwards; gradients pass through."""
        for layer in range(self._layers):
            for linear in LINEARS:
                name = f"layers.{layer}.{linear}"
                key = name.replace(".", "/")
                update = self.adapters[key + "/B"] @ self.adapters[key + "/A"]
                weight = self._weights[f"model.{name}.weight"].float()
                self._merged[name] = torch.add(weight, update, alpha=SCALING).to(self._dtype)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of a micro-batch's questions, float32; the arguments are `rows.Rows`."""
        rows, length = ids.shape
        order = torch.arange(length, device=ids.device)
        seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = (seen & (order[None, :] <= order[:, None]))[:, None]
        angles = positions[..., None].float() * self._frequencies
        cosine = torch.cat([angles.cos()] * 2, -1)[:, None].to(self._dtype)
        sine = torch.cat([angles.sin()] * 2, -1)[:, None].to(self._dtype)
        hidden = functional.embedding(ids, self._weights["model.embed_tokens.weight"]).to(self._dtype)
        for layer in range(self._layers):
            name = f"layers.{layer}."
            normed = self._norm(hidden, name + "input_layernorm")
            query, key, value = (
                self._linear(normed, f"{name}self_attn.{part}_proj").view(rows, length, -1, self._width).transpose(1, 2)
                for part in "qkv"
            )
            query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
            key, value = (states.repeat_interleave(self._heads // self._key_heads, 1) for states in (key, value))
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
            hidden = hidden + self._linear(mixed, name + "self_attn.o_proj")
            normed = self._norm(hidden, name + "post_attention_layernorm")
            gate, up = (self._linear(normed, f"{name}mlp.{part}_proj") for part in ("gate", "up"))
            hidden = hidden + self._linear(functional.silu(gate) * up, name + "mlp.down_proj")
        pooled = self._norm(hidden.view(rows * length, -1)[last], "norm")
        return functional.linear(pooled.float(), self.head)[:, 0]

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(hidden, self._merged[name])

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._weights[f"model.{name}.weight"].to(self._dtype)
        return functional.rms_norm(hidden, (hidden.shape[-1],), weight, self._eps)

    def save(self, folder: Path) -> None:
        """Write the adapter with PEFT's names in bfloat16, in two files: the lower and the upper half of the layers."""
        tensors = {}
        for key, weight in self.adapters.items():
            name, part = key.replace("/", ".").rsplit(".", 1)
            tensors[f"base_model.model.model.{name}.lora_{part}.weight"] = weight.detach().bfloat16().contiguous().cpu()
        tensors["base_model.model.score.weight"] = self.head.detach().float().contiguous().cpu()
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            half = {name: tensor for name, tensor in tensors.items() if _is_upper(name, self._layers) == bool(number)}
            file = folder / f"adapter-{number}.safetensors"
            save_file(half, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)


def _is_upper(name: str, layers: int) -> bool:
    return _layer_of(name) >= layers // 2


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return states * cosine + torch.cat([-second, first], -1) * sine

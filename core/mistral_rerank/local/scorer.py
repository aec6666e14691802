"""A loaded checkpoint: tokenizer, model and calibration, which the engine scores with; and adapters on its weights."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.checkpoints.adapters import load_shared, open_adapters
from mistral_rerank.local.checkpoints.loading import length_limit, load_model, load_tokenizer, open_checkpoint
from mistral_rerank.local.checkpoints.plain import read_plain_model, read_plain_tokenizer
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.early_exit import read_early_exit, read_early_exit_config
from mistral_rerank.local.model.rerank_model import RerankModel, runs_packed
from mistral_rerank.scores import Score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from mistral_rerank.local.checkpoints.loading import Checkpoint
    from mistral_rerank.local.checkpoints.plain import PlainTokenizer
    from mistral_rerank.local.model.decoder import DecoderConfig
    from mistral_rerank.reranker import Overflow, Quantization

logger = logging.getLogger(__name__)


class CheckpointScorer:
    """A checkpoint on loaded weights; the engine's `Scorer`.

    Attributes:
        tokenizer: of pairs.
        model: backbone and head.
        layers: the number of the model's layers.
        state_bytes: bytes of a partial hidden state, for one token.
        score: makes a score of a logit and `tokens`, with the checkpoint's calibration.
        estimates: `RerankModel.estimates` with the checkpoint's early exit, if that was loaded.
        adapters: scorers of adapters on the same weights.

    Args:
        checkpoint: says how pairs are read and scored.
        tokenizer: its tokenizer.
        model: backbone and head.
        model_config: of the backbone.
        device: of the model.
        max_length: as in `LocalReranker`, like `overflow`.
        overflow: as there.
        early_exit: whether to load the early exit.

    Raises:
        CheckpointError: the tokenizer or the early exit is not usable.

    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase | PlainTokenizer,
        model: RerankModel,
        model_config: PreTrainedConfig | DecoderConfig,
        *,
        device: torch.device,
        max_length: int | None,
        overflow: Overflow,
        early_exit: bool,
    ) -> None:
        config, limit = checkpoint.config, length_limit(checkpoint, model_config)
        self.adapters: dict[str, CheckpointScorer] = {}
        self.layers: int = model_config.num_hidden_layers
        self.tokenizer = PairTokenizer(
            tokenizer,
            config.prompt,
            add_special_tokens=config.add_special_tokens,
            append_eos=config.append_eos,
            max_length=min(limit, max_length or limit),
            overflow=overflow,
        )
        self.model = model
        self.state_bytes: int = model_config.hidden_size * torch.float32.itemsize
        calibration = config.calibration
        self.score = functools.partial(Score.from_logit, scale=calibration.scale, bias=calibration.bias)
        exit_config = read_early_exit_config(checkpoint.folder) if early_exit else None
        if exit_config is not None:
            if exit_config.layer >= self.layers:
                raise CheckpointError(
                    f"{checkpoint.folder} has {self.layers} layers, and its early exit is after {exit_config.layer}"
                )
            weights = read_early_exit(checkpoint.folder, model_config.hidden_size).to(device)
            self.estimates = functools.partial(self.model.estimates, weights, exit_config.layer)


class LoadedCheckpoint(CheckpointScorer):
    """A checkpoint with its weights, and adapters that share them.

    Arguments are those of `LocalReranker`; `early_exit` loads the early exit, for `estimates`, and `resumable` makes
    `RerankModel.states` possible, which `early_exit` includes.

    Raises:
        CheckpointError: a checkpoint cannot be found, downloaded or read, has no early exit, or cannot share the base.

    """

    def __init__(
        self,
        model: str,
        *,
        base: str | None = None,
        adapters: Mapping[str, str] | None = None,
        rerank_config: str | None = None,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None,
        max_length: int | None,
        overflow: Overflow,
        early_exit: bool = False,
        resumable: bool = False,
        further_devices: Sequence[torch.device] = (),
    ) -> None:
        checkpoint = open_checkpoint(model, base=base, rerank_config=rerank_config)
        opened = open_adapters(checkpoint, adapters or {}, base=base)
        for name, each in {model: checkpoint, **opened}.items():
            if early_exit and read_early_exit_config(each.folder) is None:
                raise CheckpointError(
                    f"{name} has no early exit, which a cascade needs; fit one with `mistral-rerank early-exit`, "
                    "or leave cascade_depth out"
                )
        shared = load_shared(checkpoint, opened, dtype=dtype) if opened else None
        plain = None if shared or device.type != "cpu" else read_plain_model(checkpoint, dtype)
        if plain is not None and not runs_packed(plain.base_model, device):
            plain = None  # transformers' forward is needed
        loaded: Any = shared.model if shared else plain or load_model(checkpoint, dtype=dtype)
        head = shared.heads[None] if shared else getattr(loaded, "score", None)
        tokenizer = read_plain_tokenizer(checkpoint) or load_tokenizer(checkpoint)
        rerank_model = RerankModel(
            loaded if head is None else loaded.base_model,
            head,
            device,
            pooling=checkpoint.config.pooling_config,
            separator=tokenizer.sep_token_id if "token_type_ids" in tokenizer.model_input_names else None,
            quantization=quantization,
            resumable=early_exit or resumable,
            active=shared.active if shared else None,
            further_devices=further_devices,
        )
        options: dict[str, Any] = {
            "device": device,
            "max_length": max_length,
            "overflow": overflow,
            "early_exit": early_exit,
        }
        super().__init__(checkpoint, tokenizer, rerank_model, loaded.config, **options)
        if shared is not None:
            for name, adapter in opened.items():
                view = rerank_model.with_adapter(name, shared.heads[name], adapter.config.pooling_config)
                tokenizer = read_plain_tokenizer(adapter) or load_tokenizer(adapter)
                self.adapters[name] = CheckpointScorer(adapter, tokenizer, view, loaded.config, **options)
        logger.info("loaded %s on %s in %s", model, device, quantization or dtype)

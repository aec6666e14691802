"""The local reranker: from settings to a checkpoint, and to an engine that scores with it."""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from mistral_rerank._deadline import result_within
from mistral_rerank._options import plain
from mistral_rerank.errors import CheckpointError, MissingDependencyError, SettingsError
from mistral_rerank.local.engine.engine import Engine
from mistral_rerank.local.engine.score_cache import Lookup, ScoreCache
from mistral_rerank.reranker import (
    Observer,
    Overflow,
    Pair,
    PassageLimits,
    Quantization,
    Reranker,
    Score,
    TextPairs,
)

try:
    import torch

    from mistral_rerank.local.checkpoints.loading import MINI, length_limit, load_model, load_tokenizer, open_checkpoint
    from mistral_rerank.local.device import pick_device, pick_dtype
    from mistral_rerank.local.engine.cascade import Cascade
    from mistral_rerank.local.engine.tokenizer import Cut, PairTokenizer
    from mistral_rerank.local.model.early_exit import read_early_exit, read_early_exit_config
    from mistral_rerank.local.model.quantization import check_quantization
    from mistral_rerank.local.model.rerank_model import RerankModel
except ImportError as error:
    raise MissingDependencyError.of("local", error) from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future
    from os import PathLike

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 16384}
"""The default of `batch_tokens` for each type of device. On a CPU it is also the length of a turn: about
two seconds of mini on one core."""


class LocalReranker(Reranker):
    """Scores pairs with a model on this machine.

    Nothing is loaded or downloaded until the first pair is scored, or `warmup` is called. A pickle holds the settings
    only.

    Args:
        model: "mini", a checkpoint folder or a hub id, which may end in @REVISION.
        base: the base under an adapter: a folder or a hub id. It is required if the adapter was trained on a folder,
            because a checkpoint may not name one; otherwise it replaces the base that the adapter names.
        rerank_config: how to read a checkpoint that does not say: the name of a known family, or a file like
            `rerank.json`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "float32", "bfloat16" or "float16"; "auto" is bfloat16 where the hardware multiplies it.
        quantization: of the linears: "int8" for weights and activations in 8 bits, faster on a CPU with VNNI
            instructions; "nf4" for weights in 4 bits, for less memory (extra `nf4`). Both change the scores a little.
            None for no quantization.
        max_length: the most tokens of a pair; None for the checkpoint's limit.
        overflow: a passage over the limit is truncated ("truncate"), scored in chunks of which the best counts
            ("chunk"), or rejected ("error"). The question is never truncated.
        instruction: what counts as relevant, for a model that takes an instruction; None for the checkpoint's own.
        batch_tokens: the most tokens that a batch computes, padding included; None for the device's default.
        share_batches: whether concurrent calls may share batches; None: on accelerators only, because on a CPU
            it gains little and costs bitwise reproducible scores.
        cascade_depth: the number of passages of a question that reach the cascade's second pass: the best of a call by
            the estimates of the first pass, which runs the lower layers only. The others rank below, with estimated
            scores. None for no cascade.
        cache_size: the number of pairs whose scores are cached; 0 for no cache.

    Raises:
        SettingsError: the device is not available, the dtype is unknown, or the quantization does not work here.
        MissingDependencyError: the extra of the quantization is not installed.

    """

    def __init__(
        self,
        model: str | PathLike[str] = MINI,
        *,
        base: str | PathLike[str] | None = None,
        rerank_config: str | PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: Quantization | None = None,
        max_length: int | None = None,
        overflow: Overflow = "truncate",
        instruction: str | None = None,
        batch_tokens: int | None = None,
        share_batches: bool | None = None,
        cascade_depth: int | None = None,
        cache_size: int = 0,
    ) -> None:
        model, device, dtype = str(plain(model)), str(plain(device)), str(plain(dtype))
        base = None if base is None else str(plain(base))
        rerank_config = None if rerank_config is None else str(plain(rerank_config))
        self._model_name = model
        self._options = {
            "base": base,
            "rerank_config": rerank_config,
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "max_length": max_length,
            "overflow": overflow,
            "instruction": instruction,
            "batch_tokens": batch_tokens,
            "share_batches": share_batches,
            "cascade_depth": cascade_depth,
            "cache_size": cache_size,
        }
        if cascade_depth is not None and cascade_depth < 1:
            raise SettingsError(f"cascade_depth is {cascade_depth}; give at least 1, or leave it out")
        self._base, self.max_length = base, max_length
        self._cascade_depth, self._instruction = cascade_depth, instruction
        self._cache = ScoreCache(cache_size) if cache_size else None
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        check_quantization(quantization, self.device, self.dtype)
        self._engine = Engine(
            functools.partial(
                LoadedCheckpoint,
                model,
                base=base,
                rerank_config=rerank_config,
                device=self.device,
                dtype=self.dtype,
                quantization=quantization,
                max_length=max_length,
                overflow=overflow,
                early_exit=cascade_depth is not None,
            ),
            batch_tokens=batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"]),
            share_batches=self.device.type != "cpu" if share_batches is None else share_batches,
            in_child=None
            if self.device.type == "cpu"
            else SettingsError(
                f"a model on {str(self.device)!r} cannot be used in a forked process; start workers with 'spawn' "
                "instead of 'fork', or open the reranker after the fork and use no such device before it"
            ),
        )
        weakref.finalize(self, self._engine.close)  # garbage collection frees threads and weights

    def __reduce__(self) -> tuple[functools.partial[LocalReranker], tuple[str]]:
        """Pickle the settings, not the weights."""
        return functools.partial(LocalReranker, **self._options), (self._model_name,)  # type: ignore[arg-type]

    @property
    def model_name(self) -> str:
        """The name of the model, as the user gave it."""
        return self._model_name

    def score_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
    ) -> list[Score]:
        """See `Reranker.score_pairs`."""
        return self._score_within(None, pairs, overflow=overflow, instruction=instruction, limits=limits)

    @override
    def _score_within(self, seconds: float | None, pairs: Sequence[Pair], **options: Any) -> list[Score]:
        call, future = self._submit(pairs, **options)
        return call.complete([] if future is None else result_within(seconds, future))

    async def ascore_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
    ) -> list[Score]:
        """See `Reranker.ascore_pairs`."""
        call, future = self._submit(pairs, overflow, instruction, limits)
        scores: list[Score] = [] if future is None else await asyncio.wrap_future(future)
        return call.complete(scores)

    def _submit(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
    ) -> tuple[TextPairs, Future[list[Score]] | None]:
        """Submit what the engine has to score; no future if that is nothing."""
        choice: _Call | None = None
        if self._cascade_depth is None and self._cache is None:
            call = TextPairs(pairs)
        else:
            call = limited = _Call(pairs, f"{overflow}/{instruction}/{limits}", self._cascade_depth, self._cache)
            choice = limited if limited.over_depth else None
        if not call.pairs:
            return call, None
        instruction = instruction or self._instruction
        cut = overflow if limits is None else Cut(overflow, limits.tokens, limits.chunks)
        return call, self._engine.submit(call.pairs, cut, instruction=instruction, choice=choice)

    def weights_checksum(self) -> str:
        """See `Reranker.weights_checksum`; it reads all weights."""
        return open_checkpoint(self._model_name, base=self._base).weights_checksum()

    def observe(self, observer: Observer) -> None:
        """See `Reranker.observe`."""
        self._engine.observer = observer

    def warmup(self) -> None:
        """Load the model and score a short pair, so that the first real call does not wait."""
        self.score_pairs([("warm", "up")])

    def close(self) -> None:
        """Free the model; calls that are still waiting fail with RerankerClosedError."""
        super().close()
        self._engine.close()
        self._clear_cache()

    async def aclose(self) -> None:
        """`close` without blocking the event loop while a batch or the load of the model ends."""
        super().close()
        await asyncio.wrap_future(self._engine.stop())
        self._clear_cache()

    def _clear_cache(self) -> None:
        if self._cache is not None:
            self._cache.clear()


class _Call(TextPairs):
    """A call with a cascade or a cache, which leave fewer pairs to the engine.

    Attributes:
        pairs: for the engine.
        over_depth: the pairs that the cascade's first pass estimates; empty without a cascade.

    """

    def __init__(
        self, pairs: Iterable[Pair], options: str, cascade_depth: int | None, cache: ScoreCache | None
    ) -> None:
        super().__init__(pairs)
        self._options, self._cache = options, cache
        self._cascade = None if cascade_depth is None else Cascade(self.pairs, cascade_depth)
        self._lookup: Lookup | None = None
        self.over_depth: Sequence[Pair] = () if self._cascade is None else self._cascade.over_depth
        if not self.over_depth:
            self.pairs = self.choose(())

    def choose(self, estimates: Sequence[Score]) -> Sequence[Pair]:
        """Choose the pairs to score from the estimates of the cascade's first pass, without those in the cache."""
        chosen = self.pairs if self._cascade is None else self._cascade.choose(estimates)
        if self._cache is None:
            return chosen
        self._lookup = self._cache.look_up(chosen, self._options)
        return self._lookup.missing

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Return the scores of all pairs, from those of the engine."""
        if self._lookup is not None:
            scores = self._lookup.complete(scores)
        if self._cascade is not None:
            scores = self._cascade.complete(scores)
        return super().complete(scores)


class LoadedCheckpoint:
    """A checkpoint's tokenizer, model and calibration; the engine's `Scorer`.

    Arguments are those of `LocalReranker`; `early_exit` loads the early exit, for `estimates`, and `resumable` makes
    `RerankModel.states` possible, which `early_exit` includes.

    Attributes:
        tokenizer: of pairs.
        model: backbone and head.
        layers: the number of the model's layers.
        state_bytes: bytes of a partial hidden state, for one token.
        score: makes a score of a logit and `tokens`, with the checkpoint's calibration.
        estimates: `RerankModel.estimates` with the checkpoint's early exit, if that was loaded.

    Raises:
        CheckpointError: the checkpoint cannot be found, downloaded or read, or has no early exit.

    """

    def __init__(
        self,
        model: str,
        *,
        base: str | None = None,
        rerank_config: str | None = None,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None,
        max_length: int | None,
        overflow: Overflow,
        early_exit: bool = False,
        resumable: bool = False,
    ) -> None:
        checkpoint = open_checkpoint(model, base=base, rerank_config=rerank_config)
        config = checkpoint.config
        exit_config = read_early_exit_config(checkpoint.folder) if early_exit else None
        if early_exit and exit_config is None:
            raise CheckpointError(
                f"{model} has no early exit, which a cascade needs; fit one with `mistral-rerank early-exit`, "
                "or leave cascade_depth out"
            )
        loaded = load_model(checkpoint, dtype=dtype)
        self.layers: int = loaded.config.num_hidden_layers
        limit = length_limit(checkpoint, loaded.config)
        tokenizer = load_tokenizer(checkpoint)
        self.tokenizer = PairTokenizer(
            tokenizer,
            config.prompt,
            add_special_tokens=config.add_special_tokens,
            append_eos=config.append_eos,
            max_length=min(limit, max_length or limit),
            overflow=overflow,
        )
        head = getattr(loaded, "score", None)
        self.model = RerankModel(
            loaded if head is None else loaded.base_model,
            head,
            device,
            pooling=config.pooling_config,
            separator=tokenizer.sep_token_id if "token_type_ids" in tokenizer.model_input_names else None,
            quantization=quantization,
            resumable=early_exit or resumable,
        )
        self.state_bytes: int = loaded.config.hidden_size * torch.float32.itemsize
        calibration = config.calibration
        self.score = functools.partial(Score.from_logit, scale=calibration.scale, bias=calibration.bias)
        if exit_config is not None:
            if exit_config.layer >= self.layers:
                raise CheckpointError(
                    f"{model} has {self.layers} layers, and its early exit is after {exit_config.layer}"
                )
            weights = read_early_exit(checkpoint.folder, loaded.config.hidden_size).to(device)
            self.estimates = functools.partial(self.model.estimates, weights, exit_config.layer)
        logger.info("loaded %s on %s in %s", model, device, quantization or dtype)

"""The local reranker: from settings to a checkpoint, and to an engine that scores with it."""

from __future__ import annotations

import asyncio
import functools
import weakref
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from mistral_rerank._deadline import result_within
from mistral_rerank._options import parse_bytes, plain
from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.inputs import TextPairs, check_adapter
from mistral_rerank.local.engine.engine import Engine
from mistral_rerank.local.engine.prefix_cache import PrefixCache
from mistral_rerank.local.engine.score_cache import Lookup, ScoreCache
from mistral_rerank.reranker import Observer, Overflow, PassageCacheInfo, PassageLimits, Quantization, Reranker

try:
    from mistral_rerank.local.checkpoints.loading import MINI, open_checkpoint
    from mistral_rerank.local.device import pick_devices, pick_dtype
    from mistral_rerank.local.engine.cascade import Cascade
    from mistral_rerank.local.engine.tokenizer import Cut
    from mistral_rerank.local.model.quantization import check_quantization
    from mistral_rerank.local.prepared import manifest, read_prepared, write_prepared
    from mistral_rerank.local.scorer import LoadedCheckpoint
except ImportError as error:
    raise MissingDependencyError.of("local", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from os import PathLike

    import torch

    from mistral_rerank.local.checkpoints.loading import Checkpoint
    from mistral_rerank.scores import Pair, Score

PASSAGES_AT_ONCE = 16
"""Passages that are prepared in one call."""

BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 16384}
"""The default of `batch_tokens` for each type of device. On a CPU it is also the length of a turn: about
two seconds of mini on one core."""


class LocalReranker(Reranker):
    """Scores pairs with a model on this machine.

    Nothing is loaded or downloaded until the first pair is scored, or `warmup` is called. A pickle holds the settings
    only.

    Args:
        model: "mini", a checkpoint folder, a GGUF file, or a hub id, which may end in @REVISION.
        base: the base under an adapter: a folder or a hub id. It is required if the adapter was trained on a folder,
            because a checkpoint may not name one; otherwise it replaces the base that the adapter names.
        adapters: LoRA adapters that share the model's weights: a folder or a hub id for each name. `adapter` of a call
            selects one, with its own head, template and calibration. Their base and its layers are the model's.
        rerank_config: how to read a checkpoint that does not say: the name of a known family, or a file like
            `rerank.json`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; "cuda:0,cuda:1" puts a decoder's layers on two GPUs.
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
        passage_cache: the most memory for keys and values of passages, such as "1GiB" or a number of bytes; "0" for
            none. A passage that comes back is then not computed again if the template has it before the question;
            otherwise the instruction is not. Scores then depend on earlier calls, within rounding errors.
        prepared_passages: a folder that `mistral-rerank prepare` wrote, whose passages are not computed.

    Raises:
        SettingsError: the device is not available, the dtype is unknown, or the quantization does not work here, or
            not with adapters.
        MissingDependencyError: the extra of the quantization is not installed.

    """

    def __init__(
        self,
        model: str | PathLike[str] = MINI,
        *,
        base: str | PathLike[str] | None = None,
        adapters: Mapping[str, str | PathLike[str]] | None = None,
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
        passage_cache: str | int = 0,
        prepared_passages: str | PathLike[str] | None = None,
    ) -> None:
        model, device, dtype = str(plain(model)), str(plain(device)), str(plain(dtype))
        base = None if base is None else str(plain(base))
        prepared_passages = None if prepared_passages is None else str(plain(prepared_passages))
        rerank_config = None if rerank_config is None else str(plain(rerank_config))
        folders = {name: str(plain(folder)) for name, folder in (adapters or {}).items()}
        self._model_name = model
        self._options = {
            "base": base,
            "adapters": folders,
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
            "passage_cache": passage_cache,
            "prepared_passages": prepared_passages,
        }
        if cascade_depth is not None and cascade_depth < 1:
            raise SettingsError(f"cascade_depth is {cascade_depth}; give at least 1, or leave it out")
        self._base, self._rerank_config, self.max_length = base, rerank_config, max_length
        self._cascade_depth, self._instruction, self._quantization = cascade_depth, instruction, quantization
        self.adapters = tuple(folders)
        self._cache = ScoreCache(cache_size) if cache_size else None
        passage_bytes = parse_bytes(passage_cache)
        self._prefixes = PrefixCache(passage_bytes) if passage_bytes or prepared_passages is not None else None
        self.device, *further_devices = pick_devices(device)
        self.dtype = pick_dtype(dtype, self.device)
        check_quantization(quantization, self.device, self.dtype)
        if quantization is not None and folders:
            raise SettingsError(
                f"quantization {quantization!r} rounds weights after an adapter is merged, so adapters could not share "
                "them; leave quantization or adapters out"
            )
        self._engine = Engine(
            functools.partial(
                _load,
                self._prefixes,
                None if prepared_passages is None else Path(prepared_passages),
                model,
                base=base,
                adapters=folders,
                rerank_config=rerank_config,
                device=self.device,
                dtype=self.dtype,
                quantization=quantization,
                max_length=max_length,
                overflow=overflow,
                early_exit=cascade_depth is not None,
                further_devices=further_devices,
            ),
            batch_tokens=batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"]),
            share_batches=self.device.type != "cpu" if share_batches is None else share_batches,
            in_child=None
            if self.device.type == "cpu"
            else SettingsError(
                f"a model on {str(self.device)!r} cannot be used in a forked process; start workers with 'spawn' "
                "instead of 'fork', or open the reranker after the fork and use no such device before it"
            ),
            prefixes=self._prefixes,
        )
        weakref.finalize(self, self._engine.close)  # garbage collection frees threads and weights

    def __reduce__(self) -> tuple[functools.partial[LocalReranker], tuple[str]]:
        """Pickle the settings, not the weights."""
        return functools.partial(LocalReranker, **self._options), (self._model_name,)  # type: ignore[arg-type]

    @property
    def model_name(self) -> str:
        """The name of the model, as the user gave it."""
        return self._model_name

    @property
    def shares_passages(self) -> bool:
        """See `Reranker.shares_passages`; a cascade needs all pairs of a question together. It opens the checkpoint."""
        return self._cascade_depth is None and self._is_passage_first()

    def score_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """See `Reranker.score_pairs`."""
        return self._score_within(
            None, pairs, overflow=overflow, instruction=instruction, limits=limits, adapter=adapter
        )

    @override
    def _score_within(self, seconds: float | None, pairs: Sequence[Pair], **options: Any) -> list[Score]:
        call, future = self._submit(pairs, **options)
        scores: list[Score] = [] if future is None else result_within(seconds, future)
        return call.complete(scores)

    async def ascore_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """See `Reranker.ascore_pairs`."""
        call, future = self._submit(pairs, overflow, instruction, limits, adapter)
        scores: list[Score] = [] if future is None else await asyncio.wrap_future(future)
        return call.complete(scores)

    def _submit(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow | None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> tuple[TextPairs, Future[list[Score]] | None]:
        """Submit what the engine has to score; no future if that is nothing."""
        check_adapter(adapter, self.adapters)
        choice: _Call | None = None
        if self._cascade_depth is None and self._cache is None:
            call = TextPairs(pairs)
        else:
            options = repr((adapter, overflow, instruction, limits))
            call = limited = _Call(pairs, options, self._cascade_depth, self._cache)
            choice = limited if limited.over_depth else None
        if not call.pairs:
            return call, None
        instruction = instruction or self._instruction
        cut = overflow if limits is None else Cut(overflow, limits.tokens, limits.chunks)
        return call, self._engine.submit(call.pairs, cut, instruction=instruction, choice=choice, adapter=adapter)

    def weights_checksum(self) -> str:
        """See `Reranker.weights_checksum`; it reads all weights."""
        return self._open_checkpoint().weights_checksum()

    @override
    def weight_bytes(self) -> int:
        return self._open_checkpoint().weight_bytes(self.dtype.itemsize, self._quantization)

    def _open_checkpoint(self) -> Checkpoint:
        return open_checkpoint(self._model_name, base=self._base, rerank_config=self._rerank_config)

    def _is_passage_first(self) -> bool:
        config = self._open_checkpoint().config
        return config.template is not None and config.prompt.passage_first

    def observe(self, observer: Observer) -> None:
        """See `Reranker.observe`."""
        self._engine.observer = observer
        if self._prefixes is not None:
            self._prefixes.observer = observer

    def prepare(
        self,
        passages: Iterable[str],
        *,
        out: str | PathLike[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """See `Reranker.prepare`.

        With `out` they are written to that folder instead, for `prepared_passages`; so is what else the cache holds.
        """
        if out is None:
            for _ in self._prepared(passages, progress):
                pass
            return
        used = manifest(self.weights_checksum(), self.dtype, self._quantization)
        write_prepared(Path(out), (prefixes.take() for prefixes in self._prepared(passages, progress)), used)

    def _prepared(self, passages: Iterable[str], progress: Callable[[int], object] | None) -> Iterator[PrefixCache]:
        """Compute passages, and yield the cache again and again."""
        if self._prefixes is None:
            raise SettingsError("there is no passage cache; set passage_cache, such as '1GiB'")
        if not self._is_passage_first():
            raise SettingsError(
                f"{self._model_name} reads the question before the passage, so a passage cannot be computed ahead; "
                "use a model whose template has the passage first, such as mini"
            )
        remaining = iter(passages)
        while texts := list(islice(remaining, PASSAGES_AT_ONCE)):
            pairs = TextPairs([("?", text) for text in texts]).pairs
            if pairs:
                self._engine.submit(pairs).result()
                if not self._engine.caches_prefixes:
                    raise SettingsError(f"{self._model_name} works without a passage cache on {self.device}")
            yield self._prefixes
            if progress is not None:
                progress(len(texts))

    def passage_cache_info(self) -> PassageCacheInfo | None:
        """Return the counts of the passage cache; None without one."""
        return None if self._prefixes is None else self._prefixes.info()

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


def _load(prefixes: PrefixCache | None, prepared: Path | None, model: str, **options: Any) -> LoadedCheckpoint:
    """Load a checkpoint and the passages that were prepared for it."""
    loaded = LoadedCheckpoint(model, **options)
    if prefixes is not None and prepared is not None:
        checkpoint = open_checkpoint(model, base=options["base"], rerank_config=options["rerank_config"])
        expected = manifest(checkpoint.weights_checksum(), options["dtype"], options["quantization"])
        prefixes.prepared = read_prepared(prepared, expected)
    return loaded

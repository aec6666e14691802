"""Embedding models as encoders: on this machine, at an endpoint, with a cache on disk; and as rerankers.

Endpoints speak OpenAI's embeddings API, or NVIDIA's variant of it with `input_type`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from pydantic import SecretStr

from mistral_rerank.data_files.atomic import replacement
from mistral_rerank.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidReplyError,
    MissingDependencyError,
    RequestTooLargeError,
)
from mistral_rerank.inputs import check_adapter, check_pairs
from mistral_rerank.protocols.urls import clean_url
from mistral_rerank.remote.error_mapping import redact, to_error
from mistral_rerank.remote.retries import Retries, with_retries
from mistral_rerank.remote.transport import Transport
from mistral_rerank.reranker import Overflow, PassageLimits, Reranker
from mistral_rerank.scores import Pair, Score

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    Vectors = NDArray[np.float32]

Kind = Literal["query", "passage"]

KEY_VARIABLE = "MISTRAL_RERANK_EMBEDDINGS_API_KEY"
KEYS_BY_HOST = {
    "integrate.api.nvidia.com": "NVIDIA_API_KEY",
    "ai.api.nvidia.com": "NVIDIA_API_KEY",
    "api.openai.com": "OPENAI_API_KEY",
}
"""Environment variables of the keys of vendors' hosts, read after `KEY_VARIABLE`."""

BATCH = 32
BLOCK = 1024
"""Texts between two reports of progress, and in one file of the cache."""
CONCURRENT_REQUESTS = 4
TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Preset:
    """How to use one embedding model for retrieval.

    Attributes:
        name: used in `dense:NAME`.
        model: a hub id, or the name at an endpoint.
        query_prefix: prepended to every question.
        passage_prefix: prepended to every passage.
        pooling: of the token states; None for the model's own, or the endpoint's.
        normalize: whether embeddings are scaled to length 1, so that the dot product is the cosine.
        passage_model: the passage encoder, if it is another model.
        base_url: of the endpoint that serves it; None for a model on this machine.
        input_type: whether requests carry `input_type` (`query` or `passage`), as NVIDIA's endpoints require.

    """

    name: str
    model: str
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Literal["mean", "cls", "lasttoken"] | None = "mean"
    normalize: bool = True
    passage_model: str | None = None
    base_url: str | None = None
    input_type: bool = False

    def prefix(self, kind: Kind) -> str:
        """Give the prefix of a kind of text."""
        return self.query_prefix if kind == "query" else self.passage_prefix


class Encoder(Protocol):
    """Embeds texts; the dot product of two embeddings is their similarity."""

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        """Give embeddings (texts, width); `progress` is called with the number of texts just done."""


class LocalEncoder:
    """A sentence-transformers model, or a plain transformers one; safetensors only, no remote code.

    A folder or hub id as `model` replaces the preset's. Without a preset the model is used as its folder says.

    Raises:
        MissingDependencyError: the extra `dense` is not installed.
        CheckpointError: the model cannot be found, fetched or read.

    """

    def __init__(self, preset: Preset | None, *, model: str | None = None, device: str | None = None) -> None:
        self._preset = preset
        self._query_model = _load(model or (preset.model if preset else ""), preset, device)
        passage_model = preset.passage_model if preset and model is None else None
        self._passage_model = _load(passage_model, preset, device) if passage_model else self._query_model

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None] = lambda _: None) -> Vectors:
        """See `Encoder.encode`. Long texts are truncated to the model's limit."""
        model = self._query_model if kind == "query" else self._passage_model
        if self._preset is None:
            encode = model.encode_query if kind == "query" else model.encode_document
        else:
            preset = self._preset
            encode = partial(model.encode, prompt=preset.prefix(kind), normalize_embeddings=preset.normalize)
        blocks: list[Vectors] = []
        for start in range(0, len(texts), BLOCK):
            vectors = encode(texts[start : start + BLOCK], batch_size=BATCH, show_progress_bar=False)
            blocks.append(np.asarray(vectors, dtype=np.float32))
            progress(len(blocks[-1]))
        return np.concatenate(blocks)


def _load(model: str, preset: Preset | None, device: str | None) -> SentenceTransformer:
    """Load a model with the preset's pooling."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise MissingDependencyError.of("dense", error) from error
    try:
        loaded = SentenceTransformer(
            model, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise CheckpointError(
            f"the embedding model {model!r} cannot be loaded: {reason}; give a folder or a hub id with safetensors, "
            "a preset's name, or an endpoint as NAME@URL"
        ) from error
    if preset is not None and preset.pooling is not None:
        for module in loaded:
            if isinstance(module, Pooling):
                module.pooling_mode = preset.pooling
    return loaded


class EndpointEncoder:
    """An embeddings endpoint; a batch that it refuses as too large is sent in halves.

    Args:
        preset: the model's name at the endpoint, prefixes, and whether `input_type` is sent.
        base_url: the root of a host, with `/v1`, or the whole route; `SettingsError` for an unusable one.
        api_key: None for `MISTRAL_RERANK_EMBEDDINGS_API_KEY`, or else the variable of a known vendor's host.
        retries: how often, and after which wait, a failed request is sent again.

    """

    def __init__(
        self, preset: Preset, base_url: str, *, api_key: SecretStr | None = None, retries: Retries | None = None
    ) -> None:
        url = clean_url(base_url)
        base, mark, query = url.partition("?")
        if not base.endswith("/embeddings"):
            versioned = base.endswith(("/v1", "/v2")) or "/retrieval/" in base
            url = f"{base}{'' if versioned else '/v1'}/embeddings{mark}{query}"
        self._preset, self._url = preset, url
        self._key = api_key or _key_for(url)
        self._retries = retries or Retries()
        self._transport = Transport()

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None] = lambda _: None) -> Vectors:
        """See `Encoder.encode`; a `RemoteError` if the endpoint gives no usable response."""
        prefix = self._preset.prefix(kind)
        inputs = [f"{prefix}{text}" if f"{prefix}{text}".strip() else " " for text in texts]  # "" is refused
        batches = [inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH)]
        blocks: list[Vectors] = []
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            try:
                for vectors in pool.map(lambda batch: self._embed(batch, kind), batches):
                    blocks.append(vectors)
                    progress(len(vectors))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if len({vectors.shape[1] for vectors in blocks}) > 1:
            raise InvalidReplyError(f"{self._url} gave vectors of different lengths")
        vectors = np.concatenate(blocks)
        if self._preset.normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def _embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        try:
            return self._embed_batch(texts, kind)
        except RequestTooLargeError:
            if len(texts) == 1:
                raise
        middle = len(texts) // 2
        return np.concatenate([self._embed(texts[:middle], kind), self._embed(texts[middle:], kind)])

    def _embed_batch(self, texts: Sequence[str], kind: Kind) -> Vectors:
        body: dict[str, object] = {"model": self._preset.model, "input": list(texts), "encoding_format": "float"}
        if self._preset.input_type:
            body |= {"input_type": kind, "truncate": "END"}
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        secrets = [self._key.get_secret_value()] if self._key else []
        if secrets:
            headers["Authorization"] = f"Bearer {secrets[0]}"
        content = json.dumps(body).encode()

        async def attempt() -> Vectors:
            deadline = time.monotonic() + TIMEOUT
            response = await self._transport.send(
                "POST", self._url, headers, content, timeout=TIMEOUT, deadline=deadline
            )
            if response.status != 200:
                hide = partial(redact, secrets=secrets, texts=texts)
                raise to_error(response, url=self._url, request_id="", hide=hide)
            return _read_embeddings(response.content, count=len(texts), url=self._url)

        return self._transport.run(with_retries(attempt, self._retries))


def _read_embeddings(content: bytes, *, count: int, url: str) -> Vectors:
    """Read OpenAI's `{"data": [{"index", "embedding"}]}` as vectors (count, width), in the order of the inputs."""
    try:
        data = json.loads(content)["data"]
        by_index = {int(entry["index"]): entry["embedding"] for entry in data}
        vectors = np.asarray([by_index[index] for index in range(count)], dtype=np.float32)
        if len(data) != count or vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise ValueError(f"{len(data)} embeddings")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = f"{url} answered 200, but not with one finite embedding for each text"
        raise InvalidReplyError(reason, status=200) from error
    return vectors


def _key_for(url: str) -> SecretStr | None:
    variables = (KEY_VARIABLE, KEYS_BY_HOST.get(urlsplit(url).hostname or ""))
    key = next((os.environ[name] for name in variables if name and os.environ.get(name)), None)
    return SecretStr(key) if key else None


class CachedEncoder:
    """An encoder with a cache on disk, so that a stopped run does not encode a corpus again.

    The folder holds the cache of this encoder alone, in files named by the hash of their texts.
    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self._encoder, self._folder = encoder, folder

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        """See `Encoder.encode`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
        return np.concatenate([self._encode_block(block, kind, progress=progress) for block in blocks])

    def _encode_block(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        name = hashlib.sha256("\0".join([kind, *texts]).encode("utf-8", "surrogatepass")).hexdigest()
        file = self._folder / f"{name}.npy"
        if file.exists():
            vectors: Vectors = np.load(file, allow_pickle=False)
            progress(len(texts))
            return vectors
        vectors = self._encoder.encode(texts, kind, progress=progress)
        with replacement(file) as beside, beside.open("xb") as out:
            np.save(out, vectors, allow_pickle=False)
        return vectors


class BiEncoderReranker(Reranker):
    """Scores a pair by the dot product of its embeddings: the baseline for a cross-encoder on the same candidates.

    Long texts are truncated to the model's limit. Embeddings are cached in memory, so a passage of many questions is
    encoded once. The probability is the sigmoid of the product, and not calibrated.
    """

    def __init__(self, name: str, encoder: Encoder) -> None:
        self._name, self._encoder = name, encoder
        self._vectors: dict[tuple[Kind, str], Vectors] = {}

    @property
    def model_name(self) -> str:
        """See `Reranker.model_name`."""
        return self._name

    def score_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,  # noqa: ARG002
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """See `Reranker.score_pairs`."""
        if instruction is not None:
            raise InvalidInputError("a bi-encoder has no place for an instruction; leave it out")
        if limits is not None:
            raise InvalidInputError("a bi-encoder has no limits of a passage; leave them out")
        check_adapter(adapter, self.adapters)
        pairs = check_pairs(pairs)
        self._encode("query", [query for query, _ in pairs])
        self._encode("passage", [passage for _, passage in pairs])
        return [
            Score.from_logit(float(self._vectors["query", query] @ self._vectors["passage", passage]))
            for query, passage in pairs
        ]

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
        options = {"overflow": overflow, "instruction": instruction, "limits": limits, "adapter": adapter}
        return await asyncio.to_thread(self.score_pairs, pairs, **options)  # type: ignore[arg-type]

    def _encode(self, kind: Kind, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if (kind, text) not in self._vectors]
        if new:
            vectors = self._encoder.encode(new, kind, progress=lambda _: None)
            self._vectors.update(zip(((kind, text) for text in new), vectors, strict=True))

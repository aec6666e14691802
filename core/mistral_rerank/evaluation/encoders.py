"""Embedding models: a sentence-transformers model on this machine, or an endpoint with OpenAI's or NVIDIA's API."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from pydantic import SecretStr

from mistral_rerank.errors import CheckpointError, InvalidReplyError, MissingDependencyError, RequestTooLargeError
from mistral_rerank.protocols.urls import clean_url
from mistral_rerank.remote.error_mapping import redact, to_error
from mistral_rerank.remote.retries import Retries, with_retries
from mistral_rerank.remote.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from mistral_rerank.evaluation.embedding_models import Preset

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
CONCURRENT_REQUESTS = 4
TIMEOUT = 120.0


class Encoder(Protocol):
    """Embeds texts; the dot product of two embeddings is their similarity."""

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        """Give embeddings (texts, width); `progress` is called with the number of texts just done."""


class LocalEncoder:
    """A sentence-transformers model, or a plain transformers one; safetensors only, no remote code.

    Args:
        preset: prefixes, pooling and normalization; None to use what the model's folder says.
        model: a folder or a hub id, instead of the preset's.
        device: "cpu", "cuda", ...; None for the best available.

    Raises:
        MissingDependencyError: the extra `dense` is not installed.
        CheckpointError: the model cannot be found, fetched or read.

    """

    def __init__(self, preset: Preset | None, *, model: str | None = None, device: str | None = None) -> None:
        name = model or (preset.model if preset else "")
        self._preset = preset
        self._query_model = _load(name, preset, device)
        two = model is None and preset is not None and preset.passage_model
        self._passage_model = _load(two, preset, device) if two else self._query_model

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None] = lambda _: None) -> Vectors:
        """See `Encoder.encode`. Long texts are truncated to the model's limit."""
        model = self._query_model if kind == "query" else self._passage_model
        order = sorted(
            range(len(texts)), key=lambda i: -len(texts[i])
        )  # similar lengths in a batch need little padding
        blocks: list[Vectors] = []
        for start in range(0, len(order), 8 * BATCH):
            block = [texts[i] for i in order[start : start + 8 * BATCH]]
            if self._preset is None:
                encode = model.encode_query if kind == "query" else model.encode_document
                vectors = encode(block, batch_size=BATCH, show_progress_bar=False)
            else:
                prefix = self._preset.query_prefix if kind == "query" else self._preset.passage_prefix
                vectors = model.encode(
                    block,
                    prompt=prefix,
                    batch_size=BATCH,
                    normalize_embeddings=self._preset.normalize,
                    show_progress_bar=False,
                )
            blocks.append(np.asarray(vectors, dtype=np.float32))
            progress(len(block))
        sorted_vectors = np.concatenate(blocks)
        vectors_in_order = np.empty_like(sorted_vectors)
        vectors_in_order[order] = sorted_vectors
        return vectors_in_order


class EndpointEncoder:
    """An endpoint with OpenAI's embeddings API, or NVIDIA's variant with `input_type`.

    Args:
        preset: the model's name at the endpoint, prefixes, and whether `input_type` is sent.
        base_url: the root of a host, with `/v1`, or the whole route.
        api_key: None for `MISTRAL_RERANK_EMBEDDINGS_API_KEY`, or else the variable of a known vendor's host.
        retries: how often, and after which wait, a failed request is sent again.

    Raises:
        SettingsError: the base URL is unusable.

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
        """See `Encoder.encode`.

        Raises:
            RemoteError: one of its kinds, when the endpoint gave no usable answer.

        """
        preset = self._preset
        prefix = preset.query_prefix if kind == "query" else preset.passage_prefix
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
        if preset.normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def _embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Embed one batch, in halves where it is refused as too large."""
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
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        content = json.dumps(body).encode()
        secrets = [self._key.get_secret_value()] if self._key else []

        async def attempt() -> Vectors:
            deadline = time.monotonic() + TIMEOUT
            response = await self._transport.send(
                "POST", self._url, headers, content, timeout=TIMEOUT, deadline=deadline
            )
            if response.status != 200:
                hide = partial(redact, secrets=secrets, texts=texts)
                raise to_error(response, url=self._url, request_id="", hide=hide)
            return read_embeddings(response.content, count=len(texts), url=self._url)

        return self._transport.run(with_retries(attempt, self._retries))


def read_embeddings(content: bytes, *, count: int, url: str) -> Vectors:
    """Read OpenAI's `{"data": [{"index", "embedding"}]}`.

    Returns:
        Vectors (count, width), in the order of the inputs.

    Raises:
        InvalidReplyError: it is of another form, or lacks a vector, or holds one that is no list of finite numbers.

    """
    try:
        data = json.loads(content)["data"]
        by_index = {int(entry["index"]): entry["embedding"] for entry in data}
        vectors = np.asarray([by_index[index] for index in range(count)], dtype=np.float32)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidReplyError(f"{url} answered 200, but not with one embedding for each text", status=200) from error
    if len(data) != count or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise InvalidReplyError(f"{url} answered 200, but not with one finite embedding for each text", status=200)
    return vectors


def _key_for(url: str) -> SecretStr | None:
    variables = (KEY_VARIABLE, KEYS_BY_HOST.get(urlsplit(url).hostname or ""))
    key = next((os.environ[name] for name in variables if name and os.environ.get(name)), None)
    return SecretStr(key) if key else None


def _load(model: str, preset: Preset | None, device: str | None) -> SentenceTransformer:
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

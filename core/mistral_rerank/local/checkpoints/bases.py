"""Where a checkpoint's base weights come from, and how they get onto this machine.

A base is what transformers calls pretrained (a folder or a hub id), or a GGUF file inside a wheel that the package
knows, so that the embedded default needs no model hub. A wheel's base is turned into an ordinary transformers folder
once and kept in the cache; from then on every base is a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mistral_rerank.errors import CheckpointError, MissingDependencyError
from mistral_rerank.local.checkpoints.trust import check_files, inner_folder, is_hub_id
from mistral_rerank.local.checkpoints.wheels import KNOWN_WHEELS, KnownWheel, fetch, sha256_of

WANTED = ["*.json", "*.safetensors", "*.model"]
UNWANTED = ["consolidated*", "[!e]*/*", "e[!a]*/*"]
"""Of a hub's repository: weights in another form, and whatever is in folders other than `early_exit`."""


class PretrainedBase(BaseModel):
    """A transformers model: a hub id, a folder inside the checkpoint, or without a name one that the user gives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pretrained"] = "pretrained"
    name: str | None = None
    revision: str | None = None
    layers: int | None = Field(default=None, ge=1, description="how many of its layers are used; None for all")


class WheelBase(BaseModel):
    """A base of `KNOWN_WHEELS`, by its name. What older checkpoints add about the wheel has to match it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wheel"] = "wheel"
    name: str
    layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        known = KNOWN_WHEELS.get(str(content.get("name")))
        if known is None:
            raise ValueError(f"name is no known wheel; known: {', '.join(KNOWN_WHEELS)}")
        for key in ("requirement", "file", "sha256"):
            if key in content and content[key] != getattr(known, key):
                raise ValueError(f"{key} is not that of {known.base}; a checkpoint cannot choose what is fetched")
        return {key: value for key, value in content.items() if key not in ("requirement", "file", "sha256")}

    @property
    def wheel(self) -> KnownWheel:
        """What is known of it."""
        return KNOWN_WHEELS[self.name]


Base = Annotated[PretrainedBase | WheelBase, Field(discriminator="kind")]


def named_base(name: str, *, layers: int | None = None) -> PretrainedBase | WheelBase:
    """Give what a checkpoint says of the base that a user names: a known wheel, a hub id, or nothing of a folder."""
    if name in KNOWN_WHEELS:
        return WheelBase(name=name, layers=layers)
    return PretrainedBase(name=None if Path(name).expanduser().is_dir() else name, layers=layers)


def cache_dir() -> Path:
    """Give the folder that keeps converted bases: `MISTRAL_RERANK_CACHE`, else the user's cache folder."""
    if given := os.environ.get("MISTRAL_RERANK_CACHE"):
        return Path(given).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    return user_cache_path("mistral-rerank")


def base_folder(
    base: PretrainedBase | WheelBase,
    *,
    given: str | None = None,
    checkpoint: Path | None = None,
    key: str = "base.name",
) -> Path:
    """Give the folder of a base, fetching it first where it is not on this machine.

    Args:
        base: what the checkpoint says.
        given: what the user says, which counts more: a folder, a hub id or a known wheel's name.
        checkpoint: the folder that `base` comes from, for folders inside it and for errors.
        key: where in its files the name is, for errors.

    Raises:
        CheckpointError: the checkpoint names no base that it may name, or it cannot be fetched, or is an adapter.

    """
    folder = _base_folder(base, given, checkpoint, key)
    check_files(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder / 'adapter_config.json'}: a base is a whole model, and this is an adapter")
    return folder


def _base_folder(base: PretrainedBase | WheelBase, given: str | None, checkpoint: Path | None, key: str) -> Path:
    if given is not None:
        return pull(KNOWN_WHEELS[given]) if given in KNOWN_WHEELS else pretrained_folder(given)
    if isinstance(base, WheelBase):
        return pull(base.wheel)
    hint = "give your copy with base=FOLDER, --base FOLDER or MISTRAL_RERANK_BASE"
    if base.name is None:
        raise CheckpointError(f"{checkpoint}: {key} is not given, since the adapter was trained on a folder; {hint}")
    if checkpoint is not None and (inside := inner_folder(checkpoint, base.name)) is not None:
        return inside
    if not is_hub_id(base.name, base.revision):
        raise CheckpointError(
            f"{checkpoint}: {key} is {base.name[:200]!r}, and a checkpoint may name a hub id or a folder inside "
            f"itself; {hint}"
        )
    return hub_snapshot(base.name, base.revision)


def pretrained_folder(name: str) -> Path:
    """Give the folder of weights that a user names: `name` itself, or the snapshot of that hub id.

    Raises:
        CheckpointError: `name` is neither.

    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(name):
        raise CheckpointError(f"there is no folder {name!r}; give a checkpoint folder, a hub id or 'mini'")
    return hub_snapshot(name)


def hub_snapshot(name: str, revision: str | None = None) -> Path:
    """Fetch what is read of a hub's repository, where it is not here, and give its folder.

    Raises:
        CheckpointError: it cannot be fetched.

    """
    try:
        from huggingface_hub import constants, snapshot_download
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    from mistral_rerank.local.checkpoints.quiet import quiet

    class Bytes(tqdm):
        """The bar of the bytes alone, and not that of the files."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": None if options.get("unit") == "B" else True})

    asked: dict[str, Any] = {"revision": revision, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        with quiet():
            missing = []
            with suppress(OSError):  # without a network: what is here is enough, or the next call says what is wrong
                missing = [file for file in snapshot_download(name, dry_run=True, **asked) if file.will_download]
            if not missing:
                return Path(snapshot_download(name, **asked))
        size = sum(file.file_size or 0 for file in missing)
        sys.stderr.write(f"fetching {name} ({size / 1e6:.0f} MB) from the hub into {constants.HF_HUB_CACHE}, once\n")
        return Path(snapshot_download(name, tqdm_class=Bytes, **asked))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name!r} is no folder here and could not be fetched from the model hub ({type(error).__name__}); "
            "check the name and the network, or give a folder"
        ) from error


def pull(wheel: KnownWheel, *, source: Path | None = None) -> Path:
    """Put a wheel's base into the cache as a transformers folder, unless it is there.

    Processes that do it at once wait for the first.

    Args:
        wheel: which one.
        source: a wheel, the GGUF file, or a folder that holds either; None downloads the wheel.

    Raises:
        CheckpointError: the file cannot be had or written, or its checksum differs. Nothing is left half-written.

    """
    folder = cache_dir() / "bases" / f"{wheel.base}-{wheel.sha256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not (folder / "config.json").is_file():
                _make_base(wheel, source, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _make_base(wheel: KnownWheel, source: Path | None, folder: Path) -> None:
    """Make the folder of a wheel's base; the caller holds its lock."""
    for left in folder.parent.glob(f"{wheel.base}-scratch-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
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
        (work / "base").rename(folder)


def _copy_gguf(wheel: KnownWheel, source: Path, target: Path) -> None:
    """Copy the GGUF file out of a wheel, a folder of either, or itself."""
    places = [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []
    for place in places:
        if place.name == wheel.file:
            shutil.copyfile(place, target)
            return
        if place.suffix == ".whl" and zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as archive:
                for member in archive.namelist():
                    if Path(member).name == wheel.file:
                        with archive.open(member) as inside, target.open("wb") as out:
                            shutil.copyfileobj(inside, out)
                        return
    raise CheckpointError(
        f"{source} holds no {wheel.file}; give the wheel of {wheel.requirement}, its GGUF file, or a folder with one"
    )


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF model of the Llama kind as a Mistral folder: safetensors in bfloat16, config, tokenizer."""
    try:
        import torch
        import transformers
        from gguf import GGUFReader, TokenType
        from tqdm.auto import tqdm
        from transformers import modeling_gguf_pytorch_utils as reading
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error

    reading.tqdm = partial(tqdm, disable=True)  # it has no switch, and the download's bar is the one that is shown
    try:
        source = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    finally:
        reading.tqdm = tqdm
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

"""How a checkpoint is read: what it says of itself, else a known family, else what the user says.

In this order: `rerank.json`; the modules of sentence-transformers, with their chat template; a known family; an encoder
with one label, whose tokenizer has a format of pairs. Any other checkpoint is refused: no prompt is guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mistral_rerank.errors import CheckpointError, SettingsError
from mistral_rerank.local.checkpoints.bases import mini_folder
from mistral_rerank.local.checkpoints.config import RERANK_JSON, CheckpointConfig, PretrainedBase
from mistral_rerank.local.checkpoints.families import FAMILIES, LORA, find_family, why_not_read
from mistral_rerank.local.checkpoints.model_config import is_encoder
from mistral_rerank.local.checkpoints.modules import MODULES_JSON, read_modules
from mistral_rerank.local.checkpoints.trust import check_files, read_json


def read_config(folder: Path, rerank_config: str | None = None) -> CheckpointConfig:
    """Return the content of `rerank.json`, or what it would be; as `detect`."""
    return detect(folder, rerank_config)[0]


def detect(folder: Path, rerank_config: str | None = None) -> tuple[CheckpointConfig, str]:
    """Find out how a checkpoint is read.

    Args:
        folder: the checkpoint.
        rerank_config: what the user says: the name of a family, or a file like `rerank.json`.

    Returns:
        The configuration, and the file or family that it comes from.

    Raises:
        CheckpointError: the folder holds no checkpoint, or nothing says how it is read.
        SettingsError: `rerank_config` is neither a family nor a file.

    """
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds neither config.json nor adapter_config.json; it is no checkpoint")
    if folder != mini_folder():  # an installer may link the files of a package
        check_files(folder)
    if rerank_config is None and (folder / RERANK_JSON).is_file():
        return _from_file(folder / RERANK_JSON), RERANK_JSON
    architectures = [LORA] if adapter.is_file() else read_json(folder / "config.json").get("architectures")
    config, source = _without_rerank_json(folder, architectures, rerank_config)
    if architectures != [LORA]:
        return config, source
    base = read_json(adapter).get("base_model_name_or_path")
    return config.model_copy(update={"base": PretrainedBase(name=base if isinstance(base, str) else None)}), source


def _without_rerank_json(folder: Path, architectures: Any, rerank_config: str | None) -> tuple[CheckpointConfig, str]:
    if rerank_config is not None:
        named = {family.name.lower(): family for family in FAMILIES}.get(rerank_config.lower())
        if named is not None:
            return _trained_head(named.config, architectures), f"the family {named.name}, which was given"
        file = Path(rerank_config).expanduser()
        if not file.is_file():
            names = ", ".join(family.name for family in FAMILIES)
            raise SettingsError(f"rerank_config {rerank_config!r} is neither a file nor a family; families: {names}")
        return _from_file(file), str(file)
    family = find_family(folder, architectures)
    if (folder / MODULES_JSON).is_file():
        config = read_modules(folder)
        if family is not None:
            config = config.model_copy(update={"calibration": family.config.calibration})
        return config, f"{MODULES_JSON} of sentence-transformers"
    if family is not None:
        return _family_config(family.config, folder, architectures), f"the known family {family.name}"
    if architectures != [LORA] and is_encoder(folder):
        return CheckpointConfig(template=None, append_eos=False, max_length=2**20), "the architecture, an encoder"
    if (reason := why_not_read(folder)) is not None:
        raise CheckpointError(f"{folder} of {architectures} is not read: {reason}")
    raise CheckpointError(
        f"{folder} does not say how it is read: it has no {RERANK_JSON} and no {MODULES_JSON} of "
        f"sentence-transformers, and {folder.name} of {architectures} is no known family. Give rerank_config: a JSON "
        "file with template, append_eos, add_special_tokens, pooling, attention and max_length, and for a language "
        f"model true_token and false_token; or a family: {', '.join(family.name for family in FAMILIES)}"
    )


def _family_config(config: CheckpointConfig, folder: Path, architectures: Any) -> CheckpointConfig:
    """Return a family's configuration for one checkpoint, with what its config.json adds."""
    if architectures == [LORA]:
        return config
    raw = read_json(folder / "config.json")
    pooling = {"avg": "mean", "last": "last", "cls": "cls"}.get(raw.get("pooling", "avg"))
    if config.attention == "bidirectional" and (pooling is None or raw.get("is_causal")):
        raise CheckpointError(f"{folder / 'config.json'}: pooling or is_causal has a value that is not known")
    if config.attention == "bidirectional":
        config = config.model_copy(update={"pooling": pooling, "temperature": float(raw.get("temperature", 1.0))})
    return _trained_head(config, architectures)


def _trained_head(config: CheckpointConfig, architectures: Any) -> CheckpointConfig:
    """Leave the tokens of a language model out of the configuration of its conversion to a classifier."""
    if isinstance(architectures, list) and all(str(name).endswith("ForCausalLM") for name in architectures):
        return config
    return config.model_copy(update={"true_token": None, "false_token": None})


def _from_file(file: Path) -> CheckpointConfig:
    content = read_json(file)
    try:
        config = CheckpointConfig.model_validate(content)
        _ = config.prompt  # is valid
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise CheckpointError(f"{file} is not usable: {'; '.join(problems)}") from error
    except SettingsError as error:
        raise CheckpointError(f"{file} is not usable: {error}") from error
    return config

"""The modules of sentence-transformers (5.4 and later): a cross-encoder's `modules.json` and what belongs to it.

Three chains are read:

    Transformer                                 a one-label classifier
    Transformer, LogitScore                     a language model whose logits of one or two tokens are the score
    Transformer, Pooling, Dense or LayerNorm... a backbone with a head of its own

A Transformer that takes messages has a chat template with the roles `query` and `document`, and `system` for an
instruction. It is rendered once, in the sandbox of transformers, to get the text around the question and the passage.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.checkpoints.config import CheckpointConfig
from mistral_rerank.local.checkpoints.trust import inner_folder, read_json, read_json_value, unusable
from mistral_rerank.templates import PLACEHOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

MODULES_JSON = "modules.json"
SETTINGS = "sentence_bert_config.json"
TEMPLATE_LIMIT = 2**16
"""The most characters of a chat template."""
MARKERS = {"{query}": "\ue000q\ue001", "{passage}": "\ue000p\ue001", "{instruction}": "\ue000i\ue001"}
"""Texts of a rendered template that stand for placeholders; no template holds them."""
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


def read_modules(folder: Path) -> CheckpointConfig:
    """Return the configuration of a sentence-transformers cross-encoder.

    Raises:
        CheckpointError: the chain is not one of those above, or the chat template has no place for a pair.

    """
    names, paths = _chain(folder)
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    task = settings.get("transformer_task", "sequence-classification" if len(names) == 1 else None)
    fields: dict[str, Any] = {
        "add_special_tokens": False,
        "append_eos": False,
        "max_length": _max_length(settings, folder),
    }
    message = (settings.get("modality_config") or {}).get("message")
    if message is None:
        if _default_prompt(folder):
            raise CheckpointError(f"{folder}: it has a default prompt and takes no messages, which is not read")
        fields |= {"template": None}
    else:
        options = (settings.get("processing_kwargs") or {}).get("chat_template") or {}
        fields |= _chat_fields(folder, options, flat=message.get("format") == "flat")
    if names == ["Transformer"] and task == "sequence-classification":
        pass
    elif names == ["Transformer", "LogitScore"] and task == "text-generation":
        tokens = read_json(paths[1] / "config.json")
        fields |= {"true_token": tokens.get("true_token_id"), "false_token": tokens.get("false_token_id")}
    elif names[:2] == ["Transformer", "Pooling"] and len(names) > 2 and set(names[2:]) <= {"Dense", "LayerNorm"}:
        fields |= {"pooling": _pooling(paths[1] / "config.json"), "head": tuple(path.name for path in paths[2:])}
    else:
        raise CheckpointError(
            f"{folder / MODULES_JSON}: {', '.join(names)} with the task {task!r} is no chain that is read; these are: "
            "Transformer (sequence-classification); Transformer (text-generation), LogitScore; Transformer, Pooling, "
            "Dense or LayerNorm"
        )
    with unusable(folder / MODULES_JSON):
        return CheckpointConfig.model_validate(fields)


def read_head(folder: Path, modules: tuple[str, ...], hidden_size: int) -> nn.Module:
    """Read the modules after pooling, as one head: (rows, hidden) to (rows, 1) in float32.

    Raises:
        CheckpointError: a module is not supported, or its weights do not fit.

    """
    from safetensors.torch import load_file
    from torch import nn

    activations = {name: getattr(nn, name) for name in ("Identity", "GELU", "Tanh", "ReLU", "SiLU", "Sigmoid")}
    layers: list[nn.Module] = []
    width = hidden_size
    for name in modules:
        path = inner_folder(folder, name)
        if path is None:
            raise CheckpointError(f"{folder} holds no folder {name!r}, which is part of its head")
        config = read_json(path / "config.json")
        with unusable(path / "model.safetensors"):
            weights = {key.split(".")[-1]: value for key, value in load_file(path / "model.safetensors").items()}
            if "dimension" in config:
                layer: nn.Module = nn.LayerNorm(width)
            else:
                layer = nn.Linear(width, weights["weight"].shape[0], bias="bias" in weights)
                width = weights["weight"].shape[0]
            layer.load_state_dict(weights)
        layers.append(layer)
        if "dimension" in config:
            continue
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
        if activation not in activations or config.get("use_residual"):
            raise CheckpointError(
                f"{path / 'config.json'}: activation_function {activation} or use_residual is not read"
            )
        layers.append(activations[activation]())
    if width != 1:
        raise CheckpointError(f"{folder}: the last module of its head gives {width} numbers, and a reranker has one")
    return nn.Sequential(*layers)


def _chain(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the classes and the folders of the modules, in order."""
    file = folder / MODULES_JSON
    content = read_json_value(file)
    names, paths = [], []
    for module in content if isinstance(content, list) else []:
        if not isinstance(module, dict) or not {"type", "path"} <= module.keys():
            break
        path = folder if module["path"] in ("", ".") else inner_folder(folder, str(module["path"]))
        if path is None or not str(module["type"]).startswith("sentence_transformers."):
            raise CheckpointError(f"{file}: a module is of another package, or its path is no folder of the checkpoint")
        names.append(str(module["type"]).rsplit(".", 1)[-1])
        paths.append(path)
    if not names or len(names) != len(content) or names[0] != "Transformer" or paths[0] != folder:
        raise CheckpointError(f"{file} is no list of modules that begins with a Transformer of this folder")
    return names, paths


def _pooling(file: Path) -> str:
    config = read_json(file)
    modes = config.get("pooling_mode")
    if modes is None:  # before 5.4
        legacy = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
        modes = [legacy.get(key.removeprefix("pooling_mode_"), key) for key in config if config[key] is True]
        modes = [mode for mode in modes if mode != "include_prompt"]
    mode = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
    if mode not in POOLINGS:
        raise CheckpointError(f"{file}: pooling_mode {mode!r} is not read; these are: {', '.join(POOLINGS)}")
    return POOLINGS[str(mode)]


def _max_length(settings: Mapping[str, Any], folder: Path) -> int:
    """Return the longest input: that of the module, else the tokenizer's; the model's own limit comes later."""
    limit = settings.get("max_seq_length") or tokenizer_settings(folder).get("model_max_length")
    return min(int(limit), 2**20) if isinstance(limit, int | float) and limit >= 8 else 2**20


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, or nothing."""
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _chat_fields(folder: Path, options: Mapping[str, Any], *, flat: bool) -> dict[str, Any]:
    """Return the templates of a chat template, and the default instruction."""
    tokenizer = tokenizer_settings(folder)
    file = folder / "chat_template.jinja"
    jinja = file.read_text("utf-8") if file.is_file() else tokenizer.get("chat_template")
    if not isinstance(jinja, str) or len(jinja) > TEMPLATE_LIMIT:
        raise CheckpointError(f"{folder}: its Transformer takes messages, and it has no chat template that is read")
    special = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokenizer.items()}
    special = {key: value for key, value in special.items() if key.endswith("_token") and isinstance(value, str)}

    def render(*roles: str, margin: str = "") -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        placeholders = {"system": "{instruction}", "query": "{query}", "document": "{passage}"}
        texts = {role: margin + MARKERS[placeholders[role]] + margin for role in roles}
        messages = [
            {"role": role, "content": text if flat else [{"type": "text", "text": text}]}
            for role, text in texts.items()
        ]
        with unusable(f"{folder}: its chat template"):
            (text,), _ = render_jinja_template([messages], chat_template=jinja, **{**special, **options})
        if PLACEHOLDER.search(text):
            raise CheckpointError(f"{folder}: its chat template holds the text of a placeholder of ours")
        for placeholder, marker in MARKERS.items():
            text = text.replace(marker, placeholder)
        return str(text)

    plain = render("query", "document")
    if sorted(PLACEHOLDER.findall(plain)) != ["{passage}", "{query}"]:
        raise CheckpointError(
            f"{folder}: its chat template does not render the roles query and document once each; give rerank_config"
        )
    spaced = render("query", "document", margin="\n \n")
    trims = [f"\n \n{placeholder}\n \n" not in spaced for placeholder in ("{query}", "{passage}")]
    if len(set(trims)) > 1:
        raise CheckpointError(f"{folder}: its chat template trims one of question and passage; give rerank_config")
    fields: dict[str, Any] = {"template": plain, "instruction": _default_prompt(folder), "strip": trims[0]}
    with suppress(CheckpointError):  # a template may refuse the role
        instructed = render("system", "query", "document")
        if sorted(PLACEHOLDER.findall(instructed)) == ["{instruction}", "{passage}", "{query}"]:
            fields["instruction_template"] = instructed
    if fields["instruction"] and "instruction_template" not in fields:
        raise CheckpointError(f"{folder}: it has a default prompt, and its chat template has no place for one")
    return fields


def _default_prompt(folder: Path) -> str | None:
    """Return the prompt that config_sentence_transformers.json makes the default, for the role `system`."""
    file = folder / "config_sentence_transformers.json"
    config = read_json(file) if file.is_file() else {}
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    if name is None:
        return None
    if not isinstance(prompts, dict) or not re.fullmatch(r"[\w-]{1,64}", str(name)) or name not in prompts:
        raise CheckpointError(f"{file}: default_prompt_name is {str(name)[:80]!r}, which is no name in prompts")
    return str(prompts[name]) or None

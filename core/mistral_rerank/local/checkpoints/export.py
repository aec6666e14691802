"""A checkpoint as other engines want it: one folder that needs neither PEFT, a base elsewhere, nor this package.

What `rerank.json` says is put where transformers and vLLM look for it too: the prompt as a chat template that reads
one message of the role `query` and one of the role `document`, the end token as something the tokenizer adds, the
longest input as the tokenizer's, and a padding token that the pooling of transformers does not take for the last one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.errors import CheckpointError, MissingDependencyError, SettingsError
from mistral_rerank.templates import Template

try:
    from tokenizers import processors

    from mistral_rerank.local.checkpoints import checkpoint as checkpoints
    from mistral_rerank.local.device import DTYPES
    from mistral_rerank.local.engine.tokenizer import PairTokenizer
    from mistral_rerank.local.model.early_exit import EARLY_EXIT_FILE
    from mistral_rerank.local.model.pooling import LAST_TOKEN
except ImportError as error:
    raise MissingDependencyError.of("local", error) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = ("Who wrote it?", "She did,\n in 1797.")
"""A pair whose ids have to come out of the exported tokenizer as they come out of ours."""


def export_merged(model: str, out: Path, *, dtype: str = "bfloat16", base: str | None = None) -> None:
    """Write a checkpoint as one plain one-label classifier in safetensors, its adapter merged.

    The merge is done in float32 and then rounded to `dtype`; the file keeps the head in float32. The folder
    appears at `out` whole or not at all.

    Args:
        model: "mini", a checkpoint folder or a hub id.
        out: the folder to write; it must not exist.
        dtype: of the backbone: "float32", "bfloat16" or "float16".
        base: under an adapter, as in `LocalReranker`.

    Raises:
        SettingsError: `out` exists, or the dtype is not one of these.
        CheckpointError: the checkpoint cannot be read, or other engines could not read it rightly.

    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype!r} is not one to export in; give {', '.join(map(repr, DTYPES))}")
    if out.exists() or out.is_symlink():
        raise SettingsError(f"{out} exists, and nothing is overwritten; give another folder or remove it first")
    checkpoint = checkpoints.open_checkpoint(model, base=base)
    if checkpoint.config.reading != LAST_TOKEN:
        raise CheckpointError(
            f"{model} pools or attends in a way that other engines do not know from a plain classifier; "
            "serve it with: mistral-rerank serve"
        )
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    prompt = Template(checkpoint.config.template)
    pair_tokenizer = PairTokenizer(tokenizer, prompt, append_eos=checkpoint.config.append_eos, max_length=8192)
    ours = pair_tokenizer.encode([SAMPLE])[0].sequences[0]
    loaded = checkpoints.load_model(checkpoint, dtype=DTYPES[dtype])
    limit = min(checkpoint.config.max_length, getattr(loaded.config, "max_position_embeddings", 2**31))
    _prepare_tokenizer(tokenizer, checkpoint.config, limit)
    loaded.config.pad_token_id = tokenizer.pad_token_id

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        merged = Path(scratch) / "merged"
        loaded.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        if (early_exit := checkpoint.folder / EARLY_EXIT_FILE).is_file():
            (merged / EARLY_EXIT_FILE).parent.mkdir()
            shutil.copyfile(early_exit, merged / EARLY_EXIT_FILE)
        config = checkpoint.config.model_copy(update={"base": None})
        (merged / checkpoints.RERANK_JSON).write_text(config.model_dump_json(indent=2) + "\n", "utf-8")
        for file in merged.glob("*.safetensors"):  # they come readable by their owner alone
            file.chmod((merged / checkpoints.RERANK_JSON).stat().st_mode)
        _check(merged, ours)
        merged.rename(out)


def chat_template(template: str) -> str:
    """Give the Jinja form of a prompt template, for messages of the roles `query` and `document`.

    Everything is one expression, because what stands outside of one loses a newline at its end.

    Raises:
        SettingsError: the template is not one that `Template` takes.

    """
    roles = {"{query}": "query", "{passage}": "document"}
    pieces = [_content(roles[part]) if part in roles else _literal(part) for part in Template(template).parts if part]
    return "{{ " + " ~ ".join(pieces) + " }}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _content(role: str) -> str:
    return f'(messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first)'


def _prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: checkpoints.CheckpointConfig, max_length: int
) -> None:
    """Make a tokenizer write what `PairTokenizer` writes, when it is given the prompt's text."""
    tokenizer.chat_template = chat_template(config.template)
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if config.append_eos and tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
        _append_eos(tokenizer)
    last = tokenizer("a").input_ids[-1]
    candidates = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    harmless = [token for token in candidates if token and tokenizer.convert_tokens_to_ids(token) != last]
    if not harmless:
        raise CheckpointError(
            "the tokenizer has no special token but the end token, and transformers needs another one for padding; "
            "add a pad_token to the checkpoint's tokenizer"
        )
    tokenizer.pad_token = harmless[0]


def _append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer end every text in its end token, after what it adds already."""
    if {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs):  # transformers obeys these on loading
        tokenizer.init_kwargs["add_eos_token"] = tokenizer.add_eos_token = True
        return
    end = tokenizer.eos_token
    step = processors.TemplateProcessing(
        single=["$A:0", f"{end}:0"],
        pair=["$A:0", "$B:1", f"{end}:1"],
        special_tokens=[(end, tokenizer.eos_token_id)],
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = processors.Sequence([before, step]) if before is not None else step


def _check(folder: Path, ours: list[int]) -> None:
    """See that plain transformers, reading nothing of ours, makes our ids of a sample."""
    plain = checkpoints.load_tokenizer(checkpoints.Checkpoint(folder, checkpoints.CheckpointConfig(), None))
    messages = [{"role": role, "content": text} for role, text in zip(("query", "document"), SAMPLE, strict=True)]
    theirs = plain(plain.apply_chat_template(messages, tokenize=False)).input_ids
    if theirs != ours:
        raise CheckpointError(
            f"the exported tokenizer gives other ids than ours for a sample ({len(theirs)} and {len(ours)} of them), "
            "so other engines would score other texts; give the checkpoint a tokenizer that keeps its tokenizer.json"
        )

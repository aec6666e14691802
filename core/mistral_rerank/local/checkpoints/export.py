"""Export: a checkpoint as one plain folder for other engines, without PEFT, a separate base or this package.

The content of `rerank.json` goes where transformers and vLLM read it: the prompt becomes a chat template for a message
of the role `query` and one of the role `document`, the tokenizer adds the end token and knows the longest input, and
the padding token differs from the last token, so that transformers pools the right one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.errors import CheckpointError, MissingDependencyError, SettingsError

try:
    from tokenizers import processors

    from mistral_rerank.local.checkpoints.config import RERANK_JSON, CheckpointConfig
    from mistral_rerank.local.checkpoints.loading import Checkpoint, load_model, load_tokenizer, open_checkpoint
    from mistral_rerank.local.device import DTYPES
    from mistral_rerank.local.engine.tokenizer import PairTokenizer
    from mistral_rerank.local.model.early_exit import EARLY_EXIT_FILE
    from mistral_rerank.local.model.pooling import LAST_TOKEN
except ImportError as error:
    raise MissingDependencyError.of("local", error) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mistral_rerank.templates import Template

SAMPLE = ("Who wrote it?", "She did,\n in 1797.")
"""A pair whose ids from the exported tokenizer must equal those of `PairTokenizer`."""


def export_merged(model: str, out: Path, *, dtype: str = "bfloat16", base: str | None = None) -> None:
    """Write a checkpoint as one plain one-label classifier in safetensors, its adapter merged.

    The adapter is merged in float32 and then rounded to `dtype`; the head stays float32. `out` is written atomically.

    Args:
        model: "mini", a checkpoint folder or a hub id.
        out: the folder to write; it must not exist.
        dtype: of the backbone: "float32", "bfloat16" or "float16".
        base: under an adapter, as in `LocalReranker`.

    Raises:
        SettingsError: `out` exists, or the dtype is not one of these.
        CheckpointError: the checkpoint cannot be read, or other engines would score it differently.

    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype!r} is not one to export in; give {', '.join(map(repr, DTYPES))}")
    if out.exists() or out.is_symlink():
        raise SettingsError(f"{out} exists, and nothing is overwritten; give another folder or remove it first")
    checkpoint = open_checkpoint(model, base=base)
    config = checkpoint.config
    if config.pooling_config != LAST_TOKEN or config.head or not isinstance(config.template, str):
        raise CheckpointError(
            f"{model} pools, attends or tokenizes in a way that other engines do not know from a plain classifier; "
            "serve it with: mistral-rerank serve"
        )
    tokenizer = load_tokenizer(checkpoint)
    pair_tokenizer = PairTokenizer(
        tokenizer,
        config.prompt,
        add_special_tokens=config.add_special_tokens,
        append_eos=config.append_eos,
        max_length=8192,
    )
    ours = pair_tokenizer.encode([SAMPLE])[0].sequences[0]
    loaded = load_model(checkpoint, dtype=DTYPES[dtype])
    limit = min(config.max_length, getattr(loaded.config, "max_position_embeddings", 2**31))
    _prepare_tokenizer(tokenizer, config, limit)
    loaded.config.pad_token_id = tokenizer.pad_token_id

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        merged = Path(scratch) / "merged"
        loaded.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        if (early_exit := checkpoint.folder / EARLY_EXIT_FILE).is_file():
            (merged / EARLY_EXIT_FILE).parent.mkdir()
            shutil.copyfile(early_exit, merged / EARLY_EXIT_FILE)
        classifier = {"base": None, "true_token": None, "false_token": None, "temperature": 1.0}
        content = config.model_copy(update=classifier).model_dump_json(indent=2)
        (merged / RERANK_JSON).write_text(content + "\n", "utf-8")
        for file in merged.glob("*.safetensors"):  # they are written readable by their owner only
            file.chmod((merged / RERANK_JSON).stat().st_mode)
        _check(merged, ours)
        merged.rename(out)


def chat_template(template: Template) -> str:
    """Convert a prompt template to Jinja, for messages of the roles `query` and `document`.

    It is a single expression, because Jinja drops a newline at the end of text outside of expressions.
    """
    contents = {"{query}": _content("query"), "{passage}": _content("document")}
    contents["{instruction}"] = _literal(template.instruction or "")
    pieces = [contents.get(part) or _literal(part) for part in template.parts if part]
    return "{{ " + " ~ ".join(pieces) + " }}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _content(role: str) -> str:
    return f'(messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first)'


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: CheckpointConfig, max_length: int) -> None:
    """Make a tokenizer return the ids of `PairTokenizer` for a formatted prompt."""
    tokenizer.chat_template = chat_template(config.prompt)
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if config.append_eos and tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
        _append_eos(tokenizer)
    last = tokenizer("a").input_ids[-1]
    candidates = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    usable = [token for token in candidates if token and tokenizer.convert_tokens_to_ids(token) != last]
    if not usable:
        raise CheckpointError(
            "the tokenizer has no special token but the end token, and transformers needs another one for padding; "
            "add a pad_token to the checkpoint's tokenizer"
        )
    tokenizer.pad_token = usable[0]


def _append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer add its end token after every text and its other special tokens."""
    if {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs):  # transformers applies these on loading
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
    """Check that transformers alone makes the ids of `PairTokenizer` for a sample."""
    plain = load_tokenizer(Checkpoint(folder, CheckpointConfig(), None))
    messages = [{"role": role, "content": text} for role, text in zip(("query", "document"), SAMPLE, strict=True)]
    theirs = plain(plain.apply_chat_template(messages, tokenize=False)).input_ids
    if theirs != ours:
        raise CheckpointError(
            f"the exported tokenizer gives other ids than ours for a sample ({len(theirs)} and {len(ours)} of them), "
            "so other engines would score other texts; give the checkpoint a tokenizer that keeps its tokenizer.json"
        )

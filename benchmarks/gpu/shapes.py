"""Models with random weights in the dimensions of published ones: speed and rounding depend on shapes, not on sense."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from mistral_rerank.benchmark.bench import WORDS
from mistral_rerank.demo import FACTS
from mistral_rerank.scores import Pair


def _dimensions(
    width: int, inner: int, layers: int, heads: int, key_heads: int, head: int, words: int
) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "vocab_size": words,
    }


SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "4b": ("mistral", _dimensions(4096, 14336, 16, 32, 8, 128, 32000)),
    "llama-1b": ("llama", _dimensions(2048, 8192, 16, 32, 8, 64, 128256)),
    "qwen3-0.6b": ("qwen3", _dimensions(1024, 3072, 28, 16, 8, 128, 151936)),
    "mini": ("mistral", _dimensions(576, 1536, 16, 9, 3, 64, 49152)),
}
"""Architecture and dimensions: rerank-qa-mistral-4b, Llama-3.2-1B, Qwen3-0.6B, mini."""

TINY = _dimensions(64, 128, 3, 4, 2, 16, 2000)
"""What stands in for all of them without a GPU."""


def make_config(name: str, *, full: bool, window: int | None = None) -> Any:
    """Return transformers' config of a shape, for a one-label classifier.

    Args:
        name: of `SHAPES`.
        full: whether it has its own dimensions; otherwise `TINY`.
        window: the sliding window of a Mistral.

    """
    from transformers import AutoConfig

    kind, dimensions = SHAPES[name]
    options: dict[str, Any] = {"num_labels": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "mistral":
        options["sliding_window"] = window
    return AutoConfig.for_model(kind, **(dimensions if full else TINY), **options)


def make_classifier(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a classifier with seeded random weights on a device."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    with device:
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()


def write_checkpoint(name: str, folder: Path, device: torch.device, *, full: bool) -> None:
    """Write a checkpoint of a shape in bfloat16, with a small tokenizer that adds no special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    make_classifier(make_config(name, full=full), device, torch.bfloat16).save_pretrained(folder)
    backend = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>"]
    backend.train([str(FACTS / "corpus.jsonl")], vocab_size=2000, special_tokens=special, show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    (folder / "rerank.json").write_text(json.dumps({"append_eos": False}), "utf-8")


def passages_of(tokenizer: Any, tokens: int, *, passages: int, seed: int) -> list[Pair]:
    """Make one question of ten words with passages of so many tokens."""
    rng = random.Random(seed)
    lengths = {word: len(tokenizer.encode(f" {word}")) for word in WORDS}
    question, pairs = " ".join(rng.choices(WORDS, k=10)), []
    for _ in range(passages):
        words: list[str] = []
        while sum(lengths[word] for word in words) < tokens - max(lengths.values()):
            words.append(rng.choice(WORDS))
        pairs.append((question, " ".join(words)))
    return pairs


def make_sequences(vocabulary: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    """Make token ids: some alone, of very different lengths, and three groups with a common prefix."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    sequences = [ids(length) for length in (1, 2, 7, longest, longest // 2, longest // 2, longest // 3)]
    for prefix in (longest // 8, longest // 4, longest // 2):
        common = ids(prefix)
        sequences += [common + ids(rng.randint(1, longest - prefix)) for _ in range(5)]
    return sequences

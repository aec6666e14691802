"""What tests share and no fixture is: a stand-in reranker, a tiny configuration, the reference loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank import Pair, PassageLimits, Reranker, Score
from mistral_rerank.demo import FACTS
from mistral_rerank.reranker import Overflow

if TYPE_CHECKING:  # replicas on Ray import this module, and need no torch
    import torch
    from transformers import MistralConfig


class LengthReranker(Reranker):
    """Stands in where the model does not matter: a longer passage is better."""

    def __init__(self) -> None:
        self.calls = 0

    @property
    def model_name(self) -> str:
        return "length"

    def score_pairs(
        self,
        pairs: list[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
    ) -> list[Score]:
        self.calls += 1
        return [Score.from_logit(len(passage)) for _, passage in pairs]

    async def ascore_pairs(
        self,
        pairs: list[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
    ) -> list[Score]:
        return self.score_pairs(pairs)


class FailingReranker(LengthReranker):
    """Loads, and fails at every later call."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def ascore_pairs(
        self,
        pairs: list[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
    ) -> list[Score]:
        if pairs == [("warm", "up")]:
            return self.score_pairs(pairs)
        raise self.error


def tiny_config(vocabulary: int, **changes: object) -> MistralConfig:
    """Four query heads to one key-value head, and a window shorter than many inputs."""
    from transformers import MistralConfig

    options = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 24,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "num_labels": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return MistralConfig(**(options | changes))


def make_adapter(
    folder: Path,
    base: Path,
    number: int,
    *,
    rerank: dict[str, object] | None = None,
    layers: int | None = None,
    **lora: object,
) -> Path:
    """Write a LoRA adapter with random weights and a random head, and a calibration; `number` is the seed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(number + 1)
    keep = {} if layers is None else {"num_hidden_layers": layers}
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **keep)
    lora = {"r": 2 + number, "target_modules": ["q_proj", "v_proj"]} | lora
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **lora))
    torch.nn.init.normal_(adapted.get_base_model().score.modules_to_save["default"].weight)
    adapted.save_pretrained(folder)
    settings = {"base": {"kind": "pretrained", "layers": layers}, "calibration": {"bias": number / 4}} | (rerank or {})
    (folder / "rerank.json").write_text(json.dumps(settings))
    return folder


def plain_logits(model: torch.nn.Module, sequences: list[list[int]]) -> list[float]:
    """The reference: transformers' own classifier, one sequence at a time, no padding."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids]), use_cache=False).logits.item() for ids in sequences]


def split_facts(folder: Path) -> Path:
    """Make a copy of the example corpus whose 40 judged questions are 32 to train on and 8 to test with."""
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / name).symlink_to(FACTS / name)
    head, *rows = next((FACTS / "qrels").glob("*.tsv")).read_text().splitlines()
    for split, some in {"train": rows[:32], "test": rows[32:]}.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join([head, *some]) + "\n")
    return folder


def model_logits(model, sequences, budget=10**9):
    """Run a `RerankModel` on sequences, and give the logits in their order."""
    logits = [0.0] * len(sequences)
    for batch in model.plan(sequences, budget):
        for member, logit in zip(batch.members, model.logits(batch), strict=True):
            logits[member] = logit
    return logits

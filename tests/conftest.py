"""Tiny real models: seeded Mistral weights and a byte-level tokenizer trained on the example corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForSequenceClassification, PreTrainedTokenizerFast

from mistral_rerank import LocalReranker, Reranker, Score
from mistral_rerank.evaluation.beir import BeirDataset, load_beir
from mistral_rerank.reranker import Pair

FACTS = Path(__file__).parent.parent / "examples" / "facts"


class LengthReranker(Reranker):
    """Stands in where the model does not matter: a longer passage is better."""

    def __init__(self) -> None:
        self.calls = 0

    @property
    def model_name(self) -> str:
        return "length"

    def score_pairs(self, pairs: list[Pair]) -> list[Score]:
        self.calls += 1
        return [Score.from_logit(len(passage)) for _, passage in pairs]

    async def ascore_pairs(self, pairs: list[Pair]) -> list[Score]:
        return self.score_pairs(pairs)


@pytest.fixture
def length_reranker() -> LengthReranker:
    return LengthReranker()


@pytest.fixture(scope="session")
def facts() -> BeirDataset:
    return load_beir(FACTS)


@pytest.fixture(scope="session")
def tokenizer(facts: BeirDataset) -> PreTrainedTokenizerFast:
    """Adds <s> before a text, as Mistral's does; `pad` is not `eos`, so that plain transformers pools rightly."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>", "</s>", "<|im_end|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(facts.corpus.values(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_end|>"],
    )


def tiny_config(vocabulary: int, **changes: object) -> MistralConfig:
    """Four query heads to one key-value head, and a window shorter than many inputs."""
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole checkpoint folder without a rerank.json."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    MistralForSequenceClassification(tiny_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reranker(tiny: Path):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", batch_tokens=400) as reranker:
        yield reranker


@pytest.fixture(scope="session")
def pairs(facts: BeirDataset) -> list[Pair]:
    """Every question with seven passages, one of them empty and one seen twice."""
    texts = list(facts.corpus.values())
    made = []
    for number, query in enumerate(facts.queries.values()):
        chosen = [texts[(number * 7 + step * 11) % len(texts)] for step in range(5)]
        made += [(query, passage) for passage in [*chosen, chosen[0], ""]]
    return made


def plain_logits(model: torch.nn.Module, sequences: list[list[int]]) -> list[float]:
    """The reference: transformers' own classifier, one sequence at a time, no padding."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids]), use_cache=False).logits.item() for ids in sequences]

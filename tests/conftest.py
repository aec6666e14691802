"""Tiny real models: seeded Mistral weights and a byte-level tokenizer trained on the example corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import FACTS, LengthReranker, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralForSequenceClassification, PreTrainedTokenizerFast

from mistral_rerank import LocalReranker, Pair
from mistral_rerank.evaluation.datasets import BeirDataset, load_beir


@pytest.fixture
def length_reranker() -> LengthReranker:
    return LengthReranker()


@pytest.fixture
def device() -> torch.device:
    """CUDA where there is a card, else the CPU; tests that use it are marked `any_device`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole checkpoint folder with the defaults of rerank.json."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    MistralForSequenceClassification(tiny_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rerank.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tiny_reranker(tiny: Path):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", batch_tokens=400) as reranker:
        yield reranker


@pytest.fixture(scope="session")
def pairs(facts: BeirDataset) -> list[Pair]:
    """Every question with seven passages, one of them a single character and one seen twice."""
    texts = list(facts.corpus.values())
    made = []
    for number, query in enumerate(facts.queries.values()):
        chosen = [texts[(number * 7 + step * 11) % len(texts)] for step in range(5)]
        made += [(query, passage) for passage in [*chosen, chosen[0], "."]]
    return made

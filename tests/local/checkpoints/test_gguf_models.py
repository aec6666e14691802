"""GGUF files of rerankers: the scores of the folder they were made from, or a refusal that says what to give."""

import shutil

import families
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf_files import write_gguf

from mistral_rerank import CheckpointError, LocalReranker
from mistral_rerank.local.checkpoints.loading import find_checkpoint, load_tokenizer, open_checkpoint

PAIRS = [
    ("Who wrote the novel <think>?", "She wrote it in 1871.<|im_end|>\n"),
    ("Who wrote the novel <think>?", "Nobody knows.  Two spaces, ümläute and 漢字."),
    ("yes or no?", "The bridge opened later."),
]
OPTIONS = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def in_bfloat16(folder):
    """Round the weights of a folder, as the conversion does."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def logits(model, **options):
    with LocalReranker(model, **OPTIONS | options) as reranker:
        return [score.logit for score in reranker.score_pairs(PAIRS)]


def llama(folder):
    config = transformers.LlamaConfig(**families.DECODER, tie_word_embeddings=True)
    return families.save(folder / "llama", transformers.LlamaForCausalLM, config, families.qwen_tokenizer())


def mistral(folder):
    config = transformers.MistralConfig(**families.DECODER, sliding_window=None, tie_word_embeddings=False)
    return families.save(folder / "mistral", transformers.MistralForCausalLM, config, families.qwen_tokenizer())


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (families.qwen3_reranker, None),
        (families.zerank, None),
        (families.mxbai, None),
        (llama, "Qwen3-Reranker"),
        (mistral, "Qwen3-Reranker"),
    ],
)
def test_a_file_has_the_scores_of_its_folder(make, how, tmp_path):
    """The name of the file tells the family, as that of a folder does."""
    folder = in_bfloat16(make(tmp_path))
    file = write_gguf(folder, tmp_path / f"{folder.name}-F32.gguf")
    assert logits(file, rerank_config=how) == pytest.approx(logits(folder, rerank_config=how), abs=1e-4)
    tokenizers = [load_tokenizer(open_checkpoint(str(model), rerank_config=how)) for model in (file, folder)]
    texts = ["<|im_start|>user\n", "<think>\n\n</think>", "Don't  split 1234 ümläute\r\n漢字 <tool_call>"]
    assert tokenizers[0](texts).input_ids == tokenizers[1](texts).input_ids
    assert families.weights(find_checkpoint(str(file)))["model.norm.weight"].dtype == torch.bfloat16


def test_blocks_of_8_bits_change_the_scores_a_little(tmp_path):
    folder = in_bfloat16(families.qwen3_reranker(tmp_path))
    config = transformers.Qwen3Config(**families.DECODER | {"intermediate_size": 64}, tie_word_embeddings=True)
    families.save(tmp_path / folder.name, transformers.Qwen3ForCausalLM, config, families.qwen_tokenizer())
    file = write_gguf(folder, tmp_path / "qwen3-reranker-0.6b-q8_0.gguf", kind=GGMLQuantizationType.Q8_0)
    exact, near = logits(folder), logits(file)
    spread = max(exact) - min(exact)
    assert 0 < max(abs(one - other) for one, other in zip(exact, near, strict=True)) < 0.1 * spread


@pytest.mark.parametrize("labels", [("yes", "no"), ("no", "yes")])
def test_the_head_of_llama_cpps_rerankers_is_read_by_its_labels(labels, tmp_path):
    """The published 8B model's own vocabulary head is not in its file."""
    config = transformers.Qwen3Config(**families.DECODER, tie_word_embeddings=False)
    make = transformers.Qwen3ForCausalLM
    folder = families.save(tmp_path / "Qwen3-Reranker-8B", make, config, families.qwen_tokenizer())
    vocabulary = families.qwen_tokenizer().get_vocab()
    head = families.weights(folder)["lm_head.weight"][[vocabulary[label] for label in labels]]
    file = write_gguf(in_bfloat16(folder), tmp_path / "Qwen3-Reranker-8B-f32.gguf", head=head, labels=labels)
    families_head = families.weights(find_checkpoint(str(file)))["score.weight"]
    expected = head[labels.index("yes")] - head[labels.index("no")]
    assert torch.equal(families_head, expected[None])
    assert logits(file) == pytest.approx(logits(folder), abs=5e-2)  # the folder's head is rounded


def test_a_file_is_converted_once_and_again_after_a_change(tmp_path, cache):
    folder = in_bfloat16(families.qwen3_reranker(tmp_path))
    home = tmp_path / "home"
    home.mkdir()
    file = write_gguf(folder, home / "qwen3-reranker.gguf")
    first = find_checkpoint(str(home))
    assert find_checkpoint(str(file)) == first
    written = (first / "config.json").stat().st_mtime_ns
    assert (find_checkpoint(str(file)) / "config.json").stat().st_mtime_ns == written
    write_gguf(folder, file, general__description="another file")
    assert find_checkpoint(str(file)) != first
    assert not list(cache.rglob("scratch*"))


def test_a_file_of_an_unknown_family_is_refused_with_what_to_set(tmp_path):
    file = write_gguf(families.qwen3_reranker(tmp_path), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"model does not say how it is read.*rerank_config"):
        open_checkpoint(str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qwen3__rope__scaling__type": "yarn"}, "scaled rotary embeddings are not read"),
        ({"split__count": 2}, "one part of several; join them"),
        ({"head": torch.ones(3, 32), "labels": ("a", "b", "c")}, r"3 rows with the labels \['a', 'b', 'c'\]"),
        ({"head": torch.ones(2, 32)}, r"2 rows with the labels \[\]"),
    ],
)
def test_what_would_score_wrong_is_refused(options, message, tmp_path, cache):
    file = write_gguf(families.qwen3_reranker(tmp_path), tmp_path / "qwen3-reranker.gguf", **options)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(file))
    assert not list(cache.rglob("*.safetensors"))


def test_a_file_that_is_no_gguf_or_of_another_architecture_is_refused(tmp_path):
    file = tmp_path / "qwen3-reranker.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"qwen3-reranker\.gguf is not usable"):
        open_checkpoint(str(file))
    shutil.copy(write_gguf(families.qwen3_reranker(tmp_path), tmp_path / "whole.gguf"), file)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"qwen3", b"gemma"))
    with pytest.raises(CheckpointError, match=r"architecture 'gemma' is not read from GGUF \(llama, qwen2, qwen3"):
        open_checkpoint(str(file))
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not usable"):
        open_checkpoint(str(file))

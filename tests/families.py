"""Tiny seeded checkpoints in the layouts of published rerankers: file names, configuration keys, tokenizers, modules."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from support import FACTS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = ["yes", "no", "Yes", "No", "1", "0", "query:", "document:", "<Query>: yes", "A: B: no"] * 100
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAIR_ROLES = (
    "{%- set instruct = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first"
    " | default('Given a web search query, retrieve relevant passages that answer the query') -%}"
    "{%- set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first -%}"
    "{%- set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first -%}"
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided."
    ' Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {{ instruct }}\n'
    "<Query>: {{ query }}\n<Document>: {{ document }}<|im_end|>\n"
    "{%- if add_generation_prompt %}\n<|im_start|>assistant\n<think>\n\n</think>\n\n{{ '\n\n' }}{%- endif -%}"
)
ZERANK_ROLES = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + {'query': 'system', 'document': 'user'}[message.role] + '\n' + message.content | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}


def corpus() -> list[str]:
    lines = (FACTS / "corpus.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines] + WORDS


@cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    train(backend, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(content, normalized=False) for content in ("<think>", "</think>", "<tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072
    )


@cache
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    train(backend, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    start = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
        special_tokens=[("<|begin_of_text|>", start)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        padding_side="left",
    )


@cache
def sentencepiece_tokenizer(bos: str, *, prefix: bool) -> PreTrainedTokenizerFast:
    """As those of Llama 2 (with a space before every text) and Gemma (without)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", bos, "<unk>"]
    letters = trainers.BpeTrainer(vocab_size=900, special_tokens=special, max_token_length=8)
    train(backend, letters)
    start = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


@cache
def bert_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    train(backend, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
    )


@cache
def modernbert_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(backend, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=8192,
    )


@cache
def xlmr_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    train(backend, trainers.UnigramTrainer(vocab_size=700, special_tokens=special, unk_token="<unk>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=8192,
    )


def train(backend: Tokenizer, trainer: object) -> None:
    backend.train_from_iterator(corpus(), trainer)


def save(folder: Path, model_class: Any, config: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    model = model_class(config)
    for name, weight in model.named_parameters():  # initialization leaves biases at zero and norms at one
        if name.endswith("bias") or "norm" in name.lower():
            weight.data += torch.randn_like(weight) * 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def update_json(file: Path, **keys: Any) -> None:
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | keys), "utf-8")


def save_modules(
    folder: Path, *modules: tuple[str, dict[str, Any], dict[str, torch.Tensor]], task: str, **transformer: Any
) -> None:
    """Write modules.json and the modules after the Transformer: class, configuration and weights of each."""
    chain = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    homes = {
        "LogitScore": "cross_encoder.modules.logit_score",
        "Pooling": "sentence_transformer.modules.pooling",
        "Dense": "base.modules.dense",
        "LayerNorm": "sentence_transformer.modules.layer_norm",
    }
    for index, (name, config, weights) in enumerate(modules, 1):
        path = folder / f"{index}_{name}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(weights, path / "model.safetensors")
        kind = f"sentence_transformers.{homes[name]}.{name}"
        chain.append({"idx": index, "name": str(index), "path": path.name, "type": kind})
    (folder / "modules.json").write_text(json.dumps(chain))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"transformer_task": task, **transformer}))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps(
            {
                "__version__": {"sentence_transformers": "5.4.0"},
                "prompts": {},
                "default_prompt_name": None,
                "model_type": "CrossEncoder",
                "activation_fn": "torch.nn.modules.linear.Identity",
            }
        )
    )


def messages(output: str, **chat: Any) -> dict[str, Any]:
    """Describe a Transformer that takes messages."""
    method = {"method": "forward", "method_output_name": "logits"}
    return {
        "modality_config": {"text": method, "message": {**method, "format": "flat"}},
        "module_output_name": output,
        "processing_kwargs": {"chat_template": chat},
    }


def qwen3_reranker(folder: Path) -> Path:
    """As published before its modules: the chat template is that of Qwen3."""
    config = transformers.Qwen3Config(**DECODER, tie_word_embeddings=True)
    return save(folder / "Qwen3-Reranker-0.6B", transformers.Qwen3ForCausalLM, config, qwen_tokenizer())


def qwen3_reranker_modules(folder: Path) -> Path:
    """With modules and a chat template of the pair's roles, under any name."""
    folder = qwen3_reranker(folder).rename(folder / "any-name")
    vocabulary = qwen_tokenizer().get_vocab()
    tokens = {"true_token_id": vocabulary["yes"], "false_token_id": vocabulary["no"]}
    score = ("LogitScore", tokens, {})
    save_modules(folder, score, task="text-generation", **messages("causal_logits", add_generation_prompt=True))
    (folder / "chat_template.jinja").write_text(PAIR_ROLES)
    return folder


def qwen3_reranker_seq_cls(folder: Path) -> Path:
    """A conversion to a one-label classifier."""
    config = transformers.Qwen3Config(**DECODER, num_labels=1)
    model = transformers.Qwen3ForSequenceClassification
    return save(folder / "Qwen3-Reranker-0.6B-seq-cls", model, config, qwen_tokenizer())


def zerank(folder: Path, name: str = "zerank-1-small") -> Path:
    """As published with code of its own, which nothing here needs."""
    config = transformers.Qwen3Config(**DECODER, tie_word_embeddings=False)
    folder = save(folder / name, transformers.Qwen3ForCausalLM, config, qwen_tokenizer())
    update_json(folder / "config.json", auto_map={"AutoConfig": "modeling_zeranker.ZEConfig"})
    (folder / "modeling_zeranker.py").write_text("raise SystemExit('remote code ran')")
    return folder


def zerank_modules(folder: Path) -> Path:
    folder = zerank(folder, "zerank-2")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    score = ("LogitScore", {"true_token_id": qwen_tokenizer().get_vocab()["Yes"], "false_token_id": None}, {})
    save_modules(folder, score, task="text-generation", **messages("causal_logits", add_generation_prompt=True))
    (folder / "chat_template.jinja").write_text(ZERANK_ROLES)
    return folder


def mxbai(folder: Path) -> Path:
    sizes = {name: size for name, size in DECODER.items() if name != "head_dim"}
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
    return save(folder / "mxbai-rerank-base-v2", transformers.Qwen2ForCausalLM, config, qwen_tokenizer())


def contextual(folder: Path) -> Path:
    config = transformers.Qwen3Config(**DECODER, tie_word_embeddings=True)
    name = "ctxl-rerank-v2-instruct-multilingual-1b"
    return save(folder / name, transformers.Qwen3ForCausalLM, config, qwen_tokenizer())


def bge_gemma(folder: Path) -> Path:
    tokenizer = sentencepiece_tokenizer("<bos>", prefix=False)
    config = transformers.GemmaConfig(**DECODER, bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True)
    return save(folder / "bge-reranker-v2-gemma", transformers.GemmaForCausalLM, config, tokenizer)


def nemotron(folder: Path) -> Path:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(**DECODER, num_labels=1, rope_parameters=scaling)
    model = transformers.LlamaForSequenceClassification
    folder = save(folder / "llama-nemotron-rerank-1b-v2", model, config, llama3_tokenizer())
    update_json(
        folder / "config.json",
        model_type="llama_bidirec",
        architectures=["LlamaBidirectionalForSequenceClassification"],
        auto_map={"AutoConfig": "llama_bidirectional_model.LlamaBidirectionalConfig"},
        pooling="avg",
        temperature=0.5,
    )
    (folder / "llama_bidirectional_model.py").write_text("raise SystemExit('remote code ran')")
    return folder


def ministral3_bidirectional(folder: Path) -> Path:
    """As NeMo AutoModel names a bidirectional Ministral 3, with a head for scores."""
    config = transformers.Ministral3Config(**DECODER, num_labels=1)
    model = transformers.Ministral3ForSequenceClassification
    folder = save(folder / "any-rerank", model, config, llama3_tokenizer())
    update_json(folder / "config.json", model_type="ministral3_bidirec")
    return folder


def gemma2(folder: Path) -> Path:
    config = transformers.Gemma2Config(**DECODER, num_labels=1, attn_logit_softcapping=0.05)
    model = transformers.Gemma2ForSequenceClassification
    return save(folder / "any-gemma2", model, config, sentencepiece_tokenizer("<bos>", prefix=False))


def rankllama(folder: Path) -> Path:
    """An adapter on a base that is inside it, as the real base is gated."""
    from peft import LoraConfig, get_peft_model

    tokenizer = sentencepiece_tokenizer("<s>", prefix=True)
    sizes = {name: size for name, size in DECODER.items() if name != "num_key_value_heads"}
    config = transformers.LlamaConfig(**sizes, num_labels=1, bos_token_id=tokenizer.bos_token_id)
    base = save(folder / "base", transformers.LlamaForCausalLM, config, tokenizer)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapter = folder / "rankllama-v1-7b-lora-passage"
    get_peft_model(model, lora).save_pretrained(adapter, save_embedding_layers=False)
    update_json(adapter / "adapter_config.json", base_model_name_or_path="base")
    base.rename(adapter / "base")
    return adapter


def minilm(folder: Path) -> Path:
    config = transformers.BertConfig(**SMALL, num_labels=1, max_position_embeddings=512)
    return save(folder / "ms-marco-MiniLM-L6-v2", transformers.BertForSequenceClassification, config, bert_tokenizer())


def bge_m3(folder: Path) -> Path:
    config = transformers.XLMRobertaConfig(**SMALL, num_labels=1, max_position_embeddings=514, type_vocab_size=1)
    model = transformers.XLMRobertaForSequenceClassification
    return save(folder / "bge-reranker-v2-m3", model, config, xlmr_tokenizer())


def modernbert_config(**keys: Any) -> transformers.ModernBertConfig:
    return transformers.ModernBertConfig(
        **SMALL, **keys, max_position_embeddings=512, local_attention=16, cls_token_id=2, sep_token_id=3
    )


def gte_modernbert(folder: Path) -> Path:
    config = modernbert_config(num_labels=1, classifier_pooling="mean")
    model = transformers.ModernBertForSequenceClassification
    return save(folder / "gte-reranker-modernbert-base", model, config, modernbert_tokenizer())


def granite(folder: Path) -> Path:
    config = modernbert_config(num_labels=1, classifier_pooling="cls")
    model = transformers.ModernBertForSequenceClassification
    return save(folder / "granite-embedding-reranker-english-r2", model, config, modernbert_tokenizer())


def ettin(folder: Path) -> Path:
    """A backbone with a head of three modules."""
    tokenizer = modernbert_tokenizer()
    folder = save(folder / "ettin-reranker-17m-v1", transformers.ModernBertModel, modernbert_config(), tokenizer)
    torch.manual_seed(1)
    dense = {
        "in_features": 32,
        "out_features": 32,
        "bias": False,
        "activation_function": "torch.nn.modules.activation.GELU",
    }
    last = {
        "in_features": 32,
        "out_features": 1,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_output_name": "scores",
    }
    save_modules(
        folder,
        ("Pooling", {"embedding_dimension": 32, "pooling_mode": "cls"}, {}),
        ("Dense", dense, {"linear.weight": torch.randn(32, 32)}),
        ("LayerNorm", {"dimension": 32}, {"norm.weight": torch.rand(32), "norm.bias": torch.randn(32)}),
        ("Dense", last, {"linear.weight": torch.randn(1, 32), "linear.bias": torch.randn(1)}),
        task="feature-extraction",
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Qwen3-Reranker": qwen3_reranker,
    "Qwen3-Reranker with modules": qwen3_reranker_modules,
    "Qwen3-Reranker seq-cls": qwen3_reranker_seq_cls,
    "zerank": zerank,
    "zerank with modules": zerank_modules,
    "mxbai-rerank-v2": mxbai,
    "ctxl-rerank-v2": contextual,
    "bge-reranker-v2-gemma": bge_gemma,
    "llama-nemotron-rerank": nemotron,
    "RankLLaMA": rankllama,
    "ms-marco-MiniLM": minilm,
    "bge-reranker-v2-m3": bge_m3,
    "gte-modernbert": gte_modernbert,
    "granite": granite,
    "ettin": ettin,
}


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)

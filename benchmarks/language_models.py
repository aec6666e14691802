"""Compare with sentence-transformers on a language model of the shape of Qwen3-Reranker-0.6B, with random weights.

Both score the same pairs in the same dtype, in alternating rounds, with the same chat template and LogitScore.
sentence-transformers runs with its defaults: batches of 32 pairs, sorted by length. The tokenizer has one token for
each word of the workloads, as Qwen's has. It writes 2.4 GB (float32) to a temporary folder.

python benchmarks/language_models.py [nq instruction] [--layers 28] [--passages 16] [--dtype auto] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAMES = {"true": "yes", "false": "no"}
INSTRUCTION = " ".join(["Prefer passages that answer the question in full, and from the primary source."] * 4)
WORKLOADS = {"nq": ("nq", None), "instruction": ("hotpotqa", INSTRUCTION)}
"""The shape of the texts, and the instruction, whose 61 tokens are part of the prefix of every pair."""
TEMPLATE = (
    "{%- set system = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first"
    " | default('Given a web search query, retrieve relevant passages that answer the query') -%}"
    "{%- set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first -%}"
    "{%- set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first -%}"
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {{ system }}\n'
    "<Query>: {{ query }}\n<Document>: {{ document }}<|im_end|>\n"
    "{%- if add_generation_prompt %}\n<|im_start|>assistant\n<think>\n\n</think>\n\n{{ '\n\n' }}{%- endif -%}"
)


def write_checkpoint(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """Write random weights, a small tokenizer, and the modules of sentence-transformers."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from mistral_rerank.benchmark.bench import WORDS

    backend = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    words = " ".join(["", *sorted(set(WORDS))])
    backend.train_from_iterator([words, TEMPLATE, INSTRUCTION] * 20, vocab_size=4000, special_tokens=special)
    backend.add_tokens(["yes", "no"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192
    )
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in NAMES.items()}
    modules = "base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore"
    chain = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{module}"}
        for index, (path, module) in enumerate(zip(("", "1_LogitScore"), modules, strict=True))
    ]
    method = {"method": "forward", "method_output_name": "logits"}
    settings = {
        "transformer_task": "text-generation",
        "modality_config": {"text": method, "message": {**method, "format": "flat"}},
        "module_output_name": "causal_logits",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }
    (folder / "1_LogitScore").mkdir()
    for name, content in (
        ("modules.json", chain),
        ("1_LogitScore/config.json", tokens),
        ("sentence_bert_config.json", settings),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder", "prompts": {}}),
    ):
        (folder / name).write_text(json.dumps(content), "utf-8")


def main() -> None:
    """Print pairs per second of both, on each workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--passages", type=int, default=16, help="of one question")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import sentence_transformers
    import torch
    from sentence_transformers import CrossEncoder

    from mistral_rerank import open_reranker
    from mistral_rerank.benchmark.bench import SHAPES, make_pairs
    from mistral_rerank.local.device import pick_dtype

    dtype = pick_dtype(options.dtype, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "qwen3-shape"
        write_checkpoint(folder, options.layers, dtype)
        theirs = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": dtype})
        ours = open_reranker(folder, device="cpu", dtype=options.dtype)
        print(
            f"torch {torch.__version__}, sentence-transformers {sentence_transformers.__version__}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads, {options.layers} layers in {dtype}"
        )
        print("| workload | sentence-transformers | this package | ratio of each round | largest difference |")
        print("|---|--:|--:|--:|--:|")
        for name in options.workloads:
            shape, instruction = WORKLOADS[name]
            pairs = make_pairs(SHAPES[shape], questions=1, passages=options.passages)
            ours.warmup()
            times = []
            for _ in range(options.rounds):
                start = time.perf_counter()
                expected = theirs.predict(
                    pairs, prompt=instruction, activation_fn=torch.nn.Identity(), show_progress_bar=False
                )
                middle = time.perf_counter()
                scores = ours.score_pairs(pairs, instruction=instruction)
                times.append((middle - start, time.perf_counter() - middle))
            rates = [f"{len(pairs) / statistics.median(seconds):.2f} pairs/s" for seconds in zip(*times, strict=True)]
            ratios = " ".join(f"{slow / fast:.2f}" for slow, fast in times)
            difference = max(abs(score.logit - logit) for score, logit in zip(scores, expected.tolist(), strict=True))
            print(f"| {name} | {' | '.join(rates)} | {ratios} | {difference:.1e} |", flush=True)
        ours.close()


if __name__ == "__main__":
    main()

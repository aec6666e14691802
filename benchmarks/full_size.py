"""Load and score with the full dimensions of the design: 4096 wide, 16 layers, 32 heads, 8 key-value heads.

The weights are random: this measures memory and speed, not quality. It writes 7 GB to a temporary folder.

python benchmarks/full_size.py [--layers 16] [--pairs 8] [--quantization nf4]
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from mistral_rerank.demo import FACTS


def run_apart(target: Callable[..., None], *arguments: object, **options: object) -> None:
    """Call a function in a process of its own: its memory must not count."""
    process = get_context("spawn").Process(target=target, args=arguments, kwargs=options)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed")


def write_checkpoint(folder: str, dtype: str = "bfloat16", **shape: int) -> None:
    """Write random weights and a small tokenizer; what `shape` does not say is as in Mistral-7B."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import MistralConfig, MistralForSequenceClassification, PreTrainedTokenizerFast

    config = MistralConfig(num_labels=1, sliding_window=4096, pad_token_id=0, **shape)
    torch.set_default_dtype(getattr(torch, dtype))
    MistralForSequenceClassification(config).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)
    backend = ByteLevelBPETokenizer()
    backend.train([str(FACTS / "corpus.jsonl")], vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    Path(folder, "rerank.json").write_text("{}", "utf-8")  # the defaults


def memory_gib(which: str = "VmHWM") -> float:
    """Give the resident memory of this process, the largest so far ("VmHWM") or that of now ("VmRSS")."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith(which)]
    return int(line.split()[1]) / 2**20


def main() -> None:
    """Print load time, speed and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    import torch
    import transformers

    from mistral_rerank import open_reranker
    from mistral_rerank.evaluation.datasets import load_beir

    facts = load_beir(FACTS)
    passages = list(facts.corpus.values())[: options.pairs]
    with tempfile.TemporaryDirectory() as scratch:
        run_apart(write_checkpoint, scratch, num_hidden_layers=options.layers)
        weights = sum(file.stat().st_size for file in Path(scratch).glob("*.safetensors")) / 2**30
        before = memory_gib()
        settings = {"device": "cpu", "dtype": "bfloat16", "quantization": options.quantization}
        with open_reranker(scratch, **settings) as reranker:
            start = time.perf_counter()
            reranker.score_pairs([("warm", "up")])
            loaded, peak_of_load = time.perf_counter() - start, memory_gib()
            start = time.perf_counter()
            scores = reranker.score_pairs([("Why does bread rise?", passage) for passage in passages])
            seconds = time.perf_counter() - start
            now = memory_gib("VmRSS")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    print(f"weights {weights:.2f} GiB; loaded in {loaded:.1f} s; {len(scores) / seconds:.2f} pairs/s")
    print(f"before the model {before:.2f} GiB; at most {peak_of_load:.2f} while loading, {memory_gib():.2f} in all")
    print(f"after scoring {now:.2f} GiB: {now - before:.2f} of the model")


if __name__ == "__main__":
    main()

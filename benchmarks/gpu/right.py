"""Stage 1: correctness on this device.

Every path scores the same sequences with the same weights: packed rows with flash attention, packed rows with one call
for each span, padded rows, and a plain loop of transformers. Each is compared with that loop in float32. Then the tests
that run on any device, host synchronizations of a forward, both adapters, and the server under 64 clients.
"""

import copy
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results import Stage
from shapes import make_classifier, make_config, make_sequences, write_checkpoint
from stages import REPOSITORY

from mistral_rerank.local.model import rerank_model
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.flash_attention import FlashAttention, passes_self_check
from mistral_rerank.local.model.rerank_model import RerankModel

TIMES_THE_LOOP = 2.0
"""A path passes if its error is at most so many times the plain loop's, both against the loop in float32."""
BATCH_TOKENS = 16384


def plain_logits(classifier: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Score with transformers' own classifier, one sequence at a time: float32 on the CPU."""
    device = classifier.device
    with torch.inference_mode():
        logits = [
            classifier.score(
                classifier.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False)
                .last_hidden_state[0, -1]
                .to(classifier.score.weight.dtype)
            )
            for ids in sequences
        ]
    return torch.cat(logits).float().cpu()


def open_model(classifier: Any, device: torch.device, attention: type | None) -> RerankModel:
    """Open a copy of a classifier, with one attention for packed rows, or padded."""
    taken = copy.deepcopy(classifier)
    model = RerankModel(taken.base_model, taken.score, device, packed=attention is not None)
    if attention is not None and model._packed is not None:
        model._packed._attention = attention
    return model


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in the Euclidean norm; NaN is infinite."""
    found = float((logits - expected).norm() / expected.norm())
    return found if found == found else float("inf")


def parity(stage: Stage, name: str, window: int | None) -> None:
    """Compare all paths in bfloat16 and float16 with the loop in float32."""
    config = make_config(name, full=stage.full, window=window)
    sequences = make_sequences(config.vocab_size, longest=512 if stage.full else 96)
    original = make_classifier(config, stage.device, torch.float32)
    expected = plain_logits(original, sequences)
    for dtype in (torch.bfloat16, torch.float16):
        title = f"{name}, window {window}, {str(dtype).removeprefix('torch.')}"
        with stage.results.check(f"parity: {title}") as entry:
            classifier = copy.deepcopy(original)
            for parameter in classifier.base_model.parameters():  # buffers stay: rotary frequencies are float32
                parameter.data = parameter.data.to(dtype)
            heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
            flash = passes_self_check(*heads, stage.device, dtype)
            paths = {"padded": None, "spans": SpanAttention} | ({"flash": FlashAttention} if flash else {})
            errors = {"loop": error(plain_logits(classifier, sequences), expected)}
            for path, attention in paths.items():
                model = open_model(classifier, stage.device, attention)
                logits = torch.zeros(len(sequences))
                for batch in model.plan(sequences, BATCH_TOKENS):
                    logits[list(batch.members)] = torch.tensor(model.logits(batch))
                errors[path] = error(logits, expected)
                del model
            entry |= {path: float(f"{found:.2g}") for path, found in errors.items()}
            entry["ok"] = max(errors.values()) <= TIMES_THE_LOOP * errors["loop"] + 1e-4
            if not flash:
                entry["flash"] = "no kernel"
                entry["ok"] &= stage.device.type != "cuda"


def synchronizations(stage: Stage) -> None:
    """Count how often one forward waits for the card; neither layers nor sequences may add to it."""
    counts = {}
    attention = FlashAttention if stage.device.type == "cuda" else SpanAttention
    for layers, repeats in ((2, 1), (4, 1), (2, 3)):
        config = make_config("mini", full=stage.full)
        config.num_hidden_layers = layers
        model = open_model(make_classifier(config, stage.device, torch.bfloat16), stage.device, attention)
        sequences = [ids for seed in range(repeats) for ids in make_sequences(2000, longest=64, seed=seed)]
        (batch,) = model.plan(sequences, BATCH_TOKENS)
        model.logits(batch)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            if stage.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                model.logits(batch)
            finally:
                if stage.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        counts[layers, repeats] = sum("synchroniz" in str(wait.message) for wait in waits)
    with stage.results.check("synchronizations of a forward") as entry:
        entry |= {f"{layers} layers, {22 * repeats} sequences": count for (layers, repeats), count in counts.items()}
        entry["ok"] = len(set(counts.values())) == 1


def run_command(command: list[str], environment: Mapping[str, str], *, seconds: float) -> tuple[int, str]:
    """Run a command, print its output, and return its exit code and output; after `seconds` it is told to end."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        output += f"\nnot done after {seconds:.0f} s"
    print(output[-4000:])
    return process.returncode, output


def device_tests(stage: Stage) -> None:
    """Run the tests that are marked for any device, from the files that have such tests."""
    with stage.results.check("tests of any device") as entry:
        tests = sorted((REPOSITORY / "tests" / "local").rglob("test_*.py"))
        files = [str(test) for test in tests if "mark.any_device" in test.read_text("utf-8")]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "any_device", "-p", "pytest_asyncio.plugin"]
        command += ["-p", "no:cacheprovider", *files]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        code, output = run_command(command, environment, seconds=stage.seconds_left / 2)
        entry |= {"ok": code == 0, "summary": "".join(output.strip().splitlines()[-1:])[:200]}


def adapters(stage: Stage, folder: str) -> None:
    """Rerank through both adapters."""
    query, passages = "why does bread rise", [f"passage {number} about bread and yeast" for number in range(20)]
    options = {"model": folder, "backend": "local", "device": str(stage.device), "top_n": 3}
    with stage.results.check("LangChain adapter") as entry:
        from langchain_core.documents import Document

        from langchain_mistral_rerank import MistralRerank

        documents = [Document(page_content=text) for text in passages]
        entry["documents"] = len(MistralRerank(**options).compress_documents(documents, query))
        entry["ok"] = entry["documents"] == 3
    with stage.results.check("LlamaIndex adapter") as entry:
        from llama_index.core.schema import NodeWithScore, TextNode

        from llama_index_mistral_rerank import MistralRerank as NodeRerank

        nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in passages]
        entry["nodes"] = len(NodeRerank(**options).postprocess_nodes(nodes, query_str=query))
        entry["ok"] = entry["nodes"] == 3


def server(stage: Stage, folder: str) -> None:
    """Put the server under 64 clients, whose replies are compared with scores outside of it."""
    with stage.results.check("server under 64 clients") as entry:
        requests = "1000" if stage.full else "60"
        script = REPOSITORY / "benchmarks" / "server_load.py"
        command = [sys.executable, str(script), "--model", folder, "--device", str(stage.device), "--packed"]
        command += ["--requests", requests, "--tolerance", "0.05"]
        code, output = run_command(command, os.environ, seconds=max(5, stage.seconds_left - 8))
        speeds = re.findall(r"([\d.]+) requests/s; p50 (\d+) ms, p95 (\d+) ms", output)
        entry |= {"ok": code == 0, "requests/s, p50 ms, p95 ms": [" ".join(speed) for speed in speeds]}


def main() -> None:
    """Run all checks, the most telling ones first."""
    stage = Stage("right")
    rerank_model.PACKED_ON_CUDA = True
    with stage.results.check("machine") as entry:
        import transformers

        entry |= {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(stage.device)}
        if stage.full:
            properties = torch.cuda.get_device_properties(stage.device)
            entry |= {"card": properties.name, "GiB": round(properties.total_memory / 2**30, 1)}
            entry["multiprocessors"] = properties.multi_processor_count
    for name in ("mini", "4b"):
        for window in (None, 128 if stage.full else 24):
            stage.attempt(parity, name, window)
    stage.attempt(synchronizations)
    device_tests(stage)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint("mini", Path(folder), stage.device, full=stage.full)
        adapters(stage, folder)
        server(stage, folder)


if __name__ == "__main__":
    main()

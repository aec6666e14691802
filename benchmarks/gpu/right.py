"""Stage 1: correctness on this device.

Every path scores the same sequences with the same weights: packed rows with flash attention, packed rows with one call
for each span, padded rows, and a plain loop of transformers. Each is compared with that loop in float32. Then the tests
that run on any device, host synchronizations of a forward, the server under 64 clients, and transformers' own forward
in float32 with a sliding window, which had a wrong token on an H200.
"""

import contextlib
import copy
import itertools
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

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
    counts, texts = {}, set[str]()
    attention = FlashAttention if stage.device.type == "cuda" else SpanAttention
    for layers, repeats in ((2, 1), (4, 1), (2, 3)):
        config = make_config("mini", full=stage.full)
        config.num_hidden_layers = layers
        model = open_model(make_classifier(config, stage.device, torch.bfloat16), stage.device, attention)
        sequences = [ids for seed in range(repeats) for ids in make_sequences(2000, longest=64, seed=seed)]
        (batch,) = model.plan(sequences, BATCH_TOKENS)
        for _ in range(2):  # the first forwards wait while libraries start
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
        messages = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message)]
        counts[layers, repeats], texts = len(messages), texts | set(messages)
    with stage.results.check("synchronizations of a forward") as entry:
        entry |= {f"{layers} layers, {22 * repeats} sequences": count for (layers, repeats), count in counts.items()}
        entry["warnings"] = sorted(text[:200] for text in texts)
        entry["ok"] = len(set(counts.values())) == 1


def window_in_float32(stage: Stage) -> None:
    """Compare our padded rows in float32 with the CPU's; record by length where PyTorch and transformers differ.

    On an H200 (PyTorch 2.11), the last of 129 tokens was wrong with a window of 24. The kernels of
    `scaled_dot_product_attention` are compared with float64, to tell a kernel from its mask.
    """
    lengths, wrong = (100, 127, 128, 129, 130, 136, 137, 145, 257) if stage.full else (24, 33), {}
    with stage.results.check("float32 with a sliding window") as entry, torch.inference_mode():
        for length, backend in itertools.product(lengths, (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)):
            query, key, value = torch.randn(3, 2, 4, length, 16, device=stage.device).unbind()
            order = torch.arange(length, device=stage.device)
            mask = (order <= order[:, None]) & (order > order[:, None] - 24)
            expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
            for name, expanded in (("expanded", mask.expand(2, 1, -1, -1)), ("copied", mask.repeat(2, 1, 1, 1))):
                with contextlib.suppress(RuntimeError), sdpa_kernel(backend):  # no such kernel for this device
                    states = scaled_dot_product_attention(query, key, value, attn_mask=expanded)
                    differs = (states - expected).abs().amax((0, 1, 3)) > 1e-3
                    if differs.any():
                        wrong[f"{backend.name}, {name} mask, {length}"] = differs.nonzero().flatten().tolist()[:4]
        config = make_config("mini", full=False, window=24)
        classifier = make_classifier(config, torch.device("cpu"), torch.float32)
        moved = copy.deepcopy(classifier).to(stage.device)
        for name, length, rows in itertools.product(("sdpa", "eager"), lengths, (1, 2, 7)):
            moved.base_model.set_attn_implementation(name)
            ids = torch.randint(3, 500, (rows, length))
            expected = classifier.base_model(input_ids=ids).last_hidden_state
            states = moved.base_model(input_ids=ids.to(stage.device)).last_hidden_state.cpu()
            differs = (states - expected).abs().amax((0, 2)) > 1e-2
            if differs.any():
                wrong[f"transformers, {name}, {rows} x {length}"] = differs.nonzero().flatten().tolist()[:4]
        ours = open_model(classifier, stage.device, None)
        for length in lengths:
            sequences = torch.randint(3, 500, (2, length)).tolist()
            (batch,) = ours.plan(sequences, BATCH_TOKENS)
            expected = plain_logits(classifier, [sequences[member] for member in batch.members])
            if error(torch.tensor(ours.logits(batch)), expected) > 1e-3:
                entry["ok"] = False
                wrong[f"our padded rows, {length}"] = []
        entry["wrong tokens"] = "; ".join(f"{case}: {tokens}" for case, tokens in wrong.items()) or "none"
        entry["tf32"] = torch.backends.cuda.matmul.allow_tf32


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


def server(stage: Stage, folder: str) -> None:
    """Put the server under 64 clients, whose replies are compared with scores outside of it."""
    with stage.results.check("server under 64 clients") as entry:
        requests = "1000" if stage.full else "60"
        script = REPOSITORY / "benchmarks" / "server_load.py"
        command = [sys.executable, str(script), "--model", folder, "--device", str(stage.device)]
        command += ["--requests", requests, "--tolerance", "0.05"]
        code, output = run_command(command, os.environ, seconds=max(5, stage.seconds_left - 8))
        speeds = re.findall(r"([\d.]+) requests/s; p50 (\d+) ms, p95 (\d+) ms", output)
        entry |= {"ok": code == 0, "requests/s, p50 ms, p95 ms": [" ".join(speed) for speed in speeds]}


def main() -> None:
    """Run all checks, the most telling ones first."""
    stage = Stage("right")
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
    stage.attempt(window_in_float32)
    device_tests(stage)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint("mini", Path(folder), stage.device, full=stage.full)
        server(stage, folder)


if __name__ == "__main__":
    main()

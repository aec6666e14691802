"""`bench`: measure the speed of a model on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mistral_rerank.cli.options import MODEL_OPTIONS, app, stderr, with_settings
from mistral_rerank.cli.terminal import Terminal
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from mistral_rerank.benchmark.bench import Report


@app.command()
@with_settings("reranker", RerankSettings, *MODEL_OPTIONS, "cascade_depth")
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
    table = Table("workload", "pairs", "pairs/s", "tokens/s", "computed/real", "of peak", box=None)
    for baseline in report.rows[0].against:
        table.add_column(f"x {baseline.name}")
        table.add_column("tau")
        table.add_column("max diff")
    for row in report.rows:
        share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
        cells = [row.workload, str(row.pairs), f"{row.pairs_per_second:.1f}", f"{row.tokens_per_second:.0f}"]
        cells += [f"{row.computed:.2f}", share]
        for baseline in row.against:
            cells += [
                f"{baseline.times_as_fast:.2f}",
                f"{baseline.kendall_tau:.3f}",
                f"{baseline.largest_difference:.2g}",
            ]
        table.add_row(*cells)
    console.print(table)
    for size, (median, p95) in report.latency.items():
        console.print(f"{size} passages: p50 {median * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms")
    if report.peak_memory is not None:
        console.print(f"peak memory: {report.peak_memory / 2**30:.2f} GiB")

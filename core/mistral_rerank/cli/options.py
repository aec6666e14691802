"""The application, and what its commands share: options from settings, progress bars."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import wraps
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mistral_rerank.cli.terminal import Terminal, printable
from mistral_rerank.errors import MissingDependencyError
from mistral_rerank.settings import ENV_PREFIX, RerankSettings, read_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from rich.progress import TaskID

    from mistral_rerank.evaluation.evaluate import Notify

    Command = Callable[..., None]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take "[default: 50]" for markup, and cut long names of options
)
stderr = Terminal(stderr=True)

MODEL_OPTIONS = "model", "base", "device", "dtype", "quantization"
"""Options of commands that run a checkpoint on this machine."""
RERANKER_OPTIONS = (
    *("model", "base", "rerank_config", "backend", "base_url", "protocol", "device", "dtype", "quantization"),
    *("cascade_depth", "max_length", "overflow", "instruction"),
)
CONSTRAINTS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a missing module into an error that names the extra of the command."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(extra, error) from error


def with_settings(parameter: str, settings: type[BaseModel], *names: str) -> Callable[[Command], Command]:
    """Give a command one option for each of the named fields of a settings class, or for all of them.

    An option's type, help, default and limits are those of its field. The settings class checks the values, so that
    its error names the option. The parameter of the command receives the options that are given, as a dict; the
    others are left to the environment and to the defaults.
    """
    options = [_option(name, settings.model_fields[name]) for name in names or settings.model_fields]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            chosen = {option.name: values.pop(option.name) for option in options}
            command(**values, **{parameter: {name: value for name, value in chosen.items() if value is not None}})

        signature = inspect.signature(command, eval_str=True)
        others = (each for name, each in signature.parameters.items() if name != parameter)
        parameters = [*others, *options]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """Make the command line parameter of a settings field."""
    kind: Any = field.annotation
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    notes = []
    if kind is ByteSize:
        kind = str
    if get_origin(kind) is Literal:
        notes.append("|".join(get_args(kind)))
        kind = str
    elif get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    required = field.is_required()
    if not required and not any(field.default is unset for unset in (None, False, ())):
        notes.append(f"default: {field.default}")
    limits = [(sign, getattr(limit, key, None)) for limit in field.metadata for key, sign in CONSTRAINTS.items()]
    notes.append(", ".join(f"x{sign}{limit}" for sign, limit in limits if limit is not None))
    shown = "; ".join(filter(None, notes))
    option = typer.Option(help=f"{field.description}  [{shown}]" if shown else field.description)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, option],
    )


with_reranker = with_settings("reranker", RerankSettings, *RERANKER_OPTIONS)
"""Gives a command the options of a reranker."""


def recorded_settings(reranker: dict[str, Any]) -> dict[str, Any]:
    """Give a reranker's settings from options and the environment, without the model, to be stored with results."""
    chosen = read_environment(ENV_PREFIX, RERANKER_OPTIONS) | reranker
    return {name: value for name, value in chosen.items() if name != "model"}


def encoder_device(reranker: dict[str, Any]) -> str | None:
    """Give the device of an embedding model beside the reranker; None for the best available."""
    device: str | None = reranker.get("device")
    return None if device == "auto" else device


def progress_bar(*, rate: bool = False) -> Progress:
    """Make a progress bar, which is shown only on a terminal; `rate` adds the steps per second and the time left."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    further = (_RateColumn(), TimeRemainingColumn()) if rate else ()
    return Progress(*columns, *further, console=stderr, disable=not stderr.is_terminal)


class _RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s")


@contextmanager
def progress_bars() -> Iterator[Notify]:
    """Show one progress bar for each step; the step's name starts it."""
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def notify(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(printable(step), total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield notify

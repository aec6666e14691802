"""`mistral-rerank COMMAND`: parses, calls and prints; what it calls is in the other modules."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

# each module adds its commands, in the order of the help
from mistral_rerank.cli import demo, ranking, training, quality, models  # isort: skip
from mistral_rerank.cli.options import app
from mistral_rerank.cli.terminal import PrintableFormatter, printable
from mistral_rerank.errors import RerankError
from mistral_rerank.settings import describe

__all__ = ["app", "demo", "main", "models", "quality", "ranking", "training"]


@app.callback()
def root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say what is loaded and what is cut")] = False,
) -> None:
    """Rerank passages with a Mistral-architecture cross-encoder."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def main() -> None:
    """Run the command line; errors of the user's making end in one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to end
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
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; the README says which extra brings it, mistral-rerank[all] does")
    except ValidationError as error:
        _fail(describe(error))
    except UnicodeDecodeError as error:
        _fail(f"the input is not UTF-8 text ({error.reason} at byte {error.start}); convert it first")


def _fail(message: str) -> None:
    print(f"mistral-rerank: {printable(message)}", file=sys.stderr)  # noqa: T201
    sys.exit(1)

"""Markdown extension of the docs site: reference that is written from the code when the site is built.

::: settings MODULE.CLASS       a table of the settings of a pydantic class, with their environment variables
::: command-line                the commands, arguments and options of `mistral-rerank`
"""

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args, get_origin

import typer
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from mistral_rerank.cli import app
from mistral_rerank.settings import ENV_PREFIX

if TYPE_CHECKING:
    from pydantic import BaseModel


def settings_table(name: str) -> list[str]:
    """Give the lines of a table: one row for each field of the class `MODULE.CLASS`."""
    module, _, class_name = name.rpartition(".")
    settings: type[BaseModel] = getattr(import_module(module), class_name)
    prefix = getattr(settings, "env_prefix", ENV_PREFIX)
    rows = [
        f"| `{field_name}`<br>`{prefix}{field_name.upper()}` | {_default(field)} | {_meaning(field)} |"
        for field_name, field in settings.model_fields.items()
    ]
    return ["| setting and environment variable | default | meaning |", "|---|---|---|", *rows]


def command_line() -> list[str]:
    """Give the help of all commands as Markdown; each has a heading, so their list, which is shortened, is left out."""
    command = typer.main.get_command(app)
    help_text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="mistral-rerank")
    general, _, commands = help_text.partition("**Commands**")
    return [*general.splitlines()[1:], *commands[commands.index("## ") :].splitlines()]


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"{default:,}" if isinstance(default, (int, float)) else f"`{default}`" if default else ""


def _meaning(field: FieldInfo) -> str:
    words = (field.description or "").split("`")  # every second one is code
    words[::2] = [re.sub(r"([\[\]{}*_|])", r"\\\1", word).replace("<", "&lt;") for word in words[::2]]
    choices = [f"`{choice}`" for choice in _choices(field.annotation)]
    return "`".join(words) + (f" ({', '.join(choices)})" if choices else "")


def _choices(annotation: Any) -> list[str]:
    """Give the strings of all `Literal`s in an annotation."""
    if isinstance(annotation, str):
        return [annotation]
    return [choice for part in get_args(annotation) for choice in _choices(part)] if get_origin(annotation) else []


class Generated(Preprocessor):
    """Replaces the lines that begin with `:::`; other such lines are mkdocstrings'."""

    def run(self, lines: list[str]) -> list[str]:
        """Give the lines of a page with the generated ones in place."""
        written = []
        for line in lines:
            if line.startswith("::: settings "):
                written += settings_table(line.removeprefix("::: settings ").strip())
            elif line == "::: command-line":
                written += command_line()
            else:
                written.append(line)
        return written


class GeneratedReference(Extension):
    """Registers `Generated` before fenced code is read."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Add the preprocessor; superfences has priority 25."""
        md.preprocessors.register(Generated(md), "generated", 40)


def makeExtension(**options: Any) -> GeneratedReference:  # noqa: N802
    """Make the extension, as Python-Markdown asks a module for it."""
    return GeneratedReference(**options)

"""Options of the command line are made from the fields of settings classes."""

from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from mistral_rerank.cli import app
from mistral_rerank.cli.options import with_settings
from mistral_rerank.evaluation.workspace import EvaluationSettings
from mistral_rerank.training.settings import TrainSettings


class Settings(BaseModel):
    data: tuple[Path, ...] = Field(min_length=1, description="folders")
    depth: int | None = Field(None, ge=1, description="depth; default: all")
    share: float = Field(0.5, ge=0, lt=1, description="share")
    seed: int = Field(0, description="seed")
    kind: Literal["one", "two"] | None = Field(None, description="kind")
    strict: bool = Field(False, description="strictness")


@pytest.fixture
def called():
    calls: list[tuple[int, dict[str, Any]]] = []
    command = typer.Typer(rich_markup_mode=None)

    @command.command()
    @with_settings("settings", Settings)
    def run(number: int, settings: dict[str, Any]) -> None:
        calls.append((number, settings))

    def call(*arguments: str) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
        return CliRunner().invoke(command, arguments, env={"COLUMNS": "200"}).output, calls

    return call


def test_given_options_arrive_with_their_types(called):
    _, calls = called("7", "--data", "a", "--data", "b", "--share", "0.25", "--kind", "two", "--no-strict")
    given = {"data": [Path("a"), Path("b")], "share": 0.25, "kind": "two", "strict": False}
    assert calls == [(7, given)]


def test_options_that_are_not_given_are_left_to_the_settings(called):
    _, calls = called("7", "--data", "a")
    assert calls == [(7, {"data": [Path("a")]})]


@pytest.mark.parametrize(
    "line",
    [
        "folders  [required]",
        "depth; default: all  [x>=1]",
        "share  [default: 0.5; x>=0, x<1]",
        "seed  [default: 0]",
        "kind  [one|two]",
    ],
)
def test_help_shows_defaults_choices_and_limits(called, line):
    text, _ = called("--help")
    assert line in " ".join(text.split(" ")).replace("\n", " ")


@pytest.mark.parametrize(("command", "settings"), [("train", TrainSettings), ("evaluate", EvaluationSettings)])
def test_every_setting_of_a_command_has_an_option(command, settings):
    text = CliRunner().invoke(app, [command, "--help"]).output
    for name in settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text

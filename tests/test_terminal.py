"""What passages and file names may not do to a terminal."""

import io
import json

import pytest
from command import assert_refused, run

from mistral_rerank.cli.terminal import Terminal, json_line, printable

HOSTILE = "a\x1b[2J\x9b31m\x07\x7f\u202eb\u2066c"
ESCAPED = r"a\x1b[2J\x9b31m\x07\x7f\u202eb\u2066c"
ORDINARY = "caf\u00e9 \u65e5\u672c \U0001f469\u200d\U0001f4bb \u05e9\u05dc\u05d5\u05dd\u200f \u0645\u0631\u062d\u0628\u0627 tab\t\nline"


def test_control_characters_are_shown_escaped_and_ordinary_text_as_it_is():
    assert printable(HOSTILE) == ESCAPED
    assert printable(ORDINARY) == ORDINARY


def test_a_console_shows_strings_and_nothing_else():
    from rich.table import Table

    written = io.StringIO()
    console = Terminal(file=written, width=200)
    table = Table("passage", box=None)
    table.add_row(HOSTILE + " [bold]x[/bold] :warning:")
    console.print(table)
    console.print("[red]wrote[/red] " + HOSTILE)
    lines = [line.strip() for line in written.getvalue().splitlines()]
    assert lines == ["passage", ESCAPED + " [bold]x[/bold] :warning:", "[red]wrote[/red] " + ESCAPED]


def test_json_is_safe_to_print_and_reads_back_unchanged():
    record = {"text": HOSTILE + ORDINARY + "\ud83d\u2028"}
    line = json_line(record)
    assert json.loads(line) == record
    assert printable(line) == line
    assert len(line.splitlines()) == 1


def test_json_stays_json_where_standard_output_is_not_utf_8(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="backslashreplace"))
    assert json_line({"text": "caf\u00e9 \u65e5"}) == '{"text": "caf\\u00e9 \\u65e5"}'


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_rank_prints_no_control_characters(tiny, tmp_path, arguments):
    (tmp_path / "a.txt").write_text("x\x1b[31mred\u202e\n", "utf-8")
    on_tiny = "--model", tiny, "--device", "cpu", "--dtype", "float32"
    process = run("rank", "who?", tmp_path / "a.txt", *arguments, *on_tiny)
    assert (process.returncode, process.stderr) == (0, "")
    assert printable(process.stdout) == process.stdout
    assert "[31mred" in process.stdout


def test_a_file_name_in_an_error_is_escaped(tmp_path):
    (tmp_path / "\x1b[31m.pdf").write_bytes(b"%PDF-")
    assert_refused(run("rank", "who?", tmp_path / "\x1b[31m.pdf"), r"\x1b[31m.pdf: .pdf files are not read")

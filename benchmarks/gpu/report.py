"""Markdown tables of the results that stages have written.

python benchmarks/gpu/report.py DIR [DIR ...]
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages import STAGES


def read(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Read the results of a stage; empty if there are none."""
    file = folder / f"{stage}.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else []


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Make a table of rows that have the same columns."""
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|" + "---|" * len(rows[0])
    for row in rows:
        yield "| " + " | ".join(map(str, row.values())) + " |"


def tables(results: list[dict[str, Any]]) -> Iterator[str]:
    """Make one table of all checks, then one for each check that has measured several things, with a row for each."""
    checks, measured = [], {}
    for result in results:
        rows = {key: value for key, value in result.items() if isinstance(value, dict)}
        values = [f"{key} {value}" for key, value in result.items() if key not in {"name", "ok", "seconds", *rows}]
        passed = "yes" if result["ok"] else "**no**"
        checks.append({"check": result["name"], "passed": passed, "s": result["seconds"], "values": "; ".join(values)})
        if rows:
            measured[result["name"]] = [{"": key, **value} for key, value in rows.items()]
    if checks:
        yield from table(checks)
    for name, rows in measured.items():
        yield f"\n{name}\n"
        yield from table(rows)


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        for stage in STAGES:
            if results := read(folder, stage.name):
                print(f"\n### {stage.name}\n", *tables(results), sep="\n")

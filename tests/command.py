"""The command as its users run it: a process of its own."""

import multiprocessing
import os
import subprocess
import sys
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

COMMAND = Path(sys.executable).parent / "mistral-rerank"
MAIN = "from mistral_rerank.cli import main; main()"
SECONDS = 300
IMPORTED = [
    "mistral_rerank.cli",
    "mistral_rerank.benchmark.bench",
    "mistral_rerank.evaluation.report",
    "mistral_rerank.training.finetune",
    "mistral_rerank.training.mining",
    "bm25s",
    "matplotlib.figure",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.mistral.modeling_mistral",
    "transformers.trainer",
]


def assert_refused(found: subprocess.CompletedProcess[str], hint: str) -> None:
    """A failure is one line that helps, without a traceback, and nothing on stdout."""
    assert found.returncode == 1
    assert hint in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""


def run_installed(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a new interpreter, which takes some seconds to import torch."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False, timeout=SECONDS
    )


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process forked from one that has imported torch already."""
    return run_code(MAIN, *arguments, stdin=stdin)


def run_code(code: str, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code in such a process, as `python -c` does; where nothing can fork, in a new interpreter."""
    argv = [str(COMMAND), *map(str, arguments)]
    if not hasattr(os, "fork"):
        command = [sys.executable, "-c", code, *argv[1:]]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=SECONDS)
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for file, content in zip(files, (stdin or "", "", ""), strict=True):
            file.write_text(content, "utf-8")
        process = _fork_server().Process(target=_execute, args=(code, argv, files, dict(os.environ), Path.cwd()))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, SECONDS)
        stdout, stderr = (file.read_text("utf-8") for file in files[1:])
        return subprocess.CompletedProcess(argv, process.exitcode, stdout, stderr)


@cache
def _fork_server() -> BaseContext:
    """Start a process of one thread, whose forks inherit its modules."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, HF_HUB_DISABLE_PROGRESS_BARS="1"):  # the command sets it before it imports anything
        forkserver.ensure_running()
    return context


def _execute(code: str, argv: list[str], files: list[Path], environment: dict[str, str], folder: Path) -> None:
    """Execute the code with files as the standard streams, down to the file descriptors."""
    for number, file in enumerate(files):
        descriptor = os.open(file, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    exec(code, {"__name__": "__main__"})

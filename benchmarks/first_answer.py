"""Print commands, keystrokes, download and time from a new virtual environment to the first reranked answer.

Each way has a new virtual environment and empty caches. torch is at hand, from the environment --torch, and is not
counted. pip downloads everything again. Keystrokes are the characters of the commands and of the program, with line
ends. CPU and wall seconds are those of pip and of the program. A row ends with the answer, or with the error that came
instead, such as that of a model hub which is not reached. The endpoint is on loopback, takes any key, and ranks by
length.

python benchmarks/first_answer.py dist/*.whl --torch VENV
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from endpoint import endpoint

ANSWER = "Water expands as it freezes, so a block of ice is less dense than the liquid around it."
TEXTS = f"""
question = "Why does ice float on water?"
passages = [
    "Warm water freezes into ice more slowly than cold water.",
    "Icebergs break off glaciers and drift with the current.",
    "{ANSWER}",
    "Ice skates have blades of steel.",
]
"""
DOCUMENTS = "documents = [Document(text) for text in passages]\n"
KEY = "nvapi-" + 64 * "0"
TIMEOUT = 400


@dataclass(frozen=True)
class Way:
    """What a user types; `PACKAGE` in a command is the wheel, which a user types as a dot.

    Attributes:
        name: of the row.
        commands: typed before the program runs.
        imports: first lines of the program.
        lines: last lines of the program.
        needs: what else must be at hand.

    """

    name: str
    commands: tuple[str, ...]
    imports: str
    lines: str
    needs: str

    @property
    def program(self) -> str:
        """The program that ranks four passages."""
        return self.imports + TEXTS + self.lines

    @property
    def typed(self) -> str:
        """All that is typed."""
        return "\n".join([*self.commands, self.program, "python answer.py", ""]).replace("PACKAGE", ".")


LANGCHAIN = "from langchain_core.documents import Document\n"
SCORED = '    print(document.metadata["relevance_score"], document.page_content)\n'
WAYS = (
    Way(
        "mistral-rerank, mini",
        ("pip install 'PACKAGE[local]'",),
        "from mistral_rerank import open_reranker\n",
        "for passage in open_reranker().rank(question, passages, top_n=2):\n"
        "    print(passage.score.probability, passage.text)\n",
        "torch",
    ),
    Way(
        "mistral-rerank, LangChain, endpoint",
        ("pip install 'PACKAGE[langchain]'", "export MISTRAL_RERANK_BACKEND=remote", f"export NVIDIA_API_KEY={KEY}"),
        LANGCHAIN + "from langchain_mistral_rerank import MistralRerank\n",
        DOCUMENTS + "for document in MistralRerank(top_n=2).compress_documents(documents, question):\n" + SCORED,
        "an account and a key, or a server",
    ),
    Way(
        "NVIDIARerank, LangChain",
        ("pip install langchain-nvidia-ai-endpoints", f"export NVIDIA_API_KEY={KEY}"),
        LANGCHAIN + "from langchain_nvidia_ai_endpoints import NVIDIARerank\n",
        DOCUMENTS + "for document in NVIDIARerank(top_n=2).compress_documents(documents, question):\n" + SCORED,
        "an account and a key, or a server",
    ),
    Way(
        "SentenceTransformerRerank, LlamaIndex",
        ("pip install llama-index-core llama-index-postprocessor-sbert-rerank sentence-transformers",),
        "from llama_index.core.schema import NodeWithScore, TextNode\n"
        "from llama_index.postprocessor.sbert_rerank import SentenceTransformerRerank\n",
        "nodes = [NodeWithScore(node=TextNode(text=text)) for text in passages]\n"
        "for node in SentenceTransformerRerank(top_n=2).postprocess_nodes(nodes, query_str=question):\n"
        "    print(node.score, node.text)\n",
        "torch, a model hub",
    ),
    Way(
        "FlashrankRerank, LangChain",
        ("pip install flashrank langchain-community",),
        LANGCHAIN + "from langchain_community.document_compressors import FlashrankRerank\n",
        DOCUMENTS + "for document in FlashrankRerank(top_n=2).compress_documents(documents, question):\n" + SCORED,
        "a model hub",
    ),
)


def timed(
    command: list[str], folder: str, variables: dict[str, str]
) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Run a process; give its CPU seconds, its wall seconds, and its result."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=variables, check=False, capture_output=True, text=True, timeout=TIMEOUT
    )
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return cpu, wall, done


def megabytes(output: str) -> float:
    """Sum the sizes that pip or mini prints, and those of local wheels."""
    sizes = re.findall(r"(?:Downloading|fetching) \S+ \(([\d.]+) ?([kM]?B)\)", output)
    local = [Path(file).stat().st_size / 1e6 for file in re.findall(r"^Processing (/\S+\.whl)", output, flags=re.M)]
    return sum(float(size) * {"MB": 1, "kB": 1e-3, "B": 1e-6}[unit] for size, unit in sizes) + sum(local)


def row(way: Way, wheel: Path, torch: Path, url: str) -> str:
    """Go one way to its end and give its row of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        venv = Path(scratch, "venv")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        (site,) = venv.glob("lib/python*/site-packages")
        if "torch" in way.needs:
            (shared,) = torch.resolve().glob("lib/python*/site-packages")
            (site / "torch.pth").write_text(f"{shared}\n", "utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": scratch,
            "MISTRAL_RERANK_CACHE": str(Path(scratch, "cache")),
            "HF_HUB_OFFLINE": "1",  # the hub is not reached: its error comes at once
            "NVIDIA_BASE_URL": url,
            "MISTRAL_RERANK_BASE_URL": url.removesuffix("/v1"),
            "PIP_NO_CACHE_DIR": "1",
        }
        cpu = wall = size = 0.0
        for command in way.commands:
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                environment[name] = value
                continue
            line = command.replace("PACKAGE", str(wheel))
            spent, took, done = timed(["sh", "-c", line], scratch, environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            cpu, wall, size = cpu + spent, wall + took, size + megabytes(done.stdout)
        Path(scratch, "answer.py").write_text(way.program, "utf-8")
        spent, took, done = timed(["python", "answer.py"], scratch, environment)
        size += megabytes(done.stderr)
        answered = done.returncode == 0 and ANSWER in done.stdout.splitlines()[0]
        figures = f"{size:.0f} | {cpu:.0f} + {spent:.0f} | {wall:.0f} + {took:.0f}"
        error = (done.stderr.strip().splitlines() or ["another passage first"])[-1].replace("|", " ")
        ending = "the answer, first" if answered else error
        return f"| {way.name} | {len(way.commands) + 1} | {len(way.typed)} | {figures} | {way.needs} | {ending} |"


def main() -> None:
    """Print the table, then the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", type=Path, required=True, help="a virtual environment with nothing but torch")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    print("| way | commands | keystrokes | download, MB | CPU s | wall s | needs | ends with |")
    print("|---|--:|--:|--:|--:|--:|---|---|", flush=True)
    with endpoint() as url:
        for way in WAYS:
            print(row(way, options.wheel.resolve(), options.torch, url), flush=True)
    for way in WAYS:
        print(f"\n{way.name}:\n\n" + "".join(f"    {line}\n" for line in way.typed.splitlines()), end="")


if __name__ == "__main__":
    main()

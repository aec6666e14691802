"""Install a wheel with each extra alone, in a new virtual environment for each Python, and use what the extra is for.

Needs uv on the PATH. mini's base is read from the usual cache.

make release
python benchmarks/extras.py dist/*.whl --python python3.11 --python python3.12 [--extra serve] [--find-links FOLDER]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = "torch==2.13.0"
ENDPOINT = """
import json
import httpx
from mistral_rerank.remote.reranker import RemoteReranker
def reply(request):
    count = len(json.loads(request.content)["passages"])
    return httpx.Response(200, json={"rankings": [{"index": index, "logit": index} for index in range(count)]})
transport = httpx.MockTransport(reply)
reranker = RemoteReranker(base_url="http://nim:8000", protocol="nvidia", transport=transport)
"""
RANK = "mistral-rerank rank 'Why does bread rise?' passages.txt --device cpu --json"
TRAIN = "mistral-rerank train --init mini --data {facts} --max-queries 2 --max-length 48 --negatives 1 --out out"
USES = {
    "": ENDPOINT + "assert [passage.index for passage in reranker.rank('q', ['a', 'b'])] == [1, 0]",
    "socks": "import httpx; httpx.Client(proxy='socks5://127.0.0.1:1').close()",
    "langchain": ENDPOINT
    + """
from langchain_core.documents import Document
from langchain_mistral_rerank import MistralRerank
found = MistralRerank(reranker=reranker).compress_documents([Document("a"), Document("b")], "q")
assert [document.page_content for document in found] == ["b", "a"]
""",
    "llama-index": ENDPOINT
    + """
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_mistral_rerank import MistralRerank
nodes = [NodeWithScore(node=TextNode(text=text)) for text in "ab"]
assert [node.text for node in MistralRerank(reranker=reranker).postprocess_nodes(nodes, query_str="q")] == ["b", "a"]
""",
    "eval": ENDPOINT
    + """
from pathlib import Path
from mistral_rerank.evaluation.evaluate import evaluate
from mistral_rerank.evaluation.workspace import EvaluationSettings
from mistral_rerank.demo import FACTS
settings = EvaluationSettings(data=(FACTS,), queries=2, top_k=2, questions_at_once=1)
evaluate(reranker, settings, Path("results"), reranker_settings={})
assert Path("results", "report.html").is_file()
""",
    "dense": "from sentence_transformers import SentenceTransformer; import mistral_rerank.evaluation.encoders",
    "serve": ENDPOINT
    + """
from mistral_rerank.server.app import create_app
assert "/v1/rerank" in create_app(reranker).openapi()["paths"]
""",
    "mcp": "mistral-rerank mcp --backend remote --base-url http://nim:8000 </dev/null",
    "cluster": "import mistral_rerank.offline.run, mistral_rerank.server.cluster",
    "docs": "import mkdocstrings, zensical",
    "local": RANK,
    "nf4": f"{RANK} --quantization nf4",
    "train": TRAIN,
    "qlora": f"{TRAIN} --four-bit --device cpu",
    "all": RANK,
}
"""What is run for each extra: a command line, or Python code."""


def outcome(wheel: Path, python: str, extra: str, find_links: str | None) -> tuple[bool, str]:
    """Install and use one extra; give whether it works, and the last line of the output if not."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch, "venv")
        links = ["--find-links", find_links] if find_links else []
        install = ["uv", "pip", "install", "--quiet", *links, "--python", str(environment)]
        torch = [TORCH] if extra in ("local", "nf4", "train", "qlora", "dense", "all") else []
        named = f"{wheel}[{extra}]" if extra else str(wheel)
        code = USES[extra]
        Path(scratch, "passages.txt").write_text("Paris is in France.\nYeast makes bread rise.\n", "utf-8")
        find = [str(environment / "bin" / "python"), "-c", "from mistral_rerank.demo import FACTS; print(FACTS)"]
        steps = [["uv", "venv", "--quiet", "--python", python, str(environment)], [*install, *torch, named]]
        variables = os.environ | {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        variables.pop("PYTHONPATH", None)
        for step in steps:
            done = subprocess.run(step, cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                return False, done.stderr.strip()
        if code.startswith("mistral-rerank"):
            facts = subprocess.run(find, capture_output=True, text=True, check=True, env=variables).stdout.strip()
            use = ["sh", "-c", code.format(facts=facts)]
        else:
            use = [str(environment / "bin" / "python"), "-c", code]
        done = subprocess.run(use, cwd=scratch, capture_output=True, text=True, check=False, env=variables)
        return done.returncode == 0, (done.stderr.strip().splitlines() or [""])[-1]


def main() -> None:
    """Print a row for each extra."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", required=True, help="an interpreter; repeatable")
    parser.add_argument("--extra", action="append", help="only this extra; repeatable")
    parser.add_argument("--find-links", help="a folder of wheels, such as torch's for CPUs")
    options = parser.parse_args()
    failed = False
    print(f"{options.wheel.name}\n| extra | {' | '.join(options.python)} |\n|---|{'---|' * len(options.python)}")
    for extra in options.extra or USES:
        cells = []
        for python in options.python:
            works, error = outcome(options.wheel.resolve(), python, extra, options.find_links)
            cells.append("works" if works else re.sub(r"[|\n]", " ", error))
            failed |= not works
        print(f"| {extra or 'none'} | {' | '.join(cells)} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

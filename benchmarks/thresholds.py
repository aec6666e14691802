"""How many right and wrong passages a `min_score` keeps outside the training domains: questions about Python.

Passages are the first 400 characters of docstrings, candidates BM25's first ten. Prints a table.

pip install '.[local,eval]'; python benchmarks/thresholds.py [MODEL]
"""

import importlib
import inspect
import platform
import sys

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.first_stage import BM25

MODULES = ("shutil", "os.path", "json", "random", "textwrap", "heapq", "functools", "statistics", "calendar")
QUESTIONS = {
    "How can I copy a whole directory with everything in it?": "shutil.copytree",
    "How do I find out how much free disk space is left?": "shutil.disk_usage",
    "How do I find where a program is installed?": "shutil.which",
    "How do I delete a folder that is not empty?": "shutil.rmtree",
    "How do I turn a Python object into a JSON string?": "json.dumps",
    "How do I read JSON from an open file?": "json.load",
    "How can I get the extension of a file name?": "os.path.splitext",
    "What is the longest directory prefix that several paths share?": "os.path.commonpath",
    "How do I remove common leading whitespace from a multi-line string?": "textwrap.dedent",
    "How do I cut a long text so that it fits a width, with dots at the end?": "textwrap.shorten",
    "How do I get the smallest item from a heap?": "heapq.heappop",
    "How do I combine several sorted inputs into one sorted output?": "heapq.merge",
    "How do I keep the results of a function so that it is not computed again?": "functools.lru_cache",
    "How do I fix some arguments of a function in advance?": "functools.partial",
    "What is the middle value of a list of numbers?": "statistics.median",
    "How do I find the most common value in data?": "statistics.mode",
    "How do I check whether a year is a leap year?": "calendar.isleap",
}


def docstrings() -> dict[str, str]:
    """Give the docstring of each public function and class, by its name."""
    texts = {}
    for module in map(importlib.import_module, MODULES):
        name = "os.path" if module.__name__ in {"posixpath", "ntpath"} else module.__name__
        for attribute in module.__all__:
            text = inspect.getdoc(getattr(module, attribute))
            if text and callable(getattr(module, attribute)):
                texts[f"{name}.{attribute}"] = text[:400]
    return texts


def main() -> None:
    """Print the table."""
    passages = docstrings()
    candidates = BM25(passages).search(list(QUESTIONS), k=10)
    right, wrong = [], []
    with open_reranker(*sys.argv[1:2]) as reranker:
        for (question, answer), ranking in zip(QUESTIONS.items(), candidates, strict=True):
            names = [name for name, _ in ranking]
            for ranked in reranker.rank(question, [passages[name] for name in names]):
                (right if names[ranked.index] == answer else wrong).append(ranked.score.probability)
        name = reranker.model_name
    print(f"{name}, Python {platform.python_version()}: {len(QUESTIONS)} questions, {len(passages)} passages")
    print(f"min_score  right passages kept (of {len(right)})  wrong passages kept (of {len(wrong)})")
    for threshold in (0.6361, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02):
        counts = [sum(probability >= threshold for probability in values) for values in (right, wrong)]
        print(f"{threshold:9.2f}  {counts[0]:26}  {counts[1]:26}")


if __name__ == "__main__":
    main()

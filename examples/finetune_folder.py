"""Fine-tune mini on a folder of your own documents, and compare it with mini on headings that it was not trained on.

pip install '.[train]'
python examples/finetune_folder.py [FOLDER] [--data my-data] [--out my-reranker]

Each heading of the Markdown files in FOLDER is a question, and the text under it the passage that answers it. Real
questions of your users are better: replace those in the BEIR folder that this script writes, and give the folder to
`mistral-rerank train`. Without FOLDER, the handbook below is used, which is far too small for a gain.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.training.finetune import finetune
from mistral_rerank.training.settings import TrainSettings

HANDBOOK = """
# How to descale the coffee machine
Fill the tank with one bag of descaler and a litre of water. Start the programme "clean" and rinse twice.
# What the blinking tank light means
The water tank is empty or not pushed in far enough.
# Why the coffee is too weak
The beans are ground too coarsely. Turn the grinder one step towards fine while it runs.
# How to froth milk
Put the tube into cold milk, open the steam valve and close it when the milk has doubled.
# What to do when the grinder is blocked
Switch the machine off, remove the beans and take the stone out of the grinder.
# How often the seals are replaced
The rubber rings of the brewing unit wear out and are replaced once a year.
"""
HELD_OUT = 5
"""Every fifth heading is kept for the comparison."""


def sections(markdown: str) -> list[tuple[str, str]]:
    """Split a document into headings and the texts under them; headings without a text are left out."""
    _, *parts = re.split(r"^#+ +(.+)$", markdown, flags=re.MULTILINE)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [(heading.strip(), " ".join(text.split())) for heading, text in pairs if text.strip()]


def write_beir(pairs: list[tuple[str, str]], folder: Path) -> None:
    """Write headings as questions and texts as passages, with a split to train on and one to test with."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", [heading for heading, _ in pairs]), ("corpus", [text for _, text in pairs])):
        lines = [json.dumps({"_id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    for split, held_out in (("train", False), ("test", True)):
        rows = [f"{n}\t{n}\t1\n" for n in range(len(pairs)) if (n % HELD_OUT == HELD_OUT - 1) == held_out]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), "utf-8")


def reciprocal_rank(model: str, data: Path) -> float:
    """Rerank BM25's ten passages for the test questions; give the mean reciprocal rank of the right ones."""
    dataset = load_beir(data, split="test")
    rankings = BM25(dataset.corpus).search(list(dataset.queries.values()), k=10)
    ranks: list[float] = []
    with open_reranker(model) as reranker:
        for (query_id, query), found in zip(dataset.queries.items(), rankings, strict=True):
            names = [name for name, _ in found]
            order = [names[place.index] for place in reranker.rank(query, [dataset.corpus[name] for name in names])]
            ranks.append(sum(1 / (1 + order.index(name)) for name in dataset.positives(query_id) if name in order))
    return mean(ranks)


def main() -> None:
    """Train, compare, and say what to do next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder with Markdown files; default: the handbook")
    parser.add_argument("--data", type=Path, default=Path("my-data"), help="the BEIR folder to write")
    parser.add_argument("--out", type=Path, default=Path("my-reranker"), help="the checkpoint folder to write")
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.md")) if options.folder else []
    documents = [file.read_text("utf-8") for file in files] if options.folder else [HANDBOOK]
    pairs = [pair for document in documents for pair in sections(document)]
    write_beir(pairs, options.data)
    settings = TrainSettings(
        data=(options.data,),
        init="mini",
        max_length=256,
        learning_rate=2e-4,
        negatives=3,
        random_negatives=0,
        groups_per_step=2,
        groups_per_forward=1,
    )
    finetune(settings, options.out)
    before, after = (reciprocal_rank(model, options.data) for model in ("mini", str(options.out)))
    print(f"trained on the headings of {len(pairs)} sections, but every fifth, which are the test:")
    print(f"mean reciprocal rank of the right section: {before:.2f} with mini, {after:.2f} with {options.out}")
    print(
        f"evaluate it: mistral-rerank evaluate --data {options.data} --split test --model {options.out} --out results"
    )
    print(f"use it: MistralRerank(model={str(options.out)!r}), or mistral-rerank rank --model {options.out}")


if __name__ == "__main__":
    main()

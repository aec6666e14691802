"""Print how often the highlighted sentence of a passage holds the answer to the question.

python benchmarks/highlight.py SQUAD.json [--model mini] [--questions 200]

The file has SQuAD's format, such as xquad.en.json of https://github.com/google-deepmind/xquad.
"""

import argparse
import json
import random
from pathlib import Path

from mistral_rerank import open_reranker
from mistral_rerank.sentences import sentence_spans


def read_squad(file: Path) -> list[tuple[str, str, list[str]]]:
    """Give (question, passage, answers) of every question that its passage answers."""
    return [
        (question["question"], paragraph["context"], [answer["text"] for answer in question["answers"]])
        for article in json.loads(file.read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
        if any(answer["text"] in paragraph["context"] for answer in question["answers"])
    ]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    examples = read_squad(options.file)
    examples = random.Random(0).sample(examples, min(options.questions, len(examples)))

    def share(parts: list[str]) -> float:
        held = [
            any(answer in part for answer in answers) for part, (_, _, answers) in zip(parts, examples, strict=True)
        ]
        return sum(held) / len(held)

    marked = []
    with open_reranker(options.model) as reranker:
        for question, passage, _ in examples:
            (span,) = reranker.highlight(question, [passage])
            marked.append("" if span is None else passage[slice(*span)])
    first = [passage[slice(*sentence_spans(passage)[0])] for _, passage, _ in examples]
    sentences = sum(len(sentence_spans(passage)) for _, passage, _ in examples) / len(examples)
    print(f"{len(examples)} questions, {sentences:.1f} sentences a passage; the answer is in")
    print(f"the sentence that {options.model} marks: {share(marked):.1%}; the first sentence: {share(first):.1%}")


if __name__ == "__main__":
    main()

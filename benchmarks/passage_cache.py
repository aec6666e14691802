"""Prints what a passage cache saves: questions over a small corpus, each with BM25's best passages, on a CPU.

All variants have the same weights and score the same pairs, question by question in turn; the order changes with each
round. `warm` has every passage of the corpus in its cache, `cold` none: its cache is emptied before every question.

python benchmarks/passage_cache.py DATA [--questions 50] [--passages 300] [--top 20] [--rounds 5]

DATA is a folder in BEIR's layout, such as core/mistral_rerank/demo/facts. With --pairs it compares the scores of so
many pairs with and without the cache instead.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mistral_rerank.benchmark.baselines import Baseline, Ours, SentenceTransformers
from mistral_rerank.benchmark.timing import kendall_tau
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.reranker import LocalReranker
from mistral_rerank.scores import Pair


def load(folder: Path, questions: int, passages: int) -> tuple[list[str], dict[str, str]]:
    """Give the first questions, and a corpus of their relevant passages and others."""
    data = load_beir(folder)
    chosen = list(data.queries)[:questions]
    relevant = [passage for query in chosen for passage in data.qrels.get(query, {}) if passage in data.corpus]
    ids = list(dict.fromkeys([*relevant, *data.corpus]))[:passages]
    return [data.queries[query] for query in chosen], {passage: data.corpus[passage] for passage in ids}


def best(corpus: dict[str, str], questions: Sequence[str], top: int) -> list[list[Pair]]:
    """Give the pairs of each question with BM25's best passages, filled up with others."""
    calls = []
    for question, ranking in zip(questions, BM25(corpus).search(questions, k=top), strict=True):
        ids = list(dict.fromkeys([*(passage for passage, _ in ranking), *corpus]))[:top]
        calls.append([(question, corpus[passage]) for passage in ids])
    return calls


OTHERS = ["cold", "sentence-transformers"]


class Cold:
    """A reranker whose passage cache is empty before every call."""

    name = "cold"

    def __init__(self, reranker: LocalReranker) -> None:
        self._reranker, self._ours = reranker, Ours(reranker)

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Baseline.score`."""
        assert self._reranker._prefixes is not None
        self._reranker._prefixes.clear()
        return self._ours.score(pairs)


def measure(variants: Sequence[Baseline], calls: Sequence[Sequence[Pair]], rounds: int) -> dict[str, list[list[float]]]:
    """Give the seconds of every call in each round, by variant."""
    seconds: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for times in seconds.values():
            times.append([])
        for position, call in enumerate(calls):
            first = (number + position) % len(variants)
            for variant in [*variants[first:], *variants[:first]]:
                start = time.perf_counter()
                variant.score(call)
                seconds[variant.name][-1].append(time.perf_counter() - start)
        print(f"round {number + 1}:", *(f"{name} {sum(rounds[-1]):.2f} s" for name, rounds in seconds.items()))
    return seconds


def print_times(seconds: dict[str, list[list[float]]], reference: str) -> None:
    """Print totals, median latencies, and both as ratios: the median over rounds."""
    print(f"{'variant':24}{'total s':>9}{'p50 ms':>9}{'times as fast as without':>26}{'p50':>7}")
    for name, rounds in seconds.items():
        totals, medians = [sum(times) for times in rounds], [statistics.median(times) for times in rounds]
        ratios = [sum(without) / sum(times) for times, without in zip(rounds, seconds[reference], strict=True)]
        latency = [
            statistics.median(without) / statistics.median(times)
            for times, without in zip(rounds, seconds[reference], strict=True)
        ]
        print(
            f"{name:24}{statistics.median(totals):9.2f}{1000 * statistics.median(medians):9.1f}"
            f"{statistics.median(ratios):26.2f}{statistics.median(latency):7.2f}"
        )


def compare_scores(
    without: LocalReranker, cached: LocalReranker, questions: Sequence[str], corpus: Sequence[str], pairs: int
) -> None:
    """Print the largest difference of scores with a warm cache and without one, and Kendall's tau of each question."""
    depth = -(-pairs // len(questions))
    differences, taus = [], []
    for question in questions:
        call = [(question, passage) for passage in corpus[:depth]]
        cached.score_pairs(call)
        logits = [[score.logit for score in reranker.score_pairs(call)] for reranker in (cached, without)]
        differences += [abs(a - b) for a, b in zip(*logits, strict=True)]
        taus.append(kendall_tau(*logits))
    print(f"{len(differences)} pairs: largest difference {max(differences):.2g}, lowest Kendall tau {min(taus):.5f}")


def main() -> None:
    """Measure, or compare scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--passages", type=int, default=300)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", default="4GiB")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--against", nargs="*", choices=OTHERS, default=OTHERS, help="beside `without` and `warm`")
    options = parser.parse_args()
    questions, corpus = load(options.data, options.questions, options.passages)

    def reranker(cache: str = "0") -> LocalReranker:
        return LocalReranker("mini", device="cpu", dtype=options.dtype, passage_cache=cache)

    without, warm = reranker(), reranker(options.cache)
    print(f"mini on a CPU in {warm.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.pairs:
        compare_scores(without, warm, questions, list(corpus.values()), options.pairs)
        return
    calls = best(corpus, questions, options.top)
    variants: list[Baseline] = [Ours(without, name="without"), Ours(warm, name="warm")]
    if "cold" in options.against:
        variants.append(Cold(reranker(options.cache)))
    if "sentence-transformers" in options.against:
        with tempfile.TemporaryDirectory() as scratch:
            export_merged("mini", Path(scratch) / "merged", dtype=str(warm.dtype).removeprefix("torch."))
            variants.append(SentenceTransformers(Path(scratch) / "merged", warm.dtype, torch.device("cpu")))
    used = list(dict.fromkeys(passage for call in calls for _, passage in call))
    warm.score_pairs([(questions[0], passage) for passage in used])
    for variant in variants:
        variant.score(calls[0][:4])
    print(f"{len(questions)} questions with {options.top} of {len(corpus)} passages, {options.rounds} rounds")
    print_times(measure(variants, calls, options.rounds), "without")
    print(warm.passage_cache_info())


if __name__ == "__main__":
    main()

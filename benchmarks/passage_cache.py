"""Prints what a passage cache saves and costs: questions with BM25's best passages of a small corpus, mini on a CPU.

python benchmarks/passage_cache.py total DATA      50 questions, 20 passages each, beside sentence-transformers
python benchmarks/passage_cache.py latency DATA    a question with 20 and with 100 known passages
python benchmarks/passage_cache.py scores DATA     10,000 pairs with and without the cache
python benchmarks/passage_cache.py memory DATA     10,000 different short passages in 256 MiB
python benchmarks/passage_cache.py prepared DATA   2,000 passages on disk, in a new process

DATA is a folder in BEIR's layout. All variants have the same weights and dtype, and score the same pairs, one question
after another; the order of the variants changes with each question. --cpu-time counts CPU seconds of one thread instead
of wall seconds, for a machine with other work.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from full_size import memory_gib

from mistral_rerank.benchmark.baselines import Baseline, Ours, SentenceTransformers
from mistral_rerank.benchmark.timing import kendall_tau
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.reranker import LocalReranker
from mistral_rerank.reranker import Observer
from mistral_rerank.scores import Pair

PASSAGES, TOP, DEEP = 300, 20, 100
CACHE, BOUND = "8GiB", "256MiB"
ROUNDS = 5
EVERY = 5
"""sentence-transformers, the slowest, scores every fifth question."""

clock = time.perf_counter


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


def mini(passage_cache: str = "0", **options: str) -> LocalReranker:
    """Open mini on the CPU."""
    return LocalReranker("mini", device="cpu", passage_cache=passage_cache, **options)  # type: ignore[arg-type]


def seconds(variant: Baseline, call: Sequence[Pair]) -> float:
    """Time a call; `cold` begins with an empty cache."""
    if isinstance(variant, Cold):
        variant.clear()
    start = clock()
    variant.score(call)
    return clock() - start


class Cold(Ours):
    """A reranker whose passage cache is empty before every call."""

    def __init__(self, reranker: LocalReranker) -> None:
        super().__init__(reranker, name="cold")
        assert reranker._prefixes is not None
        self.clear = reranker._prefixes.clear


def alternating(
    variants: Sequence[Baseline], calls: Sequence[Sequence[Pair]], start: int = 0
) -> dict[str, list[float]]:
    """Give the seconds of every call by variant; the order changes with each call, and begins at `start`."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for position, call in enumerate(calls, start):
        first = position % len(variants)
        for variant in [*variants[first:], *variants[:first]]:
            times[variant.name].append(seconds(variant, call))
    return times


def read_all(reranker: LocalReranker, calls: Sequence[Sequence[Pair]]) -> None:
    """Score every passage of some calls once, so that it is cached."""
    reranker.score_pairs(
        [("?", passage) for passage in dict.fromkeys(passage for call in calls for _, passage in call)]
    )


def total(folder: Path, number: int = 50) -> None:
    """Print the seconds of many questions; each round has a fifth of them."""
    questions, corpus = load(folder, number, PASSAGES)
    calls = best(corpus, questions, TOP)
    without, warm = mini(), mini(CACHE)
    ours: list[Baseline] = [Ours(without, name="without"), Ours(warm, name="warm"), Cold(mini(CACHE))]
    with tempfile.TemporaryDirectory() as scratch:
        export_merged("mini", Path(scratch) / "merged", dtype=str(warm.dtype).removeprefix("torch."))
        peer = SentenceTransformers(Path(scratch) / "merged", warm.dtype, torch.device("cpu"))
    read_all(warm, calls)
    for variant in (*ours, peer):
        variant.score(calls[0][:4])
    rounds: list[dict[str, float]] = []
    for start in range(ROUNDS):
        part = calls[start::ROUNDS]
        slow, rest = part[::EVERY], [call for position, call in enumerate(part) if position % EVERY]
        shared, alone = alternating([*ours, peer], slow, start), alternating(ours, rest, start)
        sums = {name: sum(shared[name]) + sum(alone[name]) for name in alone}
        rounds.append(
            {
                "without / warm": sums["without"] / sums["warm"],
                f"{peer.name} / warm": sum(shared[peer.name]) / sum(shared["warm"]),
                f"{peer.name} / without": sum(shared[peer.name]) / sum(shared["without"]),
                "cold / without": sums["cold"] / sums["without"],
                **{f"seconds {name}": value for name, value in sums.items()},
                f"seconds {peer.name}, {len(slow)} of {len(part)} questions": sum(shared[peer.name]),
            }
        )
        print(
            f"round {start + 1}:", *(f"{name} {value:.3f}" for name, value in rounds[-1].items()), sep="  ", flush=True
        )
    print(f"{len(calls)} questions with {TOP} of {len(corpus)} passages, {ROUNDS} rounds of {len(part)} questions")
    for name in rounds[0]:
        values = [measured[name] for measured in rounds]
        print(f"{name:50} median {statistics.median(values):7.3f}   {min(values):.3f} to {max(values):.3f}")
    print(warm.passage_cache_info())


def latency(folder: Path, number: int = 10) -> None:
    """Print the median latency of a question with known passages, against that without the cache."""
    questions, corpus = load(folder, number, PASSAGES)
    without, warm = mini(), mini(CACHE)
    for top in (TOP, DEEP):
        calls = best(corpus, questions, top)
        read_all(warm, calls)
        variants: list[Baseline] = [Ours(without, name="without"), Ours(warm, name="warm")]
        alternating(variants, calls[:1])
        p50 = {name: statistics.median(times) for name, times in alternating(variants, calls).items()}
        print(
            f"{top} known passages, {len(calls)} questions: p50 {1000 * p50['warm']:.0f} ms, without the cache "
            f"{1000 * p50['without']:.0f} ms, share {p50['warm'] / p50['without']:.3f}"
        )


def scores(folder: Path, number: int = 100) -> None:
    """Print how logits with a warm cache, one call a question, differ from those without the cache.

    Without the cache all pairs are one call, which computes each passage a few times; every 50th question is also a
    call of its own, which computes it for each question.
    """
    questions, corpus = load(folder, number, DEEP)
    calls = [[(question, passage) for passage in corpus.values()] for question in questions]
    without, warm = mini(), mini(CACHE)
    read_all(warm, calls[:1])
    logits = [[score.logit for score in warm.score_pairs(call)] for call in calls]
    together = [score.logit for score in without.score_pairs([pair for call in calls for pair in call])]
    print_differences(
        "one call", logits, [together[start : start + len(corpus)] for start in range(0, len(together), len(corpus))]
    )
    alone = [[score.logit for score in without.score_pairs(call)] for call in calls[::50]]
    print_differences("a call a question", logits[::50], alone)


def print_differences(name: str, logits: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    """Print the largest difference, and Kendall's tau of the questions."""
    differences = [abs(a - b) for pair in zip(logits, expected, strict=True) for a, b in zip(*pair, strict=True)]
    taus = [kendall_tau(list(a), list(b)) for a, b in zip(logits, expected, strict=True)]
    print(
        f"without the cache in {name}: {len(differences)} pairs, largest difference {max(differences):.2g}; "
        f"Kendall's tau mean {statistics.mean(taus):.5f}, lowest {min(taus):.5f}"
    )


class Peak(Observer):
    """The most bytes that the cache reports."""

    bytes = 0

    def used_prefixes(self, hits: int, misses: int, tokens_saved: int, cache_bytes: int) -> None:  # noqa: ARG002
        """See `Observer.used_prefixes`."""
        self.bytes = max(self.bytes, cache_bytes)


def memory(folder: Path, number: int = 10_000) -> None:
    """Print the most bytes that the cache and the process hold while it reads many different passages of 8 words."""
    words = " ".join(load_beir(folder).corpus.values()).split()
    passages = [" ".join(words[start : start + 8]) for start in range(0, 8 * number, 8)]
    peak = Peak()
    reranker = mini(BOUND)
    reranker.observe(peak)
    print("resident MiB, by thousands of passages:", end="", flush=True)
    for start in range(0, len(passages), 250):
        reranker.score_pairs([("What is it?", passage) for passage in passages[start : start + 250]])
        if start % 1000 == 750:
            print(f" {1024 * memory_gib('VmRSS'):.0f}", end="", flush=True)
    info = reranker.passage_cache_info()
    assert info is not None
    print(
        f"\n{len(set(passages))} different passages, {info.misses} misses; "
        f"peak {peak.bytes} of {info.limit} bytes in the cache, {info.entries} entries at the end"
    )


def prepared(folder: Path, number: int = 2000) -> None:
    """Print the latency of first questions about passages on disk, in new processes, and with a warm cache."""
    questions, corpus = load(folder, 2 * ROUNDS, number)
    calls = best(corpus, questions, TOP)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "prepared"
        start = time.perf_counter()
        with mini(CACHE) as reranker:
            reranker.prepare(corpus.values(), out=out)
        size = sum(file.stat().st_size for file in out.iterdir()) / 2**30
        print(f"{len(corpus)} passages prepared in {time.perf_counter() - start:.0f} s, {size:.2f} GiB")
        reranker = mini(CACHE)
        read_all(reranker, calls)
        warm = Ours(reranker)
        warm.score(calls[0])
        times = []
        for position, call in enumerate(calls):
            command = [sys.executable, __file__, "first", str(folder), "--prepared", str(out)]
            command += ["--number", str(number), "--call", str(position)]
            command += ["--cpu-time"] if clock is time.process_time else []
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times.append((float(output.split()[-1]), seconds(warm, call)))
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        print(
            f"first question of a new process: p50 {1000 * medians[0]:.0f} ms, with a warm cache "
            f"{1000 * medians[1]:.0f} ms, ratio {medians[0] / medians[1]:.2f}"
        )


def first(folder: Path, number: int, out: Path, call: int) -> None:
    """Print the seconds of the first call about prepared passages, after a call that loaded the model."""
    questions, corpus = load(folder, 2 * ROUNDS, number)
    reranker = mini(prepared_passages=str(out))
    reranker.warmup()
    print(seconds(Ours(reranker), best(corpus, questions, TOP)[call]))


def main() -> None:
    """Run one measurement."""
    global clock
    measurements = {"total": total, "latency": latency, "scores": scores, "memory": memory, "prepared": prepared}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=[*measurements, "first"], metavar="|".join(measurements))
    parser.add_argument("data", type=Path)
    parser.add_argument("--number", type=int, help="of questions, or of passages for memory and prepared")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)  # of `first`, which `prepared` runs
    parser.add_argument("--call", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_time:
        clock = time.process_time
        torch.set_num_threads(1)
    if options.measurement == "first":
        first(options.data, options.number, options.prepared, options.call)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    measurements[options.measurement](options.data, *([] if options.number is None else [options.number]))


if __name__ == "__main__":
    main()

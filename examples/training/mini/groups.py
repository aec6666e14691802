"""Build training groups from embedded training sets: questions, passages, grades, and the teachers' logits.

python groups.py DATA EMBEDDINGS OUT --passes 3 [--workers N]
python groups.py DATA TEACHERS OUT --passes 5 --small [--workers N]

A pass is a file OUT/pass-N.jsonl, written when it is complete, one after the other. Each pass draws other negatives,
other sentences and other rewritings of the questions. A small pass has other questions too, and the teachers embed only
its texts; negatives come from BM25 alone.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from contrast import contrast_groups
from retrieved import PART, retrieved_groups
from sentence import sentence_groups
from texts import SETS, SMALL, Embeddings, StoredEmbeddings, dataset

SENTENCES, CONTRAST = "sentences", "contrast"
SENTENCE_PARTS = 6
SMALL_SHARE = 0.02
"""Of the passages that are split into sentences, in a small pass."""
CONTRAST_TURNS = 2
SMALL_CONTRAST = 10
"""Groups of a small pass."""


@dataclass(frozen=True, slots=True)
class Task:
    """One part of a source in one pass."""

    source: str
    part: int
    seed: int


@cache
def embeddings_in(folder: Path, *, small: bool) -> Embeddings:
    """Open the embeddings, once in each process."""
    if not small:
        return StoredEmbeddings(folder)
    from embed import EmbeddingsOnDemand  # loads torch, which no other pass needs

    return EmbeddingsOnDemand(folder)


def run(task: Task, *, data: Path, embeddings: Path, small: bool) -> list[str]:
    """Build the groups of a task, as JSON lines."""
    vectors = embeddings_in(embeddings, small=small)
    if task.source == CONTRAST:
        groups = contrast_groups(task.part, task.seed)
        if small:
            random.Random(task.seed).shuffle(groups)
            groups = groups[:SMALL_CONTRAST]
    elif task.source == SENTENCES:
        parts, share = (1, SMALL_SHARE) if small else (SENTENCE_PARTS, 1.0)
        groups = sentence_groups(data, vectors, task.part, parts, task.seed, share)
    else:
        most = (SMALL if small else SETS)[task.source]
        groups = retrieved_groups(data, vectors, task.source, task.part, task.seed, most)
    return [json.dumps(asdict(group)) for group in groups]


def tasks_of(data: Path, seed: int, *, small: bool) -> list[Task]:
    """List the tasks of a pass, those that take long first."""
    tasks = [Task(SENTENCES, part, seed) for part in range(1 if small else SENTENCE_PARTS)]
    for name, most in (SMALL if small else SETS).items():
        count = min(most, len(dataset(data, name).queries))
        tasks += [Task(name, part, seed) for part in range(-(-count // PART))]
    return [*tasks, *(Task(CONTRAST, turn, seed) for turn in range(1 if small else CONTRAST_TURNS))]


def main() -> None:
    """Write one file of groups for each pass, in random order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the training sets, in BEIR's layout")
    parser.add_argument("embeddings", type=Path, help="folder that embed.py has written; with --small, teachers.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few questions of each set")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    start = time.monotonic()
    work = partial(run, data=options.data, embeddings=options.embeddings, small=options.small)
    passes = [tasks_of(options.data, seed, small=options.small) for seed in range(options.passes)]
    options.out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # bm25s may start the threads of jax, which a fork does not survive
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        results = pool.map(work, [task for tasks in passes for task in tasks])
        for seed, tasks in enumerate(passes):
            lines, counts = [], Counter[str]()
            for task in tasks:
                groups = next(results)
                lines += groups
                counts[task.source] += len(groups)
            random.Random(seed).shuffle(lines)
            partial_file = options.out / f"pass-{seed}.partial"
            partial_file.write_text("\n".join(lines) + "\n", "utf-8")
            partial_file.replace(options.out / f"pass-{seed}.jsonl")
            seconds = time.monotonic() - start
            print(f"{seconds:.0f} s: pass {seed} has {len(lines)} groups: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()

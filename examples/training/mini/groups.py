"""Build training groups from embedded training sets: questions, passages, grades, and the teachers' logits.

python groups.py DATA EMBEDDINGS OUT --passes 3 [--share 1] [--workers N]

A pass is a file OUT/pass-N.jsonl, written when it is complete, one after the other. Each pass draws other negatives,
other sentences and other rewritings of the questions.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from contrast import contrast_groups
from retrieved import PART, retrieved_groups
from sentence import sentence_groups
from texts import SETS, Embeddings, dataset

SENTENCES, CONTRAST = "sentences", "contrast"
SENTENCE_PARTS = 6
CONTRAST_TURNS = 2


@dataclass(frozen=True, slots=True)
class Task:
    """One part of a source in one pass."""

    source: str
    part: int
    seed: int


@cache
def embeddings_in(folder: Path) -> Embeddings:
    """Open the embeddings, once in each process."""
    return Embeddings(folder)


def run(task: Task, *, data: Path, embeddings: Path, share: float) -> list[str]:
    """Build the groups of a task, as JSON lines."""
    if task.source == CONTRAST:
        groups = contrast_groups(task.part, task.seed)
    elif task.source == SENTENCES:
        vectors = embeddings_in(embeddings)
        groups = sentence_groups(data, vectors, task.part, SENTENCE_PARTS, task.seed, share)
    else:
        groups = retrieved_groups(data, embeddings_in(embeddings), task.source, task.part, task.seed, share)
    return [json.dumps(group.record(task.source)) for group in groups]


def tasks_of(data: Path, seed: int, share: float) -> list[Task]:
    """List the tasks of a pass, those that take long first."""
    tasks = [Task(SENTENCES, part, seed) for part in range(SENTENCE_PARTS)]
    for name, most in SETS.items():
        count = round(share * min(most, len(dataset(data, name).queries)))
        tasks += [Task(name, part, seed) for part in range(-(-count // PART))]
    return [*tasks, *(Task(CONTRAST, turn, seed) for turn in range(CONTRAST_TURNS))]


def main() -> None:
    """Write one file of groups for each pass, in random order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the training sets, in BEIR's layout")
    parser.add_argument("embeddings", type=Path, help="folder that embed.py has written")
    parser.add_argument("out", type=Path)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of each set's questions")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    start = time.monotonic()
    work = partial(run, data=options.data, embeddings=options.embeddings, share=options.share)
    passes = [tasks_of(options.data, seed, options.share) for seed in range(options.passes)]
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

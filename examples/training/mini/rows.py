"""Batches of groups as padded rows: a passage followed by all questions of its group."""

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mistral_rerank.training.losses import FAR_BELOW

MULTIPLE = 16
"""Rows are padded to a multiple of so many tokens."""
MOST_PASSAGE_TOKENS = 384
END = 2
"""The end token."""

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Token ids, positions and segments, each (rows, length) int64, and the flat index of each question's last token.

Segment 0 is the passage, 1 and more are its questions, -1 is padding.
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups of one step.

    Attributes:
        micro: micro-batches; their logits, one after the other, are what `index` refers to.
        index: the logit of each question and passage, (questions, passages) int64; 0 where there is no passage.
        real: True where there is a passage.
        grades: as in `mistral_rerank.training.losses`.
        teacher: logits of the teachers, (taught questions, passages) float32.
        taught: rows of the questions with a teacher.
        tokens: of all rows, without padding.
        pairs: of a question and a passage.

    """

    micro: list[Rows]
    index: torch.Tensor
    real: torch.Tensor
    grades: torch.Tensor
    teacher: torch.Tensor
    taught: torch.Tensor
    tokens: int
    pairs: int

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; a DataLoader calls this."""
        micro = [tuple(tensor.pin_memory() for tensor in rows) for rows in self.micro]
        others = [getattr(self, name).pin_memory() for name in ("index", "real", "grades", "teacher", "taught")]
        return Batch(micro, *others, self.tokens, self.pairs)  # type: ignore[arg-type]


class Collator:
    """Makes a batch of the JSON lines of some groups.

    Args:
        tokenizer: the file of the tokenizer; it is opened in the process that makes the batches.
        micro_tokens: the most tokens of a micro-batch, with padding.

    """

    def __init__(self, tokenizer: Path, micro_tokens: int) -> None:
        self._file, self._micro_tokens = tokenizer, micro_tokens
        self._tokenizer: Tokenizer | None = None

    def __call__(self, lines: list[str]) -> Batch:
        """Tokenize the groups, pad their rows sorted by length, and collect the labels of every question."""
        groups = [json.loads(line) for line in lines]
        rows: list[tuple[list[int], list[list[int]]]] = []
        first_rows = []
        for group in groups:
            passages = [ids[:MOST_PASSAGE_TOKENS] for ids in self._encode("Passage: ", group["passages"])]
            questions = [[*ids, END] for ids in self._encode("\nQuestion: ", group["queries"])]
            first_rows.append(len(rows))
            rows += [(passage, questions) for passage in passages]
        lengths = [len(passage) + sum(map(len, questions)) for passage, questions in rows]
        positions: dict[tuple[int, int], int] = {}
        micro = [self._pad(chosen, rows, lengths, positions) for chosen in self._divide(lengths)]
        labels = _labels(groups, first_rows, positions)
        return Batch(micro, *labels, tokens=sum(lengths), pairs=len(positions))

    def _encode(self, label: str, texts: list[str]) -> list[list[int]]:
        if self._tokenizer is None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
            self._tokenizer = Tokenizer.from_file(str(self._file))
            self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch([label + text for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _divide(self, lengths: list[int]) -> Iterator[list[int]]:
        """Divide the rows, by length, into micro-batches."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end - start + 1) * lengths[order[end]] <= self._micro_tokens:
                end += 1
            yield order[start:end]
            start = end

    def _pad(
        self,
        chosen: list[int],
        rows: list[tuple[list[int], list[list[int]]]],
        lengths: list[int],
        positions: dict[tuple[int, int], int],
    ) -> Rows:
        """Pad some rows, and note at which position of all logits each row and question comes."""
        width = -(-max(lengths[row] for row in chosen) // MULTIPLE) * MULTIPLE
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        places = torch.zeros_like(ids)
        segments = torch.full_like(ids, -1)
        last = []
        for line, row in enumerate(chosen):
            passage, questions = rows[row]
            start = len(passage)
            ids[line, :start] = torch.tensor(passage)
            places[line, :start] = torch.arange(start)
            segments[line, :start] = 0
            for number, question in enumerate(questions):
                stop = start + len(question)
                ids[line, start:stop] = torch.tensor(question)
                places[line, start:stop] = torch.arange(len(passage), len(passage) + len(question))
                segments[line, start:stop] = number + 1
                positions[row, number] = len(positions)
                last.append(line * width + stop - 1)
                start = stop
        return ids, places, segments, torch.tensor(last)


def _labels(
    groups: list[dict[str, Any]], first_rows: list[int], positions: dict[tuple[int, int], int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `index`, `real`, `grades`, `teacher` and `taught` of a batch."""
    widest = max(len(group["passages"]) for group in groups)
    index, real, grades, teacher, taught = [], [], [], [], []
    for group, first in zip(groups, first_rows, strict=True):
        count = len(group["passages"])
        missing = widest - count
        for number in range(len(group["queries"])):
            if group["teacher"] is not None:
                taught.append(len(index))
                teacher.append(group["teacher"][number] + [FAR_BELOW] * missing)
            index.append([positions[first + row, number] for row in range(count)] + [0] * missing)
            real.append([True] * count + [False] * missing)
            known = [float("nan") if grade is None else grade for grade in group["grades"][number]]
            grades.append(known + [float("nan")] * missing)
    return (
        torch.tensor(index),
        torch.tensor(real),
        torch.tensor(grades),
        torch.tensor(teacher),
        torch.tensor(taught, dtype=torch.int64),
    )


class Steps(torch.utils.data.IterableDataset[list[str]]):
    """The groups of each step, without end: always the file that was read least, from the second time on in new order.

    Files may appear later; only the first of them is waited for. Workers take turns.

    Args:
        files: JSON lines of groups.
        groups_per_step: the last groups of a file that are fewer are left out.

    """

    def __init__(self, files: list[Path], groups_per_step: int) -> None:
        self._files, self._size = files, groups_per_step

    def __iter__(self) -> Iterator[list[str]]:
        """Give the steps of one worker."""
        worker = torch.utils.data.get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        step, times = 0, dict.fromkeys(self._files, 0)
        while True:
            while not (ready := [file for file in self._files if file.exists()]):
                time.sleep(0.5)
            file = min(ready, key=times.__getitem__)
            lines = file.read_text("utf-8").splitlines()
            if times[file]:
                random.Random(times[file]).shuffle(lines)
            times[file] += 1
            for start in range(0, max(1, len(lines) - self._size + 1), self._size):
                if step % every == first:
                    yield lines[start : start + self._size]
                step += 1

"""Count the project's calls and thread hand-overs in one `rank` on a warm model.

    python benchmarks/call_trace.py [MODEL] [PASSAGES]

The calls inside `local/model`, a few for each layer, are counted apart. A hand-over is a change of the thread in which
the project's code runs: from the caller to the tokenizer, to the forward, and with the result back to the caller.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from inspect import CO_GENERATOR
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import mistral_rerank
from mistral_rerank import LocalReranker

if TYPE_CHECKING:
    from types import FrameType

ROOT = Path(mistral_rerank.__file__).parent
QUESTION, PASSAGE = "At what temperature does water boil?", "Water boils at 100 degrees Celsius, record {}."


class Trace:
    """The calls of the project's functions, in order, each with its thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.active = False
        self._generators: list[FrameType] = []

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """Record a call. Comprehensions, lambdas and further steps of a generator are not counted."""
        if not self.active or event != "call":
            return
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        if code.co_name.startswith("<") or not file.is_relative_to(ROOT):
            return
        if code.co_flags & CO_GENERATOR:
            if any(frame is other for other in self._generators):
                return
            self._generators.append(frame)
        name = f"{file.relative_to(ROOT).with_suffix('')}: {code.co_qualname}"
        self.calls.append((threading.current_thread().name, name))


def main(model: str, passages: int) -> None:
    """Print the calls of one `rank` and their numbers."""
    texts = [PASSAGE.format(number) for number in range(passages)]
    trace = Trace()
    threading.setprofile(trace)  # before the engine starts its threads
    with LocalReranker(model, device="cpu") as reranker:
        for _ in range(2):
            reranker.rank(QUESTION, texts)
        sys.setprofile(trace)
        trace.active = True
        reranker.rank(QUESTION, texts)
        trace.active = False
        sys.setprofile(None)
    threading.setprofile(None)
    outside = [call for call in trace.calls if not call[1].startswith("local/model/")]
    for (thread, name), number in Counter(outside).items():
        print(f"{number:4}  {thread:24}  {name}")
    hand_overs = sum(earlier[0] != later[0] for earlier, later in pairwise(trace.calls))
    print(f"{len(outside)} calls and {len(trace.calls) - len(outside)} in local/model; {hand_overs} hand-overs")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mini", int(sys.argv[2]) if len(sys.argv) > 2 else 1)

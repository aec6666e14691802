"""The plan of the kit: its stages, one for each call, and their time limits."""

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PACKED = REPOSITORY / "build" / "gpu"
"""Where `pack.py` writes a folder for each of the calls that carry something."""
CARRYING = 1, 2, 3
"""Calls that carry something."""

BUDGET_SECONDS = 900
START_SECONDS = 45
"""Time in which a machine starts; measured on an H200 machine, as the next two."""
TRANSFER_SECONDS = 8
"""Time to send 60 MiB and to get the results."""
SETUP_SECONDS = 10
"""Time to install the wheels."""
TIMES_OFF_CUDA = 4
"""Off CUDA, in a rehearsal, a stage may take so many times its limit."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One script of the kit.

    Attributes:
        name: of the script, and of its results.
        call: the call that runs it.
        seconds: its time limit, unless `run.py` is given another.

    """

    name: str
    call: int
    seconds: int


STAGES = (
    Stage("right", call=1, seconds=185),
    Stage("fast", call=2, seconds=150),
    Stage("learn", call=3, seconds=330),
    Stage("measure", call=4, seconds=110),
)
CALLS = {stage.call: stage for stage in STAGES}


def call_seconds(call: int) -> int:
    """Return the time limit of a call."""
    return SETUP_SECONDS + CALLS[call].seconds


def total_seconds() -> int:
    """Return the time of all calls on one machine, its start and the transfers included."""
    return START_SECONDS + sum(TRANSFER_SECONDS + call_seconds(call) for call in CALLS)

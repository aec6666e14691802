"""The plan of the kit: its stages, their time limits, and the call that each belongs to."""

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PACKED = REPOSITORY / "build" / "gpu"
"""Where `pack.py` writes one folder for each call."""

SETUP_SECONDS = 25
"""Time to install the wheels, unpack the base and end."""
START_SECONDS = 90
"""Time in which a machine starts, as others measured."""
TRANSFER_SECONDS = 20
"""Time for one transfer of 64 MiB there and the results back: 3 MiB/s are needed."""
BUDGET_SECONDS = 900
TIMES_OFF_CUDA = 4
"""Off CUDA, in a rehearsal, a stage may take so many times its limit: sizes are tiny, but mini and its base are not."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One script of the kit.

    Attributes:
        name: of the script, and of its results.
        call: the call that runs it.
        seconds: its time limit.

    """

    name: str
    call: int
    seconds: int


STAGES = (
    Stage("right", call=1, seconds=150),
    Stage("fast", call=2, seconds=190),
    Stage("mini", call=3, seconds=45),
    Stage("learn", call=3, seconds=250),
)
CALLS = sorted({stage.call for stage in STAGES})


def call_seconds(call: int) -> int:
    """Return the time limit of a call."""
    return SETUP_SECONDS + sum(stage.seconds for stage in STAGES if stage.call == call)


def total_seconds() -> int:
    """Return the time of all calls on one machine, its start and the transfers included."""
    return START_SECONDS + sum(TRANSFER_SECONDS + call_seconds(call) for call in CALLS)

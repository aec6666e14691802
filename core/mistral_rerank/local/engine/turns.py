"""Turns: which waiting job runs next, fair by tokens.

This is fair queueing. While n jobs wait, virtual time advances by 1/n of the tokens that run. The next batch of a job
ends, in virtual time, as many tokens after the job's last one as it has. The batch that would end first runs first. So
n jobs get equal shares of the tokens, a call smaller than the next batch of a large one goes first, and no job starves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.engine.job import Job


class Turns:
    """The virtual time of a queue."""

    def __init__(self) -> None:
        self._now = 0.0

    def enter(self, job: Job) -> None:
        """Begin to count a job's share."""
        job.virtual_time = self._now

    def order(self, jobs: Sequence[Job], limit: int) -> list[Job]:
        """Sort jobs with waiting batches by their turns, if a turn runs at most `limit` tokens."""
        return sorted(jobs, key=lambda job: job.virtual_time + min(job.waiting[0].batch.tokens, limit))

    def charge(self, job: Job, tokens: int, waiting: int) -> None:
        """Count a job's tokens that run, while `waiting` jobs wait, itself included."""
        job.virtual_time += tokens
        self._now += tokens / waiting

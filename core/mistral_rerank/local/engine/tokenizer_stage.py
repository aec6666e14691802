"""The tokenizer stage: a thread that loads the model and tokenizes, ahead of the forward thread.

It tokenizes one slice of text of each waiting call in turn, so a call with much text does not delay the others.
"""

from __future__ import annotations

import queue
from collections import deque
from typing import TYPE_CHECKING

from mistral_rerank._forks import ForkLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mistral_rerank.errors import RerankError
    from mistral_rerank.local.engine.job import Job, Scorer


class TokenizerStage:
    """Tokenizes jobs and passes them to `prepare`.

    Attributes:
        scorer: the loaded model; None before, and after a failed load, which the next job repeats.

    """

    def __init__(self, load: Callable[[], Scorer], prepare: Callable[[Job, Scorer], None]) -> None:
        self.scorer: Scorer | None = None
        self._load, self._prepare = load, prepare
        self._fork_lock = ForkLock()
        self.forget_jobs()

    def forget_jobs(self) -> None:
        """Start with an empty queue; after a fork the jobs belong to the parent."""
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()

    def put(self, job: Job | None) -> None:
        """Queue a job; None to stop."""
        self._inbox.put(job)

    def run(self, closed: Callable[[], RerankError]) -> None:
        """Work until None arrives; then fail the remaining jobs with the error from `closed`."""
        while self._receive():
            with self._fork_lock:
                self._step()
        self._fail_all(closed())

    def _receive(self) -> bool:
        """Move queued jobs to the list of jobs, waiting if it is empty; False to stop."""
        while True:
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._jobs.append(job)

    def _step(self) -> None:
        """Tokenize a slice of the first job; load the model before the first one. Cancelled jobs are dropped."""
        job = self._jobs.popleft()
        if job.future.cancelled():
            return
        try:
            if self.scorer is None:
                self.scorer = self._load()
        except BaseException as error:
            job.fail(error)
            self._fail_all(error)
            return
        try:
            if job.tokenize(self.scorer):
                self._prepare(job, self.scorer)
            else:
                self._jobs.append(job)
        except BaseException as error:
            job.fail(error)

    def _fail_all(self, error: BaseException) -> None:
        for job in self._jobs:
            job.fail(error)
        self._jobs.clear()

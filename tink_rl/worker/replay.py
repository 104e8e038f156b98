"""Finished requests that are kept for a retry: some of them, for a while."""

from __future__ import annotations

from collections import OrderedDict

from tink_rl.worker.work import Job

_MAX_JOBS = 1024
_MAX_WEIGHT = 1_000_000
"""In tokens, about 100 bytes each."""
_TOP_LOGPROB_WEIGHT = 2


class KeptAnswers:
    """Done jobs by request id, the oldest first. Not thread-safe; its owner holds a lock."""

    def __init__(self, keep_s: float) -> None:
        """Keep each for `keep_s` seconds at most."""
        self._keep_s = keep_s
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._weight = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, request_id: str) -> Job | None:
        """The job that was done under this id, if it is still kept."""
        return self._jobs.get(request_id)

    def put(self, job: Job) -> None:
        """Keep a done job; the oldest are dropped for it."""
        self._jobs[job.work.request_id] = job
        self._weight += _weight(job)
        while len(self._jobs) > _MAX_JOBS or self._weight > _MAX_WEIGHT:
            self._discard_oldest()

    def discard_old(self, now: float) -> None:
        """Drop what ended more than `keep_s` before `now` (monotonic)."""
        while self._jobs and now - next(iter(self._jobs.values())).ended > self._keep_s:
            self._discard_oldest()

    def _discard_oldest(self) -> None:
        _, job = self._jobs.popitem(last=False)
        self._weight -= _weight(job)


def _weight(job: Job) -> int:
    per_token = 1 + _TOP_LOGPROB_WEIGHT * (job.work.request.params.logprobs or 0)
    answered = sum(len(c.token_ids or c.text) for c in job.completions or ())
    echoed = sum(len(c.prompt_token_ids or ()) for c in job.completions or ())
    return answered * per_token + echoed + sum(len(prompt) for prompt in job.work.request.prompts)

"""Jobs that are sent again, after growing pauses, while a queue system refuses them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import time
from typing import Any

from magus_anharmonic.errors import one_line

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # s between two attempts to send a job
GIVE_UP = 300.0  # s without any job before a refusal is for good
SAY_AGAIN = 60.0  # s between two lines with the same words


class Submissions:
    """What a queue system has answered to the jobs of one cluster, by their names."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.words = ""
        self._accepted: set[Any] = set()
        self._refused: dict[Any, float] = {}
        self._unreadable = ""
        self._said = float("-inf")

    def accept(self, name: Any) -> None:
        """A job is in the queue."""
        self._accepted.add(name)
        self._refused.pop(name, None)

    def refuse(self, name: Any, words: str, pause: float) -> None:
        """A job was refused with these ``words`` and is sent again in ``pause`` seconds."""
        self._refused.setdefault(name, time.monotonic())
        if words != self.words or time.monotonic() - self._said > SAY_AGAIN:
            log.warning("%s refuses a job (%s); sent again in %.0f s", self.command, words, pause)
            self._said = time.monotonic()
        self.words = words

    def misread(self, words: str) -> None:
        """The command ended well and named no job: sending again could fill the queue."""
        self._unreadable = words

    def forget(self, name: Any) -> None:
        """A job is over, or not wanted any more."""
        self._accepted.discard(name)
        self._refused.pop(name, None)

    def refusal(self) -> str:
        """Why no job will ever run; empty while there is hope: a job in the queue, or refusals for
        less than `GIVE_UP`."""
        if self._unreadable:
            return f"{self.command} was not understood: {self._unreadable}"
        since = min(self._refused.copy().values(), default=None)
        if self._accepted or since is None or time.monotonic() - since < GIVE_UP:
            return ""
        return f"{self.command} has refused every job for {GIVE_UP:.0f} s: {self.words}"


def patient(job_class: type, submissions: Submissions) -> type:
    """A job class of dask-jobqueue whose jobs are sent in the background, again and again until the
    queue system takes them.

    dask-jobqueue sends each once: one refusal, and its worker is waited for without an end.
    """
    from distributed.deploy.spec import ProcessInterface

    class PatientJob(job_class):  # type: ignore[misc,valid-type]
        async def start(self) -> None:
            self._ending = asyncio.Event()
            self._sending = asyncio.ensure_future(self._send())
            await ProcessInterface.start(self)

        async def _send(self) -> None:
            pause = FIRST_PAUSE
            while not self._ending.is_set():
                try:
                    await super().start()
                except (RuntimeError, OSError) as error:
                    submissions.refuse(self.name, _words(error), pause)
                except ValueError as error:
                    submissions.misread(_words(error))
                    return
                else:
                    submissions.accept(self.name)
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), pause)
                pause = min(2.0 * pause, LONGEST_PAUSE)

        async def _submit_job(self, script_filename: str) -> str:
            if not getattr(self, "use_stdin", False):
                return await super()._submit_job(script_filename)
            # As the class of LSF does it, which throws the reason of a refusal away.
            return await self._call(
                [f"{self.submit_command} < {shlex.quote(script_filename)}"], shell=True
            )

        async def close(self) -> None:
            self._ending.set()
            await asyncio.wait({self._sending})
            submissions.forget(self.name)
            await super().close()
            await ProcessInterface.close(self)

    return PatientJob


def _words(error: BaseException) -> str:
    """What the command itself said."""
    said = (
        str(error).partition("stderr:\n")[2].strip()
        or str(error).partition("output is:\n")[2].strip()
    )
    return one_line(said or str(error)) or type(error).__name__

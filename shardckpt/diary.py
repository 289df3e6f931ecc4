# SPDX-License-Identifier: Apache-2.0
"""What one rank knows of appointments: the calls it has made, those agreed on, and what it wants; and how a call is chosen."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec

from .errors import RankTimeout
from .failure import Failure, rebuild

LABEL = "should_save"
"""What error messages call it, after the method whose calls are counted."""


class Reason(msgspec.Struct, array_like=True, frozen=True):
    """Why an appointment was asked for; equal ones of several ranks are told as one."""

    what: str
    signum: int = 0
    """The signal that a process received; 0 when it was none."""
    rank: int = 0
    """The lowest rank that asked."""
    ranks: int = 1
    """How many asked."""

    def __str__(self) -> str:
        if not self.signum:
            return self.what
        return f"{self.what} on {f'rank {self.rank}' if self.ranks == 1 else f'{self.ranks} ranks'}"


class Answer(msgspec.Struct, array_like=True):
    """What a rank says when it is asked."""

    calls: int
    """Calls that it has made; it makes no other before it knows the verdict."""
    reasons: list[Reason]
    """Its own, which no appointment has met yet."""


class Verdict(msgspec.Struct, array_like=True):
    """What was agreed, or why nothing was."""

    call: int
    reasons: list[Reason]
    failure: Failure | None = None


def decide(answers: Sequence[Answer]) -> Verdict:
    """The first call that no rank has made; ``answers`` are by rank."""
    merged: dict[tuple[str, int], Reason] = {}
    for reason in (reason for answer in answers for reason in answer.reasons):
        known = merged.setdefault((reason.what, reason.signum), msgspec.structs.replace(reason, ranks=0))
        merged[reason.what, reason.signum] = msgspec.structs.replace(known, ranks=known.ranks + 1)
    return Verdict(max(answer.calls for answer in answers) + 1, list(merged.values()))


class Diary:
    """One rank's calls, and what was agreed for those to come. For several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._asked = False
        self._wanted: list[Reason] = []
        self._told: list[Reason] = []
        self._agreed: dict[int, list[Reason]] = {}
        self._failure: Failure | None = None
        self._final = False

    def want(self, reason: Reason) -> None:
        """Have ``reason`` in the next answer."""
        with self._changed:
            if reason not in self._wanted:
                self._wanted.append(reason)

    def take_back(self) -> list[Reason]:
        """The reasons that no answer holds; they are forgotten here."""
        with self._changed:
            reasons, self._wanted = self._wanted, []
            return reasons

    def answer(self) -> Answer:
        """The calls made so far; those to come wait until `settle`."""
        with self._changed:
            self._asked = True
            self._told, self._wanted = self._wanted, []
            return Answer(self._calls, self._told)

    def settle(self, verdict: Verdict) -> None:
        """Let calls go on, up to the one that was agreed, or to raise why none was: then this rank's reasons stand again."""
        with self._changed:
            if verdict.failure is not None:
                self._failure = self._failure or verdict.failure
                self._wanted = self._told + self._wanted
            elif verdict.reasons:
                self._agreed[verdict.call] = self._agreed.get(verdict.call, []) + verdict.reasons
            self._told = []
            self._asked = False
            self._changed.notify_all()

    def give_up(self, failure: Failure) -> None:
        """Raise ``failure`` from this call on."""
        with self._changed:
            if not self._final:
                self._failure, self._final = failure, True
            self._changed.notify_all()

    def arrive(self, seconds: float) -> list[Reason]:
        """One call: why it was agreed on, or nothing. Waits while a verdict is out, for at most ``seconds``."""
        with self._changed:
            self._calls += 1
            if not self._changed.wait_for(lambda: self._final or not self._asked, seconds):
                message = f"{LABEL!r}: rank 0 asked all ranks how far they are, and decided nothing within {seconds:g} s"
                raise RankTimeout(message, ranks=[0], label=LABEL, seconds=seconds)
            # First of all, so that an error, which ranks may raise at different calls, leaves nobody alone at an agreed one.
            if reasons := self._agreed.pop(self._calls, []):
                return reasons
            failure = self._failure
            if failure is not None:
                self._failure = failure if self._final else None
                raise rebuild(failure)
            return []

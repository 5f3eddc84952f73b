"""Scans are made, judged and written one after another: memory does not grow, and an interrupted run goes on.

Candidates of each way and class are numbered; which of them became which case is in the journal, so a run that goes on
draws the next ones. One thread writes while the next scans are drawn.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from medgen.errors import PrivacyError, TrainingError
from medgen.log import progress
from medgen.tasks.gates import Gates, Verdict
from medgen.tasks.ways.base import Made, Way
from medgen.tasks.ways.orders import Order
from medgen.tasks.ways.sample import AT_ONCE
from medgen.tasks.workspace import Workspace

# Scans that wait to be written, at most.
_WAITING = {2: 32, 3: 4}
# So many copies, or rejected candidates of any kind, in a row mean that no more scans will come.
_MOST_COPIES, _MOST_REJECTED = 20, {2: 320, 3: 80}


@runtime_checkable
class Writes(Protocol):
    """Where scans go."""

    def write(self, name: str, made: Made) -> dict[str, Any]:
        """Write one scan; returns its row of the table."""
        ...


@runtime_checkable
class Watches(Protocol):
    """Who sees every scan that is kept, and every copy that is not."""

    def kept(self, made: Made, name: str) -> None:
        """A scan that is written, under this name."""
        ...

    def copied(self, made: Made, verdict: Verdict, name: str) -> None:
        """A candidate that copies a training scan."""
        ...


@dataclass
class Tally:
    """How a run went.

    Args:
        rejected: candidates, by reason.
        far: candidates further from the training scans than nearly all held-out ones, by test.
        judged: candidates in all.
        seconds: spent on making, judging, and waiting for what is written.
    """

    rejected: Counter[str] = field(default_factory=Counter)
    far: Counter[str] = field(default_factory=Counter)
    judged: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("making", "judging", "waiting"), 0.0))


def generate(
    wanted: Sequence[Order],
    ways: Mapping[str, Way],
    gates: Gates,
    target: Writes,
    work: Workspace,
    watch: Watches,
) -> Tally:
    """Make, judge and write every scan that the journal does not have.

    Raises:
        PrivacyError: the model has memorised its training scans.
        TrainingError: hardly any candidate passes the quality gate.
    """
    dims = gates.known.x.ndim - 2
    tally, begun = Tally(), _begun(wanted, work)
    streams: dict[tuple[str, str], _Stream] = {}
    waiting: deque[tuple[Order, dict[str, Any], Future]] = deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            order, facts, written = waiting.popleft()
            work.record(f"scan {order.name}", {**written.result(), **facts})
            bar.advance()

    with progress("Generating", len(wanted)) as bar, ThreadPoolExecutor(1) as writer:
        bar.advance(sum(f"scan {order.name}" in work.done for order in wanted))
        for order in wanted:
            if f"scan {order.name}" in work.done:
                continue
            key = (order.how, order.label)
            if key not in streams:
                _learn_usual(order.how, ways[order.how], gates, AT_ONCE[dims], wanted)
                streams[key] = _Stream(ways[order.how], order, gates, begun.get(key, 0), tally)
            made, facts = streams[key].accepted(watch)
            watch.kept(made, order.name)
            waiting.append((order, facts, writer.submit(target.write, order.name, made)))
            began = time.monotonic()
            settle(_WAITING[dims])
            tally.seconds["waiting"] += time.monotonic() - began
        began = time.monotonic()
        settle(0)
        tally.seconds["waiting"] += time.monotonic() - began
    # From the journal, so that a run that was interrupted tells what one that was not would.
    for facts in (work.done[f"scan {order.name}"] for order in wanted):
        tally.rejected.update(facts["rejected"])
        tally.far.update(facts["far"])
        tally.judged += 1 + sum(facts["rejected"].values())
    return tally


def _begun(wanted: Sequence[Order], work: Workspace) -> dict[tuple[str, str], int]:
    """The next candidate of each way and class."""
    found: dict[tuple[str, str], int] = {}
    for order in wanted:
        if row := work.done.get(f"scan {order.name}"):
            key = (order.how, order.label)
            found[key] = max(found.get(key, 0), row["candidate"] + 1)
    return found


def _learn_usual(how: str, way: Way, gates: Gates, count: int, wanted: Sequence[Order]) -> None:
    """Show the gates the first scans of a way, once."""
    if how in gates.usual:
        return
    labels = sorted({order.label for order in wanted if order.how == how})
    each = max(1, -(-count // len(labels)))
    gates.learn_usual(how, [one for label in labels for one in way.make(label, 0, each)])


class _Stream:
    """Candidates of one way and class, judged."""

    def __init__(self, way: Way, order: Order, gates: Gates, first: int, tally: Tally) -> None:
        self._way, self._order, self._gates, self._tally = way, order, gates, tally
        self._dims = gates.known.x.ndim - 2
        self._candidates = self._judged(first)

    def accepted(self, watch: Watches) -> tuple[Made, dict[str, Any]]:
        """The next candidate that passes, and what the journal tells of it and of those before it that did not.

        Raises:
            PrivacyError, TrainingError: too many in a row do not.
        """
        rejected: Counter[str] = Counter()
        far: Counter[str] = Counter()
        while True:
            number, made, verdict = next(self._candidates)
            far.update(verdict.far)
            if not verdict.reason:
                told = {"candidate": number, "rejected": dict(rejected), "far": dict(far)}
                return made, {"how": self._order.how, **told, "scores": dict(verdict.facts)}
            rejected[verdict.reason] += 1
            if verdict.reason == "copy":
                watch.copied(made, verdict, f"{self._order.how} {self._order.label} {number}".replace("  ", " "))
            if rejected["copy"] >= _MOST_COPIES and rejected["copy"] > 0.9 * rejected.total():
                raise PrivacyError(
                    f"{rejected['copy']} draws in a row copied training scans: the model has memorised them. Nothing "
                    "was written. Train on more scans, or for a shorter time."
                )
            if rejected.total() >= _MOST_REJECTED[self._dims]:
                told = ", ".join(f"{count} for {reason}" for reason, count in rejected.most_common())
                raise TrainingError(
                    f"{rejected.total()} candidates in a row were rejected ({told}), so no more scans of "
                    f"{self._order.label or 'this kind'} will come. Train for longer, use another preset, or pass "
                    "--reject 0 to turn the quality gate off."
                )

    def _judged(self, first: int) -> Iterator[tuple[int, Made, Verdict]]:
        size = AT_ONCE[self._dims]
        while True:
            # Blocks are aligned, whatever the first candidate is: models draw them as a whole.
            start, end = first, (first // size + 1) * size
            began = time.monotonic()
            made = self._way.make(self._order.label, start, end - start)
            drawn = time.monotonic()
            verdicts = self._gates.judge(made)
            self._tally.seconds["making"] += drawn - began
            self._tally.seconds["judging"] += time.monotonic() - drawn
            yield from zip(range(start, end), made, verdicts, strict=True)
            first = end


__all__ = ["Tally", "Watches", "Writes", "generate"]

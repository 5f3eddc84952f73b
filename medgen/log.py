"""How medgen speaks: not at all, unless somebody listens.

Library code calls `track` and `note`; nothing is printed until a front end installs a reporter with
`reporting`. The command line installs one that draws progress bars on stderr.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Reporter(Protocol):
    """What a front end implements to hear of progress."""

    def note(self, message: str) -> None:
        """One sentence for the user."""

    def start(self, what: str, total: float | int | None) -> object:
        """A piece of work begins; returns a handle."""

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        """`amount` more is done; `text` is a short live figure such as a loss."""

    def stop(self, handle: object) -> None:
        """The piece of work is over."""


_reporter: ContextVar[Reporter | None] = ContextVar("medgen_reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send notes and progress to `reporter` inside the block."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def note(message: str) -> None:
    """Say one sentence to whoever listens."""
    if reporter := _reporter.get():
        reporter.note(message)


class Progress:
    """A running piece of work; `advance` it as it goes."""

    def __init__(self, reporter: Reporter | None, handle: object) -> None:
        self._reporter, self._handle = reporter, handle

    def advance(self, amount: float | int = 1, text: str = "") -> None:
        """`amount` more is done."""
        if self._reporter:
            self._reporter.advance(self._handle, amount, text)


@contextmanager
def progress(what: str, total: float | int | None = None) -> Iterator[Progress]:
    """Report a piece of work of `total` units while the block runs."""
    reporter = _reporter.get()
    handle = reporter.start(what, total) if reporter else None
    try:
        yield Progress(reporter, handle)
    finally:
        if reporter:
            reporter.stop(handle)


def track(items: Iterable[T], what: str, total: float | int | None = None) -> Iterator[T]:
    """Yield `items`, reporting one unit of progress for each.

    >>> sum(track([1, 2, 3], "adding"))
    6
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(what, total) as work:
        for item in items:
            yield item
            work.advance()


__all__ = ["Progress", "Reporter", "note", "progress", "reporting", "track"]

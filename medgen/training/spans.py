"""When each player of a model is trained, and how fast."""

import math
from collections.abc import Sequence
from dataclasses import replace

from medgen.models.base import Player


def placed(players: Sequence[Player], images: int, batch_size: int) -> list[Player]:
    """The players with their spans in images: parts of the run become whole steps of `images`."""

    def seen(when: float) -> int:
        return max(1, round(when * images / batch_size)) * batch_size if 0 < when < 1 else int(when)

    return [
        replace(player, since=seen(player.since), until=None if player.until is None else seen(player.until))
        for player in players
    ]


def in_span(player: Player, seen: int) -> bool:
    """Whether its time is now."""
    return player.since <= seen and (player.until is None or seen < player.until)


def active(player: Player, seen: int, step: int) -> bool:
    """Whether it takes the step after `seen` images."""
    return in_span(player, seen) and (seen // step) % player.every == 0


def stage(players: Sequence[Player], seen: int) -> tuple[str, ...]:
    """Whose time is now; when that changes a stage ends and the next begins."""
    return tuple(player.name for player in players if in_span(player, seen))


def stage_end(players: Sequence[Player], seen: int, images: int) -> int:
    """Images at which the present stage ends: the next at which somebody begins or leaves, or the end of the run."""
    ends = (when for player in players for when in (player.since, player.until) if when is not None and when > seen)
    return min((int(when) for when in ends), default=images)


def last_stage(players: Sequence[Player], seen: int) -> bool:
    """Whether nobody is still to come."""
    return all(player.since <= seen for player in players)


def schedule(player: Player, seen: int, images: int, warmup: int, step: int) -> float:
    """Learning rate over the peak: in its span a linear rise, then half a cosine down to a fiftieth; times its rate."""
    since, until = int(player.since), images if player.until is None else int(player.until)
    rise = min(1.0, (seen - since + step) / max(1, warmup))
    way = min(1.0, (seen - since) / max(1, until - since))
    return player.rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * way)))


__all__ = ["active", "in_span", "last_stage", "placed", "schedule", "stage", "stage_end"]

"""Density of states: how unusual all of a scan's statistics are together, among those of healthy scans.

A model's statistics need not be high for healthy scans, only typical: what counts is how dense healthy scans lie where
a scan's statistics are (Morningstar et al. 2021, "Density of states estimation for out-of-distribution detection").
The statistics are the columns of any scores; their joint distribution is learned from healthy scans that no model was
trained on. Those scans are known again and scored as though they had not been learned from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.scores.base import Found, Healthy, Known, Models, Score, hidden, part, prefixed
from medgen.scores.reference import enough, fingerprints, learned_places, own_rows, place_z

# As if so many scans had shown that values below and above the median spread alike.
_EVEN_SCANS = 10.0
# Spreads beyond which distance counts ever less.
_LINEAR = 8.0
# Healthy scans that are each left out alone, at most; more are left out by as many in turn.
_FOLDS = 100
_NEIGHBOURS = 5
# Healthy values this many spreads away shape no covariance.
_FAR = 6.0
# A normal distribution's standard deviation over its median absolute one.
_MAD = 1.4826

HowName = Literal["mahalanobis", "kde", "knn", "tails"]


def _members(values: Any) -> Any:
    """Scores of what may be dicts."""
    return tuple(_member(value) if isinstance(value, dict) else value for value in values)


def _member(values: dict[str, Any]) -> Score:
    # The table of scores names this module, so it is looked up only when it is needed.
    from medgen.scores import score_of

    return score_of(values)


class DensityOfStates(Score):
    """How unusual the columns of several scores are together.

    Each column becomes z: how many spreads it is above the healthy median, with a spread of its own above and below.
    Low values of a score whose high values are unusual count as 0. Of these z

        mahalanobis   sqrt(z' C^-1 z / k), C their second moments, shrunk (Ledoit & Wolf 2004)
        kde           -sum over columns of log p(z), p a kernel density (equation 5 of Morningstar et al.)
        knn           mean distance to the 5 nearest healthy scans
        tails         weighted mean over members of -log P(a healthy scan's member is as unusual), a member being the
                      Mahalanobis distance of its columns; the tail is normal and goes on beyond the data; the weight
                      is one over how many members say the same, the sum over members of squared correlations

    The map is the mean over members with maps of their z at each place.

    Args:
        members: the scores.
        how: what 'together' means.
        maps: whether it makes a map.
    """

    do: Literal["states"] = "states"
    members: Annotated[tuple[SerializeAsAny[Score], ...], BeforeValidator(_members)] = Field(min_length=1)
    how: HowName = "tails"
    maps: bool = True

    @property
    def asks(self) -> tuple[str, ...]:
        """Whom its members ask."""
        return tuple(dict.fromkeys(name for member in self.members for name in member.asks))

    def check(self, models: Models) -> None:
        """Refuse models that cannot give what a member asks."""
        for member in self.members:
            member.check(models)

    @torch.no_grad()
    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """What its members know, their columns on held-out healthy scans, and what those say left out in turn."""
        known: dict[str, Tensor] = {}
        columns, prints = [], torch.zeros(0, 2)
        for number, member in enumerate(self.members):
            mine = member.learn(models, healthy)
            known |= prefixed(mine, f"{number}.member")
            rows, maps, prints = _held(member, models, healthy, mine, self.maps)
            columns.append(rows)
            known |= prefixed(maps, f"{number}.map")
        rows, sizes = torch.cat(columns, 1).double(), [one.shape[1] for one in columns]
        known |= prefixed(self._usual(rows, sizes), "usual")
        return known | {"own": prints, "left_out": self._left_out(rows, sizes)}

    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """How unusual, and where."""
        return self.answer(models, batch, known, {})

    @torch.no_grad()
    def answer(self, models: Models, batch: Batch, known: Known, told: dict[Score, Found]) -> Found:
        """The same, with what its members told others already."""
        columns, maps = [], []
        own = own_rows(batch.x, known["own"])
        for number, member in enumerate(self.members):
            found = member.answer(models, batch, part(known, f"{number}.member"), told)
            columns.append(found.values.cpu().double())
            places = part(known, f"{number}.map")
            if found.map is not None and places:
                z = place_z(found.map[:, None], places, (own >= 0).to(found.map.device))[:, 0]
                maps.append((z.abs() if member.two_sided else z).to(batch.x.device))
        sizes = [one.shape[1] for one in columns]
        # Bundles of earlier versions keep the healthy rows themselves.
        usual = self._usual(known["rows"].double(), sizes) if "rows" in known else part(known, "usual")
        values = self._unusual(torch.cat(columns, 1), {name: t.cpu() for name, t in usual.items()}, sizes)
        values = torch.where(own >= 0, known["left_out"].cpu().double()[own], values)
        shown = torch.stack(maps).mean(0) if maps else None
        return Found(values[:, None].to(batch.x), None if shown is None else hidden(shown, batch.real))

    def together(
        self, columns: Float[Tensor, "b k"], healthy: Float[Tensor, "n k"], sizes: list[int]
    ) -> Float[Tensor, " b"]:
        """How unusual rows of columns are among healthy rows; `sizes` are how many columns each member has."""
        return self._unusual(columns, self._usual(healthy, sizes), sizes)

    def _usual(self, healthy: Float[Tensor, "n k"], sizes: list[int]) -> dict[str, Tensor]:
        """What has to be known of healthy rows, computed once."""
        spreads = Spreads.of(healthy)
        known, z = {"columns": spreads.stacked}, spreads(healthy)
        if self.how == "tails":
            return known | self._usual_members(z, sizes)
        z = torch.where(self._sided(sizes), z, z.clamp(min=0))
        return known | ({"inverse": _moments(z)[0]} if self.how == "mahalanobis" else {"rows": z})

    def _usual_members(self, z: Float[Tensor, "n k"], sizes: list[int]) -> dict[str, Tensor]:
        """Of each member with several columns, or a two-sided one, the moments; spreads and weights of all."""
        known: dict[str, Tensor] = {}
        ones = []
        for number, (member, mine) in enumerate(zip(self.members, z.split(sizes, 1), strict=True)):
            if _is_plain(member, mine):
                ones.append(mine[:, 0])
                continue
            known[f"{number}.inverse"], squared = _moments(mine if member.two_sided else mine.clamp(min=0))
            ones.append(squared ** (1 / 3))
        members = torch.stack(ones, 1)
        spreads = Spreads.of(members)
        alike = torch.corrcoef(spreads(members).T).reshape(len(sizes), len(sizes)).nan_to_num().fill_diagonal_(1)
        return known | {"members": spreads.stacked, "weight": 1 / alike.square().sum(1)}

    def _unusual(self, columns: Float[Tensor, "b k"], known: Known, sizes: list[int]) -> Float[Tensor, " b"]:
        """How unusual rows are, by what `_usual` knows."""
        z = Spreads(*known["columns"])(columns)
        if self.how == "tails":
            return self._tails(z, known, sizes)
        z = torch.where(self._sided(sizes), z, z.clamp(min=0))
        if self.how == "mahalanobis":
            return _squared(z, known["inverse"]).sqrt()
        if self.how == "kde":
            return _kernel_surprise(z, known["rows"])
        near = torch.cdist(z, known["rows"]).topk(min(_NEIGHBOURS, len(known["rows"])), largest=False)
        return near.values.mean(1)

    def _tails(self, z: Float[Tensor, "b k"], known: Known, sizes: list[int]) -> Float[Tensor, " b"]:
        """Each member as one number, the higher the less usual, about normal for healthy scans; their tails' mean.

        Of several columns, or a two-sided one, the cube root of the squared Mahalanobis distance (Wilson & Hilferty
        1931).
        """
        ones = []
        for number, (member, mine) in enumerate(zip(self.members, z.split(sizes, 1), strict=True)):
            if _is_plain(member, mine):
                ones.append(mine[:, 0])
                continue
            mine = mine if member.two_sided else mine.clamp(min=0)
            ones.append(_squared(mine, known[f"{number}.inverse"]) ** (1 / 3))
        far = Spreads(*known["members"])(torch.stack(ones, 1))
        return (-torch.special.log_ndtr(-far) * known["weight"]).sum(1) / known["weight"].sum()

    def _sided(self, sizes: list[int]) -> Bool[Tensor, " k"]:
        """Which columns are two-sided."""
        each = torch.tensor([member.two_sided for member in self.members])
        return each.repeat_interleave(torch.tensor(sizes))

    def _left_out(self, rows: Float[Tensor, "n k"], sizes: list[int]) -> Float[Tensor, " n"]:
        """Each healthy row among the others."""
        turn = torch.arange(len(rows)) % _FOLDS
        found = rows.new_empty(len(rows))
        for fold in turn.unique():
            found[turn == fold] = self.together(rows[turn == fold], rows[turn != fold], sizes)
        return found.float()


@dataclass(frozen=True, eq=False)
class Spreads:
    """How many spreads values lie above the healthy median: one spread above it and one below, for each column.

        s+- = sqrt of the mean square of what lies above (below) the median, both drawn towards the common spread

    Far values do not make the spread, as deviations are cut at four robust ones; yet they go on counting: beyond 8
    spreads as 8 (1 + log(z / 8)), so that a spread known from few scans, or too small, does not drown all else.
    """

    middle: Float[Tensor, " k"]
    above: Float[Tensor, " k"]
    below: Float[Tensor, " k"]

    @classmethod
    def of(cls, healthy: Float[Tensor, "n k"]) -> "Spreads":
        """Those of healthy values."""
        middle = healthy.quantile(0.5, 0)
        away = healthy - middle
        robust = _MAD * away.abs().quantile(0.5, 0)
        robust = torch.where(robust > 0, robust, away.square().mean(0).sqrt())
        away = away.clamp(-4 * robust, 4 * robust)
        least = 1e-6 * middle.abs() + 1e-12
        common = away.square().mean(0)
        sides = []
        for side in (away > 0, away < 0):
            square = torch.where(side, away, 0).square().sum(0)
            sides.append(((square + _EVEN_SCANS * common) / (side.sum(0) + _EVEN_SCANS)).sqrt().maximum(least))
        return cls(middle, *sides)

    @property
    def stacked(self) -> Float[Tensor, "3 k"]:
        """As a tensor, whose rows make them again."""
        return torch.stack([self.middle, self.above, self.below])

    def __call__(self, values: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """z of each value."""
        away = values - self.middle
        z = away / torch.where(away > 0, self.above, self.below)
        far = (z.abs() / _LINEAR).clamp(min=1)
        return torch.where(far > 1, z.sign() * _LINEAR * (1 + far.log()), z)


def _is_plain(member: Score, z: Float[Tensor, "b k"]) -> bool:
    """Whether a member's number is its only column."""
    return z.shape[1] == 1 and not member.two_sided


def _squared(z: Float[Tensor, "b k"], inverse: Float[Tensor, "k k"]) -> Float[Tensor, " b"]:
    """Squared Mahalanobis distances over k from 0."""
    return ((z @ inverse) * z).sum(1).clamp(min=0) / z.shape[1]


def _moments(healthy: Float[Tensor, "n k"]) -> tuple[Float[Tensor, "k k"], Float[Tensor, " n"]]:
    """The inverse of the second moments of healthy rows, and each row's squared distance by those of the others.

    Without row z the moments (1 - s) S + r I lose (1 - s) z z' / n; their inverse is Sherman & Morrison's (1950).
    """
    from sklearn.covariance import ledoit_wolf

    healthy = healthy.clamp(-_FAR, _FAR)
    moments, shrinkage = ledoit_wolf(healthy.numpy(), assume_centered=True)
    inverse = torch.linalg.inv(torch.from_numpy(moments) + 1e-6 * torch.eye(len(moments), dtype=healthy.dtype))
    squared = ((healthy @ inverse) * healthy).sum(1).clamp(min=0)
    usual = squared / (1 - (1 - shrinkage) / len(healthy) * squared).clamp(min=1e-3)
    return inverse.contiguous(), usual / healthy.shape[1]


def _kernel_surprise(z: Float[Tensor, "b k"], healthy: Float[Tensor, "n k"]) -> Float[Tensor, " b"]:
    """Gaussian kernels of Silverman's width (1986, equation 3.31) at the healthy rows, for each column."""
    width = (0.9 * healthy.std(0) * len(healthy) ** -0.2).clamp(min=1e-2)
    exponent = -0.5 * ((z[:, None] - healthy[None]) / width).square()
    return -(exponent.logsumexp(1) - width.log()).sum(1)


def _held(
    member: Score, models: Models, healthy: Healthy, known: Known, maps: bool
) -> tuple[Float[Tensor, "n k"], dict[str, Tensor], Float[Tensor, "n 2"]]:
    """A member's columns on held-out healthy scans, what its maps are at each place, and the scans' fingerprints."""
    rows: list[Tensor] = []
    prints: list[Tensor] = []

    def shown() -> Iterator[tuple[Tensor, Batch]]:
        for batch in healthy.held():
            found = member(models, batch, known)
            rows.append(found.values.float().cpu())
            prints.append(fingerprints(batch.x))
            if maps and found.map is not None:
                yield found.map[:, None], batch

    stream = shown()
    first = next(stream, None)  # without maps this runs to the end
    places = learned_places(chain([first], stream), "states") if first else {}
    enough(sum(map(len, rows)), 3, "states")
    return torch.cat(rows), places, torch.cat(prints)


__all__ = ["DensityOfStates", "HowName", "Spreads"]

"""What a healthy score is at an age, for a sex: scans are judged by what is usual for such a person."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float

# Columns that are looked for, in any case of letters.
_AGE, _SEX = ("age", "age_years"), ("sex", "gender")
# Fewer scans than this cannot tell what age and sex do to a score.
_FEWEST = 19
# Ages beyond so many standard deviations count as that far: nobody knows how a curve goes on.
_FAR = 3.0


@dataclass(frozen=True, eq=False)
class Norms:
    """Ridge regression of the healthy score on age, its square and sex; what remains is compared.

        r = (s - a w) / sqrt(1 + a M^-1 a'),   M = A'A + ridge

    The calibration scans' own remainders leave each of them out, e / sqrt(1 - h), which is r of a regression on the
    others, so a new healthy scan's r ranks among them nearly like any other (the jackknife: Barber et al. 2021). No
    person's age or sex is kept.

    Args:
        uses: 'age', 'sex' or both.
        mean, sd: of the calibration scans' ages.
        weights: w, of the columns 1, age, age squared, sex that are used.
        inverse: M^-1.
        residuals: r of the calibration scans, in ascending order.
        reach: largest a M^-1 a' among them: whoever is beyond is unlike any of them.
    """

    uses: tuple[str, ...]
    mean: float
    sd: float
    weights: Float[np.ndarray, " k"]
    inverse: Float[np.ndarray, "k k"]
    residuals: Float[np.ndarray, " n"]
    reach: float

    def remainder(self, score: float, cells: Mapping[str, str]) -> float | None:
        """What is unusual about a score beyond age and sex; None where a row does not tell them."""
        row = self._row(cells)
        return None if row is None else float((score - row @ self.weights) / np.sqrt(1 + row @ self.inverse @ row))

    def limits(self, cells: Mapping[str, str]) -> tuple[str, ...]:
        """What has to be said of a scan of somebody whose age and sex are these."""
        row, named = self._row(cells), " and ".join(self.uses)
        if row is None:
            return (f"no {named} told: compared with healthy scans of any {named}",)
        # Rounding must not put a calibration scan beyond itself.
        beyond = row @ self.inverse @ row > 1.0001 * self.reach
        return (f"no calibration scan is of such {named}: its p-value rests on extrapolation",) if beyond else ()

    def _row(self, cells: Mapping[str, str]) -> Float[np.ndarray, " k"] | None:
        told = {"age": _age(cells), "sex": _sex(cells)}
        known = all(told[name] is not None for name in self.uses)
        return np.asarray(_columns(self.uses, self.mean, self.sd, told)) if known else None

    def plain(self) -> dict[str, Any]:
        """Plain numbers, for a bundle."""
        return {
            "uses": list(self.uses),
            "mean": self.mean,
            "sd": self.sd,
            "weights": self.weights.tolist(),
            "inverse": self.inverse.tolist(),
            "residuals": self.residuals.tolist(),
            "reach": self.reach,
        }

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> "Norms | None":
        """The norms in a bundle's calibration; None where there are none."""
        told = numbers.get("norms")
        if not told:
            return None
        arrays = {name: np.asarray(told[name], float) for name in ("weights", "inverse", "residuals")}
        return cls(tuple(told["uses"]), float(told["mean"]), float(told["sd"]), **arrays, reach=float(told["reach"]))


def norms(scores: Float[np.ndarray, " n"], people: Sequence[Mapping[str, str]]) -> Norms | None:
    """Learn them from held-out healthy scans; None where fewer than 19 tell age or sex, or all are alike.

    Args:
        scores: of the scans.
        people: what is known of each: cells of a manifest, such as {'age': '43', 'sex': 'F'}.
    """
    ages, sexes = [_age(cells) for cells in people], [_sex(cells) for cells in people]
    seen = {"age": ages, "sex": sexes}
    uses = tuple(name for name, values in seen.items() if _tells(values))
    told = [n for n in range(len(people)) if all(seen[name][n] is not None for name in uses)]
    if not uses or len(told) < _FEWEST:
        return None
    some = [age for n in told if "age" in uses and (age := ages[n]) is not None]
    mean, sd = (float(np.mean(some)), float(np.std(some))) if some else (0.0, 1.0)
    if sd == 0 or len({sexes[n] for n in told} if "sex" in uses else {0, 1}) < 2:
        return None
    table = np.asarray([_columns(uses, mean, sd, {"age": ages[n], "sex": sexes[n]}) for n in told])
    ridge = np.diag([0.0] + [1.0] * (table.shape[1] - 1))
    inverse = np.linalg.inv(table.T @ table + ridge)
    weights = inverse @ table.T @ scores[told]
    leverage = np.einsum("nk,kl,nl->n", table, inverse, table)
    left_out = (scores[told] - table @ weights) / np.sqrt(1 - leverage)
    return Norms(uses, mean, sd, weights, inverse, np.sort(left_out), float(leverage.max()))


def _age(cells: Mapping[str, str]) -> float | None:
    """Years, where a row tells them."""
    try:
        age = float(_cell(cells, _AGE))
    except ValueError:
        return None
    return age if isfinite(age) else None


def _sex(cells: Mapping[str, str]) -> float | None:
    """-1/2 for a cell that begins with F, 1/2 with M."""
    return {"F": -0.5, "M": 0.5}.get(_cell(cells, _SEX)[:1].upper())


def _cell(cells: Mapping[str, str], names: Sequence[str]) -> str:
    return next((value.strip() for name, value in cells.items() if name.strip().lower() in names), "")


def _tells(values: Sequence[float | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) >= _FEWEST and len(set(known)) > 1


def _columns(uses: Sequence[str], mean: float, sd: float, told: Mapping[str, float | None]) -> list[float]:
    row = [1.0]
    if "age" in uses:
        years = float(np.clip(((told["age"] or 0.0) - mean) / sd, -_FAR, _FAR))
        row += [years, years**2 - 1]
    return row + ([told["sex"] or 0.0] if "sex" in uses else [])


__all__ = ["Norms", "norms"]

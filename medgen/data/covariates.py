"""What else is known of a scan besides its class, such as age and sex: a manifest's columns as numbers."""

from collections.abc import Sequence
from math import isfinite
from statistics import fmean, stdev

from pydantic import BaseModel, ConfigDict, Field

from medgen.data.manifest import Manifest
from medgen.errors import DataError

# A column with more words than this names scans rather than kinds of scans.
_MOST_LEVELS = 12
_UNKNOWN = ("", "n/a", "na", "nan", "none", "unknown")


class Covariate(BaseModel):
    """Something else that is known of each scan, such as age or sex, as numbers a model can be conditioned on.

    Args:
        name: the manifest's column.
        mean, sd: of a number over the training scans; it enters as (value - mean) / sd.
        levels: of a word, such as ('F', 'M'); it enters as one 0 or 1 a level. Empty for a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    mean: float = 0.0
    sd: float = Field(default=1.0, gt=0)
    levels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers it takes."""
        return len(self.levels) or 1

    def numbers(self, value: str) -> list[float]:
        """The numbers of a manifest's cell; what is not known counts as average."""
        if self.levels:
            return [float(value == level) for level in self.levels]
        known = _number(value)
        return [0.0 if known is None else (known - self.mean) / self.sd]

    def refusal(self, value: str) -> str:
        """A sentence on why a person cannot give this value; '' where it is fine."""
        if self.levels:
            told = f"{self.name} is one of {', '.join(self.levels)}; found {value!r}."
            return "" if value in self.levels else told
        return (
            "" if _number(value) is not None else f"{self.name} is a number, such as {self.mean:.4g}; found {value!r}."
        )


def covariates_of(manifest: Manifest, names: Sequence[str]) -> tuple[Covariate, ...]:
    """What the training scans' columns `names` hold: a number where every known cell is one, else words.

    Raises:
        DataError: there is no such column, it is the same for all scans, or it has too many different words.
    """
    rows = manifest.split("train").rows
    found = sorted({name for row in rows for name in row.covariates})
    made = []
    for name in dict.fromkeys(names):
        cells = [row.covariates.get(name, "") for row in rows]
        known = [cell for cell in cells if cell.lower() not in _UNKNOWN]
        if not known:
            raise DataError(
                f"No training scan says its {name!r}. Columns beside the usual ones: {', '.join(found) or 'none'}. "
                "Give a CSV with such a column, or leave it out of the covariates."
            )
        made.append(_covariate(name, known))
    return tuple(made)


def _covariate(name: str, known: Sequence[str]) -> Covariate:
    numbers = [number for cell in known if (number := _number(cell)) is not None]
    numeric = len(numbers) == len(known)
    if len({*(numbers if numeric else known)}) == 1:
        raise DataError(f"The column {name!r} is the same for all training scans, so it tells nothing. Leave it out.")
    if numeric:
        return Covariate(name=name, mean=fmean(numbers), sd=stdev(numbers))
    levels = tuple(sorted(set(known)))
    if len(levels) > _MOST_LEVELS:
        raise DataError(
            f"The column {name!r} has {len(levels)} different words; a covariate is a number or one of at most "
            f"{_MOST_LEVELS} words. Check for cells that are not numbers, or leave it out."
        )
    return Covariate(name=name, levels=levels)


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if isfinite(value) else None


__all__ = ["Covariate", "covariates_of"]

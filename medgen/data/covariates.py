"""What else is known of a scan besides its class, such as age, sex or a line of a report, as numbers."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import isfinite
from statistics import fmean, stdev

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medgen.data.manifest import Manifest
from medgen.errors import DataError
from medgen.log import note

# A column with more different cells than this is text, of which single words are looked at.
_MOST_LEVELS = 12
# A word of fewer patients could name somebody; one that nearly all scans have tells nothing; more are too many to tell.
_FEWEST_PATIENTS, _LARGEST_SHARE, _MOST_WORDS = 3, 0.95, 32
# A cell of more words is a sentence, which could name somebody, however few different ones there are.
_LONGEST_LEVEL = 3
_UNKNOWN = ("", "n/a", "na", "nan", "none", "unknown")


class Covariate(BaseModel):
    """Something else that is known of each scan, such as age or sex, as numbers a model can be conditioned on.

    Args:
        name: the manifest's column.
        mean, sd: of a number over the training scans; it enters as (value - mean) / sd.
        levels: of a word, such as ('F', 'M'); it enters as one 0 or 1 a level. Empty for a number.
        words: of a text; it enters as one 0 or 1 a word, in whatever order the text has them.
        shares: of the training scans that say anything, those whose text has each word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    mean: float = 0.0
    sd: float = Field(default=1.0, gt=0)
    levels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> "Covariate":
        if self.levels and self.words:
            raise ValueError(f"{self.name}: is one of its levels or a text of its words, not both")
        if len(self.words) != len(self.shares):
            raise ValueError(f"{self.name}: {len(self.words)} words need as many shares; found {len(self.shares)}")
        return self

    @property
    def width(self) -> int:
        """How many numbers it takes."""
        return len(self.levels) or len(self.words) or 1

    def numbers(self, value: str) -> list[float]:
        """The numbers of a manifest's cell; a number that is not known counts as average.

        >>> Covariate(name="report", words=("cyst", "tumour"), shares=(0.2, 0.1)).numbers("Small cyst, left.")
        [1.0, 0.0]
        """
        if self.levels:
            return [float(value == level) for level in self.levels]
        if self.words:
            used = _words(value)
            return [float(word in used) for word in self.words]
        known = _number(value)
        return [0.0 if known is None else (known - self.mean) / self.sd]

    def refusal(self, value: str) -> str:
        """A sentence on why a person cannot give this value; '' where it is fine."""
        if self.levels:
            told = f"{self.name} is one of {', '.join(self.levels)}; found {value!r}."
            return "" if value in self.levels else told
        if self.words:
            told = f"{self.name} has at least one of the words {', '.join(self.words)}; found {value!r}."
            return "" if any(self.numbers(value)) else told
        return (
            "" if _number(value) is not None else f"{self.name} is a number, such as {self.mean:.4g}; found {value!r}."
        )


def covariates_of(manifest: Manifest, names: Sequence[str]) -> tuple[Covariate, ...]:
    """What the training scans' columns `names` hold: a number where every known cell is one, else levels or a text.

    A column of more than 12 different cells, or with a cell of more than 3 words, is a text. Of it words of letters
    count that at least 3 patients have and at most 95 % of the scans, of those the 32 that most patients have: a rare
    word could name somebody.

    Raises:
        DataError: there is no such column, it is the same for all scans, or its cells have too little in common.
    """
    rows = manifest.split("train").rows
    found = sorted({name for row in rows for name in row.covariates})
    made = []
    for name in dict.fromkeys(names):
        cells = [(row.patient, row.covariates.get(name, "")) for row in rows]
        known = [(patient, cell) for patient, cell in cells if cell.lower() not in _UNKNOWN]
        if not known:
            raise DataError(
                f"No training scan says its {name!r}. Columns beside the usual ones: {', '.join(found) or 'none'}. "
                "Give a CSV with such a column, or leave it out of the covariates."
            )
        made.append(_covariate(name, known))
    return tuple(made)


def _covariate(name: str, told: Sequence[tuple[str, str]]) -> Covariate:
    """What (patient, cell) of the scans that say something have in common."""
    known = [cell for _, cell in told]
    numbers = [number for cell in known if (number := _number(cell)) is not None]
    numeric = len(numbers) == len(known)
    if len({*(numbers if numeric else known)}) == 1:
        raise DataError(f"The column {name!r} is the same for all training scans, so it tells nothing. Leave it out.")
    if numeric:
        return Covariate(name=name, mean=fmean(numbers), sd=stdev(numbers))
    levels = tuple(sorted(set(known)))
    if len(levels) <= _MOST_LEVELS and all(len(level.split()) <= _LONGEST_LEVEL for level in levels):
        return Covariate(name=name, levels=levels)
    shares = _vocabulary(told)
    if len(shares) < 2:
        raise DataError(
            f"The column {name!r} has {len(levels)} different words; a covariate is a number, one of at most "
            f"{_MOST_LEVELS} words, or a text with two or more words that {_FEWEST_PATIENTS} patients have in common. "
            "Check for cells that are not numbers, or leave it out."
        )
    note(
        f"The model is told which of these words the column {name!r} has: {', '.join(shares)}. They are kept in the "
        "bundle: leave the column out if one of them names somebody."
    )
    return Covariate(name=name, words=tuple(shares), shares=tuple(shares.values()))


def _vocabulary(told: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Words that are neither rare nor everywhere, in the alphabet's order, with the share of texts that have them."""
    texts = [(patient, _words(cell)) for patient, cell in told]
    patients = Counter(word for _, word in {(patient, word) for patient, words in texts for word in words})
    shares = {word: count / len(texts) for word, count in Counter(word for _, words in texts for word in words).items()}
    fit = [word for word in patients if patients[word] >= _FEWEST_PATIENTS and shares[word] <= _LARGEST_SHARE]
    chosen = sorted(fit, key=lambda word: (-patients[word], word))[:_MOST_WORDS]
    return {word: round(shares[word], 4) for word in sorted(chosen)}


def _words(text: str) -> set[str]:
    """The words of a text, in lower case; what has digits is a date, a number or a name of something."""
    return {word for word in re.findall(r"\w+", text.lower()) if word.isalpha()}


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if isfinite(value) else None


__all__ = ["Covariate", "covariates_of"]

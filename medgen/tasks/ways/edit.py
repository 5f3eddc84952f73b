"""One thing about a real scan changed, such as its patient's age, as a model has learned that it changes scans.

    x' = D(E(x | c) | c')

which for a flow is exact: with c' = c it gives back x.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from medgen.data.covariates import Covariate
from medgen.data.manifest import Row
from medgen.errors import ConfigError, DataError
from medgen.tasks.ways.base import Made, Material
from medgen.tasks.ways.coding import Coding, Read
from medgen.tasks.ways.sources import Sources, by_class, covariates_kept, patient_name, seed_of, source_name


class EditWay:
    """Training scans encoded as what they are and decoded as what they might be.

    Args:
        material: with a bundle whose model encodes, decodes and was told covariates.
        vary: what becomes of each: '40:80' draws a number evenly, 'F|M' one of several (another than it is), '70' is
            that. What the material tells is changed, too.
        device: 'auto', 'cpu', 'cuda', 'mps'.

    Raises:
        CapabilityError: the model cannot do that.
        ConfigError: the model was not told of such a covariate, or the values make no sense.
        DataError: no training scan says its own.
    """

    def __init__(self, material: Material, vary: Mapping[str, str], *, device: str = "auto") -> None:
        self._material, self._coding = material, Coding(material, "edit", device)
        known = {one.name: one for one in getattr(self._coding.config, "covariates", ())}
        vary = {**material.tell, **vary}
        if not vary:
            raise ConfigError("Say what is to change, such as age=40:80.")
        for name in vary:
            if name not in known:
                told = f"It was told: {', '.join(known)}." if known else "It was told none: train with --covariates."
                raise ConfigError(f"The model was not told of the covariate {name!r}, so it cannot vary it. {told}")
        self._vary = {name: _Values(known[name], spec) for name, spec in vary.items()}
        rows = {label: [row for row in some if self._says(row)] for label, some in by_class(material.manifest).items()}
        rows = {label: some for label, some in rows.items() if some}
        if not rows:
            raise DataError(f"No training scan says its own {' and '.join(vary)}, so nothing can be changed.")
        seed = seed_of(material.seed, "edit")
        self._sources = Sources(rows, self._coding.read, seed=seed, size=lambda read: read.size)

    @property
    def labels(self) -> Sequence[str]:
        """Classes of scans that say their own values, [''] where there are no classes."""
        return self._sources.labels

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates `first` to `first + count - 1`; number i depends on (seed, label, i) alone.

        Raises:
            DataError: there is no such class, or none of its scans can be used.
        """
        numbers = range(first, first + count)
        return [self._sources.made(label, i, lambda _, read, i=i: self._made(label, i, read)) for i in numbers]

    def _says(self, row: Row) -> bool:
        return all(one.known(row.covariates.get(name, "")) for name, one in self._vary.items())

    def _made(self, label: str, i: int, read: Read) -> Made:
        seed, coding, row = seed_of(self._material.seed, "edit", label, i), self._coding, read.row
        rng = np.random.default_rng(seed)
        new = {name: one.drawn(rng, row.covariates[name]) for name, one in self._vary.items()}
        values = coding.decode(coding.encode(read, coding.told(read)), coding.told(read, new))
        scan, mask = coding.scan(values, read.taken, read.taken.ready.scale)
        said = covariates_kept(row, self._material)
        changes = {name: {"from": said.get(name, ""), "to": cell} for name, cell in new.items()}
        return Made(
            x=values[: coding.config.images].clone(), scan=scan, label=label, mask=mask,
            covariates=said | new, how="edit", sources=(source_name(row, self._material.key),),
            patient=patient_name(row, self._material.key),
            parameters={"varied": changes, "seed": seed, "weights_sha256": coding.bundle.weights_sha256},
        )  # fmt: skip


class _Values:
    """What a covariate may become.

    Args:
        covariate: as the model was told it.
        spec: 'low:high', 'one|another' or a value.

    Raises:
        ConfigError: it says no such thing.
    """

    def __init__(self, covariate: Covariate, spec: str) -> None:
        self._covariate, self._ends = covariate, _range_of(covariate, spec)
        self._choices = [part.strip() for part in spec.split("|")]
        wrong = "" if self._ends else next(filter(None, map(covariate.refusal, self._choices)), "")
        if wrong:
            more = "" if covariate.levels or covariate.words else " Or a range, such as 40:80."
            raise ConfigError(f"{wrong}{more}")

    def known(self, cell: str) -> bool:
        """Whether a cell says something that the model understands."""
        return not self._covariate.refusal(cell)

    def drawn(self, rng: np.random.Generator, now: str) -> str:
        """A value, another than there is where several are allowed."""
        if self._ends:
            return f"{rng.uniform(*self._ends):.4g}"
        others = [one for one in self._choices if one != now] or self._choices
        return others[int(rng.integers(len(others)))]


def _range_of(covariate: Covariate, spec: str) -> tuple[float, float] | None:
    """The ends of 'low:high' of a number; None where it is something else.

    Raises:
        ConfigError: they are not two numbers in ascending order.
    """
    if ":" not in spec or covariate.levels or covariate.words:
        return None
    low, _, high = spec.partition(":")
    if covariate.refusal(low) or covariate.refusal(high) or not float(low) < float(high):
        raise ConfigError(f"{covariate.name}: expected a range of two numbers, such as 40:80; found {spec!r}.")
    return float(low), float(high)


__all__ = ["EditWay"]

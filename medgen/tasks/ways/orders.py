"""How many scans of which class to make, and in which way: decided before anything is made."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from medgen.data.manifest import Manifest
from medgen.errors import ConfigError
from medgen.tasks.ways.base import How

# Ways that need a trained model; removing lesions does, too.
LEARNED: tuple[How, ...] = ("sample", "interpolate", "edit")
_USUAL, _USUAL_OF_CLASS = 20, 10


@dataclass(frozen=True)
class Making:
    """What a person decides about the scans to make.

    Args:
        how: 'sample' from noise; 'interpolate' between the codes of two patients of a class; 'morph' moves one's
            anatomy towards the other's; 'edit' changes one covariate of a scan; 'lesion' puts one into a scan or takes
            it out; 'classic' moves and shades a scan; 'mix' of several.
        mix: weights of the ways, for 'mix'.
        n: how many scans in all.
        per_class: how many of each class instead.
        ratio: how many for each training scan instead, such as 0.5.
        balance: make classes equal: as many more of each as it lacks to the largest; with `ratio`, on top of that.
        tell: covariates that are fixed, such as {'age': '70'}.
        vary: for 'edit': what a covariate becomes, such as {'age': '40:80'}.
        lesions: for 'lesion': 'insert' one, 'remove' what the mask marks, or 'auto': whichever a scan lets do.
        shapes: masks that scans are drawn for, where the model is given masks.
        reject: the part of real scans that the quality gate may reject; 0: no such gate.
    """

    how: How | Literal["mix"] = "sample"
    mix: Mapping[str, float] = field(default_factory=dict)
    n: int | None = None
    per_class: int | None = None
    ratio: float | None = None
    balance: bool = False
    tell: Mapping[str, str] = field(default_factory=dict)
    vary: Mapping[str, str] = field(default_factory=dict)
    lesions: Literal["insert", "remove", "auto"] = "insert"
    shapes: Literal["real", "deformed", "sampled"] = "real"
    reject: float = 0.01

    def __post_init__(self) -> None:
        known = get_args(How)
        if self.how not in (*known, "mix"):
            raise ConfigError(f"--how takes {', '.join(known)} or mix; found {self.how!r}.")
        if (self.how == "mix") != bool(self.mix):
            raise ConfigError("A mix says its parts: --how mix --mix sample=2,classic=1; other ways take no --mix.")
        if unknown := sorted(set(self.mix) - set(known)):
            raise ConfigError(f"--mix: there is no way {unknown[0]!r}. Ways: {', '.join(known)}.")
        if any(not weight > 0 for weight in self.mix.values()):
            raise ConfigError("--mix: weights are above 0. Leave out what is not wanted.")
        counts = [name for name in ("n", "per_class", "ratio") if getattr(self, name) is not None]
        counts += ["balance"] if self.balance and self.ratio is None else []
        if len(counts) > 1:
            told = " and ".join(f"--{name.replace('_', '-')}" for name in counts)
            raise ConfigError(f"{told} exclude each other: each says how many scans to make.")
        if any(value is not None and not value > 0 for value in (self.n, self.per_class, self.ratio)):
            raise ConfigError("The number of scans to write must be at least 1, and a ratio above 0.")
        if not 0 <= self.reject < 0.5:
            raise ConfigError(f"The quality gate may reject 0 to less than half of real scans; found {self.reject:g}.")
        if self.tell and "sample" not in self.ways:
            raise ConfigError("--tell fixes covariates of scans from noise; made of somebody's scan they have theirs.")
        if bool(self.vary) != ("edit" in self.ways):
            raise ConfigError("Edited scans say what becomes of a covariate: --how edit --vary age=40:80.")

    @property
    def ways(self) -> dict[How, float]:
        """The share of each way."""
        weights = self.mix or {self.how: 1.0}
        total = sum(weights.values())
        return {name: weights[name] / total for name in get_args(How) if name in weights}

    @property
    def needs_model(self) -> bool:
        """Whether a model has to be learned first."""
        return any(how in LEARNED for how in self.ways) or ("lesion" in self.ways and self.lesions != "insert")

    def settings(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Order:
    """One scan to make.

    Args:
        name: of the case.
        label: class, '' for none.
        how: in which way.
    """

    name: str
    label: str
    how: How


def orders(making: Making, train: Manifest, classes: Sequence[str]) -> list[Order]:
    """Every scan to make, classes in turn where only a total is asked for.

    Raises:
        ConfigError: `per_class` or `balance` without classes, or nothing to make.
    """
    if not classes and (making.per_class is not None or making.balance):
        asked = "--per-class" if making.per_class is not None else "--balance"
        raise ConfigError(f"{asked} needs scans with classes (sub-folders, or a label column). Use --n.")
    labels = _labels(making, Counter(row.label for row in train.rows), classes, len(train))
    if not labels:
        raise ConfigError("There is nothing to make: the classes are balanced already. Use --n or --ratio.")
    digits = max(4, len(str(len(labels))))
    ways = _in_shares(making.ways, labels)
    return [
        Order(f"{'SYN' if ways[i] == 'sample' else 'DER'}-{i + 1:0{digits}d}", label, ways[i])
        for i, label in enumerate(labels)
    ]


def _labels(making: Making, there: Mapping[str, int], classes: Sequence[str], scans: int) -> list[str]:
    """The class of each scan to make."""
    if making.per_class is not None:
        return [name for name in classes for _ in range(making.per_class)]
    if making.balance:
        most = round(max(there.get(name, 0) for name in classes) * (1 + (making.ratio or 0)))
        return [name for name in classes for _ in range(most - there.get(name, 0))]
    if making.ratio is not None and classes:
        return [name for name in classes for _ in range(max(1, round(making.ratio * there.get(name, 0))))]
    total = max(1, round(making.ratio * scans)) if making.ratio is not None else making.n
    if total is None:
        total = _USUAL_OF_CLASS * len(classes) if classes else _USUAL
    return [classes[i % len(classes)] if classes else "" for i in range(total)]


def _in_shares(shares: Mapping[How, float], labels: Sequence[str]) -> list[How]:
    """A way for each scan, so that any run of a class's scans holds each way about in its share."""
    made: dict[str, Counter[How]] = {label: Counter() for label in labels}
    found: list[How] = []
    for label in labels:
        done = made[label]
        behind = max(shares, key=lambda how, done=done: shares[how] * (done.total() + 1) - done[how])
        done[behind] += 1
        found.append(behind)
    return found


__all__ = ["LEARNED", "Making", "Order", "orders"]

"""Who goes to train, val, calibration and test: by patient, by hash, in fixed shares of every class and domain."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from hashlib import sha256

from medgen.errors import ConfigError

SPLITS = ("train", "val", "calibration", "test")
QUOTAS = {"train": 0.6, "val": 0.1, "calibration": 0.2, "test": 0.1}
# Nineteen healthy scans are what an empirical p-value of 0.05 needs: 1 / (19 + 1).
_CALIBRATION = 19
_ENOUGH = 4


def assigned(
    strata: Mapping[str, tuple[Hashable, Hashable]],
    fixed: Mapping[str, str],
    *,
    quotas: Mapping[str, float] = QUOTAS,
    seed: int = 0,
) -> dict[str, str]:
    """A split for every patient; those in `fixed` keep theirs.

    Within each stratum, patients in the order of sha256(seed, patient) go where most are missing.
    Strata of fewer than four patients are filled together with others of the same class.

    Args:
        strata: (class, domain) of each patient.
        fixed: the split of patients that shall not move.
        quotas: share of each split; 0 leaves it empty. Each other split gets at least one patient
            of every stratum of four or more, and calibration at least min(19, 30 %).
        seed: another number, another draw.

    Raises:
        ConfigError: a quota has an unknown name, is negative, or all are 0.
    """
    checked = _checked(quotas)
    sizes = Counter(strata.values())
    members: dict[tuple, list[str]] = defaultdict(list)
    for patient, stratum in strata.items():
        members[stratum if sizes[stratum] >= _ENOUGH else (stratum[0],)].append(patient)
    splits = dict(fixed)
    for patients in members.values():
        aimed = _targets(len(patients), checked, len(strata) >= _ENOUGH)
        held = Counter(splits[patient] for patient in patients if patient in splits)
        waiting = [patient for patient in patients if patient not in splits]
        for patient in sorted(waiting, key=lambda one: _draw(seed, one)):
            splits[patient] = max(aimed, key=lambda split: aimed[split] - held[split])
            held[splits[patient]] += 1
    return {patient: splits[patient] for patient in strata}


def _draw(seed: int, patient: str) -> str:
    return sha256(f"{seed}\n{patient}".encode()).hexdigest()


def _checked(quotas: Mapping[str, float]) -> dict[str, float]:
    wrong = set(quotas) - set(SPLITS)
    if wrong or any(not 0 <= share < float("inf") for share in quotas.values()) or sum(quotas.values()) <= 0:
        raise ConfigError(f"Quotas are shares of {', '.join(SPLITS)}, none negative, not all 0; found {dict(quotas)}.")
    total = sum(quotas.values())
    return {split: quotas[split] / total for split in SPLITS if quotas.get(split, 0) > 0}


def _targets(n: int, quotas: Mapping[str, float], among_others: bool) -> dict[str, int]:
    """How many of `n` patients each split shall have, in the order in which ties are broken."""
    if n < _ENOUGH:
        # Few patients in all are for learning; a class that small among others is for testing.
        order = ("test", "calibration", "train", "val") if among_others else ("train", "calibration", "test", "val")
        used = [split for split in order if split in quotas]
        return {split: int(rank < n) for rank, split in enumerate(used)}
    aimed = {split: max(1, round(share * n)) for split, share in quotas.items()}
    if "calibration" in aimed and len(aimed) > 1:
        aimed["calibration"] = max(aimed["calibration"], min(_CALIBRATION, int(0.3 * n)))
    rest = "train" if "train" in aimed else max(quotas, key=lambda split: quotas[split])
    aimed[rest] = n - sum(count for split, count in aimed.items() if split != rest)
    while aimed[rest] < 1:
        largest = max(aimed, key=lambda split: aimed[split])
        aimed[largest] -= 1
        aimed[rest] += 1
    return aimed


__all__ = ["QUOTAS", "SPLITS", "assigned"]

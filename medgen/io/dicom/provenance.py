"""What an output says of its making: to machines in coded attributes, to people in words they cannot miss."""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from medgen.errors import ConfigError
from medgen.io.dicom.values import code, text

# Some readers guess the vendor from the first letters: none begins with TH.
MANUFACTURER = "The medgen developers"
NOT_DIAGNOSTIC = "Research use only, not for diagnostic use."


@dataclass(frozen=True)
class Provenance:
    """Where the pixels of an output come from, in words that are safe to publish.

    Args:
        description: what was done, in plain words.
        model: name of the model, '' where none took part.
        weights_sha256: hash of its weights.
        seed: random seed, where there was one.
        content: 'derived' (from a patient's scan), 'synthetic' (from noise, nobody's scan) or 'copy'
            (another format or place for the same measured values).
        synthetic_data: whether a network made some of the pixels; None: yes, unless it is a copy.
            Copies, maps and masks of synthetic scans stay synthetic whatever is said here.

    Raises:
        ConfigError: the hash is not 64 hexadecimal digits, or the description is empty.
    """

    description: str
    model: str = ""
    weights_sha256: str = ""
    seed: int | None = None
    content: Literal["derived", "synthetic", "copy"] = "derived"
    synthetic_data: bool | None = None

    def __post_init__(self) -> None:
        if not self.description.strip():
            raise ConfigError("An output needs a description of what was done, in plain words; found none.")
        if self.weights_sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            raise ConfigError("weights_sha256 must be 64 hexadecimal digits; found something else.")
        if self.synthetic_data is None:
            object.__setattr__(self, "synthetic_data", self.content != "copy")

    @property
    def entropy(self) -> tuple[str, ...]:
        """What makes the UIDs of an output its own, besides its pixels."""
        return (self.description, self.model, self.weights_sha256, str(self.seed), self.content)

    @property
    def maker(self) -> str:
        """Model, weights and seed in a sentence."""
        parts = [("model", text(self.model, 200)), ("weights sha256", self.weights_sha256)]
        parts.append(("seed", "" if self.seed is None else text(str(self.seed), 40)))
        return ", ".join(f"{what} {value}" for what, value in parts if value) or "no model took part"


def software_version() -> str:
    """The version of medgen that runs, as installed."""
    try:
        return version("medgen")
    except PackageNotFoundError:
        return "dev"


def equipment(ds: Dataset, provenance: Provenance) -> None:
    """General Equipment (C.7.5.1) and Contributing Equipment (C.12.1): medgen, the model, its weights and seed."""
    item = Dataset()
    made = bool(provenance.synthetic_data)
    item.PurposeOfReferenceCodeSequence = (
        code("109100", "DCM", "Synthesizing Equipment") if made else code("109102", "DCM", "Processing Equipment")
    )
    item.ContributionDescription = f"{text(provenance.description, 500)}; {provenance.maker}"
    for target in (ds, item):
        target.Manufacturer = MANUFACTURER
        target.ManufacturerModelName = "medgen"
        target.SoftwareVersions = software_version()
    ds.ContributingEquipmentSequence = DicomSequence([item])


def provenance_marks(ds: Dataset, provenance: Provenance, synthetic: str, extra: str = "") -> None:
    """Marks for machines and people that say what the pixels are (C.12.1, C.7.6.1).

    Args:
        ds: where to write.
        provenance: what was done.
        synthetic: value of Synthetic Data, 'YES', 'NO' or '' for not stated.
        extra: ends the series description, such as '(channel 2 of 3)'.
    """
    word = {"synthetic": "SYNTHETIC"}.get(provenance.content, "AI" if provenance.synthetic_data else "")
    word = word or ("SYNTHETIC" if synthetic == "YES" else "")
    label = f"{word} {provenance.description}".strip()
    ds.SeriesDescription = f"{text(label, 63 - len(extra))} {extra}".strip()
    ds.ImageComments = text(f"{label}; {provenance.maker}. {NOT_DIAGNOSTIC}", 10240)
    ds.DerivationDescription = f"{text(provenance.description, 500)}; {provenance.maker}. {NOT_DIAGNOSTIC}"
    ds.ContentQualification = "RESEARCH"
    if synthetic:
        ds.SyntheticData = synthetic


__all__ = ["MANUFACTURER", "NOT_DIAGNOSTIC", "Provenance", "equipment", "provenance_marks", "software_version"]

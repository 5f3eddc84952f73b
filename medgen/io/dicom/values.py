"""Single DICOM values that are valid whatever goes in."""

from typing import cast

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.valuerep import DSfloat


def text(value: str, limit: int) -> str:
    """`value` as DICOM text of at most `limit` characters, without separators or control characters."""
    clean = " ".join("".join(c if c.isprintable() and c != "\\" else " " for c in value).split())
    return clean if len(clean) <= limit else clean[: limit - 3].rstrip() + "..."


def decimal(value: float) -> DSfloat:
    """A decimal string of at most 16 characters, as close to `value` as it can say."""
    return cast(DSfloat, DSfloat(float(value) + 0.0, auto_format=True))


def code(value: str, scheme: str, meaning: str) -> DicomSequence:
    """A code sequence with one item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return DicomSequence([item])


__all__ = ["code", "decimal", "text"]

"""Everything medgen raises on purpose, as one tree.

    MedgenError
      ConfigError           a configuration or an option is wrong            exit 2
      CapabilityError       this model cannot do what was asked              exit 2
      DataError             something about the user's files                 exit 3
        UnreadableScan        damaged, unsupported or not a scan
        InconsistentSeries    the files of one series contradict each other
        GeometryError         position, orientation or spacing is unusable
        LeakageError          one patient in two splits
        PrivacyError          an output would carry somebody's identity or image
      OutputError           the output exists or cannot be written           exit 3
      BundleError           damaged, foreign or tampered with                exit 3
      TrainingError         a loss is not finite, memory ran out             exit 1

A message says what was expected, what was found, where, and what to do. It never quotes a header
value that could name a person.
"""


class MedgenError(Exception):
    """Base of every error medgen raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(MedgenError):
    """A configuration, preset or option is wrong."""

    exit_code = 2


class CapabilityError(MedgenError):
    """The model lacks the ability the task needs; the message names models that have it."""

    exit_code = 2


class DataError(MedgenError):
    """Something about the user's files."""

    exit_code = 3


class UnreadableScan(DataError):
    """A file is damaged, truncated, unsupported or no scan at all."""


class InconsistentSeries(DataError):
    """The files of one series contradict each other (missing, duplicate or mixed slices)."""


class GeometryError(DataError):
    """A position, orientation or spacing is missing, contradictory or impossible."""


class LeakageError(DataError):
    """One patient would be in two splits."""


class PrivacyError(DataError):
    """An output would carry somebody's identity, or a copy of somebody's scan."""


class OutputError(MedgenError):
    """The output exists already, or cannot be written completely."""

    exit_code = 3


class BundleError(MedgenError):
    """A bundle is damaged, foreign, tampered with, or made for other scans."""

    exit_code = 3


class TrainingError(MedgenError):
    """Training cannot go on: a loss is not finite, or memory ran out."""


__all__ = [
    "BundleError",
    "CapabilityError",
    "ConfigError",
    "DataError",
    "GeometryError",
    "InconsistentSeries",
    "LeakageError",
    "MedgenError",
    "OutputError",
    "PrivacyError",
    "TrainingError",
    "UnreadableScan",
]

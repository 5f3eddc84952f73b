"""Names that replace names: patient numbers and UIDs that agree with each other and lead nowhere.

A replacement is a keyed hash of the original. Without the key nobody can go back, not even by trying
every patient number of a hospital; with the table, which the caller keeps somewhere safe, anybody can.
"""

import base64
import csv
import hashlib
import hmac
import json
import os
import secrets
import uuid
from collections.abc import Callable
from itertools import count
from pathlib import Path

from medgen.errors import OutputError, PrivacyError

# The root of every UID that is derived rather than drawn; made up once, by uuid4.
_NAMESPACE = uuid.UUID("8d3f2f0c-5b0e-4a7e-9a57-51b4c1d0a9f6")
_COLUMNS = ("kind", "original", "replacement")


def new_uid(*entropy: str) -> str:
    """A DICOM UID under 2.25 that depends on the `entropy` strings alone: same strings, same UID.

    >>> new_uid("weights", "0") == new_uid("weights", "0") != new_uid("weights", "1")
    True
    """
    # JSON keeps ("ab", "c") apart from ("a", "bc").
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(entropy)).int}"


class Pseudonyms:
    """Replacements for patient numbers and UIDs: the same original always gets the same one.

    Args:
        table: CSV that keeps originals beside replacements, and the key; read now if it exists,
            written by `save`. It identifies people: keep it away from the outputs. None: nothing is kept.
        key: secret of at least 16 bytes; None takes the table's, or draws a new one, so that
            without a table nobody can repeat or undo the replacement.

    Raises:
        PrivacyError: the table is damaged, was made with another key, or the key is too short.

    >>> names = Pseudonyms(key=b"sixteen bytes or more")
    >>> names.patient("4711") == names.patient("4711") != names.patient("4712")
    True
    """

    def __init__(self, table: Path | None = None, key: bytes | None = None) -> None:
        self._table = Path(table) if table is not None else None
        self._given: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()
        if key is not None and len(key) < 16:
            raise PrivacyError(
                f"A pseudonym key needs at least 16 bytes; found {len(key)}. Use secrets.token_bytes(32)."
            )
        self._key = key or b""
        self._merge()
        if not self._key:
            self._key = secrets.token_bytes(32)

    def patient(self, original: str) -> str:
        """The pseudonym 'MG-' and eight letters or digits for a patient number."""
        return self._replace("patient", original, self._patient)

    def uid(self, original: str) -> str:
        """The UID under 2.25 that stands for `original`."""
        return self._replace("uid", original.strip("\0 "), self._uid)

    def guard(self, outputs: Path) -> None:
        """Refuse to keep the table where the outputs go.

        Raises:
            PrivacyError: the table lies inside the folder `outputs`.
        """
        if self._table and self._table.resolve().is_relative_to(Path(outputs).resolve()):
            raise PrivacyError(
                f"The pseudonym table {self._table.name} must lie outside the output folder {Path(outputs).name}: "
                "whoever gets the outputs would get the names. Choose another place for the table."
            )

    def save(self) -> None:
        """Write the table, readable by its owner alone, all of it or nothing.

        Raises:
            PrivacyError: there is no table path, or somebody else wrote the table with another key.
            OutputError: the table cannot be written.
        """
        if self._table is None:
            raise PrivacyError("These pseudonyms have no table to save. Give a table path when making them.")
        self._merge()
        rows = [("key", "", self._key.hex()), *((*key, new) for key, new in sorted(self._given.items()))]
        part = self._table.with_name(f".{self._table.name}.{secrets.token_hex(4)}.part")
        try:
            with os.fdopen(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", newline="", encoding="utf-8"
            ) as file:
                csv.writer(file).writerows([_COLUMNS, *rows])
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._table)
        except OSError as error:
            raise OutputError(f"Cannot write the pseudonym table {self._table.name}: {error.strerror}.") from error
        finally:
            part.unlink(missing_ok=True)

    def _merge(self) -> None:
        """Take over what the table on disk knows, which may be more than when it was last read."""
        if self._table is None or not self._table.exists():
            return
        try:
            with self._table.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            if tuple(header) != _COLUMNS or not rows or rows[0][0] != "key" or any(len(row) != 3 for row in rows):
                raise ValueError
            key = bytes.fromhex(rows[0][2])
        except (OSError, ValueError, csv.Error) as error:
            raise PrivacyError(
                f"{self._table.name} is no pseudonym table: a CSV with columns {', '.join(_COLUMNS)}, the key first. "
                "Give the right file, or a new path."
            ) from error
        if self._key and not hmac.compare_digest(key, self._key):
            raise PrivacyError(
                f"The pseudonym table {self._table.name} was made with another key. "
                "Leave the key out to take the table's."
            )
        self._key = key
        self._given |= {(kind, original): new for kind, original, new in rows[1:]}
        self._taken |= set(self._given.values())

    def _replace(self, kind: str, original: str, make: Callable[[bytes], str]) -> str:
        if (kind, original) not in self._given:
            # Eight letters can meet by chance, and two patients must never become one.
            candidates = (make(self._hash(kind, original, attempt)) for attempt in count())
            new = next(candidate for candidate in candidates if candidate not in self._taken)
            self._given[kind, original] = new
            self._taken.add(new)
        return self._given[kind, original]

    def _hash(self, kind: str, original: str, attempt: int) -> bytes:
        message = json.dumps([kind, original, attempt]).encode()
        return hmac.new(self._key, message, hashlib.sha256).digest()

    @staticmethod
    def _patient(digest: bytes) -> str:
        return "MG-" + base64.b32encode(digest[:5]).decode()

    @staticmethod
    def _uid(digest: bytes) -> str:
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


__all__ = ["Pseudonyms", "new_uid"]

"""Where a long task works: beside its output, resumable, renamed into place when complete."""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medgen.errors import OutputError

_JOURNAL, _MANIFEST = "journal.json", "run.json"


class Workspace:
    """The unfinished output `OUT.part`, made by the first `record`; `finish` renames it to OUT.

    An interrupted run leaves OUT.part behind; the same command goes on from there. Another command is
    refused rather than mixed in.

    Args:
        out: the final folder, which must not exist.
        settings: what decides the output; the same settings may go on where they stopped.
        force: replace `out` and discard an unfinished run with other settings.

    Raises:
        OutputError: `out` exists, or holds an unfinished run with other settings, or is somebody else's.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], *, force: bool = False) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(self.out.name + ".part")
        self._started = time.monotonic()
        if self.out.exists() and not force:
            raise OutputError(f"{self.out} exists already. Choose another -o, or pass --force to replace it.")
        if self.out.exists() and not _replaceable(self.out):
            raise OutputError(
                f"{self.out} was not made by medgen (there is no {_MANIFEST} in it): --force does not replace it. "
                "Choose another -o, or move it away."
            )
        signature = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.journal: dict[str, Any] = {"signature": signature, "done": {}}
        self.resumed = False
        # Whether the file is what this session wrote, to the last byte: lines may be added.
        self._whole = False
        try:
            if self.folder.exists():
                self._take_over(signature, force)
        except OSError as error:
            raise OutputError(f"Cannot write beside {self.out}: {error.strerror}.") from error

    def _take_over(self, signature: str, force: bool) -> None:
        place = self.folder / _JOURNAL
        if not place.exists() and any(path.name != f"{_JOURNAL}.part" for path in self.folder.iterdir()):
            raise OutputError(f"{self.folder} is no unfinished run of medgen. Move it away, or choose another -o.")
        journal = _read(place)
        if journal.get("signature") == signature:
            self.journal, self.resumed = journal, True
        elif force or not journal:
            shutil.rmtree(self.folder)
        else:
            raise OutputError(
                f"{self.folder} holds an unfinished run with other settings. Repeat that command to finish it, "
                "or pass --force to discard it."
            )

    @property
    def done(self) -> dict[str, Any]:
        """What the journal says is finished, by name."""
        return self.journal["done"]

    def record(self, name: str | None = None, facts: Any = True) -> None:
        """Note in the journal that `name` is finished; survives an interruption right after.

        The journal's first line is all that was known when it was last written whole, which the first call of a
        session does, and every call without a name; each line after it is one more name with its facts.
        """
        if name is not None:
            self.done[name] = facts
        place = self.folder / _JOURNAL
        try:
            if name is not None and self._whole:
                with place.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, facts]) + "\n")
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            part = place.with_name(_JOURNAL + ".part")
            part.write_text(json.dumps(self.journal) + "\n", encoding="utf-8")
            os.replace(part, place)
            self._whole = True
        except OSError as error:
            self._whole = False
            raise OutputError(f"Cannot write {place}: {error.strerror}. Free some space and run again.") from error

    def start_again(self) -> None:
        """Throw away what an interrupted run left."""
        shutil.rmtree(self.folder)
        self.journal["done"], self.resumed, self._whole = {}, False, False

    def discard(self) -> None:
        """Leave nothing behind: there is nothing worth going on from."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Tell in a sentence when the disk refuses what the block writes."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"Cannot write in {self.folder}: {error.strerror}. Free some space, run again."
            ) from error

    def finish(self, manifest: Mapping[str, Any]) -> Path:
        """Write the run manifest, drop what only resuming needed, and give the folder its final name."""
        # The manifest travels with the output; where things lay on this machine is nobody's business.
        settings = {name: _without_place(value) for name, value in manifest.get("settings", {}).items()}
        stated = {
            "medgen": version("medgen"),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "seconds": round(time.monotonic() - self._started, 1),
            "research_use_only": "Research use only, not a medical device.",
            **manifest,
            "settings": settings,
        }
        try:
            (self.folder / _MANIFEST).write_text(json.dumps(stated, indent=1, default=str) + "\n")
            (self.folder / _JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "training", ignore_errors=True)
            if self.out.is_dir():
                shutil.rmtree(self.out)
            os.replace(self.folder, self.out)
        except OSError as error:
            raise OutputError(f"Cannot finish {self.out}: {error.strerror}.") from error
        return self.out


def _read(place: Path) -> dict[str, Any]:
    """What a journal says, up to the line that an interruption cut short; nothing where its first line is."""
    try:
        first, *lines = place.read_text(encoding="utf-8").split("\n")
        journal = json.loads(first)
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            name, facts = json.loads(line)
        except ValueError:
            break
        journal["done"][name] = facts
    return journal


def _replaceable(out: Path) -> bool:
    """Whether this is an output of medgen, or an empty folder, and not somebody's home."""
    return out.is_dir() and ((out / _MANIFEST).is_file() or not any(out.iterdir()))


def _without_place(value: Any) -> Any:
    """The last name of an absolute path; anything else as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


__all__ = ["Workspace"]

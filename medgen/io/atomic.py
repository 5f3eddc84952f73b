"""Outputs that appear complete, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medgen.errors import OutputError


@contextmanager
def replacing(final: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path beside `final` to write to; it gets the final name only if the block succeeds.

    The block creates a file or a folder at the yielded path. Whatever goes wrong, nothing
    half-written is left under the final name, and what stood there before stays.

    Raises:
        OutputError: `final` exists and `force` is not set, or the disk refuses (full, read-only).
    """
    if final.exists() and not force:
        raise OutputError(f"{final} exists already. Choose another output, or pass --force to replace it.")
    part = final.with_name(f"{final.name}.{os.getpid()}.part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(part, final)
    except OSError as error:
        raise OutputError(f"Cannot write {final}: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):
                part.unlink()


__all__ = ["replacing"]

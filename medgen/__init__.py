"""medgen learns what a set of scans looks like, then makes more of them and finds the ones that do not belong.

    import medgen

    medgen.train("scans", "model")
    medgen.augment("scans", "synthetic")
    medgen.score("new_scans", "model", "scores")

Research use only, not a medical device. Names are resolved when used, so `import medgen` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medgen.bundle import Bundle
    from medgen.data.manifest import Manifest, index
    from medgen.data.recipe import Recipe
    from medgen.errors import MedgenError
    from medgen.grid import Grid
    from medgen.io import find, read, write
    from medgen.io.source import ReadOptions
    from medgen.scan import Header, Scale, Scan
    from medgen.tasks.anomaly import score
    from medgen.tasks.augment import augment
    from medgen.tasks.codes import embed
    from medgen.tasks.compare import compare
    from medgen.tasks.convert import convert
    from medgen.tasks.evaluate import evaluate
    from medgen.tasks.learn import train
    from medgen.tasks.look import info, list_models
    from medgen.tasks.synthetic import SyntheticDataset
    from medgen.tasks.walks import interpolate, traverse

_HOME = {
    "Bundle": "medgen.bundle",
    "Grid": "medgen.grid",
    "Header": "medgen.scan",
    "Manifest": "medgen.data.manifest",
    "MedgenError": "medgen.errors",
    "ReadOptions": "medgen.io.source",
    "Recipe": "medgen.data.recipe",
    "Scale": "medgen.scan",
    "Scan": "medgen.scan",
    "SyntheticDataset": "medgen.tasks.synthetic",
    "augment": "medgen.tasks.augment",
    "compare": "medgen.tasks.compare",
    "convert": "medgen.tasks.convert",
    "evaluate": "medgen.tasks.evaluate",
    "embed": "medgen.tasks.codes",
    "find": "medgen.io",
    "index": "medgen.data.manifest",
    "info": "medgen.tasks.look",
    "interpolate": "medgen.tasks.walks",
    "list_models": "medgen.tasks.look",
    "read": "medgen.io",
    "score": "medgen.tasks.anomaly",
    "train": "medgen.tasks.learn",
    "traverse": "medgen.tasks.walks",
    "write": "medgen.io",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medgen' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


__all__ = [
    "Bundle",
    "Grid",
    "Header",
    "Manifest",
    "MedgenError",
    "ReadOptions",
    "Recipe",
    "Scale",
    "Scan",
    "SyntheticDataset",
    "augment",
    "compare",
    "convert",
    "embed",
    "evaluate",
    "find",
    "index",
    "info",
    "interpolate",
    "list_models",
    "read",
    "score",
    "train",
    "traverse",
    "write",
]

"""The way that a person asked for, ready to make scans."""

from medgen.grid import Grid
from medgen.tasks.conditions import told_of
from medgen.tasks.ways.base import How, Material, Way
from medgen.tasks.ways.classic import ClassicWay
from medgen.tasks.ways.edit import EditWay
from medgen.tasks.ways.interpolate import InterpolateWay
from medgen.tasks.ways.lesion import LesionWay
from medgen.tasks.ways.morph import MorphWay
from medgen.tasks.ways.orders import Making
from medgen.tasks.ways.sample import SampleWay
from medgen.tasks.ways.shapes import Shapes


def way_of(how: How, material: Material, making: Making, grid: Grid | None) -> Way:
    """One way to make scans.

    Args:
        how: which.
        material: what scans are made of.
        making: what a person decided.
        grid: what of the model's window is written of scans from noise; None: all of it.

    Raises:
        CapabilityError, ConfigError, DataError: the model or the scans do not allow it.
    """
    match how:
        case "sample":
            assert material.bundle is not None
            given = told_of(material.bundle.model.config)["context"]
            return SampleWay(material, grid, Shapes(material, making.shapes) if given else None)
        case "interpolate":
            return InterpolateWay(material)
        case "morph":
            return MorphWay(material)
        case "edit":
            return EditWay(material, making.vary)
        case "lesion":
            return LesionWay(material, making.lesions)
        case "classic":
            return ClassicWay(material)


__all__ = ["way_of"]

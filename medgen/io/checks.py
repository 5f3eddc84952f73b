"""What every reader asks of a file's numbers: not too many, and all of them finite."""

import math
import zlib
from collections.abc import Sequence
from typing import cast

import numpy as np
from isal.igzip_lib import IsalError
from jaxtyping import Shaped

from medgen.errors import DataError
from medgen.io.source import ReadOptions
from medgen.scan import Scale

# What inflating damaged bytes raises. (To isal's own type hints its error is no class.)
INFLATE_FAULTS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, cast("type[Exception]", IsalError))


def within_cap(shape: Sequence[int], name: str, options: ReadOptions) -> None:
    """Refuse more voxels than `options.max_voxels`, before anything is allocated.

    Raises:
        DataError: the product of `shape` is larger.
    """
    if math.prod(int(n) for n in shape) > options.max_voxels:
        size = " x ".join(str(int(n)) for n in shape)
        raise DataError(
            f"{name}: expected at most {options.max_voxels} voxels; its header announces {size}. "
            "If that is right, raise max_voxels."
        )


def finite(
    voxels: Shaped[np.ndarray, "c i j k"], scale: Scale, name: str, options: ReadOptions
) -> Shaped[np.ndarray, "c i j k"]:
    """The voxels, none of them NaN or infinite: refused, or physical 0, as `options.on_nan` says.

    Raises:
        DataError: there are some, and `on_nan` is 'error'.
    """
    # Minimum and maximum carry NaN and infinity along: two quick passes without a mask.
    if not np.issubdtype(voxels.dtype, np.floating) or np.isfinite([voxels.min(), voxels.max()]).all():
        return voxels
    broken = ~np.isfinite(voxels)
    if options.on_nan == "error":
        first = tuple(int(n) for n in np.unravel_index(int(broken.argmax()), broken.shape))
        raise DataError(
            f"{name}: expected finite voxels; found {int(broken.sum())} NaN or infinite, the first at "
            f"(c, i, j, k) = {first}. Pass on_nan='zero' to read them as 0."
        )
    return np.where(broken, voxels.dtype.type(scale.stored(0.0)), voxels)


__all__ = ["INFLATE_FAULTS", "finite", "within_cap"]

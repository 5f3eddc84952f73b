"""Nobody's body: seeded phantoms of a head (MR), a chest (X-ray) and a torso (CT), in plain numpy.

Anatomy is painted on a finer grid, then averaged into voxels. One seed is one person: its anatomy does
not depend on `shape` or `spacing`, and lesions change nothing outside themselves.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from medgen.data.anatomy import chest_path, head_tissue, torso, warped
from medgen.data.painting import (
    Field,
    Number,
    Points,
    averaged,
    finer_points,
    indices,
    inside,
    length,
    paint,
    rotation,
    waves,
)  # fmt: skip
from medgen.errors import DataError
from medgen.grid import Grid
from medgen.scan import Header, Scale, Scan


@dataclass(frozen=True)
class Lesion:
    """A lobulated blob to plant in a head.

    Args:
        centre: RAS+ millimetres; the brain spans about x -65..65, y -100..68, z -60..75.
        radius: millimetres, about half of the widest extent.
        intensity: what the tissue becomes; white matter is 150, grey 105, CSF 35, so 60 is dark and 215 bright.
    """

    centre: tuple[Number, Number, Number]
    radius: Number
    intensity: Number

    def __post_init__(self) -> None:
        if len(self.centre) != 3 or not np.isfinite([*self.centre, self.radius, self.intensity]).all():
            raise DataError("A lesion needs three finite centre coordinates, a radius and an intensity.")
        if not 0 < self.radius < 100 or self.intensity < 0:
            raise DataError(f"A lesion's radius lies in (0, 100) mm; found {self.radius}. Its intensity is at least 0.")


def head(
    seed: int,
    *,
    shape: tuple[int, int, int] = (36, 44, 36),
    spacing: Number = 5.0,
    lesions: Sequence[Lesion] = (),
) -> tuple[Scan, Scan]:
    """A T1-weighted head about the MNI origin, and the mask of its lesions.

    Rician noise (Gudbjartsson and Patz 1995) on a smoothly shaded image; uint16, RAS.

    Args:
        seed: which person.
        shape: voxels along i, j, k.
        spacing: millimetres.
        lesions: what to plant; the same seed without lesions is the healthy twin, equal voxel for
            voxel outside the blobs.

    >>> scan, mask = head(0, shape=(18, 22, 18), spacing=10.0)
    >>> scan.grid.axcodes, int(mask.voxels.sum())
    ('RAS', 0)
    """
    if min(shape) < 1 or not 0 < spacing < 100:
        raise DataError(f"A head needs a shape of at least 1 and a spacing in (0, 100) mm; found {shape}, {spacing}.")
    person, scanner = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(2))
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.array([0, -18, 16]) - spacing * (np.array(shape) - 1) / 2
    grid = Grid(shape, affine)
    finer = int(np.clip(np.round(spacing / 3.0), 1, 4))
    world = finer_points(grid, finer)
    edge = spacing / finer
    tissue = head_tissue(warped(world, person), person, edge)
    covered = np.zeros(tissue.shape)
    for lesion in lesions:
        blob = _blob(world, lesion)
        paint(tissue, blob, lesion.intensity, edge)
        covered = np.maximum(covered, inside(blob, edge))
    shading = np.exp(0.09 * waves(grid.world(indices(shape)), scanner, 6, (150, 300)))
    clean = averaged(tissue, finer) * shading * scanner.uniform(0.85, 1.15)
    noise = scanner.normal(0, 3.0, (2, *shape))
    voxels = np.hypot(clean + noise[0], noise[1]).round().clip(0, 4095).astype(np.uint16)
    header = Header(modality="MR", body_part="HEAD", space=2, synthetic=True)
    mask = (averaged(covered, finer) >= 0.5).astype(np.uint8)
    return Scan(voxels[None], grid, header=header), Scan(mask[None], grid, header=header, is_label=True)


def chest_xray(seed: int, *, size: int = 64, opacity: bool = False) -> Scan:
    """A frontal chest radiograph, bright where dense, 12 bits in uint16; `opacity` adds consolidated lung.

    Beer-Lambert attenuation along the beam on a logarithmic detector, blurred scatter and quantum
    noise. The same seed without `opacity` is the same person, healthy, apart from the noise.

    Args:
        seed: which person.
        size: pixels along both sides of a field of 360 mm.
        opacity: whether one to three patches of lung are filled.

    >>> chest_xray(0, size=32).voxels.shape
    (1, 32, 32, 1)
    """
    if size < 8:
        raise DataError(f"A chest radiograph needs a size of at least 8 pixels; found {size}.")
    person, illness, scanner = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3))
    finer = int(np.clip(np.round(256 / size), 1, 8))
    spacing = 360.0 / size
    affine = np.diag([-spacing, -spacing, 1.0, 1.0])
    affine[:2, 3] = 180 - spacing / 2
    grid = Grid((size, size, 1), affine)
    # Image plane in mm: x to the right of the picture (the patient's left), y downwards, 0 in the middle.
    flat = (indices([size * finer, size * finer, 1])[:, :, 0, :2] + 0.5) * spacing / finer - 180
    plane = np.concatenate([flat, np.zeros((*flat.shape[:2], 1))], -1)
    path = chest_path(plane, person, illness if opacity else None)
    from scipy.ndimage import gaussian_filter

    through = np.exp(-path)
    through = 0.75 * through + 0.25 * gaussian_filter(through, 40 * finer / spacing, mode="nearest")
    through = through.reshape(size, finer, size, finer).mean(axis=(1, 3))
    counts = np.maximum(scanner.normal(through, 0.035 * np.sqrt(through * through.mean())), 1e-4)
    density = -np.log(counts)
    low, high = np.percentile(density, [0.5, 99.5])
    voxels = (250 + 3500 * (density - low) / (high - low)).round().clip(0, 4095).astype(np.uint16)
    header = Header(modality="DX", body_part="CHEST", space=0, synthetic=True)
    return Scan(voxels[None, :, :, None], grid, header=header)


def ct_block(seed: int, shape: tuple[int, int, int] = (48, 40, 24), oblique: bool = True) -> Scan:
    """A CT block of the upper abdomen on its table, in HU, int16.

    Air -1000, lung -850, fat -100, water 0, muscle 55, liver 60, contrast-filled aorta 180, bone to 900;
    the noise has 12 HU. Spacing is 7.5 x 7.5 x 6 mm; `oblique` tilts the grid against the body.

    >>> ct_block(0, shape=(12, 10, 6)).scale.unit
    'HU'
    """
    if min(shape) < 1:
        raise DataError(f"A CT block needs a shape of at least 1 along every axis; found {shape}.")
    person, scanner = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(2))
    affine = np.diag([-7.5, -7.5, 6.0, 1.0])
    if oblique:
        affine[:3, :3] = rotation(8.0, -6.0, 11.0) @ affine[:3, :3]
    affine[:3, 3] = np.array([0, -12, 0]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid, finer = Grid(shape, affine), 2
    world = finer_points(grid, finer)
    body = world / np.array([person.normal(1, 0.04), person.normal(1, 0.04), 1])
    body = body + np.stack([4 * waves(world, person, 4, (120, 250)) for _ in range(3)], -1)
    image = torso(body, person, 3.0)
    shell = np.abs(np.hypot(world[..., 0], world[..., 1] - 320) - 450) - 9
    table = np.where(world[..., 1] < 0, shell, 99.0)
    paint(image, table, 150, 3.0)
    paint(image, table + 5, -880, 3.0)
    values = averaged(image, finer) + scanner.normal(0, 12, shape)
    header = Header(modality="CT", body_part="ABDOMEN", synthetic=True)
    return Scan(values.round().clip(-1024, 3071).astype(np.int16)[None], grid, Scale(unit="HU"), header)


def _blob(world: Points, lesion: Lesion) -> Field:
    """Distance to a ball whose surface bulges, the same for the same lesion."""
    seed = [round(1000 + value) for value in (*lesion.centre, lesion.radius)]
    away = world - np.array(lesion.centre)
    bulges = waves(away, np.random.default_rng(seed), 6, (1.6 * lesion.radius, 3.5 * lesion.radius))
    return length(away) - lesion.radius * (1 + 0.18 * bulges)


# -- the sample data -----------------------------------------------------------------------------------

_ILL = {
    101: (Lesion((-28.0, 12.0, 34.0), 20.0, 50.0),),
    102: (Lesion((30.0, -46.0, 30.0), 16.0, 225.0), Lesion((34.0, 26.0, 24.0), 13.0, 50.0)),
}
_NOBODY = "SYNTHETIC phantom, nobody's body"
_README = """# Sample data: nobody's body

Every scan here was computed by `medgen.data.phantoms.write_samples` from a few integers. No patient,
volunteer or scanner was involved, and nothing was derived from anybody's image. Each file says so itself
in its header (DICOM: Synthetic Data = YES; NIfTI: its description).

| folder | what it holds |
|---|---|
| `heads/` | 64 healthy heads, T1-weighted MR, 32 x 40 x 32 voxels of 5.5 mm, NIfTI, uint16 |
| `heads_ill/` | two more heads with planted lesions (one dark; one bright and one dark) and their `*_mask.nii.gz` |
| `ct_oblique/` | an upper abdomen, CT in HU, 24 DICOM slices of 48 x 40 pixels, tilted against the body |
| `xray/normal/`, `xray/opacity/` | 24 and 12 frontal chest radiographs, DICOM, 64 x 64; the folder is the label |

They are good for trying commands, for tests and for tutorials. They are not good for anything else: a
model trained on them knows nothing about people.

`SHA256SUMS` lists every file; check with `sha256sum -c SHA256SUMS`. To make the folder again:
`python -c "from medgen.data.phantoms import write_samples; write_samples('data_samples')"`

Licence: CC0 1.0 (public domain dedication). No attribution needed.
"""


def write_samples(folder: str | Path) -> list[Path]:
    """Write the sample data set, with README.md and SHA256SUMS, into a folder that does not exist yet.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    from medgen.io.atomic import replacing

    folder = Path(folder)
    with replacing(folder) as part:
        _write_heads(part)
        _write_dicom(part)
        (part / "README.md").write_text(_README, encoding="utf-8")
        names = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        sums = [f"{hashlib.sha256((part / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (part / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_heads(folder: Path) -> None:
    from medgen.io.nifti import write_nifti

    for name in ("heads", "heads_ill"):
        (folder / name).mkdir(parents=True)
    for seed in range(1, 65):
        scan = head(seed, shape=(32, 40, 32), spacing=5.5)[0]
        write_nifti(scan, folder / "heads" / f"sub-{seed:03d}_T1w.nii.gz", description=_NOBODY)
    for seed, lesions in _ILL.items():
        scan, mask = head(seed, shape=(32, 40, 32), spacing=5.5, lesions=lesions)
        write_nifti(scan, folder / "heads_ill" / f"sub-{seed}_T1w.nii.gz", description=_NOBODY)
        write_nifti(mask, folder / "heads_ill" / f"sub-{seed}_T1w_mask.nii.gz", description=_NOBODY)


def _write_dicom(folder: Path) -> None:
    from medgen.io.dicom.write import Provenance, write_series

    def provenance(what: str, seed: int) -> Provenance:
        # No network took part, yet none of it was ever measured.
        return Provenance(f"{what} phantom computed from a seed; nobody's body", seed=seed, content="synthetic")

    write_series(ct_block(1), folder / "ct_oblique", provenance=provenance("CT", 1), name="PHANTOM-CT")
    for label, seeds in (("normal", range(1, 25)), ("opacity", range(101, 113))):
        (folder / "xray" / label).mkdir(parents=True)
        for seed in seeds:
            scan = chest_xray(seed, opacity=label == "opacity")
            with TemporaryDirectory(dir=folder) as work:
                made = provenance("Chest X-ray", seed)
                files = write_series(scan, Path(work, "series"), provenance=made, name=f"PHANTOM-X{seed:03d}")
                files[0].rename(folder / "xray" / label / f"{seed:03d}.dcm")


__all__ = ["Lesion", "chest_xray", "ct_block", "head", "write_samples"]

"""`medgen interpolate` and `medgen traverse`: scans along a way through a model's codes.

    interpolate   z(t) = (1 - t) z_A + t z_B, or the great circle between them (Shoemake 1985, "Animating rotation with
                  quaternion curves"), t from 0 to 1
    traverse      z(t) = z_0 + t s_d e_d, e_d a direction of the codes and s_d their spread along it

A way between noise codes, which all have about the same length, is a great circle: points within it are no noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.data.manifest import index
from medgen.errors import CapabilityError, ConfigError, DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.models.abilities import Samples
from medgen.models.base import can
from medgen.prob.priors import principal_components
from medgen.report.pictures import contact_sheet
from medgen.scan import Scan
from medgen.seeds import derived_seed
from medgen.tasks.capabilities import families_that
from medgen.tasks.codes import Code, Coder
from medgen.tasks.conditions import conditions_for, drawn_cells, told_of
from medgen.tasks.derived import DerivedWriter, Like
from medgen.tasks.intake import taken_in
from medgen.tasks.ways.sources import refuse_burned_in
from medgen.tasks.workspace import Workspace

Way = Literal["auto", "linear", "spherical"]
# A vector of more numbers than this is walked along principal components, as a code map is.
_MOST_DIMENSIONS = 1024
# Scans drawn to learn how far codes spread.
_DRAWN = {2: 64, 3: 16}


@dataclass(frozen=True)
class Walked:
    """What was written.

    Args:
        folder: where.
        written: how many scans.
        format: of the files.
        way: 'linear' or 'spherical'; for a traversal what each row moves along.
        notes: what to know about them.
    """

    folder: Path
    written: int
    format: str
    way: str | tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _End:
    """A scan with its code and its name."""

    case: str
    like: Like
    code: Code


def interpolate(
    scan_a: str | Path,
    scan_b: str | Path,
    bundle: str | Path | Bundle,
    out: str | Path,
    *,
    steps: int = 7,
    way: Way = "auto",
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Walked:
    """Write the scans between two scans' codes; the first and last are their reconstructions.

    `out` gets the scans on the first scan's grid, in its unit and format, `steps.csv` and `contact_sheet.png`, which
    has the two scans themselves at its ends. What is written is derived from both and belongs to neither: DICOM files
    say so and are in nobody's study.

    Args:
        scan_a, scan_b: files, DICOM series or items of an .npz, one scan each.
        bundle: made by `train`.
        out: a folder that must not exist.
        steps: scans written, ends included.
        way: 'linear', 'spherical', or 'auto': spherical between codes with as many numbers as a scan.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        force: replace an existing output.

    Raises:
        BundleError, CapabilityError, ConfigError, DataError, PrivacyError, OutputError.
    """
    if steps < 2:
        raise ConfigError(f"steps: the two ends are steps, so 2 or more; found {steps}.")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    coder = Coder(bundle, ("encodes", "decodes"), "interpolate", device)
    settings = {
        "scan_a": str(Path(scan_a).resolve()), "scan_b": str(Path(scan_b).resolve()), "weights": bundle.weights_sha256,
        "steps": steps, "way": way, "options": vars(options),
    }  # fmt: skip
    work = Workspace(out, settings, force=force)
    a, b = (_ends(coder, scan, options, single=True)[0] for scan in (scan_a, scan_b))
    chosen = way if way != "auto" else "spherical" if coder.is_noise(a.code.z) else "linear"
    writer = DerivedWriter(bundle, work.folder, a.like, "Decoded between the codes of two patients' scans")
    _fresh(work)
    with work.writing():
        for n, t in enumerate(track(np.linspace(0, 1, steps).tolist(), "Interpolating", steps)):
            code = Code(between(a.code.z, b.code.z, t, chosen), conditions_between(coder, a.code, b.code, t))
            scale = a.like.scan.ready.scale.between(b.like.scan.ready.scale, t)
            writer.write(f"STEP-{n + 1:02d}", coder.decode(code), scale, {"t": round(t, 4)})
        shown = [a.like.scan.source, *writer.scans, b.like.scan.source]
        title = f"DERIVED from the scans at both ends: between them what {bundle.name} makes of codes between theirs"
        contact_sheet(
            shown, work.folder / "contact_sheet.png", title=title, columns=_across(len(shown), a.like.scan.source)
        )
        writer.finish(["t"])
    notes = tuple(f"{end.case}: {warning}" for end in (a, b) for warning in end.like.scan.warnings)
    for sentence in notes:
        note(sentence)
    # A file's own name may be somebody's.
    settings |= {"scan_a": a.case, "scan_b": b.case}
    work.finish({"command": "interpolate", "settings": settings, "way": chosen, "content": "derived", "notes": notes})
    return Walked(Path(out), steps, writer.format, chosen, notes)


def traverse(
    bundle: str | Path | Bundle,
    out: str | Path,
    *,
    scans: str | Path | None = None,
    dimensions: int = 5,
    steps: int = 7,
    reach: float = 3.0,
    seed: int = 0,
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Walked:
    """Write what changes in a scan when its code moves along one direction at a time.

    The directions are those along which codes spread most: dimensions of a vector, principal components of code maps.
    The spread is that of the codes of scans which the model draws. `out` gets the scans, `steps.csv`, and
    `traversal.png`, with a row a direction.

    Args:
        bundle: made by `train`.
        out: a folder that must not exist.
        scans: one scan to start from, on whose grid and in whose format scans are then written; or several, whose
            mean code to start from and whose spread to use; None: the mean of the drawn scans' codes.
        dimensions: how many directions.
        steps: scans a direction.
        reach: how far to go either side, in spreads.
        seed: decides which scans are drawn.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        force: replace an existing output.

    Raises:
        BundleError, CapabilityError, ConfigError, DataError, PrivacyError, OutputError.
    """
    if min(steps, dimensions) < 1 or reach <= 0:
        raise ConfigError("steps and dimensions must be 1 or more, and reach above 0.")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    coder = Coder(bundle, ("encodes", "decodes"), "traverse", device)
    settings = {
        "scans": None if scans is None else str(Path(scans).resolve()), "weights": bundle.weights_sha256,
        "dimensions": dimensions, "steps": steps, "reach": reach, "seed": seed, "options": vars(options),
    }  # fmt: skip
    work = Workspace(out, settings, force=force)
    ends = [] if scans is None else _ends(coder, scans, options)
    codes = [end.code for end in ends] if len(ends) > 1 else _drawn(coder, seed)
    if coder.is_noise(codes[0].z):
        raise CapabilityError(
            f"{bundle.name} cannot traverse: its code is noise of one number a voxel, no dimension of which means "
            "anything. Interpolate between scans instead, or use a model with a short code."
        )
    centre, ways = _directions(torch.cat([code.z for code in codes]), dimensions)
    start = ends[0].code if len(ends) == 1 else Code(centre, codes[0].cond)
    content = "DERIVED from a patient's scan" if ends else "SYNTHETIC"
    like = ends[0].like if len(ends) == 1 else None
    writer = DerivedWriter(bundle, work.folder, like, "Decoded after a scan's code was moved")
    _fresh(work)
    places = [0.0] if steps == 1 else np.linspace(-reach, reach, steps).tolist()
    with work.writing():
        for rank, one in enumerate(track(ways, "Traversing", len(ways)), 1):
            for n, t in enumerate(places, 1):
                code = Code(start.z + t * one.step.to(start.z), start.cond)
                facts = {"direction": one.name, "spread": f"{one.spread:.5g}", "t": round(t, 4)}
                writer.write(f"DIR-{rank:02d}-{n:02d}", coder.decode(code), None, facts)
        said = f"{content}: {bundle.name}, a row a direction, {-reach:g} to {reach:g} spreads: "
        title = said + ", ".join(one.name for one in ways)
        sheet = work.folder / "traversal.png"
        contact_sheet(writer.scans, sheet, title=title, columns=_across(steps, writer.scans[0]))
        writer.finish(["direction", "spread", "t"])
    notes = _told_of_spread(ways)
    for sentence in notes:
        note(sentence)
    settings |= {"scans": ends[0].case if like else len(ends)}
    work.finish({"command": "traverse", "settings": settings, "content": content.split()[0].lower(), "notes": notes})
    return Walked(Path(out), len(writer.scans), writer.format, tuple(one.name for one in ways), notes)


def _fresh(work: Workspace) -> None:
    """Begin again what an interrupted run left: a walk takes moments."""
    if work.resumed:
        work.start_again()
    work.record()


# -- codes ---------------------------------------------------------------------------------------


def between(a: Float[Tensor, "1 *code"], b: Float[Tensor, "1 *code"], t: float, way: str) -> Float[Tensor, "1 *code"]:
    """The code at `t` of the way from `a` to `b`; `a` itself at 0 and `b` at 1."""
    if t in (0.0, 1.0):
        return b if t else a
    if way == "spherical":
        cosine = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
        angle = torch.arccos(cosine.clamp(-1, 1))
        if float(angle.sin()) > 1e-4:
            part, rest = (float((share * angle).sin() / angle.sin()) for share in (t, 1 - t))
            return rest * a + part * b
    return (1 - t) * a + t * b


def conditions_between(coder: Coder, a: Code, b: Code, t: float) -> Tensor | None:
    """What the model is told between two conditions: a mixture of both."""
    if a.cond is None or b.cond is None or torch.equal(a.cond, b.cond) or t in (0.0, 1.0):
        return b.cond if t == 1.0 else a.cond
    classes = len(coder.model.config.classes)
    rows = [c if c.ndim == 2 else torch.nn.functional.one_hot(c, classes).float() for c in (a.cond, b.cond)]
    return (1 - t) * rows[0] + t * rows[1]


@dataclass(frozen=True, eq=False)
class _Direction:
    """One way to go: a step of one spread, in code units."""

    name: str
    step: Float[Tensor, "*code"]
    spread: float


def _directions(codes: Float[Tensor, "n *code"], count: int) -> tuple[Float[Tensor, "1 *code"], list[_Direction]]:
    """The mean code, and the directions along which codes spread most."""
    centre = codes.mean(0, keepdim=True)
    rows = (codes - centre).flatten(1)
    size, vector = rows.shape[1], codes.shape[1] == rows[0].numel()
    if vector and size <= _MOST_DIMENSIONS:
        spreads = rows.std(0, correction=0)
        order = spreads.argsort(descending=True, stable=True)[:count].tolist()
        steps = torch.eye(size, device=codes.device)[order] * spreads[order][:, None]
        names = [f"z{n + 1}" for n in order]
    else:
        found = principal_components(rows, min(count, size, max(1, len(rows) - 1)))
        spread = (rows @ found.directions.T).std(0, correction=0)
        steps = found.directions * spread[:, None]
        names = [f"component {n + 1}" for n in range(len(steps))]
    shaped = steps.reshape(-1, *codes.shape[1:])
    return centre, [_Direction(name, one, float(one.norm())) for name, one in zip(names, shaped, strict=True)]


def _told_of_spread(ways: Sequence[_Direction]) -> tuple[str, ...]:
    idle = [one.name for one in ways if one.spread < 0.1 * ways[0].spread or one.spread < 1e-6]
    if not idle:
        return ()
    return (f"Codes hardly spread along {', '.join(idle)}: the model makes no use of it.",)


def _drawn(coder: Coder, seed: int) -> list[Code]:
    """Codes of scans that the model draws, of its first class where it has several.

    Raises:
        CapabilityError: it does not sample.
    """
    model, config = coder.model, coder.model.config
    if not can(model, "samples"):
        raise CapabilityError(
            f"{coder.bundle.name} cannot traverse by itself: it does not sample. Pass --scan with a folder of scans, "
            f"or use a model that does: {families_that('samples')}."
        )
    count = _DRAWN[config.dims]
    cells = [drawn_cells(told_of(config)["covariates"], derived_seed(seed, n)) for n in range(count)]
    cond = conditions_for(config, [config.classes[0] if config.classes else ""] * count, cells)
    cond = None if cond is None else cond.to(coder.device)
    drawn = cast(Samples, model).sample(count, seed=seed, cond=cond).clamp(0, 1)
    return [coder.code(drawn[n : n + 1], None if cond is None else cond[n : n + 1]) for n in range(count)]


# -- scans ---------------------------------------------------------------------------------------


def _ends(coder: Coder, scans: str | Path, options: ReadOptions, *, single: bool = False) -> list[_End]:
    """Every scan with its code; where there are several, those that do not suit are left out and named.

    Raises:
        DataError: none suits, or there are several where a `single` one is wanted.
    """
    found: list[_End] = []
    with io.opened(scans) as place:
        manifest = index(place, options)
        if single and len(manifest) != 1:
            names = ", ".join(row.case for row in manifest.rows[:5])
            raise DataError(f"{place.name}: expected one scan, found {len(manifest)}: {names}, ... Name one of them.")
        for row in track(manifest.rows, "Encoding"):
            path = manifest.locate(row.path)
            try:
                refuse_burned_in(row, path)
                scan = taken_in(coder.bundle, path, options)
            except MedgenError as error:
                if len(manifest) == 1:
                    raise
                note(f"Skipped {row.case}: {error}")
                continue
            found.append(_End(row.case, Like(scan, row.kind), coder.encode(scan, row)))
    if not found:
        raise DataError(f"None of the {len(manifest)} scans could be encoded. Check the messages above.")
    return found


def _across(count: int, scan: Scan) -> int:
    """Columns of a contact sheet that put `count` scans in a row."""
    return count if scan.is_planar else 3 * count


__all__ = ["Walked", "Way", "between", "conditions_between", "interpolate", "traverse"]

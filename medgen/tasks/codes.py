"""`medgen embed`: each scan as the few numbers a model makes of it.

    z = mean of q(z | x)

A code tells of the scan it was made of: keep codes as you keep the scans.
"""

import csv
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.data.manifest import Manifest, Row
from medgen.errors import CapabilityError, DataError, MedgenError, OutputError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.models.abilities import Ability, Decodes, Encodes
from medgen.models.base import can, each_class
from medgen.prob.priors import principal_components
from medgen.report.scatter import scatter
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import conditions_for
from medgen.tasks.intake import Intake, require_images, require_whole, scans_for, taken_in
from medgen.tasks.workspace import Workspace
from medgen.training.device import device_for

# More columns than this nobody reads in a table.
_MOST_COLUMNS = 1024


@dataclass(frozen=True)
class Coded:
    """One scan's row.

    Args:
        case, patient, label, split: as the data tell them.
        warnings: what is unusual about the file itself.
        error: why it has no code.
    """

    case: str
    patient: str = ""
    label: str = ""
    split: str = ""
    warnings: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Embedded:
    """All scans of a run, in the order of the data, and where the files are.

    Args:
        scans: the rows.
        folder: where.
        code_shape: (latent,), or (latent, *positions) of a code map.
        columns: numbers a scan has in codes.csv; 0 where its code is only in codes.npz.
        notes: what to know about them.
    """

    scans: tuple[Coded, ...]
    folder: Path
    code_shape: tuple[int, ...]
    columns: int
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        """How many scans have no code."""
        return sum(bool(scan.error) for scan in self.scans)


@dataclass(frozen=True, eq=False)
class Code:
    """What a model makes of one scan.

    Args:
        z: (1, *code).
        cond: what the model was told beside it; None for nothing.
    """

    z: Float[Tensor, "1 *code"]
    cond: Tensor | None


class Coder:
    """A bundle's model between scans and codes.

    A model of several classes is not told a scan's label: the class that suits the scan best counts, so labelled
    and unlabelled scans have codes alike.

    Args:
        bundle: with the model.
        needs: what it has to be able to do, each of them.
        what: the task, for the sentence that refuses others.
        device: 'auto', 'cpu', 'cuda', 'mps'.

    Raises:
        CapabilityError: the model lacks one of the abilities, sees slices, draws pairs, or is given an image with every
            scan.
    """

    def __init__(self, bundle: Bundle, needs: Sequence[Ability], what: str, device: str) -> None:
        for ability in needs:
            if not can(bundle.model, ability):
                doing = ability.removesuffix("s")
                raise CapabilityError(
                    f"{bundle.name} cannot {what}: it does not {doing}. Models that do: {families_that(ability)}."
                )
        require_whole(bundle.recipe, bundle.name, what)
        require_images(bundle, what)
        if getattr(bundle.model.config, "context", 0):
            raise CapabilityError(
                f"{bundle.name} cannot {what}: it is given an image with every scan, without which a code says "
                "nothing. Train a preset that is given none, with --masks none."
            )
        self.device = device_for(device)
        self.bundle, self.model = bundle, bundle.model.to(self.device)

    @torch.no_grad()
    def encode(self, scan: Intake, row: Row) -> Code:
        """The code of a prepared scan."""
        x = scan.x.to(self.device)
        cond = self._condition(x, row)
        return self.code(x, cond)

    @torch.no_grad()
    def code(self, x: Float[Tensor, "1 c *space"], cond: Tensor | None) -> Code:
        """The code of values in [0, 1] under a condition."""
        return Code(cast(Encodes, self.model).encode(x, cond).mean, cond)

    @torch.no_grad()
    def decode(self, code: Code) -> Float[Tensor, "c *space"]:
        """The mean of p(x | z), values in [0, 1]."""
        return cast(Decodes, self.model).decode(code.z, code.cond).mean[0].clamp(0, 1).cpu()

    def is_noise(self, z: Float[Tensor, "1 *code"]) -> bool:
        """Whether a code is the noise behind a scan, with as many numbers as the scan, and not a summary of it."""
        voxels = self.model.config.channels * prod(self.model.config.shape)
        return can(self.model, "scores_density") and z.ndim == 2 and z.numel() == voxels

    def _condition(self, x: Float[Tensor, "1 c *space"], row: Row) -> Tensor | None:
        config = self.model.config
        told = None
        if getattr(config, "covariates", ()):
            told = conditions_for(config, [row.label], [row.covariates])
            told = None if told is None else told.to(self.device)
        each = each_class(config, told, 1, x.device)
        if len(each) == 1:
            return each[0]
        if can(self.model, "classifies"):
            return each[int(self.model.class_log_prob(x, told).argmax())]
        if not can(self.model, "decodes"):
            return told
        twins = [self.decode(self.code(x, cond)) for cond in each]
        errors = [float((twin - x[0].cpu()).square().mean()) for twin in twins]
        return each[int(np.argmin(errors))]


def embed(
    scans: str | Path,
    bundle: str | Path | Bundle,
    out: str | Path,
    *,
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Embedded:
    """Write the code that a bundle's model makes of every scan of a file or folder.

    `out` gets `codes.csv` (a row a scan, with the code's numbers, of a code map their means over the positions),
    `codes.npz` (`codes` (n, *code), `cases`, `labels`, `splits`) and `codes.png` (the first two principal components,
    coloured by label). Codes of so many numbers that nobody reads them, such as a flow's noise, are in the .npz only.

    Args:
        scans: file, folder, DICOM series, zip, .npz or CSV.
        bundle: made by `train`.
        out: a folder that must not exist.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        force: replace an existing output.

    Raises:
        BundleError, CapabilityError, DataError, OutputError.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    coder = Coder(bundle, ("encodes",), "embed", device)
    settings = {"scans": str(Path(scans).resolve()), "weights": bundle.weights_sha256, "options": vars(options)}
    work = Workspace(out, settings, force=force)
    with io.opened(scans) as place:
        manifest = scans_for(bundle, place, options)
        work.record()
        (work.folder / "parts").mkdir(exist_ok=True)
        for row in track(manifest.rows, "Embedding"):
            if row.case not in work.done:
                with work.writing():
                    coded = _coded(coder, row, manifest, options, work.folder)
                if coded.error:
                    note(f"Skipped {row.case}: {coded.error}")
                work.record(row.case, asdict(coded))
    rows = tuple(_from_journal(work.done[row.case]) for row in manifest.rows)
    good = [row for row in rows if not row.error]
    if not good:
        work.discard()
        raise DataError(f"None of the {len(rows)} scans could be embedded; the first: {rows[0].error}")
    codes = np.stack([np.load(_part(work.folder, row.case), allow_pickle=False) for row in good])
    table = codes.reshape(*codes.shape[:2], -1).mean(2)
    readable = table.shape[1] <= _MOST_COLUMNS and not coder.is_noise(torch.from_numpy(codes[:1]))
    columns = table.shape[1] if readable else 0
    notes = _notes(coder, codes, columns)
    for sentence in notes:
        note(sentence)
    with work.writing():
        _write(rows, codes, table[:, :columns], work.folder, f"{len(good)} scans in the codes of {bundle.name}")
        shutil.rmtree(work.folder / "parts")
    result = Embedded(rows, Path(out), tuple(codes.shape[1:]), columns, notes)
    facts = {"scans": len(good), "failed": result.failed, "code_shape": list(result.code_shape)}
    work.finish({"command": "embed", "settings": settings, "notes": notes, **facts})
    return result


def _coded(coder: Coder, row: Row, manifest: Manifest, options: ReadOptions, folder: Path) -> Coded:
    """Keep the code of one scan among the parts; whatever is wrong with the scan becomes its `error`."""
    told = Coded(row.case, row.patient, row.label, row.split)
    try:
        scan = taken_in(coder.bundle, manifest.locate(row.path), options)
        z = coder.encode(scan, row).z[0]
    except OutputError:
        raise  # the disk is to blame, not the scan
    except MedgenError as error:
        return replace(told, error=str(error))
    np.save(_part(folder, row.case), z.cpu().numpy().astype(np.float32), allow_pickle=False)
    return replace(told, warnings=scan.warnings)


def _part(folder: Path, case: str) -> Path:
    return folder / "parts" / f"{sha256(case.encode()).hexdigest()[:24]}.npy"


def _from_journal(values: dict[str, Any]) -> Coded:
    return Coded(**{**values, "warnings": tuple(values["warnings"])})


def _notes(coder: Coder, codes: np.ndarray, columns: int) -> tuple[str, ...]:
    told = ["Codes tell of the scans they were made of: keep them as you keep the scans."]
    size, positions = codes[0].size, codes[0].size // codes.shape[1]
    if not columns:
        why = "the noise behind the scan" if coder.is_noise(torch.from_numpy(codes[:1])) else "too many for a table"
        told.append(f"A code has {size:,} numbers, {why}: codes.csv names the scans, codes.npz holds the codes.")
    elif positions > 1:
        told.append(f"A code is a map of {positions:,} positions: codes.csv has means over them, codes.npz the maps.")
    return tuple(told)


def _write(rows: Sequence[Coded], codes: np.ndarray, table: np.ndarray, folder: Path, title: str) -> None:
    good = [row for row in rows if not row.error]
    names = [f"z{n + 1}" for n in range(table.shape[1])]
    numbers = {row.case: values for row, values in zip(good, table.tolist(), strict=True)}
    with (folder / "codes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "patient", "label", "split", *names, "warnings", "error"])
        for row in rows:
            cells = [f"{value:.7g}" for value in numbers.get(row.case, [])] or [""] * len(names)
            writer.writerow([row.case, row.patient, row.label, row.split, *cells, "; ".join(row.warnings), row.error])
    told = {f"{name}s": np.asarray([getattr(row, name) for row in good]) for name in ("case", "label", "split")}
    with (folder / "codes.npz").open("wb") as file:
        np.savez_compressed(file, codes=codes, **told)  # pyright: ignore[reportArgumentType]
    if len(good) < 3:
        return
    flat = torch.from_numpy(codes.reshape(len(codes), -1)).double()
    flat = flat - flat.mean(0)
    parts = principal_components(flat, min(2, flat.shape[1]))
    points = torch.nn.functional.pad(flat @ parts.directions.T, (0, 2 - len(parts.directions))).numpy()
    total = max(float(flat.square().sum()), 1e-12)
    shares = [f"component {n + 1} ({float((points[:, n] ** 2).sum()) / total:.0%} of the spread)" for n in range(2)]
    scatter(points, [row.label for row in good], folder / "codes.png", title=title, axes=(shares[0], shares[1]))


__all__ = ["Code", "Coded", "Coder", "Embedded", "embed"]

"""`medgen evaluate --utility`: whether learners do better with a model's scans than without, on patients held out.

Learners are taught on the training split, alone and with scans that were made; what mixture is best is chosen on the
validation split; the test split is reported, once. With --low-data the generator, too, learns from a few patients
alone: one that had learned from all would bring them back through its scans.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medgen.bundle import Bundle
from medgen.data.manifest import Manifest
from medgen.errors import DataError
from medgen.io.source import ReadOptions
from medgen.log import note, progress
from medgen.metrics.utility import LEARNERS, LearnerName, balanced
from medgen.seeds import derived_seed
from medgen.tasks.arms import (
    Classifier,
    Examples,
    Learner,
    Outliner,
)  # fmt: skip
from medgen.tasks.generation import require_drawing
from medgen.tasks.made import Drawer, drawn_by, examples_of, known_to, made_before, trained_anew
from medgen.tasks.study import FEWEST, Made, Study, Useful, fewest

# Held-out patients below which numbers are rough.
_ROUGH = 20


def usefulness(
    bundle: Bundle, known: Manifest | None, asked: Useful, options: ReadOptions, *, device: str = "auto",
    kept: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Teach learners with and without synthetic scans and test them on the held-out split.

    Args:
        bundle: whose model draws scans, with classes or with masks.
        known: the scans it learned from, with the splits of its training.
        asked: which mixtures, how many patients.
        options: how strict reading is.
        device: for generators that are trained anew.
        kept: a folder for what learners said, so that an interrupted measurement goes on; None: nowhere.

    Returns:
        'rows': plain values of every size, learner and arm; 'measure', 'test', 'val', 'notes'.

    Raises:
        CapabilityError: the bundle draws no scans.
        DataError: there are neither classes nor masks, or too few scans are held out.
        LeakageError: synthetic scans were made of test patients' scans.
    """
    if asked.synthetic is None or asked.low_data:
        require_drawing(bundle)
    train, val, test = _splits(bundle, known, options)
    assert known is not None
    config, notes = bundle.model.config, []
    masks = train.maps is not None
    if not masks and train.x.shape[1] > 1:
        notes.append("Learners see the mean of the scans' channels.")
    study = Study(_learners(bundle, asked), val, test, asked, kept)
    sizes = list(asked.low_data) or [0]
    most = int(np.bincount(train.y).min()) if not masks else len(train)
    if left_out := [size for size in sizes if size > most]:
        sizes = [size for size in sizes if size <= most]
        of = "" if masks else " of the rarest class"
        notes.append(f"There are {most} training scans{of}: left out are {', '.join(map(str, left_out))}.")
    if not sizes:
        raise DataError(f"No size of --low-data is left: {notes[-1]} Ask for smaller ones.")
    draws = asked.draws if asked.low_data else 1
    # Classical strengths are tried on some parts; a learner's other arms are taught once each.
    each = sum(3 * one.folds + len(asked.ratios) + 7 for one in study.learners)
    rows: list[dict[str, Any]] = []
    with progress("Teaching learners", len(sizes) * draws * each) as bar:
        for size in sizes:
            for number in range(draws):
                which = _drawn_rows(train, size, derived_seed(asked.seed, 1, size, number))
                real = train.rows(which)
                if asked.low_data:
                    anew = _anew(bundle, known, real, size, asked, options, device)
                    drawer: Drawer = anew(derived_seed(asked.seed, 2, size, number))
                elif asked.synthetic is not None:
                    drawer = made_before(asked.synthetic, bundle, known, options)
                else:
                    drawer = drawn_by(bundle.model, train)
                study.taught(size, number, real, Made(drawer, real, config.dims, asked), bar)
            rows += study.rows(size, draws)
    return {
        "measure": study.learners[0].measure, "rows": rows, "test": len(test), "val": 0 if val is None else len(val),
        "patients": len(set(test.patients)), "notes": [*notes, *study.notes, *_thoughts(test, val, asked)],
    }  # fmt: skip


# -- who learns, from whom -----------------------------------------------------------------------------


def _splits(bundle: Bundle, known: Manifest | None, options: ReadOptions) -> tuple[Examples, Examples | None, Examples]:
    config = bundle.model.config
    if known is None:
        raise DataError(
            "The bundle did not learn from this folder as it is, so who was held out cannot be told. Usefulness is "
            "measured on the folder as it was when the bundle was trained."
        )
    if not config.labels and len(config.classes) < 2:
        raise DataError(
            "Whether synthetic scans help needs something to learn: scans of two or more classes (sub-folders, or a "
            "column 'label'), or masks (then train with --masks joint). This bundle was trained on neither."
        )
    train, val, test = (examples_of(bundle, known.split(name), options) for name in ("train", "val", "test"))
    needed = set(range(len(config.classes))) if not config.labels else {0}
    for name, side in (("train", train), ("test", test)):
        if side is None or (not config.labels and set(side.y.tolist()) != needed):
            raise DataError(f"Scans of every class are needed in the {name} split; some class has none. Add patients.")
    assert train is not None
    assert test is not None
    if val is not None and not config.labels and set(val.y.tolist()) != needed:
        val = None
    return train, val, test


def _learners(bundle: Bundle, asked: Useful) -> list[Learner]:
    config = bundle.model.config
    if config.labels:
        return [Outliner(config.labels, asked.steps)]
    runs = asked.runs or (1 if asked.low_data else None)
    chosen: list[LearnerName] = [name for name in LEARNERS if name in asked.learners]
    return [*(Classifier(name, len(config.classes), steps=asked.steps, runs=runs) for name in chosen)]


def _drawn_rows(train: Examples, size: int, seed: int) -> np.ndarray:
    """Rows of `size` scans of each class (of masks: in all), patient by patient; 0: all, balanced."""
    if size == 0:
        return np.arange(len(train)) if train.maps is not None else balanced(train.y, seed=seed)
    people = sorted(set(train.patients))
    place = {people[int(n)]: rank for rank, n in enumerate(np.random.default_rng(seed).permutation(len(people)))}
    order = sorted(range(len(train)), key=lambda n: (place[train.patients[n]], n))
    classes = np.unique(train.y) if train.maps is None else [None]
    rows = [[n for n in order if c is None or train.y[n] == c][:size] for c in classes]
    return np.sort(np.concatenate(rows))


def _anew(
    bundle: Bundle, known: Manifest, real: Examples, size: int, asked: Useful, options: ReadOptions, device: str
) -> Callable[[int], Drawer]:
    """What trains a generator on one draw, when its scans are asked for."""

    def of(seed: int) -> Drawer:
        @cache
        def trained() -> Drawer:
            rows = known_to(known, real, size, seed)
            note(f"Training a generator on {len(real)} scans.")
            model = trained_anew(bundle, rows, asked.minutes, seed=seed, device=device, options=options)
            return drawn_by(model, real)

        return lambda labels, number: trained()(labels, number)

    return of


def _thoughts(test: Examples, val: Examples | None, asked: Useful) -> list[str]:
    """What a reader should know before believing a number."""
    told = []
    people = len(set(test.patients))
    if (least := fewest(test)) < FEWEST:
        told.append(f"Intervals and verdicts take {FEWEST} test patients of a class; found {least}: there are none.")
    elif people < _ROUGH:
        told.append(f"With {people} test patients the numbers are rough: see the intervals.")
    if val is None:
        told.append("No validation scans of every class were set aside, so no mixture was chosen on them.")
    if asked.low_data:
        told.append(
            "Every generator learned from the draw alone; as many validation scans as training scans, at most, told "
            "when it should stop. Intervals are over test patients and draws."
        )
    elif asked.synthetic is None:
        told.append("Scans were drawn without the gates of `medgen augment`; --synthetic measures those that passed.")
    if not asked.low_data:
        told.append("Intervals are over test patients; one training set was taught.")
    return told


__all__ = ["usefulness"]

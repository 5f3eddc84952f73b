"""A detector: models, what they are asked, and what held-out healthy scans answered.

One score says how unusual a scan is, one says where; often they are the same. Where there is only a map, the scan's
number is the mean of the highest half per cent of its z-map, as a lesion fills little of a scan. z is how many healthy
standard deviations a map's value lies above the healthy mean at that place (`medgen.tasks.calibration`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.dataset import Batch, ScanDataset
from medgen.data.recipe import Slices
from medgen.errors import CapabilityError
from medgen.models.abilities import Ability
from medgen.models.base import Model, can
from medgen.scores import score_of
from medgen.scores.base import Found, Healthy, Models, Score, part, prefixed
from medgen.scores.likelihoods import DENSITIES
from medgen.tasks.calibration import Normals, from_bundle, learned_from, tail_mean
from medgen.tasks.capabilities import families_that
from medgen.tasks.selection import kept
from medgen.tasks.slicewise import in_slices

# Beyond so many maps the spread at a voxel is known well enough.
_MOST_MAPS = {2: 512, 3: 64}
# Fewer held-out scans than these tell too little of how scores go together.
_ENOUGH = 19
# Scans examined at a time.
_BATCH = {2: 64, 3: 1}
_TWINS: tuple[Ability, ...] = ("restores", "reconstructs")


@dataclass(frozen=True, eq=False)
class Questions:
    """What a detector's models are asked about a scan.

    Args:
        score: how unusual it is; None: as the highest part of its z-map is.
        where: how unusual each voxel is; None: nobody can say.
    """

    score: Score | None
    where: Score | None

    @classmethod
    def of(cls, score: dict[str, Any] | None, where: dict[str, Any] | None) -> "Questions":
        """From plain values."""
        return cls(*(None if one is None else score_of(one) for one in (score, where)))

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = {"score": self.score, "map": self.where}
        return {name: None if one is None else one.model_dump(mode="json") for name, one in told.items()}

    @property
    def each(self) -> dict[str, Score]:
        """Those that are asked, by name, the same question once."""
        asked = {"score": self.score, "map": None if self.where == self.score else self.where}
        return {name: one for name, one in asked.items() if one is not None}

    @property
    def two_sided(self) -> bool:
        """Whether low scores are as unusual as high ones."""
        return self.score is not None and self.score.two_sided


def usual_questions(model: Model, *, sliced: bool = False) -> Questions:
    """What suits a model that was trained by itself: its marks, its healthy twin, or its density.

    Raises:
        CapabilityError: the model neither marks, restores nor reconstructs, and has no density.
    """
    volumes = sliced or model.config.dims == 3
    if can(model, "marks"):
        return Questions.of(None, {"do": "marks"})
    if can(model, *_TWINS):
        return Questions.of(None if volumes else {"do": "residual"}, {"do": "residual"})
    if can(model, *DENSITIES):
        return Questions.of({"do": "surprise"}, {"do": "surprise"} if can(model, "maps_density") else None)
    raise CapabilityError(
        f"{model.config.kind} cannot score anomalies: it neither restores nor reconstructs, and has no density. "
        f"Models that can: {families_that('marks', *_TWINS, *DENSITIES)}."
    )


def can_score(model: Model) -> bool:
    """Whether a model says at all how unusual a scan is; one that draws pairs takes no scan alone."""
    return not model.config.joint and can(model, "marks", *_TWINS, *DENSITIES)


@dataclass(frozen=True, eq=False)
class Detector:
    """Models with what they are asked and what healthy scans answered.

    Args:
        models: by name.
        questions: what they are asked.
        known: what the scores learned of healthy training scans.
        scores: of held-out healthy scans.
        normals: their maps; None with fewer than three, or where nobody says where.
        slices: how volumes are cut for models of images.
    """

    models: Models
    questions: Questions
    known: dict[str, Tensor] = field(default_factory=dict)
    scores: Float[np.ndarray, " n"] = field(default_factory=lambda: np.zeros(0))
    normals: Normals | None = None
    slices: Slices | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> "Detector":
        """The detector in a bundle.

        Raises:
            CapabilityError: its models cannot score.
            BundleError: its calibration is not whole.
        """
        told = bundle.calibration.get("questions")
        if told is None:
            questions = usual_questions(bundle.model, sliced=bool(bundle.recipe.slices))
        else:
            questions = Questions.of(told["score"], told["map"])
        for one in questions.each.values():
            one.check(bundle.models)
        known = {name: t for name, t in bundle.tensors.items() if name.startswith(("score.", "map."))}
        learned = from_bundle(bundle.calibration, bundle.tensors)
        return cls(bundle.models, questions, known, *learned, slices=bundle.recipe.slices)

    @property
    def two_sided(self) -> bool:
        """Whether low scores are as unusual as high ones."""
        return self.questions.two_sided

    @property
    def makes_maps(self) -> bool:
        """Whether it says where a scan is unusual, not only whether it is."""
        return self.questions.where is not None

    def __call__(
        self,
        x: Float[Tensor, "1 c *space"],
        *,
        cond: Tensor | None = None,
        context: Tensor | None = None,
        real: Bool[Tensor, "1 *space"] | None = None,
    ) -> tuple[float, Float[np.ndarray, "*space"] | None]:
        """Score and z-map of one prepared scan and what is given with it; without healthy maps None for the map."""
        values, raw = self.examined(Batch(x, cond, context, real=real))
        if raw is None or self.normals is None:
            return float(values[0]), None
        z = self.normals.z_map(raw[0]).astype(np.float32)
        return tail_mean(z) if self.questions.score is None else float(values[0]), z

    def examined(self, batch: Batch) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, "b *space"] | None]:
        """What the scores say of a batch, and where, before healthy maps are taken into account.

        Raises:
            CapabilityError: neither a number nor a map comes of it.
        """
        found = self._asked(batch) if self.slices is None else in_slices(self._asked, batch, self.slices)
        raw = None if found.map is None else found.map.float().cpu().numpy()
        if self.questions.score is not None:
            return found.values[:, 0].cpu().double().numpy(), raw
        if raw is None:
            raise CapabilityError("What is asked where a scan is unusual made no map, and nothing else is asked.")
        return np.asarray([tail_mean(one) for one in raw]), raw

    def _asked(self, batch: Batch) -> Found:
        """The values of what is asked how unusual a scan is, and the map of what is asked where."""
        told: dict[Score, Found] = {}
        each = self.questions.each.items()
        found = [one.answer(self.models, batch, part(self.known, name), told) for name, one in each]
        return Found(found[0].values, found[-1].map if self.makes_maps else None)

    def learned(self, healthy: Healthy) -> "Detector":
        """The same, its scores having learned from healthy scans."""
        known: dict[str, Tensor] = {}
        for name, one in self.questions.each.items():
            known |= prefixed(one.learn(self.models, healthy), name)
        return replace(self, known=known)

    def chosen(self, healthy: Healthy) -> tuple["Detector", dict[str, dict[str, float]]]:
        """The same without the members of its score that fail on healthy scans; and how each member did.

        Raises:
            CapabilityError: a model cannot answer what it is asked.
        """
        for one in self.questions.each.values():
            one.check(self.models)
        if self.questions.score is None:
            return self, {}
        score, verdicts = kept(self.questions.score, self.models, healthy)
        told = {f"{n}: {verdict.member.do}": verdict.aurocs for n, verdict in enumerate(verdicts)}
        return replace(self, questions=replace(self.questions, score=score)), told

    def calibrated(
        self, healthy: ScanDataset | None, people: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What held-out healthy scans answer, as plain numbers and tensors for a bundle.

        Args:
            healthy: scans that neither models nor scores have learned from; None where there are none.
            people: covariates of each case, as words.

        Raises:
            DataError: a score is not finite.
        """
        if healthy is None:
            return {"questions": self.questions.plain(), "scores": [], "scans": 0}, dict(self.known)
        healthy = healthy.volumes()
        dims = healthy[0]["x"].ndim - 1
        values: list[float] = []
        maps: list[np.ndarray] = []
        cases: list[str] = []
        for batch in healthy.batches(_BATCH[dims]):
            scores, raw = self.examined(batch)
            values += scores.tolist()
            cases += batch.cases
            if raw is not None:
                maps.append(raw[: max(0, _MOST_MAPS[dims] - sum(map(len, maps)))])
        every = np.concatenate(maps) if maps else None
        told = [people.get(case, {}) for case in cases]
        where = self.questions.where
        sided = {} if where is None else {"two_sided": where.two_sided, "by_place": where.by_place}
        given = np.zeros(0) if self.questions.score is None else np.asarray(values)
        numbers, tensors = learned_from(given, every, **sided, people=told)
        if not numbers["scores"]:  # too few maps for a healthy spread: the tails of the maps as they are
            numbers, tensors = learned_from(np.asarray(values), None, people=told)
        return {"questions": self.questions.plain(), **numbers}, {**self.known, **tensors}


@dataclass(frozen=True, eq=False)
class Batches:
    """All scans of a dataset in batches, once for every call."""

    data: ScanDataset

    def __call__(self) -> Iterator[Batch]:
        """From the beginning."""
        return self.data.batches(_BATCH[self.data[0]["x"].ndim - 1])


def healthy_of(train: ScanDataset, held: ScanDataset | None) -> Healthy:
    """What scores learn from: where few scans were held out, those that the models know count with them."""
    known = Batches(train)
    if held is None:
        return Healthy(known, known)
    new = Batches(held)
    return Healthy(known, new if len(held) >= _ENOUGH else lambda: chain(known(), new()))


__all__ = ["Batches", "Detector", "Questions", "can_score", "healthy_of", "usual_questions"]

"""Generative adversarial networks, in two and three dimensions: one family, whose history is a folder of presets.

A generator makes scans of noise, a critic tells them from real ones, and each is trained against the other (Goodfellow
et al. 2014, "Generative adversarial nets"). What systems with names differ in are fields here:

- `architecture`, and `loss` (`medgen.prob.adversarial`): the default pairs every real scan with a generated one and
  punishes the critic's slope at both (Huang et al. 2024, "The GAN is dead; long live the GAN!", equations 1 to 4),
  which is proven to converge where others run in circles or collapse;
- `condition`: what the critic makes of a scan's class; a given image (`context`) is seen beside the scan;
- `inference`: how a scan's code is found; and the regularisers.

The default generator begins as a Gaussian mixture of the training scans, class by class, in closed form (`start`), so
that training only has to add what a mixture lacks.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.energy import coverage, energy_score, variety
from medgen.models.abilities import Ability
from medgen.models.base import Loss, Model, ModelConfig, Player, class_indices
from medgen.models.gan.config import GANConfig
from medgen.models.gan.pair import Pair, Side, centred, held, uncentred
from medgen.nets.adversarial.judge import Opinion
from medgen.nets.diffaugment import Change, consistent
from medgen.nets.told import require_context
from medgen.prob.adversarial import alike, critic_loss, generator_loss, interpolated
from medgen.prob.point import Point
from medgen.seeds import derived_seed, seeded_noise

# Scans drawn together.
_MICRO_BATCH = {2: 16, 3: 4}
# Weight of an encoder's error in the critic's features (Schlegl et al. 2019, equation 3), and of the pull apart.
_FEATURES, _PULL = 1.0, 0.1
# Scans that coverage is told of, and voxels that the generator's beginning is fitted to.
_MOST_JUDGED, _MOST_VOXELS = 500, 2**24


class GAN(Model):
    """A generative adversarial network; every variation is a field of its config.

    Example:
        >>> model = GAN(GAN.Config(shape=(16, 16), width=8, levels=1))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    Config = GANConfig
    config: GANConfig
    shares: Tensor
    turn: str = ""  # whose loss was asked last

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        self.pair = Pair(config)
        # How often each class is.
        self.register_buffer("shares", torch.ones(max(1, len(config.classes))) / max(1, len(config.classes)))

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """A GAN samples; with a way to find codes it encodes and reconstructs, with class verdicts it classifies."""
        known: set[Ability] = {"samples"}
        if getattr(config, "inference", "none") != "none":
            known |= {"encodes", "reconstructs"}
            # A critic that sees a given image beside the scan has no features of the scan alone.
            if not getattr(config, "context", 0):
                known.add("perceives")
        if getattr(config, "tells_classes", False):
            known.add("classifies")
        return frozenset(known)

    @property
    def mixed_precision_pays(self) -> bool:
        """Slopes of slopes want all their digits."""
        return False

    @property
    def first_scans(self) -> int:
        """As many as memory easily takes: a mixture fitted to all the scans beats one of a few."""
        return max(64, _MOST_VOXELS // (self.config.channels * prod(self.config.shape)))

    def players(self) -> list[Player]:
        """The critic and the generator in turn; then, posthoc, the encoder."""
        config, late = self.config, self.config.inference == "posthoc"
        grain = [] if self.pair.grain is None else [*self.pair.grain.parameters()]
        made = [*self.pair.generator.parameters(), *grain]
        found = [] if self.pair.reader is None else [*self.pair.reader.parameters()]
        until = config.share if late else None
        players = [
            Player("critic", tuple(self.pair.judge.parameters()), until=until, rate=config.critic_rate),
            Player("generator", tuple(made if late else made + found), until=until, every=config.critic_steps),
        ]
        return [*players, Player("encoder", tuple(found), since=config.share)] if late else players

    # -- training ----------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batch: Batch) -> None:
        """Class shares, and the mixture that the generator begins as."""
        found = class_indices(self.config, batch.cond)
        index = torch.zeros(len(batch.x), dtype=torch.long, device=batch.x.device) if found is None else found
        known = self._known(batch.cond, len(index)) > 0
        if bool(known.any()):
            self.shares.copy_(torch.bincount(index[known], minlength=len(self.shares)) / int(known.sum()))
        else:  # whose scans are of no known class learns from them all the same
            known = torch.ones_like(known)
        if self.pair.start is not None:
            told = index if self.config.told and self.config.classes else torch.zeros_like(index)
            self.pair.start.fit(centred(batch.x[known]), told[known])

    def forward(self, batch: Batch, player: str = "critic") -> Loss:
        """What a player pays, in its paper's unit; the total is so a voxel, as `fit` takes it."""
        self._grow()
        self.turn = player
        terms = {"critic": self._critic, "generator": self._generator, "encoder": self._encoder}[player](batch)
        return Loss(torch.stack([*terms.values()]).sum(0) * batch.x[0].numel(), terms)

    def _critic(self, batch: Batch) -> dict[str, Tensor]:
        config, pair, count = self.config, self.pair, len(batch.x)
        told, z = pair.told(batch.cond, count), pair.draws(count)
        with torch.no_grad():
            sides = pair.real(told, batch), pair.generated(z, told, batch)
        changes = pair.change(count), pair.change(count)
        of_real, of_generated = (pair.judged(*both) for both in zip(sides, changes, strict=True))
        terms = {"verdict": critic_loss(config.loss, of_real.verdict, of_generated.verdict, margin=config.margin)}
        terms |= self._slopes(sides, changes)
        if config.tells_classes:
            terms["classes"] = self._misclassified(of_real, batch)
            if config.condition == "auxiliary":
                terms["classes"] = terms["classes"] + self._misclassified(of_generated, batch)
        if of_generated.codes is not None:
            terms["codes"] = pair.unread(of_generated.codes, z)
        if config.consistency:
            changed = pair.judged(sides[0], Change.drawn(count, config.dims, 1.0, self.device))
            terms["consistency"] = config.consistency * consistent(of_real.verdict, changed.verdict)
        return terms

    def _slopes(self, sides: tuple[Side, Side], changes: tuple[Change | None, Change | None]) -> dict[str, Tensor]:
        """What the critic pays for being steep: at real scans, at generated ones, and between them."""
        config, pair = self.config, self.pair
        lazy = config.lazy if self.training else 1
        if lazy > 1 and float(torch.rand(())) * lazy >= 1:
            return {}
        found = {}
        with torch.autocast(self.device.type, enabled=False):
            for name, weight, side, change in zip(("r1", "r2"), (config.r1, config.r2), sides, changes, strict=True):
                if weight:
                    found[name] = 0.5 * lazy * weight * pair.steepness(side, change)
            if config.penalty:
                between = interpolated(*(side.scans for side in sides))
                steep = (pair.steepness(replace(sides[1], scans=between)) + 1e-12).sqrt()
                found["penalty"] = lazy * config.penalty * (steep - 1).square()
        return found

    def _generator(self, batch: Batch) -> dict[str, Tensor]:
        config, pair, count = self.config, self.pair, len(batch.x)
        told, z = pair.told(batch.cond, count), pair.draws(count)
        changes = pair.change(count), pair.change(count)
        with held(pair.judge):
            side = pair.generated(z, told, batch)
            opinion = pair.judged(side, changes[1])
            terms = {"verdict": self._fooling(opinion.verdict, told, batch, changes[0])}
            if config.loss == "energy":
                terms["pull"] = _PULL * alike(opinion.features).expand(count)
            if config.tells_classes and config.condition != "semi-supervised":
                weight = 1.0 if config.condition == "auxiliary" else config.naming
                terms["classes"] = weight * self._misclassified(opinion, batch)
            if opinion.codes is not None:
                terms["codes"] = pair.unread(opinion.codes, z)
            if config.fidelity:
                apart = (side.scans[-1] - centred(batch.x)).abs().flatten(1).mean(1)
                terms["fidelity"] = config.fidelity * apart
        return terms

    def _fooling(
        self, generated: Float[Tensor, "b p"], told: Tensor | None, batch: Batch, change: Change | None
    ) -> Float[Tensor, " b"]:
        """What the generator pays for the critic's verdict; with an encoder, either shall be taken for the other."""
        config, pair = self.config, self.pair
        if config.inference == "joint":  # the encoder's side moves, too (Donahue et al. 2017, section 3)
            real = pair.judged(pair.real(told, batch), change).verdict
            return critic_loss(config.loss, generated, real, margin=config.margin)
        if config.loss != "relativistic":
            return generator_loss(config.loss, generated, generated)
        with torch.no_grad():
            real = pair.judged(pair.real(told, batch), change).verdict
        return generator_loss(config.loss, real, generated)

    def _encoder(self, batch: Batch) -> dict[str, Tensor]:
        """How far a scan is from what is generated of its code, voxel by voxel and in the critic's features."""
        pair, told = self.pair, self.pair.told(batch.cond, len(batch.x))
        with held(pair.judge, pair.generator, still=True):
            again = replace(batch, x=self._again(batch, told))
            seen, shown = (pair.judged(pair.real(told, one)).features for one in (batch, again))
            apart = 4 * (again.x - batch.x).square().flatten(1).mean(1)
            return {"scan": apart, "features": _FEATURES * (shown - seen.detach()).square().mean(1)}

    def _misclassified(self, opinion: Opinion, batch: Batch) -> Float[Tensor, " b"]:
        """Cross-entropy of the classes, 0 for scans of no known one."""
        index = class_indices(self.config, batch.cond)
        if index is None or opinion.classes is None or batch.cond is None:
            return opinion.verdict.new_zeros(len(opinion.verdict))
        known = self._known(batch.cond, len(index))
        return functional.cross_entropy(opinion.classes, index, reduction="none") * known

    def _known(self, cond: Tensor | None, count: int) -> Float[Tensor, " b"]:
        """1 for scans whose class is told, 0 for those whose row of `cond` tells none."""
        if cond is None or cond.ndim == 1 or not self.config.classes:
            return torch.ones(count, device=self.device)
        return cond[:, : len(self.config.classes)].sum(1)

    # -- how training goes -------------------------------------------------------------------------

    def validation_loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """How badly generated scans of the same classes foretell the real ones (`medgen.metrics.energy`)."""
        self._grow()
        if self._encoding:
            return torch.stack([*self._encoder(batch).values()]).sum(0) * batch.x[0].numel()
        drawn = self._drawn(batch)
        missed = energy_score(batch.x, drawn)
        if self.config.fidelity:  # a scan for a given image has one answer
            missed = missed + (drawn - batch.x).abs().flatten(1).mean(1)
        return missed * batch.x[0].numel()

    @property
    def _encoding(self) -> bool:
        """Whether it is the posthoc encoder's turn."""
        return self.turn == "encoder" and self.progress < 1  # not by `share`: stages begin at whole steps

    def _drawn(self, batch: Batch) -> Float[Tensor, "b c *space"]:
        """As many scans told the same, of torch's random state; with voxel noise where real scans have it."""
        count, grain = len(batch.x), self.pair.grain
        made = self.pair.made(self.pair.draws(count), self.pair.told(batch.cond, count), batch.context)
        return uncentred(made if grain is None else grain(made))

    @torch.no_grad()
    def pulse(self, batch: Batch) -> dict[str, float]:
        """Signs of collapse: are draws wherever scans are, are they alike, does the critic see through them?"""
        if self._encoding:
            return {}
        self._grow()
        pair, told = self.pair, self.pair.told(batch.cond, len(batch.x))
        sides = pair.real(told, batch), pair.generated(pair.draws(len(batch.x)), told, batch)
        real, generated = (pair.judged(side).verdict.mean(1) for side in sides)
        above = real < generated if self.config.loss == "energy" else real > generated
        return _spread(batch.x, self._drawn(batch)) | {"real_above": float(above.float().mean())}

    @torch.no_grad()
    def health(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Coverage and variety over the first few hundred scans."""
        scans, drawn = [], []
        for n, batch in enumerate(batches):
            if sum(map(len, scans)) >= _MOST_JUDGED:
                break
            scans.append(batch.x)
            drawn.append(self.sample(len(batch.x), seed=derived_seed(0, n), cond=batch.cond, context=batch.context))
        return _spread(torch.cat(scans), torch.cat(drawn))

    # -- abilities ---------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans; without `cond` of classes as often as in training.

        Raises:
            DataError: the model draws scans for given images, and there are none.
        """
        config, size = self.config, _MICRO_BATCH[self.config.dims]
        require_context(context, config.context, config.shape)
        self._grow()
        if cond is None and config.told:
            cond = self._drawn_classes(n, seed)

        def draw(first: int, told: Tensor | None, image: Tensor | None) -> Tensor:
            z = seeded_noise((size, self.pair.numbers), seed=derived_seed(seed, 1), first=first).to(self.device)
            return uncentred(self.pair.made(self.pair.with_codes(z), self.pair.told(told, size), image))

        return self.in_micro_batches(n, size, draw, cond, context)

    def _drawn_classes(self, n: int, seed: int) -> Tensor:
        """Classes as often as in training; with covariates all at their mean."""
        chance = torch.special.ndtr(seeded_noise((n, 1), seed=derived_seed(seed, 2)))[:, 0]
        index = torch.searchsorted(self.shares.cpu().cumsum(0), chance).clamp(max=len(self.shares) - 1)
        if not self.config.covariates:
            return index
        rows = torch.zeros(n, self.config.condition_width)
        if self.config.classes:
            rows[torch.arange(n), index] = 1
        return rows

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Point:
        """The code of each scan, which the condition does not change.

        Raises:
            CapabilityError: the model has no way to find codes.
        """
        self._grow()
        return Point(self.pair.code(centred(x)))

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """What is generated of the scan's code, without noise; of the class most often seen where none is told.

        Raises:
            CapabilityError: the model has no way to find codes.
        """
        self._grow()
        return self._again(Batch(x, None, context), self.pair.told(self._classes(x, cond), len(x)))

    @torch.no_grad()
    def perceive(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b w"]:
        """The critic's features of each scan, its last before the verdict.

        Raises:
            CapabilityError: the model reconstructs nothing that the features of could be compared with.
        """
        self.pair.code(centred(x[:1]))
        side = replace(self._side(x, None), told=self.pair.told(self._classes(x, cond), len(x)))
        return self.pair.judged(side).features

    @torch.no_grad()
    def class_log_prob(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b k"]:
        """log p(y | x), as the critic says.

        Raises:
            CapabilityError: its critic tells no classes.
        """
        if not self.config.tells_classes:
            return super().class_log_prob(x, cond, context)
        told = self.pair.judged(self._side(x, context)).classes
        assert told is not None
        return told.log_softmax(1)

    @torch.no_grad()
    def found_codes(self, x: Float[Tensor, "b c *space"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b m"]]:
        """Chances of the categories, and the other numbers, that the critic reads in scans (InfoGAN).

        Raises:
            CapabilityError: the model has found none.
        """
        read = self.pair.judged(self._side(x, None)).codes
        if read is None:
            raise CapabilityError("This gan has no codes to be found. Train it with model.condition=information.")
        categories = self.config.codes[0]
        return read[:, :categories].softmax(1), read[:, categories:]

    def _again(self, batch: Batch, told: Tensor | None) -> Float[Tensor, "b c *space"]:
        """What is generated of scans' codes."""
        return uncentred(self.pair.made(self.pair.code(centred(batch.x)), told, batch.context))

    def _classes(self, x: Tensor, cond: Tensor | None) -> Tensor | None:
        """Conditions of scans: as told, or else the class most often seen."""
        unknown = cond is None and self.config.told and self.config.classes
        return self.shares.argmax().expand(len(x)) if unknown else cond

    def _side(self, x: Tensor, image: Tensor | None) -> Side:
        self._grow()
        return self.pair.real(None, Batch(x, None, image))

    def _grow(self) -> None:
        self.pair.grow(self.progress if self.training else None)


def _spread(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """How far draws go, in comparison with scans; nothing of a single scan."""
    return {"coverage": coverage(real, drawn), "variety": variety(real, drawn)} if len(real) > 1 else {}


__all__ = ["GAN"]

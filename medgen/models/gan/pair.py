"""A generator and a critic, with all that belongs to them: what is generated, and what is thought of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.models.gan.config import GANConfig
from medgen.models.gan.start import MixtureStart
from medgen.nets.adversarial.base import Frame
from medgen.nets.adversarial.judge import CodeReader, EnergyJudge, Grain, Judge, Opinion
from medgen.nets.diffaugment import Change
from medgen.nets.told import condition_table
from medgen.prob.adversarial import slope

# Variance of the numbers that a critic reads in scans, about what it reads.
_READ_VARIANCE = 0.1


@dataclass(frozen=True)
class Side:
    """Real or generated scans as the critic sees them, on the scale -1 to 1, and what it sees with them.

    Args:
        scans: at every size, the full size last.
        told: the condition (b, numbers).
        image: what is given with each scan (b, context, *space).
        code: of each scan (b, latent), where the critic judges both together.
    """

    scans: list[Tensor]
    told: Tensor | None = None
    image: Tensor | None = None
    code: Tensor | None = None


class Pair(nn.Module):
    """The networks of a GAN. Scans are on the scale -1 to 1 here.

    Args:
        config: of the model.
    """

    grown: Tensor

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        frame = Frame(
            shape=config.shape,
            channels=config.channels,
            code=config.latent + sum(config.codes),
            numbers=config.told,
            context=config.context,
            width=config.width,
            levels=config.levels,
            fold=config.fold,
            depth=config.depth,
            spectral=config.spectral == "both",
        )
        kind, told_apart = config.architecture, len(config.classes) if config.told else 0
        whole, self.start = (config.channels, *config.shape), None
        if config.start == "mixture":
            self.start = MixtureStart(whole, config.latent, told_apart, config.mixtures)
            frame = replace(frame, context=config.channels)
        self.generator = kind.generator(frame)
        self.grain = None if config.grain == "none" else Grain(config.grain, config.channels)
        beside = config.context + (config.told if config.condition == "concat" else 0)
        judged = replace(frame, beside=beside, spectral=config.spectral != "none")
        if config.loss == "energy":
            self.judge = EnergyJudge(judged)
        else:
            self.judge = Judge(
                kind.critic(judged),
                judged,
                projected=config.told if config.condition == "projection" else 0,
                classes=len(config.classes) if config.tells_classes else 0,
                semi=config.condition == "semi-supervised" and config.tells_classes,
                codes=sum(config.codes),
                paired=config.latent if config.inference == "joint" else 0,
                biased=config.loss in ("non-saturating", "least-squares"),
            )
        plain = replace(frame, context=config.context, spectral=False)
        self.reader = None if config.inference == "none" else CodeReader(kind.critic(plain), config.latent)
        # How far networks that grow had grown with these weights.
        self.register_buffer("grown", torch.ones(()))

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.grown.device

    def grow(self, progress: float | None) -> None:
        """Tell networks that grow how far training is; None: as far as it was with these weights."""
        if progress is not None:
            self.grown.fill_(progress)
        self.generator.progress = float(self.grown)
        for network in (self.judge, self.reader):
            critic = getattr(network, "critic", None)
            if critic is not None:
                critic.progress = float(self.grown)

    # -- what is generated -------------------------------------------------------------------------

    def told(self, cond: Tensor | None, count: int) -> Float[Tensor, "b numbers"] | None:
        """What the generator is told of each scan; None where it is told nothing."""
        config = self.config
        table = condition_table(cond, count, classes=len(config.classes), numbers=config.told, device=self.device)
        return None if table is None else table[:, :-1]

    def draws(self, count: int) -> Float[Tensor, "b k"]:
        """Codes and noise of torch's random state."""
        return self.with_codes(torch.randn(count, self.numbers, device=self.device))

    def with_codes(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Normal numbers, of which those for categories became one 1 and those for other found codes uniform."""
        (categories, numbers), first = self.config.codes, self.config.latent
        if not categories + numbers:
            return z
        parts = z.split([first, categories, numbers, z.shape[1] - first - categories - numbers], 1)
        chosen = functional.one_hot(parts[1].argmax(1), categories).to(z) if categories else parts[1]
        return torch.cat([parts[0], chosen, 2 * torch.special.ndtr(parts[2]) - 1, parts[3]], 1)

    @property
    def numbers(self) -> int:
        """Normal numbers that a scan takes: its code, the network's noise, the start's detail."""
        return self.generator.draws + (0 if self.start is None else self.start.draws)

    def made(self, z: Float[Tensor, "b k"], told: Tensor | None, image: Tensor | None) -> Float[Tensor, "b c *space"]:
        """Scans of codes, at full size; of codes alone, without noise and detail, too."""
        if self.start is None:
            return self.generator(z, told, image)[-1].float()
        base = self._base(z, told)
        return base + self.generator(z[:, : self.generator.draws], told, base)[-1].float()

    def _base(self, z: Float[Tensor, "b k"], told: Tensor | None) -> Float[Tensor, "b c *space"]:
        """What the generator starts from."""
        assert self.start is not None
        classes = len(self.config.classes)
        none = torch.zeros(len(z), dtype=torch.long, device=z.device)
        index = none if told is None or not classes else told[:, :classes].argmax(1)
        return self.start(z[:, : self.config.latent], z[:, self.generator.draws :], index)

    def generated(self, z: Float[Tensor, "b k"], told: Tensor | None, batch: Batch) -> Side:
        """Scans of codes as the critic sees them beside those of `batch`, with voxel noise where that is learned."""
        if self.start is None:
            scans = self.generator.drawn(z, told, batch.context, centred(batch.x))
        else:
            scans = [self.made(z, told, None)]
        if self.grain is not None:
            scans = [*scans[:-1], self.grain(scans[-1])]
        return Side(
            scans, told, batch.context, z[:, : self.config.latent] if self.config.inference == "joint" else None
        )

    def real(self, told: Tensor | None, batch: Batch) -> Side:
        """Real scans as the critic sees them."""
        x = centred(batch.x)
        code = self.code(x) if self.config.inference == "joint" else None
        return Side(self.generator.seen(x), told, batch.context, code)

    def code(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b k"]:
        """The code of each scan.

        Raises:
            CapabilityError: there is no way to find one.
        """
        if self.reader is None:
            raise CapabilityError(
                "This gan cannot find a scan's code: it samples, but neither encodes nor reconstructs. "
                "Set model.inference to joint (as in bigan) or posthoc (as in fanogan)."
            )
        return self.reader(x)

    # -- what is thought of it ---------------------------------------------------------------------

    def change(self, count: int) -> Change | None:
        """A random change of scans before the critic sees them; None where there is none."""
        share = self.config.diffaugment
        return Change.drawn(count, self.config.dims, share, self.device) if share and self.training else None

    def judged(self, side: Side, change: Change | None = None) -> Opinion:
        """What the critic says of scans, after a change where there is one."""
        scans, beside, told = side.scans, side.image, side.told
        if change is not None:
            scans = change(scans)
            beside = None if beside is None else change([beside], values=False)[0]
        if self.config.condition == "concat" and told is not None:
            rows = told.reshape(*told.shape, *[1] * self.config.dims).expand(-1, -1, *self.config.shape)
            beside = rows if beside is None else torch.cat([beside.to(rows), rows], 1)
        return self.judge(scans, beside, told, side.code)

    def steepness(self, side: Side, change: Change | None = None) -> Float[Tensor, " b"]:
        """The squared slope of the verdict at each scan."""
        return slope(lambda at: self.judged(replace(side, scans=at), change).verdict, side.scans)

    def unread(self, read: Float[Tensor, "b m"], z: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """-log q(code | scan) but for a constant, which bounds what a scan tells of its code (Chen et al. 2016)."""
        categories, first = self.config.codes[0], self.config.latent
        true = z[:, first : first + sum(self.config.codes)]
        missed = (read[:, categories:] - true[:, categories:]).square().sum(1) / (2 * _READ_VARIANCE)
        if not categories:
            return missed
        return missed + functional.cross_entropy(read[:, :categories], true[:, :categories], reduction="none")


def centred(x: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return 2 * x - 1


def uncentred(x: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (x + 1) / 2


@contextmanager
def held(*modules: nn.Module, still: bool = False) -> Iterator[None]:
    """Parameters without gradients inside the block, whose graph keeps so; `still` in evaluation mode, too."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    modes = [(part, part.training) for module in modules for part in module.modules()] if still else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for part, mode in modes:
            part.training = mode


__all__ = ["Pair", "Side", "centred", "held", "uncentred"]

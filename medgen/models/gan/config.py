"""The axes of adversarial networks, as fields."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medgen.models.base import ConditionedConfig
from medgen.nets.adversarial.cell import Cell
from medgen.nets.adversarial.growing import Growing
from medgen.nets.adversarial.plain import DCGAN, Perceptron
from medgen.nets.adversarial.residual import ResNet
from medgen.nets.adversarial.scales import Laplacian, MultiScale
from medgen.nets.adversarial.style import Style
from medgen.nets.adversarial.translation import Spade, Translation
from medgen.prob.adversarial import AdversarialName

ConditionName = Literal["none", "concat", "projection", "auxiliary", "semi-supervised", "information"]
Architectures = Annotated[
    Perceptron | DCGAN | ResNet | Style | Growing | MultiScale | Laplacian | Cell | Translation | Spade,
    Field(discriminator="kind"),
]


class GANConfig(ConditionedConfig):
    """A generative adversarial network; a preset sets a few of these.

    Args:
        kind: 'gan'.
        architecture: how generator and critic are built.
        loss: see `medgen.prob.adversarial`.
        condition: how the critic learns that a scan has a class: 'concat' (cGAN), 'projection' (BigGAN),
            'auxiliary' (ACGAN) and 'semi-supervised' (SGAN) tell classes, too; 'information' (InfoGAN) finds its
            own; 'none' ignores classes.
        naming: weight of the class's name beside the condition 'projection': the critic learns it of real scans
            alone, and generated ones pay where it names another.
        inference: how codes are found: 'joint' (BiGAN) or 'posthoc' (f-AnoGAN); 'none' finds none.
        latent: numbers of a code.
        width: features at the finest level.
        levels: halvings, after folding.
        fold: block size turned into channels first.
        depth: blocks a level.
        start: 'mixture' begins as a Gaussian mixture of the scans, 'noise' as nothing.
        mixtures: Gaussians of each class in that mixture; 1 where scans' codes are to be found.
        r1, r2: weight of the critic's slope at real and at generated scans, halved.
        penalty: weight of |slope| - 1 between them (WGAN-GP).
        lazy: slopes count in every so many steps only, so many times.
        critic_steps: steps of the critic to one of the generator.
        critic_rate: its learning rate over the generator's.
        spectral: whose weights are divided by their largest singular value.
        diffaugment: share of scans that are changed before the critic sees them, real and generated alike.
        consistency: weight of what such a change does to the critic's verdict.
        grain: voxels' noise that scans have and samples shall not have (NR-GAN).
        codes: categories, and other numbers, of the code that 'information' finds.
        fidelity: weight of the difference from the scan that belongs to the given image (pix2pix).
        margin: of the loss 'energy'.
        share: part of the run before a posthoc encoder has its turn.
    """

    kind: Literal["gan"] = "gan"
    architecture: Architectures = ResNet()
    loss: AdversarialName = "relativistic"
    condition: ConditionName = "projection"
    naming: float = Field(default=0.0, ge=0)
    inference: Literal["none", "joint", "posthoc"] = "none"
    latent: int = Field(default=64, ge=1)
    width: int = Field(default=32, ge=1)
    levels: int = Field(default=1, ge=0, le=16)
    fold: int = Field(default=2, ge=1)
    depth: int = Field(default=1, ge=1, le=64)
    start: Literal["mixture", "noise"] = "mixture"
    mixtures: int = Field(default=5, ge=1, le=64)
    r1: float = Field(default=1.0, ge=0)
    r2: float = Field(default=1.0, ge=0)
    penalty: float = Field(default=0.0, ge=0)
    lazy: int = Field(default=1, ge=1)
    critic_steps: int = Field(default=1, ge=1)
    critic_rate: float = Field(default=1.0, gt=0)
    spectral: Literal["none", "critic", "both"] = "none"
    diffaugment: float = Field(default=0.0, ge=0, le=1)
    consistency: float = Field(default=0.0, ge=0)
    grain: Literal["none", "independent", "dependent"] = "none"
    codes: tuple[int, int] = (0, 0)
    fidelity: float = Field(default=0.0, ge=0)
    margin: float = Field(default=1.0, gt=0)
    share: float = Field(default=0.7, gt=0, lt=1)

    @property
    def stride(self) -> int:
        """What every axis of `shape` is a multiple of."""
        return self.fold * 2**self.levels

    @property
    def told(self) -> int:
        """Numbers of a condition that the generator is told."""
        return self.condition_width if self.condition in ("concat", "projection", "auxiliary") else 0

    @property
    def tells_classes(self) -> bool:
        """Whether the critic says of which class a scan is."""
        told = self.condition in ("auxiliary", "semi-supervised") or self.naming > 0
        return told and len(self.classes) > 1

    @model_validator(mode="after")
    def _fits(self) -> "GANConfig":
        if any(n % self.stride for n in self.shape):
            raise ValueError(f"shape {self.shape} must be divisible by fold * 2**levels = {self.stride}")
        if self.start == "mixture" and not self.architecture.guided:
            raise ValueError(f"architecture '{self.architecture.kind}' starts from noise: set start: noise")
        kind, takes_image = self.architecture, self.architecture.kind in ("unet", "spade")
        if bool(self.context) != takes_image:
            raise ValueError(
                f"architecture '{kind.kind}' {'makes scans of' if takes_image else 'takes no'} given images: unet and "
                f"spade do, with a context of 1 or more (--masks given); found context {self.context}"
            )
        changed = self.diffaugment or self.consistency
        if not kind.whole and (self.start == "mixture" or changed or self.loss == "energy"):
            raise ValueError(
                f"architecture '{kind.kind}' shows scans to the critic in parts: start mixture, diffaugment, "
                "consistency and the loss energy want them whole"
            )
        if (self.condition == "information") != (sum(self.codes) > 0):
            raise ValueError("condition 'information' and codes (categories, numbers) go together")
        if self.naming and self.condition != "projection":
            raise ValueError(f"naming goes with condition 'projection'; found '{self.condition}'")
        if self.condition == "semi-supervised" and self.inference == "joint":
            raise ValueError(
                "a semi-supervised critic judges scans without their codes: set inference: none or posthoc"
            )
        if self.condition == "information" and self.inference != "none":
            raise ValueError("condition 'information' finds codes of its own: set inference: none")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> "GANConfig":
        if self.architecture.kind == "laplacian" and (self.grain != "none" or self.fidelity):
            raise ValueError("architecture 'laplacian' judges residuals, not scans: it takes no grain and no fidelity")
        if self.loss == "energy" and (self.inference == "joint" or self._tells):
            raise ValueError(
                f"the critic of loss 'energy' is an autoencoder, which takes condition 'none' or 'concat' and "
                f"inference 'none' or 'posthoc'; found '{self.condition}' and '{self.inference}'"
            )
        return self

    @property
    def _tells(self) -> bool:
        """Whether more than a verdict is read from the critic's features."""
        return self.condition == "information" or bool(self.told and self.condition != "concat") or self.tells_classes


__all__ = ["Architectures", "ConditionName", "GANConfig"]

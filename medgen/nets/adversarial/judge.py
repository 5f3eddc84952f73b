"""A critic with its verdicts: is it real, of which class, made of which codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.base import Critic, Frame, beside_scan, spectral
from medgen.nets.blocks import Decoder, Encoder, channels_last

# How many times as many features a critic of pairs has between scan and code.
_PAIR = 256
# How much faster than other weights the size of voxel noise is learned, which has far to go.
_PACE = 10.0


@dataclass(frozen=True)
class Opinion:
    """What a critic says of scans.

    Args:
        verdict: one number a scan or patch, higher for real ones (energies: lower).
        features: what it rests on, the mean over patches.
        classes: logits of the classes; None where it does not tell them.
        codes: logits of the categorical code and means of the others; None where it does not tell them.
    """

    verdict: Float[Tensor, "b p"]
    features: Float[Tensor, "b w"]
    classes: Float[Tensor, "b k"] | None = None
    codes: Float[Tensor, "b m"] | None = None


class Judge(nn.Module):
    """A critic's features and what is read from them, linear maps each.

        verdict = w . h(x) + (V y) . h(x)

    with the second part where a condition y is projected (Miyato & Koyama 2018, "cGANs with projection
    discriminator", equation 4), and log sum_k exp(c_k . h(x)) where the k + 1 classes of a semi-supervised critic are
    those of real scans and one of generated ones, whose logit is 0 (Salimans et al. 2016, section 5).

    Args:
        critic: makes the features.
        frame: of the networks.
        projected: numbers of a condition to project; 0 for none.
        classes: how many it tells apart; 0 for none.
        semi: the verdict follows from the classes.
        codes: numbers of the code it tells; 0 for none.
        paired: length of the code that it sees with the scan (BiGAN); 0 for none.
        biased: whether verdicts have an offset, which cancels where they are only compared.
    """

    def __init__(
        self, critic: Critic, frame: Frame, *, projected: int = 0, classes: int = 0, semi: bool = False,
        codes: int = 0, paired: int = 0, biased: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.critic, normed = critic, frame.spectral

        def linear(inside: int, outside: int, bias: bool = True) -> nn.Module:
            return spectral(nn.Linear(inside, outside, bias), normed)

        wide = critic.width
        self.pair = nn.Sequential(linear(wide + paired, _PAIR), nn.LeakyReLU(0.2)) if paired else None
        self.real = None if semi else linear(_PAIR if paired else wide, 1, biased)
        self.project = linear(projected, wide, False) if projected else None
        self.classify = linear(wide, classes) if classes else None
        self.read = linear(wide, codes) if codes else None

    def forward(
        self, scans: Sequence[Tensor], beside: Tensor | None = None, told: Tensor | None = None,
        code: Tensor | None = None,
    ) -> Opinion:  # fmt: skip
        """Of scans (at every size); `beside` on their voxels, `told` (b, numbers), `code` (b, paired)."""
        patches = self.critic(scans, beside)
        rows = patches.flatten(2).movedim(1, 2) if patches.ndim > 2 else patches[:, None]
        features = rows.mean(1)
        classes = None if self.classify is None else self.classify(features)
        codes = None if self.read is None else self.read(features)
        if self.real is None:
            assert classes is not None
            return Opinion(torch.logsumexp(classes.float(), 1, keepdim=True), features, classes.float(), codes)
        if self.pair is not None and code is not None:
            verdict = self.real(self.pair(torch.cat([features, code], 1)))
        else:
            verdict = self.real(rows)[..., 0]
        if self.project is not None and told is not None:
            verdict = verdict + (self.project(told)[:, None] * rows).sum(2)
        return Opinion(verdict.float(), features.float(), None if classes is None else classes.float(), codes)


class EnergyJudge(nn.Module):
    """An autoencoder as a critic: its error is the energy of a scan (Zhao et al. 2017, equations 1 and 2).

    Args:
        frame: of the networks.
        code: channels of its code at the coarsest positions.
    """

    def __init__(self, frame: Frame, code: int = 8) -> None:
        super().__init__()
        dims, sizes = frame.dims, {"fold": frame.fold, "depth": 0, "classes": 0}
        inside = frame.channels + frame.beside
        self.encoder = Encoder(dims, inside, frame.width, frame.levels, **sizes)
        self.decoder = Decoder(dims, inside, frame.width, frame.levels, **sizes)
        self.to_code = nn.Linear(self.encoder.width, code)
        self.from_code = nn.Linear(code, self.decoder.width)
        channels_last(self, dims)

    def forward(
        self, scans: Sequence[Tensor], beside: Tensor | None = None, told: Tensor | None = None,
        code: Tensor | None = None,
    ) -> Opinion:  # fmt: skip
        """The mean squared error a voxel, and the code."""
        x = beside_scan(scans[-1], beside)
        codes = self.to_code(self.encoder(x).movedim(1, -1))
        again = self.decoder(self.from_code(codes).movedim(-1, 1))
        return Opinion((again - x).float().square().flatten(1).mean(1, keepdim=True), codes.float().flatten(1))


class CodeReader(nn.Module):
    """From a scan to its code: the features of an architecture's critic, and a linear map."""

    def __init__(self, critic: Critic, code: int) -> None:
        super().__init__()
        self.critic, self.code = critic, nn.Linear(critic.width, code)

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b k"]:
        """Codes of scans on the scale -1 to 1."""
        features = self.critic([x])
        return self.code(features.flatten(2).mean(2) if features.ndim > 2 else features).float()


class Grain(nn.Module):
    """Noise that scans have and samples shall not have: normal, of a learned size.

        x' = x + sigma(x) e,    e ~ N(0, 1) at every voxel

    Kaneko & Harada 2020, "Noise robust generative adversarial networks": the noise generator's distribution is
    normal, its size one number a channel (SI-NR-GAN-I) or a function of the scan (SD-NR-GAN-I). A generator without
    noise of its own at every voxel cannot make what is independent from voxel to voxel, so it is learned here.

    Args:
        kind: 'independent' of the scan, or 'dependent' on it.
        channels: of the scan.
    """

    def __init__(self, kind: Literal["independent", "dependent"], channels: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.full((channels,), -3.0 / _PACE))
        self.seen = nn.Linear(channels, channels) if kind == "dependent" else None
        if self.seen is not None:
            nn.init.zeros_(self.seen.weight)
            nn.init.zeros_(self.seen.bias)

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """The scan with noise of torch's random state."""
        return x + self.spread(x) * torch.randn_like(x)

    def spread(self, x: Float[Tensor, "b c *space"]) -> Tensor:
        """Sigma on the scale -1 to 1, one number a channel or one a voxel."""
        size = self.size.reshape(-1, *[1] * (x.ndim - 2))
        seen = 0 if self.seen is None else self.seen(x.movedim(1, -1)).movedim(-1, 1)
        return functional.softplus(_PACE * (size + seen))


__all__ = ["CodeReader", "EnergyJudge", "Grain", "Judge", "Opinion"]

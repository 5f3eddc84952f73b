"""Generative adversarial networks: axes in `config`, the family in `model`."""

from medgen.models.gan.model import GAN

__all__ = ["GAN"]

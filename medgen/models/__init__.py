"""The families of generative models, one file each, resolved only when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medgen.errors import ConfigError

if TYPE_CHECKING:
    from medgen.models.base import Model, ModelConfig

# Everything a bundle or a config can name. A new family is one file and one line here.
FAMILIES = {
    "autoencoder": "medgen.models.autoencoder:Autoencoder",
    "autoregressive": "medgen.models.autoregressive:Autoregressive",
    "flow": "medgen.models.flow:Flow",
    "flowmatch": "medgen.models.flowmatch:FlowMatch",
    "gan": "medgen.models.gan:GAN",
    "hvae": "medgen.models.hvae:HVAE",
    "latentflowmatch": "medgen.models.latentflowmatch:LatentFlowMatch",
    "mixture": "medgen.models.mixture:Mixture",
    "pyramidflow": "medgen.models.pyramidflow:PyramidFlow",
    "segmenter": "medgen.models.segmenter:Segmenter",
    "vae": "medgen.models.vae:VAE",
    "vqvae": "medgen.models.vqvae:VQVAE",
}


def family(kind: str) -> "type[Model]":
    """The class of a family, such as 'vae'.

    Raises:
        ConfigError: there is no such family.
    """
    if kind not in FAMILIES:
        raise ConfigError(f"There is no model family {kind!r}. Families: {', '.join(FAMILIES)}.")
    module, _, name = FAMILIES[kind].partition(":")
    return getattr(import_module(module), name)


def config_of(values: dict[str, Any]) -> "ModelConfig":
    """The typed config of plain values with a `kind`."""
    return family(str(values.get("kind"))).Config.model_validate(values)


def build(config: "ModelConfig") -> "Model":
    """An untrained model of this config."""
    return family(config.kind)(config)


__all__ = ["FAMILIES", "build", "config_of", "family"]

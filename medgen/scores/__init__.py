"""Ways to say how unusual a scan is, and where: small values that presets and bundles write down."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from medgen.errors import ConfigError

if TYPE_CHECKING:
    from medgen.scores.base import Score

# Every score a preset or a bundle can name. A new one is one class and one line here.
SCORES = {
    "background": "medgen.scores.density:Background",
    "complexity": "medgen.scores.density:Complexity",
    "gradient": "medgen.scores.parts:Gradient",
    "gradient-energy": "medgen.scores.statistics:GradientEnergy",
    "hog": "medgen.scores.features:Hog",
    "intensity": "medgen.scores.statistics:Intensity",
    "latent": "medgen.scores.latent:LatentDistance",
    "marks": "medgen.scores.marks:Marked",
    "normative": "medgen.scores.normative:Normative",
    "patches": "medgen.scores.patches:Patches",
    "pca": "medgen.scores.normative:Pca",
    "png": "medgen.scores.statistics:CodeLength",
    "regret": "medgen.scores.regret:Regret",
    "residual": "medgen.scores.reconstruction:Residual",
    "scales": "medgen.scores.parts:Scales",
    "states": "medgen.scores.states:DensityOfStates",
    "statistics": "medgen.scores.statistics:Statistics",
    "surprise": "medgen.scores.density:Surprise",
    "typicality": "medgen.scores.density:Typicality",
    "voxelwise": "medgen.scores.normative:Voxelwise",
    "whiteness": "medgen.scores.parts:Whiteness",
}


def score_of(values: dict[str, Any]) -> "Score":
    """The score of plain values with a `do`.

    Raises:
        ConfigError: no such score, an unknown key or a wrong value; says which.

    >>> score_of({"do": "residual", "measure": "ssim"}).measure
    'ssim'
    """
    name = str(values.get("do"))
    if name not in SCORES:
        raise ConfigError(f"There is no score {name!r}. Scores: {', '.join(SCORES)}.")
    module, _, kind = SCORES[name].partition(":")
    try:
        return getattr(import_module(module), kind).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        raise ConfigError(f"score {place}: {first['msg']}; found {first.get('input')!r}.") from error


__all__ = ["SCORES", "score_of"]

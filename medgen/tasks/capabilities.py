"""Which families can do a thing, for the sentence that refuses those that cannot."""

from medgen.models import FAMILIES, family
from medgen.models.abilities import Ability
from medgen.models.base import ModelConfig


def families_that(*abilities: Ability) -> str:
    """The families that have any of these abilities with the defaults of their config."""
    able = []
    for name in FAMILIES:
        kind = family(name)
        if not kind.abilities(kind.Config.model_construct(kind=name, shape=(1, 1))).isdisjoint(abilities):
            able.append(name)
    return ", ".join(able) or "none"


def families_with(field: str) -> str:
    """The families whose config has a field."""
    return ", ".join(name for name in FAMILIES if field in family(name).Config.model_fields) or "none"


def takes(config: ModelConfig | type[ModelConfig], field: str) -> bool:
    """Whether a family's config has a field."""
    return field in (config if isinstance(config, type) else type(config)).model_fields


__all__ = ["families_that", "families_with", "takes"]

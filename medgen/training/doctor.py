"""What went wrong in a training that ended without an error, in sentences that say what to do.

Families tell numbers (`Model.health`); what they mean is said here.
"""

from collections.abc import Mapping

# Fewer active units than this share of all is a collapse worth a sentence; so is a codebook with fewer live codes.
_FEW_UNITS, _FEW_CODES = 0.25, 0.5


def complaints(health: Mapping[str, float]) -> list[str]:
    """Sentences about what is wrong, none where all is well.

    Posterior collapse: units of a code whose mean does not vary between scans (Burda et al. 2016, section 5.3) tell
    nothing, and the decoder has learned to do without. Codebook collapse: most codes are never used.

    >>> complaints({"active_units": 16, "units": 16})
    []
    """
    found = []
    if "units" in health:
        active, units = round(health["active_units"]), round(health["units"])
        if active == 0:
            found.append(
                "Posterior collapse: no unit of the code says anything about a scan; every reconstruction is the same. "
                "Train longer, lower model.beta, raise model.free_bits (0.1 to 1 nat) or set model.warmup=0.3."
            )
        elif active < _FEW_UNITS * units:
            found.append(
                f"Posterior collapse in part: {units - active} of {units} code units say nothing. A smaller "
                "model.latent does the same in less time; for more of them lower model.beta or raise model.free_bits."
            )
    if "codes" in health:
        used, codes = round(health["codes_used"]), round(health["codes"])
        if used < _FEW_CODES * codes:
            found.append(
                f"Codebook collapse: {used} of {codes} codes are used. Choose a smaller model.codes, or train longer."
            )
    return found


__all__ = ["complaints"]

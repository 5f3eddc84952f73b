"""README.md of a folder of made scans: what they are, how they were checked, what they are good for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medgen.bundle import Bundle
from medgen.tasks.outputs.layout import Layout

_ORIGINS = (
    "- *synthetic*: generated from noise; shows nobody. Screened for copies of the patients the model learned from.\n"
    "- *derived*: made of a training patient's scan, which it shows: protect it as you protect that scan, and keep it\n"
    "  in the same fold (`patient` is the same for all scans made of one person's). A scan between two patients names\n"
    "  the second as `other_patient` in `parameters`: leave it out where these two are in different folds.\n"
)


def said_of_privacy(privacy: Mapping[str, Any]) -> str:
    """What is known of copies and attacks, in a few sentences."""
    return " ".join([*_of_copies(privacy.get("copies", {})), *_of_attacks(privacy)])


def _of_copies(copies: Mapping[str, Any]) -> Iterator[str]:
    if kinds := copies.get("copies_caught"):
        seldom = min(kinds, key=lambda kind: kinds[kind])
        yield (
            f"Of planted copies of each kind at least {kinds[seldom]:.0%} are caught (fewest of those {seldom}); "
            f"{copies['held_out_flagged']:.1%} of held-out scans are taken for one."
        )


def _of_attacks(privacy: Mapping[str, Any]) -> Iterator[str]:
    for space, found in privacy.get("closeness", {}).get("spaces", {}).items():
        low, high = found["interval"]
        attack = found["attack"]
        yield (
            f"By {space}, {found['closer']:.0%} of scans ({low:.0%} to {high:.0%}) are closer to training patients "
            f"than to as many held-out ones (50 % is best); distance attack: AUROC {attack['auroc']:.2f} "
            f"({attack['interval'][0]:.2f} to {attack['interval'][1]:.2f}; 0.5 is guessing)."
        )
    if attack := privacy.get("likelihood_attack"):
        low, high = attack["interval"]
        yield f"Likelihood attack: AUROC {attack['auroc']:.2f} ({low:.2f} to {high:.2f})."


def write_card(folder: Path, found: Mapping[str, Any], layout: Layout, bundle: Bundle | None) -> None:
    """Write README.md and privacy.json."""
    written = ", ".join(f"{count} {name}" for name, count in found["written"].items())
    rejected = ", ".join(f"{count} by {reason}" for reason, count in found["rejected"].items()) or "none"
    far = ", ".join(f"{share:.0%} by {name}" for name, share in found["quality"].items()) or "not measured"
    model = f"{bundle.name}, weights sha256 {bundle.weights_sha256}" if bundle else "none"
    lines = [
        "# Made scans", "",
        f"{written}; layout {layout.kind}, {layout.format} files. All are for *training*: never test on them.",
        "", "`manifest.csv` says of each scan its class, mask, origin, how it was made, of what, and its scores.", "",
        _ORIGINS, f"Model: {model}.", "",
        "## Checks", "",
        f"- Candidates rejected: {rejected}.",
        f"- Candidates further from the training scans than nearly all held-out scans: {far}.",
        f"- {said_of_privacy(found['privacy']) or 'No scan came from noise.'}", "",
        "Whether these scans help is another question: `medgen evaluate DATA -m BUNDLE --utility` measures it.", "",
        "Research use only, not a medical device.", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "privacy.json").write_text(json.dumps(found["privacy"], indent=1) + "\n", encoding="utf-8")


__all__ = ["said_of_privacy", "write_card"]

"""Covariates that are texts, and what a person may say of a scan that does not exist."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

import medgen
from medgen.bundle import Bundle
from medgen.data.covariates import Covariate, covariates_of
from medgen.data.manifest import Manifest, Row
from medgen.errors import ConfigError, DataError
from medgen.tasks.conditions import checked_cells, conditions_for, drawn_cells, told_of
from medgen.tasks.plan import Choices, plan_training


def table(texts: list[str], patients: list[str] | None = None) -> Manifest:
    owners = patients or [f"p{n}" for n in range(len(texts))]
    made = [
        Row(f"c{n}", owner, f"{n}.png", "raster", covariates={"report": text}, split="train")
        for n, (owner, text) in enumerate(zip(owners, texts, strict=True))
    ]
    return Manifest(tuple(made), (), Path("data"))


def reports() -> list[str]:
    """Twenty texts, all different: each has a case number and 'scan', some a cyst or an effusion, one a name."""
    return [
        f"Scan {n}a: {'Cyst, left' if n % 2 else 'clear'}{'; small effusion.' if n < 5 else ''} {'Miller' * (n == 7)}"
        for n in range(20)
    ]


def test_a_text_column_becomes_the_words_that_patients_have_in_common():
    (one,) = covariates_of(table(reports()), ["report"])
    # 'scan' is in all, 'miller' in one, the numbers have digits.
    assert one.words == ("clear", "cyst", "effusion", "left", "small")
    assert one.shares == (0.5, 0.5, 0.25, 0.5, 0.25)
    assert (one.levels, one.width) == ((), 5)
    assert one.numbers("LEFT: a Cyst2, an effusion") == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert one.numbers("") == [0.0] * 5
    assert Covariate.model_validate_json(one.model_dump_json()) == one


def test_words_are_counted_by_patient_and_the_most_frequent_are_kept():
    # Six scans of two patients do not make a word of three patients.
    texts = [f"number{n}z rare clear small{' other' if n % 2 else ''} x{n}" for n in range(20)]
    owners = [f"p{n % 2}" for n in range(20)]
    with pytest.raises(DataError, match=r"20 different words.*two or more words that 3 patients"):
        covariates_of(table(texts, owners), ["report"])
    alphabet = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
    many = [" ".join(alphabet[k] for k in range(64) if (n + k) % 3 == 0 or (n == k % 20)) for n in range(20)]
    (one,) = covariates_of(table(many), ["report"])
    assert len(one.words) == 32
    assert one.words == tuple(sorted(one.words))


def test_few_different_cells_stay_levels():
    (one,) = covariates_of(table(["calm sea", "stormy sea"] * 8), ["report"])
    assert one.levels == ("calm sea", "stormy sea")
    assert not one.words


def test_a_covariate_is_of_one_kind():
    with pytest.raises(ValidationError, match="not both"):
        Covariate(name="a", levels=("F", "M"), words=("x",), shares=(0.5,))
    with pytest.raises(ValidationError, match="as many shares"):
        Covariate(name="a", words=("x", "y"), shares=(0.5,))


KNOWN = (
    Covariate(name="age", mean=50.0, sd=10.0),
    Covariate(name="sex", levels=("F", "M")),
    Covariate(name="report", words=("cyst", "effusion"), shares=(0.9, 0.1)),
)


def test_words_are_drawn_as_often_as_they_were_met():
    drawn = [drawn_cells(KNOWN, seed) for seed in range(400)]
    often = [np.mean([word in one["report"].split() for one in drawn]) for word in ("cyst", "effusion")]
    assert often == pytest.approx([0.9, 0.1], abs=0.05)
    assert drawn_cells(KNOWN, 3) == drawn_cells(KNOWN, 3)
    assert {one["sex"] for one in drawn} == {"F", "M"}


def test_what_a_person_says_is_checked():
    told = {"age": "70", "sex": "F", "report": "A large CYST"}
    assert checked_cells(KNOWN, told) == told
    assert checked_cells(KNOWN, {}) == {}
    for cells, says in (
        ({"weight": "70"}, "no 'weight'. It is told: age, sex, report"),
        ({"age": "old"}, "age is a number"),
        ({"age": "nan"}, "age is a number"),
        ({"sex": "f"}, "sex is one of F, M; found 'f'"),
        ({"report": "tumour"}, "one of the words cyst, effusion; found 'tumour'"),
        ({"report": ""}, "one of the words cyst, effusion"),
    ):
        with pytest.raises(ConfigError, match=says):
            checked_cells(KNOWN, cells)
    with pytest.raises(ConfigError, match="It is told: none"):
        checked_cells((), {"age": "3"})


def test_a_model_is_told_words(xrays, tmp_path):
    lines = ["path,report"]
    for n, path in enumerate(sorted(xrays.glob("*/*.png"))):
        lines.append(f"{path},case {n}x {'large' if n % 2 else 'small'} heart {'with cyst' if n % 3 else ''}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    choices = Choices("vae", covariates=["report"], overrides=("model.width=4", "model.latent=4"))
    (one,) = told_of(plan_training(tmp_path / "table.csv", choices).model)["covariates"]
    assert one.words == ("cyst", "large", "small", "with")
    made = medgen.train(
        tmp_path / "table.csv", tmp_path / "b", preset="vae", covariates=["report"], minutes=None,
        overrides=("fit.images=32", "fit.batch_size=8", "model.width=4", "model.latent=4"),
    )  # fmt: skip
    config = Bundle.load(made).model.config
    cond = conditions_for(config, [""], [{"report": "a LARGE cyst"}])
    assert cond is not None
    assert cond.tolist() == [[1.0, 1.0, 0.0, 0.0]]

"""What many scans say together: warnings come when they should and rarely when not; age and sex are accounted for."""

import csv
import json

import numpy as np
import pytest
from scipy.stats import betabinom, binom

from medgen.data.manifest import Row
from medgen.tasks.calibration import p_value
from medgen.tasks.cohort import FALSE_WARNINGS, Group, count_interval, groups, unlike, write_groups
from medgen.tasks.norms import Norms, norms
from medgen.tasks.worklist import Scored


def p_values(calibration: np.ndarray, new: np.ndarray, *, two_sided: bool = False) -> np.ndarray:
    return np.array([p_value(calibration, float(one), two_sided=two_sided) for one in new])


# -- the exact interval ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "rate"), [(20, 19, 0.05), (234, 135, 0.05), (30, 39, 0.1), (50, 24, 0.5)])
def test_counts_of_healthy_scans_stay_in_the_interval_as_often_as_promised(m, n, rate):
    rng = np.random.default_rng(0)
    low, high = count_interval(m, n, rate)
    counts = []
    for _ in range(3000):
        draws = rng.random(n + m)
        k = int(np.floor(rate * (n + 1) + 1e-9))
        level = np.sort(draws[:n])[-k]
        counts.append(int((draws[n:] > level).sum()))  # p <= rate exactly where it exceeds the k-th largest
        if len(counts) < 20:
            assert counts[-1] == (p_values(draws[:n], draws[n:]) <= rate + 1e-12).sum()
    seen = np.asarray(counts)
    assert (seen > high).mean() <= 0.025 + 0.006
    assert (seen < low).mean() <= 0.025 + 0.006
    assert (seen > high - 1).mean() > 0.02  # and it is no wider than it must be
    assert high >= binom(m, rate).isf(0.025)


def test_the_interval_at_its_ends():
    assert count_interval(10, 5, 0.05) == (0, 0)
    assert count_interval(10, 5, 1.0) == (10, 10)
    low, high = count_interval(1000, 10**6, 0.05)
    assert (low, high) == pytest.approx((binom(1000, 0.05).ppf(0.025), binom(1000, 0.05).isf(0.025)), abs=1)
    k = int(0.05 * 136)
    assert count_interval(234, 135, 0.05)[1] == betabinom(234, k, 136 - k).isf(0.025)


# -- the warning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(("n", "m"), [(19, 12), (39, 60), (135, 234)])
def test_healthy_batches_are_warned_about_as_rarely_as_stated(n, m, two_sided):
    rng, trials = np.random.default_rng(1), 250 if m < 100 else 60
    warned = 0
    for _ in range(trials):
        draws = rng.gamma(2.0, size=n + m)
        warned += bool(unlike(p_values(draws[:n], draws[n:], two_sided=two_sided), n, 0.05))
    assert warned / trials <= FALSE_WARNINGS + 2.6 * np.sqrt(FALSE_WARNINGS / trials)


def test_a_flag_rate_outside_its_interval_is_always_warned_about():
    for n, m, rate in ((39, 30, 0.05), (135, 234, 0.05), (99, 50, 0.1)):
        low, high = count_interval(m, n, rate)
        for count in (low - 1, low, high, high + 1):
            if count < 0:
                continue
            ps = np.r_[np.full(count, 1 / (n + 1)), np.linspace(rate + 0.01, 1, m - count)]
            assert bool(unlike(ps, n, rate)) == (not low <= count <= high)


def test_another_scanner_is_told_with_its_numbers():
    rng = np.random.default_rng(0)
    healthy, other = rng.normal(size=135), rng.normal(1.0, 1.2, size=234)
    (said,) = unlike(p_values(healthy, other), 135, 0.05)
    count = int((p_values(healthy, other) <= 0.05).sum())
    assert f"{count} of 234 scans have p <= 0.05" in said
    assert "of scans like the 135 calibration scans at most" in said
    assert "Either many of these scans are ill, or they come from another scanner" in said


def test_a_shift_that_flags_nobody_is_told_too():
    ps = np.linspace(0.06, 0.45, 30)
    (said,) = unlike(ps, 99, 0.05)
    assert "30 of 30 scans have p <= 0.5" in said
    (said,) = unlike(np.linspace(0.6, 1, 30), 99, 0.05)
    assert "0 of 30 scans have p <= 0.5" in said
    assert "more usual than the calibration scans" in said


def test_few_scans_and_tiny_calibrations_are_not_judged():
    assert unlike(np.full(7, 0.05), 19, 0.05) == []
    assert len(unlike(np.full(8, 0.05), 19, 0.05)) == 1
    assert unlike(np.linspace(0, 1, 50), 0, 0.05) == []
    assert unlike(np.full(50, 1.0), 2, 0.05) == []
    # Too few normals to flag at the rate, but enough to know their middle.
    assert len(unlike(np.full(50, 0.1), 9, 0.05)) == 1


# -- groups --------------------------------------------------------------------------------------------------


def scored(case: str, p: float, flagged: bool | None) -> Scored:
    return Scored(case, 1.0, 1.0, p, flagged)


@pytest.fixture
def table() -> tuple[list[Scored], list[Row]]:
    """Twelve scans of two sites; all of site b and nobody of site a is flagged; one failed."""
    scans, rows = [Scored("bad", error="no")], [Row("bad", "bad", "bad.nii", "nifti", domain="a")]
    for n in range(12):
        site = "ab"[n % 2]
        scans.append(scored(f"c{n}", 0.01 if site == "b" else 0.5 + n / 100, site == "b"))
        told = {"age": str(20 + n), "id": f"x{n}", "vendor": "one"}
        rows.append(Row(f"c{n}", f"c{n}", "x.nii", "nifti", domain=site, label="", covariates=told))
    return scans, rows


def test_scans_are_counted_by_site_and_by_age(table):
    made = {(one.column, one.group): one for one in groups(*table, 99, 0.05)}
    assert set(made) == {("domain", "a"), ("domain", "b"), ("age", "< 25.5"), ("age", ">= 25.5")}
    a, b = made["domain", "a"], made["domain", "b"]
    assert (a.scans, a.flagged, a.share, a.low) == (6, 0, 0.0, 0.0)
    assert (b.scans, b.flagged, b.share, b.high) == (6, 6, 1.0, 1.0)
    assert b.low == pytest.approx(0.025 ** (1 / 6))
    assert a.high == pytest.approx(1 - 0.025 ** (1 / 6))
    assert a.median_p == pytest.approx(0.55)
    assert a.healthy_most == count_interval(6, 99, 0.05)[1]
    assert made["age", "< 25.5"].flagged == 3


def test_without_flags_there_are_medians_alone(table, tmp_path):
    scans = [scored(scan.case, scan.p, None) for scan in table[0][1:]]
    made = groups(scans, table[1], 9, 0.05)
    assert {one.flagged for one in made} == {None}
    write_groups(made, tmp_path / "groups.csv")
    with (tmp_path / "groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(Group.__dataclass_fields__)
    assert rows[0]["flagged"] == ""
    assert float(rows[0]["median_p"]) == pytest.approx(0.55)


def test_scans_that_nothing_tells_apart_make_no_groups():
    rows = [Row(f"c{n}", f"c{n}", "x.nii", "nifti", domain="a") for n in range(5)]
    assert groups([scored(f"c{n}", 0.5, False) for n in range(5)], rows, 99, 0.05) == ()


# -- age and sex -----------------------------------------------------------------------------------------------


def cohort(n: int, rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Scores that grow with the square of age, and are higher for men."""
    ages, men = rng.uniform(20, 80, n), rng.random(n) < 0.5
    scores = 0.002 * (ages - 20) ** 2 + 2 * men + rng.normal(0, 0.5, n)
    return scores, [{"Age": f"{a:.1f}", "sex": "MF"[int(not m)]} for a, m in zip(ages, men, strict=True)]


def test_what_age_and_sex_explain_is_not_unusual():
    rng = np.random.default_rng(0)
    scores, people = cohort(80, rng)
    known = norms(scores, people)
    assert known is not None
    old, young = {"age": "78", "sex": "M"}, {"age": "22", "sex": "F"}
    usual_old, usual_young = 0.002 * 58**2 + 2, 0.002 * 4
    assert p_value(known.residuals, known.remainder(usual_old, old), two_sided=False) > 0.2
    # What is usual at 78 is not at 22, although many healthy scans score higher.
    assert p_value(scores, 4.0, two_sided=False) > 0.3
    assert p_value(known.residuals, known.remainder(4.0, young), two_sided=False) == pytest.approx(1 / 81)
    assert abs(known.remainder(usual_young, young)) < 1.0


@pytest.mark.parametrize("n", [19, 40])
def test_p_values_under_the_norms_are_valid(n):
    hits, trials, rate = 0, 1000, 0.1
    rng = np.random.default_rng(2)
    for _ in range(trials):
        scores, people = cohort(n + 1, rng)
        known = norms(scores[:-1], people[:-1])
        hits += p_value(known.residuals, known.remainder(float(scores[-1]), people[-1])) <= rate + 1e-12
    error = 2 * np.sqrt(rate * (1 - rate) / trials)
    assert rate - 1 / (n + 1) - error <= hits / trials <= rate + error


def test_residuals_are_those_of_a_regression_on_the_others():
    scores, people = cohort(25, np.random.default_rng(3))
    known = norms(scores, people)
    direct = []
    for n in range(25):
        # The same columns as the whole: centre and spread of age are taken from all.
        table = np.stack([known._row(one) for one in people])
        rest = np.delete(np.arange(25), n)
        inverse = np.linalg.inv(table[rest].T @ table[rest] + np.diag([0.0, 1, 1, 1]))
        weights = inverse @ table[rest].T @ scores[rest]
        direct.append((scores[n] - table[n] @ weights) / np.sqrt(1 + table[n] @ inverse @ table[n]))
    assert np.allclose(np.sort(direct), known.residuals)


def test_norms_survive_a_bundle_and_keep_nobody():
    scores, people = cohort(30, np.random.default_rng(4))
    known = norms(scores, people)
    told = json.dumps({"norms": known.plain()})
    back = Norms.of(json.loads(told))
    assert back.remainder(3.0, people[0]) == known.remainder(3.0, people[0])
    assert Norms.of({}) is None
    assert not [one for one in people if one["Age"] in told.replace(str(known.mean), "")]


def test_who_tells_no_age_is_not_judged_by_it():
    scores, people = cohort(30, np.random.default_rng(5))
    known = norms(scores, people)
    assert known.uses == ("age", "sex")
    assert known.remainder(1.0, {"age": "30"}) is None
    assert known.remainder(1.0, {"age": "n/a", "sex": "F"}) is None
    assert known.remainder(1.0, {"AGE_years": "30", "Gender": "female"}) is not None
    assert "rests on extrapolation" in known.limits({"age": "3", "sex": "F"})[0]
    assert known.limits({"age": "50", "sex": "M"}) == ()
    assert "no age and sex told" in known.limits({"age": "50"})[0]
    assert not any(known.limits(one) for one in people)
    far = [known.remainder(1.0, {"age": age, "sex": "F"}) for age in ("190", "900")]
    assert far[0] == far[1]


def test_norms_need_enough_people_who_differ():
    scores, people = cohort(30, np.random.default_rng(6))
    assert norms(scores[:18], people[:18]) is None
    assert norms(scores, [{} for _ in people]) is None
    assert norms(scores, [{"age": "30", "sex": "F"} for _ in people]) is None
    assert norms(scores, [{"age": one["Age"]} for one in people]).uses == ("age",)
    assert norms(scores, [{"sex": one["sex"]} for one in people]).uses == ("sex",)
    some = norms(scores, [{} if n < 5 else one for n, one in enumerate(people)])
    assert len(some.residuals) == 25

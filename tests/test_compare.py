"""Groups of runs whose true differences are known, compared; and what cannot be compared refused."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.fit.compare import compare
from fitscale.scaling.fit.question import Question
from fitscale.scaling.report.comparison import sentence, told
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool

POWER = Question(metric="fd", laws=("power",), points="all", resamples=200)


def groups(multipliers, exponents=(0.15, 0.15), seed=0, sizes=5, run_noise=0.02, noise=0.01, far=1.0):
    """Families whose metric at C is that of the first at C / multiplier; the second's compute shifted by `far`."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, (multiplier, exponent) in enumerate(zip(multipliers, exponents, strict=True)):
        for index, n in enumerate(np.geomspace(1e7, 1e9, sizes)):
            of_run = rng.normal(0, run_noise)
            for d in np.geomspace(1e7, 3e8, 5):
                flops = 6 * n * d * (far if number else 1.0)
                value = 30 * (flops / multiplier / 1e16) ** -exponent * np.exp(of_run + rng.normal(0, noise))
                rows.append(
                    {"run": f"{number}-{index}", "size": f"s{index}", "family": f"family{number}", "value": value}
                    | {"parameters": round(n), "images": round(d), "step": round(d / 256), "train_flops": flops}
                    | {"metric": "fd", "key_guidance": "1.0", "patch": 2}
                )
    return validate(pd.DataFrame(rows))


def found(comparison, quantity):
    return [each for each in comparison.differences if each.quantity == quantity]


def test_a_known_multiplier_is_found_and_told():
    comparison = compare(groups((1.0, 3.0)), POWER, "family")
    halfway, lowest = found(comparison, "compute")
    for each in (halfway, lowest):
        assert (each.first, each.second) == ("family0", "family1")
        assert each.low < 1 / 3 < each.high and each.told
    assert lowest.at < halfway.at
    (level,) = found(comparison, "level")
    assert level.low < 3**-0.15 < level.high < 1 and level.told
    assert level.value == pytest.approx(3**-0.15, rel=0.05)


def test_what_the_data_cannot_tell_is_refused():
    comparison = compare(groups((1.0, 1.0)), POWER, "family")
    assert not any(each.told for each in comparison.differences)
    assert [refusal.code for refusal in comparison.refusals] == ["cannot_tell"] * 4
    assert "cannot tell which needs less compute" in comparison.refusals[-1].message


def test_without_a_law_asked_for_groups_are_compared_by_those_that_answer_best():
    """One group has a floor, the other none: both laws are fitted to both."""
    rows = groups((1.0, 1.0), run_noise=0.002, noise=0.002)
    rows = rows.assign(value=rows["value"] + 6.0 * (rows["family"] == "family1").to_numpy(dtype=float))
    comparison = compare(rows, replace(POWER, laws=("auto",), level=0.8), "family")
    compared = {each.law for each in comparison.differences}
    assert compared == {answer.results[0].name for answer in comparison.groups.values()} and len(compared) > 1
    assert all({result.name for result in answer.results} >= compared for answer in comparison.groups.values())
    said = " ".join(
        [*map(str, comparison.refusals), *(sentence(each, comparison.question) for each in told(comparison))]
    )
    assert "80 %" in said and "90 %" not in said


def test_a_difference_of_exponents():
    comparison = compare(groups((1.0, 1.0), exponents=(0.25, 0.1)), POWER, "family")
    (exponent,) = found(comparison, "b")
    assert exponent.told and exponent.low < 0.15 < exponent.high


def test_intervals_hold_the_truth():
    inside = {"compute": [], "level": [], "b": []}
    truth = {"compute": 1 / 1.5, "level": 1.5**-0.15, "b": 0.0}
    for seed in range(12):
        rows = groups((1.0, 1.5), seed=seed).assign(images=pd.NA)  # laws of compute alone
        comparison = compare(rows, replace(POWER, resamples=100), "family")
        for name, true in truth.items():
            each = found(comparison, name)[0]
            inside[name].append(each.low <= true <= each.high)
    for name, each in inside.items():
        assert np.mean(each) >= 0.64, name  # .90 less three standard errors of 12


def test_a_law_of_size_and_data_is_compared_along_its_frontier():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            {"run": f"{name}{n:.0f}", "size": f"s{n:.0f}", "label_backbone": name, "metric": "loss", "step": 1}
            | {"parameters": round(n), "images": round(d), "train_flops": 6 * n * d}
            | {"value": (400 * (n / k) ** -0.34 + 410 * (d / k) ** -0.28 + 1.7) * np.exp(rng.normal(0, 0.001))}
            for name, k in (("dit", 2.0), ("fit", 1.0))  # k times the size and the data for the same loss: k^2 FLOPs
            for n in np.geomspace(1e8, 1e10, 6)
            for d in np.geomspace(1e9, 1e12, 6)
        ]
    )
    table = validate(rows.drop(columns="label_backbone")).assign(label_backbone=rows["label_backbone"].astype("string"))
    asked = Question(metric="loss", laws=("additive",), resamples=200)
    comparison = compare(table, asked, "backbone")
    for each in found(comparison, "compute"):
        assert each.low < 4.0 < each.high and each.value == pytest.approx(4.0, rel=0.2) and each.told
    assert {each.quantity for each in comparison.differences} == {"alpha", "beta", "gamma", "level", "compute"}


def test_groups_without_common_ground_are_refused():
    comparison = compare(groups((1.0, 1.0), far=1e9), POWER, "family")
    assert {"no_overlap"} <= {refusal.code for refusal in comparison.refusals}
    assert not found(comparison, "level") and not found(comparison, "compute")


def test_groups_measured_in_different_ways_are_refused_but_by_what_they_are_compared():
    table = groups((1.0, 2.0))
    second = table["family"] == "family1"
    other = table.assign(key_guidance=table["key_guidance"].where(~second, "2.0"))
    with pytest.raises(Refusal, match=r"key_guidance is family0: 1\.0, family1: 2\.0") as caught:
        compare(other, POWER, "family")
    assert caught.value.code == "mixed_keys"
    same = other.assign(family="one")
    assert compare(same, POWER, "guidance").column == "key_guidance"
    patches = table.assign(patch=table["patch"].where(~second, 4))
    cautions = compare(patches, POWER, "family").cautions
    (confounded,) = [caution.message for caution in cautions if caution.code == "confounded"]
    assert confounded.startswith("groups differ in patch too (family0: 2, family1: 4)")


def test_a_group_that_cannot_be_fitted_is_named():
    table = groups((1.0, 1.0))
    one = table[(table["family"] == "family0") | (table["size"] == "s0")]
    with pytest.raises(Refusal, match="1 groups have a law, two are needed: family family1: "):
        compare(one, POWER, "family")
    with pytest.raises(UserError, match="no such column"):
        compare(table, POWER, "backbone")
    with pytest.raises(UserError, match="25 groups"):
        compare(table[table["family"] == "family0"].assign(lr=np.arange(25.0)), POWER, "lr")


def test_compare_from_the_shell(tmp_path):
    groups((1.0, 3.0)).to_csv(tmp_path / "runs.csv", index=False)
    command = ("fit_scaling", tmp_path / "runs.csv", "--law", "power", "--points", "all", "--resamples", "100")
    done = run_tool(*command, "--compare", "family", "--strict", "-o", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "Power law: family0 needs 0." in done.stdout and "times family1's FLOPs for the same fd of" in done.stdout
    assert "refused (cannot_tell)" in done.stderr
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(record["groups"]) == {"family0", "family1"} and record["differences"][0]["law"] == "power"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"comparison.{kind}" for kind in ("json", "md", "html", "png", "svg")}
    assert "| FLOPs for the same metric, first / second |" in (tmp_path / "out" / "comparison.md").read_text()


def test_families_of_published_models_are_compared(tmp_path):
    """The same metric needs fewer FLOPs of SiT than of DiT (Ma et al. 2024), patch 2 at 400 K steps."""
    rows = pd.read_csv("tests/data/scaling/published_fid.csv")
    kept = rows[rows["family"].isin(["DiT", "SiT"]) & (rows["patch"] == 2) & (rows["train_steps"] == 400000)]
    kept.to_csv(tmp_path / "raw.csv", index=False)
    columns = "tests/data/scaling/published_fid.yaml"
    done = run_tool("collect_runs", tmp_path / "raw.csv", "--columns", columns, "-o", tmp_path / "runs.csv")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "runs.csv").drop(columns="key_sampler")  # DDPM 250 against Euler 250
    table.to_csv(tmp_path / "runs.csv", index=False)
    command = ("fit_scaling", tmp_path / "runs.csv", "--metric", "fid", "--law", "power", "--points", "last")
    done = run_tool(*command, "--resamples", "200", "--compare", "family", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (level,) = [each for each in record["differences"] if each["quantity"] == "level"]
    assert (level["first"], level["second"]) == ("DiT", "SiT") and level["value"] > 1


def test_keys_that_are_part_of_what_is_compared_are_named_and_told():
    rows = groups((1.0, 3.0))
    rows = rows.assign(key_sampler=np.where(rows["family"] == "family1", "ddpm", "euler"))
    with pytest.raises(Refusal, match=r"key_sampler is family0: euler, family1: ddpm.*--own sampler"):
        compare(rows, POWER, "family")
    comparison = compare(rows, POWER, "family", own=["sampler"])
    assert comparison.differences == compare(groups((1.0, 3.0)), POWER, "family").differences
    assert any("differ in key_sampler too (family0: euler" in str(caution) for caution in comparison.cautions)
    with pytest.raises(UserError, match=r"--own steps: no such key; valid: guidance, sampler"):
        compare(rows, POWER, "family", own=["steps"])

"""Which laws survive, and whether an interval carries what they disagree about."""

from dataclasses import replace

import numpy as np
import pytest

from fitscale.scaling.fit.answer import draws_KN, interval
from fitscale.scaling.fit.coverage import ADDITIVE, DESIGNS, POWER, trial
from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.laws import LAWS, OFFSET
from fitscale.scaling.fit.laws import POWER as POWER_LAW
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import divide, members, study, used_by
from fitscale.scaling.fit.survival import dominated, groups, verdict, weights
from fitscale.scaling.report.content import headline
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool

BENT = replace(ADDITIVE, seeds=2)


def table(design, seed=0):
    rows = design.sweep(np.random.default_rng(seed)).drop(columns="truth")
    whole = {"parameters": rows["parameters"].round(), "images": rows["images"].round()}
    return validate(rows.assign(metric="loss", **whole))


def judged(design, law, seed=0):
    rows = table(design, seed)
    rows = rows[rows["size"] != rows["size"].max()]
    rows = divide(rows, rows["size"] == "none", design.points)
    used = used_by(LAWS[law], rows)
    fit = fit_law(LAWS[law], used)
    return fit, used, verdict(fit, used, groups(rows, sorted(rows["size"].unique()), design.points))


def asked(rows, *laws, **choices):
    return study(rows, Question("loss", laws=laws or ("auto",), resamples=200, extrapolate=True, **choices))


def test_a_true_law_is_as_wrong_at_sizes_left_out_as_it_says():
    """The errors over their standard deviations are of Student's t: their squares' mean is near that of F(1, 3)."""
    squares = []
    for seed in range(20):
        _, _, found = judged(POWER, "power", seed)
        squares += [(out.error / out.spread) ** 2 for out in found.left_out.values()]
    assert len(squares) >= 3 * 20 - 2
    assert 0.3 < np.median(squares) < 0.9  # F(1, 3): 0.585


def test_sizes_that_are_left_out_never_reach_the_fit_that_predicts_them():
    rows = table(POWER)
    changed = rows.assign(value=rows["value"].where(rows["size"] != "z4", 3 * rows["value"]))
    found = []
    for each in (rows, changed):
        each = divide(each, each["size"] == "z5", "all")
        known = each[~each["held_out"]]
        fit = fit_law(POWER_LAW, known)
        found.append(verdict(fit, known, groups(known, [f"z{index}" for index in range(5)], "all")))
    errors = [[out.error for out in of.left_out.values()] for of in found]
    np.testing.assert_allclose(errors[0][:2], errors[1][:2], rtol=1e-4)
    assert errors[1][2] == pytest.approx(errors[0][2] + np.log(3), rel=1e-4)


def test_replicates_and_signs_tell_a_bent_law_from_noise():
    failed = [judged(replace(BENT, run_noise=0.001, seeds=3), "power", seed)[2] for seed in range(5)]
    assert all(found.p_signs < 0.01 and found.bias[0] > 0.01 for found in failed)
    passed = [judged(replace(POWER, seeds=3, points="all"), "power", seed)[2] for seed in range(40)]
    for p in ([found.p_signs for found in passed], [found.p_replicates for found in passed]):
        assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) < 0.05) < 0.15


def test_more_seeds_do_not_narrow_an_interval_around_the_wrong_place():
    """The offset law bends another way than these data: with every seed its own interval would shrink beside them."""
    one, four = (
        [asked(table(replace(ADDITIVE, seeds=seeds), seed), "offset").results[0] for seed in range(3)]
        for seeds in (1, 4)
    )
    for few, many in zip(one, four, strict=True):
        assert many.lack_of_fit and many.own.weight == 0.0
        wide, narrow = (np.log(law.claimed["high"] / law.claimed["low"]).iloc[-1] for law in (few, many))
        error = np.log1p(many.claimed["error"]).iloc[-1]
        assert narrow > abs(error) and narrow > 0.5 * wide


def test_the_law_that_left_less_scatter_at_the_same_points_is_what_answers():
    answer = asked(table(BENT))
    assert {result.name for result in answer.results} <= {"additive", "tied"}
    assert sum(result.own.weight for result in answer.results) == pytest.approx(1)
    rows = divide(table(BENT), table(BENT)["size"] == "z5", "frontier")
    used = used_by(OFFSET, rows)
    fits = [fit_law(LAWS[name], used_by(LAWS[name], rows)) for name in ("offset", "additive")]
    assert dominated(fits[0], used, fits[1:]) and not dominated(fits[1], rows[~rows["held_out"]], fits[:1])


def test_the_first_sentence_says_that_a_law_does_not_fit():
    answer = asked(table(BENT), "offset")
    (result,) = answer.results
    text = headline(answer, result)
    assert text.startswith("Offset law does not fit: the ") and "leaves far less scatter" in text.split(".")[0]
    assert "lack_of_fit" in {caution.code for caution in answer.cautions}
    good = asked(table(replace(POWER, images=(1e8, 1e9))), "power")
    assert headline(good, good.results[0]).startswith("Power law, fitted on")


def test_weights_follow_the_sizes_left_out():
    fits = [judged(ADDITIVE, name)[2] for name in ("additive", "power")]
    true, bent = weights(fits, [True, True])
    assert true > 0.9 and true + bent == pytest.approx(1)
    assert weights(fits, [False, True]) == [0.0, 1.0]


def test_an_interval_carries_every_survivor():
    """Of two laws that fit alike each draw is one's or the other's; the interval reaches a law that is out."""
    rows = table(BENT)
    rows = divide(rows, rows["size"] == "z5", "frontier")
    found, _ = members(rows, Question("loss", laws=("offset",), resamples=200), [f"z{index}" for index in range(5)])
    goal = rows.iloc[[-1]].assign(chosen=True)
    halves = [replace(found[name], weight=0.5) for name in ("additive", "offset")]
    mixed = np.log(draws_KN(halves[0], halves, goal, 0, new_run=False)[:, 0])
    alone = [np.log(draws_KN(half, [half], goal, 0, new_run=False)[:, 0]) for half in halves]
    assert mixed.mean() == pytest.approx(np.mean(alone), abs=0.003)
    out = replace(found["offset"], weight=0.0)
    low, high = interval(out, halves[:1], goal, 0, 0.9)
    assert low[0] <= found["offset"].fit.metric(goal)[0] <= high[0]


@pytest.mark.parametrize("level", [0.6, 0.95])
def test_the_level_that_was_asked_for_is_everywhere(level):
    answer = asked(table(BENT), "additive", level=level)
    (result,) = answer.results
    low, high = result.interval(answer.rows[answer.rows["held_out"]].assign(chosen=True))
    draws = result.draws_KN(answer.rows[answer.rows["held_out"]].assign(chosen=True))
    inside = ((draws >= low) & (draws <= high)).mean()
    assert inside == pytest.approx(level, abs=0.02)
    assert f"the {100 * level:g} % interval" in headline(answer, result)


def test_a_simulation_that_was_killed_goes_on(tmp_path):
    """What stands in the output is not computed again, and a torn last line is."""
    out, design = tmp_path / "c.jsonl", "power, t3 noise"
    command = ["check_coverage", "--designs", design, "--resamples", "20", "-o", out]
    first = run_tool(*command, "--sweeps", "2")
    assert first.returncode == 0 and f"| {design} | power | 2 | 0 |" in first.stdout
    whole, lines = out.read_bytes(), out.read_bytes().splitlines(keepends=True)
    marked = lines[0].replace(b'"asked": "power"', b'"asked": "marked"')
    out.write_bytes(marked + lines[1][:50])
    again = run_tool(*command, "--sweeps", "2")
    assert again.returncode == 0 and f"| {design} | marked | 1 |" in again.stdout
    assert out.read_bytes() == marked + lines[1] and whole == lines[0] + lines[1]
    other = run_tool(*command, "--sweeps", "2", "--level", "0.8")
    assert other.returncode == 2 and "made with other --resamples or --level" in other.stderr
    unknown = run_tool("check_coverage", "--designs", "none", "-o", out)
    assert unknown.returncode == 2 and "no such design; valid: power, AR(1) noise; " in unknown.stderr


def test_a_trial_of_coverage_repeats_with_its_seed():
    design = DESIGNS["power, t3 noise"]
    first, again, other = (trial(design, seed, 50) for seed in (1, 1, 2))
    assert first == again != other
    assert [answer["asked"] for answer in first] == ["power", "auto"] and first[0]["width"] > 0

"""The report as a reader meets it: the first sentence, bent laws, figures with few and many sizes, narrow screens."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.laws import LAWS
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.residuals import bend
from fitscale.scaling.fit.study import study
from fitscale.scaling.fit.uncertainty import floor_profile
from fitscale.scaling.report import canvas, figures
from fitscale.scaling.report.content import answers, headline
from fitscale.scaling.report.files import write_report
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool


def rows_of(law, sizes, points=4, seed=0, run_noise=0.02, point_noise=0.01, seeds=1):
    """A sweep whose metric is `law` of the training FLOPs, and noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, parameters in enumerate(np.geomspace(1e7, 1e9, sizes)):
        for replicate in range(seeds):
            of_run = rng.normal(0, run_noise)
            for images in np.geomspace(1e8, 1e9, points):
                value = law(6 * parameters * images) * np.exp(of_run + rng.normal(0, point_noise))
                what = {"run": f"r{index}-{replicate}", "size": f"size-{index}", "parameters": int(parameters)}
                work = {"images": int(images), "step": int(images / 256), "train_flops": 6 * parameters * images}
                rows.append(what | work | {"metric": "fd", "value": value})
    return validate(pd.DataFrame(rows))


def power(flops):
    return 40 * (flops / 1e17) ** -0.25


def saturating(flops):
    return 40 * (flops / 1e17) ** -0.25 + 6


def asked(table, **changes):
    return study(table, replace(Question(laws=("power",), points="all", extrapolate=True, resamples=20), **changes))


@pytest.fixture(scope="module")
def bent():
    return asked(rows_of(saturating, 5))


def fits(law, count, **noise):
    return [fit_law(LAWS["power"], rows_of(law, 4, seed=seed, **noise)) for seed in range(count)]


def test_a_bent_law_is_told_from_a_straight_one():
    """The residuals of a power law where there is a floor: above, below, above."""
    found = [bend(fit) for fit in fits(saturating, 20, points=10)]
    assert sum(each is not None for each in found) >= 18
    assert all(low > 0 > middle and high > 0 for low, middle, high in (each.fifths for each in found if each))
    assert sum(bend(fit) is not None for fit in fits(power, 60)) <= 3
    assert sum(bend(fit) is not None for fit in fits(power, 60, run_noise=0.1, point_noise=0.002)) <= 3


def test_few_points_say_nothing_of_a_bend():
    assert bend(fit_law(LAWS["power"], rows_of(saturating, 3, points=1))) is None


def test_the_answer_comes_first_and_calls_a_bent_law_bent(bent, tmp_path):
    (first,) = answers(bent)
    said = r"BENT against its points, residuals go \+\d+.*, -\d.*, \+\d+.* from the least compute to the most"
    assert re.search(said, first)
    assert [re.search(said, each.message) is not None for each in bent.cautions if each.code == "lack_of_fit"] == [True]
    write_report(bent, tmp_path, [])
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert text.splitlines()[2].startswith("**Power law does not fit")
    assert page.index('class="answer"') < page.index('class="caution"')
    straight = asked(rows_of(power, 5))
    assert "BENT" not in answers(straight)[0]


def test_where_nothing_is_fitted_the_report_begins_with_that(tmp_path):
    refused = asked(rows_of(lambda flops: 1 / power(flops), 4))
    assert answers(refused) == ["No law of Fréchet distance could be fitted; what follows says why."]
    write_report(refused, tmp_path, [])
    text = (tmp_path / "report.md").read_text()
    assert text.index("No law of") < text.index("Refused (no") < text.index("## ")


def test_the_terminal_answers_before_it_refuses(tmp_path):
    rows_of(power, 4).to_csv(tmp_path / "runs.csv", index=False)
    laws = ["--law", "power", "offset", "--points", "all", "--extrapolate", "--resamples", "20"]
    done = run_tool("fit_scaling", tmp_path / "runs.csv", *laws, "-o", tmp_path / "report")
    assert done.returncode == 0 and done.stdout.startswith("Power law, fitted on 12 points of 3 runs")


def test_runs_of_equal_compute_are_one_headline():
    table = rows_of(power, 4, seeds=3)
    answer = asked(table)
    said = headline(answer, answer.results[0])
    last = table[(table["size"] == "size-3") & (table["train_flops"] == table["train_flops"].max())]
    mean = np.exp(np.log(last["value"]).mean())
    assert f"measured {last['value'].min():.4g} to {last['value'].max():.4g} in 3 runs, in the mean {mean:.4g}" in said
    again = asked(table.iloc[::-1])
    assert headline(again, again.results[0]) == said


@pytest.fixture
def drawn(monkeypatch):
    """Figures as matplotlib's objects."""
    monkeypatch.setattr(canvas, "rendered", lambda figure: figure)


def test_predictions_have_equal_axes_and_names_that_cover_nothing(bent, drawn):
    for answer in (bent, asked(rows_of(power, 4, seeds=2, points=5))):
        figure = figures.predictions(answer)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes.get_xlim() == axes.get_ylim() and axes.get_aspect() == 1
        names = [text for text in axes.texts if text.get_text()]
        marks = axes.transData.transform(answer.results[0].claimed[["value", "predicted"]].to_numpy(dtype=float))
        boxes = [name.get_window_extent() for name in names]
        assert len(names) >= 3 and not any(box.contains(*mark) for box in boxes for mark in marks)
        assert not any(box.overlaps(other) for box in boxes for other in boxes if box is not other)
        diagonal = axes.transAxes.transform(np.linspace([0, 0], [1, 1], 500))
        assert not any(box.contains(*place) for box in boxes for place in diagonal)


def test_many_sizes_have_a_colour_bar_and_few_a_legend(drawn, bent):
    many = asked(rows_of(power, 140, points=2))
    for draw in (lambda answer: figures.curves(answer, answer.rows), figures.residuals):
        figure = draw(many)
        axes, bar = figure.axes
        names = [text.get_text() for legend in (*figure.legends, axes.get_legend()) if legend for text in legend.texts]
        assert bar.get_ylabel() == "parameters" and len(names) <= 6
        figure.draw_without_rendering()
        frame = axes.get_window_extent()
        assert frame.width > 0.6 * figure.bbox.width and frame.height > 0.6 * figure.bbox.height
        colors = {line.get_color() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"}
        assert len(colors) > 100, "a colour for every size"
        (few,) = draw(bent).axes
        assert {f"size-{index}" for index in range(4)} <= {text.get_text() for text in few.get_legend().texts}


def test_many_held_out_sizes_are_counted(tmp_path):
    table = rows_of(power, 20, points=2)
    write_report(asked(table, hold_out=tuple(f"size-{index}" for index in range(10, 20))), tmp_path, [])
    text = (tmp_path / "report.md").read_text()
    assert "## Prediction and measurement: 10 held-out sizes" in text
    assert "10 held-out sizes" in (tmp_path / "predictions.svg").read_text()


def test_a_narrow_screen_needs_no_scrolling_sideways(bent, tmp_path):
    """What is wider than a phone is a picture that shrinks, a table in a box of its own, or text that breaks."""
    write_report(bent, tmp_path, [])
    page = (tmp_path / "report.html").read_text()
    style = page[page.index("<style>") : page.index("</style>")]
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    assert "min-width" not in style and "img { max-width: 100%; height: auto; }" in style
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", style) and ".wide { overflow-x: auto; }" in style
    assert page.count("<table>") == page.count('<div class="wide"><table>') > 0
    assert not re.search(r"<(img|figure|div|p)[^>]*(width|style)=", page)


@pytest.mark.parametrize(("floor", "height", "noise"), [(2.3, 0.15, 1e-4), (0.4, 0.2, 0.005), (5.0, 40.0, 0.01)])
def test_the_floors_profile_follows_the_metrics_scale(floor, height, noise):
    """Against a profile on a grid of its own around the best floor, a thousandth of the interval fine."""
    rng = np.random.default_rng(1)
    flops = np.geomspace(1e17, 1e20, 12)
    value = (floor + height * (flops / 1e17) ** -0.35) * np.exp(rng.normal(0, noise, 12))
    rows = pd.DataFrame({"run": [f"r{index // 3}" for index in range(12)], "train_flops": flops, "value": value})
    fit = fit_law(LAWS["offset"], rows)
    profile = floor_profile(fit)
    assert profile.identified and profile.low < fit.theta_P[-1] < profile.high
    width = profile.high - profile.low
    at = np.linspace(profile.low - width / 20, profile.high + width / 20, 45)
    start, lower, upper = (np.tile(each, (len(at), 1)) for each in (fit.theta_P, *fit.law.bounds))
    for held in (start, lower, upper):
        held[:, -1] = at
    objective = fit.again(fit.points.y_N, start, (lower, upper))[1]
    limits = objective[[2, -3]]
    np.testing.assert_allclose(limits / limits.mean(), 1, rtol=0.02, err_msg="both ends fit equally badly")
    assert objective[0] > limits[0] > objective[22] < limits[1] < objective[-1]

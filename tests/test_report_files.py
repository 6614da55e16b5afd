"""Reports of studies: their files, their words, and the tool that writes them."""

import html
import json
import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from markupsafe import Markup

from fitscale.scaling.fit.fitting import ResidualLoss
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import study
from fitscale.scaling.report.content import number, report_content, size_table
from fitscale.scaling.report.files import fit_record, write_report
from fitscale.scaling.report.templates import in_markdown, on_one_line, render
from fitscale.scaling.rows.runs import collect
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool
from tests.sample_folders import write_samples
from tests.synthetic_runs import frontier_law, surface_rows, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, frontier_law, steps=20000, points=6, run_noise=0.01, point_noise=0.01)
    return folder


@pytest.fixture(scope="module")
def table(sweep):
    return collect([sweep])


def test_an_exponent_without_an_interval_is_reported_as_such(tmp_path):
    answer = study(surface_rows(miss=1), Question(metric="loss", laws=("isoflop",), hold_out=()))
    write_report(answer, tmp_path, [])
    said = "90 %: not estimated (the budgets share runs, "
    assert (tmp_path / "report.md").read_text().count(said) == len(answer.isoflops) == 2
    assert json.loads((tmp_path / "fit.json").read_text())["isoflop"][0]["interval"] is None
    assert "not estimated" in (tmp_path / "isoflop.svg").read_text()


def test_the_report_says_how_each_law_was_fitted(table, tmp_path):
    question = Question(laws=("power", "additive"), extrapolate=True, resamples=10)
    usual, linear = (study(table, asked) for asked in (question, replace(question, loss=ResidualLoss("linear", 0.5))))
    said = {law["name"]: law["fitted"] for law in report_content(usual)["laws"]}
    assert said["power"] == "Fitted by least squares on ln(fd), points weighted alike (frontier points)"
    assert said["additive"] == "Fitted by least squares on ln(fd), points weighted alike (all points)"
    write_report(linear, tmp_path, [])
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "on fd itself, points weighted alike (frontier points)" in text and "on ln(fd)" not in text
        assert "loss with its corner at 0.5" in text
    record = fit_record(linear)
    assert record["loss"] == {"space": "linear", "huber": 0.5, "above": 0.5} and record["drop_missing"] is False


def test_table_of_sizes(table):
    header, rows = size_table(study(table, Question(resamples=10)))
    assert [row[0] for row in rows] == ["xs", "s", "m", "l"]
    assert header[-4:] == ["validation_loss", "fd", "recognised", "status"]
    assert all("-" not in row for row in rows)


def test_precision_and_recall_stand_beside_the_distance_if_they_have_its_key(table):
    distances = table[table["metric"] == "fd"]
    precision, recall = (distances.assign(metric=name, value=of) for name, of in (("precision", 0.6), ("recall", 0.4)))
    guided = precision.assign(key_guidance="4.0", value=0.9)
    both = pd.concat([table, precision, guided, recall], ignore_index=True)
    header, rows = size_table(study(both, Question(resamples=10)))
    assert header[-6:] == ["validation_loss", "fd", "precision", "recall", "recognised", "status"]
    assert {(row[-4], row[-3]) for row in rows} == {("0.6", "0.4")}
    named = both.assign(metric=both["metric"].replace({"fd": "fd/dinov2", "recall": "recall/dinov2"}))
    header, _ = size_table(study(named, Question("fd/dinov2", resamples=10)))
    assert header[-5:] == ["validation_loss", "fd/dinov2", "recall/dinov2", "recognised", "status"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (1546941, "1.547 M"), (7.68e13, "7.68e+13"), (0.0, "0"), (17.4951, "17.5")]
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def from_the_shell(*arguments):
    command = [sys.executable, "tools/fit_scaling.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_fit_scaling_from_the_shell(sweep, tmp_path):
    folders = [write_samples(tmp_path / size, sweep / f"{size}-seed0", 20000) for size in ("s", "l")]
    out = tmp_path / "report"
    done = from_the_shell(sweep, "--law", "offset", "power", "--samples", *folders, "--resamples", "50", "-o", out)
    assert done.returncode == 0, done.stderr
    figures = [
        f"{name}.{kind}" for name in ("curves", "predictions", "residuals", "samples") for kind in ("png", "svg")
    ]
    assert {path.name for path in out.iterdir()} == {*figures, "fit.json", "report.html", "report.md"}
    record = json.loads((out / "fit.json").read_text())
    assert record["held_out"] == ["l"] and {law["law"] for law in record["laws"]} == {"offset", "power"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 + len(folders) and "s after 20,000 steps" in page
    assert "](samples.png)" in (out / "report.md").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must be self-contained"
    assert page.index("Caution") < page.index("Sizes, at their last evaluation")


def test_exit_codes(sweep, tmp_path):
    strict = run_tool("fit_scaling", sweep, "--strict", "--resamples", "20", "-o", tmp_path / "strict")
    assert strict.returncode == 3 and "caution (few_runs)" in strict.stderr
    refused = run_tool("fit_scaling", sweep, "--metric", "fid", "-o", tmp_path / "refused")
    assert refused.returncode == 2 and "refused (no_rows)" in refused.stderr
    assert "Refused (no_rows)" in (tmp_path / "refused" / "report.html").read_text()
    vague = run_tool("fit_scaling", sweep, "--where", "key_guidance", "-o", tmp_path / "vague")
    assert vague.returncode == 2 and vague.stderr == "error: --where key_guidance: give COLUMN=VALUE\n"
    wrong = run_tool("fit_scaling", tmp_path / "nothing", "-o", tmp_path / "wrong")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--resamples=0", "--resamples: 0 is outside [20, 100000]"),
        ("--resamples=1000000000", "--resamples: 1000000000 is outside [20, 100000]"),
        ("--from-step=-5", "--from-step: -5 is outside [0, 1e+12]"),
        ("--huber=inf", "--huber: inf must be a number above 0"),
        ("--huber=-0.1", "--huber: -0.1 must be a number above 0"),
        ("--seed=-1", "--seed: -1 is outside [0, 1e+12]"),
    ],
)
def test_an_option_out_of_range_is_one_message(sweep, tmp_path, option, message):
    done = run_tool("fit_scaling", sweep, option, "-o", tmp_path / "report")
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n") and not (tmp_path / "report").exists()


HOSTILE = {  # a name: what report.md shows of it
    "a|b": r"a\|b",
    "<script>alert(1)</script>": "&lt;script&gt;alert(1)&lt;/script&gt;",
    "`rm -rf`": r"\`rm -rf\`",
    "[x](javascript:alert(1))": r"\[x\](javascript:alert(1))",
    "![x](http://evil/x.png)": r"!\[x\](http\://evil/x.png)",
    r"$\frac": r"\$\\frac",
    "_a_ *b* ~~c~~ #d @e": r"\_a\_ \*b\* \~\~c\~\~ \#d \@e",
    "www.evil.org": r"www\.evil.org",
}


@pytest.mark.parametrize("names", [list(HOSTILE)[:4], list(HOSTILE)[4:]])
def test_names_from_a_table_are_shown_and_never_obeyed(table, tmp_path, names):
    """As sizes, runs, a metric, a column and its value; in the pages and in the figures."""
    sizes = dict(zip(("xs", "s", "m", "l"), names, strict=True))
    rows = table[table["metric"] == "fd"].drop(columns=[column for column in table if column.startswith("key_")])
    rows = rows.assign(size=rows["size"].map(sizes), run="run " + rows["size"].map(sizes), metric=names[0])
    rows = validate(rows.assign(**{f"key_{names[1]}": names[2]}))
    write_report(study(rows, Question(metric=names[0], laws=("power",), resamples=20)), tmp_path, [])
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    bare = text
    for name in names:
        assert HOSTILE[name] in text and html.escape(name) in page
        assert html.escape(name, quote=False) in (tmp_path / "curves.svg").read_text()
        bare = bare.replace(HOSTILE[name], "")
    assert not any(name in bare for name in names) and "<script" not in page + text
    tables = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {9, 4, 10}, "a cell more or less"


def test_white_space_and_what_is_not_printed_stay_within_their_line():
    assert (
        on_one_line("a\nb\t c\u2028d\x1b[31m\u202ee")
        == "a b c d\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}e"
    )
    page = render("{{ text }}|{{ made }}", {"text": "a\n# b|c", "made": Markup("|")}, in_markdown)
    assert page == r"a \# b\|c||"


def test_a_report_that_cannot_be_written_is_not_half_there(sweep, tmp_path):
    arguments = ["fit_scaling", sweep, "--law", "power", "--resamples", "20", "-o"]
    (tmp_path / "file").write_text("mine")
    for path, message in {"file": "file: is a file", "file/report": "(Not a directory)", "a\0b": "NUL"}.items():
        done = run_tool(*arguments, tmp_path / path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("error: ") == 1, done
        assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "report" / "report.md").mkdir(parents=True)
    done = run_tool(*arguments, tmp_path / "report")
    assert done.returncode == 2 and "report.md" in done.stderr
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.md"]

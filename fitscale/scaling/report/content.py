"""A study in words and tables: what report.md and report.html show, as text ready to print."""

from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.fit.fitting import Fit
from fitscale.scaling.fit.isoflop import IsoFlop, Optimum
from fitscale.scaling.fit.laws import COMPUTE, SURFACE
from fitscale.scaling.fit.noise import Noise
from fitscale.scaling.fit.optimal_size import optimal_sizes
from fitscale.scaling.fit.study import LawResult, Question, Study
from fitscale.scaling.report.axes import readable
from fitscale.scaling.rows.table import data_hash

GUIDANCE = "key_guidance"
SHOWN = ("validation_loss", "fd", "recognised")  # metrics with a column in the table of sizes, if evaluated


def report_content(study: Study) -> dict[str, Any]:
    """What the Markdown and the HTML page show, as text ready to print."""
    return {
        "metric": study.question.metric,
        "title": readable(study.question.metric),
        "question": study.question,
        "refusals": study.refusals,
        "cautions": study.cautions,
        "headlines": [_headline(study, result) for result in study.results],
        "laws": [_law_lines(study, result) for result in study.results],
        "isoflops": [_isoflop_lines(iso) for iso in study.isoflops] + _surface_lines(study),
        "sizes": size_table(study),
        "held_out": ", ".join(study.held_out),
        "predictions": [(result.fit.law.name, _prediction_rows(result)) for result in study.results],
        "key": study.key,
        "data_hash": data_hash(study.table)[:16],
        "extrapolation": _extrapolation(study),
    }


def size_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Header and one row per size: its longest run's parameters, compute and last value of each metric.

    A metric that was measured at several guidance scales has a column for each.
    """
    table, asked = study.table, study.question.metric
    others = table[table["metric"].isin([name for name in SHOWN if name != asked])]
    wanted = pd.concat([others, study.rows if len(study.rows) else table[table["metric"] == asked]])
    scale = wanted[GUIDANCE].fillna("") if GUIDANCE in table else pd.Series("", index=wanted.index)
    several = scale.groupby(wanted["metric"]).transform("nunique") > 1
    labels = wanted["metric"].where(~several, wanted["metric"] + ", guidance " + scale)
    rank = {metric: index for index, metric in enumerate(dict.fromkeys((*SHOWN, asked)))}
    metrics = sorted(labels.unique(), key=lambda label: (rank[label.split(",")[0]], label))
    header = ["size", "parameters", "steps", "training FLOPs", "papers' FLOPs", "device-hours", *metrics, "status"]
    order = table.groupby("size")["parameters"].max().sort_values(kind="stable").index
    wanted = wanted.assign(label=labels)
    return header, [
        _size_row(wanted[wanted["size"] == size], metrics) for size in order if (wanted["size"] == size).any()
    ]


def _size_row(rows: pd.DataFrame, metrics: list[str]) -> list[str]:
    last = rows[rows["train_flops"] == rows["train_flops"].max()]
    first = (last if len(last) else rows).iloc[0]
    values = [
        " / ".join(number(value) for value in last.loc[last["label"] == metric, "value"].drop_duplicates()) or "-"
        for metric in metrics
    ]
    cells = [
        number(first["parameters"]),
        number(first["step"]),
        flops_text(first["train_flops"]),
        flops_text(first["paper_flops"]),
        number(first["device_hours"]),
    ]
    return [str(first["size"]), *cells, *values, "-" if pd.isna(first["status"]) else str(first["status"])]


def number(value: Any) -> str:
    """Three to four significant digits; large whole numbers in words of thousands; a missing number as a dash."""
    if value is None or pd.isna(value):
        return "-"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if limit <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'K' else limit):.4g} {unit}"
    return f"{value:.3g}" if abs(value) >= 1e12 else f"{value:.4g}"


def flops_text(value: Any) -> str:
    """Compute always as a power of ten, or a dash."""
    return "-" if value is None or pd.isna(value) else f"{value:.3g}" if abs(value) >= 1e6 else f"{value:.3e}"


def _headline(study: Study, result: LawResult) -> str:
    name, fit = result.fit.law.name, result.fit
    start = f"{name.capitalize()} law, fitted on {fit.points} points of {result.resamples.runs} runs"
    counted = result.predictions[result.predictions["chosen"]] if len(result.predictions) else result.predictions
    if counted.empty:
        return f"{start}: scatter of a new run {result.resamples.noise.total:.1%}; no held-out point tests it."
    last = counted.sort_values("train_flops").iloc[-1]
    where = "inside" if last["inside"] else "OUTSIDE"
    return (
        f"{start}: predicts a {readable(study.question.metric)} of {number(last['predicted'])} for the held-out size "
        f"{last['size']} at {flops_text(last['train_flops'])} FLOPs; measured {number(last['value'])}: "
        f"error {last['error']:+.1%}, {where} the 90 % interval {number(last['low'])} to {number(last['high'])}."
    )


def _fitted(question: Question, fit: Fit) -> str:
    loss = fit.loss
    how = "least squares" if loss.huber is None else f"Huber's loss with its corner at {loss.huber:g}"
    what = f"ln({question.metric})" if loss.space == "log" else f"{question.metric} itself"
    points = question.points if fit.law.inputs == COMPUTE else "all"
    return f"Fitted by {how} on {what}, points weighted alike ({points} points)"


def _scatter(noise: Noise) -> str:
    if noise.point == 0.0:
        return f"{noise.total:.1%}, all taken for that from run to run (these points do not tell checkpoints' apart)"
    return f"{noise.run**0.5:.1%} from run to run and {noise.point**0.5:.1%} from checkpoint to checkpoint"


def _law_lines(study: Study, result: LawResult) -> dict[str, Any]:
    intervals = parameter_intervals(result)
    lines = []
    for name, value in result.fit.named().items():
        low, high = intervals.get(name, (None, None))
        lines.append([name, number(value), f"{number(low)} to {number(high)}"])
    if result.floor is not None and not result.floor.identified:
        upper = "no upper limit" if result.floor.high is None else f"at most {number(result.floor.high)}"
        lines[-1] = ["e", "not identified", upper]
    reference = ", ".join(f"{name} = {value:.4g}" for name, value in result.fit.reference().items())
    return {
        "name": result.fit.law.name,
        "fitted": _fitted(study.question, result.fit),
        "formula": result.fit.law.formula,
        "reference": reference,
        "lines": lines,
        "scatter": _scatter(result.resamples.noise),
        "reached": f"{result.fit.reached:.0%} of {result.fit.starts}",
    }


def parameter_intervals(result: LawResult, level: float = 0.9) -> dict[str, tuple[float, float]]:
    """Central intervals of the readable parameters over the resamples of whole runs."""
    fit_names = list(result.fit.named())
    draws = pd.DataFrame([result.fit.named(theta_P) for theta_P in result.resamples.theta_KP])
    return {name: result.resamples.interval(draws[name].to_numpy(), level) for name in fit_names}


def _isoflop_lines(iso: IsoFlop) -> dict[str, Any]:
    interval = (
        f"not estimated ({iso.no_interval})"
        if iso.interval_90 is None
        else f"{iso.interval_90[0]:.4f} to {iso.interval_90[1]:.4f}"
    )
    text = (
        f"{iso.method}: best size = {iso.coefficient:.3g} C^{iso.exponent:.4f}, from {len(iso.optima)} budgets; "
        f"90 % interval of the exponent {interval}"
    )
    return {"text": text, "optima": [_optimum_cells(optimum) for optimum in iso.optima]}


def _surface_lines(study: Study) -> list[dict[str, Any]]:
    """Compute-optimal sizes by each fitted law of size and data, at budgets within the fitted compute."""
    lines = []
    for result in study.results:
        if result.fit.law.inputs != SURFACE:
            continue
        flops = result.used["train_flops"]
        budgets = np.geomspace(flops.min() * 2, flops.max(), 5)
        optima, refusals = optimal_sizes(result.fit, result.used, result.resamples.theta_KP[:200], budgets)
        text = f"by the {result.fit.law.name} law" + "".join(f"; {refusal.message}" for refusal in refusals)
        lines.append({"text": text, "optima": [_optimum_cells(optimum) for optimum in optima]})
    return lines


def _optimum_cells(optimum: Optimum) -> list[str]:
    cells = [flops_text(optimum.budget), number(optimum.parameters), number(optimum.metric)]
    return [*cells, f"{optimum.spread:.1%}"]


def _prediction_rows(result: LawResult) -> list[list[str]]:
    return [
        [
            str(row["run"]),
            number(row["step"]),
            flops_text(row["train_flops"]),
            number(row["value"]),
            number(row["predicted"]),
            f"{number(row['low'])} to {number(row['high'])}",
            f"{row['error']:+.1%}",
            "yes" if row["inside"] else "no",
            "yes" if row["chosen"] else "no",
        ]
        for _, row in result.predictions.iterrows()
    ]


def _extrapolation(study: Study) -> str | None:
    rows = study.rows
    if rows.empty or not rows["held_out"].any():
        return None
    ratio = rows.loc[rows["held_out"], "train_flops"].max() / rows.loc[~rows["held_out"], "train_flops"].max()
    return f"{ratio:.2f}"

"""A study in words and tables: what report.md and report.html show, as text ready to print."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.fit.compute_optimal import IsoFlop
from fitscale.scaling.fit.laws import COMPUTE
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import LawResult, Study
from fitscale.scaling.fit.uncertainty import central
from fitscale.scaling.rows.fid import GUIDANCE
from fitscale.scaling.rows.fitted_points import SAME_COMPUTE
from fitscale.scaling.rows.refusals import listed
from fitscale.scaling.rows.selection import size_order
from fitscale.scaling.rows.table import KEY, data_column, data_hash

NAMES = {"fd": "Fréchet distance", "fid": "FID", "validation_loss": "validation loss", "recognised": "share recognised"}
SHOWN = (
    "validation_loss",
    "fd",
    "precision",
    "recall",
    "recognised",
)  # with a column in the table of sizes, if evaluated
BESIDE = ("precision", "recall")  # of them, those shown if they are of the images and the network of the study's metric


def readable(metric: str) -> str:
    """A metric's name for people; the name itself where there is no better one."""
    return NAMES.get(metric, metric)


def data_of(study: Study) -> str:
    """What the study's rows count their data in: images or tokens."""
    return data_column(study.table[study.table["metric"] == study.question.metric])


def report_content(study: Study) -> dict[str, Any]:
    """What the Markdown and the HTML page show: the study, and what of it is not yet text ready to print."""
    extrapolation = None
    if study.held_out:
        flops = study.rows.groupby("held_out")["train_flops"].max()
        extrapolation = f"{flops[True] / flops[False]:.2f}"
    return {
        "study": study,
        "title": readable(study.question.metric),
        "percent": percent(study.question),
        "headlines": answers(study),
        "laws": [_law_lines(study, result) for result in study.results],
        "sizes": size_table(study),
        "held_out": held_out_text(study) if study.held_out else "",
        "predictions": [(result.name, _prediction_rows(result)) for result in study.results],
        "key": [f"{name}: {value}" for name, value in study.key.items()],
        "data_hash": data_hash(study.table)[:16],
        "extrapolation": extrapolation,
    }


def size_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Header and one row per size: its longest run's parameters, compute and last value of each metric.

    A metric that was measured at several guidance scales has a column for each.
    """
    table, asked = study.table, study.question.metric
    others = table[table["metric"].isin([name for name in SHOWN if name not in (*BESIDE, asked)])]
    wanted = pd.concat([others, *_beside(study), study.rows if len(study.rows) else table[table["metric"] == asked]])
    scale = wanted[GUIDANCE].fillna("") if GUIDANCE in table else pd.Series("", index=wanted.index)
    several = scale.groupby(wanted["metric"]).transform("nunique") > 1
    wanted = wanted.assign(label=wanted["metric"].where(~several, wanted["metric"] + ", guidance " + scale))
    rank = list(dict.fromkeys((*SHOWN, asked.split("/")[0])))
    metrics = sorted(wanted["label"].unique(), key=lambda label: (rank.index(re.split("[/,]", label)[0]), label))
    header = ["size", "parameters", "steps", "training FLOPs", "papers' FLOPs", "device-hours", *metrics, "status"]
    order = [size for size in size_order(table) if size in set(wanted["size"])]
    return header, [_size_row(wanted[wanted["size"] == size], metrics) for size in order]


def _beside(study: Study) -> Iterator[pd.DataFrame]:
    """The rows of precision and recall that have the key of the study's own."""
    asked, *network = study.question.metric.split("/", 1)
    for name in BESIDE if study.key and asked not in BESIDE else ():
        rows = study.table[study.table["metric"] == "/".join([name, *network])]
        for part, value in study.key.items():
            rows = rows[rows[f"{KEY}{part}"] == value]
        if len(rows):
            yield rows


def _size_row(rows: pd.DataFrame, metrics: list[str]) -> list[str]:
    last = rows[rows["train_flops"] == rows["train_flops"].max()]
    first = (last if len(last) else rows).iloc[0]
    values = [last.loc[last["label"] == metric, "value"].drop_duplicates() for metric in metrics]
    return [
        str(first["size"]),
        *(number(first[name]) for name in ("parameters", "step")),
        *(flops_text(first[name]) for name in ("train_flops", "paper_flops")),
        number(first["device_hours"]),
        *(" / ".join(map(number, of_metric)) or "-" for of_metric in values),
        "-" if pd.isna(first["status"]) else str(first["status"]),
    ]


def number(value: Any) -> str:
    """Three to four significant digits; large whole numbers in words of thousands; a missing number as a dash."""
    if pd.isna(value):
        return "-"
    for least, unit, scale in ((1e9, "B", 1e9), (1e6, "M", 1e6), (1e4, "K", 1e3)):
        if least <= abs(value) < 1e12:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.3g}" if abs(value) >= 1e12 else f"{value:.4g}"


def flops_text(value: Any) -> str:
    """Compute always as a power of ten, or a dash."""
    return "-" if pd.isna(value) else f"{value:.3g}" if abs(value) >= 1e6 else f"{value:.3e}"


def interval_text(low: Any, high: Any) -> str:
    return f"{number(low)} to {number(high)}"


def percent(question: Question) -> str:
    """The level of the intervals."""
    return f"{100 * question.level:.3g} %"


def held_out_text(study: Study) -> str:
    """The held-out sizes by name, or how many they are."""
    few = len(study.held_out) <= 3
    return f"held-out size {', '.join(study.held_out)}" if few else f"{len(study.held_out)} held-out sizes"


def answers(study: Study) -> list[str]:
    """The sentence that answers, then what other laws say; the first of what was refused where nothing was fitted."""
    said = [headline(study, result) for result in study.results]
    said += [
        f"The best {iso.of} grow as C^{iso.exponent:.3f} by {iso.method}, {sure(iso)}." for iso in study.isoflops[:1]
    ]
    return said or [f"No law of {readable(study.question.metric)} could be fitted; what follows says why."]


def headline(study: Study, result: LawResult) -> str:
    """How the law fared at the largest held-out compute that counts; runs of equal compute are one measurement."""
    if result.claimed.empty:
        return f"{_fitted(result)}: scatter of a new run {result.fit.noise.total:.1%}; no held-out point tests it."
    flops = result.claimed["train_flops"]
    tied = result.claimed[flops * SAME_COMPUTE >= flops.max()]
    last = tied.sort_values(["train_flops", "size", "run"]).iloc[-1]
    value = float(np.exp(np.log(tied["value"]).mean()))
    several = f"{interval_text(tied['value'].min(), tied['value'].max())} in {len(tied)} runs, in the mean "
    inside = int(tied["inside"].sum())
    where = {0: "OUTSIDE", len(tied): "inside"}.get(inside, f"{inside} of {len(tied)} inside")
    return (
        f"{_fitted(result)}: predicts a {readable(study.question.metric)} of {number(last['predicted'])} for the "
        f"held-out size {listed(sorted(tied['size'].unique()))} at {flops_text(last['train_flops'])} FLOPs; "
        f"measured {several * (len(tied) > 1)}{number(value)}: error {last['predicted'] / value - 1:+.1%}, {where} "
        f"the {percent(study.question)} interval {interval_text(last['low'], last['high'])}."
    )


def _fitted(result: LawResult) -> str:
    points, law = result.fit.points, f"{result.name.capitalize()} law"
    fitted = f"itted on {len(points.y_N)} points of {points.runs} runs"
    return f"{law} {result.lack_of_fit}. F{fitted}" if result.lack_of_fit else f"{law}, f{fitted}"


def _law_lines(study: Study, result: LawResult) -> dict[str, Any]:
    fit, question = result.fit, study.question
    intervals = parameter_intervals(result)
    lines = [[name, number(value), interval_text(*intervals[name])] for name, value in fit.named().items()]
    if result.floor is not None and not result.floor.identified:
        upper = "no upper limit" if result.floor.high is None else f"at most {number(result.floor.high)}"
        lines[-1] = ["e", "not identified", upper]
    what = f"ln({question.metric})" if fit.loss.space == "log" else f"{question.metric} itself"
    points = question.points if fit.law.inputs == COMPUTE else "all"
    weighted = "alike" if np.ptp(fit.points.weight_N) == 0 else "by their standard errors"
    scatter = f"{fit.noise.run**0.5:.1%} from run to run and {fit.noise.point**0.5:.1%} from checkpoint to checkpoint"
    if fit.noise.point == 0.0:
        unknown = "all taken for that from run to run (these points do not tell checkpoints' apart)"
        scatter = f"{fit.noise.total:.1%}, {unknown}"
    if fit.growth:
        scatter += f" in runs of middling size, {fit.growth:+.2g} of its logarithm per unit of ln(size)"
    reference = {data_of(study) if name == "images" else name: value for name, value in fit.reference().items()}
    return {
        "name": result.name,
        "fitted": f"Fitted by {fit.loss} on {what}, points weighted {weighted} ({points} points)",
        "formula": fit.law.formula,
        "reference": ", ".join(f"{name} = {value:.4g}" for name, value in reference.items()),
        "lines": lines,
        "scatter": scatter,
        "reached": f"{fit.reached:.0%} of {fit.starts}",
    }


def parameter_intervals(result: LawResult) -> dict[str, tuple[float, float]]:
    """Central intervals of the readable parameters over the resamples of whole runs, at the question's level."""
    level = result.question.level
    return {name: central(draws_K, level) for name, draws_K in result.fit.named(result.resamples.theta_KP).items()}


def sure(iso: IsoFlop) -> str:
    """The interval of its exponent, in words."""
    interval = "not estimated" if iso.interval is None else "{:.3f} to {:.3f}".format(*iso.interval)
    return f"{100 * iso.level:.3g} %: {interval}"


def _prediction_rows(result: LawResult) -> list[list[str]]:
    return [
        [
            str(row.run),
            number(row.step),
            flops_text(row.train_flops),
            number(row.value),
            number(row.predicted),
            interval_text(row.low, row.high),
            f"{row.error:+.1%}",
            *("yes" if true else "no" for true in (row.inside, row.chosen)),
        ]
        for row in result.predictions.itertuples()
    ]

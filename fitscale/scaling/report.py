"""A study as files: fit.json for programs, report.md and one self-contained report.html for people, figures.

Refusals and cautions come first. A floor that the data do not identify is reported as such, without a number.
"""

import base64
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from fitscale.config.errors import UserError
from fitscale.config.rundir import write_atomic
from fitscale.scaling.figures import figures
from fitscale.scaling.isoflop import IsoFlop
from fitscale.scaling.study import LawResult, Study
from fitscale.scaling.table import data_hash
from fitscale.scaling.templates import HTML, MARKDOWN

PACKAGES = ("numpy", "scipy", "pandas")
GUIDANCE = "key_guidance"
SHOWN = ("validation_loss", "fd", "recognised")  # metrics with a column in the table of sizes, if evaluated


def write_report(study: Study, out: Path, images: list[Path]) -> list[Path]:
    """Write fit.json, report.md, report.html and the figures (PNG, SVG) into `out`; returns their paths.

    `images` are embedded into the page with their file names as captions.
    """
    pictures = [(path.stem.replace("_", " ").replace("-", " "), _data_uri(path)) for path in images]
    drawn = figures(study)
    content = report_content(study)
    files: dict[str, str | bytes] = {"fit.json": json.dumps(fit_record(study), indent=2, allow_nan=False) + "\n"}
    files |= {f"{name}.{kind}": data for name, figure in drawn.items() for kind, data in figure.items()}
    linked = {name: f"{name}.png" for name in drawn}
    embedded = {name: _encoded(figure["png"], "png") for name, figure in drawn.items()}
    files["report.md"] = _render(MARKDOWN, content | {"figures": linked}, escape=False)
    files["report.html"] = _render(HTML, content | {"figures": embedded, "images": pictures}, escape=True)
    for name, data in files.items():
        write_atomic(out / name, data)
    return [out / name for name in files]


def fit_record(study: Study) -> dict[str, Any]:
    """The study as plain numbers: enough to repeat it and to predict from it. A missing number is null."""
    question = study.question
    return {
        "metric": question.metric,
        "points": question.points,
        "held_out": study.held_out,
        "where": question.where,
        "from_step": question.from_step,
        "key": study.key,
        "seed": question.seed,
        "resamples": question.resamples,
        "data_sha256": data_hash(study.table),
        "versions": {name: _version(name) for name in ("fitscale", *PACKAGES)},
        "refusals": [{"code": refusal.code, "message": refusal.message} for refusal in study.refusals],
        "cautions": [{"code": caution.code, "message": caution.message} for caution in study.cautions],
        "laws": [_law_record(result) for result in study.results],
        "isoflop": [_isoflop_record(iso) for iso in study.isoflops],
    }


def _law_record(result: LawResult) -> dict[str, Any]:
    fit, noise = result.fit, result.resamples.noise
    return {
        "law": fit.law.name,
        "formula": fit.law.formula,
        "reference": fit.reference(),
        "parameters": fit.named(),
        "intervals_90": parameter_intervals(result),
        "covariance": {"parameters": list(fit.law.parameters), "matrix": result.covariance_PP.tolist()},
        "floor": None if result.floor is None else vars(result.floor),
        "objective": fit.objective,
        "points": fit.points,
        "runs": result.resamples.runs,
        "starts": fit.starts,
        "starts_reached": fit.reached,
        "noise": {"run": noise.run**0.5, "checkpoint": noise.point**0.5},
        "mean_held_out_error": result.error,
        "predictions": json.loads(result.predictions.to_json(orient="records", double_precision=15)),
    }


def _isoflop_record(iso: IsoFlop) -> dict[str, Any]:
    return {
        "method": iso.method,
        "exponent": iso.exponent,
        "interval_90": iso.interval_90,
        "coefficient": iso.coefficient,
        "optima": [vars(optimum) for optimum in iso.optima],
        "refused_budgets": [refusal.message for refusal in iso.refusals],
    }


def parameter_intervals(result: LawResult, level: float = 0.9) -> dict[str, tuple[float, float]]:
    """Central intervals of the readable parameters over the resamples of whole runs."""
    fit_names = list(result.fit.named())
    draws = pd.DataFrame([result.fit.named(theta_P) for theta_P in result.resamples.theta_KP])
    return {name: result.resamples.interval(draws[name].to_numpy(), level) for name in fit_names}


def report_content(study: Study) -> dict[str, Any]:
    """What the Markdown and the HTML page show, as text ready to print."""
    return {
        "metric": study.question.metric,
        "question": study.question,
        "refusals": study.refusals,
        "cautions": study.cautions,
        "headlines": [_headline(study, result) for result in study.results],
        "laws": [_law_lines(result) for result in study.results],
        "isoflops": [_isoflop_lines(iso) for iso in study.isoflops],
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
    start = f"{name} law, fitted on {fit.points} points of {result.resamples.runs} runs"
    counted = result.predictions[result.predictions["chosen"]] if len(result.predictions) else result.predictions
    if counted.empty:
        return f"{start}: scatter of a new run {result.resamples.noise.total:.1%}; no held-out point tests it."
    last = counted.iloc[-1]
    where = "inside" if last["inside"] else "OUTSIDE"
    return (
        f"{start}: predicts {study.question.metric} {number(last['predicted'])} for the held-out size {last['size']} "
        f"at {flops_text(last['train_flops'])} FLOPs; measured {number(last['value'])}: error {last['error']:+.1%}, "
        f"{where} the 90 % interval {number(last['low'])} to {number(last['high'])}."
    )


def _law_lines(result: LawResult) -> dict[str, Any]:
    noise = result.resamples.noise
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
        "formula": result.fit.law.formula,
        "reference": reference,
        "lines": lines,
        "scatter": f"{noise.run**0.5:.1%} from run to run and {noise.point**0.5:.1%} from checkpoint to checkpoint",
        "reached": f"{result.fit.reached:.0%} of {result.fit.starts}",
    }


def _isoflop_lines(iso: IsoFlop) -> dict[str, Any]:
    low, high = iso.interval_90
    return {
        "text": f"{iso.method}: best size = {iso.coefficient:.3g} C^{iso.exponent:.4f}, 90 % interval of the exponent "
        f"{low:.4f} to {high:.4f}, from {len(iso.optima)} budgets",
        "optima": [
            [flops_text(o.budget), number(o.parameters), number(o.metric), f"{o.spread:.1%}"] for o in iso.optima
        ],
    }


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


def _render(template: str, content: dict[str, Any], escape: bool) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.from_string(template).render(content)


def _data_uri(path: Path) -> str:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg"):
        raise UserError(f"{path}: only .png, .jpg and .svg images can be embedded")
    try:
        return _encoded(path.read_bytes(), path.suffix.lower().lstrip("."))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _encoded(data: bytes, kind: str) -> str:
    mime = {"jpg": "jpeg", "svg": "svg+xml"}.get(kind, kind)
    return f"data:image/{mime};base64,{base64.b64encode(data).decode()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""A study as files: fit.json for programs, report.md and one self-contained report.html for people, figures.

Refusals and cautions come first. A floor that the data do not identify is reported as such, without a number.
"""

import base64
import json
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from markupsafe import escape

from fitscale.config.errors import UserError
from fitscale.config.files import replacing
from fitscale.scaling.fit.study import LawResult, Study
from fitscale.scaling.fit.uncertainty import covariance
from fitscale.scaling.report.content import data_of, parameter_intervals, readable, report_content
from fitscale.scaling.report.figures import figures
from fitscale.scaling.report.optimal import isoflop_record, optimal_parts
from fitscale.scaling.report.samples import Place, SampleFolder, placed, samples_along_the_curve
from fitscale.scaling.report.templates import HTML, MARKDOWN, in_markdown, render
from fitscale.scaling.rows.files import read_bounded
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.table import data_hash

PACKAGES = ("numpy", "scipy", "pandas")
MOST_SHEET_BYTES = 2**25


def write_report(study: Study, out: Path, folders: list[SampleFolder]) -> list[Path]:
    """Write fit.json, report.md, report.html and the figures (PNG, SVG) into `out`; returns their paths.

    The images of `folders` are drawn along the curve; their contact sheets are embedded into the page.

    Raises:
        UserError: a folder's checkpoint is not among the study's rows, or an image cannot be read.
    """
    drawn = figures(study)
    places = placed(study, folders) if len(study.rows) else []
    if places:
        drawn["samples"] = samples_along_the_curve(study, places)
    sheets = [(_caption(place), _data_uri(place.folder.path / "contact_sheet.png")) for place in places]
    content = report_content(study) | {"optimal": optimal_parts(study)}
    files: dict[str, str | bytes] = {"fit.json": json.dumps(fit_record(study), indent=2, allow_nan=False) + "\n"}
    files |= {f"{name}.{kind}": data for name, figure in drawn.items() for kind, data in figure.items()}
    linked = {name: f"{name}.png" for name in drawn}
    embedded = {name: png_uri(figure["png"]) for name, figure in drawn.items()}
    files["report.md"] = render(MARKDOWN, content | {"figures": linked}, in_markdown)
    files["report.html"] = render(HTML, content | {"figures": embedded, "sheets": sheets}, escape)
    if blocked := [str(out / name) for name in files if (out / name).is_dir()]:
        raise UserError(f"{', '.join(blocked)}: a folder, where the report has a file")
    with ExitStack() as all_or_none:
        for name, data in files.items():
            temporary = all_or_none.enter_context(replacing(out / name))
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return [out / name for name in files]


def _caption(place: Place) -> str:
    metric = readable(str(place.row["metric"]))
    measured = f"no {metric} of such images" if place.value is None else f"{metric} {place.value:.4g}"
    return f"{place.row['size']} after {place.folder.step:,} steps, {place.folder.how}: {measured}"


def fit_record(study: Study) -> dict[str, Any]:
    """The question and its answer as plain numbers: enough to repeat it and to predict from it. Missing is null."""
    data = data_of(study)
    return asdict(study.question) | {
        "data": data,  # what D counts
        "held_out": study.held_out,
        "key": study.key,
        "data_sha256": data_hash(study.table),
        "versions": {name: _version(name) for name in ("fitscale", *PACKAGES)},
        "refusals": _records(study.refusals),
        "unfitted": _records(study.unfitted),
        "cautions": [vars(caution) for caution in study.cautions],
        "laws": [_law_record(result, data) for result in study.results],
        "isoflop": [isoflop_record(iso) for iso in study.isoflops],
        "quoted": asdict(study.quoted),
    }


def _records(refusals: list[Refusal]) -> list[dict[str, str]]:
    return [{"code": refusal.code, "message": refusal.message} for refusal in refusals]


def _law_record(result: LawResult, data: str) -> dict[str, Any]:
    fit, predictions = result.fit, result.predictions.rename(columns={"images": data})
    return {
        "law": fit.law.name,
        "formula": fit.law.formula,
        "reference": {data if name == "images" else name: value for name, value in fit.reference().items()},
        "parameters": fit.named(),
        "intervals": parameter_intervals(result),
        "covariance": {"parameters": list(fit.law.parameters), "matrix": covariance(fit).tolist()},
        "floor": None if result.floor is None else vars(result.floor),
        "objective": fit.objective,
        "points": len(fit.points.y_N),
        "runs": fit.points.runs,
        "starts": fit.starts,
        "starts_reached": fit.reached,
        "noise": {"run": fit.noise.run**0.5, "checkpoint": fit.noise.point**0.5, "growth": fit.growth},
        "resampling": result.resamples.how,
        "weight": result.own.weight,
        "lack_of_fit": result.lack_of_fit,
        "mean_held_out_error": result.error,
        "predictions": json.loads(predictions.to_json(orient="records", double_precision=15)),
    }


def _data_uri(path: Path) -> str:
    """Raises UserError for what is no PNG, or so large that no page could show it."""
    data = read_bounded(path, MOST_SHEET_BYTES)
    if not data.startswith(b"\x89PNG\r\n"):
        raise UserError(f"{path}: not a PNG")
    return png_uri(data)


def png_uri(data: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

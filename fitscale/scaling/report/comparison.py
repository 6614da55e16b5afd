"""A comparison of groups as files: comparison.json for programs, comparison.md and .html for people, and a figure."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import escape

from fitscale.config.errors import UserError
from fitscale.config.files import replacing
from fitscale.scaling.fit.compare import Comparison, Difference
from fitscale.scaling.fit.laws import COMPUTE
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import LawResult
from fitscale.scaling.report import canvas
from fitscale.scaling.report.content import interval_text, number, percent, readable
from fitscale.scaling.report.figures import compute_label
from fitscale.scaling.report.files import png_uri
from fitscale.scaling.report.optimal import Part, constants_part
from fitscale.scaling.report.templates import HTML_PARTS, MARKDOWN_PARTS, in_markdown, render

NAME = "comparison"
BODY = """\
{{ heading(1, title) }}
{{ items(lines) }}
{% for refusal in comparison.refusals %}
{{ note("Refused", "refusal", refusal) }}
{% endfor %}
{% for caution in comparison.cautions %}
{{ note("Caution", "caution", caution) }}
{% endfor %}
{{ figure("comparison", title) }}
{% for part in parts %}
{{ heading(2, part.heading) }}
{% call paragraph() %}
{{ part.text }}
{% endcall %}
{{ table(part.header, part.rows) }}
{% endfor %}
"""


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write the comparison into `out`; returns the paths of its files."""
    drawn = {NAME: comparison_figure(comparison)} if any(_compute_laws(comparison)) else {}
    content = {
        "comparison": comparison,
        "title": f"{readable(comparison.question.metric)} by {comparison.column}",
        "lines": [sentence(difference, comparison.question) for difference in told(comparison)],
        "parts": _parts(comparison),
    }
    linked = {name: f"{name}.png" for name in drawn}
    embedded = {name: png_uri(figure["png"]) for name, figure in drawn.items()}
    files: dict[str, str | bytes] = {f"{NAME}.json": json.dumps(_record(comparison), indent=2, allow_nan=False) + "\n"}
    files |= {f"{name}.{kind}": data for name, figure in drawn.items() for kind, data in figure.items()}
    files[f"{NAME}.md"] = render(MARKDOWN_PARTS + BODY, content | {"figures": linked}, in_markdown)
    files[f"{NAME}.html"] = render(HTML_PARTS + BODY + "</body>\n</html>\n", content | {"figures": embedded}, escape)
    if blocked := [str(out / name) for name in files if (out / name).is_dir()]:
        raise UserError(f"{', '.join(blocked)}: a folder, where the comparison has a file")
    with ExitStack() as all_or_none:
        for name, data in files.items():
            temporary = all_or_none.enter_context(replacing(out / name))
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return [out / name for name in files]


def told(comparison: Comparison) -> list[Difference]:
    """The differences that the data tell."""
    return [difference for difference in comparison.differences if difference.told]


def sentence(difference: Difference, question: Question) -> str:
    """One difference for people."""
    value, metric = number(difference.value), question.metric
    interval = f"{percent(question)}: {interval_text(difference.low, difference.high)}"
    start = f"{difference.law.capitalize()} law: {difference.first}"
    if difference.quantity == "compute":
        what = f"needs {value} ({interval}) times {difference.second}'s FLOPs for the same {metric}"
        return f"{start} {what} of {number(difference.at)}"
    if difference.quantity == "level":
        what = f"has {value} ({interval}) times {difference.second}'s {metric}"
        return f"{start} {what} at {difference.at:.3g} training FLOPs"
    what = f"has an exponent {difference.quantity} larger by {value} ({interval}) than {difference.second}"
    return f"{start} {what}"


def comparison_figure(comparison: Comparison) -> canvas.Images:
    """The fitted points of every group with its best law of compute, and the band of a new run."""
    axes = canvas.new_figure().add_subplot()
    results = _compute_laws(comparison)
    canvas.over_compute(axes, pd.concat([result.used for result in results.values()]))
    for index, (group, result) in enumerate(results.items()):
        color, used = f"C{index}", result.used
        grid = np.geomspace(used["train_flops"].min(), used["train_flops"].max(), 40)
        line = pd.DataFrame({"train_flops": grid})
        low, high = result.interval(line)
        axes.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(grid, result.fit.metric(line), color=color, linewidth=1.3)
        label = canvas.literal(f"{group}: {result.name} law")
        axes.plot(used["train_flops"], used["value"], "os^Dv"[index % 5], color=color, markersize=5, label=label)
    metric = readable(comparison.question.metric)
    canvas.decorate(
        axes, f"{metric} by {comparison.column}", compute_label(next(iter(comparison.groups.values()))), metric
    )
    return canvas.rendered(axes.figure)


def _compute_laws(comparison: Comparison) -> dict[str, LawResult]:
    """Of every group the best law of compute, where it has one."""
    of_groups = {
        group: [result for result in answer.results if result.fit.law.inputs == COMPUTE]
        for group, answer in comparison.groups.items()
    }
    return {group: results[0] for group, results in of_groups.items() if results}


def _parts(comparison: Comparison) -> list[Part]:
    header = ["law", "first", "second", "what", "at", "value", f"{percent(comparison.question)} interval", "told"]
    rows = [
        [
            each.law,
            each.first,
            each.second,
            {"level": "metric, first / second", "compute": "FLOPs for the same metric, first / second"}.get(
                each.quantity, f"exponent {each.quantity}, first - second"
            ),
            number(each.at) if each.at is not None else "-",
            number(each.value),
            interval_text(each.low, each.high),
            "yes" if each.told else "no",
        ]
        for each in comparison.differences
    ]
    text = (
        "Levels are at one compute, multipliers of compute at one metric; not told: the interval holds no difference."
    )
    parts = [Part("Differences", text, header, rows)]
    for group, answer in comparison.groups.items():
        for law in answer.quoted.laws:
            part = constants_part(law, percent(comparison.question))
            parts.append(Part(f"{group}: {part.heading}", part.text, part.header, part.rows))
    return parts


def _record(comparison: Comparison) -> dict[str, Any]:
    return {
        "column": comparison.column,
        "question": asdict(comparison.question),
        "groups": {group: asdict(answer.quoted) for group, answer in comparison.groups.items()},
        "differences": [asdict(difference) | {"told": difference.told} for difference in comparison.differences],
        "refusals": [{"code": refusal.code, "message": refusal.message} for refusal in comparison.refusals],
        "cautions": [vars(caution) for caution in comparison.cautions],
    }

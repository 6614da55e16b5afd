"""Compute-optimal training in words and tables: isoFLOP by every method, constants, frontiers, three approaches."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from fitscale.scaling.fit.approaches import Approach, PowerLaw
from fitscale.scaling.fit.compute_optimal import IsoFlop, Optimum
from fitscale.scaling.fit.quoted import LawQuoted, Quantity
from fitscale.scaling.fit.study import Study
from fitscale.scaling.report.content import flops_text, interval_text, number, percent

LETTER = {"parameters": "N", "tokens": "D", "images": "D"}


@dataclass(frozen=True)
class Part:
    """A table with what stands above it."""

    heading: str
    text: str
    header: list[str]
    rows: list[list[str]]


def optimal_parts(study: Study) -> list[Part]:
    """All tables of the study's isoFLOP fits and answers that have a row."""
    parts = [_isoflop_part(iso, index == 0) for index, iso in enumerate(study.isoflops)]
    parts += [_approaches_part(study.quoted.approaches, percent(study.question))]
    for law in study.quoted.laws:
        parts += [constants_part(law, percent(study.question)), _frontier_part(law, study)]
    return [part for part in parts if part.rows]


def isoflop_lines(study: Study) -> list[str]:
    """For a terminal: every method's law, its budgets as a table, and what was refused."""
    lines = []
    for index, iso in enumerate(study.isoflops):
        part = _isoflop_part(iso, index == 0)
        widths = [max(map(len, column)) for column in zip(part.header, *part.rows, strict=True)]
        lines += [f"{part.heading}: {part.text}"]
        for row in (part.header, *part.rows):
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return lines


def isoflop_record(iso: IsoFlop) -> dict[str, Any]:
    """As plain numbers; without the points."""
    record = {each.name: getattr(iso, each.name) for each in fields(iso) if each.name not in ("slices", "refusals")}
    record |= {"optima": [asdict(optimum) for optimum in iso.optima]}
    return record | {"refused_budgets": [str(refusal) for refusal in iso.refusals]}


def _isoflop_part(iso: IsoFlop, first: bool) -> Part:
    law = f"{LETTER[iso.of]}* = {iso.coefficient:.4g} C^{iso.exponent:.4f} ({iso.of})"
    intervals = f"not estimated ({iso.no_interval})"
    if iso.interval is not None and iso.coefficient_interval is not None:
        exponent = "{:.4f} to {:.4f}".format(*iso.interval)
        intervals = f"exponent {exponent}, coefficient {interval_text(*iso.coefficient_interval)}"
    left_out = f"sizes left out are missed by {iso.error:.2%}" + (", the least: quote this one" if first else "")
    refused = f"; refused: {'; '.join(map(str, iso.refusals))}" if iso.refusals else ""
    text = f"{law}, from {len(iso.optima)} budgets; {100 * iso.level:.3g} %: {intervals}; {left_out}{refused}"
    header = ["budget (FLOPs)", f"best {iso.of}", "metric there", "least measured", "spread of ln(best)", "sizes"]
    return Part(f"isoFLOP by {iso.method}", text, header, [_optimum_cells(optimum) for optimum in iso.optima])


def _optimum_cells(optimum: Optimum) -> list[str]:
    amounts = [number(amount) for amount in (optimum.best, optimum.metric, optimum.measured)]
    return [flops_text(optimum.budget), *amounts, f"{optimum.spread:.1%}", str(optimum.sizes)]


def _approaches_part(approaches: list[Approach], percent: str) -> Part:
    """Hoffmann et al. 2022, table 2, with the coefficients."""
    header = [
        "approach",
        *(cell for what in ("a of N* = k C^a", "k", "b of D* = h C^b", "h") for cell in (what, percent)),
    ]
    text = "; ".join(f"{each.name}: refused, {each.refused}" for each in approaches if each.refused)
    rows = [
        [each.name, *_power_law_cells(each.parameters), *_power_law_cells(each.data)]
        for each in approaches
        if each.parameters is not None and each.data is not None
    ]
    return Part("Approaches 1, 2 and 3 of Hoffmann et al. 2022", text or "All of them answer.", header, rows)


def _power_law_cells(law: PowerLaw) -> list[str]:
    unknown = "not estimated"
    exponent, coefficient = law.exponent_interval, law.coefficient_interval
    return [
        f"{law.exponent:.4f}",
        unknown if exponent is None else "{:.4f} to {:.4f}".format(*exponent),
        number(law.coefficient),
        unknown if coefficient is None else interval_text(*coefficient),
    ]


def constants_part(law: LawQuoted, percent: str) -> Part:
    """A, B, E, exponents, a, b and G of one law."""
    text = "Inputs counted from 1 (N parameters, D images, C training FLOPs)."
    if "G" in law.constants:
        text += " a = beta / (alpha + beta), b and G as Hoffmann et al. 2022 (equation 4) define them."
    rows = [[name, *_quantity_cells(quantity)] for name, quantity in law.constants.items()]
    return Part(
        f"{law.law.capitalize()} law in the field's form", text, ["constant", "value", f"{percent} interval"], rows
    )


def _frontier_part(law: LawQuoted, study: Study) -> Part:
    heading = f"Compute-optimal frontier by the {law.law} law"
    cost = "" if law.cost is None else f"An image costs {law.cost.kappa:.3g} N^{law.cost.power:.3f} training FLOPs. "
    text = f"{cost}Sizes and compute beyond 1 are extrapolated; the metric's interval is that of a new run."
    amounts = ["best parameters", "best data", f"{law.data} per parameter", study.question.metric]
    header = [
        "FLOPs",
        *(cell for name in amounts for cell in (name, percent(study.question))),
        "x largest compute",
        "x largest size",
    ]
    rows = [
        [
            flops_text(point.train_flops),
            *_quantity_cells(point.parameters),
            *_quantity_cells(point.images),
            *_quantity_cells(point.data_per_parameter),
            *_quantity_cells(point.metric),
            f"{point.compute_ratio:.3g}",
            f"{point.size_ratio:.3g}",
        ]
        for point in law.frontier
    ]
    return Part(heading, text, header, rows)


def _quantity_cells(quantity: Quantity) -> list[str]:
    if quantity.value is None:
        return ["not identified", "no upper limit" if quantity.high is None else f"at most {number(quantity.high)}"]
    return [number(quantity.value), interval_text(quantity.low, quantity.high)]

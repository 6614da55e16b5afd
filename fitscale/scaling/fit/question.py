"""What is asked of a runs table, and the command-line options that ask it."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import ModelConfig
from fitscale.scaling.fit.fitting import ResidualLoss
from fitscale.scaling.fit.laws import LAWS, Law
from fitscale.scaling.rows.fitted_points import POINTS
from fitscale.scaling.rows.selection import Selection, select

MOST = 1e12  # of an option that counts something
RESAMPLING = ("auto", "parametric", "runs")  # how runs are drawn anew
LEVELS = (0.6, 0.999)  # of an interval
AUTO = "auto"  # the laws that survive


@dataclass(frozen=True)
class Question:
    """Every choice that changes the answer."""

    metric: str = "fd"
    laws: tuple[str, ...] = (AUTO,)
    points: str = "frontier"
    hold_out: tuple[str, ...] = ("largest",)  # sizes, or `largest`
    where: dict[str, str] = field(default_factory=dict)
    from_step: int = 0
    drop_missing: bool = False
    extrapolate: bool = False  # agree to predictions far beyond the fitted compute
    loss: ResidualLoss = field(default_factory=ResidualLoss)
    floor: float | None = None  # of the laws that have one, held at this value
    optimum: str = "parameters"  # of isoflop: what is best at a budget, parameters or tokens
    resamples: int = 4000
    resampling: str = "auto"  # of RESAMPLING
    level: float = 0.9  # of every interval
    seed: int = 0

    def select(self, table: pd.DataFrame) -> Selection:
        """The rows of a validated table that are asked about."""
        return select(table, self.metric, self.where, self.from_step, self.drop_missing)

    def law(self, name: str) -> Law:
        """The law of that name, with its floor held where one is given."""
        law = LAWS[name]
        return law.with_floor(self.floor) if law.floor and self.floor is not None else law


def add_runs_option(parser: argparse.ArgumentParser) -> None:
    """RUNS, for `load_table`."""
    runs = "run directories, folders of them, or one .csv or .parquet table"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help=runs)


def add_filter_options(parser: argparse.ArgumentParser) -> None:
    """--metric, --where, --from-step and --drop-missing, for `select`."""
    add = parser.add_argument
    add("--metric", default="fd", help="metric (default: fd)")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep only such rows; may be repeated")
    add("--from-step", type=int, default=0, help="leave out evaluations before this step (warm-up)")
    add("--drop-missing", action="store_true", help="leave out rows without a value instead of refusing")


def add_law_options(parser: argparse.ArgumentParser, laws: Iterable[str] = (AUTO, *LAWS)) -> None:
    """RUNS, --law, --points, and the options of `add_filter_options`."""
    add_runs_option(parser)
    text = "laws (default: auto, those that survive at sizes left out)"
    parser.add_argument("--law", dest="laws", nargs="+", choices=laws, default=[AUTO], help=text)
    parser.add_argument("--points", choices=POINTS, default="frontier", help="rows that laws of compute speak of")
    add_filter_options(parser)


def add_floor_option(parser: argparse.ArgumentParser) -> None:
    """--floor."""
    held = "hold the floor E of the laws that have one at this value instead of fitting it"
    parser.add_argument("--floor", type=float, metavar="E", help=held)


def add_draw_options(parser: argparse.ArgumentParser) -> None:
    """--extrapolate, --level, --resampling and --seed."""
    far = "agree to predictions at more than 10 times the fitted compute"
    parser.add_argument("--extrapolate", action="store_true", help=far)
    parser.add_argument("--level", type=float, default=0.9, help="of the intervals (default: 0.9)")
    how = "parametric, or the runs themselves drawn with replacement (default: auto, runs where there are 30 of them)"
    parser.add_argument("--resampling", choices=RESAMPLING, default="auto", help=how)
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")


def question(options: argparse.Namespace, **more: Any) -> Question:
    """The question that `options` ask, each by the name of a field; `more` overrules them.

    Raises:
        UserError: a text of --where has no `=`.
    """
    require_within(options, from_step=0)
    if "level" in options:
        require_within(options, level=LEVELS)
    asked = {each.name: getattr(options, each.name) for each in fields(Question) if each.name in options} | more
    for text in options.where:
        if "=" not in text:
            raise UserError(f"--where {text}: give COLUMN=VALUE")
    where = dict(text.split("=", 1) for text in options.where)
    answer = Question(**asked | {"laws": tuple(dict.fromkeys(asked["laws"])), "where": where})
    if answer.floor is not None:
        if not 0 <= answer.floor < MOST:
            raise UserError(f"--floor: {answer.floor:g} must be a number from 0 on, in the metric's unit")
        if not any(LAWS[name].floor for name in answer.laws if name in LAWS):
            raise UserError("--floor: no law of --law has a floor; choose offset, additive, tied or separable")
    return answer


def require_within(options: argparse.Namespace, **limits: float | tuple[float, float]) -> None:
    """Check options by name, those that are None aside: the least value, or that and the most (else `MOST`).

    Raises:
        UserError: one is outside.
    """
    for name, limit in limits.items():
        least, most = limit if isinstance(limit, tuple) else (limit, MOST)
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}: {value} is outside [{least:g}, {most:g}]")


def model_named(name: str, folder: Path) -> ModelConfig:
    """The model of `folder`/NAME.yaml.

    Raises:
        UserError: there is none; the text names those that there are.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        valid = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UserError(f"size {name}: not one of {valid}")
    return load_config([str(path)]).model

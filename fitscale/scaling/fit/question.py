"""What is asked of a runs table, and the command-line options that ask it."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd

from fitscale.scaling.fit.fitting import ResidualLoss
from fitscale.scaling.fit.laws import LAWS
from fitscale.scaling.rows.fitted_points import POINTS
from fitscale.scaling.rows.options import add_filter_options, add_runs_option, conditions
from fitscale.scaling.rows.selection import Selection, select


@dataclass(frozen=True)
class Question:
    """Every choice that changes the answer."""

    metric: str = "fd"
    laws: tuple[str, ...] = ("offset",)
    points: str = "frontier"
    hold_out: tuple[str, ...] = ("largest",)  # sizes, or `largest`
    where: dict[str, str] = field(default_factory=dict)
    from_step: int = 0
    drop_missing: bool = False
    extrapolate: bool = False  # agree to predictions far beyond the fitted compute
    loss: ResidualLoss = field(default_factory=ResidualLoss)
    resamples: int = 4000
    seed: int = 0

    def select(self, table: pd.DataFrame) -> Selection:
        """The rows of a validated table that are asked about."""
        return select(table, self.metric, self.where, self.from_step, self.drop_missing)


def add_law_options(parser: argparse.ArgumentParser, laws: Iterable[str] = LAWS) -> None:
    """RUNS, --law, --points, and the options of `add_filter_options`."""
    add_runs_option(parser)
    default = ["offset", "power"]
    parser.add_argument(
        "--law", dest="laws", nargs="+", choices=laws, default=default, help="laws (default: offset power)"
    )
    parser.add_argument("--points", choices=POINTS, default="frontier", help="rows that laws of compute speak of")
    add_filter_options(parser)


def add_draw_options(parser: argparse.ArgumentParser) -> None:
    """--extrapolate and --seed."""
    far = "agree to predictions at more than 10 times the fitted compute"
    parser.add_argument("--extrapolate", action="store_true", help=far)
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")


def question(options: argparse.Namespace, **more: Any) -> Question:
    """The question that `options` ask, each by the name of a field; `more` overrules them.

    Raises:
        UserError: a text of --where has no `=`.
    """
    asked = {each.name: getattr(options, each.name) for each in fields(Question) if each.name in options} | more
    return Question(**asked | {"laws": tuple(dict.fromkeys(asked["laws"])), "where": conditions(options.where)})

"""What the tools of the analysis share: options that choose rows, and how mistakes in options are told."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from fitscale.config.checks import at_least
from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import ModelConfig


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


def conditions(texts: Iterable[str]) -> dict[str, str]:
    """Column: value, from texts `COLUMN=VALUE`.

    Raises:
        UserError: a text has no `=`.
    """
    pairs = [text.partition("=") for text in texts]
    for column, sign, _ in pairs:
        if not sign:
            raise UserError(f"--where {column}: give COLUMN=VALUE")
    return {column: value for column, _, value in pairs}


def require_at_least(options: argparse.Namespace, **least: float) -> None:
    """Check options by name, those that are None aside.

    Raises:
        UserError: one is less than its least value.
    """
    for name, value in least.items():
        if getattr(options, name) is not None:
            at_least(f"--{name.replace('_', '-')}", getattr(options, name), value)


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

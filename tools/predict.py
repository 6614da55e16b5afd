"""Predict a size and length of training that nobody has run.

    python tools/predict.py runs.csv --size xxl --steps 400000 --law offset power --extrapolate
    python tools/predict.py demo/runs.csv --size configs/demo/digits.yaml configs/demo/l.yaml --steps 4000
    python tools/predict.py runs.csv --flops 1e21 --law additive            at the law's best N and D
    python tools/predict.py runs.csv --parameters 7e9 --data 2e12 --law additive

--size is a name in configs/model, or the YAML files of a config; --data is in the table's unit, images or tokens. Two
of --parameters, --data and --flops settle the third by what an image costs in the table; one of them is completed along
a law's compute-optimal frontier. Exit code: 0 predicted, 2 refused.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.program import exit_code, loading

if TYPE_CHECKING:
    import pandas as pd

    from fitscale.config.schema import ModelConfig
    from fitscale.scaling.fit.prediction import Target

LIMITS = (1.0, 1e30)  # of parameters, data and FLOPs
MODELS = Path(__file__).parents[1] / "configs" / "model"


def main(arguments: list[str] | None = None) -> int:
    with loading("pandas and scipy", "scipy.stats"):
        parser = _parser()
    return exit_code(lambda: run(parser.parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Print every law's prediction, cautions first; write them as JSON if asked."""
    import json

    from fitscale.config.errors import writing
    from fitscale.config.files import write_atomic
    from fitscale.scaling.fit.prediction import describe, predict
    from fitscale.scaling.fit.question import question, require_within
    from fitscale.scaling.rows.runs import load_table

    require_within(options, steps=1, batch=1, tokens=1, seed=0)
    require_within(options, parameters=LIMITS, data=LIMITS, flops=LIMITS)
    table, asked = load_table(options.runs), question(options)
    goal = _target(options, asked.select(table).rows)
    predictions, study = predict(table, asked, goal)
    for note in [*study.refusals, *study.cautions]:
        print(f"{note.code}: {note.message}", file=sys.stderr)
    known = (("parameters", goal.parameters), ("images", goal.images), ("training FLOPs", goal.train_flops))
    print(f"{goal.size}: {', '.join(f'{number:.4g} {name}' for name, number in known if number is not None)}")
    print("\n".join(describe(prediction, options.metric) for prediction in predictions))
    if len(predictions) > 1:
        medians = [prediction.median for prediction in predictions]
        print(f"the choice of law alone moves {options.metric} from {min(medians):.4g} to {max(medians):.4g}")
    if options.output:
        record = {"target": asdict(goal), "predictions": [asdict(prediction) for prediction in predictions]}
        with writing(options.output):
            write_atomic(options.output, json.dumps(record, indent=2) + "\n")
    return 0


def _target(options: argparse.Namespace, rows: "pd.DataFrame") -> "Target":
    """The run that is asked about; what is not said of it is as in `rows`, the runs that it is predicted from."""
    from fitscale.config.errors import UserError
    from fitscale.scaling.fit.prediction import batch_of, numbers_target, refuse_other_unit, target, tokens_of

    numbers = {"parameters": options.parameters, "images": options.data, "train_flops": options.flops}
    if options.size is None:
        if given := [name for name in ("steps", "batch", "tokens") if getattr(options, name) is not None]:
            raise UserError(f"--{given[0]}: belongs to a --size")
        return numbers_target(rows, **numbers)
    if options.steps is None or any(number is not None for number in numbers.values()):
        raise UserError("--size: give --steps with it, and none of --parameters, --data and --flops")
    batch = batch_of(rows) if options.batch is None else options.batch
    model = _model(options.size)
    tokens = tokens_of(rows) if options.tokens is None else (options.tokens, options.tokens**2)
    refuse_other_unit(rows, model, tokens[0])
    return target(model, options.steps, batch, *tokens)


def _model(size: list[str]) -> "ModelConfig":
    from fitscale.config.load import load_config
    from fitscale.scaling.fit.question import model_named

    if len(size) == 1 and not size[0].endswith((".yaml", ".yml")):
        return model_named(size[0], MODELS)
    return load_config(size).model


def _parser() -> argparse.ArgumentParser:
    from fitscale.scaling.fit.question import add_draw_options, add_floor_option, add_law_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_law_options(parser)
    add_floor_option(parser)
    add_draw_options(parser)
    add = parser.add_argument
    add("--size", nargs="+", metavar="SIZE", help="a name in configs/model, or YAML files and overrides")
    add("--steps", type=int, help="optimizer steps, with --size")
    add("--parameters", type=float, metavar="N", help="instead of --size: parameters")
    add("--data", type=float, metavar="D", help="instead of --size: images (or tokens) trained on")
    add("--flops", type=float, metavar="C", help="instead of --size: training FLOPs")
    add("--batch", type=int, help="images per step (default: that of the runs)")
    add("--tokens", type=float, help="tokens per image, all alike (default: those of the runs)")
    add("-o", "--output", type=Path, help="JSON file for the predictions")
    return parser


if __name__ == "__main__":
    sys.exit(main())

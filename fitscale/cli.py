"""The `fitscale` program: config, describe, data, train, plan, sample, evaluate, tune, check, doctor.

Only argparse and the arguments are imported before a command is known, so that `--help` answers at once; torch and
everything above it are imported by the command that needs them, which says so first.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fitscale.config.errors import UserError
from fitscale.config.program import USER_ERROR, exit_code, leave, loading
from fitscale.eval.arguments import add_data_arguments, add_evaluate_arguments, add_sample_arguments, add_tune_arguments

Command = Callable[[argparse.Namespace], int | None]
Arguments = Callable[[argparse.ArgumentParser], None]


def program() -> NoReturn:
    """The process `fitscale`."""
    leave(main)


def main(argv: list[str] | None = None) -> int:
    """Run the program with `argv` (the process's own by default) and return its exit code."""
    arguments = build_parser().parse_args(argv)
    return exit_code(lambda: arguments.command(arguments))


class _Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line that a terminal can show, as a UserError is told."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if any("\0" in word for word in args or []):
            self.error("an argument holds a null character")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(str(UserError(message)))


class _Version(argparse.Action):
    """As argparse's own, but the package's metadata is read only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"fitscale {version('fitscale')}")
        except PackageNotFoundError:
            parser.exit(USER_ERROR, "error: fitscale is not installed, so it has no version: pip install -e .\n")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The program's commands with their arguments; `command` of the parsed arguments runs the one that was named."""
    parser = _Parser(
        prog="fitscale",
        description="Train diffusion transformers at any size, sample them at any resolution, measure them.",
        epilog="example: fitscale train configs/model/b.yaml configs/recipe/fitv2_256.yaml run.dir=runs/b",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print fitscale's version")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(command: Command, arguments: Arguments, summary: str, example: str) -> None:
        name = command.__name__.removeprefix("_")
        epilog = f"example: fitscale {name} {example}"
        own = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
        own.set_defaults(command=command)
        arguments(own)

    add(_config, _add_config, "print a resolved config as YAML", "configs/model/b.yaml optim.lr=2e-4")
    example = "configs/model/xl.yaml --height 512 --width 512"
    add(_describe, _add_describe_arguments, "a model's parameters and MACs, part by part", example)
    add(_data, add_data_arguments, "show what is in a shard set", "data/in1k_256 --verify")
    example = "configs/demo/digits.yaml configs/demo/s.yaml data.shards=demo/shards run.dir=runs/digits"
    add(_train, _add_config, "train a model, or go on with its newest checkpoint", example)
    example = "configs/model/xxl.yaml configs/recipe/fitv2_256.yaml --gpus 8 --gpu h100"
    add(_plan, _add_plan_arguments, "memory, communication and time of a run before it is started", example)
    add(
        _sample,
        add_sample_arguments,
        "draw images from a run, or from exported weights",
        "runs/b --height 256 --width 256 --count 16",
    )
    add(_evaluate, add_evaluate_arguments, "measure a run's checkpoints", "runs/b")
    add(_tune, add_tune_arguments, "find the best sampling for a checkpoint", "runs/b --over guidance.scale=1:4")
    add(_check, _add_run, "verify that everything in a run directory is as it was written", "runs/b")
    example = "--cluster configs/cluster/h100.yaml configs/model/b.yaml data.shards=data/in1k_256 run.dir=runs/b"
    add(_doctor, _add_doctor_arguments, "check that everything is here that a run needs", example)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")


def _add_config(parser: argparse.ArgumentParser) -> None:
    help = "YAML files, merged left to right, and dotted key=value overrides, which win over the files"
    parser.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=help)


def _add_describe_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    for side in ("--height", "--width"):
        parser.add_argument(side, type=int, default=256, metavar="PIXELS", help="of the image (default: 256)")


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add = parser.add_argument
    add("--gpus", type=int, help="search the layouts of so many GPUs; parallel.KEY=VALUE stays as given")
    add("--gpu", default="h100", help="kind of device: h100, h200, a100, b200, mi300x, cpu (default: h100)")
    help = "share of the peak reached while computing (default: a roofline, printed beside 0.4)"
    add("--mfu", type=float, help=help)
    add("--measured", type=Path, metavar="RUN", help="take that share from the speed of a run directory")
    add("--gpus-per-node", type=int, default=8, help="default: 8")
    add("--best", type=int, default=5, help="layouts to list (default: 5)")
    add("--target-steps", type=int, help="steps to plan for (default: run.steps)")


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="PROFILE", help="cluster profile (configs/cluster/) whose jobs it checks")
    help = "YAML files and overrides, as `fitscale train` takes them; none = the machine alone"
    parser.add_argument("config", nargs="*", metavar="CONFIG|KEY=VALUE", help=help)


def _config(arguments: argparse.Namespace) -> None:
    from fitscale.config.load import to_yaml
    from fitscale.data.encoding import load_run

    sys.stdout.write(to_yaml(load_run(arguments.config)))


def _describe(arguments: argparse.Namespace) -> None:
    from fitscale.plan.describe import run_describe

    run_describe(arguments)


def _data(arguments: argparse.Namespace) -> None:
    from fitscale.prepare.shard_report import run_data

    run_data(arguments)


def _train(arguments: argparse.Namespace) -> None:
    from fitscale.data.encoding import load_run

    config = load_run(arguments.config)
    with loading("torch, megatron-core and DeepSpeed"):
        from fitscale.train.trainer import train

    train(config)


def _plan(arguments: argparse.Namespace) -> None:
    from fitscale.plan.report import run_plan

    run_plan(arguments)


def _require_run(arguments: argparse.Namespace) -> None:
    """Raises UserError where there is no run directory: before what takes seconds to load."""
    from fitscale.run.layout import run_at

    run_at(arguments.run)


def _sample(arguments: argparse.Namespace) -> None:
    if not arguments.run.is_file():
        _require_run(arguments)
    with loading("torch and megatron-core"):
        from fitscale.eval.commands import run_sample

    run_sample(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    _require_run(arguments)
    with loading("torch and megatron-core"):
        from fitscale.eval.commands import run_evaluate

    run_evaluate(arguments)


def _tune(arguments: argparse.Namespace) -> None:
    _require_run(arguments)
    with loading("torch and megatron-core"):
        from fitscale.eval.tune import run_tune

    run_tune(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from fitscale.run.check import run_check

    return run_check(arguments.run)


def _doctor(arguments: argparse.Namespace) -> int:
    from fitscale.doctor import run_doctor

    return run_doctor(arguments)

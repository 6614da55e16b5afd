"""Plan a sweep under a budget: which sizes, how long, and how well they will predict the target.

    python tools/plan_sweep.py --gpu-hours 5000 --gpu h100 --mfu 0.4 --sizes s,b,l,xl --target xxl -o sweep.yaml
    python tools/plan_sweep.py --gpu-hours 900 --gpu a100 --mfu 0.35 --sizes s,b,l --prior runs.csv --metric fid
    python tools/plan_sweep.py --gpu-hours 300 --shards shards/in256 --features net.pt --reference in256.npz -o s.yaml

The YAML that -o writes is what slurm/sweep.py runs, with --shards, --features and --reference; what is not given has to
be added there. Without --prior the law and noise of published results are assumed.
Exit code: 0 planned, 2 refused.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.errors import UserError
from fitscale.config.program import exit_code, loading

if TYPE_CHECKING:
    from fitscale.scaling.fit.planner import Economics, Outlook, Prior, SweepPlan

MODELS = Path(__file__).parents[1] / "configs" / "model"
RECIPE = "configs/recipe/fitv2_256.yaml"


def main(arguments: list[str] | None = None) -> int:
    with loading("pandas and scipy", "scipy.stats"):
        parser = _parser()
    return exit_code(lambda: run(parser.parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Print the plan; write the sweep's YAML if asked."""
    from fitscale.config.errors import writing
    from fitscale.config.files import write_atomic
    from fitscale.model import flops
    from fitscale.scaling.fit.planner import plan
    from fitscale.scaling.fit.question import model_named, require_within

    counts = dict.fromkeys(("first_step", "most_steps", "target_steps", "tokens", "batch", "nfe"), 1)
    require_within(options, **counts, points=(1, 1000), samples=2, gpu_hours=0, seed=0)
    economics = _economics(options)
    names = options.sizes.split(",")
    if len(set(names)) < len(names):
        raise UserError(f"--sizes {options.sizes}: a size is named twice; the planner itself repeats one")
    models = sorted((model_named(name, MODELS) for name in names), key=flops.parameters)
    goal = economics.train_flops(model_named(options.target, MODELS), options.target_steps)
    answer = plan(models, options.gpu_hours, economics, _prior(options), goal, options.seed)
    print("\n".join(_lines(answer, economics, options)))
    if options.output:
        with writing(options.output):
            write_atomic(options.output, _sweep_yaml(answer, options))
        if missing := _missing(options):
            print(f"add to base before it runs: {', '.join(missing)} (or give {', '.join(missing.values())})")
        print(f"wrote {options.output}: python slurm/sweep.py {options.output} --dry-run")
    return 0


def _lines(answer: "SweepPlan", economics: "Economics", options: argparse.Namespace) -> list[str]:
    from fitscale.model import flops

    lines = [f"{'cell':<14}{'parameters':>14}{'steps':>11}{'training FLOPs':>16}{'GPU-hours':>11}  evaluated at steps"]
    for cell in answer.cells:
        train = economics.train_flops(cell.model, cell.steps)
        evaluated = " ".join(str(step) for step in economics.steps_evaluated(cell.steps))
        lines.append(
            f"{cell.name:<14}{flops.parameters(cell.model):>14,}{cell.steps:>11,}{train:>16.3g}"
            f"{cell.hours(economics):>11.1f}  {evaluated}"
        )
    lines.append(f"{'together':<14}{'':>41}{answer.hours:>11.1f}  of {options.gpu_hours:g}")
    target = f"{options.target} at {options.target_steps:,} steps"
    lines.append(f"steps go as parameters^-{answer.gamma:g}; hold out {answer.held_out}")
    lines.append(f"expected 90 % interval, measured / predicted: {_interval(answer.outlook)} for {target}")
    lines.append(f"{'':<44}: {_interval(answer.held_out_outlook)} for {answer.held_out} from the other cells")
    lines.append("what a change does to the target's interval:")
    for what, hours, outlook in answer.changes:
        wider = outlook.width / answer.outlook.width - 1
        lines.append(f"  {what:<26}{hours:>+10.1f} GPU-hours  {_interval(outlook)}  width {wider:+.0%}")
    return lines


def _interval(outlook: "Outlook") -> str:
    return f"{outlook.low - 1:+.1%} to {outlook.high - 1:+.1%}"


def _sweep_yaml(answer: "SweepPlan", options: argparse.Namespace) -> str:
    from fitscale.config.load import to_yaml
    from fitscale.jobs.sweep import SweepConfig

    cells = {
        cell.name: [
            f"configs/model/{cell.model.name}.yaml",
            f"run.steps={cell.steps}",
            f"run.seed={cell.seed}",
            f"evaluation.points={options.points}",
            f"evaluation.first_step={min(options.first_step, cell.steps // 2)}",
        ]
        for cell in answer.cells
    }
    base = [RECIPE, f"batch.global_batch_size={options.batch}", f"evaluation.samples={options.samples}"]
    base += [f"{key}={given}" for key, (_, given) in _files(options).items() if given is not None]
    sweep = SweepConfig(name=options.name, dir=f"runs/{options.name}", base=base, cells=cells)
    header = f"# Planned for {options.gpu_hours:g} {options.gpu} hours; expected to take {answer.hours:.0f}.\n"
    missing = _missing(options)
    header += f"# Add to base: {', '.join(missing)}.\n" if missing else ""
    return header + to_yaml(sweep)


def _files(options: argparse.Namespace) -> dict[str, tuple[str, str | None]]:
    """Key of a config: option, and what was given. Without them a cell has no data, or measures no distance."""
    return {
        "data.shards": ("--shards", options.shards),
        "evaluation.features": ("--features", options.features),
        "evaluation.reference": ("--reference", options.reference),
    }


def _missing(options: argparse.Namespace) -> dict[str, str]:
    """Key of a config that the sweep still lacks: the option for it."""
    return {key: option for key, (option, given) in _files(options).items() if given is None}


def _economics(options: argparse.Namespace) -> "Economics":
    from fitscale.plan.devices import DEVICES
    from fitscale.scaling.fit.planner import Economics

    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: a utilisation lies above 0 and at most at 1")
    return Economics(
        flops_per_hour=DEVICES[options.gpu].peak_flops_per_s * options.mfu * 3600,
        batch=options.batch,
        tokens=options.tokens,
        points=options.points,
        first_step=options.first_step,
        most_steps=options.most_steps,
        samples=options.samples,
        evaluations_per_sample=options.nfe,
    )


def _prior(options: argparse.Namespace) -> "Prior":
    from fitscale.scaling.fit.planner import Prior, assumed
    from fitscale.scaling.fit.question import question
    from fitscale.scaling.fit.study import study
    from fitscale.scaling.rows.runs import load_table

    if not options.prior:
        if options.where or options.from_step or options.drop_missing:
            raise UserError("--where, --from-step and --drop-missing go with --prior")
        return assumed()
    asked = question(options, laws=("offset",), points="frontier", hold_out=())
    answer = study(load_table(options.prior), asked)
    if not answer.results:
        raise answer.refusals[0]
    fit = answer.results[0].fit
    return Prior(fit, fit.noise.run**0.5, fit.noise.point**0.5)


def _parser() -> argparse.ArgumentParser:
    from fitscale.plan.devices import DEVICES
    from fitscale.scaling.fit.question import add_filter_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpu-hours", type=float, required=True, help="the budget; training and evaluation stay within it")
    add("--gpu", choices=sorted(DEVICES), default="h100")
    add("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default: 0.4)")
    add("--sizes", default="s,b,l,xl", help="names in configs/model, with commas")
    add("--target", default="xxl", help="size to predict (default: xxl)")
    add("--target-steps", type=int, default=400_000)
    add("--batch", type=int, default=256, help="images per step")
    add("--tokens", type=int, default=256, help="tokens per image")
    add("--points", type=int, default=6, help="evaluations of a run, log-spaced")
    add("--first-step", type=int, default=50_000, help="first evaluation; earlier is warm-up")
    add("--most-steps", type=int, default=2_000_000, help="longest run (default: 2,000,000, the longest published)")
    add("--samples", type=int, default=50_000, help="images per Frechet distance")
    add("--nfe", type=int, default=100, help="network evaluations per sample")
    add("--prior", nargs="+", type=Path, metavar="RUNS", help="runs or a table whose law and noise to assume")
    add_filter_options(parser)
    add("--shards", help="shards of every cell, for the YAML")
    add("--features", metavar="NET", help="feature network (TorchScript) of the Frechet distance, for the YAML")
    add("--reference", help="its reference: image folder, shards or .npz, for the YAML")
    add("--name", default="planned", help="name of the sweep")
    add("--seed", type=int, default=0, help="seed of the simulation")
    add("-o", "--output", type=Path, help="sweep YAML to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())

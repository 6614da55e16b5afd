"""`fitscale plan`: the arguments' meaning, and plans as text for a person (no torch).

Without `--gpus` one replica of the config's own layout is planned. With it, the keys of `parallel` that the command
line does not give are searched: a table of the fastest layouts that fit, what did not fit, and the fastest in detail.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache

from fitscale.config.checks import at_least
from fitscale.config.errors import UserError
from fitscale.config.files import read_json, read_jsonl, require_kinds
from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.data.encoding import load_run
from fitscale.data.index import OpenIndex, open_index
from fitscale.model import flops
from fitscale.plan.devices import device_reported_as, find_device
from fitscale.plan.evaluation import plan_evaluation
from fitscale.plan.layout import GIB, Machine, in_words, layouts
from fitscale.plan.memory import Moment, rank_parameters
from fitscale.plan.roofline import attainable
from fitscale.plan.step import Images, RunPlan, measured_utilisation, plan, simplest, typical_images
from fitscale.run.layout import THROUGHPUT, RunDir

GUESS = 0.4  # of the peak
_PARTS = {"optimizer": "fp32 weights, moments", "ema": "EMA", "buffers": "buffers, temporaries"}


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the plan that the command line asks for."""
    opened = cache(open_index)
    config = load_run(arguments.config, opened)
    for key in ("gpus", "gpus_per_node", "best", "target_steps"):
        if getattr(arguments, key) is not None:
            at_least(f"--{key.replace('_', '-')}", getattr(arguments, key), 1)
    if arguments.mfu is not None and not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu: {arguments.mfu} is not a utilisation; valid: above 0, at most 1")
    if arguments.target_steps is not None:
        config = replace(config, run=replace(config.run, steps=arguments.target_steps))
    gpus = arguments.gpus or config.parallel.tensor_parallel_size
    machine = Machine(find_device(arguments.gpu), gpus, arguments.gpus_per_node)
    images = typical_images(config, opened)
    utilisation, source = _utilisation(arguments, config, machine, images, opened)
    given = {one.split("=")[0].removeprefix("parallel.") for one in arguments.config if one.startswith("parallel.")}
    wanted = (layouts(config, machine, given) if arguments.gpus else []) or [config]  # which says what is wrong with it
    plans = [plan(one, machine, images, utilisation) for one in wanted]
    plans.sort(key=lambda one: (one.step_s, one.memory.peak))
    print("\n".join(_report(plans, arguments.best, source)))


def _utilisation(
    arguments: argparse.Namespace, config: Config, machine: Machine, images: Images, opened: OpenIndex
) -> tuple[float, str]:
    """The share of the peak to reckon with, and where it comes from."""
    if arguments.measured is not None:
        return _measured(arguments, opened), f"measured in {arguments.measured}"
    if arguments.mfu is not None:
        return arguments.mfu, "given by --mfu"
    share = attainable(config, machine.device, round(images.tokens_B.mean()))
    busy_s = plan(config, machine, images, GUESS).busy_s
    return share, f"a roofline; {busy_s:.3f} at a guessed {GUESS:.0%}"


def _measured(arguments: argparse.Namespace, opened: OpenIndex) -> float:
    run = RunDir(arguments.measured)
    rows = [row for row in read_jsonl(run.throughput, **THROUGHPUT) if row["step_s"] is not None]
    rows = rows[1:]  # the first warms up
    if not rows or not run.environment.exists():
        raise UserError(f"--measured: {run.path} holds no throughput.jsonl of two rows and environment.json")
    there = read_json(run.environment)
    require_kinds(there, run.environment, device=str, world_size=int)
    at_least(f"{run.environment}: world_size", there["world_size"], 1)
    device = device_reported_as(there["device"])
    if device is None:
        raise UserError(f"--measured: {run.path} ran on {there['device']!r}, whose peak is not known")
    config, machine = load_config([str(run.config)]), Machine(device, there["world_size"], arguments.gpus_per_node)
    steps_s = statistics.median(row["step_s"] - row["data_wait_s"] for row in rows)
    return measured_utilisation(steps_s, config, machine, typical_images(config, opened))


def _report(plans: list[RunPlan], best: int, source: str) -> Iterator[str]:
    if len(plans) == 1:
        yield from detail(plans[0], source)
        return
    machine, fitting = plans[0].machine, [one for one in plans if one.spare_bytes >= 0]
    yield f"{len(fitting)} of {len(plans)} layouts fit on {machine}; the fastest:"
    yield from _table(fitting[:best])
    over = sorted((one for one in plans if one.spare_bytes < 0), key=lambda one: -one.spare_bytes)
    if over:
        yield f"do not fit in {machine.room_bytes / GIB:.1f} GiB, nearest first:"
        yield from _table(over[:best])
    if fitting:
        yield "\nthe simplest of those that are as good as the fastest:"
        yield from detail(simplest(fitting), source)


def _table(plans: list[RunPlan]) -> Iterator[str]:
    """One line a layout."""
    yield (
        f"  {'dp':>4} {'tp':>3} {'sp':>3} {'ZeRO':>4} {'recompute':>9} {'GiB/GPU':>8} {'':<11} {'packs':>5}"
        f" {'s/step':>8} {'images/s':>9} {'MFU':>6} {'days':>7} {'GPU-hours':>10}"
    )
    for one in plans:
        parallel = one.config.parallel
        over = f"over by {-one.spare_bytes / GIB:.1f}" if one.spare_bytes < 0 else ""
        yield (
            f"  {one.dp_size:>4} {parallel.tensor_parallel_size:>3} {'yes' if parallel.sequence_parallel else 'no':>3}"
            f" {parallel.zero_stage:>4} {_recompute(one.config):>9} {one.memory.peak / GIB:>8.1f} {over:<11}"
            f" {one.packing.stats.packs_per_rank:>5} {one.step_s:>8.3f} {one.images_per_s:>9.0f} {one.mfu:>6.1%}"
            f" {one.days:>7.1f} {one.gpu_hours:>10,.0f}"
        )


def detail(one: RunPlan, source: str, on: Machine | None = None) -> Iterator[str]:
    """Everything about one layout.

    Args:
        source: where its utilisation comes from.
        on: the devices of an evaluation; None = as many as have one model between them.
    """
    facts = [*_layout(one).items(), *_memory(one), *_speed(one, source).items(), *_evaluations(one, on)]
    return (f"{name:<15}{text}" for name, text in facts)


def _layout(one: RunPlan) -> dict[str, str]:
    config, model, stats, tokens_B = one.config, one.config.model, one.packing.stats, one.images.tokens_B
    local = f", {rank_parameters(config).all:,} on a rank" if config.parallel.tensor_parallel_size > 1 else ""
    return {
        "model": f"{model.name} ({model.family}), {flops.parameters(model):,} parameters{local}",
        "layout": f"{in_words(config.parallel, one.dp_size)}, {config.parallel.precision}, "
        f"blocks recomputed: {_recompute(config)}, {one.machine}",
        "step": f"{len(tokens_B)} images, {int(tokens_B.sum()):,} tokens "
        f"({tokens_B.mean():.1f} each, {one.images.source})",
        "packs": f"{stats.packs_per_rank} a rank, the longest {one.longest_pack:,} tokens; "
        f"padding {stats.padding_share:.1%}, most loaded rank {stats.imbalance:.1%} above the mean",
    }


def _memory(one: RunPlan) -> Iterator[tuple[str, str]]:
    moments, spare = (one.memory.backward, one.memory.step), one.spare_bytes / GIB
    yield "memory", f"{'GiB per GPU':<24}{'backward':>10}{'step':>10}"
    for key in (*(part.name for part in fields(Moment)), "total"):
        yield "", f"{_PARTS.get(key, key):<24}" + "".join(f"{getattr(moment, key) / GIB:>10.2f}" for moment in moments)
    fits = f"fits, {spare:.1f} GiB to spare" if spare >= 0 else f"does not fit, over by {-spare:.1f} GiB"
    yield "", f"of {one.machine.room_bytes / GIB:.1f}: {fits}"
    if one.memory.host:
        yield "", f"{one.memory.host / GIB:.2f} GiB of host memory a GPU; its optimizer's time is not planned"


def _speed(one: RunPlan, source: str) -> dict[str, str]:
    traffic, steps, tokens_B = one.traffic, one.config.run.steps, one.images.tokens_B
    copied = f" ({traffic.copied_weights / 1e9:.2f} from hpZ's copies)" if traffic.copied_weights else ""
    return {
        "sent per step": f"{traffic.total / 1e9:.2f} GB a GPU: gradients {traffic.gradients / 1e9:.2f}, weights "
        f"{traffic.weights / 1e9:.2f}{copied}, tensor parallel {traffic.tensor_parallel / 1e9:.2f}",
        "FLOPs": f"{one.train_flops:.4g} a step (true FLOPs, 2 a MAC; attention included, recomputation not)",
        "time": f"{one.step_s:.3f} s a step: {one.busy_s:.3f} computing at {one.utilisation:.1%} of the peak "
        f"({source}),",
        "": f"{one.launch_s:.3f} launching kernels, {one.exposed_s:.3f} communication that computing does not hide",
        "speed": f"{one.images_per_s:,.0f} images/s, {one.images_per_s * tokens_B.mean():,.0f} tokens/s, "
        f"model FLOP utilisation {one.mfu:.1%}",
        "target": f"{steps:,} steps, {steps * len(tokens_B):,} images: {one.days:.1f} days, "
        f"{one.gpu_hours:,.0f} GPU-hours",
    }


def _evaluations(one: RunPlan, on: Machine | None) -> Iterator[tuple[str, str]]:
    config, tp = one.config, one.config.evaluation.tensor_parallel_size
    planned = plan_evaluation(config, on or replace(one.machine, gpus=tp), one.images, one.utilisation)
    steps = config.evaluation.steps(config.run.steps)
    if steps and planned.seconds:
        yield "evaluation", str(planned)
        hours = f"{planned.seconds / 3600:.3g} hours each on {planned.machine}, without reading the reference"
        yield "", f"{len(steps)} of them: {hours}; {len(steps) * planned.gpu_hours:,.3g} GPU-hours together"


def _recompute(config: Config) -> str:
    every = config.parallel.activation_checkpoint_every
    return {0: "none", 1: "all"}.get(every, f"1 in {every}")

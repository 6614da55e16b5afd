"""Before the first step: what machine is this, and what is about to happen?"""

import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from fitscale.config.schema import Config, ParallelConfig
from fitscale.data.batch_plan import BatchPlan, token_shares
from fitscale.model import flops
from fitscale.model.common.compiler import is_compiled, lacks_for_compiling, use_compiler
from fitscale.parallel.groups import Topology
from fitscale.plan.layout import in_words
from fitscale.plan.memory import rank_memory

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "webdataset")


def environment(topology: Topology) -> dict[str, Any]:
    """Versions, code revision, machine and layout of this start."""
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_revision": _git_revision(),
        "device": _device_name(topology.device),
        "threads": torch.get_num_threads(),
        "world_size": topology.world_size,
        "dp_size": topology.dp_size,
        "tp_size": topology.tp_size,
        "compiled": is_compiled(),
    }


def choose_compiler(parallel: ParallelConfig, topology: Topology) -> None:
    """Compile the network's formulas, or not, as `parallel.compile` says (on or off), on all ranks alike; a collective.

    Where any of them lacks what that takes, none does, and rank 0 says so.
    """
    lacking: list[str | None] = [None] * topology.world_size
    if parallel.compile == "on":
        dist.all_gather_object(lacking, lacks_for_compiling(topology.device))
    missing = next(filter(None, lacking), None)
    use_compiler(parallel.compile == "on" and missing is None)
    if missing and topology.rank == 0:
        print(f"parallel.compile: {missing}; the network runs as it is written, the same but slower", file=sys.stderr)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def _git_revision() -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a container without git
        return None
    return result.stdout.strip() or None


def start_table(config: Config, topology: Topology, plan: BatchPlan, first_step: int) -> str:
    """What is about to run, for a person: one `name  value` line each."""
    model, batch, parallel = config.model, config.batch.global_batch_size, config.parallel
    shares = token_shares(config.data, model.patch_size, [stream.index for stream in plan.streams])
    tokens_per_image = sum(tokens * share for tokens, share in shares.items())
    step_flops = flops.train_flops(model, round(tokens_per_image)) * batch
    state = rank_memory(config, topology.dp_size, 0, 0, on_cuda=False).state
    rows = {
        "model": f"{model.name} ({model.family}), {flops.parameters(model):,} parameters",
        "images": f"{_images(config, plan)} for training, {tokens_per_image:.1f} tokens each on average",
        "batch": f"{batch} images, about {tokens_per_image * batch:,.0f} tokens, {step_flops:.3g} FLOP a step",
        "state": f"{state / 2**30:.3f} GiB a rank (weights, gradients, optimizer, EMA)",
        "layout": f"{in_words(parallel, topology.dp_size)}, {parallel.precision}{', compiled' * is_compiled()}, "
        + _device_name(topology.device),
        "steps": f"{first_step:,} to {config.run.steps:,}",
        "run": config.run.dir,
    }
    return "\n".join(f"  {name:<8}{value}" for name, value in rows.items())


def nothing_to_do(config: Config, step: int) -> str:
    """What to say of a run whose newest checkpoint is that of its last step."""
    if step < config.run.steps:
        return f"{config.run.dir}: trained up to step {step:,} of {config.run.steps:,}, as far as was asked"
    text = f"{config.run.dir}: all {config.run.steps:,} steps are trained, nothing is left to do; "
    if config.optim.schedule == "cosine":
        return f"{text}with optim.schedule=cosine a longer run is another one (run.steps=..., run.dir=...)"
    return f"{text}a larger run.steps trains it further"


def _images(config: Config, plan: BatchPlan) -> str:
    """How many images there are to train on, by shard set."""
    if len(plan.streams) == 1:
        return f"{plan.num_images:,}"
    parts = zip(config.data.sources, plan.streams, plan.weights, strict=True)
    return ", ".join(
        f"{stream.num_images:,} of {name} ({float(weight / sum(plan.weights)):.1%})" for name, stream, weight in parts
    )

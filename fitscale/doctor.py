"""`fitscale doctor`: is everything here that a run needs? One line a question: ok, or not ok, and what to do.

1. Python, the packages against the bounds of setup.cfg, a compiler.
2. Slurm; of a cluster profile, its partition.
3. Of a config: the run directory, disk, shards, and what evaluation compares with.
4. With torch, which takes seconds to load: the device, and a sum over two ranks, started as torchrun starts a run.

Nothing that is written stays, and no network that a config names is run. Whatever a question raises is its answer.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fitscale.config.errors import UserError, writing
from fitscale.config.program import USER_ERROR, loading

if TYPE_CHECKING:  # each question imports what it needs: a package that is missing or broken is the answer to it
    from fitscale.config.schema import Config, EvaluationConfig

SHOWN = ("torch", "deepspeed", "megatron-core", "numpy")  # of the packages, where all are within their bounds
TO_DO = {
    "packages": "pip install -c constraints.txt -e .",
    "slurm": "ask from a login node of the cluster; docs/cluster.md says how to find a profile's values",
    "config": "`fitscale config CONFIG...` prints what a config comes to",
    "run.dir": "name a folder that can be written, and is empty or this run's",
    "disk": "make room, set run.dir elsewhere, or save less: evaluation.points, checkpoint.keep_last",
    "cache": "make room, set data.cache_dir elsewhere, or less data.cache_gb",
    "shards": "`fitscale data DIR --verify` reads the whole set; tools/make_shards.py makes one",
    "evaluation": "README, 'What comes from elsewhere'; to go without, evaluation.features=null",
    "device": "compare `nvidia-smi` with the CUDA version that `python -m torch.utils.collect_env` names",
    "ranks": "name the network interface: GLOO_SOCKET_IFNAME=lo, NCCL_SOCKET_IFNAME=...; see NCCL_DEBUG=INFO",
}
LIMIT_S = 180  # for two ranks to find each other and to add two numbers
FP32 = 4
Answer = TypeVar("Answer")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Ask every question and print its answer at once; the exit code is 0 if all are ok, else 2."""
    report = Report()
    for title, question in {"packages": packages, "compiler": compiler}.items():
        report.ask(title, question)
    report.ask("slurm", partial(slurm, arguments.cluster))
    config = report.ask("config", partial(read_config, arguments.config), "reads well") if arguments.config else None
    if config is not None:
        of_config = {"run.dir": run_folder, "disk": disk, "cache": cache, "shards": shards, "evaluation": compared}
        for title, look in of_config.items():
            report.ask(title, partial(look, config))
    with loading("torch, for the device and two ranks"):
        wanted = "auto" if config is None or arguments.cluster else config.run.device  # a login node may have no GPU
        report.ask("device", partial(device, wanted))
    report.ask("ranks", two_ranks)
    print(f"{report.wrong} of {report.asked} not ok" if report.wrong else f"all {report.asked} ok")
    return USER_ERROR if report.wrong else 0


class Report:
    """Prints answers and counts them."""

    def __init__(self) -> None:
        self.asked = self.wrong = 0

    def ask(self, title: str, question: Callable[[], Answer], told: str | None = None) -> Answer | None:
        """What `question` returns, printed, or `told` in its place; None where it raises, for then it is not ok."""
        self.asked += 1
        try:
            answer = question()
            print(f"ok      {title:<11}{told or answer}", flush=True)
            return answer
        except Exception as error:  # a doctor that falls ill helps nobody
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
            self.wrong += 1
            print(f"not ok  {title:<11}{lines[0]}\n{'':8}what to do: {TO_DO[title]}", flush=True)
            return None


def packages() -> str:
    """Python and the installed packages, against what fitscale's own metadata, made from setup.cfg, requires."""
    from packaging.requirements import Requirement

    try:
        named = [Requirement(text) for text in requires("fitscale") or []]
    except PackageNotFoundError:
        raise UserError("fitscale is not installed") from None
    needed = [one for one in named if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in needed:
        try:
            if not one.specifier.contains(version(one.name), prereleases=True):
                wrong.append(f"{one.name} {version(one.name)} (needed: {one.specifier})")
        except PackageNotFoundError:
            wrong.append(f"{one.name} missing (needed: {one.specifier})")
    if wrong:
        raise UserError(", ".join(wrong))
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    return f"all {len(needed)} within their bounds: {shown}; Python {platform.python_version()}"


def compiler() -> str:
    """What `parallel.compile` needs: without it networks run as they are written. DeepSpeed needs none."""
    import torch

    from fitscale.model.common.compiler import lacks_for_compiling

    missing = lacks_for_compiling(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{missing}: parallel.compile stays off" if missing else "there for parallel.compile"


def slurm(profile: str | None) -> str:
    from fitscale.jobs.launch import require_slurm
    from fitscale.jobs.profile import read_profile

    if profile is None:
        found = "is here" if shutil.which("sbatch") else "is not here, and runs without it need none"
        return f"{found}; --cluster PROFILE checks a profile"
    cluster = read_profile(profile)
    require_slurm(cluster.partition)
    return f"sbatch is here, and partition {cluster.partition or '(the default)'} of {profile}"


def read_config(arguments: list[str]) -> "Config":
    from fitscale.config.load import load_config
    from fitscale.data.encoding import load_run

    config = load_config(arguments)
    try:
        return load_run(arguments)
    except UserError:  # of shards or a run directory, which have questions of their own
        return config


def run_folder(config: "Config") -> str:
    """Whether the run directory is free or this config's, and can be written; nothing is made."""
    from fitscale.run.claim import check_claim

    run = check_claim(config)
    with writing(f"run.dir: {run.path}"), tempfile.TemporaryFile(dir=existing(run.path)):
        pass
    return f"{run.path} can be written" + (", and holds this run" if run.config.exists() else "")


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def disk(config: "Config") -> str:
    """Room for the checkpoints that the run will keep, and for the one that is being written."""
    from fitscale.model import flops
    from fitscale.run.layout import RunDir

    kept = len({*config.evaluation.steps(config.run.steps), config.run.steps}) + config.checkpoint.keep_last
    if config.checkpoint.keep_last == 0:
        kept += config.run.steps // config.checkpoint.every_steps
    sets = 3 + len(config.optim.ema_decays)  # of numbers: weights, two moments, the EMAs
    each = flops.parameters(config.model) * sets * FP32
    folder = RunDir(Path(config.run.dir)).checkpoint_folder
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    counted = f"{kept + 1} checkpoints of {in_gb(each)}"
    return room(folder, (kept + 1) * each - there, counted)


def cache(config: "Config") -> str:
    """Room for the shards that come from a URL."""
    folder = Path(config.data.cache_dir).expanduser()
    if not any("://" in source.shards for source in config.data.sources.values()):
        return "not used: no shards come from a URL"
    with writing(f"data.cache_dir: {folder}"), tempfile.TemporaryFile(dir=existing(folder)):
        pass
    held = sum(file.stat().st_size for file in folder.rglob("*.tar"))
    counted = f"data.cache_gb = {config.data.cache_gb:g}"
    return room(folder, config.data.cache_gb * 1e9 - held, counted)


def room(folder: Path, needed: float, what: str) -> str:
    free = shutil.disk_usage(existing(folder)).free
    text = f"{in_gb(free)} free at {existing(folder)}, {in_gb(max(needed, 0))} needed for {what}"
    if free < needed:
        raise UserError(text)
    return text


def in_gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


def shards(config: "Config") -> str:
    """The shards against the config, as a start looks at them, and one image read of each set."""
    from fitscale.data.index import ShardReader
    from fitscale.plan.preflight import open_data

    plan = open_data(config)
    for stream in plan.streams:
        ShardReader(stream.index).read(0, int(stream.index.images[0]["first_variant"]))
    return f"{plan.num_images:,} images for training, which fit the model; `fitscale data DIR --verify` reads them all"


def compared(config: "Config") -> str:
    """What a Fréchet distance needs, by its hash; the feature network is not run."""
    from fitscale.plan.preflight import require_files

    require_files(config)
    evaluation, latent = config.evaluation, config.data.latent
    if not evaluation.points or not evaluation.networks:
        return "no Fréchet distance is asked for (evaluation.features)"
    if latent.kind == "vae" and latent.vae is None:
        raise UserError("data.latent.vae: needed to decode latents: a local folder or hub name of an AutoencoderKL")
    return "; ".join(_compared(evaluation, name) for name in evaluation.networks)


def _compared(evaluation: "EvaluationConfig", name: str) -> str:
    features = Path(evaluation.networks[name])
    if evaluation.trusted and sha256(features) not in evaluation.trusted:
        raise UserError(f"{_hashed(features)} is a program that evaluation.trusted does not name")
    return f"features {_hashed(features)}, reference {_reference(Path(evaluation.reference_of(name)))}"


def _reference(path: Path) -> str:
    import numpy as np

    from fitscale.data.index import open_index

    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if missing := {"mu", "sigma"} - {*arrays}:
                raise UserError(f"evaluation.reference: {path}: has no array {' and no '.join(sorted(missing))}")
        return _hashed(path)
    if (path / "index.json").is_file():
        return f"{open_index(path).meta.num_images:,} images in shards"
    return f"{sum(one.is_file() for one in path.rglob('*')):,} files"


def _hashed(path: Path) -> str:
    return f"{path} (sha256 {sha256(path)})"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def device(wanted: str) -> str:
    import torch

    if not torch.cuda.is_available():
        driver = ", though nvidia-smi is here" if shutil.which("nvidia-smi") else ""
        if wanted == "cuda" or driver:
            raise UserError(f"torch {torch.__version__} sees no CUDA device{driver}")
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        return f"cpu, {len(os.sched_getaffinity(0))} cores, {memory_gb:.0f} GB; no CUDA device: runs train in fp32"
    count = torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(0)
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: set parallel.precision=fp32"
    return f"{count} x {torch.cuda.get_device_name(0)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {bf16}"


def two_ranks() -> str:
    """Start two ranks with torchrun, which add two numbers: by NCCL where there are two GPUs, else by gloo."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.device_count() > 1 and dist.is_nccl_available() else "gloo"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fitscale.doctor", backend)
    try:
        with tempfile.TemporaryFile("w+") as said:  # a rank that hangs would keep a pipe open
            ended = subprocess.run([sys.executable, *launch], stdout=said, stderr=said, timeout=LIMIT_S, check=False)
            said.seek(0)
            reasons = [line.strip() for line in said if "Error" in line]
    except subprocess.TimeoutExpired:
        raise UserError(f"{backend}: two ranks did not meet in {LIMIT_S} s; is localhost reachable?") from None
    if ended.returncode:
        raise UserError(f"{backend}: two ranks cannot add: {(reasons or ['no reason given'])[0]}")
    return f"{backend}: two ranks, started by torchrun, added 1 and 2"


def _add(backend: str) -> None:
    """One of the two ranks."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group(backend)
    number = torch.tensor(float(rank + 1), device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(number)
    if number.item() != 3:
        raise RuntimeError(f"Error: 1 + 2 = {number.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _add(sys.argv[1])

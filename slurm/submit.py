"""Submit one run to a Slurm cluster.

1. Resolve the config with the loader of `fitscale train`; check it, the data, the layout and the cluster.
2. Write the run directory's config.
3. Submit jobs that hold only that path: training, up to each step that is to be evaluated, and the evaluations.

The jobs go on by themselves after time limits, preemption and lost nodes. Submitting again is safe: only what is
missing is submitted.
"""

import argparse
import sys
import time

from submitit import LocalExecutor

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, load_schema
from fitscale.config.program import exit_code
from fitscale.config.schema import Config
from fitscale.jobs import launch
from fitscale.jobs.allocate import machine_of, memory_lack
from fitscale.jobs.chain import missing_links, require_same_config, submit_links
from fitscale.jobs.job import LOG, TrainJob
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.requeue import FAILED
from fitscale.plan.preflight import open_data, require_files
from fitscale.plan.report import Utilisation, detail
from fitscale.plan.step import Plan, plan, typical_images
from fitscale.run.claim import check_claim, claim, claimed
from fitscale.run.layout import RunDir
from fitscale.run.progress import pending_evaluations, progress

POLL_S = 2.0
NO_TIMEOUT_MIN = 60 * 24 * 365
THIS_MACHINE = ClusterConfig("local", device="cpu", gpus_per_node=0, tasks_per_node=1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one run on a Slurm cluster, until it is finished, whatever happens on the way.",
        epilog="example: python slurm/submit.py configs/model/b.yaml configs/recipe/fitv2_256.yaml "
        "data.shards=/data/latents run.dir=runs/b --cluster configs/cluster/h100.yaml --nodes 4",
    )
    parser.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help="config YAML files and dotted overrides")
    parser.add_argument("--cluster", required=True, metavar="PROFILE", help="cluster profile (YAML), or `local`")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job (default: 1)")
    parser.add_argument("--tasks-per-node", type=int, help="ranks on a node, one GPU each (default: the profile's)")
    parser.add_argument("--no-evaluate", action="store_true", help="train only")
    parser.add_argument("--dry-run", action="store_true", help="print layout, batch script and plan; submit nothing")
    parser.add_argument("--follow", action="store_true", help="show the run's log until its training has ended")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program with `argv`; returns 1 if a run that was followed has failed."""
    arguments = parse(argv)
    local = arguments.cluster == "local"
    profile = THIS_MACHINE if local else read_profile(arguments.cluster)
    config = launch.on_its_devices(load_config(arguments.config), profile)
    layout = launch.make_layout(profile, config, arguments.nodes, arguments.tasks_per_node)
    open_data(config)  # what is wrong with the data is said here, not in the job
    require_files(config)
    planned = plan(config, machine_of(profile, layout), typical_images(config), profile.utilisation)
    run = check_claim(config)
    print(launch.describe(layout, config))
    if lack := memory_lack(planned):
        print(f"warning: {lack}", file=sys.stderr)
    if arguments.dry_run:
        print("" if local else script_and_plan(profile, config, run, layout, planned))
        return 0
    if not local:
        launch.require_slurm(profile.partition)
    if progress(config, run).finished:
        print(f"{run.path}: finished before")
        return 0
    if local:
        return run_here(config, layout)
    submit(arguments, profile, config, run, layout)
    return follow(run) if arguments.follow else 0


def read_profile(path: str) -> ClusterConfig:
    """The cluster profile at `path`; a mistake in it is named with the file."""
    try:
        return load_schema(ClusterConfig, [path])
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f"{path}: {error}") from error


def script_and_plan(profile: ClusterConfig, config: Config, run: RunDir, layout: launch.Layout, planned: Plan) -> str:
    """The batch script of the training, and what `fitscale plan` says of it."""
    executor = launch.make_executor(profile, run, layout, config.run.name)
    source = Utilisation(profile.utilisation, f"of profile {profile.name}")
    return "\n".join(["", launch.batch_script(executor), *detail(planned, source)])


def submit(
    arguments: argparse.Namespace, profile: ClusterConfig, config: Config, run: RunDir, layout: launch.Layout
) -> None:
    (live,) = launch.live_jobs([run])
    require_same_config(config, run, live)
    links = missing_links(config, run, live, [] if arguments.no_evaluate else pending_evaluations(config, run))
    with claimed([config]):
        submitted = submit_links(profile, run, layout, config.run.name, links)
    for job in live:
        print(f"{job.kind} {job.step}: job {job.id} ({job.state}), submitted before")
    for link, job_id in submitted.items():
        print(f"{link.kind} {link.step}: job {job_id}")
    print(f"log: {run.path / LOG}", flush=True)


def run_here(config: Config, layout: launch.Layout) -> int:
    """The same job as processes of this machine; waits for them, and stops them when it is stopped."""
    run = claim(config)
    executor = LocalExecutor(run.path.resolve() / "submitit" / "%j")
    executor.update_parameters(timeout_min=NO_TIMEOUT_MIN, tasks_per_node=layout.tasks_per_node)
    job = executor.submit(TrainJob(run.path.resolve(), config.run.steps))
    print(f"log: {run.path / LOG}", flush=True)
    try:
        while not job.done():
            time.sleep(POLL_S)
    finally:
        job.cancel()
    return verdict(run)


def follow(run: RunDir) -> int:
    """Print what is added to the log until none of the run's jobs is left, or training is over."""
    seen = 0
    while True:
        over = not any(job.kind == "train" for job in launch.live_jobs([run])[0]) or (run.path / FAILED).exists()
        log = run.path / LOG
        if log.exists():
            with open(log, "rb") as file:
                file.seek(seen)
                sys.stdout.write(file.read().decode(errors="replace"))
                seen = file.tell()
            sys.stdout.flush()
        if over:
            return verdict(run)
        time.sleep(POLL_S)


def verdict(run: RunDir) -> int:
    """Say how training ended; 0 if it is complete."""
    state = progress(load_config([str(run.config)]), run)
    if state.trained:
        print(f"\n{run.path}: {state}")
        return 0
    failed = run.path / FAILED
    reason = failed.read_text().strip() if failed.exists() else f"it stopped; see {run.path / LOG}"
    print(f"error: {run.path}: not finished at {state}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(exit_code(main))

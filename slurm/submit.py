"""Submit one run to a Slurm cluster.

1. Resolve the config with the loader of `fitscale train`; check it, the data, the layout and the cluster.
2. Write the run directory's config.
3. Submit jobs that hold only that path: training, in pieces or in one, and the evaluations (jobs/chain.py).

The jobs go on by themselves after time limits, preemption and lost nodes. Submitting again is safe: only what is
missing is submitted.
"""

import argparse
import sys
import time
from functools import cache

from submitit import LocalExecutor

from fitscale.config.program import exit_code
from fitscale.data.encoding import load_run
from fitscale.data.index import open_index
from fitscale.jobs import launch
from fitscale.jobs.chain import (
    chain_table,
    executor_of,
    jobs_of_same_config,
    live_or_none,
    missing_links,
    submit_missing,
    told,
)
from fitscale.jobs.job import TrainJob
from fitscale.jobs.local import start_here, stop_here
from fitscale.jobs.profile import EVALUATE, ClusterConfig, LayoutConfig, read_profile
from fitscale.jobs.submission import Allocation, Submission, as_told, look_at
from fitscale.plan.report import detail
from fitscale.run.claim import check_claim, claim, claimed

POLL_S = 2.0
NO_TIMEOUT_MIN = 60 * 24 * 365
THIS_MACHINE = ClusterConfig("local", device="cpu", gpus_per_node=0, tasks_per_node=1, max_nodes=1)


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
    parser.add_argument(
        "--evaluation",
        choices=EVALUATE,
        default=EVALUATE[0],
        help="evaluate between trainings, whose nodes are given back meanwhile (default); beside a training that keeps "
        "them; or after it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print script, plan, all jobs and their cost; submit nothing",
    )
    parser.add_argument("--follow", action="store_true", help="show the run's log until its training has ended")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program with `argv`; returns 1 if a run that was followed has failed."""
    arguments = parse(argv)
    local = arguments.cluster == "local"
    profile = THIS_MACHINE if local else read_profile(arguments.cluster)
    opened = cache(open_index)
    config = load_run(arguments.config, opened)
    run = check_claim(config)
    one = as_told(look_at(config, opened), profile, LayoutConfig(arguments.nodes, arguments.tasks_per_node))
    print(one)
    if one.memory_lack:
        print(f"warning: {one.memory_lack}", file=sys.stderr)
    if arguments.dry_run:
        print("" if local else script_and_plan(profile, one, arguments))
        return 0
    if not local:
        launch.require_slurm(profile.partition)
    if one.progress.finished:
        print(f"{run.path}: finished before")
        return 0
    if local:
        return run_here(one)
    (live,) = jobs_of_same_config([one])
    with claimed([one.config]):
        ids = submit_missing(profile, one, live, arguments.evaluation, not arguments.no_evaluate)
    print("\n".join([*told(live, ids), f"log: {run.log}"]), flush=True)
    return follow(one) if arguments.follow else 0


def script_and_plan(profile: ClusterConfig, one: Allocation, arguments: argparse.Namespace) -> str:
    """The batch script of the first job, what `fitscale plan` says of the training, and all that would be submitted."""
    links = missing_links(one.progress, live_or_none(one), arguments.evaluation, not arguments.no_evaluate)
    script = launch.batch_script(executor_of(profile, one, links[0])) if links else "nothing is missing"
    planned = detail(one.plan, f"of profile {profile.name}", one.evaluation.machine)
    return "\n".join(["", script, *planned, "", chain_table(profile, one, links)])


def run_here(one: Allocation) -> int:
    """The same job as processes of this machine; waits for them, and stops them when it is stopped."""
    run = claim(one.config).absolute
    executor = LocalExecutor(run.submitit / "%j")
    executor.update_parameters(timeout_min=NO_TIMEOUT_MIN, tasks_per_node=one.plan.machine.gpus)
    job = start_here(executor, TrainJob(run, one.config.run.steps))
    print(f"log: {one.run.log}", flush=True)
    try:
        while not job.done():
            time.sleep(POLL_S)
    finally:
        stop_here([job])
    return verdict(one)


def follow(one: Submission) -> int:
    """Print what is added to the log until none of the run's jobs is left, or training is over."""
    seen, run = 0, one.run
    while True:
        over = not any(job.kind == "train" for job in launch.live_jobs([run])[0]) or run.failed.exists()
        if run.log.exists():
            with open(run.log, "rb") as file:
                file.seek(seen)
                sys.stdout.write(file.read().decode(errors="replace"))
                seen = file.tell()
            sys.stdout.flush()
        if over:
            return verdict(one)
        time.sleep(POLL_S)


def verdict(one: Submission) -> int:
    """Say how training ended; 0 if it is complete."""
    run, state = one.run, one.progress
    if state.trained:
        print(f"\n{run.path}: {state}")
        return 0
    reason = run.failed.read_text().strip() if run.failed.exists() else f"it stopped; see {run.log}"
    print(f"error: {run.path}: not finished at {state}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(exit_code(main))

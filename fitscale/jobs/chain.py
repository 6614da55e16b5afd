"""What a run on a cluster still needs, as jobs that wait for one another.

    train to e1  ->  train to e2  ->  ...  ->  train to the last step
       -> evaluate e1   -> evaluate e2            -> evaluate the last step

Training stops at every evaluation step, so that Slurm's dependencies start each evaluation when its checkpoint is
there, on a machine of its own. Only what is missing is submitted: not what the run directory holds, nor what a job that
Slurm has not finished with will do. So submitting again is always safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.jobs.job import EvaluateJob, TrainJob
from fitscale.jobs.launch import LiveJob, live_jobs, make_executor, submit
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.submission import Allocation, Submission
from fitscale.run.claim import differences
from fitscale.run.progress import Progress


@dataclass(frozen=True)
class Link:
    """A job to submit; `after` is what has to succeed first: another link, or the id of a job."""

    kind: str  # train or evaluate
    step: int
    after: "Link | str | None" = None


def missing_links(state: Progress, live: list[LiveJob], evaluate: bool = True) -> list[Link]:
    """The jobs that a run still needs besides its `live` ones, each after the one that it waits for.

    `evaluate`: its evaluations too.
    """
    going_on = {(job.kind, job.step): job.id for job in live}
    to_evaluate = state.pending if evaluate else []
    links: list[Link] = []
    after: Link | str | None = None
    for step in sorted({*to_evaluate, state.steps}):
        if ("train", step) in going_on:
            after = going_on["train", step]
        elif step <= state.saved:
            after = None
        else:
            after = Link("train", step, after)
            links.append(after)
        if step in to_evaluate and ("evaluate", step) not in going_on:
            links.append(Link("evaluate", step, after))
    return links


def jobs_of_same_config(runs: Sequence[Submission]) -> list[list[LiveJob]]:
    """The live jobs of each run.

    While there are any its config stays: a job that is queued again would read another than it was made for. A started
    run's config names the precision that `auto` has become there, which is no other.

    Raises:
        UserError: it does not; names the jobs and the keys.
    """
    found = live_jobs([one.run for one in runs])
    for one, live in zip(runs, found, strict=True):
        changed = differences(load_config([str(one.run.config)]), one.config) if live else {}
        if one.config.parallel.precision == "auto":
            changed.pop("parallel.precision", None)
        if changed:
            jobs = ", ".join(f"{job.id} ({job.state})" for job in live)
            raise UserError(
                f"run.dir: {one.run.path} has jobs, {jobs}, of another config: {', '.join(changed.values())}. Cancel "
                f"them first: python slurm/status.py {one.run.path} --cancel"
            )
    return found


def submit_missing(
    profile: ClusterConfig, one: Allocation, live: list[LiveJob], evaluate: bool = True
) -> dict[Link, str]:
    """Submit what neither the run directory holds nor a live job will do; returns the jobs' ids.

    Raises:
        UserError: sbatch refuses a job; those before it stay submitted, and the next try leaves them out.
    """
    run, links = one.run.absolute, missing_links(one.progress, live, evaluate)
    if any(link.kind == "train" for link in links):
        run.failed.unlink(missing_ok=True)  # the word of the jobs before these
    ids: dict[Link, str] = {}
    for link in links:
        job = TrainJob(run, link.step) if link.kind == "train" else EvaluateJob(run, link.step)
        after = ids[link.after] if isinstance(link.after, Link) else link.after
        ids[link] = submit(make_executor(profile, one, job, after), job)
    return ids


def told(live: list[LiveJob], ids: dict[Link, str]) -> list[str]:
    """What a person is told of a run's jobs: those that were live, and those just submitted."""
    lines = [f"{job.kind} {job.step}: job {job.id} ({job.state}), submitted before" for job in live]
    return lines + [f"{link.kind} {link.step}: job {job_id}" for link, job_id in ids.items()]

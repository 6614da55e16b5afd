"""What a run on a cluster still needs, as jobs that wait for one another.

    train to e1  ->  train to e2  ->  ...  ->  train to the last step
       -> evaluate e1   -> evaluate e2            -> evaluate the last step

Training stops at every evaluation step, so that Slurm's dependencies start each evaluation when its checkpoint is
there, on a machine of its own. Only what is missing is submitted: not what the run directory holds, nor what a job that
Slurm has not finished with will do. So submitting again is always safe.
"""

from dataclasses import dataclass, replace

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.jobs.job import EVALUATION_TIMEOUTS, EvaluateJob, Job, TrainJob
from fitscale.jobs.launch import Layout, LiveJob, make_executor, submit
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.requeue import FAILED
from fitscale.run.claim import differing_keys
from fitscale.run.layout import RunDir


@dataclass(frozen=True)
class Link:
    """A job to submit; `after` is what has to succeed first: another link, or the id of a job."""

    kind: str  # train or evaluate
    step: int
    after: "Link | str | None" = None


def missing_links(config: Config, run: RunDir, live: list[LiveJob], to_evaluate: list[int]) -> list[Link]:
    """The jobs that `run` still needs besides its `live` ones, each after the one that it waits for.

    `to_evaluate`: the steps that are not evaluated yet; empty to train only.
    """
    going_on = {(job.kind, job.step): job.id for job in live}
    saved = [checkpoint.step for checkpoint in run.checkpoints()]
    links: list[Link] = []
    after: Link | str | None = None
    for step in sorted({*to_evaluate, config.run.steps}):
        if ("train", step) in going_on:
            after = going_on["train", step]
        elif saved and step <= saved[-1]:
            after = None
        else:
            links.append(Link("train", step, after))
            after = links[-1]
        if step in to_evaluate and ("evaluate", step) not in going_on:
            links.append(Link("evaluate", step, after))
    return links


def require_same_config(config: Config, run: RunDir, live: list[LiveJob]) -> None:
    """While jobs of a run are live its config stays: one that is queued again would read another than it was made for.

    A started run's config names the precision that `auto` has become there, which is no other.

    Raises:
        UserError: names the jobs and the keys.
    """
    if not live:
        return
    there = load_config([str(run.config)])
    if config.parallel.precision == "auto":
        config = replace(config, parallel=replace(config.parallel, precision=there.parallel.precision))
    if changed := differing_keys(there, config):
        jobs = ", ".join(f"{job.id} ({job.state})" for job in live)
        raise UserError(
            f"run.dir: {run.path} has jobs, {jobs}, of another config: {', '.join(changed)}. Cancel them first: "
            f"python slurm/status.py {run.path} --cancel"
        )


def submit_links(profile: ClusterConfig, run: RunDir, layout: Layout, name: str, links: list[Link]) -> dict[Link, str]:
    """Submit `links` in their order; returns the jobs' ids.

    Raises:
        UserError: sbatch refuses one; those before it stay submitted, and the next try leaves them out.
    """
    path = run.path.resolve()
    if any(link.kind == "train" for link in links):
        (path / FAILED).unlink(missing_ok=True)  # the word of the jobs before these
    ids: dict[Link, str] = {}
    for link in links:
        after = ids[link.after] if isinstance(link.after, Link) else link.after
        train = link.kind == "train"
        job_name = f"{name}-{link.kind}-{link.step}"
        if train:
            job: Job = TrainJob(path, link.step)
            executor = make_executor(profile, run, layout, job_name, after)
        else:
            job = EvaluateJob(path, link.step)
            executor = make_executor(profile, run, Layout(1, 1), job_name, after, EVALUATION_TIMEOUTS)
        ids[link] = submit(executor, job)
    return ids

"""What a run on a cluster still needs, as jobs that wait for one another.

    between   train to e1 -> train to e2 -> ... -> train to the last step
                 -> evaluate e1   -> evaluate e2            -> evaluate the last step
    beside    train to the last step, on the same nodes all the time
                 . evaluate e1 . evaluate e2                -> evaluate the last step
    after     train to the last step -> evaluate e1, evaluate e2 ... each on a device of its own

    ->   Slurm's dependency: the job before has to succeed
    .    submitted held; the batch script of the training releases it when its checkpoint is there (requeue.sh). No node
         has to be able to submit: releasing takes what queueing a job again does, `scontrol`.

Only what is missing is submitted: not what the run directory holds, nor what a job that Slurm has not finished with
will do. So submitting again is always safe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from submitit import SlurmExecutor

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.program import aligned
from fitscale.jobs.job import EvaluateJob, StepJob, TrainJob
from fitscale.jobs.launch import HELD, LiveJob, QueueUnknownError, live_jobs, make_executor, slurm, submit
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.submission import Allocation, Submission
from fitscale.run.claim import differences
from fitscale.run.layout import RunDir
from fitscale.run.progress import Progress

EVALUATION_S = 3600.0  # what an evaluation is given besides: for the reference, which the first of all runs reads


@dataclass(frozen=True)
class Link:
    """A job to submit; `after` is what has to succeed first: another link, or the id of a job."""

    kind: str  # train or evaluate
    step: int
    after: "Link | str | None" = None
    steps: int = 0  # that it trains
    held: bool = False  # until training has saved the step


def missing_links(state: Progress, live: list[LiveJob], when: str = "between", evaluate: bool = True) -> list[Link]:
    """The jobs that a run still needs besides its `live` ones, each after the one that it waits for.

    Args:
        when: where its evaluations stand, one of `EVALUATE`.
        evaluate: its evaluations too.
    """
    training = {job.step: job.id for job in live if job.kind == "train"}
    evaluating = {job.step for job in live if job.kind == "evaluate"}
    to_evaluate = [step for step in state.pending if step not in evaluating] if evaluate else []
    stops = {*(state.pending if evaluate and when == "between" else ()), *training, state.steps}
    links: list[Link] = []
    after: Link | str | None = None  # what saves a step: nothing, if that is there
    reached = state.saved
    for step in sorted(stops):
        passing = min((other for other in training if other >= step), default=None)
        if passing is not None and (passing == step or step > state.saved):
            after = training[passing]
        elif step <= state.saved:
            after = None
        else:
            after = Link("train", step, after, step - reached)
            links.append(after)
        reached = max(reached, step)
        if when == "between" and step in to_evaluate:
            links.append(Link("evaluate", step, after))
    return links if when == "between" else [*links, *_beside_or_after(to_evaluate, after, state, when)]


def _beside_or_after(steps: list[int], trained: Link | str | None, state: Progress, when: str) -> Iterator[Link]:
    for step in steps:
        if when == "after" or step == state.steps:
            yield Link("evaluate", step, trained)
        else:
            yield Link("evaluate", step, held=step > state.saved)


def jobs_of_same_config(runs: Sequence[Submission]) -> list[list[LiveJob]]:
    """The live jobs of each run.

    While there are any its config stays: a job that is queued again would read another than it was made for. A started
    run's config says what `auto` precision and compiling have become there, which is nothing else.

    Raises:
        UserError: it does not; names the jobs and the keys.
    """
    found = live_jobs([one.run for one in runs])
    for one, live in zip(runs, found, strict=True):
        changed = differences(load_config([str(one.run.config)]), one.config) if live else {}
        for key in ("precision", "compile"):
            if getattr(one.config.parallel, key) == "auto":
                changed.pop(f"parallel.{key}", None)
        if changed:
            jobs = ", ".join(f"{job.id} ({job.state})" for job in live)
            raise UserError(
                f"run.dir: {one.run.path} has jobs, {jobs}, of another config: {', '.join(changed.values())}. Cancel "
                f"them first: python slurm/status.py {one.run.path} --cancel"
            )
    return found


def submit_missing(
    profile: ClusterConfig, one: Allocation, live: list[LiveJob], when: str = "between", evaluate: bool = True
) -> dict[Link, str]:
    """Submit what neither the run directory holds nor a live job will do (`missing_links`); returns the jobs' ids.

    Raises:
        UserError: sbatch refuses a job; those before it stay submitted, and the next try leaves them out.
    """
    run, links = one.run.absolute, missing_links(one.progress, live, when, evaluate)
    for job in live:
        if job.state == HELD and job.step <= one.progress.saved:  # nobody was there to release it
            slurm("scontrol", "release", job.id)
    if any(link.kind == "train" for link in links):
        run.failed.unlink(missing_ok=True)  # the word of the jobs before these
    ids: dict[Link, str] = {}
    for link in links:
        after = ids[link.after] if isinstance(link.after, Link) else link.after
        ids[link] = submit(executor_of(profile, one, link, after), job_of(run, link), link.held)
    return ids


def live_or_none(one: Submission) -> list[LiveJob]:
    """The live jobs of a run, or none where nobody answers for the queue: for a plan of what would be submitted."""
    try:
        return live_jobs([one.run])[0]
    except QueueUnknownError:
        return []


def job_of(run: RunDir, link: Link) -> StepJob:
    """What a link runs."""
    return TrainJob(run, link.step) if link.kind == "train" else EvaluateJob(run, link.step)


def executor_of(profile: ClusterConfig, one: Allocation, link: Link, after: str | None = None) -> SlurmExecutor:
    """How a link is asked for; `after`: the id of the job that it waits for."""
    wait: dict[str, str | bool] = {"hold": True} if link.held else {}
    if after:
        wait = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return make_executor(profile, one, job_of(one.run.absolute, link), limit_min(profile, one, link), wait)


def planned_s(one: Allocation, link: Link) -> float:
    """What `fitscale plan` says that a link takes."""
    return link.steps * one.plan.step_s if link.kind == "train" else one.evaluation.seconds


def limit_min(profile: ClusterConfig, one: Allocation, link: Link) -> int:
    """The time limit of a link."""
    return profile.limit_min(planned_s(one, link) + EVALUATION_S * (link.kind == "evaluate"))


def chain_table(profile: ClusterConfig, one: Allocation, links: list[Link]) -> str:
    """The links as aligned text: what each waits for, its part of the cluster, its time limit and its planned cost."""
    hours = {link: _gpu_hours(one, link) for link in links}
    rows = [("job", "after", "nodes x tasks", "limit (min)", "GPU-hours")]
    for link in links:
        after, machine = link.after, one.machine_of(link.kind)
        name = f"{after.kind} {after.step}" if isinstance(after, Link) else f"job {after}" if after else "-"
        rows.append(
            (
                f"{link.kind} {link.step}",
                f"step {link.step} is saved" if link.held else name,
                f"{machine.nodes} x {machine.gpus_per_node}",
                str(limit_min(profile, one, link)),
                f"{hours[link]:,.3g}" if hours[link] else "-",  # one that measures nothing
            )
        )
    return f"{aligned(rows)}\n{len(links)} jobs, {sum(hours.values()):,.3g} GPU-hours planned"


def _gpu_hours(one: Allocation, link: Link) -> float:
    return planned_s(one, link) * one.machine_of(link.kind).gpus / 3600


def told(live: list[LiveJob], ids: dict[Link, str]) -> list[str]:
    """What a person is told of a run's jobs: those that were live, and those just submitted."""
    lines = [f"{job.kind} {job.step}: job {job.id} ({job.state}), submitted before" for job in live]
    return lines + [f"{link.kind} {link.step}: job {job_id}" for link, job_id in ids.items()]

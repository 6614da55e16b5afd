"""How far a run has come, read from its run directory alone."""

from dataclasses import dataclass

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.run.comparability import is_as_configured
from fitscale.run.layout import RunDir


@dataclass(frozen=True)
class Progress:
    """A run's place between nothing and finished; `loss` is that of the newest logged step, None before the first."""

    step: int
    steps: int
    loss: float | None
    trained: bool  # the last step's checkpoint is complete
    evaluated: int
    evaluations: int

    @property
    def finished(self) -> bool:
        return self.trained and self.evaluated == self.evaluations

    def __str__(self) -> str:
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        return f"step {self.step:,}/{self.steps:,}  loss {loss}  evaluated {self.evaluated}/{self.evaluations}"


def progress(config: Config, run: RunDir) -> Progress:
    """The progress of the run with `config` in `run`."""
    rows = read_jsonl(run.metrics)
    steps = evaluation_steps(config, run)
    checkpoints = run.checkpoints()
    return Progress(
        step=rows[-1]["step"] if rows else 0,
        steps=config.run.steps,
        loss=rows[-1]["loss"] if rows else None,
        trained=bool(checkpoints) and checkpoints[-1].step >= config.run.steps,
        evaluated=len(steps) - len(pending_evaluations(config, run)),
        evaluations=len(steps),
    )


def evaluation_steps(config: Config, run: RunDir) -> list[int]:
    """The steps to evaluate: of a run that was made longer, not those that training passed without a checkpoint."""
    saved = {checkpoint.step for checkpoint in run.checkpoints()}
    newest = max(saved, default=0)
    return [step for step in config.evaluation.steps(config.run.steps) if step > newest or step in saved]


def pending_evaluations(config: Config, run: RunDir) -> list[int]:
    """The evaluation steps at which a metric is missing that the config asks for, measured as the config asks."""
    wanted = wanted_metrics(config)
    rows = [row for row in read_jsonl(run.evaluations) if row["metric"] in wanted]
    found = {(row["step"], row["metric"]) for row in rows if is_as_configured(config, row["metric"], row["key"])}
    return [step for step in evaluation_steps(config, run) if any((step, name) not in found for name in wanted)]


def wanted_metrics(config: Config) -> list[str]:
    """Names of the metrics, as in evaluations.jsonl, that the config asks for at every evaluation step."""
    evaluation = config.evaluation
    validation = evaluation.validation_images > 0 and config.data.holdout_fraction > 0
    return ["validation_loss"] * validation + ["fd"] * (evaluation.features is not None)

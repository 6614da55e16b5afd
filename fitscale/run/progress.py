"""How far a run has come, read from its run directory alone."""

from dataclasses import dataclass

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.run.comparability import is_as_configured, metric_name
from fitscale.run.layout import EVALUATIONS, METRICS, RunDir


@dataclass(frozen=True)
class Progress:
    """A run's place between nothing and finished; `loss` is that of the newest logged step, None before the first."""

    step: int
    steps: int
    loss: float | None
    saved: int  # step of the newest complete checkpoint, 0 before the first
    evaluations: list[int]  # steps; of a run that was made longer, not those that training passed without a checkpoint
    pending: list[int]  # those of them at which a metric is missing that the config asks for, measured as it asks

    @property
    def trained(self) -> bool:
        return self.saved >= self.steps

    @property
    def finished(self) -> bool:
        return self.trained and not self.pending

    def __str__(self) -> str:
        loss, evaluations = "-" if self.loss is None else f"{self.loss:.4f}", len(self.evaluations)
        evaluated = evaluations - len(self.pending)
        return f"step {self.step:,}/{self.steps:,}  loss {loss}  evaluated {evaluated}/{evaluations}"


def progress(config: Config, run: RunDir) -> Progress:
    """The progress of the run with `config` in `run`."""
    rows, wanted = read_jsonl(run.metrics, **METRICS), wanted_metrics(config)
    step, loss = (rows[-1]["step"], rows[-1]["loss"]) if rows else (0, None)
    saved = [0, *(checkpoint.step for checkpoint in run.checkpoints())]
    evaluations = [step for step in config.evaluation.steps(config.run.steps) if step > saved[-1] or step in saved]
    measured = {
        (row["step"], row["metric"])
        for row in read_jsonl(run.evaluations, **EVALUATIONS)
        if row["metric"] in wanted and is_as_configured(config, row["metric"], row["key"])
    }
    pending = [step for step in evaluations if any((step, metric) not in measured for metric in wanted)]
    return Progress(step, config.run.steps, loss, saved[-1], evaluations, pending)


def wanted_metrics(config: Config) -> list[str]:
    """Names of the metrics, as in evaluations.jsonl, that the config asks for at every evaluation step."""
    evaluation = config.evaluation
    validation = evaluation.validation_images > 0 and config.data.holdout_fraction > 0
    return ["validation_loss"] * validation + [metric_name("fd", name) for name in evaluation.networks]

"""A run that a command is about to start: its config with what its indices say, looked at once and passed along."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitscale.config.schema import Config
from fitscale.data.index import OpenIndex
from fitscale.model import flops
from fitscale.plan.preflight import open_data, require_files
from fitscale.plan.step import Images, typical_images
from fitscale.run.layout import RunDir
from fitscale.run.progress import Progress, progress


@dataclass(frozen=True)
class Submission:
    """One run, of a sweep or by itself."""

    config: Config
    images: Images

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.run.dir))

    @property
    def name(self) -> str:
        """The run directory's, and the cell's in a sweep."""
        return self.run.path.name

    @property
    def progress(self) -> Progress:
        """As the run directory has it now."""
        return progress(self.config, self.run)

    @property
    def train_flops(self) -> float:
        """FLOPs of the whole training run: 6 per multiply-accumulate, each image with its own number of tokens."""
        model, shares = self.config.model, self.images.shares
        per_image = sum(share * flops.train_flops(model, tokens) for tokens, share in shares.items())
        return per_image * self.images.batch_size * self.config.run.steps

    @property
    def costs(self) -> dict[str, str]:
        """What a person is told of it before it starts."""
        run, images = self.config.run, self.images
        return {
            "parameters": f"{flops.parameters(self.config.model):,}",
            "steps": f"{run.steps:,}",
            "images": f"{run.steps * images.batch_size:,}",
            "tokens/image": f"{sum(tokens * share for tokens, share in images.shares.items()):.1f}",
            "training FLOPs": f"{self.train_flops:.3g}",
            "evaluated at steps": " ".join(map(str, self.config.evaluation.steps(run.steps))) or "-",
        }

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest of a sweep says of it."""
        run, parameters = self.config.run, flops.parameters(self.config.model)
        return {"run_dir": run.dir, "parameters": parameters, "steps": run.steps, "train_flops": self.train_flops}


def look_at(config: Config, open_index: OpenIndex) -> Submission:
    """Look at all that the run of `config` and its evaluations will read.

    Args:
        open_index: opens each shard set once, however many runs of the command share it.

    Raises:
        UserError: something is not there, or does not fit: what is wrong is said here, not in the job.
    """
    open_data(config, open_index)
    require_files(config)
    return Submission(config, typical_images(config, open_index))

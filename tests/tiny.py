"""A run small enough for tests: digits, two blocks of width 32."""

from pathlib import Path

from fitscale.config.load import load_config
from fitscale.config.schema import Config

OVERRIDES = [
    *("model.name=tiny", "model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.num_classes=10"),
    *("model.patch_size=1", "model.in_channels=1"),
    *("data.latent.kind=pixels", "data.latent.factor=1", "data.latent.scaling=1.0", "data.num_workers=0"),
    *("batch.global_batch_size=16", "batch.pack_tokens=2048", "optim.lr=1e-3", "optim.ema_decays=[0.9]"),
    *("parallel.precision=fp32", "parallel.compile=off", "run.device=cpu"),
    *("evaluation.points=0", "data.holdout_fraction=0.1"),
]


def tiny_config(run_dir: Path, shards: Path, *overrides: str) -> Config:
    """The tiny run in `run_dir` on the digits in `shards`, with further overrides."""
    return load_config([*OVERRIDES, f"run.dir={run_dir}", f"data.shards={shards}", *overrides])

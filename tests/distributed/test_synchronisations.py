"""How often the host looks at what the device computes in the optimizer's part of a step: each look waits for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitscale.config.schema import Config
from tests.distributed.spawn import run_ranks, train_here
from tests.tiny import tiny_config


class Looks(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def train_and_count(config: Config) -> list[int]:
    from fitscale.train import step

    original, counts = step.optimizer_step, []

    def counted(engine):
        with Looks() as looks:
            norm = original(engine)
        counts.append(looks.count)
        return norm

    step.optimizer_step = counted
    train_here(config)
    return counts


@pytest.mark.parametrize(
    ("stage", "precision", "looks"), [(0, "fp32", 0), (1, "bf16", 1), (2, "bf16", 0), (3, "bf16", 1)]
)
def test_clipping_and_skipping_are_left_to_the_device(tmp_path, digits_shards, stage, precision, looks):
    """DeepSpeed looks once whether the norm is a number, where it cannot be told not to."""
    layout = (f"parallel.zero_stage={stage}", f"parallel.precision={precision}")
    config = tiny_config(tmp_path / "run", digits_shards, "run.steps=2", "evaluation.points=0", *layout)
    assert run_ranks(train_and_count, 1, config) == [[looks, looks]]

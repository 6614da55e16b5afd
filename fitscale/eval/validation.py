"""The validation loss: held-out images at fixed times and with fixed noise, so that two checkpoints differ by their
weights alone. Cut into chunks, each of which any process may work out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan, open_plan
from fitscale.data.index import OpenIndex
from fitscale.data.loader import PADDING_SLOT, Pack, make_loader
from fitscale.data.packing import PackRule
from fitscale.flow.loss import make_objective
from fitscale.flow.path import VALIDATION, image_noise, lengths_of
from fitscale.model import flops
from fitscale.model.common.layout import pack_layout
from fitscale.plan.evaluation import HELD_OUT_CHUNK_IMAGES
from fitscale.plan.preflight import require_encoding

SEED = 0  # of the held-out images' choice and noise: the same for every run


@dataclass
class ValidationLoss:
    """Of the config's held-out images, mean over `validation_times` fixed times (k + 1/2) / K.

    Noise comes from (fixed seed, k, image); the times are uniform whatever the training drew, so that runs with
    different time distributions can be compared.
    """

    config: Config
    open_index: OpenIndex

    def __post_init__(self) -> None:
        evaluation = self.config.evaluation
        self.plan = plan_of(self.config, "holdout", SEED, evaluation.validation_images, self.open_index)
        self.plan.global_batch_size = min(self.plan.global_batch_size, self.plan.num_images)
        self.count = -(-self.plan.global_batch_size // HELD_OUT_CHUNK_IMAGES)

    @torch.no_grad()
    def compute(self, model: torch.nn.Module, number: int) -> dict[str, np.ndarray]:
        """Slots and losses (S,) of the images of a chunk."""
        rule = PackRule(self.config.batch.pack_tokens, cost=flops.cost(self.config.model))
        (step,) = make_loader(self.plan, rule, range(1), dp_rank=number, dp_size=self.count)
        losses: dict[int, float] = {}
        for pack in step.packs:
            losses.update(zip(pack.slots_S.tolist(), self._losses(model, pack).tolist(), strict=True))
        losses.pop(PADDING_SLOT, None)
        return {"slots": np.array([*losses]), "losses": np.array([*losses.values()], dtype=np.float64)}

    def _losses(self, model: torch.nn.Module, pack: Pack) -> torch.Tensor:
        times = self.config.evaluation.validation_times
        objective = make_objective(self.config.flow, self.config.model)
        device = next(model.parameters()).device
        lengths, slots = lengths_of(pack.cu_seqlens).tolist(), pack.slots_S.tolist()
        layout = pack_layout(pack.sizes_S2, pack.cu_seqlens, device)
        total_S = torch.zeros(len(slots), dtype=torch.float64)
        for k in range(times):
            noise_TC = image_noise(SEED, k, slots, lengths, pack.tokens_TC.shape[1], stream=VALIDATION)
            t_S = torch.full((len(slots),), (k + 0.5) / times, device=device)
            inputs = objective.prepare_at(
                pack.tokens_TC.to(device), pack.labels_S.to(device), pack.cu_seqlens, t_S, noise_TC.to(device)
            )
            outputs = model(inputs.x_TC, inputs.t_S, inputs.labels_S, layout)
            total_S += objective.loss_S(outputs, inputs, pack.cu_seqlens).double().cpu()
        return total_S / times

    def fold(self, chunks: list[Mapping[str, np.ndarray]]) -> np.ndarray:
        """The loss of every image, in the order of their slots."""
        slots, losses = (np.concatenate([chunk[name] for chunk in chunks]) for name in ("slots", "losses"))
        return losses[np.argsort(slots)]


def has_validation(config: Config) -> bool:
    """Whether there are images to measure a validation loss on."""
    return config.evaluation.validation_images > 0 and config.data.holdout_fraction > 0


def plan_of(config: Config, split: str, seed: int, images: int, opened: OpenIndex) -> BatchPlan:
    """A plan of one batch of so many images; UserError if the shards are not what the config says."""
    plan = open_plan(
        config.data,
        seed=seed,
        split=split,
        global_batch_size=images,
        patch_size=config.model.patch_size,
        open_index=opened,
    )
    require_encoding(config, plan)
    return plan

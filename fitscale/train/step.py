"""One optimizer step of one rank: its packs -> loss of each -> backward -> the optimizer; and what the step counts for.

The loss of a step is the mean over the images of the global batch, whatever the ranks and packs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan
from fitscale.data.loader import Pack, StepBatch
from fitscale.flow.loss import image_weights, make_objective
from fitscale.flow.transfer import send
from fitscale.model import flops
from fitscale.model.common.layout import pack_layout
from fitscale.parallel.groups import Topology
from fitscale.parallel.zero import optimizer_step
from fitscale.run.checkpoint import TOTALS
from fitscale.train.health import StepHealth, Watchdog
from fitscale.train.optim import learning_rate
from fitscale.train.timing import PhaseTimer

PackLoss = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # slots (S,), loss of each (S,), share of the batch's loss


class Stepper:
    """Takes optimizer steps with a DeepSpeed engine; `totals` are those since the run's first step."""

    def __init__(self, config: Config, engine: Any, plan: BatchPlan, topology: Topology, watchdog: Watchdog) -> None:
        self.config, self.engine, self.plan, self.topology = config, engine, plan, topology
        self.objective = make_objective(config.flow, config.model)
        self.health, self.watchdog, self.timer = StepHealth(config.health), watchdog, PhaseTimer(topology.device)
        self.totals: dict[str, Any] = dict.fromkeys(TOTALS, 0)

    def take(
        self, batch: StepBatch, votes: Callable[[], Sequence[float]] = tuple
    ) -> tuple[dict[str, Any], list[float]]:
        """One optimizer step; returns the row for metrics.jsonl, and the sums of what all ranks' `votes` say when the
        step is done, which travel with the loss: the host waits for the device once. A collective over all ranks.
        """
        rate = learning_rate(self.config.optim, batch.step, self.config.run.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        losses = self._forward_backward(batch)
        self.watchdog.doing(f"the optimizer of step {batch.step + 1}")
        with self.timer.phase("optimizer"):
            grad_norm = optimizer_step(self.engine)
        loss, grad_norm, *counted = self._everyones(losses, grad_norm, votes())
        finite = self.health.is_finite(loss, grad_norm)
        self._count(batch, finite)
        row = {
            "step": self.totals["step"],
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **({} if finite else {"skipped": True, "images_at_fault": self._images_at_fault(batch, losses)}),
            "lr": rate,
            **{key: self.totals[key] for key in ("images", "tokens", "train_flops")},
            "padding_share": batch.stats.padding_share,
            "imbalance": batch.stats.imbalance,
            "packs": len(batch.packs),
        }
        return row, counted

    def _everyones(self, losses: list[PackLoss], grad_norm: torch.Tensor, votes: Sequence[float]) -> list[float]:
        """The step's loss and gradient norm, and the sums of the votes, on the host."""
        device = self.topology.device
        mine = sum((share.double() for _, _, share in losses), torch.zeros(1, dtype=torch.float64, device=device))
        numbers = torch.cat([mine, send(torch.tensor(votes, dtype=torch.float64), device)])
        dist.all_reduce(numbers)
        numbers[0] /= self.topology.tp_size  # its ranks have the same loss
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=device)  # one number already
        return torch.cat([numbers[:1], norm[None], numbers[1:]]).tolist()

    def _forward_backward(self, batch: StepBatch) -> list[PackLoss]:
        losses = []
        images, tokens = len(batch.batch.tokens_B), int(batch.batch.tokens_B.sum())
        for number, pack in enumerate(batch.packs, start=1):
            self.watchdog.doing(f"pack {number} of {len(batch.packs)} of step {batch.step + 1}")
            self.engine.set_gradient_accumulation_boundary(number == len(batch.packs))
            with self.timer.phase("forward"):
                loss_S, share = self._loss(pack, images, tokens)
            with self.timer.phase("backward"):
                self.engine.backward(share * self.topology.dp_size)  # the engine averages over the ranks
            losses.append((pack.slots_S, loss_S.detach(), share.detach()))
        return losses

    def _loss(self, pack: Pack, images: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of every image of the pack (S,), and the pack's share of the global batch's loss."""
        device = self.topology.device  # sizes and lengths stay on the host, which needs them
        drawn = pack.drawn.moved(lambda tensor: send(tensor, device))
        tokens_TC, labels_S = send(pack.tokens_TC, device), send(pack.labels_S, device)
        inputs = self.objective.prepare(tokens_TC, labels_S, pack.cu_seqlens, drawn)
        layout = pack_layout(pack.sizes_S2, pack.cu_seqlens, device, self.config.parallel.sequence_parallel)
        outputs = self.engine(inputs.x_TC, inputs.t_S, inputs.labels_S, layout)
        loss_S = self.objective.loss_S(outputs, inputs, pack.cu_seqlens)
        weight_S = image_weights(self.config.loss.reduction, pack.cu_seqlens, pack.slots_S, images, tokens)
        return loss_S, (send(weight_S, device) * loss_S).sum()

    def _images_at_fault(self, batch: StepBatch, losses: list[PackLoss]) -> list[str]:
        """Keys of the images whose loss is not finite; of all, if only the gradient is not. A collective."""
        mine = [slot for slots_S, loss_S, _ in losses for slot in slots_S[~loss_S.isfinite().cpu()].tolist()]
        everyones: list[list[int]] = [[] for _ in range(self.topology.world_size)]
        dist.all_gather_object(everyones, mine)
        slots = sorted({slot for rank in everyones for slot in rank if slot >= 0})
        return [self.plan.key(batch.batch, slot) for slot in slots or range(len(batch.batch.images_B))]

    def _count(self, batch: StepBatch, taken: bool) -> None:
        model, totals, tokens_B = self.config.model, self.totals, batch.batch.tokens_B
        sizes, counts = np.unique(tokens_B, return_counts=True)
        step_flops = sum(flops.train_flops(model, int(n)) * int(count) for n, count in zip(sizes, counts, strict=True))
        totals["step"] = batch.step + 1
        totals["optimizer_steps"] += taken
        totals["images"] += len(tokens_B)
        totals["tokens"] += int(tokens_B.sum())
        totals["train_flops"] += step_flops
        totals["paper_flops"] += 3 * flops.paper_macs(model) * len(tokens_B)

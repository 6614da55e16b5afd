"""Training, from a config to a finished run directory.

1. Open the shards' index; check config, data and run directory before anything is written.
2. Build FiT, AdamW with its averages, and the DeepSpeed engine; resume from the newest complete checkpoint.
3. For every step: the batch plan's packs of this rank -> loss of each pack -> backward -> one optimizer step.
4. Log; save at the checkpoint and evaluation steps; keep what evaluation needs.

The loss of a step is the mean over the images of the global batch, whatever the ranks and packs.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, write_atomic
from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan
from fitscale.data.loader import Pack, StepBatch, make_loader
from fitscale.flow.loss import image_weights, make_objective
from fitscale.model import flops
from fitscale.model.fit import FiT
from fitscale.model.initial import initial_items
from fitscale.model.published import read_items
from fitscale.parallel.collective import on_rank_zero
from fitscale.parallel.groups import Topology, init_parallel
from fitscale.parallel.layers import set_value
from fitscale.parallel.zero import building, make_engine, optimizer_step
from fitscale.plan.layout import resolve_precision
from fitscale.plan.preflight import open_data, pad_multiple
from fitscale.run.attempt import begin_attempt
from fitscale.run.claim import claim
from fitscale.run.layout import Checkpoint, RunDir
from fitscale.train import checkpoint as checkpoints
from fitscale.train import start
from fitscale.train.health import StepHealth, Watchdog
from fitscale.train.metrics import Monitor, rewind_metrics
from fitscale.train.optim import AdamWEMA, freeze_untrained, learning_rate
from fitscale.train.preempt import Preempted, Preemption
from fitscale.train.saver import Saver
from fitscale.train.timing import PhaseTimer, Profiler

log = logging.getLogger(__name__)
# Since the run's first step; "optimizer_steps" leaves out those that were skipped.
TOTALS = ("step", "optimizer_steps", "images", "tokens", "train_flops", "paper_flops", "device_hours")


def train(config: Config, until: int | None = None) -> None:
    """Train until `run.steps`, or until step `until` if that comes first, going on from what the run directory holds.

    Stopping at `until` changes nothing but when the rest is computed: schedules go by `run.steps`.

    Raises:
        UserError: the config, the data or the run directory cannot be right; nothing has been written then.
    """
    if not config.run.dir:
        raise UserError("run.dir: must be given, in a config file or as run.dir=PATH")
    plan = open_data(config)
    timeout = timedelta(minutes=config.health.timeout_min)
    topology = init_parallel(config.parallel, config.run.device, timeout)
    config = resolve_precision(config, topology.device.type == "cuda")
    run = on_rank_zero(lambda: claim(config))
    Trainer(config, run, plan, topology, until).run_to_end()


PackLoss = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # slots (S,), loss of each (S,), share of the batch's loss


class Trainer:
    """One process's part of a run."""

    def __init__(
        self, config: Config, run: RunDir, plan: BatchPlan, topology: Topology, until: int | None = None
    ) -> None:
        self.config, self.run, self.plan, self.topology = config, run, plan, topology
        self.last_step = min(config.run.steps, until or config.run.steps)
        self.objective = make_objective(config.flow, config.model.num_classes)
        self.totals: dict[str, Any] = dict.fromkeys(TOTALS, 0)
        self.evaluation_steps = set(config.evaluation.steps(config.run.steps))
        keep_steps = self.evaluation_steps | {config.run.steps}
        found = self._find_checkpoint()
        self.attempt = on_rank_zero(lambda: begin_attempt(run, found.step if found else 0))
        self.preemption = Preemption(topology.device)
        self.saver = Saver(self.attempt, config.optim.ema_decays, config.checkpoint.keep_last, keep_steps)
        self.health = StepHealth(config.health)
        self.timer, self.profiler = PhaseTimer(topology.device), Profiler(config.profile, run.path / "profile")
        self.watchdog = Watchdog(config.health.timeout_min, topology.rank, run.events)
        self.skipped_samples = 0
        self.engine = self._build_engine(found)

    def _find_checkpoint(self) -> Checkpoint | None:
        found = on_rank_zero(lambda: checkpoints.newest_checkpoint(self.run))
        if found is not None:
            checkpoints.require_same_model(found, self.config.model)
        return found

    def _build_engine(self, found: Checkpoint | None) -> Any:
        """FiT (weights of `found`, of `run.init_weights` or fresh), its optimizer, and DeepSpeed around both."""
        config = self.config
        with building(config.parallel, config.optim, self.topology):
            model = FiT(config.model, config.parallel)
        start = found.weights("raw") if found else config.run.init_weights
        for parameter, piece in read_items(model, Path(start)) if start else initial_items(model, config.run.seed):
            set_value(parameter, piece)
        freeze_untrained(model.named_parameters(), config.optim.trainable)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamWEMA(trained, config.optim)
        engine = make_engine(model, optimizer, config.parallel, config.optim, self.topology)
        if found is not None:
            checkpoints.load_optimizer(found, engine, config.optim.ema_decays)
            self.totals = {key: found.meta[key] for key in TOTALS}
        if dist.get_rank() == 0:
            with self.attempt.writing():
                rewind_metrics(self.run.metrics, self.totals["step"])
        return engine

    def run_to_end(self) -> None:
        """Take the steps that are left."""
        first_step = self.totals["step"]
        if first_step >= self.last_step:
            log.info("%s has all its steps up to %d", self.run.path, self.last_step)
            self._end_attempt("finished before")
            return
        self.logged_step = first_step
        monitor = self._start_monitor(first_step) if dist.get_rank() == 0 else None
        with self.watchdog, self.preemption:
            stop = self._take_steps(self._loader(first_step), monitor)
            self.watchdog.doing("saving the last checkpoint")
            saved = self.saver.wait()
        if monitor:
            monitor.close()
        self._end_attempt(stop.name if stop else f"reached step {self.last_step}" if saved else "not saved")
        if stop:
            raise Preempted(stop)
        if not saved:
            raise UserError(f"{self.run.path}: the last checkpoint could not be saved; make room and start again")

    def _end_attempt(self, reason: str) -> None:
        if dist.get_rank() == 0:
            self.attempt.end(reason, self.totals["step"])

    def _take_steps(self, loader: Iterator[StepBatch], monitor: Monitor | None) -> signal.Signals | None:
        """All steps, or those until the ranks agree on a signal, which is returned: that step is saved then."""
        started, hours_before = time.perf_counter(), self.totals["device_hours"]
        for batch in self._timed(loader, monitor):
            self.profiler.before(batch.step + 1)
            row = self._step(batch)
            self.profiler.after(row["step"])
            spent_h = (time.perf_counter() - started) / 3600
            self.totals["device_hours"] = hours_before + spent_h * self.topology.world_size
            self._report(row, batch, monitor)
            stop = self.preemption.agreed()
            self._save_if_due(row["step"], at_once=stop is not None)
            if stop:
                return stop
            if self.health.bad_in_row:
                self.saver.wait()
                self.health.require_progress(row["step"])
        return None

    def _report(self, row: dict[str, Any], batch: StepBatch, monitor: Monitor | None) -> None:
        step, skipped = row["step"], row["loss"] is None or row["grad_norm"] is None
        if monitor:
            self.attempt.require_own()
        if skipped or step % self.config.run.log_every == 0 or step == self.config.run.steps:
            phases = self.timer.read(step - self.logged_step)
            self.logged_step = step
            if monitor:
                monitor.log(row, phases)
        median = None if skipped else self.health.spike(row["loss"])
        if monitor and median is not None:
            images = [self.plan.key(batch.batch, slot) for slot in range(len(batch.batch.images_B))]
            event = {"event": "loss spike", "step": step, "loss": row["loss"], "median": median, "images": images}
            append_jsonl(self.run.events, {"time_unix_s": time.time(), **event})

    def _start_monitor(self, first_step: int) -> Monitor:
        with self.attempt.writing():
            write_atomic(self.run.environment, json.dumps(start.environment(self.topology), indent=1))
        batch = self.plan.step(first_step)
        tokens = float(np.mean(batch.rows_B * batch.cols_B))
        print(start.start_table(self.config, self.topology, tokens, self._images_used(), first_step), flush=True)
        return Monitor(self.config, self.attempt, first_step, self.topology.world_size, self.topology.device)

    def _images_used(self) -> str:
        """How many images there are to train on, by shard set."""
        names, streams = self.config.data.sources, self.plan.streams
        if len(streams) == 1:
            return f"{self.plan.num_images:,}"
        shares = [float(weight / sum(self.plan.weights)) for weight in self.plan.weights]
        parts = zip(names, streams, shares, strict=True)
        return ", ".join(f"{stream.num_images:,} of {name} ({share:.1%})" for name, stream, share in parts)

    def _loader(self, first_step: int) -> Iterator[StepBatch]:
        config, topology = self.config, self.topology
        return make_loader(
            self.plan,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            pack_tokens=config.batch.pack_tokens,
            pad_multiple=pad_multiple(config),
            cost=flops.cost(config.model),
            first_step=first_step,
            last_step=self.last_step,
            num_workers=config.data.num_workers,
            prefetch_steps=config.data.prefetch_steps,
            on_error=config.data.on_error,
        )

    def _timed(self, loader: Iterator[StepBatch], monitor: Monitor | None) -> Iterator[StepBatch]:
        """The loader's batches. Waits are timed from the second on; until the first there is the readers' start."""
        first_step = self.totals["step"]
        while True:
            asked = time.perf_counter()
            self.watchdog.doing(f"waiting for the data of step {self.totals['step'] + 1}")
            batch = next(loader, None)
            if batch is None:
                return
            if batch.step > first_step:
                self.timer.waited(time.perf_counter() - asked)
            elif monitor:
                monitor.start_counting(self.totals)
            for problem in batch.skipped if self.topology.tp_rank == 0 else ():
                self.skipped_samples += 1
                event = {"event": "sample skipped", "step": batch.step + 1, "rank": self.topology.rank}
                event |= {"problem": problem, "skipped_by_rank": self.skipped_samples}
                append_jsonl(self.run.events, {"time_unix_s": time.time(), **event})
            yield batch

    def _step(self, batch: StepBatch) -> dict[str, Any]:
        """One optimizer step; returns the row for metrics.jsonl."""
        rate = learning_rate(self.config.optim, batch.step, self.config.run.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        tokens_B = batch.batch.tokens_B
        losses = self._forward_backward(batch, len(tokens_B), int(tokens_B.sum()))
        self.watchdog.doing(f"the optimizer of step {batch.step + 1}")
        with self.timer.phase("optimizer"):
            grad_norm = optimizer_step(self.engine)
        loss = sum((share.double() for _, _, share in losses), torch.zeros((), device=self.topology.device))
        dist.all_reduce(loss, group=self.engine.data_parallel_group)
        finite = self.health.is_finite(loss.item(), grad_norm)
        self._count(batch.step + 1, tokens_B, finite)
        return {
            "step": batch.step + 1,
            "loss": loss.item() if math.isfinite(loss.item()) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **({} if finite else {"skipped": True, "images_at_fault": self._images_at_fault(batch, losses)}),
            "lr": rate,
            **{key: self.totals[key] for key in ("images", "tokens", "train_flops")},
            "padding_share": batch.stats.padding_share,
            "imbalance": batch.stats.imbalance,
            "packs": len(batch.packs),
        }

    def _forward_backward(self, batch: StepBatch, images: int, tokens: int) -> list[PackLoss]:
        losses = []
        for number, pack in enumerate(batch.packs):
            self.watchdog.doing(f"pack {number + 1} of {len(batch.packs)} of step {batch.step + 1}")
            self.engine.set_gradient_accumulation_boundary(number == len(batch.packs) - 1)
            with self.timer.phase("forward"):
                loss_S, share = self._loss(pack, batch.step, images, tokens)
            with self.timer.phase("backward"):
                self.engine.backward(share * self.topology.dp_size)  # the engine averages over the ranks
            losses.append((pack.slots_S, loss_S.detach(), share.detach()))
        return losses

    def _images_at_fault(self, batch: StepBatch, losses: list[PackLoss]) -> list[str]:
        """Keys of the images whose loss is not finite; of all, if only the gradient is not. A collective."""
        mine = [slots_S[~loss_S.isfinite().cpu()].tolist() for slots_S, loss_S, _ in losses]
        everyones: list[list[list[int]]] = [[] for _ in range(self.topology.world_size)]
        dist.all_gather_object(everyones, mine)
        slots = sorted({slot for rank in everyones for pack in rank for slot in pack if slot >= 0})
        return [self.plan.key(batch.batch, slot) for slot in slots or range(len(batch.batch.images_B))]

    def _loss(self, pack: Pack, step: int, images: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of every image of the pack (S,), and the pack's share of the global batch's loss."""
        device = self.topology.device  # sizes and lengths stay on the host, which needs them
        inputs = self.objective.prepare(
            pack.tokens_TC.to(device),
            pack.labels_S.to(device),
            pack.slots_S,
            pack.cu_seqlens,
            seed=self.config.run.seed,
            step=step,
        )
        output_TC = self.engine(inputs.x_TC, inputs.t_S, inputs.labels_S, pack.sizes_S2, pack.cu_seqlens)
        loss_S = self.objective.loss_S(output_TC, inputs, pack.cu_seqlens)
        weight_S = image_weights(self.config.loss.reduction, pack.cu_seqlens, pack.slots_S, images, tokens).to(device)
        return loss_S, (weight_S * loss_S).sum()

    def _count(self, step: int, tokens_B: np.ndarray, taken: bool) -> None:
        model, totals = self.config.model, self.totals
        sizes, counts = np.unique(tokens_B, return_counts=True)
        step_flops = sum(flops.train_flops(model, int(n)) * int(count) for n, count in zip(sizes, counts, strict=True))
        totals["step"] = step
        totals["optimizer_steps"] += taken
        totals["images"] += len(tokens_B)
        totals["tokens"] += int(tokens_B.sum())
        totals["train_flops"] += step_flops
        totals["paper_flops"] += 3 * flops.paper_macs(model) * len(tokens_B)

    def _save_if_due(self, step: int, at_once: bool) -> None:
        config = self.config
        last = step == self.last_step
        if not (at_once or last or step in self.evaluation_steps or step % config.checkpoint.every_steps == 0):
            return
        self.watchdog.doing(f"saving step {step}")
        with self.timer.phase("save"):
            self.saver.save(self.engine, {**self.totals, "model": asdict(config.model)})

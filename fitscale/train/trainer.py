"""Training, from a config to a finished run directory.

1. Open the shards' index; check config, data and run directory before anything is written.
2. Build the network, AdamW with its EMA, and the DeepSpeed engine; resume from the newest complete checkpoint.
3. For every step: the batch plan's packs of this rank -> one optimizer step (step.py).
4. Log; save at the checkpoint and evaluation steps; keep what evaluation needs.
"""

import json
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, write_atomic
from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan
from fitscale.data.loader import StepBatch, make_loader
from fitscale.model.build import build_network, initial_items
from fitscale.model.weights import read_items
from fitscale.parallel.groups import Topology, init_parallel, on_rank_zero
from fitscale.parallel.layers import set_value
from fitscale.parallel.zero import building, make_engine
from fitscale.plan.layout import resolve_precision
from fitscale.plan.preflight import open_data, pack_rule
from fitscale.run.attempt import begin_attempt
from fitscale.run.claim import claim
from fitscale.run.layout import Checkpoint, RunDir
from fitscale.train import checkpoint as checkpoints
from fitscale.train import start
from fitscale.train.health import Watchdog
from fitscale.train.metrics import Monitor, rewind_metrics
from fitscale.train.optim import AdamWEMA, freeze_untrained, is_named
from fitscale.train.preempt import Preempted, Preemption
from fitscale.train.saver import Saver
from fitscale.train.step import TOTALS, Stepper
from fitscale.train.timing import Profiler

log = logging.getLogger(__name__)


def train(config: Config, until: int | None = None) -> None:
    """Train until `run.steps`, or until step `until` if that comes first, going on from what the run directory holds.

    Stopping at `until` changes nothing but when the rest is computed: schedules go by `run.steps`.

    Raises:
        UserError: the config, the data or the run directory cannot be right; nothing has been written then.
    """
    plan = open_data(config)
    timeout = timedelta(minutes=config.health.timeout_min)
    topology = init_parallel(config.parallel, config.run.device, timeout)
    config = resolve_precision(config, topology.device.type == "cuda")
    run = on_rank_zero(lambda: claim(config))
    Trainer(config, run, plan, topology, until).run_to_end()


class Trainer:
    """One process's part of a run."""

    def __init__(self, config: Config, run: RunDir, plan: BatchPlan, topology: Topology, until: int | None) -> None:
        self.config, self.run, self.plan, self.topology = config, run, plan, topology
        self.last_step = min(config.run.steps, until or config.run.steps)
        self.evaluation_steps = set(config.evaluation.steps(config.run.steps))
        found = on_rank_zero(lambda: checkpoints.newest_checkpoint(run))
        if found is not None:
            checkpoints.require_same_model(found, config.model)
        self.attempt = on_rank_zero(lambda: begin_attempt(run, found.step if found else 0))
        self.preemption = Preemption(topology.device)
        keep_steps = self.evaluation_steps | {config.run.steps}
        self.saver = Saver(self.attempt, config.optim.ema_decays, config.checkpoint.keep_last, keep_steps)
        self.profiler = Profiler(config.profile, run.path / "profile")
        self.watchdog = Watchdog(config.health.timeout_min, topology.rank, run.events)
        self.skipped_samples = 0
        self.engine = self._build_engine(found)
        self.stepper = Stepper(config, self.engine, plan, topology, self.watchdog)
        self.totals = self.stepper.totals
        if found is not None:
            self.totals.update({key: found.meta[key] for key in TOTALS})
        self.logged_step = self.totals["step"]
        if dist.get_rank() == 0:
            with self.attempt.writing():
                rewind_metrics(run.metrics, self.totals["step"])

    def _build_engine(self, found: Checkpoint | None) -> Any:
        """The network (weights of `found`, `run.init_weights` or fresh), its optimizer, and DeepSpeed around both."""
        config = self.config
        with building(config, self.topology):
            model = build_network(config.model, config.parallel)
        start = found.weights("raw") if found else config.run.init_weights
        for parameter, piece in read_items(model, Path(start)) if start else initial_items(model, config.run.seed):
            set_value(parameter, piece)
        if found is None and config.run.reset:
            fresh = {parameter for name, parameter in model.named_parameters() if is_named(name, config.run.reset)}
            for parameter, piece in initial_items(model, config.run.seed):
                if parameter in fresh:
                    set_value(parameter, piece)
        freeze_untrained(model.named_parameters(), config.optim.trainable)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamWEMA(trained, config.optim)
        engine = make_engine(model, optimizer, config, self.topology)
        if found is not None:
            checkpoints.load_optimizer(found, engine, config.optim.ema_decays)
        return engine

    def run_to_end(self) -> None:
        """Take the steps that are left."""
        if self.totals["step"] >= self.last_step:
            log.info("%s has all its steps up to %d", self.run.path, self.last_step)
            self._end_attempt("finished before")
            return
        monitor = self._start_monitor() if dist.get_rank() == 0 else None
        with self.watchdog, self.preemption, self.saver:
            stop = self._take_steps(monitor)
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

    def _start_monitor(self) -> Monitor:
        with self.attempt.writing():
            write_atomic(self.run.environment, json.dumps(start.environment(self.topology), indent=1))
        print(start.start_table(self.config, self.topology, self.plan, self.totals["step"]), flush=True)
        return Monitor(self.config, self.attempt, self.totals, self.topology)

    def _take_steps(self, monitor: Monitor | None) -> signal.Signals | None:
        """All steps, or those until the ranks agree on a signal, which is returned: that step is saved then."""
        started, hours_before = time.perf_counter(), self.totals["device_hours"]
        for batch in self._timed(self._loader(), monitor):
            with self.profiler.step(batch.step + 1):
                row = self.stepper.take(batch)
            spent_h = (time.perf_counter() - started) / 3600
            self.totals["device_hours"] = hours_before + spent_h * self.topology.world_size
            self._report(row, batch, monitor)
            stop = self.preemption.agreed()
            self._save_if_due(row["step"], at_once=stop is not None)
            if stop:
                return stop
            if "skipped" in row:
                self.saver.wait()
                self.stepper.health.require_progress(row["step"])
        return None

    def _loader(self) -> Iterator[StepBatch]:
        config, topology = self.config, self.topology
        steps = range(self.totals["step"], self.last_step)
        return make_loader(self.plan, pack_rule(config), steps, config.data, topology.dp_rank, topology.dp_size)

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
                self.stepper.timer.waits.append(time.perf_counter() - asked)
            elif monitor:
                monitor.start_counting(self.totals)
            for problem in batch.skipped if self.topology.tp_rank == 0 else ():
                self.skipped_samples += 1
                skipped = {"problem": problem, "skipped_by_rank": self.skipped_samples}
                self._note("sample skipped", step=batch.step + 1, rank=self.topology.rank, **skipped)
            yield batch

    def _report(self, row: dict[str, Any], batch: StepBatch, monitor: Monitor | None) -> None:
        step, skipped = row["step"], "skipped" in row
        if monitor:
            self.attempt.require_own()
        if skipped or step % self.config.run.log_every == 0 or step == self.config.run.steps:
            phases = self.stepper.timer.read(step - self.logged_step)
            self.logged_step = step
            if monitor:
                monitor.log(row, phases)
        median = None if skipped else self.stepper.health.spike(row["loss"])
        if monitor and median is not None:
            images = [self.plan.key(batch.batch, slot) for slot in range(len(batch.batch.images_B))]
            self._note("loss spike", step=step, loss=row["loss"], median=median, images=images)

    def _note(self, event: str, **about: Any) -> None:
        append_jsonl(self.run.events, {"time_unix_s": time.time(), "event": event, **about})

    def _save_if_due(self, step: int, at_once: bool) -> None:
        last = step == self.last_step
        if at_once or last or step in self.evaluation_steps or step % self.config.checkpoint.every_steps == 0:
            self.watchdog.doing(f"saving step {step}")
            with self.stepper.timer.phase("save"):
                self.saver.save(self.engine, {**self.totals, "model": asdict(self.config.model)})

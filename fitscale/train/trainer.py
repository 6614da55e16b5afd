"""Training, from a config to a finished run directory.

1. Open the shards' index; check config, data and run directory before anything is written.
2. Build the network, AdamW with its EMA, and the DeepSpeed engine; resume from the newest intact checkpoint.
3. For every step: the batch plan's packs of this rank -> one optimizer step (step.py).
4. Log; save at the checkpoint and evaluation steps; keep what evaluation needs.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fitscale.config.errors import UserError, writing
from fitscale.config.files import append_jsonl, write_atomic
from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan
from fitscale.data.loader import StepBatch, make_loader
from fitscale.flow.path import draws
from fitscale.model.build import build_network, initial_items
from fitscale.model.weights import read_items
from fitscale.parallel.groups import Topology, init_parallel, on_rank_zero
from fitscale.parallel.layers import set_value
from fitscale.parallel.zero import building, make_engine
from fitscale.plan.layout import resolve_compile, resolve_precision
from fitscale.plan.preflight import open_data, pack_rule
from fitscale.run.attempt import Attempt, TakenOverError, begin_attempt
from fitscale.run.checkpoint import TOTALS, Checkpoint
from fitscale.run.claim import claim
from fitscale.train import checkpoint as checkpoints
from fitscale.train import start
from fitscale.train.health import Watchdog
from fitscale.train.metrics import Monitor, rewind_metrics
from fitscale.train.optim import AdamWEMA, decay_groups, freeze_untrained, is_named
from fitscale.train.preempt import Preempted, Preemption, Stop, agreed
from fitscale.train.saver import Saver
from fitscale.train.step import Stepper
from fitscale.train.timing import Profiler


def train(config: Config, until: int | None = None) -> None:
    """Train until `run.steps`, or until step `until` if that comes first, going on from what the run directory holds.

    Stopping at `until` changes nothing but when the rest is computed: schedules go by `run.steps`.

    Raises:
        UserError: the config, the data or the run directory cannot be right, and nothing has been written then; or
            training cannot go on: steps that are not finite, a full disk.
        Preempted: a signal has ended training, which has saved.
    """
    plan = open_data(config)
    timeout = timedelta(minutes=config.health.timeout_min)
    topology = init_parallel(config.parallel, config.run.device, timeout)
    on_cuda = topology.device.type == "cuda"
    config = resolve_compile(resolve_precision(config, on_cuda), on_cuda)
    start.choose_compiler(config.parallel, topology)
    run = on_rank_zero(lambda: claim(config))
    found = checkpoints.newest_checkpoint(run)
    if found is not None:
        checkpoints.require_same_model(found, config.model)
    step, last_step = found.step if found else 0, min(config.run.steps, until or config.run.steps)
    attempt = on_rank_zero(lambda: begin_attempt(run, step))
    if step < last_step:
        Trainer(config, attempt, plan, topology, found, last_step).run_to_end()
    elif topology.rank == 0:
        attempt.end("finished before", step)
        print(start.nothing_to_do(config, step), flush=True)


class Trainer:
    """One process's part of a run."""

    def __init__(
        self,
        config: Config,
        attempt: Attempt,
        plan: BatchPlan,
        topology: Topology,
        found: Checkpoint | None,
        last_step: int,
    ) -> None:
        """All as it was after the checkpoint `found`, or is before the first step; a collective over all ranks."""
        self.config, self.attempt, self.run, self.plan, self.topology = config, attempt, attempt.run, plan, topology
        self.last_step, self.evaluation_steps = last_step, set(config.evaluation.steps(config.run.steps))
        self.preemption, self.write_error = Preemption(), ""
        keep_steps = self.evaluation_steps | {config.run.steps}
        self.profiler = Profiler(config.profile, self.run.path / "profile")
        self.watchdog = Watchdog(config.health.timeout_min, topology.rank, self.run.events)
        self.skipped_samples = 0
        self.engine = self._build_engine(found)
        self.saver = Saver(attempt, self.engine, config.optim.ema_decays, config.checkpoint.keep_last, keep_steps)
        self.stepper = Stepper(config, self.engine, plan, topology, self.watchdog)
        self.totals = self.stepper.totals
        if found is not None:
            self.totals.update({key: found.meta[key] for key in TOTALS})
        self.logged_step = self.totals["step"]
        on_rank_zero(lambda: rewind_metrics(attempt, found))

    def _build_engine(self, found: Checkpoint | None) -> Any:
        """The network (weights of `found`, `run.init_weights` or fresh), its optimizer, and DeepSpeed around both."""
        config = self.config
        with building(config, self.topology):
            model = build_network(config.model, config.parallel)
        items = initial_items(model, config.run.seed)
        if found is not None:
            items = read_items(model, found.weights("raw"), verify=False)  # `newest_checkpoint` has
        elif config.run.init_weights:
            items = read_items(model, Path(config.run.init_weights))
        for parameter, piece in items:
            set_value(parameter, piece)
        if found is None and config.run.reset:
            fresh = {parameter for name, parameter in model.named_parameters() if is_named(name, config.run.reset)}
            for parameter, piece in initial_items(model, config.run.seed):
                if parameter in fresh:
                    set_value(parameter, piece)
        freeze_untrained(model.named_parameters(), config.optim.trainable)
        optimizer = AdamWEMA(decay_groups(model.named_parameters(), config.optim), config.optim)
        engine = make_engine(model, optimizer, config, self.topology)
        if found is not None:
            checkpoints.load_optimizer(found, engine, config.optim.ema_decays)
        return engine

    def run_to_end(self) -> None:
        """Take the steps that are left; raises as `train`."""
        monitor = self._start_monitor() if dist.get_rank() == 0 else None
        with self.watchdog, self.preemption, self.saver:
            stop = self._take_steps(monitor)
            if stop is None and on_rank_zero(lambda: self.write_error):  # of the last step
                stop = Stop.CANNOT_WRITE
            self.watchdog.doing("saving the last checkpoint")
            not_saved = self.saver.wait()
        if monitor:
            monitor.close()
            reason = "not saved" if not_saved else f"reached step {self.last_step}"
            self.attempt.end(stop.name if stop else reason, self.totals["step"])
        if stop == Stop.CANNOT_WRITE:
            step = f"step {self.totals['step']} {'could not be saved either' if not_saved else 'is saved'}"
            raise UserError(f"{on_rank_zero(lambda: self.write_error)}; {step}: mend that and start again")
        if stop:
            raise Preempted(stop)
        if not_saved:
            raise UserError(f"{not_saved}; mend that and start again")

    def _start_monitor(self) -> Monitor:
        with writing(self.run.path):
            with self.attempt.writing():
                write_atomic(self.run.environment, json.dumps(start.environment(self.topology), indent=1))
            print(start.start_table(self.config, self.topology, self.plan, self.totals["step"]), flush=True)
            return Monitor(self.config, self.attempt, self.totals, self.topology)

    def _take_steps(self, monitor: Monitor | None) -> Stop | None:
        """All steps, or those until the ranks agree to stop, for the reason returned: that step is saved then."""
        started, hours_before = time.perf_counter(), self.totals["device_hours"]
        for batch in self._timed(self._loader(), monitor):
            with self.profiler.step(batch.step + 1):
                row, votes = self.stepper.take(batch, self.preemption.votes)
            spent_h = (time.perf_counter() - started) / 3600
            self.totals["device_hours"] = hours_before + spent_h * self.topology.world_size
            self._report(row, batch, monitor)
            stop, last = agreed(votes), row["step"] == self.config.run.steps
            if not (last and "skipped" in row):
                self._save_if_due(row["step"], at_once=stop is not None, unwritten=monitor.unwritten if monitor else [])
            if "skipped" in row and (last or not stop):
                self.saver.settle()
                self.stepper.health.require_progress(row["step"], last)
            if stop:
                return stop
        return None

    def _loader(self) -> Iterator[StepBatch]:
        config, topology = self.config, self.topology
        steps = range(self.totals["step"], self.last_step)
        channels, flow = config.model.token_channels, config.flow
        draw = partial(draws, config.run.seed, channels=channels, times=flow.times, label_drop=flow.label_drop)
        return make_loader(self.plan, pack_rule(config), steps, config.data, topology.dp_rank, topology.dp_size, draw)

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
                self._log(monitor, row, phases)
        median = None if skipped else self.stepper.health.spike(row["loss"])
        if monitor and median is not None:
            images = [self.plan.key(batch.batch, slot) for slot in range(len(batch.batch.images_B))]
            self._note("loss spike", step=step, loss=row["loss"], median=median, images=images)

    def _log(self, monitor: Monitor, row: dict[str, Any], phases: dict[str, float]) -> None:
        try:
            monitor.log(row, phases)
        except TakenOverError:
            raise
        except UserError as error:
            self.write_error, self.preemption.heard = str(error), Stop.CANNOT_WRITE

    def _note(self, event: str, **about: Any) -> None:
        with suppress(OSError):  # where there is no room, training ends for what it cannot log
            append_jsonl(self.run.events, {"time_unix_s": time.time(), "event": event, **about})

    def _save_if_due(self, step: int, at_once: bool, unwritten: list[dict[str, Any]]) -> None:
        last = step == self.last_step
        if at_once or last or step in self.evaluation_steps or step % self.config.checkpoint.every_steps == 0:
            self.watchdog.doing(f"saving step {step}")
            with self.stepper.timer.phase("save"):
                meta = {**self.totals, "model": asdict(self.config.model)}
                self.saver.save(meta | ({"unwritten": unwritten} if unwritten else {}))

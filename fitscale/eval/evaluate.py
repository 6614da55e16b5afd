"""What a checkpoint is worth: validation loss, and figures of generated images.

1. The validation loss (validation.py).
2. Generated images with the labels and sizes of the data set (or of one size), seen through every feature network and
   compared with its reference (samples.py, figures.py).

Each of the two is a fold over chunks that any number of processes work out, each chunk from its number alone, in a
folder of the run directory (run/chunks.py). Who finds all of them finished folds them in their order, adds the rows to
evaluations.jsonl, and clears the folder away. So the rows are the same bytes for any number of ranks and starts.

Every result is one line of evaluations.jsonl, with the comparability key of the circumstances that shift it: only
results with equal keys may be fitted or ranked together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitscale.config.errors import UserError, writing
from fitscale.config.files import append_jsonl, read_jsonl, require_kinds
from fitscale.config.schema import Config, ModelConfig, ParallelConfig
from fitscale.config.schema_sampling import SamplingConfig
from fitscale.data.batch_plan import BatchPlan
from fitscale.data.encoding import patches
from fitscale.data.index import OpenIndex, open_index
from fitscale.eval.checkpoints import find_checkpoint, load_networks, weights_name
from fitscale.eval.draw import Networks
from fitscale.eval.features import FeatureNet
from fitscale.eval.figures import Figure
from fitscale.eval.images import data_identity
from fitscale.eval.mirror import mirror_evaluation
from fitscale.eval.ranks import Compute, carry_out
from fitscale.eval.reference import load_reference, reference_cache
from fitscale.eval.requests import Request
from fitscale.eval.samples import Eye, Samples
from fitscale.eval.validation import ValidationLoss, has_validation, plan_of
from fitscale.parallel.groups import init_parallel, on_rank_zero, tp_broadcast
from fitscale.run.checkpoint import MARKER, TOTALS, Checkpoint
from fitscale.run.chunks import ChunkFolder
from fitscale.run.comparability import digest, metric_name, sample_key, validation_key
from fitscale.run.layout import EVALUATIONS, RunDir

Row = dict[str, Any]
COPIED = ("train_flops", "paper_flops", "images", "tokens", "device_hours")  # from the checkpoint into every row


@dataclass(frozen=True)
class EvaluationOptions:
    """What of an evaluation no config says; `size` is (height, width) in pixels, None for those of the data set."""

    model: ModelConfig  # as trained, or with other positions
    size: tuple[int, int] | None = None
    seed: int = 0
    device: str = "auto"
    force: bool = False
    open_index: OpenIndex = open_index


class Evaluator:
    """Measures checkpoints of one run as `config` asks. On the CPU a rank computes on one core, as one core rounds.

    What is there already, under the same key, is not measured again unless `options.force`. `options.model` is for the
    generated images; the validation loss is that of the model as it was trained.
    """

    def __init__(self, config: Config, run: RunDir, options: EvaluationOptions) -> None:
        self.config, self.run, self.options = config, run, options
        self.topology = init_parallel(
            ParallelConfig(tensor_parallel_size=config.evaluation.tensor_parallel_size), options.device
        )
        if self.topology.device.type == "cpu":
            torch.set_num_threads(1)
        self._loaded: tuple[object, Networks] | None = None
        self.since = 0
        if options.force:  # the same for all ranks, and for a start that goes on with it
            self.since = on_rank_zero(lambda: len(read_jsonl(run.evaluations)))
        evaluation, device = config.evaluation, self.topology.device
        self.nets = [FeatureNet(path, device, evaluation.trusted, name) for name, path in evaluation.networks.items()]

    def evaluate(self, step: int) -> Iterator[Row]:
        """The rows of the checkpoint of `step` that were missing, in the order of evaluations.jsonl, to which they are
        added by this process or another.

        Raises:
            UserError: no such checkpoint, weights, network or reference.
        """
        if has_validation(self.config):
            at = self._at(step, self.config.sampling)
            yield from at.carry_out(at.validation_work())
        if self.config.evaluation.networks:
            yield from self.samples(step, self.config.sampling)

    def samples(self, step: int, sampling: SamplingConfig) -> Iterator[Row]:
        """Of these, the rows of generated images, drawn by `sampling`."""
        at = self._at(step, sampling)
        yield from at.carry_out(at.samples_work())

    def known(self, step: int, sampling: SamplingConfig) -> list[Row]:
        """Of the rows of generated images, drawn by `sampling`, those that evaluations.jsonl has."""
        at = self._at(step, sampling)
        return at.measured(at.samples_work())

    def _at(self, step: int, sampling: SamplingConfig) -> "_At":
        checkpoint = find_checkpoint(self.run, step)
        weights = weights_name(self.config, checkpoint, self.config.evaluation.weights)
        return _At(self, checkpoint, weights, replace(self.config, model=self.options.model, sampling=sampling))

    def networks(self, weights: Path, config: Config) -> Networks:
        """What draws by `config`; the same as for the call before where that needed the same."""
        guidance = config.sampling.guidance
        needed = (weights, config.model, guidance.guide, guidance.guide_step, guidance.guide_weights)
        if self._loaded is None or self._loaded[0] != needed:
            self._loaded = (needed, load_networks(config, weights, self.options.device))
        return self._loaded[1]

    @cached_property
    def plan(self) -> BatchPlan:
        """One batch of as many training images as are generated: their labels, and their sizes unless one is given."""
        options, samples = self.options, self.config.evaluation.samples
        return plan_of(self.config, "train", options.seed, samples, options.open_index)

    @cached_property
    def data(self) -> dict[str, str]:
        """Hash of the shards, from which the held-out images come, and the labels and sizes of the generated ones."""
        return {"data": data_identity(*(stream.index for stream in self.plan.streams))[:16]}

    @cached_property
    def eyes(self) -> list[Eye]:
        """Every feature network with its reference."""
        config, cache = self.config, reference_cache(self.run)
        paths = [Path(config.evaluation.reference_of(net.name)) for net in self.nets]
        seen = [
            load_reference(path, net, config.data, cache, self.options.open_index)
            for path, net in zip(paths, self.nets, strict=True)
        ]
        return [Eye(net, reference) for net, reference in zip(self.nets, seen, strict=True)]

    @cached_property
    def requests(self) -> list[Request]:
        """Labels and sizes follow the training images in an order drawn from the seed."""
        batch = self.plan.step(0)
        rows, cols = batch.rows_B.tolist(), batch.cols_B.tolist()
        if self.options.size is not None:
            height, width = patches(self.config, *self.options.size)
            rows, cols = [height] * len(rows), [width] * len(cols)
        return [Request(i, label, rows[i], cols[i]) for i, label in enumerate(batch.labels_B.tolist())]


@dataclass
class _At:
    """One checkpoint and its weights."""

    evaluator: Evaluator
    checkpoint: Checkpoint
    weights: str
    drawn: Config  # with the positions and the sampling of the generated images

    def __post_init__(self) -> None:
        self.config, self.run, self.options = self.evaluator.config, self.evaluator.run, self.evaluator.options

    def networks(self, config: Config) -> Networks:
        return self.evaluator.networks(self.checkpoint.weights(self.weights), config)

    def validation_work(self) -> "_Work":
        key = validation_key(self.config, self.weights) | self.evaluator.data
        loss = ValidationLoss(self.config, self.options.open_index)

        def compute(number: int, show: Callable[[int], Any]) -> Mapping[str, np.ndarray]:
            arrays = loss.compute(self.networks(self.config).model, number)
            show(len(arrays["slots"]))
            return arrays

        def fold(folder: ChunkFolder) -> list[Row]:
            loss_S = loss.fold([folder.read(number) for number in range(loss.count)])
            error = float(loss_S.std(ddof=1) / len(loss_S) ** 0.5) if len(loss_S) > 1 else None
            return [self._row(Figure("validation_loss", float(loss_S.mean()), error), key, len(loss_S), None)]

        images, wanted = loss.plan.global_batch_size, [("validation_loss", key)]
        return _Work("validation", wanted, loss.count, images, compute, fold)

    def samples_work(self) -> "_Work":
        evaluator, options = self.evaluator, self.options
        shared = sample_key(self.drawn, self.weights, options.size, options.seed) | evaluator.data
        keys = {eye.net.name: shared | eye.identity for eye in evaluator.eyes}
        sheet = self.run.sheet(self.checkpoint.step, digest(shared))
        samples = Samples(self.drawn, evaluator.requests, options.seed, evaluator.eyes)

        def compute(number: int, show: Callable[[int], Any]) -> Mapping[str, np.ndarray]:
            return samples.compute(self.networks(self.drawn), number, show)

        def fold(folder: ChunkFolder) -> list[Row]:
            samples.write_sheet(folder, sheet, f"{self.config.run.name} step {self.checkpoint.step} {self.weights}")
            nfe = samples.mean_nfe(folder)
            return [
                self._row(replace(figure, metric=metric_name(figure.metric, name)), keys[name], number, nfe)
                for name, figure, number in samples.fold(folder)
            ]

        wanted = [(metric_name("fd", name), key) for name, key in keys.items()]
        return _Work("samples", wanted, samples.count, len(samples.requests), compute, fold, sheet)

    def carry_out(self, work: "_Work") -> Iterator[Row]:
        """Do the work together with whoever else does; its rows, as they stand in evaluations.jsonl afterwards."""
        topology, config = self.evaluator.topology, self.config
        # What is no part of a result's key, but moves its last digits, or a forced launch apart from the one before it.
        about = [self.evaluator.since, topology.device.type, topology.tp_size]
        about += [config.parallel.precision, config.batch.pack_tokens, work.count, work.wanted]
        name = f"step-{self.checkpoint.step:08d}_{work.what}_{digest(about)}"
        folder = ChunkFolder(self.run.evaluation_folder / name, work.count)
        if not tp_broadcast(self._begin(work, folder)):
            return
        title = f"step {self.checkpoint.step} {work.what}"
        carry_out(folder, work.compute, lambda: self._add(work, work.fold(folder)), work.images, title)
        yield from self.measured(work)

    def _begin(self, work: "_Work", folder: ChunkFolder) -> bool:
        """Whether there is something to measure; then its folder is there, for which training keeps the checkpoint
        (`prune_checkpoints`)."""
        there = [(row["metric"], row["key"]) for row in self.measured(work)]
        if all(wanted in there for wanted in work.wanted) and not folder.exists:
            return False
        folder.open({"step": self.checkpoint.step, "what": work.what, "images": work.images})
        try:
            find_checkpoint(self.run, self.checkpoint.step)
        except UserError:  # deleted while we looked at it
            folder.clear()
            raise
        return True

    def measured(self, work: "_Work") -> list[Row]:
        """The rows of this checkpoint with the keys of the work; with `--force`, those added since the launch."""
        keys = [key for _, key in work.wanted]
        rows = read_jsonl(self.run.evaluations, **EVALUATIONS, weights=str)[self.evaluator.since :]
        mine = [row for row in rows if (row["step"], row["weights"]) == (self.checkpoint.step, self.weights)]
        return [row for row in mine if row["key"] in keys]

    def _add(self, work: "_Work", rows: list[Row]) -> None:
        """Add the rows; those that a start before this one has added, before it was killed, are not added again."""
        there = [(row["metric"], row["key"]) for row in self.measured(work)]
        missing = [row for row in rows if (row["metric"], row["key"]) not in there]
        with writing(self.run.evaluations):
            append_jsonl(self.run.evaluations, *missing)
        mirror_evaluation(self.config, self.run, missing, work.sheet)

    def _row(self, figure: Figure, key: Row, samples: int, nfe: float | None) -> Row:
        require_kinds(self.checkpoint.meta, self.checkpoint.path / MARKER, **{name: TOTALS[name] for name in COPIED})
        return {
            "step": self.checkpoint.step,
            "metric": figure.metric,
            "value": figure.value,
            "standard_error": figure.standard_error,
            "samples": samples,
            "nfe": nfe,
            "weights": self.weights,
            **{name: self.checkpoint.meta[name] for name in COPIED},
            "key": key,
        }


@dataclass(frozen=True)
class _Work:
    """What a checkpoint is measured by: rows that are the fold of chunks."""

    what: str
    wanted: list[tuple[str, Row]]  # metric and key of the rows without which it is not done
    count: int  # of chunks
    images: int
    compute: Compute
    fold: Callable[[ChunkFolder], list[Row]]
    sheet: Path | None = None

"""What a checkpoint is worth: validation loss, Frechet distance, share of recognised samples.

1. The validation loss: held-out images at fixed times and with fixed noise, so that two checkpoints differ by their
   weights alone.
2. Generated images with the labels and sizes of the data set (or of one size), seen through the feature network and
   compared with the reference: the Frechet distance.
3. If the network also classifies into the model's classes: the share of samples that it takes for what they should be.

Every result is one line of evaluations.jsonl, with the comparability key of the circumstances that shift it: only
results with equal keys may be fitted or ranked together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, read_jsonl, require_kinds
from fitscale.config.schema import Config, ModelConfig
from fitscale.data.batch_plan import BatchPlan, open_plan
from fitscale.data.index import OpenIndex, open_index
from fitscale.data.loader import Pack, make_loader
from fitscale.data.packing import PackRule
from fitscale.data.pictures import batched
from fitscale.eval.features import AT_ONCE, FeatureNet
from fitscale.eval.frechet import Moments, frechet_distance
from fitscale.eval.generate import find_checkpoint, generate, load_model, patches, weights_name
from fitscale.eval.reference import data_identity, load_reference
from fitscale.eval.requests import Request
from fitscale.flow.loss import make_objective
from fitscale.flow.path import VALIDATION, image_noise, lengths_of
from fitscale.model import flops
from fitscale.model.common.layout import pack_layout
from fitscale.plan.preflight import require_encoding
from fitscale.run.checkpoint import MARKER, TOTALS, Checkpoint
from fitscale.run.comparability import sample_key, validation_key
from fitscale.run.layout import EVALUATIONS, RunDir

VALIDATION_SEED = 0  # of the held-out images' choice and noise: the same for every run


@dataclass(frozen=True)
class EvaluationOptions:
    """What of an evaluation no config says; `size` is (height, width) in pixels, None for those of the data set."""

    model: ModelConfig  # as trained, or with other positions
    size: tuple[int, int] | None = None
    seed: int = 0
    device: str = "auto"
    force: bool = False
    open_index: OpenIndex = open_index


def evaluate_run(config: Config, run: RunDir, step: int, options: EvaluationOptions) -> Iterator[dict[str, Any]]:
    """Measure the checkpoint of `step` as `config` asks; yields the rows as they are added to evaluations.jsonl.

    What is there already, under the same key, is not measured again unless `options.force`. `options.model` is for the
    generated images; the validation loss is that of the model as it was trained.

    Raises:
        UserError: no such checkpoint, weights, network or reference.
    """
    checkpoint = find_checkpoint(run, step)
    weights = weights_name(config, checkpoint, config.evaluation.weights)
    return _Evaluation(config, run, checkpoint, weights, options).measure()


@dataclass
class _Evaluation:
    config: Config
    run: RunDir
    checkpoint: Checkpoint
    weights: str
    options: EvaluationOptions

    def __post_init__(self) -> None:
        done = [] if self.options.force else read_jsonl(self.run.evaluations, **EVALUATIONS, weights=str)
        self.done = [(row["step"], row["metric"], row["weights"], row["key"]) for row in done]
        self.generated = replace(self.config, model=self.options.model)

    @cached_property
    def model(self) -> torch.nn.Module:
        return load_model(self.config, self.checkpoint.weights(self.weights), self.options.device)

    @cached_property
    def plan(self) -> BatchPlan:
        """One batch of as many training images as are generated: their labels, and their sizes unless one is given."""
        return _plan(self.config, "train", self.options.seed, self.config.evaluation.samples, self.options.open_index)

    @cached_property
    def data(self) -> dict[str, str]:
        """Hash of the shards, from which the held-out images come, and the labels and sizes of the generated ones."""
        return {"data": data_identity(*(stream.index for stream in self.plan.streams))[:16]}

    def measure(self) -> Iterator[dict[str, Any]]:
        evaluation = self.config.evaluation
        if has_validation(self.config):
            key = validation_key(self.config, self.weights) | self.data
            if self._pending("validation_loss", key):
                loss_S = validation_losses(self.model, self.config, self.options.open_index)
                yield self._add("validation_loss", key, loss_S.mean(), _mean_error(loss_S), len(loss_S), None)
        if evaluation.features is not None:
            yield from self._measure_samples(evaluation.features)

    def _measure_samples(self, features: str) -> Iterator[dict[str, Any]]:
        config, options, evaluation = self.config, self.options, self.config.evaluation
        if evaluation.reference is None:
            raise UserError("evaluation.reference: needed with evaluation.features: an image folder, shards or .npz")
        device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
        net = FeatureNet(features, device, evaluation.trusted)
        reference = load_reference(Path(evaluation.reference), net, config.data, self.run.path, options.open_index)
        key = sample_key(self.generated, self.weights, options.size, options.seed)
        key |= self.data | {"features": net.identity[:16], "reference": reference.identity[:16]}
        classifies = net.num_scores == config.model.num_classes
        wanted = [name for name in ("fd", *["recognised"] * classifies) if self._pending(name, key)]
        if not wanted:
            return
        moments, right, nfe = self._generate(net, classifies)
        if "fd" in wanted:
            distance = frechet_distance(moments.statistics(), reference.statistics)
            yield self._add("fd", key, distance, None, moments.count, nfe)
        if "recognised" in wanted:
            yield self._add("recognised", key, right.mean(), _mean_error(right), len(right), nfe)

    def _generate(self, net: FeatureNet, classifies: bool) -> tuple[Moments, np.ndarray, float]:
        """Features' moments of all samples, which were recognised, and the mean number of function evaluations."""
        requests = self._requests()
        self.model.config = self.generated.model  # type: ignore[assignment] # after the validation loss: as trained
        moments, right, nfe = Moments(), [], []
        drawn = generate(self.model, self.generated, requests, self.options.seed)
        bar = tqdm(drawn, total=len(requests), desc=f"step {self.checkpoint.step} samples", unit="image", mininterval=5)
        for batch in batched(bar, AT_ONCE):
            images = [image.image for image in batch]
            moments.add(net.features(images))
            nfe += [image.nfe for image in batch]
            if classifies:
                labels = [requests[image.index].label for image in batch]
                right += list(net.scores(images).argmax(1) == labels)
        return moments, np.array(right, dtype=np.float64), float(np.mean(nfe))

    def _requests(self) -> list[Request]:
        """Labels and sizes follow the training images in an order drawn from the seed."""
        batch = self.plan.step(0)
        rows, cols = batch.rows_B.tolist(), batch.cols_B.tolist()
        if self.options.size is not None:
            height, width = patches(self.config, *self.options.size)
            rows, cols = [height] * len(rows), [width] * len(cols)
        return [Request(i, label, rows[i], cols[i]) for i, label in enumerate(batch.labels_B.tolist())]

    def _pending(self, metric: str, key: dict[str, Any]) -> bool:
        return (self.checkpoint.step, metric, self.weights, key) not in self.done

    def _add(
        self, metric: str, key: dict[str, Any], value: float, error: float | None, samples: int, nfe: float | None
    ) -> dict[str, Any]:
        totals = ("train_flops", "paper_flops", "images", "tokens", "device_hours")
        require_kinds(self.checkpoint.meta, self.checkpoint.path / MARKER, **{name: TOTALS[name] for name in totals})
        row = {
            "step": self.checkpoint.step,
            "metric": metric,
            "value": float(value),
            "standard_error": error,
            "samples": samples,
            "nfe": nfe,
            "weights": self.weights,
            **{name: self.checkpoint.meta[name] for name in totals},
            "key": key,
        }
        append_jsonl(self.run.evaluations, row)
        return row


def has_validation(config: Config) -> bool:
    """Whether there are images to measure a validation loss on."""
    return config.evaluation.validation_images > 0 and config.data.holdout_fraction > 0


@torch.no_grad()
def validation_losses(model: torch.nn.Module, config: Config, opened: OpenIndex = open_index) -> np.ndarray:
    """Loss of each held-out image (S,), mean over `validation_times` fixed times (k + 1/2) / K.

    Noise comes from (fixed seed, k, image); the times are uniform whatever the training drew, so that runs with
    different time distributions can be compared.
    """
    times = config.evaluation.validation_times
    objective = make_objective(config.flow, config.model)
    device = next(model.parameters()).device
    losses: dict[int, float] = {}
    for pack in _validation_packs(config, opened):
        lengths, slots = lengths_of(pack.cu_seqlens).tolist(), pack.slots_S.tolist()
        layout = pack_layout(pack.sizes_S2, pack.cu_seqlens, device)
        total_S = torch.zeros(len(slots), dtype=torch.float64)
        for k in range(times):
            noise_TC = image_noise(VALIDATION_SEED, k, slots, lengths, pack.tokens_TC.shape[1], stream=VALIDATION)
            t_S = torch.full((len(slots),), (k + 0.5) / times, device=device)
            inputs = objective.prepare_at(
                pack.tokens_TC.to(device), pack.labels_S.to(device), pack.cu_seqlens, t_S, noise_TC.to(device)
            )
            outputs = model(inputs.x_TC, inputs.t_S, inputs.labels_S, layout)
            total_S += objective.loss_S(outputs, inputs, pack.cu_seqlens).double().cpu()
        losses.update(zip(slots, (total_S / times).tolist(), strict=True))
    losses.pop(-1, None)  # padding
    return np.array([losses[slot] for slot in sorted(losses)])


def _validation_packs(config: Config, opened: OpenIndex) -> Iterator[Pack]:
    plan = _plan(config, "holdout", VALIDATION_SEED, config.evaluation.validation_images, opened)
    plan.global_batch_size = min(plan.global_batch_size, plan.num_images)
    for step in make_loader(plan, PackRule(config.batch.pack_tokens, cost=flops.cost(config.model)), range(1)):
        yield from step.packs


def _plan(config: Config, split: str, seed: int, images: int, opened: OpenIndex) -> BatchPlan:
    about = {"global_batch_size": images, "patch_size": config.model.patch_size}
    plan = open_plan(config.data, seed=seed, split=split, open_index=opened, **about)  # type: ignore[arg-type]
    require_encoding(config, plan)
    return plan


def _mean_error(values: np.ndarray) -> float | None:
    """Standard error of a mean; None where one value says nothing of it."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None

"""`fitscale sample` and `fitscale evaluate`."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from re import fullmatch
from typing import Any
from zlib import crc32

import numpy as np

from fitscale.config.checks import given
from fitscale.config.errors import UserError
from fitscale.config.schema import Config, ModelConfig
from fitscale.config.schema_sampling import ADAPTIVE_SAMPLERS, SamplingConfig
from fitscale.data.encoding import patches
from fitscale.data.index import open_index
from fitscale.eval.checkpoints import Source, find_checkpoint, load_networks, open_run, open_source
from fitscale.eval.evaluate import EvaluationOptions, Evaluator
from fitscale.eval.folder import Generated, check_samples_folder, write_samples
from fitscale.eval.generate import Images, generate
from fitscale.eval.ranks import carry_out, is_first
from fitscale.eval.requests import Request, chunk_ranges
from fitscale.eval.validation import has_validation
from fitscale.parallel.groups import on_rank_zero
from fitscale.run.chunks import ChunkFolder
from fitscale.run.comparability import digest
from fitscale.run.layout import RunDir

MOST_IMAGES = 10_000_000
MOST_SEED = 2**63 - 1


def run_sample(arguments: argparse.Namespace) -> None:
    """Draw the images that `arguments` ask for and write them."""
    source = open_source(arguments.run, arguments.step, arguments.weights)
    config = source.config
    evaluation = given(config.evaluation, tensor_parallel_size=arguments.tensor_parallel_size)
    sampling, model = _sampling(config.sampling, arguments), _model(config, arguments)
    config = replace(config, sampling=sampling, model=model, evaluation=evaluation)
    rows, cols = patches(config, arguments.height, arguments.width)
    labels = parse_classes(arguments.classes, config.model.num_classes)
    within("--count", arguments.count, 1, MOST_IMAGES)
    within("--seed", arguments.seed, 0, MOST_SEED)
    requests = [Request(i, labels[i % len(labels)], rows, cols) for i in range(arguments.count)]
    out = arguments.out or _folder(source) / _name(arguments, source, config.sampling)
    check_samples_folder(out)
    settings = {
        "run": str(source.path),
        **source.about,
        "height": arguments.height,
        "width": arguments.width,
        "seed": arguments.seed,
        "model": asdict(config.model),
        "sampling": asdict(config.sampling),
    }
    networks = load_networks(config, source.weights, arguments.device)
    ranges = chunk_ranges(len(requests))
    drawn = digest([settings, labels, len(requests), source.content])  # chunks of anything else are of no use here
    folder = ChunkFolder(out.with_name(f".{out.name}.chunks-{drawn}"), len(ranges))

    def compute(number: int, show: Callable[[int], Any]) -> Mapping[str, np.ndarray]:
        chosen = [requests[i] for i in ranges[number]]
        seen = generate(networks, config, chosen, arguments.seed, _pixels, show)
        return {
            "images": np.stack([one.kept["images"] for one in seen]),
            "nfe": np.array([one.nfe for one in seen]),
            "network_evaluations": np.array([one.network_evaluations for one in seen]),
        }

    def fold() -> None:
        title = f"{source.title} {arguments.height}x{arguments.width}"
        nfe = write_samples(out, _generated(folder), [request.label for request in requests], settings, title)
        drawn_in = f"{len(nfe)} images, {sum(nfe) / len(nfe):g} function evaluations each, in {out}"
        print(f"{drawn_in}; contact_sheet.png there shows the first", flush=True)

    on_rank_zero(partial(folder.open, {"step": source.about.get("step", 0), "what": "sample"}))
    carry_out(folder, compute, fold, len(requests), "samples")


def _pixels(images: Images) -> dict[str, np.ndarray]:
    return {"images": images.pixels_NCHW.movedim(1, -1).cpu().numpy()}


def _generated(folder: ChunkFolder) -> Iterator[Generated]:
    index = 0
    for number in range(folder.count):
        chunk = folder.read(number)
        for image, nfe, passes in zip(*(chunk[name] for name in ("images", "nfe", "network_evaluations")), strict=True):
            yield Generated(index, image, int(nfe), int(passes))
            index += 1


def within(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{name}: {value} is outside {least} to {most}")


def parse_classes(text: str, num_classes: int) -> list[int]:
    """Labels of "0,7,3", "0-9" (inclusive), a mix of both, or "all".

    Raises:
        UserError: a label is not a number or outside 0 .. num_classes - 1.
    """
    if text == "all":
        return list(range(num_classes))
    labels: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(fullmatch(" *[0-9]{1,9} *", end) for end in ends):
            raise UserError(f"--classes: {part!r} is neither a label (7), a range (0-9) nor all")
        first, last = int(ends[0]), int(ends[-1])
        if not first <= last < num_classes:
            raise UserError(f"--classes: {part!r} is out of range; the model's classes are 0 to {num_classes - 1}")
        labels += range(first, last + 1)
    return labels


def _folder(source: Source) -> Path:
    return (
        source.path.with_name(f"{source.path.stem}_samples") if source.path.is_file() else RunDir(source.path).samples
    )


def _name(arguments: argparse.Namespace, source: Source, sampling: SamplingConfig) -> str:
    """Of the folder of the samples: what decides the images, but for their number."""
    guidance = sampling.guidance
    sampler = f"{sampling.method}-{sampling.steps}-{'points' if sampling.method in ADAPTIVE_SAMPLERS else 'steps'}"
    sampler += "".join(f"-{word}" for word in (sampling.spacing, sampling.last_step) if word)
    sampler += f"-shift-{sampling.shift_base_tokens}" if sampling.shift_base_tokens else ""
    parts = [f"step-{source.about['step']:08d}", source.about["weights"]] if source.about else []
    parts += [f"{arguments.height}x{arguments.width}", sampler]
    parts += [f"guidance-{guidance.scale:g}", *([f"power-{guidance.power:g}"] if guidance.power else [])]
    parts += [] if guidance.interval == (0.0, 1.0) else ["interval-{:g}-{:g}".format(*guidance.interval)]
    guide = (guidance.guide, guidance.guide_step, guidance.guide_weights)
    parts += [] if guidance.guide is None else [f"guide-{crc32(repr(guide).encode()):08x}"]
    parts += [f"seed-{arguments.seed}"]
    classes = arguments.classes if len(arguments.classes) < 40 else f"{crc32(arguments.classes.encode()):08x}"
    parts += [] if classes == "all" else [f"classes-{classes}"]
    parts += [] if arguments.rope is None else [arguments.rope + ("-decoupled" if arguments.decouple else "")]
    return "_".join(parts)


def _sampling(sampling: SamplingConfig, arguments: argparse.Namespace) -> SamplingConfig:
    """`sampling` with what `arguments` name in its place."""
    guidance = {name: getattr(arguments, name) for name in ("power", "guide", "guide_step", "guide_weights")}
    interval = None if arguments.interval is None else tuple(arguments.interval)
    names = ("method", "steps", "spacing", "last_step", "shift_base_tokens")
    return given(
        sampling,
        guidance=given(sampling.guidance, scale=arguments.guidance, interval=interval, **guidance),
        **{name: getattr(arguments, name) for name in names},
    )


def _model(config: Config, arguments: argparse.Namespace) -> ModelConfig:
    """The run's model, with positions as asked for."""
    if arguments.decouple and arguments.rope is None:
        raise UserError("--decouple: goes with --rope")
    if arguments.rope is None:
        return config.model
    return config.model.with_positions(arguments.rope, arguments.decouple)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Measure the checkpoints that `arguments` name."""
    config, run = open_run(arguments.run)
    if arguments.samples is not None:
        within("--samples", arguments.samples, 2, MOST_IMAGES)
    within("--seed", arguments.seed, 0, MOST_SEED)
    chosen = {name: getattr(arguments, name) for name in ("weights", "samples", "tensor_parallel_size")}
    chosen |= {name: _by_name(getattr(arguments, name)) for name in ("features", "reference")}
    evaluation = given(config.evaluation, **chosen)
    config = replace(config, sampling=_sampling(config.sampling, arguments), evaluation=evaluation)
    model, size = _model(config, arguments), _size(arguments)
    options = EvaluationOptions(model, size, arguments.seed, arguments.device, arguments.force, cache(open_index))
    evaluator, measured = Evaluator(config, run, options), 0
    for step in _evaluation_steps(config, run) if arguments.step is None else [arguments.step]:
        for row in evaluator.evaluate(step):
            measured += 1
            text = f"step {step:>8}  {row['weights']}  {row['metric']:<18}{row['value']:.5g}"
            text += "" if row["standard_error"] is None else f" +- {row['standard_error']:.2g}"
            nfe = row["nfe"]
            text += "" if nfe is None else f"  ({row['samples']} samples, {nfe:g} function evaluations each)"
            if is_first():
                print(text, flush=True)
    if not measured and is_first():
        print(_why_nothing(config), flush=True)


def _by_name(paths: list[str] | None) -> str | dict[str, str] | None:
    """A path, or paths by the names in NAME=PATH."""
    named = [fullmatch(r"([A-Za-z0-9_-]+)=(.*)", path) for path in paths or ()]
    if not paths or named == [None]:
        return paths[0] if paths else None
    return dict((match[1], match[2]) if match else ("", path) for match, path in zip(named, paths, strict=True))


def _why_nothing(config: Config) -> str:
    if config.evaluation.networks or has_validation(config):
        return "nothing to measure: everything is in evaluations.jsonl already; --force measures it again"
    return (
        "nothing to measure: a Frechet distance needs --features and --reference (evaluation.features and .reference), "
        "a validation loss images held out from the start of the training (data.holdout_fraction = "
        f"{config.data.holdout_fraction:g}) and evaluation.validation_images = {config.evaluation.validation_images} "
        "above 0"
    )


def _size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("--height and --width: give both, or neither for the sizes of the dataset")
    return None if arguments.height is None else (arguments.height, arguments.width)


def _evaluation_steps(config: Config, run: RunDir) -> list[int]:
    """The run's evaluation steps that have a checkpoint; without any planned, the newest checkpoint."""
    found = {checkpoint.step for checkpoint in run.checkpoints()}
    planned = [step for step in config.evaluation.steps(config.run.steps) if step in found]
    return planned or [find_checkpoint(run, None).step]

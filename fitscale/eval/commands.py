"""`fitscale sample` and `fitscale evaluate`."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from fitscale.config.errors import UserError
from fitscale.config.rundir import write_atomic
from fitscale.config.schema import Config, RopeConfig
from fitscale.eval.evaluate import EvaluationOptions, evaluate_run
from fitscale.eval.generate import (
    Generated,
    Request,
    find_checkpoint,
    generate,
    load_model,
    open_run,
    parse_classes,
    patches,
    weights_name,
    with_sampler,
)
from fitscale.eval.pictures import write_contact_sheet, write_npz, write_png


def run_sample(arguments: argparse.Namespace) -> None:
    """Draw the images that `arguments` ask for and write them."""
    config, run = open_run(arguments.run)
    checkpoint = find_checkpoint(run, arguments.step)
    weights = weights_name(config, checkpoint, arguments.weights or config.evaluation.weights)
    rows, cols = patches(config, arguments.height, arguments.width)
    labels = parse_classes(arguments.classes, config.model.num_classes)
    if arguments.count < 1:
        raise UserError(f"--count: {arguments.count} is too small, the least is 1")
    requests = [Request(i, labels[i % len(labels)], rows, cols) for i in range(arguments.count)]
    sampling = with_sampler(config.sampling, arguments.method, arguments.steps, arguments.guidance, arguments.power)
    config = replace(config, sampling=sampling)  # checks that the method goes with the model
    rope = _rope(config, arguments)
    model = load_model(config, checkpoint.weights(weights), arguments.device, rope)
    drawn = generate(model, config, sampling, requests, arguments.seed)
    images = list(tqdm(drawn, total=len(requests), desc="samples", unit="image"))
    settings = {
        "run": str(run.path),
        "step": checkpoint.step,
        "weights": weights,
        "height": arguments.height,
        "width": arguments.width,
        "seed": arguments.seed,
        "rope": asdict(rope),
        "sampling": asdict(sampling),
        "nfe": [image.nfe for image in images],
        "network_evaluations": [image.network_evaluations for image in images],
        "labels": [request.label for request in requests],
    }
    size = f"{arguments.height}x{arguments.width}"
    name = f"step-{checkpoint.step:08d}_{weights}_{size}_cfg{sampling.guidance.scale:g}_seed{arguments.seed}"
    out = arguments.out or run.samples / (name if arguments.rope is None else f"{name}_{arguments.rope}")
    _write_samples(out, images, settings, f"{config.run.name} step {checkpoint.step} {weights} {size}")


def _rope(config: Config, arguments: argparse.Namespace) -> RopeConfig:
    if arguments.decouple and arguments.rope is None:
        raise UserError("--decouple: goes with --rope")
    if arguments.rope is None:
        return config.model.rope
    return replace(config.model.rope, method=arguments.rope, decouple=arguments.decouple)


def _write_samples(out: Path, images: list[Generated], settings: dict, title: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for image, label in zip(images, settings["labels"], strict=True):
        write_png(out / f"{image.index:06d}_class{label}.png", image.image)
    arrays = [image.image for image in images]
    write_npz(out / "samples.npz", arrays)
    write_contact_sheet(out / "contact_sheet.png", arrays, [str(label) for label in settings["labels"]], title)
    write_atomic(out / "samples.json", json.dumps(settings, indent=1))
    nfe = settings["nfe"]
    mean = sum(nfe) / len(nfe)
    print(f"{len(images)} images, {mean:g} function evaluations each, in {out}; all on {out / 'contact_sheet.png'}")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Measure the checkpoints that `arguments` name."""
    config, run = open_run(arguments.run)
    steps = [arguments.step] if arguments.step is not None else _evaluation_steps(config, arguments.run)
    options = EvaluationOptions(
        weights=arguments.weights or config.evaluation.weights,
        samples=arguments.samples or config.evaluation.samples,
        features=arguments.features or config.evaluation.features,
        reference=arguments.reference or config.evaluation.reference,
        sampling=with_sampler(config.sampling, arguments.method, arguments.steps, arguments.guidance, arguments.power),
        size=_size(arguments),
        seed=arguments.seed,
        device=arguments.device,
        force=arguments.force,
    )
    for step in steps:
        for row in evaluate_run(run.path, step, options):
            error = "" if row["standard_error"] is None else f" +- {row['standard_error']:.2g}"
            print(f"step {step:>8}  {row['weights']}  {row['metric']:<16}{row['value']:.5g}{error}", flush=True)


def _size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("--height and --width: give both, or neither for the sizes of the dataset")
    return None if arguments.height is None else (arguments.height, arguments.width)


def _evaluation_steps(config: Config, path: Path) -> list[int]:
    """The run's evaluation steps that have a checkpoint; without any planned, the newest checkpoint."""
    _, run = open_run(path)
    found = {checkpoint.step for checkpoint in run.checkpoints()}
    planned = [step for step in config.evaluation.steps(config.run.steps) if step in found]
    return planned or [find_checkpoint(run, None).step]

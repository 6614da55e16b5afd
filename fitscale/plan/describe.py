"""`fitscale describe`: what a model is, from its config alone: parameters and MACs, as a whole and by part (no torch).

A part is what a module of the network holds; those of equal blocks are one, written with N for the block's number.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fitscale.config.program import aligned
from fitscale.config.schema import Config
from fitscale.data.encoding import load_run, patches
from fitscale.model import flops
from fitscale.model.backbone import Parameter, parameter_table

PART = re.compile(r"(?:[^.]+\.\d+\.(?!weight|bias))*[^.]+")  # blocks.7.attn of blocks.7.attn.qkv.weight
BLOCK = re.compile(r"\b(blocks|layers)\.\d+")


@dataclass
class Part:
    """Sums over the tensors of a part; MACs of one image."""

    tensors: int = 0
    parameters: int = 0
    linear_macs: int = 0


def run_describe(arguments: argparse.Namespace) -> None:
    """Print what the command line asks for."""
    config = load_run(arguments.config)
    rows, cols = patches(config, arguments.height, arguments.width)
    image = f"{arguments.height} x {arguments.width} pixels, {rows} x {cols} = {rows * cols:,} tokens"
    print("\n".join(_report(config, image, rows * cols)))


def _report(config: Config, image: str, tokens: int) -> Iterator[str]:
    model, parts = config.model, parts_of(parameter_table(config.model), tokens)
    linear, mixing = flops.linear_macs(model, tokens), flops.mixing_macs(model, tokens)
    facts = {
        "model": f"{model.name} ({model.family}), {flops.parameters(model):,} parameters",
        "image": image,
        "forward": f"{linear:,} linear MACs + {mixing:,} MACs that mix tokens",
        "training": f"{flops.train_flops(model, tokens):.4g} FLOPs an image (2 a MAC; forward and backward)",
    }
    yield from (f"{name:<10}{text}" for name, text in facts.items())
    header = ("part", "tensors", "parameters", "", "linear MACs", "")
    whole = Part(len(parameter_table(model)), flops.parameters(model), linear)
    rows = [_row(name, part, whole) for name, part in [*parts.items(), ("all", whole)]]
    yield "\n" + aligned([header, *rows])


def parts_of(table: tuple[Parameter, ...], tokens: int) -> dict[str, Part]:
    """The parts of a model in the order of its modules, with their MACs for one image of `tokens` tokens."""
    parts: dict[str, Part] = {}
    for entry in table:
        part = parts.setdefault(part_name(entry.name), Part())
        part.tensors += 1
        part.parameters += entry.numel
        part.linear_macs += entry.numel * (entry.per_image + entry.per_token * tokens) * entry.is_weight
    return parts


def part_name(name: str) -> str:
    """Of a tensor: blocks.N.attn of blocks.7.attn.qkv.weight, x_embedder of x_embedder.proj.bias."""
    part = PART.match(name)
    assert part is not None, name
    return BLOCK.sub(r"\1.N", part.group())


def _row(name: str, part: Part, whole: Part) -> tuple[str, ...]:
    shares = (part.parameters / whole.parameters, part.linear_macs / whole.linear_macs)
    parameters, macs = (f"{share:.1%}" for share in shares)
    return (name, f"{part.tensors:,}", f"{part.parameters:,}", parameters, f"{part.linear_macs:,}", macs)

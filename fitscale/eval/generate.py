"""Images from a checkpoint: any size, any class, image i from (seed, i) alone.

1. `open_run` reads the run's config and finds the checkpoint; `load_model` builds the network with one of its weights.
2. `generate` draws the requests pack by pack (`eval.draw`).
3. Tokens become arrays, arrays become images (pixels, or through the VAE).

Shape suffixes: T tokens of an image, C numbers in a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import Config, ParallelConfig
from fitscale.data.encode import Decoder, unpatchify
from fitscale.eval.draw import Networks, draw_pack, packs
from fitscale.eval.requests import Request
from fitscale.model.build import build_network
from fitscale.model.weights import load_weights
from fitscale.parallel.groups import init_parallel, launched_ranks
from fitscale.run.checkpoint import Checkpoint, read_checkpoint
from fitscale.run.comparability import full_weights_name
from fitscale.run.layout import RunDir

MOST_TOKENS = 1 << 24  # of an image, to draw


@dataclass(frozen=True)
class Generated:
    """A uint8 (H, W, channels) image, and what it cost: function evaluations and passes of the network."""

    index: int
    image: np.ndarray
    nfe: int
    network_evaluations: int


def open_run(path: Path) -> tuple[Config, RunDir]:
    """The config and the layout of the run directory `path`.

    Raises:
        UserError: it is no run directory.
    """
    run = RunDir(path)
    if not run.config.is_file():
        raise UserError(f"{path}: not a run directory (no config.yaml there)")
    return load_config([str(run.config)]), run


def find_checkpoint(run: RunDir, step: int | None) -> Checkpoint:
    """The complete checkpoint of `step`, or the newest.

    Raises:
        UserError: there is none; lists those that are there.
    """
    found = {checkpoint.step: checkpoint for checkpoint in run.checkpoints()}
    if not found:
        for path in reversed(run.checkpoint_folders()):
            read_checkpoint(path)  # says what is wrong with it
        raise UserError(f"{run.path}: no complete checkpoint there yet")
    if step is not None and step not in found:
        there = ", ".join(map(str, found))
        raise UserError(f"--step: {run.path} has no complete checkpoint of step {step}; it has {there}")
    return found[max(found) if step is None else step]


def weights_name(config: Config, checkpoint: Checkpoint, name: str) -> str:
    """The full name of weights called raw, ema or ema_<decay>.

    Raises:
        UserError: the checkpoint has no such weights; lists those it has.
    """
    full = full_weights_name(config, name)
    if full not in checkpoint.weight_names():
        raise UserError(f"--weights: {checkpoint.path} has no {name}; it has {', '.join(checkpoint.weight_names())}")
    return full


def load_model(config: Config, weights: Path, device: str) -> torch.nn.Module:
    """The network in this process, ready to sample: in bf16 if the run was trained so and there is a GPU, else in fp32.

    Raises:
        UserError: started as one of several ranks, each of which would do, and write, the same.
    """
    if launched_ranks() > 1:  # before they join, or the first to leave ends another's joining with a traceback
        raise UserError(f"sampling and evaluation run in one process, not under torchrun with {launched_ranks()}")
    topology = init_parallel(ParallelConfig(), device)
    model = build_network(config.model, ParallelConfig())
    load_weights(model, weights)
    bf16 = config.parallel.precision == "bf16" and topology.device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return model.to(topology.device, dtype).eval().requires_grad_(False)


@torch.no_grad()
def generate(model: torch.nn.Module, config: Config, requests: Sequence[Request], seed: int) -> Iterator[Generated]:
    """The images of `requests` by `config.sampling`, pack by pack; within a pack in the order given.

    An image depends on (seed, its index) and on its label and size; its neighbours change it by rounding alone, as
    does the machine.
    """
    device = next(model.parameters()).device
    decoder = Decoder(config.data.latent, device)
    for pack in packs(requests, config):
        drawn = draw_pack(Networks(model), config, pack, seed)
        made = zip(pack, drawn.tokens, drawn.nfe, drawn.network_evaluations, strict=True)
        for request, tokens_TC, nfe, passes in made:
            latent = unpatchify(tokens_TC, request.rows, request.cols, config.model.patch_size)
            yield Generated(request.index, decoder(latent), nfe, passes)


def patches(config: Config, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of a height x width pixel image.

    Raises:
        UserError: a side is no multiple of the patch, and names the nearest that are; or an image is too large.
    """
    multiple = config.model.patch_size * config.data.latent.factor
    for name, side in (("--height", height), ("--width", width)):
        if side < 1 or side % multiple:
            low = max(side // multiple, 1) * multiple
            raise UserError(
                f"{name}: {side} is not a multiple of {multiple} (model.patch_size {config.model.patch_size} x "
                f"data.latent.factor {config.data.latent.factor}); the nearest are {low} and {low + multiple}"
            )
    rows, cols = height // multiple, width // multiple
    if rows * cols > MOST_TOKENS:
        raise UserError(f"--height, --width: {height} x {width} pixels are more than {MOST_TOKENS} tokens")
    return rows, cols

"""Images from a checkpoint: any size, any class, image i from (seed, i) alone.

1. `open_run` reads the run's config and finds the checkpoint; `load_model` builds the network with one of its weights.
2. `generate` deals the requests into packs of at most `pack_tokens`, draws each image's noise, and integrates a pack.
3. Tokens become arrays, arrays become images (pixels, or through the VAE).

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import ADAPTIVE_SAMPLERS, Config, ParallelConfig
from fitscale.data.encode import Decoder, unpatchify
from fitscale.flow.guidance import Network, PackShape, guided, network_evaluations
from fitscale.flow.loss import make_objective
from fitscale.flow.path import INITIAL_NOISE, image_noise
from fitscale.flow.sampler import ImageNoise, sample
from fitscale.model.build import build_network
from fitscale.model.common.layout import PackLayout, pack_layout
from fitscale.model.weights import load_weights
from fitscale.parallel.groups import init_parallel, launched_ranks
from fitscale.run.comparability import full_weights_name
from fitscale.run.layout import Checkpoint, RunDir


@dataclass(frozen=True)
class Request:
    """One image to draw: `index` decides its noise, `rows` and `cols` its size in patches."""

    index: int
    label: int
    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


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
    limit = 0 if config.sampling.method in ADAPTIVE_SAMPLERS else config.batch.pack_tokens  # 0: one image a pack
    for pack in _packs(requests, limit):
        tokens_TC, nfe = _sample_pack(model, config, pack, seed)
        parts = tokens_TC.split([request.tokens for request in pack])
        for request, part_TC in zip(pack, parts, strict=True):
            latent = unpatchify(part_TC, request.rows, request.cols, config.model.patch_size)
            yield Generated(request.index, decoder(latent), nfe, nfe * network_evaluations(config.sampling.guidance))


def _packs(requests: Sequence[Request], limit: int) -> Iterator[list[Request]]:
    """Runs of requests of at most `limit` tokens, at least one each."""
    pack: list[Request] = []
    for request in requests:
        if pack and sum(member.tokens for member in pack) + request.tokens > limit:
            yield pack
            pack = []
        pack.append(request)
    if pack:
        yield pack


def _sample_pack(model: torch.nn.Module, config: Config, pack: list[Request], seed: int) -> tuple[torch.Tensor, int]:
    device = next(model.parameters()).device
    indices, lengths = [request.index for request in pack], [request.tokens for request in pack]
    noise_TC = image_noise(seed, 0, indices, lengths, config.model.token_channels, stream=INITIAL_NOISE).to(device)
    shape = PackShape(
        labels_S=torch.tensor([request.label for request in pack], device=device),
        sizes_S2=torch.tensor([[request.rows, request.cols] for request in pack], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    )
    model_fn = guided(
        _network(model, device),
        shape,
        config.sampling.guidance,
        no_class=config.model.num_classes,
        patch_size=config.model.patch_size,
        model_time=make_objective(config.flow, config.model).model_time,
    )
    drawn = sample(model_fn, noise_TC, config.sampling, ImageNoise(seed, indices, lengths))
    return drawn.x_TC, drawn.nfe


def _network(model: torch.nn.Module, device: torch.device) -> Network:
    """The model as samplers call it; a pack's layout is worked out once for all their calls."""

    @cache
    def layout(pack: PackShape) -> PackLayout:
        return pack_layout(pack.sizes_S2, pack.cu_seqlens, device)

    return lambda x_TC, t_S, pack: model(x_TC, t_S, pack.labels_S, layout(pack))[-1]


def patches(config: Config, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of a height x width pixel image.

    Raises:
        UserError: a side is no multiple of the patch; names the nearest that are.
    """
    multiple = config.model.patch_size * config.data.latent.factor
    for name, side in (("--height", height), ("--width", width)):
        if side < 1 or side % multiple:
            low = max(side // multiple, 1) * multiple
            raise UserError(
                f"{name}: {side} is not a multiple of {multiple} (model.patch_size {config.model.patch_size} x "
                f"data.latent.factor {config.data.latent.factor}); the nearest are {low} and {low + multiple}"
            )
    return height // multiple, width // multiple

"""One pack of requests through the sampler.

1. `packs` deals requests into packs of at most `batch.pack_tokens`, in their order.
2. `draw_pack` draws the noise of each image from (seed, its index), and carries the pack to data by `config.sampling`.

An image depends on (seed, its index), its label, size and guidance; its neighbours change it by rounding alone, as does
the machine.

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.eval.requests import Request
from fitscale.flow.guidance import Guided, Network
from fitscale.flow.loss import make_objective
from fitscale.flow.pack import PackShape, starts
from fitscale.flow.path import INITIAL_NOISE, image_noise
from fitscale.flow.sampler import sample
from fitscale.model.common.layout import PackLayout, pack_layout


@dataclass(frozen=True)
class Networks:
    """What draws: a model, and the weaker one that guides it, if any; both ready to sample."""

    model: nn.Module
    guide: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Drawn:
    """Of each image of a pack, in its order: tokens (its number of them, C) on the model's device, and what it cost."""

    tokens: list[Tensor]
    nfe: list[int]  # function evaluations
    network_evaluations: list[int]  # passes of a network: up to two for a function evaluation that is guided


def packs(requests: Iterable[Request], config: Config) -> Iterator[list[Request]]:
    """Runs of requests of at most `batch.pack_tokens` tokens, at least one each."""
    pack: list[Request] = []
    tokens = 0
    for request in requests:
        if pack and tokens + request.tokens > config.batch.pack_tokens:
            yield pack
            pack, tokens = [], 0
        pack.append(request)
        tokens += request.tokens
    if pack:
        yield pack


@torch.no_grad()
def draw_pack(networks: Networks, config: Config, pack: Sequence[Request], seed: int) -> Drawn:
    """Draw the images of `pack`.

    Raises:
        UserError: `config.sampling` is impossible, or its adaptive method finds no step (`flow.sampler.sample`); the
            guide has other positions.
    """
    device, guide = networks.device, networks.guide
    positions = config.model.positions if guide is None else guide.config.positions  # type: ignore[union-attr]
    if positions != config.model.positions:
        raise UserError(
            f"sampling.guidance.guide: its positions are {positions}, those that are drawn with "
            f"{config.model.positions}"
        )
    shape = _shape(config, pack, device)
    noise_TC = image_noise(seed, 0, shape.indices, shape.lengths, config.model.token_channels, stream=INITIAL_NOISE).to(
        device
    )
    guided = Guided(
        _network(networks.model, device),
        config.sampling.guidance,
        no_class=config.model.num_classes,
        patch_size=config.model.patch_size,
        model_time=make_objective(config.flow, config.model).model_time,
        guide=None if guide is None else _network(guide, device),
    )
    sampled = sample(guided, noise_TC, config.sampling, shape, seed)
    passes = [guided.passes[request.index] for request in pack]
    return Drawn(list(sampled.x_TC.split(shape.lengths)), sampled.nfe, passes)


def _shape(config: Config, pack: Sequence[Request], device: torch.device) -> PackShape:
    scales = [request.guidance for request in pack]
    own = [config.sampling.guidance.scale if scale is None else scale for scale in scales]
    return PackShape(
        labels_S=torch.tensor([request.label for request in pack], device=device),
        sizes_S2=torch.tensor([[request.rows, request.cols] for request in pack], dtype=torch.int32),
        cu_seqlens=starts([request.tokens for request in pack]),
        indices=tuple(request.index for request in pack),
        scale_S=torch.tensor(own, dtype=torch.float64) if any(scale is not None for scale in scales) else None,
    )


def _network(model: nn.Module, device: torch.device) -> Network:
    """The model as samplers call it; a pack's layout is worked out once for all calls that follow each other."""

    @lru_cache(maxsize=4)
    def layout(pack: PackShape) -> PackLayout:
        return pack_layout(pack.sizes_S2, pack.cu_seqlens, device)

    return lambda x_TC, t_S, pack: model(x_TC, t_S, pack.labels_S, layout(pack))[-1]

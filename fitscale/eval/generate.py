"""Images of requests, and what is to be seen of them: image i from (seed, i) alone.

    network, pack after pack -> latents -> decoded in batches of one shape -> `look` at every batch

Packs and batches are formed from the requests of one call in their order, so that an image's neighbours, and with them
its rounding, depend on these requests alone. Decoding and looking happen in a thread of their own, while the network is
at work on the next pack. Nothing leaves the device before it has been looked at.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from fitscale.config.schema import Config
from fitscale.data.encode import Decoder, unpatchify
from fitscale.eval.draw import Networks, draw_pack, packs
from fitscale.eval.requests import Request

BATCH_IMAGES = 64  # decoded at once, at most
BATCH_PIXELS = 1 << 22  # of all of them: 64 images of 256 x 256
MOST_AHEAD = 2  # batches that wait to be decoded


@dataclass(frozen=True)
class Images:
    """Decoded images of one shape, (B, channels, H, W) uint8 on the device, and whose requests' they are."""

    requests: list[Request]
    pixels_NCHW: Tensor


# What is kept of a batch: arrays whose first axis is its images.
Look = Callable[[Images], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Seen:
    """What was kept of one image, and what it cost: function evaluations and passes of the network."""

    kept: dict[str, np.ndarray]
    nfe: int
    network_evaluations: int


@torch.no_grad()
def generate(
    networks: Networks,
    config: Config,
    requests: Sequence[Request],
    seed: int,
    look: Look,
    show: Callable[[int], None] = lambda images: None,
) -> list[Seen]:
    """Draw the images of `requests` by `config.sampling`; what `look` keeps of each, in the order of the requests.

    Args:
        look: is called in a thread of its own, with one batch after the other.
        show: is told the number of images of every batch that is done.
    """
    decoder = Decoder(config.data.latent, networks.device)
    found: dict[int, Seen] = {}

    def finish(batch: "_Batch") -> None:
        pixels = decoder.pixels(torch.stack(batch.latents))
        arrays = look(Images([requests[place] for place in batch.places], pixels))
        for row, place in enumerate(batch.places):
            found[place] = Seen({name: array[row] for name, array in arrays.items()}, batch.nfe[row], batch.passes[row])
        show(len(batch.places))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as thread:
        waiting: list[Future[None]] = []
        for batch in _batches(networks, config, requests, seed):
            waiting.append(thread.submit(finish, batch))
            while len(waiting) > MOST_AHEAD:
                waiting.pop(0).result()
        for future in waiting:
            future.result()
    return [found[place] for place in range(len(requests))]


class _Batch:
    """Latents of one size that wait to be decoded together."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.latents: list[Tensor] = []
        self.nfe: list[int] = []
        self.passes: list[int] = []


def _batches(networks: Networks, config: Config, requests: Sequence[Request], seed: int) -> Iterator[_Batch]:
    """Full batches as they come about, the rest at the end. Images of one size are drawn one after the other: attention
    takes those of a pack at once."""
    gathered: dict[tuple[int, int], _Batch] = defaultdict(_Batch)
    by_size = sorted(range(len(requests)), key=lambda place: (requests[place].rows, requests[place].cols))
    places = iter(by_size)
    for pack in packs([requests[place] for place in by_size], config):
        drawn = draw_pack(networks, config, pack, seed)
        for request, tokens_TC, nfe, passes in zip(
            pack, drawn.tokens, drawn.nfe, drawn.network_evaluations, strict=True
        ):
            size = (request.rows, request.cols)
            batch = gathered[size]
            batch.places.append(next(places))
            batch.latents.append(unpatchify(tokens_TC, *size, config.model.patch_size))
            batch.nfe.append(nfe)
            batch.passes.append(passes)
            if len(batch.places) == _most_images(config, size):
                yield gathered.pop(size)
    yield from gathered.values()


def _most_images(config: Config, size: tuple[int, int]) -> int:
    side = config.model.patch_size * config.data.latent.factor
    return max(1, min(BATCH_IMAGES, BATCH_PIXELS // (prod(size) * side**2)))

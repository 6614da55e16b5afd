"""The path between noise and data, and every random number of the flow.

The time convention of the whole project, stated here once: **t = 0 is noise, t = 1 is data**, and
x_t = t * data + (1 - t) * noise, whose velocity is data - noise (FiTv2, arXiv 2410.13925; SiT, arXiv 2401.08740).

Randomness belongs to the image: an image's time, label drop and noise come from (seed, step, slot) alone, where slot is
its position in the global batch. One counter-based generator (numpy's Philox) serves one image, and its draws have a
fixed order: time, label drop, noise. So neither ranks, nor packs, nor padding (slot -1, all zeros) change a draw.

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fitscale.flow.transfer import send

PADDING_SLOT = -1

# Uses of randomness that must never share a stream; far above the counters that the batch plan uses for its own.
TRAIN, VALIDATION, INITIAL_NOISE, SAMPLER_NOISE = range(1 << 63, (1 << 63) + 4)


@dataclass(frozen=True)
class Draws:
    """What chance decides of a pack: `t_S` in (0, 1), `drop_S` (label replaced by "no class"), `noise_TC` ~ N(0, 1)."""

    t_S: Tensor
    drop_S: Tensor
    noise_TC: Tensor

    def moved(self, send: Callable[[Tensor], Tensor]) -> "Draws":
        """Where `send` puts them."""
        return Draws(send(self.t_S), send(self.drop_S), send(self.noise_TC))

    def part(self, images: slice, tokens: slice) -> "Draws":
        """Those of some images that follow each other, and of their tokens; views."""
        return Draws(self.t_S[images], self.drop_S[images], self.noise_TC[tokens])


def image_generator(seed: int, step: int, slot: int, stream: int = TRAIN) -> np.random.Generator:
    """The generator of one image; different (seed, step, slot, stream) never overlap (2^128 draws apart)."""
    key, counter = np.array([seed, step], dtype=np.uint64), np.array([0, 0, slot, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draws(
    seed: int, step: int, slots: Sequence[int], lengths: Sequence[int], channels: int, times: str, label_drop: float
) -> Draws:
    """Time, label drop and noise of every image of a pack, on the CPU.

    Args:
        slots: S positions in the global batch; `PADDING_SLOT` gets time 0, no drop and zero noise.
        lengths: S token counts.
        times: "logit_normal" (sigmoid of a standard normal) or "uniform".
        label_drop: probability that a label is dropped.
    """
    generators = _generators(seed, step, slots, TRAIN)
    t_S = [_time(generator, times) if generator else 0.0 for generator in generators]
    drop_S = [generator is not None and generator.random() < label_drop for generator in generators]
    noise_TC = _normal(generators, lengths, channels)
    return Draws(torch.tensor(t_S, dtype=torch.float32), torch.tensor(drop_S, dtype=torch.bool), noise_TC)


def image_noise(
    seed: int, step: int, slots: Sequence[int], lengths: Sequence[int], channels: int, *, stream: int
) -> Tensor:
    """Standard normal noise (T, C) of the images `slots`, on the CPU; zeros for padding."""
    return _normal(_generators(seed, step, slots, stream), lengths, channels)


def interpolate(data_TC: Tensor, noise_TC: Tensor, t_T1: Tensor) -> Tensor:
    """The point x_t of the straight path."""
    return t_T1 * data_TC + (1 - t_T1) * noise_TC


def velocity(data_TC: Tensor, noise_TC: Tensor) -> Tensor:
    """dx_t/dt of the straight path, the same at every t."""
    return data_TC - noise_TC


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Token counts (S,) of the images of a pack, from their cumulated starts (S + 1,)."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def per_token(values_S: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Repeat one value per image over its tokens: (S,) -> (T, 1), on the device of the values."""
    lengths_S = send(lengths_of(cu_seqlens).long(), values_S.device)
    return values_S.repeat_interleave(lengths_S, output_size=tokens)[:, None]


def _generators(seed: int, step: int, slots: Sequence[int], stream: int) -> list[np.random.Generator | None]:
    """One for every image, None for padding."""
    return [None if slot == PADDING_SLOT else image_generator(seed, step, slot, stream) for slot in slots]


def _normal(generators: list[np.random.Generator | None], lengths: Sequence[int], channels: int) -> Tensor:
    noise_TC = torch.zeros(sum(lengths), channels)
    for generator, image_TC in zip(generators, noise_TC.split(list(lengths)), strict=True):
        if generator:
            generator.standard_normal(dtype=np.float32, out=image_TC.numpy())
    return noise_TC


def _time(generator: np.random.Generator, distribution: str) -> float:
    if distribution == "uniform":
        return generator.random()
    assert distribution == "logit_normal", distribution
    return 1 / (1 + np.exp(-generator.standard_normal()))

"""Classifier-free guidance over packed sequences.

A guided call evaluates the network once on a doubled pack (every image with its label, then every image with "no
class") and moves the conditional answer away from the unconditional one. As in the published FiT code, only the first
channels of the latent are guided (3 of 4 unless `channels` says so); the others keep the conditional answer. In a token
the channel is the slowest index, (c p1 p2), so the guided numbers are its first columns.

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token, 2 (row, column).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fitscale.config.schema import GuidanceConfig
from fitscale.flow.path import per_token

# model_fn(x_TC, t) -> output_TC; t is flow time, one number or one per image (S,)
ModelFn = Callable[[Tensor, float | Tensor], Tensor]


@dataclass(frozen=True, eq=False)  # hashed by identity: a network may keep what it worked out for a pack
class PackShape:
    """What a pack asks for: `labels_S`, `sizes_S2` in patches (row, column), and where its images start."""

    labels_S: Tensor
    sizes_S2: Tensor
    cu_seqlens: Tensor


# network(tokens_TC, t_S, pack) -> (T, output numbers per token)
Network = Callable[[Tensor, Tensor, PackShape], Tensor]


def network_evaluations(guidance: GuidanceConfig) -> int:
    """Passes of the network, per image, in one function evaluation: 2 where guidance needs "no class" too."""
    return 1 if guidance.scale == 1.0 else 2


def guidance_scale(guidance: GuidanceConfig, t: Tensor) -> Tensor:
    """Power-cosine scale (FiTv2): (scale - 1) (1 - cos(pi (1 - t)^power)) / 2 + 1; `scale` itself for power 0.

    For power > 0 it falls from `scale` at t = 0 (noise) to 1 at t = 1 (data).
    """
    return (guidance.scale - 1) * (1 - torch.cos(torch.pi * (1 - t) ** guidance.power)) / 2 + 1


def guided(
    network: Network,
    pack: PackShape,
    guidance: GuidanceConfig,
    *,
    no_class: int,
    patch_size: int,
    model_time: Callable[[Tensor], Tensor],
) -> ModelFn:
    """The function that samplers evaluate: the network at flow time t, guided unless the scale is 1.

    Args:
        no_class: the label of the unconditional half.
        model_time: flow time to the network's own unit (`Objective.model_time`).
    """
    twice = PackShape(
        torch.cat([pack.labels_S, torch.full_like(pack.labels_S, no_class)]),
        pack.sizes_S2.repeat(2, 1),
        torch.cat([pack.cu_seqlens, pack.cu_seqlens[1:] + pack.cu_seqlens[-1]]),
    )

    def plain(x_TC: Tensor, t: float | Tensor) -> Tensor:
        t_S = _times(t, pack, x_TC)
        return network(x_TC, model_time(t_S), pack)

    def doubled(x_TC: Tensor, t: float | Tensor) -> Tensor:
        t_S = _times(t, pack, x_TC)
        with_class, without = network(x_TC.repeat(2, 1), model_time(t_S).repeat(2), twice).chunk(2)
        columns = guidance.guided_channels(x_TC.shape[1] // patch_size**2) * patch_size**2
        scale_T1 = per_token(guidance_scale(guidance, t_S), pack.cu_seqlens, len(x_TC))
        moved = without[:, :columns] + scale_T1 * (with_class[:, :columns] - without[:, :columns])
        return torch.cat([moved, with_class[:, columns:]], dim=1)

    return plain if network_evaluations(guidance) == 1 else doubled


def _times(t: float | Tensor, pack: PackShape, x_TC: Tensor) -> Tensor:
    """One time per image, at most 1: dopri5 looks past the end, where, as in the published code, time stands still."""
    return torch.as_tensor(t, dtype=x_TC.dtype, device=x_TC.device).clamp(max=1.0).expand(len(pack.labels_S))

"""Guidance over packed sequences: the conditional answer is moved away from a worse one.

Classifier-free guidance takes the network's own answer for "no class"; a guided call evaluates the network once on a
longer pack, every image with its label, then every image that is guided with "no class". As in the published FiT code,
only the first channels of the latent are guided (3 of 4 unless `channels` says so); the others keep the conditional
answer. In a token the channel is the slowest index, (c p1 p2), so the guided numbers are its first columns.

Autoguidance (Karras et al. 2024, arXiv 2406.02507) takes the answer of a weaker network, the guide, for the same label;
all channels are guided then.

An image is guided where its scale is not 1: never outside the interval of times (Kynkaanniemi et al. 2024, arXiv
2404.07724), nor where the power-cosine scale has come down to 1. Elsewhere it has no second pass. What its passes of
the networks cost is counted under its index.

Shape suffixes: T tokens of a pack, S images of a pack, G of them that are guided, C numbers in a token.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fitscale.config.schema_sampling import GuidanceConfig
from fitscale.flow.pack import PackShape, starts

# network(tokens_TC, t_S, pack) -> (T, output numbers per token); t_S in the network's own unit, on the tokens' device
Network = Callable[[Tensor, Tensor, PackShape], Tensor]


def guidance_scale(guidance: GuidanceConfig, t_S: Tensor, scale_S: Tensor | None = None) -> Tensor:
    """Power-cosine scale: (scale - 1) (1 - cos(pi u^power)) / 2 + 1; `scale` itself for power 0.

    For power > 0 it is `scale` at one end and 1 at the other: u = 1 - t, from the noise, as for FiTv2; or, with
    `towards` = data, u = t, as for DiMR (arXiv 2406.09416). Outside `interval`, ends included, it is 1. `scale_S` are
    the images' own scales; None is the config's for all.
    """
    most = guidance.scale if scale_S is None else scale_S
    along_S = t_S if guidance.towards == "data" else 1 - t_S
    bent_S = (most - 1) * (1 - torch.cos(torch.pi * along_S**guidance.power)) / 2 + 1
    low, high = guidance.interval
    return torch.where((low <= t_S) & (t_S <= high), bent_S, torch.ones_like(bent_S))


class Guided:
    """The function that samplers evaluate: the network at flow time t, guided where the scale is not 1.

    Args:
        no_class: the label of the unconditional half.
        model_time: flow time to the networks' own unit (`Objective.model_time`).
        guide: the weaker network of autoguidance; None = classifier-free guidance.
    """

    def __init__(
        self,
        network: Network,
        guidance: GuidanceConfig,
        *,
        no_class: int,
        patch_size: int,
        model_time: Callable[[Tensor], Tensor],
        guide: Network | None = None,
    ) -> None:
        self.network, self.guidance, self.guide = network, guidance, guide
        self.no_class, self.patch_size, self.model_time = no_class, patch_size, model_time
        self.passes: Counter[int] = Counter()  # of the networks, by the images' indices
        self._doubled = lru_cache(maxsize=4)(self._double)
        self._selected = lru_cache(maxsize=4)(PackShape.select)

    def __call__(self, x_TC: Tensor, t_S: Tensor, pack: PackShape) -> Tensor:
        t_S = t_S.clamp(max=1.0)  # dopri5 looks past the end, where, as in the published code, time stands still
        scale_S = guidance_scale(self.guidance, t_S.double(), pack.scale_S)
        guided = [place for place, scale in enumerate(scale_S.tolist()) if scale != 1]
        self.passes.update(pack.indices)
        self.passes.update(pack.indices[place] for place in guided)
        if not guided:
            return self.network(x_TC, self.model_time(t_S).to(x_TC), pack)
        with_TC, without_TC = self._answers(x_TC, t_S, pack, tuple(guided))
        columns = self.guidance.guided_channels(x_TC.shape[1] // self.patch_size**2) * self.patch_size**2
        start_TC = _replaced(with_TC[:, :columns], without_TC[:, :columns], pack, guided)
        moved_TC = start_TC + pack.spread(scale_S, with_TC) * (with_TC[:, :columns] - start_TC)
        return torch.cat([moved_TC, with_TC[:, columns:]], dim=1)

    def _answers(self, x_TC: Tensor, t_S: Tensor, pack: PackShape, guided: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The conditional answers of the pack, and the worse ones of its images at `guided`."""
        second_TC, second_S = pack.part(x_TC, guided), t_S[list(guided)]
        if self.guide is not None:
            with_TC = self.network(x_TC, self.model_time(t_S).to(x_TC), pack)
            second = self._selected(pack, guided)
            return with_TC, self.guide(second_TC, self.model_time(second_S).to(x_TC), second).to(with_TC)
        time_S = self.model_time(torch.cat([t_S, second_S])).to(x_TC)
        answers_TC = self.network(torch.cat([x_TC, second_TC]), time_S, self._doubled(pack, guided))
        with_TC, without_TC = answers_TC.split([len(x_TC), len(second_TC)])
        return with_TC, without_TC

    def _double(self, pack: PackShape, guided: Sequence[int]) -> PackShape:
        """`pack`, and after it its images at `guided` without a class."""
        second = pack.select(guided)
        return PackShape(
            torch.cat([pack.labels_S, torch.full_like(second.labels_S, self.no_class)]),
            torch.cat([pack.sizes_S2, second.sizes_S2]),
            starts([*pack.lengths, *second.lengths]),
            pack.indices + second.indices,
        )


def _replaced(values_TC: Tensor, others_TC: Tensor, pack: PackShape, places: Sequence[int]) -> Tensor:
    """`values_TC` with the rows of the images at `places` taken from `others_TC`, which has theirs alone."""
    parts, lengths = list(values_TC.split(pack.lengths)), pack.lengths
    for place, part_TC in zip(places, others_TC.split([lengths[place] for place in places]), strict=True):
        parts[place] = part_TC
    return torch.cat(parts)

"""DiMR (arXiv 2406.09416): one network that denoises at two resolutions, over packs of images of any even size.

1. The Transformer stage sees the tokens (2 x 2 latent pixels each) and a class token for each image, through a U-shaped
   chain of blocks; its head predicts the noise at half the resolution.
2. The link joins the chain's input and the outputs of all its blocks, and gives every latent pixel a vector.
3. The ConvNeXt stage adds that to its own view of the input, goes through a chain of its own, and predicts the noise of
   every latent pixel.

Time enters through the norms alone: their scales and shifts are vectors that depend on it (TD-LN). It is handed down,
not kept on modules, so that a block may be computed again at any time. Images of equal shape are brought together for
what needs grids (`grids`). Modules have the names of the published checkpoints; their weights are set afterwards, by
`init` or `weights`.

Shapes: T tokens of the pack, S images, X = T + S rows of the Transformer stage, P = 4 T latent pixels, R rows of either
stage, D the stage's width, C numbers in a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitscale.config.schema import ParallelConfig
from fitscale.model.common.attention import packed_attention
from fitscale.model.common.fused import geglu
from fitscale.model.common.layout import PackLayout, Segments
from fitscale.model.common.recompute import run_block
from fitscale.model.common.regions import Biased, at_least_fp32, biased
from fitscale.model.dimr.config import PIXELS, DimrConfig
from fitscale.model.dimr.fused import (
    add_scaled_rms,
    joined_layer_norm_linear,
    joined_linear,
    scaled_layer_norm,
    scaled_rms,
)
from fitscale.model.dimr.grids import Grids, pack_grids
from fitscale.model.dimr.layers import GridConvolution, PatchLinear, PositionTable, TimeNorm, TimeVector
from fitscale.model.dimr.spec import HEAD_KERNEL, KERNEL
from fitscale.parallel.layers import ColumnLinear, RowLinear

HALF_SPAN = 500  # timesteps: 0 to 1000 are tau from -1 to 1


@dataclass(frozen=True)
class Pack:
    """What a stage's blocks get beside their rows."""

    tau_S: Tensor  # n / 500 - 1 of each image, fp32
    grids: Grids
    segments: Segments  # the rows of each image


class Dimr(nn.Module):
    """The network."""

    def __init__(self, config: DimrConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.stages = nn.ModuleList([TransformerStage(config), ConvNextStage(config)])

    def forward(self, tokens_TC: Tensor, t_S: Tensor, labels_S: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        """Predict the noise at both resolutions.

        Args:
            tokens_TC: noisy tokens of all images of the pack.
            t_S: timestep of each image, 0 (data) to 1000 (noise), whole or not.
            labels_S: class of each image; `num_classes` is "no class".

        Returns:
            float32 (T, in_channels), the noise of 2 x 2 pixels summed and halved, and (T, 4 in_channels), the noise,
            channel order `(c p1 p2)`.

        Raises:
            UserError: an image is too large for the tables of positions (`PositionTable`).
        """
        grids, every = pack_grids(layout), self.parallel.activation_checkpoint_every
        tokens_TC, tau_S = tokens_TC[grids.token_T], at_least_fp32(t_S)[grids.image_S] / HALF_SPAN - 1
        coarse_TC, states = self.stages[0](tokens_TC, labels_S[grids.image_S], tau_S, grids, every)
        fine_TC = self.stages[1](tokens_TC, states, tau_S, grids, every)
        coarse_TC, fine_TC = (out.index_select(0, grids.back_T) for out in (coarse_TC, fine_TC))
        return at_least_fp32(coarse_TC), at_least_fp32(fine_TC)


class TransformerStage(nn.Module):
    """From tokens to the noise at half the resolution, and the states (X, D) of its chain."""

    def __init__(self, config: DimrConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layer = InputLayer(config, width, side=2, scale=1)
        self.class_embeds = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(Attention(config), GatedMlp(width, config.mlp_hidden_size)) for _ in range(config.depth)
        )
        self.skip_denses = nn.ModuleList(Skip(2 * width, width) for _ in range(config.depth // 2))
        self.output_layer = Head(config, width, scale=1)

    def forward(
        self, tokens_TC: Tensor, labels_S: Tensor, tau_S: Tensor, grids: Grids, checkpoint_every: int
    ) -> tuple[Tensor, list[Tensor]]:
        both = torch.cat((self.class_embeds(labels_S), self.input_layer(tokens_TC, grids)))
        pack = Pack(tau_S, grids, grids.sequences.whole)
        x_XD = both.index_select(0, grids.sequence_X)
        states = chain(self.blocks, self.skip_denses, x_XD, pack, checkpoint_every)
        return self.output_layer(states[-1].index_select(0, grids.patch_T), tau_S, grids, grids.tokens), states


class ConvNextStage(nn.Module):
    """From tokens and the states of the Transformer stage to the noise of every latent pixel, (T, C)."""

    def __init__(self, config: DimrConfig) -> None:
        super().__init__()
        width = config.convnext_size
        self.input_layer = InputLayer(config, width, side=1, scale=2)
        self.upsample = Link(config)
        self.blocks = nn.ModuleList(
            Block(Depthwise(width), GatedMlp(width, config.convnext_mlp_hidden_size))
            for _ in range(config.convnext_depth)
        )
        self.skip_denses = nn.ModuleList(Skip(2 * width, width) for _ in range(config.convnext_depth // 2))
        self.output_layer = Head(config, width, scale=2)

    def forward(
        self, tokens_TC: Tensor, states: list[Tensor], tau_S: Tensor, grids: Grids, checkpoint_every: int
    ) -> Tensor:
        pixels_PC = tokens_TC.unflatten(1, (-1, PIXELS)).transpose(1, 2).flatten(0, 1)[grids.raster_P]
        x_PD = self.input_layer(pixels_PC, grids) + self.upsample(states, tau_S, grids)
        states = chain(self.blocks, self.skip_denses, x_PD, Pack(tau_S, grids, grids.pixels), checkpoint_every)
        out_PC = self.output_layer(states[-1], tau_S, grids, grids.pixels)
        return out_PC.index_select(0, grids.token_order_P).unflatten(0, (-1, PIXELS)).transpose(1, 2).flatten(1)


def chain(blocks: nn.ModuleList, skips: nn.ModuleList, x_RD: Tensor, pack: Pack, checkpoint_every: int) -> list[Tensor]:
    """The input and the output of every block: those of the second half also see what came out of the first half, last
    in first out."""

    def step(index: int, x_RD: Tensor, popped_RD: Tensor | None) -> Tensor:
        if popped_RD is not None:
            x_RD = skips[index - len(skips) - 1](x_RD, popped_RD)
        return blocks[index](x_RD, pack)

    states = [x_RD]
    for index in range(len(blocks)):
        inputs = (index, states[-1], states[len(blocks) - index] if index > len(skips) else None)
        states.append(run_block(step, index, checkpoint_every, *inputs))
    return states


class InputLayer(nn.ModuleDict):
    """Patches of `side` x `side` latent pixels to the stage's width, and their positions."""

    def __init__(self, config: DimrConfig, width: int, side: int, scale: int) -> None:
        positions = nn.ModuleDict({"position_embeddings": PositionTable(config, width, scale)})
        super().__init__({"1": PatchLinear(config.in_channels, width, side), "3": positions})

    def forward(self, patches_RC: Tensor, grids: Grids) -> Tensor:
        return self.get_submodule("3.position_embeddings")(self["1"](patches_RC), grids)


class Block(nn.Module):
    """What mixes rows, then a gated MLP on each, both added to what they get."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.block1, self.block2 = mixer, mlp

    def forward(self, x_RD: Tensor, pack: Pack) -> Tensor:
        return self.block2(x_RD, self.block1(x_RD, pack), pack)


class Attention(nn.Module):
    """Self-attention within an image and its class token; heads are split over the tensor-parallel ranks.

    The rows of `query_key_value` lie head by head, (heads, 3, head dimension), so that a rank's shard is one run.
    """

    def __init__(self, config: DimrConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.norm = nn.ModuleDict({"scale": TimeVector(width)})
        self.query_key_value = ColumnLinear(width, 3 * width, sequence_parallel=False, bias=False)
        self.dense = RowLinear(width, width, sequence_parallel=False)

    def forward(self, x_XD: Tensor, pack: Pack) -> Biased:
        normed = scaled_rms(x_XD, self.norm["scale"](pack.tau_S), pack.segments)
        q, k, v = biased(*self.query_key_value(normed)).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)
        return self.dense(packed_attention(q, k, v, pack.grids.sequences).flatten(1))


class Depthwise(nn.ModuleDict):
    """The ConvNeXt block's convolution of every channel with a kernel of its own."""

    def __init__(self, width: int) -> None:
        super().__init__({"1": GridConvolution(width, width, KERNEL, groups=width, scale=2)})

    def forward(self, x_PD: Tensor, pack: Pack) -> Biased:
        return self["1"](x_PD, pack.grids), None


class GatedMlp(nn.Module):
    """x + branch =: y, then y + w2(GELU(w0 z) * w1 z), z = norm(y); its width is split over tensor-parallel ranks."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.ModuleDict({"scale": TimeVector(width)})
        self.w0 = ColumnLinear(width, hidden, sequence_parallel=False)
        self.w1 = ColumnLinear(width, hidden, sequence_parallel=False)
        self.w2 = RowLinear(hidden, width, sequence_parallel=False)

    def forward(self, x_RD: Tensor, branch: Biased, pack: Pack) -> Tensor:
        x_RD, normed = add_scaled_rms(x_RD, branch, self.norm["scale"](pack.tau_S), pack.segments)
        return x_RD + biased(*self.w2(geglu(self.w0(normed), self.w1(normed))))


class Link(nn.ModuleDict):
    """All states of the Transformer stage, joined, to a vector for each latent pixel."""

    def __init__(self, config: DimrConfig) -> None:
        width, joined = config.convnext_size, (config.depth + 1) * config.hidden_size
        kernel = nn.ModuleDict({"kernel": JoinedLinear(joined, PIXELS * width)})
        super().__init__({"0": TimeNorm(joined), "1": kernel, "2": TimeNorm(width)})

    def forward(self, states: list[Tensor], tau_S: Tensor, grids: Grids) -> Tensor:
        """Those (X, D) -> (P, width). Class tokens are dropped at the end: before, all states would be copied."""
        out_XD = self.get_submodule("1.kernel")(states, *self["0"](tau_S), grids.sequences.whole)
        pixels_PD = out_XD.index_select(0, grids.patch_T).unflatten(1, (PIXELS, -1)).flatten(0, 1)
        scale_SD, shift_SD = self["2"](tau_S)
        return scaled_layer_norm(pixels_PD.index_select(0, grids.raster_P), scale_SD, shift_SD, grids.pixels)


class Skip(nn.Linear):
    """What the second half of a chain makes of its row and one that came out of the first half."""

    def forward(self, x_RD: Tensor, popped_RD: Tensor) -> Tensor:  # type: ignore[override]
        return joined_linear((x_RD, popped_RD), self.weight, self.bias)


class JoinedLinear(nn.Linear):
    """The linear layer of the link, and the norm before it (`joined_layer_norm_linear`)."""

    def forward(  # type: ignore[override]
        self, states: Sequence[Tensor], scale_SJ: Tensor, shift_SJ: Tensor, segments: Segments
    ) -> Tensor:
        return joined_layer_norm_linear(states, scale_SJ, shift_SJ, self.weight, self.bias, segments)


class Head(nn.ModuleDict):
    """Norm and convolution to the noise at the stage's resolution."""

    def __init__(self, config: DimrConfig, width: int, scale: int) -> None:
        convolution = GridConvolution(width, config.in_channels, HEAD_KERNEL, groups=1, scale=scale)
        super().__init__({"0": TimeNorm(width), "2": convolution})

    def forward(self, x_RD: Tensor, tau_S: Tensor, grids: Grids, segments: Segments) -> Tensor:
        scale_SD, shift_SD = self["0"](tau_S)
        return self["2"](scaled_layer_norm(x_RD, scale_SD, shift_SD, segments), grids)

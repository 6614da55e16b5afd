"""FiT and FiTv2 (arXiv 2402.12376, 2410.13925): a diffusion transformer over packs of images of any size.

1. Tokens of all images of a pack are embedded together; time and class give one conditioning vector per image.
2. Blocks run on the pack; attention stays within each image, positions are 2-D RoPE from each image's own size.
3. The final layer predicts `out_channels` numbers for each latent pixel of each token's patch.

With sequence parallelism the tokens are cut over the tensor-parallel ranks from after the embedding to before the final
layer; both ends are replicated. No process group is named here: `fitscale.parallel.layers` knows them.

Shapes: T tokens of the pack, S images, D hidden size, C numbers in a token, K head dimension.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fitscale.config.schema import ModelConfig, ParallelConfig
from fitscale.model.attention import PackLayout, pack_layout
from fitscale.model.layers import Block, ClassEmbedder, FinalLayer, TimeEmbedder, TokenEmbedder
from fitscale.parallel.layers import gather_tokens, scatter_tokens


class FiT(nn.Module):
    """The network. Make it after `init_parallel`; its weights come from `initial_items` or `read_items`.

    `rope` may be replaced after construction, to generate at sizes beyond those trained on.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.rope = config.rope
        self.x_embedder = TokenEmbedder(config)
        self.t_embedder = TimeEmbedder(config)
        self.y_embedder = ClassEmbedder(config)
        self.global_adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))
            if config.adaln_rank is not None
            else None
        )
        self.blocks = nn.ModuleList(Block(config, parallel.sequence_parallel) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, tokens_TC: Tensor, t_S: Tensor, labels_S: Tensor, sizes_S2: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Predict velocity (FiTv2) or noise and the variance's interpolation (FiT) for every token.

        Args:
            tokens_TC: noisy tokens of all images, one image after the other, each in raster order.
            t_S: time of each image, in [0, 1] (FiTv2) or DDPM steps 0..999 (FiT).
            labels_S: class of each image; `num_classes` is "no class".
            sizes_S2: (rows, columns) of each image in patches; on the CPU, or the device is waited for.
            cu_seqlens: (S + 1,) where each image starts, and T; on the CPU likewise. Under sequence parallelism T
                divides by the tensor-parallel size.

        Returns:
            float32 (T, patch_size^2 * out_channels), channel order `(c p1 p2)`.
        """
        split_tokens = self.parallel.sequence_parallel
        layout = pack_layout(sizes_S2, cu_seqlens, self.rope, self.config.head_dim, tokens_TC.device, split_tokens)
        x_TD = self.x_embedder(tokens_TC)
        c_SD = self.t_embedder(t_S) + self.y_embedder(labels_S)
        x_TD = self._blocks(scatter_tokens(x_TD) if split_tokens else x_TD, c_SD, layout)
        return self.final_layer(gather_tokens(x_TD) if split_tokens else x_TD, c_SD, layout).float()

    def _blocks(self, x_TD: Tensor, c_SD: Tensor, layout: PackLayout) -> Tensor:
        shared_S6D = None if self.global_adaLN_modulation is None else self.global_adaLN_modulation(c_SD)
        every = self.parallel.activation_checkpoint_every
        for index, block in enumerate(self.blocks):
            if every and index % every == 0 and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, c_SD, shared_S6D, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, c_SD, shared_S6D, layout)
        return x_TD

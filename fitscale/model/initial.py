"""The weights that training starts from (FITv2's recipe: Xavier-uniform linears, normal embeddings, zero outputs).

Each tensor is drawn whole, on the CPU, from a generator of its own that (seed, its name) decides, and then cut for this
rank. So the weights are the same in every layout and on every device, in whatever order modules are made, and a model
that ZeRO-3 partitions while it is built never exists whole.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fitscale.model.fit import FiT
from fitscale.parallel.layers import full_shape, tp_shard

EMBEDDING_STD = 0.02
# Layers that start at zero, so that a block starts as the identity and the output as zero.
_ZERO = ("global_adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight")
_NORMAL = ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight")


def initial_items(model: FiT, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, this rank's piece of its initial fp32 tensor), one at a time, on the CPU."""
    for name, param in model.named_parameters():
        yield param, tp_shard(param, _draw(name, full_shape(param), seed, model.config.adaln_rank))


def _draw(name: str, shape: tuple[int, ...], seed: int, adaln_rank: int | None) -> Tensor:
    tensor = torch.zeros(shape)
    if name in _ZERO or name.endswith((".bias", _block_output(adaln_rank))):
        return tensor
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if name in _NORMAL:
        return nn.init.normal_(tensor, std=EMBEDDING_STD, generator=generator)
    return nn.init.xavier_uniform_(tensor, generator=generator)


def _block_output(adaln_rank: int | None) -> str:
    """End of the name of a block's last AdaLN linear: the second with a low-rank pair, else the only one."""
    return "adaLN_modulation.1.weight" if adaln_rank is None else "adaLN_modulation.2.weight"

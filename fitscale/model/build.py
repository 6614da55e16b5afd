"""The network of a config, and the weights that training starts from, as the backbone's table says.

Each initial tensor is drawn whole, on the CPU, from a generator of its own that (seed, its name) decides, and then cut
for this rank. So the weights are the same in every layout and on every device, in whatever order modules are made, and
a model that ZeRO-3 partitions while it is built never exists whole.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fitscale.config.schema import ModelConfig, ParallelConfig
from fitscale.model.backbone import Parameter, backbone_of, parameter_table, parameters_by_name
from fitscale.model.weights import halves
from fitscale.parallel.layers import split_of, tp_shard

NORMAL_STD = {"normal": 0.02, "unit_normal": 1.0}


def build_network(model: ModelConfig, parallel: ParallelConfig) -> nn.Module:
    """Build it, after `init_parallel`; its weights come from `initial_items` or `weights`.

    Whatever is worked out from the backbone's table rests on the network having just those parameters, split so.
    """
    network = backbone_of(model).build(model, parallel)
    built = {name: split_of(param) for name, param in network.named_parameters()}
    table = {entry.name: entry.split for entry in parameter_table(model)}
    differing = sorted(name for name, _ in built.items() ^ table.items())
    assert not differing, f"network and table of {model.family} differ in {', '.join(differing)}"
    return network


def initial_items(model: nn.Module, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, this rank's shard of its initial fp32 tensor), one at a time, on the CPU; `model` has its config."""
    table = parameters_by_name(model)
    for name, param in model.named_parameters():
        yield param, tp_shard(halves(table[name], _draw(table[name], seed)), table[name].split)


def _draw(entry: Parameter, seed: int) -> Tensor:
    if entry.init in ("zero", "one"):
        return torch.full(entry.shape, float(entry.init == "one"))
    digest = hashlib.blake2b(f"{seed} {entry.name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if entry.init in NORMAL_STD:
        return torch.zeros(entry.shape).normal_(0.0, NORMAL_STD[entry.init], generator=generator)
    if entry.init == "uniform":
        return torch.zeros(entry.shape).uniform_(-entry.bound, entry.bound, generator=generator)
    assert entry.init == "xavier", f"{entry.name}: no initialisation is called {entry.init}"
    return nn.init.xavier_uniform_(torch.zeros(entry.shape), generator=generator)

"""The network of a config."""

from torch import nn

from fitscale.config.schema import ModelConfig, ParallelConfig
from fitscale.model.backbone import backbone_of, parameter_table
from fitscale.parallel.layers import split_of


def build_network(model: ModelConfig, parallel: ParallelConfig) -> nn.Module:
    """Build it, after `init_parallel`; its weights come from `init` or `weights`.

    Whatever is worked out from the backbone's table rests on the network having just those parameters, split so.
    """
    network = backbone_of(model).build(model, parallel)
    built = {name: split_of(param) for name, param in network.named_parameters()}
    table = {entry.name: entry.split for entry in parameter_table(model)}
    differing = sorted(name for name, _ in built.items() ^ table.items())
    assert not differing, f"network and table of {model.family} differ in {', '.join(differing)}"
    return network

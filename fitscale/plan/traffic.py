"""What one rank sends in one step, and how long that takes (no torch).

With n ranks, an all-reduce sends 2 (n - 1)/n of its tensor, a gather or a scatter (n - 1)/n. As DeepSpeed 0.19 does it
(P trained numbers of this tensor-parallel rank, m micro-batches a step):

    stage 0     gradients all-reduced once
    stage 1     gradients all-reduced once; weights gathered after the step
    stage 2     gradients all-reduced in every micro-batch (not scattered), behind the backward pass; weights gathered
    stage 3     weights gathered for the forward and again for the backward pass of every micro-batch, gradients
                scattered in every micro-batch, behind both passes; with hpZ all but the first gather of a step are
                among the ranks that share a copy

Gradients travel in fp32, weights in their own type.

Tensor parallelism sums the tokens' outputs of every weight that is split by columns in the forward pass, and the
gradients of the inputs of every weight that is split by rows in the backward pass. Sequence parallelism gathers the
inputs of the latter (twice more in the backward pass, with a scatter) and scatters the outputs of the former.
"""

from dataclasses import dataclass

from fitscale.config.schema import Config
from fitscale.model.backbone import COLUMNS, ROWS, parameter_table
from fitscale.plan import memory
from fitscale.plan.layout import Machine

LINK_SHARE = 0.8  # of a link's rate that large collectives reach; NCCL's own tests show about so much
BACKWARD_SHARE = 2 / 3  # of a pass forward and backward


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step, by kind; `copied_weights` are of `weights`, gathered from hpZ's copy."""

    gradients: float
    weights: float
    tensor_parallel: float
    copied_weights: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.tensor_parallel


def step_traffic(config: Config, dp_size: int, micro_batches: int, tokens: float) -> Traffic:
    """Traffic of one rank; `tokens` are those it computes in a step, padding included; precision must be resolved."""
    stage, each, own = config.parallel.zero_stage, memory.number_bytes(config), memory.rank_parameters(config)
    ring = (dp_size - 1) / dp_size
    trained, gradients = each * own.trained, memory.FP32 * own.trained
    if stage == 3:
        first, again = own.gathered + own.persistent, micro_batches * (2 * own.gathered - own.kept) - own.gathered
        group = config.parallel.zero_hpz_partition_size
        copied = (group - 1) / group * each * again if group > 1 else 0.0
        weights = ring * each * first + (copied if group > 1 else ring * each * again)
        return Traffic(ring * micro_batches * gradients, weights, _tensor_parallel(config, tokens), copied)
    times = micro_batches if stage == 2 else 1
    weights = ring * trained if stage else 0.0
    return Traffic(2 * ring * times * gradients, weights, _tensor_parallel(config, tokens))


def _tensor_parallel(config: Config, tokens: float) -> float:
    parallel, tp = config.parallel, config.parallel.tensor_parallel_size
    weights = [one for one in parameter_table(config.model) if one.is_weight and one.split is not None]
    fans_out = sum(one.per_token * one.shape[COLUMNS] for one in weights if one.split == ROWS)  # what enters a region
    fans_in = sum(one.per_token * one.shape[ROWS] for one in weights if one.split == COLUMNS)  # and what leaves it
    if parallel.sequence_parallel:
        forward, backward, ends, factor = fans_out + fans_in, 2 * fans_out + fans_in, 2 * config.model.hidden_size, 1
    else:
        forward, backward, ends, factor = fans_in, fans_out, 0, 2
    width = forward * (1 + memory.recomputed_share(config)) + backward + ends
    return factor * (tp - 1) / tp * tokens * width * memory.number_bytes(config)


def exposed_seconds(config: Config, traffic: Traffic, dp_size: int, machine: Machine, compute_s: float) -> float:
    """Time of a step's communication that no computation hides: an estimate from bandwidths, without latencies.

    Tensor parallelism stays within a node. A data-parallel group that leaves it has the network ports of all its
    ranks of a node together. What stages 2 and 3 send while they compute counts only where it takes longer.
    """
    parallel, device, gpus_per_node = config.parallel, machine.device, machine.gpus_per_node
    inside = LINK_SHARE * device.intra_node_bytes_per_s
    members = max(gpus_per_node // parallel.tensor_parallel_size, 1)
    leaves_node = dp_size * parallel.tensor_parallel_size > gpus_per_node
    rate = min(inside, LINK_SHARE * members * device.inter_node_bytes_per_s) if leaves_node else inside
    group_leaves = parallel.zero_hpz_partition_size > members
    gradients_s, weights_s = traffic.gradients / rate, (traffic.weights - traffic.copied_weights) / rate
    weights_s += traffic.copied_weights / (rate if group_leaves else inside)
    if parallel.zero_stage == 2:
        gradients_s = max(gradients_s - BACKWARD_SHARE * compute_s, 0.0)
    elif parallel.zero_stage == 3:
        gradients_s, weights_s = max(gradients_s + weights_s - compute_s, 0.0), 0.0
    return gradients_s + weights_s + traffic.tensor_parallel / inside

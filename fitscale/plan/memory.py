"""What one rank holds in memory, from the config alone (no torch).

Two moments can be the peak: the backward pass (activations are alive) and the optimizer's step (they are gone, the
optimizer's temporaries are there). `rank_memory` gives both, part by part.

The state follows what DeepSpeed 0.19 allocates, read in its source and measured in
tests/distributed/test_plan_memory.py. With P numbers of this tensor-parallel rank and n data-parallel ranks, in bytes:

    stage  precision  weights   gradients                           fp32 weights + moments
    0      fp32       4P        4P                                  8P (the weights are the fp32 weights)
    1      fp32       4P        4P, in the step 4P/n                12P/n (a copy is stepped, in fp32 too)
    1      bf16       2P        6P (bf16, and a whole fp32 sum)     12P/n
    2      both       4P, 2P    4P/n                                12P/n
    3      both       4P/n 2P/n 4P/n, in the step a copy more       12P/n
                      + small tensors whole

and 4P/n for each average of the weights (stage 0: 4P). Frozen parameters have weights alone. An offloaded optimizer
keeps fp32 weights, moments and EMA in host memory, gradients besides; of the gradients, stage 1 has 4P on the
device in the backward pass, stage 2 in bf16 4P/n.
"""

from dataclasses import dataclass, fields

from fitscale.config.schema import Config
from fitscale.model.backbone import backbone_of, parameter_table

# DeepSpeed's defaults (runtime/zero/config.py), in numbers of a tensor.
SUB_GROUP = 1_000_000_000  # sub_group_size: parameters that ZeRO-3 steps at a time
PERSISTENT = 100_000  # param_persistence_threshold: ZeRO-3 keeps smaller tensors whole
REUSE = 1_000_000_000  # max_reuse_distance: ZeRO-3 keeps what it will need again within so many numbers
PREFETCH = 50_000_000  # prefetch_bucket_size

FP32 = 4


@dataclass(frozen=True)
class Moment:
    """Bytes of one rank at one moment, by part."""

    weights: float
    gradients: float
    optimizer: float  # fp32 weights and the two moments of Adam
    ema: float
    activations: float
    buffers: float  # communication, gathered weights, temporaries of the optimizer

    @property
    def state(self) -> float:
        """Weights, gradients, optimizer and EMA."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankMemory:
    """The two moments of which one is the peak, and what an offloaded optimizer keeps in host memory."""

    backward: Moment
    step: Moment
    host: float

    @property
    def peak(self) -> float:
        return max(self.backward.total, self.step.total)

    @property
    def state(self) -> float:
        """Peak of weights, gradients, optimizer and EMA together, on the device and the host."""
        return max(self.backward.state, self.step.state) + self.host


@dataclass(frozen=True)
class RankParameters:
    """Numbers that one tensor-parallel rank holds before ZeRO divides them."""

    all: int
    trained: int
    persistent: int  # in tensors that ZeRO-3 keeps whole
    largest: int  # in one tensor

    @property
    def gathered(self) -> int:
        """Numbers that ZeRO-3 gathers for each pass."""
        return self.all - self.persistent

    @property
    def kept(self) -> int:
        """Numbers that ZeRO-3 keeps gathered from the forward pass to the backward pass."""
        return min(self.gathered, REUSE // 2)  # the way there and back


def rank_parameters(config: Config) -> RankParameters:
    """Parameters of one tensor-parallel rank."""
    tp, table, patterns = config.parallel.tensor_parallel_size, parameter_table(config.model), config.optim.trainable
    local = [one.local(tp) for one in table]
    trained = sum(one.local(tp) for one in table if not patterns or one.matches(patterns))
    return RankParameters(sum(local), trained, sum(size for size in local if size <= PERSISTENT), max(local))


def rank_memory(config: Config, dp_size: int, pack_tokens: int, pack_images: int, on_cuda: bool) -> RankMemory:
    """Memory of one rank of `dp_size` x `config.parallel.tensor_parallel_size`; precision must be resolved.

    Args:
        pack_tokens: tokens of the largest pack, padding included.
        pack_images: images in it.
        on_cuda: DeepSpeed overlaps communication there (two buckets), torch steps all tensors at once, and attention
            keeps one copy of its output less.
    """
    sizes = rank_parameters(config)
    backward_weights, step_weights = _weights(config, sizes, dp_size)
    in_backward, in_step = _gradients(config, sizes, dp_size)
    stage, copies = config.parallel.zero_stage, len(config.optim.ema_decays)
    own = sizes.trained / (dp_size if stage else 1)
    optimizer, ema = FP32 * (3 if stage else 2) * own, FP32 * copies * own  # weights in fp32 with the two moments
    backward_buffers, step_buffers = _buffers(config, sizes, dp_size, on_cuda)
    activations = activation_bytes(config, pack_tokens, pack_images, on_cuda)
    host = 0.0
    if config.parallel.offload_optimizer:
        host = optimizer + ema + _host_gradients(config, sizes, dp_size)
        optimizer = ema = 0.0
    return RankMemory(
        backward=Moment(backward_weights, in_backward, optimizer, ema, activations, backward_buffers),
        step=Moment(step_weights, in_step, optimizer, ema, 0.0, step_buffers),
        host=host,
    )


def number_bytes(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.parallel.precision == "bf16" else FP32


def block_count(config: Config) -> int:
    """Blocks of the network."""
    return backbone_of(config.model).kept(config.model, False).blocks


def recomputed_blocks(config: Config) -> int:
    """Blocks whose forward pass is run again in the backward pass."""
    every = config.parallel.activation_checkpoint_every
    return -(-block_count(config) // every) if every else 0


def recomputed_share(config: Config) -> float:
    """Share of the forward pass that is run again in the backward pass."""
    return recomputed_blocks(config) / block_count(config)


def activation_bytes(config: Config, tokens: int, images: int, on_cuda: bool) -> float:
    """What autograd keeps of one pack of `tokens` tokens and `images` images, and what the backward pass adds."""
    parallel, each = config.parallel, number_bytes(config)
    kept = backbone_of(config.model).kept(config.model, on_cuda)
    tp = parallel.tensor_parallel_size
    own = tp if parallel.sequence_parallel else 1
    statistics = FP32 * (kept.token_statistics + kept.token_statistics_split / tp)
    block = tokens * (each * (kept.token / own + kept.token_split / tp) + statistics) + images * each * kept.image
    block += (each + 1) * (kept.ternary + kept.ternary_split / tp)
    recomputed = recomputed_blocks(config)
    entering = config.model.hidden_size if kept.entering is None else kept.entering
    inputs = recomputed * tokens * each * entering / own
    ends_recomputed = recomputed > 0 and (kept.blocks - 1) % parallel.activation_checkpoint_every == 0
    alive = kept.blocks - recomputed + ends_recomputed
    return inputs + alive * block + tokens * (each * kept.ends + FP32 * kept.positions)


def _weights(config: Config, sizes: RankParameters, dp_size: int) -> tuple[float, float]:
    """In the backward pass and in the step, for which ZeRO-3 lets go of the small tensors that it keeps whole."""
    each = number_bytes(config)
    if config.parallel.zero_stage < 3:
        return each * sizes.all, each * sizes.all
    copies = config.parallel.zero_hpz_partition_size
    shard = each * sizes.all * (1 / dp_size + (1 / copies if copies > 1 else 0))  # hpZ's copy is dropped after the step
    return shard + each * sizes.persistent, shard


def _gradients(config: Config, sizes: RankParameters, dp_size: int) -> tuple[float, float]:
    """On the device, in the backward pass and in the step."""
    stage, bf16, whole = config.parallel.zero_stage, config.parallel.precision == "bf16", FP32 * sizes.trained
    if config.parallel.offload_optimizer:
        if stage == 1:
            return whole, 0.0
        kept = whole / dp_size if stage == 2 and bf16 else 0.0
        return kept, kept
    if stage == 0:
        return whole, whole
    if stage == 1 and bf16:
        return 1.5 * whole, 1.5 * whole
    if stage == 3:
        copy = FP32 * min(sizes.trained, SUB_GROUP) / dp_size
        return whole / dp_size, whole / dp_size + copy
    return (whole if stage == 1 else whole / dp_size), whole / dp_size


def _host_gradients(config: Config, sizes: RankParameters, dp_size: int) -> float:
    """What an offloaded optimizer keeps beside its state: gradients, and the new weights on their way back."""
    stage, each, own = config.parallel.zero_stage, number_bytes(config), sizes.trained / dp_size
    if stage == 3:
        return 2 * FP32 * own
    sums = FP32 * own if stage == 2 and each == FP32 else 0.0
    return FP32 * own + sums + each * own + each * sizes.largest


def _buffers(config: Config, sizes: RankParameters, dp_size: int, on_cuda: bool) -> tuple[float, float]:
    """In the backward pass and in the step; the fused AdamW has no temporaries."""
    stage, each, offload = config.parallel.zero_stage, number_bytes(config), config.parallel.offload_optimizer
    bucket = config.parallel.reduce_bucket(dp_size)  # allocated whole, however small the model
    buckets = bucket * (2 if on_cuda else 1)
    flattened = each * min(sizes.trained, bucket)
    if stage == 0:  # the gradients are joined to be summed over ranks
        return 0.0, FP32 * min(sizes.trained, bucket) if dp_size > 1 else 0.0
    if stage == 1:
        if each == 2 and not offload:
            return 0.0, each * sizes.trained
        return FP32 * buckets, 0.0
    if stage == 2:
        return FP32 * buckets + flattened, 0.0
    gathered = each * min(sizes.gathered, sizes.kept + PREFETCH + sizes.largest)
    return FP32 * bucket + flattened + gathered, FP32 * bucket

"""The memory that a plan promises, against the bytes that are really there.

On gloo ranks: every tensor storage alive after a backward pass and inside the optimizer's step, found through Python's
garbage collector, without DeepSpeed's communication buckets. On a GPU: CUDA's own peak.
"""

import gc
import time
from typing import Any

import pytest
import torch

from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.plan.memory import PERSISTENT, PREFETCH, REUSE, SUB_GROUP, activation_bytes, rank_memory
from tests.distributed.spawn import run_ranks

MODEL = [
    "model.depth=3",
    "model.hidden_size=256",
    "model.num_heads=4",
    "model.num_classes=10",
    "optim.ema_decays=[0.9]",
]
SIDE, IMAGES = 8, 4


def config_of(tp: int, stage: int, precision: str, *overrides: str) -> Config:
    layout = [f"parallel.tensor_parallel_size={tp}", f"parallel.zero_stage={stage}", f"parallel.precision={precision}"]
    return load_config([*MODEL, *layout, *overrides])


def build(config: Config, device: str) -> tuple[Any, Any]:
    from fitscale.model.build import build_network, initial_items
    from fitscale.parallel.groups import init_parallel
    from fitscale.parallel.layers import set_value
    from fitscale.parallel.zero import building, make_engine
    from fitscale.train.optim import AdamWEMA, freeze_untrained

    topology = init_parallel(config.parallel, device)
    with building(config, topology):
        model = build_network(config.model, config.parallel)
    for parameter, piece in initial_items(model, seed=0):
        set_value(parameter, piece)
    freeze_untrained(model.named_parameters(), config.optim.trainable)
    optimizer = AdamWEMA([one for one in model.parameters() if one.requires_grad], config.optim)
    return make_engine(model, optimizer, config, topology), optimizer


def micro_batch(engine: Any, side: int, images: int, device: str, last: bool = True) -> None:
    """Forward and backward of `images` square images of `side` x `side` tokens."""
    engine.set_gradient_accumulation_boundary(last)
    tokens = side * side
    inputs = torch.randn(images * tokens, 16, device=device), torch.rand(images, device=device)
    labels = torch.zeros(images, dtype=torch.long, device=device)
    (out,) = engine(*inputs, labels, square_layout(side, images, engine.module.parallel, device))
    engine.backward((out - 1).square().mean())


def square_layout(side: int, images: int, parallel: Any, device: str) -> Any:
    from fitscale.model.common.layout import pack_layout

    sizes, cu_seqlens = torch.full((images, 2), side), torch.arange(images + 1, dtype=torch.int32) * side * side
    return pack_layout(sizes, cu_seqlens, torch.device(device), parallel.sequence_parallel)


def live_bytes(engine: Any) -> int:
    """Bytes of all tensor storages made since `gc.freeze`, without DeepSpeed's buckets."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in bucket_pointers(engine))


def settled_bytes(engine: Any) -> int:
    """`live_bytes` when gloo's threads have let go of what they sent: when it shrinks no more."""
    looks = [live_bytes(engine)]
    while len(looks) < 5 or min(looks[-4:]) < min(looks[:-4]):
        time.sleep(0.03)
        looks.append(live_bytes(engine))
    return min(looks)


def bucket_pointers(engine: Any) -> set[int]:
    found: set[int] = set()
    for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        found |= {one.untyped_storage().data_ptr() for one in buffers}
    return found


def peak_state(config: Config) -> int:
    """Most bytes of weights, gradients, optimizer and EMA in the second of two steps of two micro-batches."""
    gc.collect()
    gc.freeze()  # what is alive now is not looked at again
    engine, optimizer = build(config, "cpu")
    assert engine.zero_reduce_bucket_size() == config.parallel.reduce_bucket(engine.dp_world_size)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(settled_bytes(engine)))
    optimizer.register_step_post_hook(lambda *_: seen.append(settled_bytes(engine)))
    for _ in range(2):
        seen.clear()
        for last in (False, True):
            micro_batch(engine, SIDE, IMAGES, "cpu", last)
            seen.append(settled_bytes(engine))
        engine.step()
    assert len(seen) == 4, "the optimizer has not stepped"
    return max(seen)


HPZ = "parallel.zero_hpz_partition_size=2"
OFFLOADED, FROZEN = "parallel.offload_optimizer=true", "optim.trainable=[bias,adaLN]"
STATES = {  # data-parallel ranks, config
    "fp32 stage 0": (1, config_of(1, 0, "fp32")),
    "fp32 stage 1, dp 2": (2, config_of(1, 1, "fp32")),
    "fp32 stage 2, dp 2": (2, config_of(1, 2, "fp32")),
    "fp32 stage 3, dp 2, tp 2": (2, config_of(2, 3, "fp32")),
    "bf16 stage 1, dp 2": (2, config_of(1, 1, "bf16")),
    "bf16 stage 2, dp 2": (2, config_of(1, 2, "bf16")),
    "bf16 stage 3, dp 2": (2, config_of(1, 3, "bf16")),
    "fp32 stage 3, dp 2, hpZ": (2, config_of(1, 3, "fp32", HPZ)),
    "bf16 stage 3, dp 2, hpZ": (2, config_of(1, 3, "bf16", HPZ)),
    "fp32 stage 2, dp 2, most frozen": (2, config_of(1, 2, "fp32", FROZEN)),
    "fp32 stage 2, dp 2, offloaded": (2, config_of(1, 2, "fp32", OFFLOADED)),
    "bf16 stage 3, dp 2, offloaded": (2, config_of(1, 3, "bf16", OFFLOADED)),
}


@pytest.mark.parametrize("name", STATES)
def test_planned_state_is_what_is_there(name):
    dp_size, config = STATES[name]
    measured = max(run_ranks(peak_state, dp_size * config.parallel.tensor_parallel_size, config))
    planned = rank_memory(config, dp_size, 0, 0, on_cuda=False)
    assert measured > 10 * 2**20
    assert planned.state == pytest.approx(measured, rel=0.1), f"{planned.state / measured - 1:+.1%}"
    assert ("offloaded" in name) == (planned.backward.optimizer == 0.0) == (planned.host > 0.0)


def saved_bytes(config: Config, side: int, images: int) -> int:
    """Bytes that autograd keeps of one pack, without the weights and the tables of positions."""
    from fitscale.model.build import build_network
    from fitscale.parallel.groups import init_parallel

    init_parallel(config.parallel, "cpu")
    model = build_network(config.model, config.parallel).to(
        torch.bfloat16 if config.parallel.precision == "bf16" else None
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = side * side
    layout = square_layout(side, images, config.parallel, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(images * tokens, 16), torch.rand(images), torch.zeros(images).long(), layout)
    return sum(one.nbytes() for pointer, one in storages.items() if pointer not in weights)


def activation_config(tp: int, sp: bool, every: int, *overrides: str) -> Config:
    layout = f"parallel.sequence_parallel={sp}", f"parallel.activation_checkpoint_every={every}"
    return config_of(tp, 1, "fp32", *layout, *overrides)


@pytest.mark.parametrize(("tp", "sp", "every"), [(1, False, 0), (1, False, 2), (2, False, 0), (2, True, 1)])
def test_planned_activations_are_what_autograd_keeps(tp, sp, every):
    config = activation_config(tp, sp, every)
    kept = max(run_ranks(saved_bytes, tp, config, 16, 8))
    tokens, d = 16 * 16 * 8, config.model.hidden_size
    passing = 4 * tokens * d * 5  # gradients on their way, which a forward pass has not
    planned = activation_bytes(config, tokens, 8, on_cuda=False) - passing
    if every:  # nor is a block computed again
        deep, shallow = (activation_config(tp, sp, 0, f"model.depth={depth}") for depth in (3, 2))
        planned -= activation_bytes(deep, tokens, 8, False) - activation_bytes(shallow, tokens, 8, False)
    assert planned == pytest.approx(kept, rel=0.1), f"{planned / kept - 1:+.1%}"


def test_what_deepspeed_keeps_and_fetches_ahead_are_its_defaults():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig()
    assert (defaults.sub_group_size, defaults.param_persistence_threshold) == (SUB_GROUP, PERSISTENT)
    assert (defaults.max_reuse_distance, defaults.prefetch_bucket_size) == (REUSE, PREFETCH)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["b", "xl"])
def test_planned_peak_is_what_cuda_reports(model):
    config = load_config([f"configs/model/{model}.yaml", "configs/recipe/fitv2_256.yaml", "parallel.precision=bf16"])
    engine, _ = build(config, "cuda")
    side, images = 16, config.batch.pack_tokens // 256
    for _ in range(2):  # the state of the optimizer comes with the first step
        torch.cuda.reset_peak_memory_stats()
        micro_batch(engine, side, images, "cuda")
        engine.step()
    planned = rank_memory(config, 1, side * side * images, images, on_cuda=True).peak
    measured = torch.cuda.max_memory_allocated()
    assert planned == pytest.approx(measured, rel=0.15), f"{model}: {planned / 2**30:.2f}, {measured / 2**30:.2f} GiB"

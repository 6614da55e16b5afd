"""The only door to DeepSpeed: the engine, and full fp32 tensors gathered from its partitions.

    network + AdamWEMA -> make_engine -> engine(inputs), engine.backward(loss), engine.step()
                                         |
                      gather_dp(engine, parameter, key) -> one whole fp32 tensor, on every data-parallel rank

DeepSpeed's ZeRO shards the optimizer: stage 1 its state, stage 2 the gradients too, stage 3 the weights as well.
"""

import contextlib
import logging
import math
import os
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state

from fitscale.config.schema import Config
from fitscale.parallel import uncompiled
from fitscale.parallel.groups import Topology
from fitscale.parallel.layers import kept_part


def make_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, topology: Topology) -> Any:
    """Wrap `model` and `optimizer` in a DeepSpeed engine. `parallel.precision` must be resolved (not auto).

    The engine averages gradients over the data-parallel ranks and does not divide by the number of micro-batches:
    a caller that wants the gradient of L backs up `dp_size * (its share of L)` for every micro-batch.
    """
    deepspeed, settings = _import_deepspeed(topology.device), _engine_config(config, topology)
    return deepspeed.initialize(model=model, optimizer=optimizer, mpu=_model_parallel_unit(), config=settings)[0]


def building(config: Config, topology: Topology) -> Any:
    """A context in which to build the model: under ZeRO-3 every layer is partitioned as soon as it is made."""
    if config.parallel.zero_stage < 3:
        return contextlib.nullcontext()
    deepspeed = _import_deepspeed(topology.device)
    deepspeed.init_distributed(dist_backend="nccl" if topology.device.type == "cuda" else "gloo")
    return deepspeed.zero.Init(
        data_parallel_group=parallel_state.get_data_parallel_group(),
        mpu=_model_parallel_unit(),
        config_dict_or_path=_engine_config(config, topology),  # names the precision, too
    )


def optimizer_step(engine: Any) -> float:
    """Clip the gradients, step the optimizer, clear the gradients; returns the global norm before clipping.

    A norm that is not finite skips the step, on all ranks alike.
    """
    if engine.zero_optimization_stage() > 0:  # these stages skip by themselves
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = _gradient_norm(engine.module)
    if math.isfinite(norm):
        engine.step()
    else:
        engine.module.zero_grad(set_to_none=True)
    return norm


def _gradient_norm(model: torch.nn.Module) -> float:
    """Global norm over the tensor-parallel group: shards add up, replicated gradients count once."""
    squares = torch.zeros(2, dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.grad is not None:
            split = getattr(parameter, "tensor_model_parallel", False)
            squares[0 if split else 1] += parameter.grad.double().square().sum().cpu()
    shards = squares[0].to(next(model.parameters()).device)
    torch.distributed.all_reduce(shards, group=parallel_state.get_tensor_model_parallel_group())
    return float((shards.cpu() + squares[1]).sqrt())


def gather_dp(engine: Any, parameter: torch.nn.Parameter, key: str | None = None) -> torch.Tensor:
    """The whole fp32 value of `parameter`, or of its optimizer state `key`, gathered over data-parallel ranks.

    A collective: every rank calls it for the same parameters in the same order. Tensor-parallel shards stay shards.
    A frozen parameter has no optimizer state: only its value can be had.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not parameter.requires_grad:
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().float().clone()
    if engine.zero_optimization_stage() == 0:
        value = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
        return value.clone()
    if key is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def fill_optimizer_state(engine: Any, steps_taken: int) -> None:
    """Give the optimizer the state it would have after `steps_taken` steps, all zeros, for `set_tensor` to fill."""
    wrapper = engine.optimizer
    for partition in _partitions(engine):
        engine.basic_optimizer.fill_state(partition, steps_taken)
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 find state through this link
        wrapper._lazy_init_hp_params_optimizer_state()


def set_tensor(engine: Any, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
    """Put `value` (this tensor-parallel rank's shard) into the fp32 weights or the optimizer state `key`; local."""
    from deepspeed import utils

    stage = engine.zero_optimization_stage()
    if stage == 0:
        target = parameter.data if key is None else engine.optimizer.state[parameter][key]
        target.copy_(value)
        return
    set_weights, set_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    if stage == 3:
        set_weights, set_state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        part = kept_part(parameter, value)
        kept = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        value = torch.nn.functional.pad(part, (0, kept - part.numel()))  # zeros where the last partition is
    if key is None:
        set_weights(parameter, value)
    else:
        set_state(parameter, value, key)


def _partitions(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that the optimizer steps: flat partitions under ZeRO, else the parameters."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def _model_parallel_unit() -> SimpleNamespace:
    """megatron-core's groups, with the older names that DeepSpeed still asks for (no pipeline parallelism)."""
    return SimpleNamespace(
        **vars(parallel_state),
        get_model_parallel_rank=parallel_state.get_tensor_model_parallel_rank,
        get_model_parallel_world_size=parallel_state.get_tensor_model_parallel_world_size,
    )


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed quietly, without compiling its shared-memory op for CPU (half a minute, and a compiler)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it in a world of one, too
    with uncompiled():
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # as `initialize` does, to know its own optimizers

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _engine_config(config: Config, topology: Topology) -> dict[str, Any]:
    cuda, parallel = topology.device.type == "cuda", config.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": cuda,
        "round_robin_gradients": False,  # True breaks the reading of full fp32 parameters
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_batch_size": topology.dp_size,  # counts micro-batches only; the global batch is the batch plan's
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded, too, the optimizer is ours: it carries the EMA
        "zero_optimization": zero,
        "bf16": {"enabled": parallel.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**12,
    }

"""The only door to DeepSpeed: the engine, and the fp32 partitions that it keeps.

    network + AdamWEMA -> make_engine -> engine(inputs), engine.backward(loss), engine.step()
                                         |
                      own_part(engine, parameter, key) -> what this rank keeps of it, in fp32

DeepSpeed's ZeRO shards the optimizer: stage 1 its state, stage 2 the gradients too, stage 3 the weights as well.
"""

import contextlib
import logging
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
    a caller that wants the gradient of L backs up `dp_size * (its share of L)` for every micro-batch. It does not clip:
    `optimizer`, a `train.optim.AdamWEMA`, is told the norm.
    """
    deepspeed, settings = _import_deepspeed(topology.device), _engine_config(config, topology)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, mpu=_model_parallel_unit(), config=settings)[0]
    optimizer.gradient_norm = lambda: _gradient_norm(engine)  # type: ignore[attr-defined]
    if config.parallel.zero_stage == 0 and topology.dp_size == 1:
        engine.enable_backward_allreduce = False  # it would flatten all gradients and sum them over one rank
    return engine


def building(config: Config, topology: Topology) -> Any:
    """A context in which to build the model: under ZeRO-3 every layer is partitioned as soon as it is made."""
    if config.parallel.zero_stage < 3:
        return contextlib.nullcontext()
    deepspeed = _import_deepspeed(topology.device)
    deepspeed.init_distributed(dist_backend="nccl" if topology.device.type == "cuda" else "gloo")
    return deepspeed.zero.Init(
        data_parallel_group=parallel_state.get_data_parallel_group(),
        zero_param_parallel_group=_join_hpz_group(config.parallel.zero_hpz_partition_size, topology),
        mpu=_model_parallel_unit(),
        config_dict_or_path=_engine_config(config, topology),  # names the precision, too
    )


def _join_hpz_group(size: int, topology: Topology) -> Any:
    """The group of `size` consecutive data-parallel ranks that holds hpZ's copy of the weights; None: there is no copy.

    DeepSpeed's own would be of consecutive ranks of the world, which under tensor parallelism hold other shards. It
    looks for the group in its module, too, where one of an engine before may still be.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if size > 1:
        world, tp_size = torch.arange(topology.world_size), topology.tp_size
        members = world.view(-1, size, tp_size).transpose(1, 2).reshape(-1, size).tolist()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = torch.distributed.new_subgroups_by_enumeration(members)[0]
    return groups._ZERO_PARAM_INTRA_PARALLEL_GROUP


def optimizer_step(engine: Any) -> Any:
    """Step the optimizer, which clips, and clear the gradients; returns the global norm before clipping, a number or a
    tensor of one.

    A norm that is not finite skips the step, on all ranks alike.
    """
    engine.step()
    return engine.get_global_grad_norm()


def _gradient_norm(engine: Any) -> Any:
    """Global norm of the gradients that are about to be stepped; DeepSpeed knows it in stages 1 to 3."""
    if engine.zero_optimization_stage() == 0:
        engine.optimizer._global_grad_norm = _whole_norm(engine.module)  # where `engine.step` looks for it, too
    return engine.optimizer._global_grad_norm


def _whole_norm(model: torch.nn.Module) -> torch.Tensor:
    """Global norm over the tensor-parallel group: shards add up, replicated gradients count once."""
    gradients: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients[getattr(parameter, "tensor_model_parallel", False)].append(parameter.grad)
    shards, replicated = (torch.nn.utils.get_total_norm(gradients[split]).double().square() for split in (True, False))
    shards = shards.to(next(model.parameters()).device)  # the norm of nothing is on the host
    torch.distributed.all_reduce(shards, group=parallel_state.get_tensor_model_parallel_group())
    return (shards + replicated.to(shards.device)).sqrt()


def own_part(engine: Any, parameter: torch.nn.Parameter, key: str | None = None) -> tuple[int, torch.Tensor] | None:
    """What this data-parallel rank keeps of `parameter`, or of its optimizer state `key`: the first element's number in
    this tensor-parallel rank's flattened tensor, and the elements: no copy, fp32 but for a frozen parameter.

    None: it keeps nothing. A frozen parameter has no optimizer state: only its value can be had. Local.
    """
    if hasattr(parameter, "ds_id"):
        kept = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = kept * parallel_state.get_data_parallel_rank()
        part = parameter.ds_tensor.data if not parameter.requires_grad else _own_partition(parameter, key)  # type: ignore[attr-defined]
        numel = min(kept, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return (start, part[:numel]) if numel > 0 else None
    if not parameter.requires_grad:
        return 0, parameter.detach().flatten()
    if engine.zero_optimization_stage() == 0:
        value = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
        return 0, value.flatten()
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach())


def _own_partition(parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    found = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
    return found.detach()


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
        "reduce_bucket_size": parallel.reduce_bucket(topology.dp_size),
        "zero_hpz_partition_size": parallel.zero_hpz_partition_size,
        "round_robin_gradients": False,  # True breaks the reading of full fp32 parameters
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_batch_size": topology.dp_size,  # counts micro-batches only; the global batch is the batch plan's
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the optimizer does it, in its kernel
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded, too, the optimizer is ours: it carries the EMA
        "zero_optimization": zero,
        # Nor does it look at every gradient for what is not finite: the norm tells.
        "bf16": {"enabled": parallel.precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # sums of bf16 over many ranks lose what each rank adds
        "steps_per_print": 10**12,
    }

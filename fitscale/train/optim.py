"""AdamW with the EMA of the weights in its state, and the learning-rate schedule.

DeepSpeed hands the optimizer flat fp32 partitions; whatever the optimizer keeps per tensor is sharded by ZeRO and
saved with its checkpoints. The exponential moving averages (EMA) live there for that reason.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fitscale.config.schema import OptimConfig
from fitscale.run.comparability import ema_name


class AdamWEMA(torch.optim.AdamW):
    """torch's AdamW, as one kernel for weights and moments, then ema = decay ema + (1 - decay) weights for each decay.

    An EMA starts as the initial weights. `parameters` may be groups (`decay_groups`).

    `gradient_norm` gives the global norm of the gradients that `step` takes (0, so none is clipped, until somebody
    sets it): the kernel clips them by it as it reads them, and leaves everything as it is if the norm is not finite.
    The host does not look at it.
    """

    def __init__(self, parameters: Iterable[Any], config: OptimConfig) -> None:
        settings: Any = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
        super().__init__(parameters, fused=True, **settings)
        self.ema_decays, self.grad_clip = tuple(config.ema_decays), config.grad_clip
        self.gradient_norm: Callable[[], torch.Tensor | float] = float
        self.every_group = self.param_groups  # DeepSpeed steps them one by one: `param_groups` is one of them then

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        tensors = [tensor for group in self.param_groups for tensor in group["params"] if tensor.grad is not None]
        # Of all groups at once: DeepSpeed looks for the state of all when it has stepped the first.
        for tensor in [tensor for group in self.every_group for tensor in group["params"]]:
            if not self.state[tensor]:
                self.fill_state(tensor, 0)
                for decay in self.ema_decays:
                    self.state[tensor][ema_name(decay)].copy_(tensor)
        taken = self._clip(tensors[0].device) if tensors else 1.0
        loss = super().step(closure)
        for decay in self.ema_decays:
            averages = [self.state[tensor][ema_name(decay)] for tensor in tensors]
            weight = torch.as_tensor((1.0 - decay) * taken, dtype=torch.float32)
            torch._foreach_lerp_(averages, tensors, [weight] * len(tensors))
        return loss

    def _clip(self, device: torch.device) -> torch.Tensor:
        """Tell torch's kernel what to divide the gradients by, and whether to step; 1 if it steps, else 0."""
        norm = torch.as_tensor(self.gradient_norm(), dtype=torch.float32, device=device)
        taken = norm.isfinite().float()
        self.found_inf = 1.0 - taken
        if self.grad_clip is not None:
            self.grad_scale = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0)
        return taken

    def fill_state(self, tensor: torch.Tensor, steps_taken: int) -> None:
        """Give `tensor` the state it has after `steps_taken` steps, with zeros for the moments and the EMA."""
        state = self.state[tensor]
        state["step"] = torch.tensor(float(steps_taken), device=tensor.device)  # where the fused kernel counts
        for name in ("exp_avg", "exp_avg_sq", *map(ema_name, self.ema_decays)):
            state[name] = torch.zeros_like(tensor)


def decay_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> list[dict[str, Any]]:
    """What is trained, as an optimizer takes it: those that decay, and, if there are any, those that do not."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[is_named(name, config.no_decay)].append(parameter)
    decays = {False: config.weight_decay, True: 0.0}
    return [{"params": found, "weight_decay": decays[spared]} for spared, found in groups.items() if found]


def learning_rate(config: OptimConfig, step: int, last_step: int) -> float:
    """Learning rate of step `step` (0-based): linear warm-up, then constant, or a cosine to zero at `last_step`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(last_step - config.warmup_steps, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def is_named(name: str, parts: list[str]) -> bool:
    """Whether a parameter's name contains one of `parts`."""
    return any(part in name for part in parts)


def freeze_untrained(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], trainable: list[str]) -> None:
    """Keep only parameters whose name contains one of `trainable` trainable; an empty list keeps all."""
    for name, parameter in named_parameters:
        parameter.requires_grad_(not trainable or is_named(name, trainable))

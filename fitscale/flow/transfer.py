"""Tensors of the host on the way to the device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. To CUDA it goes from pinned memory: a copy from any other waits, and the host with it, for
    all that the device has been given before."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

"""The devices that fitscale knows: peak, memory and links, for model FLOP utilisation and `fitscale plan`. No torch.

All rates are the vendors', for one device and one direction; what a run reaches of them is measured or assumed
elsewhere.
"""

from dataclasses import dataclass

from fitscale.config.errors import UserError


@dataclass(frozen=True)
class Device:
    """One accelerator (or CPU core) and its links."""

    name: str
    peak_flops_per_s: float  # dense bf16, without sparsity
    memory_bytes_per_s: float  # its rate
    memory_bytes: float  # what CUDA reports as the device's total, a little less than the name says
    intra_node_bytes_per_s: float  # to the devices of its node, one direction
    inter_node_bytes_per_s: float  # its share of the node's network, one direction


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA H100 SXM data sheet: 989.4 TFLOP/s, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: eight
        # 400 Gb/s ports.
        Device("h100", 989e12, 3.35e12, 79.1 * 2**30, 450e9, 50e9),
        # NVIDIA H200 SXM data sheet: H100's rates with 141 GB at 4.8 TB/s; DGX H200: eight 400 Gb/s ports.
        Device("h200", 989e12, 4.8e12, 139.7 * 2**30, 450e9, 50e9),
        # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: eight
        # 200 Gb/s ports.
        Device("a100", 312e12, 2.039e12, 79.1 * 2**30, 300e9, 25e9),
        # NVIDIA HGX B200 data sheet: 2.25 PFLOP/s, 180 GB at 8 TB/s, NVLink 1.8 TB/s both ways, eight 400 Gb/s ports.
        Device("b200", 2250e12, 8e12, 178 * 2**30, 900e9, 50e9),
        # AMD MI300X data sheet: 1,307 TFLOP/s, 192 GB at 5.3 TB/s, seven links of 128 GB/s both ways; 400 Gb/s ports.
        Device("mi300x", 1307e12, 5.3e12, 191 * 2**30, 448e9, 50e9),
        # One core: AVX-512, two FMA units of 16 fp32 numbers at 2.5 GHz; 10 GB/s and 4 GiB a core; gloo over 10 Gb/s.
        Device("cpu", 160e9, 10e9, 4 * 2**30, 1.25e9, 1.25e9),
    )
}


def find_device(name: str) -> Device:
    """The device called `name`, as the table has it.

    Raises:
        UserError: not in the table; lists what is.
    """
    if name not in DEVICES:
        raise UserError(f"{name!r} is not a known device; valid: {', '.join(DEVICES)}")
    return DEVICES[name]


def device_reported_as(name: str) -> Device | None:
    """The device of a name that CUDA reports ("NVIDIA H100 80GB HBM3"); None if the table has none such."""
    return next((device for key, device in DEVICES.items() if key in name.lower()), None)

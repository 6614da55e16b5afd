"""What share of a device's peak a network can reach while it computes: from counted work, before anything is measured.

A block's time is that of its matrix products, and that of what else flows through memory: reads and writes of one
hidden vector a token ("passes"), forward and backward, as tools/bench_step.py counts them. Attention counts as a
product. Between neighbouring kernels nothing overlaps, so the two add up.
"""

from fitscale.config.schema import Config
from fitscale.model import flops
from fitscale.plan.devices import Device
from fitscale.plan.layout import resolve_compile, resolve_precision
from fitscale.plan.memory import block_count, number_bytes

# In bf16, of a block of FiTv2 (width 384, images of 64 to 256 tokens): compiled, and as it is written.
PASSES = {"on": 92, "off": 297}
# Shares of the peaks that large products and long reads reach: estimates, to be replaced by measurements.
PRODUCT_SHARE, MEMORY_SHARE = 0.75, 0.85


def attainable(config: Config, device: Device, tokens: int) -> float:
    """The share, for images of `tokens` tokens."""
    on_cuda = device.name != "cpu"
    config = resolve_compile(resolve_precision(config, on_cuda), on_cuda)
    ideal_s = flops.train_flops(config.model, tokens) / device.peak_flops_per_s
    passed = PASSES[config.parallel.compile] * block_count(config) * tokens * config.model.hidden_size
    memory_s = passed * number_bytes(config) / (MEMORY_SHARE * device.memory_bytes_per_s)
    return ideal_s / (ideal_s / PRODUCT_SHARE + memory_s)

"""What the server that forks ranks imports once, for all of them.

Its objects are frozen: a rank's garbage collector would walk hundreds of thousands of them for nothing, and touching
them would copy their pages.
"""

import gc
from importlib import import_module

for name in (
    *("torch", "deepspeed", "megatron.core.tensor_parallel", "fitscale.train.trainer", "fitscale.cli"),
    *(f"fitscale.model.{backbone}.network" for backbone in ("fit", "flag", "dimr")),
):
    import_module(name)

gc.collect()
gc.freeze()

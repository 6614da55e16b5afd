"""The only door to megatron-core and DeepSpeed, and what keeps it light: of both, only what is used is imported.

`import megatron.core` brings wandb, its inference engine, its optimizers and torch's whole compiler, half of the time
from a command to its first step. So its packages are entered in `sys.modules` without what their `__init__` imports
(decision "What a start-up imports"); whoever asks one of them for such a name gets it, from the `__init__`, run then.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PACKAGES = ("", ".tensor_parallel", ".transformer", ".dist_checkpointing")  # of megatron.core


class _Package(ModuleType):
    """A package whose `__init__` runs when a name is asked of it that is none of its modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        inner = f"{self.__name__}.{name}"
        if importlib.util.find_spec(inner):
            return importlib.import_module(inner)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Around imports: functions that a library decorates with torch.compile stay as they are written.

    megatron-core and DeepSpeed decorate dozens (activations, Muon) that nothing here calls, and each decoration imports
    torch's compiler. `torch.compile` is free again afterwards.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _enter_packages() -> None:
    for name in (f"megatron.core{package}" for package in PACKAGES):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        package = sys.modules[name] = importlib.util.module_from_spec(spec)
        package.__class__ = _Package
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, package)  # as an import would


# Before megatron-core's first import, which remarks on CUDA libraries that are optional.
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
if "megatron.core" not in sys.modules:
    _enter_packages()
    with uncompiled():
        importlib.import_module("megatron.core.parallel_state")
        importlib.import_module("megatron.core.tensor_parallel.layers")

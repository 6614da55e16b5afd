"""Which formulas of the networks are compiled, by torch.compile: C++ on the CPU, Triton on CUDA.

A formula is a pure function of tensors, without autograd, collectives or hooks, so that every layout of ranks and every
ZeRO stage may run it either way. First dimensions are dynamic, for they count tokens or images: one compilation serves
packs of any number of both. Widths are constants to the compiler, which makes far better loops of them.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

WIDTHS = (
    64  # compilations of one formula in a process: a recompilation is of another width or type, not of another pack
)
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_OPTIONS: Any = {"assert_indirect_indexing": False}  # the index of a token's image comes from the pack's own layout
_state = {"compiled": False}
compiled: dict[Callable[..., Any], Callable[..., Any]] = {}  # of each formula that has run so


def use_compiler(on: bool) -> None:
    """From now on, in this process, compile formulas or run them as they are written.

    What is compiled is kept in a folder of the user's own, unless TORCHINDUCTOR_CACHE_DIR names another: torch's own
    choice is a name in the shared /tmp that anybody can guess and make first, and it runs what it finds there.
    """
    if on:
        _keep_in_own_folder()
    _state["compiled"] = on


def _keep_in_own_folder() -> None:
    """Torch's choice may be in the environment already: importing megatron-core puts it there. Headers, compiled once
    for all formulas, torch 2.13 keeps in /tmp whatever the environment says."""
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(FOLDER) in (None, os.path.abspath(default_cache_dir())):
        os.environ[FOLDER] = str(Path("~/.cache/fitscale/compiled").expanduser())
    headers = Path(os.environ[FOLDER], "precompiled_headers")
    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(headers), str(headers / "locks")


def is_compiled() -> bool:
    return _state["compiled"]


def lacks_for_compiling(device: torch.device) -> str | None:
    """What this machine lacks to compile for `device`, in words; None if nothing."""
    cxx = os.environ.get("CXX", "g++")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not shutil.which(cxx) and not (device.type == "cuda" and (shutil.which("gcc") or shutil.which("cc"))):
        return f"there is no C++ compiler, {cxx}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (python3-dev) are not installed"
    return None


def formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs compiled or as it is written, as `use_compiler` said last."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if not is_compiled():
            return function(*arguments)
        if function not in compiled:
            compiled[function] = _compiled(function)
        return compiled[function](*arguments)

    return call


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo import config, maybe_mark_dynamic  # brings the whole compiler
    from torch.utils._pytree import tree_map_only

    config.recompile_limit = max(config.recompile_limit, WIDTHS)
    run = torch.compile(function, fullgraph=True, options=_OPTIONS)

    def call(*arguments: Any) -> Any:
        return run(*tree_map_only(torch.Tensor, counted, arguments))

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # whether it needs a gradient would be compiled in
        maybe_mark_dynamic(tensor, 0)
        return tensor

    return call

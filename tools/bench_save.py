"""How long training waits for a save: copying what each rank keeps, against gathering every tensor over the ranks.

python tools/bench_save.py
torchrun --nproc-per-node 2 tools/bench_save.py
torchrun --nproc-per-node 2 tools/bench_save.py configs/model/s.yaml parallel.zero_stage=3 --saves 5

Both ways take the checkpoint's tensors of the same engine in turns, after one step: gathered, as DeepSpeed offers it
(`safe_get_full_...`), each rank keeping its share of the tensors; and copied, as fitscale's saver does, which leaves
the rest to a thread (docs/architecture.md). The first save is apart: it makes the buffers on the host.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from fitscale.config.load import load_config
from fitscale.config.program import count, exit_code
from fitscale.config.schema import Config

DEFAULTS = ["configs/model/b.yaml", "run.device=cpu", "parallel.precision=fp32", "parallel.zero_stage=1"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", metavar="FILE|KEY=VALUE", help="of the model and the layout")
    parser.add_argument("--saves", type=count, default=3, help="saves of each way, besides the first (3)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(load_config([*DEFAULTS, *options.config]), options.saves))


def run(config: Config, saves: int) -> None:
    import torch.distributed as dist

    from fitscale.train.assembly import Assembly
    from fitscale.train.checkpoint import tensor_sets

    engine = trained_engine(config)
    sets = tensor_sets(config.optim.ema_decays)
    assembly = Assembly(engine, sets)
    ways: dict[str, Callable[[], object]] = {
        "gathered": lambda: gathered(engine, sets),
        "copied": lambda: assembly.copy(begun=True),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(saves + 1):
        for way, save in ways.items():
            dist.barrier()
            begun = time.perf_counter()
            save()
            dist.barrier()
            times[way].append(time.perf_counter() - begun)
    if dist.get_rank() == 0:
        for way, seconds in times.items():
            print(f"{way}: first {seconds[0]:.2f} s, then {median(seconds[1:]):.2f} s")
        ratio = median(a / b for a, b in zip(times["gathered"][1:], times["copied"][1:], strict=True))
        print(f"gathered / copied {ratio:.1f}; of the first {times['gathered'][0] / times['copied'][0]:.1f}")
    dist.destroy_process_group()


def trained_engine(config: Config) -> Any:
    """An engine whose optimizer has made one step, of one image."""
    import torch

    from fitscale.model.build import build_network, initial_items
    from fitscale.model.common.layout import pack_layout
    from fitscale.parallel.groups import init_parallel
    from fitscale.parallel.layers import set_value
    from fitscale.parallel.zero import building, make_engine, optimizer_step
    from fitscale.train.optim import AdamWEMA

    topology = init_parallel(config.parallel, config.run.device)
    with building(config, topology):
        model = build_network(config.model, config.parallel)
    for parameter, piece in initial_items(model, 0):
        set_value(parameter, piece)
    engine = make_engine(model, AdamWEMA(list(model.parameters()), config.optim), config, topology)
    layout = pack_layout(torch.tensor([[4, 4]]), torch.tensor([0, 16]), topology.device)
    tokens = torch.ones(16, config.model.token_channels, device=topology.device)
    inputs = (
        tokens,
        torch.full((1,), 0.5, device=topology.device),
        torch.zeros(1, dtype=torch.long, device=topology.device),
    )
    engine.backward(sum(out.square().mean() for out in engine(*inputs, layout)))
    optimizer_step(engine)
    return engine


def gathered(engine: Any, sets: dict[str, str | None]) -> dict[str, Any]:
    """The tensors that this rank would write, every other one of all ranks', on the host."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    kept = {}
    for folder, key in sets.items():
        for number, (name, parameter) in enumerate(engine.module.named_parameters()):
            whole = (
                safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
            )
            if number % dist.get_world_size() == dist.get_rank():
                kept[f"{folder} {name}"] = whole.cpu()
    return kept


if __name__ == "__main__":
    raise SystemExit(main())

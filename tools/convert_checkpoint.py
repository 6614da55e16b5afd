"""Export a run's weights as one .safetensors file in the published names, or import published weights.

    python tools/convert_checkpoint.py runs/xl xl.safetensors --weights ema --dtype bf16
    python tools/convert_checkpoint.py runs/xl xl.safetensors --step 400000 --weights raw
    python tools/convert_checkpoint.py runs/terdit terdit.safetensors --ternary
    python tools/convert_checkpoint.py published.pt xl.safetensors --config configs/model/xl.yaml

The first argument is a run directory; the same weights give the same bytes, whatever layout saved them. With --config
it is published weights for that model: a .safetensors file, a folder of them, or a state dict of torch.save; the output
is what `run.init_weights` takes, or `fitscale sample`. With --ternary, ternary weights take a byte for four, in
TerDiT's published layout. One tensor at a time is in memory, all of them for an OUT.pth. Needs no GPU.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING

from fitscale.api import SECTIONS
from fitscale.config.errors import UserError
from fitscale.config.program import exit_code, loading

if TYPE_CHECKING:
    from fitscale.config.schema import Config
    from fitscale.model.weights import StoredTensor

    Source = tuple[Config, dict[str, StoredTensor], dict[str, str]]  # tensors by name, and where they are from

PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_code(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    """Write `options.out` from a run directory or from published weights."""
    out: Path = options.out
    if out.is_dir() or (out.exists() and not options.force):
        raise UserError(f"{out}: is there already; choose another name, or --force to replace a file")
    config, tensors, about = published_source(options) if options.config else run_source(options)
    if options.ternary:
        config, tensors = _packed(config, tensors, options.source)
    size = _write_with_progress(out, tensors, options.dtype, _sections(config) | about)
    described = ", ".join(f"{key} {value}" for key, value in about.items())
    print(f"{out}: {len(tensors)} tensors, {options.dtype}, {size / 1e6:.1f} MB ({described})")


def run_source(options: argparse.Namespace) -> "Source":
    """One set of weights of a run's checkpoint."""
    if options.source.is_file():
        raise UserError(f"{options.source}: a file, no run directory; for published weights give --config MODEL.yaml")
    with loading("torch and megatron-core"):
        from fitscale.eval.checkpoints import find_checkpoint, open_run, weights_name
        from fitscale.model.weights import list_tensors
    config, run = open_run(options.source)
    checkpoint = find_checkpoint(run, options.step)
    weights = weights_name(config, checkpoint, options.weights or config.evaluation.weights)
    about = {"step": str(checkpoint.step), "weights": weights, "source": config.run.name}
    return config, list_tensors(checkpoint.weights(weights)), about


def published_source(options: argparse.Namespace) -> "Source":
    """Published weights, if they are those of the model that --config says."""
    from fitscale.config.load import load_config

    source: Path = options.source
    config = load_config(options.config)
    pickled = source.suffix in PICKLED
    for name, value, valid in (("--step", options.step, False), ("--weights", options.weights, pickled)):
        if value is not None and not valid:
            raise UserError(f"{name}: {source} has nothing to choose from; it goes with a run directory")
    _refuse_shards(source)
    with loading("torch and megatron-core"):
        from fitscale.model.weights import check_keys, list_state_dict, list_tensors
    tensors = list_state_dict(source, options.weights) if pickled else list_tensors(source)
    check_keys(config.model, tensors, source)
    weights = {"weights": options.weights} if options.weights else {}
    return config, tensors, {**weights, "source": source.name}


def _refuse_shards(source: Path) -> None:
    """Of Flag-DiT's and TerDiT's checkpoints, which say of how many tensor-parallel ranks they are."""
    named = fullmatch(r"consolidated.*\.\d+-of-(\d+)\.pth", source.name)
    if named and int(named[1]) != 1:
        raise UserError(
            f"{source}: of {int(named[1])} tensor-parallel ranks, whose norms of q and k, and ternary weights, go by "
            "their own share: together they are not one model; valid: 00-of-01"
        )


def _packed(
    config: "Config", tensors: "dict[str, StoredTensor]", source: Path
) -> "tuple[Config, dict[str, StoredTensor]]":
    """Config and tensors with ternary weights packed."""
    from fitscale.model.backbone import parameter_table
    from fitscale.model.weights import check_keys, packed_tensors

    model = config.model.to_sample()
    if not any(entry.packed for entry in parameter_table(model)):
        raise UserError(f"--ternary: {source} has no ternary weights; it goes with model.quantise = ternary")
    check_keys(model, tensors, source)
    return replace(config, model=model), packed_tensors(model, tensors)


def _write_with_progress(out: Path, tensors: "dict[str, StoredTensor]", dtype: str, metadata: dict[str, str]) -> int:
    """Write the file; returns the bytes of its tensors."""
    from fitscale.config.bars import bar
    from fitscale.model.weights import num_bytes, write_state_dict, write_tensors

    total = sum(num_bytes(tensor, dtype) for tensor in tensors.values())
    if out.suffix in PICKLED:
        write_state_dict(out, tensors, dtype)
        return total
    with bar(total, out.name, "B", unit_scale=True) as shown:
        write_tensors(out, tensors, metadata, dtype, shown.update)
    return total


def _sections(config: "Config") -> dict[str, str]:
    """What `fitscale.api` has to know of the config to draw images, as JSON."""
    found = asdict(config) | {"data": {"latent": asdict(config.data.latent)}}
    return {name: json.dumps(found[name], sort_keys=True) for name in SECTIONS}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="run directory; with --config, published weights")
    add("out", type=Path, metavar="OUT", help="file to write: .safetensors, or a state dict of torch.save in a .pth")
    add("--step", type=int, help="checkpoint to export (default: the newest)")
    add("--weights", help="raw, ema (the first average) or ema_<decay> (default: the run's); of a .pt file, the entry")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of all tensors (default: fp32)")
    add("--ternary", action="store_true", help="pack ternary weights, four a byte, for sampling")
    add("--config", nargs="+", metavar="CONFIG", help="SOURCE is published weights of the model of these config files")
    add("--force", action="store_true", help="replace OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What is in a shard set, for a person: `fitscale data SHARDS`, and the summary that a finished conversion leaves.

Both show how often each size occurs, as text and as a histogram; the report adds labels, what batches waste, and a
contact sheet, the summary what was rejected and why.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from fitscale.config.checks import at_least
from fitscale.config.files import read_jsonl, replacing, write_atomic
from fitscale.config.schema_data import LatentConfig
from fitscale.data.index import Index, ShardReader, open_index
from fitscale.data.index_file import IndexMeta
from fitscale.data.pictures import write_contact_sheet
from fitscale.prepare.statistics import DrawnSizes, drawn_sizes, label_counts, wasted
from fitscale.prepare.verify import verify

SHEET = 24  # images on the contact sheet
BAR = 40  # characters of the longest bar
BINS = 12  # of a histogram as text


def run_data(arguments: argparse.Namespace) -> None:
    """Print the report and write its pictures."""
    index = open_index(arguments.shards)
    for key in ("patch_size", "batch", "ranks", "pack_tokens"):
        at_least(f"--{key.replace('_', '-')}", getattr(arguments, key), 1)
    if arguments.verify:
        print(verify(index))
    drawn = drawn_sizes(index, arguments.patch_size)
    print(_counts(index, drawn))
    print(f"tokens per image\n{text_histogram(drawn.tokens, drawn.draws)}")
    aspects = text_histogram(100 * drawn.cols / drawn.rows, drawn.draws)
    print(f"aspect ratio, width / height, in percent\n{aspects}")
    counts = label_counts(index)
    spread = f"least {counts.min()}, median {np.median(counts):.0f}, most {counts.max()}"
    empty = f"; {(counts == 0).sum()} classes have none" if not counts.all() else ""
    print(f"labels: {len(counts)} classes; images a class: {spread}{empty}")
    print(f"global batches of {arguments.batch} images over {arguments.ranks} ranks: padding, time lost by all ranks")
    found = wasted(index, arguments.patch_size, arguments.batch, arguments.ranks, arguments.pack_tokens)
    for name, one in found.items():
        print(f"  {name:<24}{one.padding_share:7.1%}{one.time_lost:9.1%}")
    out: Path = arguments.out or index.storage.folder / "report"
    print(f"drawing pictures for {out}", flush=True)
    plot_histogram(out / "tokens.png", drawn.tokens, drawn.draws, "tokens per image", "draws an epoch")
    if index.meta.kind == "vae" and arguments.vae is None:
        print(f"{out}: tokens.png; for a contact sheet of latents name their VAE with --vae")
    else:
        write_sheet(out / "contact_sheet.png", index, arguments.vae)
        print(f"{out}: tokens.png, contact_sheet.png")


def write_sheet(path: Path, index: Index, vae: str | None) -> None:
    """Images from all over the set, decoded; each under its key and label."""
    import torch

    from fitscale.data.encode import Decoder, to_float

    meta, reader = index.meta, ShardReader(index)
    decoder = Decoder(LatentConfig(meta.kind, vae, meta.factor, meta.scaling))
    images, titles = [], []
    for image in np.unique(np.linspace(0, meta.num_images - 1, SHEET).astype(int)).tolist():
        row = index.images[image]
        stored = reader.read(image, int(row["first_variant"]))
        images.append(decoder(torch.from_numpy(to_float(stored)[: meta.channels])))  # of stored moments, the mean
        titles.append(f"{row['label']}: {index.key(image)[-12:]}")
    write_contact_sheet(path, images, titles, f"{index.storage.folder.name}: label and key")


def _counts(index: Index, drawn: DrawnSizes) -> str:
    meta = index.meta
    order = np.argsort(-drawn.draws, kind="stable")[:5]
    common = ", ".join(f"{drawn.rows[n]}x{drawn.cols[n]} ({drawn.draws[n] / drawn.draws.sum():.1%})" for n in order)
    stored = "pixels" if meta.kind == "pixels" else f"latents of {meta.recipe.get('encoder', 'a VAE')}"
    mean = float((drawn.tokens * drawn.draws).sum() / drawn.draws.sum())
    return (
        f"{index.storage.folder}\n"
        f"  {meta.num_images:,} images in {meta.num_variants:,} variants, {len(meta.shards):,} shards, "
        f"{sum(shard.bytes for shard in meta.shards) / 1e9:.3f} GB\n"
        f"  {stored}{' (mean and deviation)' if meta.moments else ''}, channels: {meta.channels}\n"
        f"  {len(meta.sizes):,} sizes; most drawn, in patches (rows x cols): {common}\n"
        f"  tokens: least {drawn.tokens.min()}, mean {mean:.1f}, most {drawn.tokens.max()}"
    )


def summary(folder: Path) -> str:
    """Write `sizes.png` and then `summary.json` beside the index of `folder`, once; what they say, for a person."""
    meta = open_index(folder).meta
    rejected = Counter(row["reason"].split(":")[0] for row in read_jsonl(folder / "rejected.jsonl"))
    content = {
        "images": meta.num_images,
        "variants": meta.num_variants,
        "rejected": rejected.total(),
        "reasons": dict(rejected.most_common()),
        "sizes": [[height * meta.factor, width * meta.factor, count] for height, width, count in meta.sizes],
    }
    if not (folder / "summary.json").is_file():
        plot_histogram(folder / "sizes.png", *_areas(meta), "image pixels per variant", "variants")
        write_atomic(folder / "summary.json", json.dumps(content, indent=1) + "\n")
    lines = ["image pixels per variant", text_histogram(*_areas(meta)), f"rejected: {rejected.total()} images"]
    lines += [f"  {count:6d}  {reason}" for reason, count in rejected.most_common()]
    if rejected:
        lines.append(f"  each with its reason: {folder / 'rejected.jsonl'}")
    return "\n".join(lines)


def _areas(meta: IndexMeta) -> tuple[np.ndarray, np.ndarray]:
    """Image pixels of every size that occurs, and how many variants have it."""
    heights, widths, counts = np.array(meta.sizes, dtype=np.int64).T
    return heights * widths * meta.factor**2, counts


def text_histogram(values: np.ndarray, weights: np.ndarray) -> str:
    """One line a bin: its bounds, a bar, the share of all weight."""
    counts, edges = np.histogram(values.astype(np.float64), BINS if np.ptp(values) else 1, weights=weights)
    shares = counts / counts.sum()
    return "\n".join(
        f"  {low:9.0f} .. {high:<9.0f} {'#' * round(BAR * share / shares.max()):<{BAR}} {share:6.1%}"
        for low, high, share in zip(edges, edges[1:], shares, strict=False)
    )


def plot_histogram(path: Path, values: np.ndarray, weights: np.ndarray, x_label: str, y_label: str) -> None:
    """The same as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=40, weights=weights)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)

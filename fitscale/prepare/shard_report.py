"""`fitscale data SHARDS`: what is in a shard set, as text, histogram and contact sheet."""

import argparse
from pathlib import Path

import numpy as np
import torch

from fitscale.config.errors import UserError
from fitscale.config.schema_data import LatentConfig
from fitscale.data.encode import Decoder, to_float
from fitscale.data.index import Index, open_index
from fitscale.data.pictures import write_contact_sheet
from fitscale.data.reader import ShardReader
from fitscale.data.statistics import Drawn, drawn_sizes, label_counts, verify, wasted
from fitscale.prepare.summary import plot_histogram, text_histogram

SHEET = 24  # images on the contact sheet


def run_data(arguments: argparse.Namespace) -> None:
    """Print the report and write its pictures."""
    index = open_index(arguments.shards)
    for key in ("patch_size", "batch", "ranks", "pack_tokens"):
        if getattr(arguments, key) < 1:
            raise UserError(f"--{key.replace('_', '-')}: {getattr(arguments, key)} is below 1")
    if arguments.verify:
        print(f"{sum(1 for _ in verify(index))} shards verified: every checksum is right")
    drawn = drawn_sizes(index, arguments.patch_size)
    print(_counts(index, drawn))
    print("\n".join(["tokens per image", text_histogram(drawn.tokens, drawn.draws)]))
    print(
        "\n".join(
            ["aspect ratio, width / height, in percent", text_histogram(100 * drawn.cols / drawn.rows, drawn.draws)]
        )
    )
    print(_labels(label_counts(index)))
    print(_waste(index, arguments))
    out: Path = arguments.out or index.folder / "report"
    out.mkdir(parents=True, exist_ok=True)
    plot_histogram(out / "tokens.png", drawn.tokens, drawn.draws, "tokens per image", "draws an epoch")
    if index.meta.kind == "vae" and arguments.vae is None:
        print(f"{out}: tokens.png; for a contact sheet of latents name their VAE with --vae")
    else:
        write_sheet(out / "contact_sheet.png", index, arguments.vae)
        print(f"{out}: tokens.png, contact_sheet.png")


def write_sheet(path: Path, index: Index, vae: str | None) -> None:
    """Images from all over the set, decoded; each under its key and label."""
    meta, reader = index.meta, ShardReader(index)
    decoder = Decoder(LatentConfig(meta.kind, vae, meta.factor, meta.scaling))
    chosen = np.unique(np.linspace(0, meta.num_images - 1, SHEET).astype(int)).tolist()
    images, titles = [], []
    for image in chosen:
        row = index.images[image]
        stored = reader.read(image, int(row["first_variant"]))
        images.append(decoder(torch.from_numpy(to_float(stored)[: meta.channels])))  # of stored moments, the mean
        titles.append(f"{row['label']}: {index.key(image)[-12:]}")
    write_contact_sheet(path, images, titles, f"{index.folder.name}: label and key")


def _counts(index: Index, drawn: Drawn) -> str:
    meta = index.meta
    order = np.argsort(-drawn.draws, kind="stable")[:5]
    common = ", ".join(f"{drawn.rows[n]}x{drawn.cols[n]} ({drawn.draws[n] / drawn.draws.sum():.1%})" for n in order)
    stored = "pixels" if meta.kind == "pixels" else f"latents of {meta.recipe.get('encoder', 'a VAE')}"
    mean = float((drawn.tokens * drawn.draws).sum() / drawn.draws.sum())
    return (
        f"{index.folder}\n"
        f"  {meta.num_images:,} images in {meta.num_variants:,} variants, {len(meta.shards):,} shards, "
        f"{sum(shard.bytes for shard in meta.shards) / 1e9:.3f} GB\n"
        f"  {stored}{' (mean and deviation)' if meta.moments else ''}, {meta.channels} channels\n"
        f"  {len(meta.sizes):,} sizes; most drawn, in patches (rows x cols): {common}\n"
        f"  tokens: least {drawn.tokens.min()}, mean {mean:.1f}, most {drawn.tokens.max()}"
    )


def _labels(counts: np.ndarray) -> str:
    empty = int((counts == 0).sum())
    return (
        f"labels: {len(counts)} classes; images a class: least {counts.min()}, median {np.median(counts):.0f}, "
        f"most {counts.max()}" + (f"; {empty} classes have none" if empty else "")
    )


def _waste(index: Index, arguments: argparse.Namespace) -> str:
    found = wasted(index, arguments.patch_size, arguments.batch, arguments.ranks, arguments.pack_tokens)
    lines = [
        f"global batches of {arguments.batch} images over {arguments.ranks} ranks: padding, time lost by all ranks"
    ]
    lines += [f"  {name:<24}{loss.padding_share:7.1%}{loss.time_lost:9.1%}" for name, loss in found.items()]
    return "\n".join(lines)

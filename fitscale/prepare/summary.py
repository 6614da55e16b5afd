"""What a finished conversion tells its owner: `summary.json`, `sizes.png`, and the same as text."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitscale.config.files import read_jsonl, write_atomic
from fitscale.data.index import IndexMeta, open_index

BAR = 40  # characters of the longest bar


def write_summary(folder: Path) -> None:
    """Write `sizes.png` and then `summary.json` beside the index of `folder`."""
    meta = open_index(folder).meta
    rejected = Counter(row["reason"].split(":")[0] for row in read_jsonl(folder / "rejected.jsonl"))
    plot_histogram(folder / "sizes.png", *areas_of(meta), "image pixels per variant", "variants")
    content = {
        "images": meta.num_images,
        "variants": meta.num_variants,
        "rejected": rejected.total(),
        "reasons": dict(rejected.most_common()),
        "sizes": [[height * meta.factor, width * meta.factor, count] for height, width, count in meta.sizes],
    }
    write_atomic(folder / "summary.json", json.dumps(content, indent=1) + "\n")


def summary_text(folder: Path) -> str:
    """The summary for a person: a histogram of sizes, and what was rejected."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    areas, counts = areas_of(open_index(folder).meta)
    lines = ["image pixels per variant", text_histogram(areas, counts), f"rejected: {content['rejected']} images"]
    lines += [f"  {count:6d}  {reason}" for reason, count in content["reasons"].items()]
    if content["rejected"]:
        lines.append(f"  each with its reason: {folder / 'rejected.jsonl'}")
    return "\n".join(lines)


def areas_of(meta: IndexMeta) -> tuple[np.ndarray, np.ndarray]:
    """Image pixels of every size that occurs, and how many variants have it."""
    heights, widths, counts = np.array(meta.sizes, dtype=np.int64).T
    return heights * widths * meta.factor**2, counts


def text_histogram(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray, bins: int = 12) -> str:
    """One line a bin: its bounds, a bar, the share of all weight."""
    shares, edges = _histogram(values, weights, bins)
    return "\n".join(
        f"  {low:9.0f} .. {high:<9.0f} {'#' * round(BAR * share / shares.max()):<{BAR}} {share:6.1%}"
        for low, high, share in zip(edges, edges[1:], shares, strict=False)
    )


def plot_histogram(path: Path, values: np.ndarray, weights: np.ndarray, x_label: str, y_label: str) -> None:
    """The same as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(values, bins=40, weights=weights)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _histogram(values: Any, weights: Any, bins: int) -> tuple[np.ndarray, np.ndarray]:
    values, weights = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    counts, edges = np.histogram(values, bins=bins if np.ptp(values) else 1, weights=weights)
    return counts / counts.sum(), edges

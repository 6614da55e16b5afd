"""How large a config's images are, before any is drawn: from the sizes in the indices alone."""

from pathlib import Path

from fitscale.config.schema_data import DataConfig
from fitscale.data.batch_plan import OpenIndex
from fitscale.data.index import open_index
from fitscale.data.storage import Cache


def token_shares(data: DataConfig, patch_size: int, open_index: OpenIndex = open_index) -> dict[int, float]:
    """Share of the images that have each number of tokens, as their variants do; adds up to 1.

    Raises:
        UserError: a shard set cannot be opened.
    """
    shares: dict[int, float] = {}
    weights = sum(source.weight for source in data.sources.values())
    for source in data.sources.values():
        sizes = open_index(source.shards, Cache(Path(data.cache_dir), data.cache_gb)).meta.sizes
        counts = [((height // patch_size) * (width // patch_size), count) for height, width, count in sizes]
        used = [(tokens, count) for tokens, count in counts if source.uses(tokens)]
        total = sum(count for _, count in used)
        for tokens, count in used:
            shares[tokens] = shares.get(tokens, 0.0) + source.weight / weights * count / total
    return dict(sorted(shares.items()))

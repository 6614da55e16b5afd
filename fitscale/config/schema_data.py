"""The data section of a config: shard sets, and how they are read."""

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from fitscale.config.checks import Section, at_least, check_plain, number, one_of
from fitscale.config.errors import UserError


@dataclass(frozen=True)
class LatentConfig(Section, path="data.latent"):
    """How stored tokens-to-be relate to images: plain pixels in [-1, 1], or a VAE's latents."""

    kind: str = one_of("vae", "pixels")
    vae: str | None = None  # local folder or hub name of a diffusers AutoencoderKL; needed to decode
    factor: int = number(8, least=1, most=1000)  # image pixels per latent pixel, along one side
    scaling: float = number(0.18215, above=0)  # latent = scaling * (VAE's latent)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "pixels" and (self.factor != 1 or self.scaling != 1.0 or self.vae is not None):
            raise UserError("data.latent: kind = pixels goes with factor = 1, scaling = 1.0 and no vae")


@dataclass(frozen=True)
class SourceConfig:
    """One shard set of a mixture, and which of its images to use."""

    shards: str = ""  # as data.shards
    weight: float = 1.0  # images of a batch come from the shard sets in proportion to their weights
    min_tokens: int = 0  # variants of fewer tokens than this, or of more than max_tokens, are not used;
    max_tokens: int | None = None  # an image without any other is left out

    def uses(self, tokens: Any) -> Any:
        """Whether a variant of `tokens` tokens is used; of an array, of each."""
        return (tokens >= self.min_tokens) & (tokens <= (inf if self.max_tokens is None else self.max_tokens))

    @property
    def limited(self) -> bool:
        return self.min_tokens > 0 or self.max_tokens is not None


@dataclass(frozen=True)
class DataConfig(Section, path="data"):
    """Where the shards are and how they are read."""

    shards: str = ""  # folder of webdataset shards with their index, or an fsspec URL of one (s3://, gs://, https://)
    mixture: dict[str, SourceConfig] = field(default_factory=dict)  # several shard sets by name, instead of `shards`
    latent: LatentConfig = field(default_factory=LatentConfig)
    holdout_fraction: float = number(
        0.0, least=0.0, below=1.0
    )  # share of images, by the hash of their key, not trained on
    window_shards: int = number(16, least=1, most=10**6)  # shards among whose images the order is random at one time
    num_workers: int = number(2, least=0, most=1000)  # reader processes per rank; 0 reads in the training process
    prefetch_steps: int = number(2, least=1, most=1000)  # steps read ahead, per worker
    on_error: str = one_of("stop", "skip")  # at a corrupt sample; skip: it counts for nothing, events.jsonl names it
    cache_dir: str = "~/.cache/fitscale"  # local copies of shards that are read from a URL
    cache_gb: float = number(100.0, above=0)  # most GB of them; those unused for longest go first

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The shard sets by name, in the order of their names; empty if there are none yet."""
        if self.mixture:
            return dict(sorted(self.mixture.items()))
        return {"data": SourceConfig(self.shards)} if self.shards else {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards and self.mixture:
            raise UserError("data.shards and data.mixture: only one of the two may be given")
        for name, source in self.mixture.items():
            _check_source(f"data.mixture.{name}", source)


def _check_source(key: str, source: SourceConfig) -> None:
    if not source.shards:
        raise UserError(f"{key}.shards: must be given")
    if not 0 < source.weight < inf:
        raise UserError(f"{key}.weight: {source.weight} must be above 0")
    check_plain(key, asdict(source))
    at_least(f"{key}.min_tokens", source.min_tokens, 0)
    if source.max_tokens is not None:
        at_least(f"{key}.max_tokens", source.max_tokens, max(source.min_tokens, 1))

"""What a backbone gives, and which there are. No torch.

A backbone is a folder of its own and one line in `fitscale/model/__init__.py`. It gives:

    config       a frozen dataclass over `ModelConfig` that checks itself
    parameters   a table: one `Parameter` a tensor
    mixing_macs  MACs of what mixes tokens (attention, convolution), as coefficients of 1, n and n^2 for n tokens
    kept         what the backward pass keeps
    build        the network: forward(tokens_TC, t_S, condition, layout) -> one float32 (T, numbers) tensor per scale of
                 the config, the last of which is sampled; `condition` is the label of each image (S,), `layout` the
                 pack's (`common.layout`). Its parameters have the table's names and shapes; positions are its own.

From the table follow the number of parameters, MACs and FLOPs, memory and traffic in `plan`, initial weights, the
tensor-parallel split, and import and export.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from fitscale.config.schema import MODEL_CONFIGS, ModelConfig

ROWS, COLUMNS = 0, 1  # the dimension of a weight that tensor parallelism splits: output or input features


@dataclass(frozen=True)
class Parameter:
    """One tensor, as the published checkpoints have it."""

    name: str
    shape: tuple[int, ...]
    init: str = "zero"  # zero | one | xavier (uniform) | normal (0, 0.02) | unit_normal (0, 1) | uniform (+-bound)
    split: int | None = None  # ROWS or COLUMNS over the tensor-parallel ranks; None = every rank has all of it
    per_token: int = 0  # how often a weight is applied to each token of an image,
    per_image: int = 0  # and to each image besides
    qkv_heads: int | None = None  # rows are 3 x heads x head_dim; the network's are heads x 3 x head_dim
    rotary: int = 0  # heads whose rows are pairs that RoPE turns; the network has all first ones, then all second
    bound: float = 0.0  # of a uniform initialisation
    packed: bool = False  # ternary, four rows a byte (`common.ternary`); `shape` is what it stands for

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the tensor that holds it."""
        return (self.shape[0] // 4, *self.shape[1:]) if self.packed else self.shape

    @property
    def is_weight(self) -> bool:
        """Whether applying it is a product of matrices; of biases and norms the MACs are not counted."""
        return len(self.shape) > 1

    def local(self, tp_size: int) -> int:
        """Numbers on one tensor-parallel rank."""
        return self.numel if self.split is None else self.numel // tp_size

    def matches(self, patterns: list[str]) -> bool:
        """Whether the name contains one of `patterns`."""
        return any(pattern in self.name for pattern in patterns)


@dataclass(frozen=True)
class Kept:
    """Numbers that autograd keeps of each of `blocks` equal blocks, and of the ends around them.

    `split`: over the tensor-parallel ranks. The rest of a token's is split under sequence parallelism, statistics
    are fp32 and whole; what has no remark is of the weights' type.
    """

    blocks: int
    token: float
    token_split: float
    token_statistics: float
    token_statistics_split: float
    image: float
    ends: float  # per token
    positions: float  # per token, fp32
    ternary: float = 0  # weights of a block that are made ternary: the result, and a byte besides
    ternary_split: float = 0
    entering: float | None = None  # a block's input, per token; None = the hidden size


@dataclass(frozen=True)
class Backbone:
    """See the module. The functions take the backbone's own config; `kept` also whether attention runs on CUDA."""

    family: str  # value of `model.family`
    config: type[ModelConfig]
    parameters: Callable[[Any], list[Parameter]]
    mixing_macs: Callable[[Any], tuple[int, int, int]]
    kept: Callable[[Any, bool], Kept]
    build: Callable[[Any, Any], Any]  # (config, ParallelConfig) -> torch module, after `init_parallel`


_BACKBONES: dict[str, Backbone] = {}


def register(backbone: Backbone) -> None:
    """Make a backbone known to configs and to everything that asks `backbone_of`."""
    _BACKBONES[backbone.family] = backbone
    MODEL_CONFIGS[backbone.family] = backbone.config


def backbone_of(model: ModelConfig) -> Backbone:
    return _BACKBONES[model.family]


@lru_cache(maxsize=64)
def parameter_table(model: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of its modules."""
    return tuple(backbone_of(model).parameters(model))


def parameters_by_name(network: Any) -> dict[str, Parameter]:
    """The table of a network that has its config, by the names of `named_parameters`."""
    return {entry.name: entry for entry in parameter_table(network.config)}


def linear(
    name: str, shape: tuple[int, int], *, init: str = "xavier", split: int | None = None, **applied: Any
) -> list[Parameter]:
    """Weight of `shape` (output, input features) and bias (zero; split with the rows) of a linear layer.

    `applied`: `per_token`, `per_image`, `qkv_heads` and `rotary` of both.
    """
    weight = Parameter(f"{name}.weight", shape, init, split, **applied)
    return [weight, Parameter(f"{name}.bias", shape[:1], split=ROWS if split == ROWS else None, **applied)]


def quantised(found: list[Parameter], quantise: str) -> list[Parameter]:
    """Parameters of a linear as `model.quantise` says: its weight and, where that is ternary, the number beside it."""
    if quantise == "none":
        return found
    weight, *bias = found
    alphas = Parameter(f"{weight.name.removesuffix('weight')}alphas", (1,), init="unit_normal")
    return [replace(weight, packed=quantise == "packed"), alphas, *bias]


def kept_ternary(block: list[Parameter], quantise: str) -> dict[str, int]:
    """What `Kept` says of the ternary weights of a block with these parameters."""
    made = [one for one in block if quantise == "ternary" and one.is_weight]
    whole, split = (sum(one.numel for one in made if (one.split is None) == is_whole) for is_whole in (True, False))
    return {"ternary": whole, "ternary_split": split}

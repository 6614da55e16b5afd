"""What the analysis says instead of a number: a refusal (no result), or a caution (a result to be read with care).

docs/scaling.md has the reason of every code and what helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fitscale.config.errors import UserError

OfRows = Literal["no_rows", "mixed_keys", "mixed_models", "missing_values", "non_positive", "conflicting_rows"]
OfAFit = Literal["too_few_points", "no_improvement", "at_bound", "at_start", "unstable_fit", "not_identified"]
OfSizes = Literal["one_size", "edge_optimum", "concave_optimum", "outside_range", "not_on_frontier", "extrapolation"]
OfGroups = Literal["cannot_tell", "no_overlap"]


class Refusal(UserError):
    """The data do not hold what was asked: a code, and a text that says why and what would help."""

    def __init__(self, code: OfRows | OfAFit | OfSizes | OfGroups, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = str(self)


@dataclass(frozen=True)
class Caution:
    """A result exists, but a reader must know this first."""

    code: str
    message: str


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names with commas, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: object, most: int = 60) -> str:
    """A value as it is written in Python, on one line, cut where it is long."""
    text = ascii(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= most else f"{text[:most]}..."

"""What the analysis says instead of a number: a refusal (no result), or a caution (a result to be read with care)."""

from dataclasses import dataclass

from fitscale.config.errors import UserError

REFUSALS = {
    "no_rows": "no row has the metric that was asked for",
    "mixed_keys": "rows that were measured in different ways",
    "mixed_models": "rows of different model families or patch sizes",
    "missing_values": "rows without a run, size, metric or training FLOPs",
    "non_positive": "values that have no logarithm",
    "conflicting_rows": "one measurement with two different values",
    "one_size": "sizes are needed to say what size does",
    "too_few_points": "a law with as many parameters as points fits anything",
    "no_improvement": "the metric does not fall with compute",
    "at_bound": "the best fit lies at the edge of what was searched",
    "at_start": "the fit never left its starting point",
    "unstable_fit": "fewer than 5 % of the starting points lead to the fit",
    "not_identified": "many sets of parameters fit equally well",
    "edge_optimum": "the best size of a budget lies outside the sizes tried",
    "concave_optimum": "a budget without a minimum over size",
    "not_on_frontier": "no held-out point is one that a law of compute speaks of",
    "extrapolation": "a prediction further out than was agreed to",
}


class Refusal(UserError):
    """The data do not hold what was asked. `code` is one of `REFUSALS`; the text says why and what would help."""

    def __init__(self, code: str, message: str) -> None:
        assert code in REFUSALS, code
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Caution:
    """A result exists, but a reader must know this first."""

    code: str
    message: str

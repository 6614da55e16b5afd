"""Laws of a metric: sums of power terms in the law's inputs, with or without a floor.

    power       a (C/C0)^-b                        C training FLOPs, C0 the inputs' geometric mean in the fitted rows
    offset      a (C/C0)^-b + e
    additive    a (N/N0)^-alpha + b (D/D0)^-beta + e        N parameters, D images (Hoffmann et al. 2022, eq. 2)
    tied        a (N/N0)^-alpha + b (D/D0)^-alpha + e       one exponent (Gadre et al. 2024)
    separable   a (N/N0)^-alpha (D/D0)^-beta + e

A law is evaluated at x = ln(input / reference), so units do not matter.
Shapes: K parameter sets, N points, P parameters, F inputs.
"""

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product

import numpy as np
import pandas as pd

from fitscale.scaling.fit.solver import Array

STEEPEST, LEAST_EXPONENT = 10.0, 1e-4  # bounds of every exponent
EXPONENTS = {1: np.geomspace(0.03, 3.0, 12), 2: np.geomspace(0.05, 1.5, 7)}  # starts, by the number of exponents
FLOORS = np.array([0.02, 0.3, 0.6, 0.8, 0.9, 0.97])  # starts, as shares of the best metric
NO_FLOOR = 1e-300  # a floor of 0 on the logarithmic scale


@dataclass(frozen=True)
class Law:
    """A sum of terms, and a floor where the formula has one. A term is exp(amplitude - sum of exponent * x[input])."""

    name: str
    formula: str
    terms: dict[str, dict[str, str]]  # amplitude: {input, a column of the runs table: exponent}
    fixed_floor: float | None = None  # held at this value: no parameter

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for slopes in self.terms.values() for column in slopes))

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Term by term the amplitude and its exponents; the floor is the last."""
        names = [name for amplitude, slopes in self.terms.items() for name in (amplitude, *slopes.values())]
        return tuple(dict.fromkeys(names + ["e"] * self.floor))

    @property
    def floor(self) -> bool:
        """Whether the floor e is a parameter."""
        return self.formula.endswith("+ e")

    def with_floor(self, value: float) -> "Law":
        """The law with its floor held at `value`."""
        return replace(self, formula=f"{self.formula.removesuffix('e')}{value:g}", fixed_floor=value)

    @property
    def exponent_names(self) -> list[str]:
        return [self.parameters[index] for index in self.exponents]

    @property
    def exponents(self) -> list[int]:
        """Indices of the parameters that are exponents."""
        return sorted({exponent for amplitude in self.terms for _, exponent in self._slopes(amplitude)})

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Least and largest value of every parameter: without a floor an exponent below 0 is possible, and refused."""
        upper = np.full(len(self.parameters), np.inf)
        lower = -upper
        upper[self.exponents] = STEEPEST
        lower[self.exponents] = LEAST_EXPONENT if self.floor else -STEEPEST
        if self.floor:
            lower[-1] = 0.0
        return lower, upper

    def centred(self, rows: pd.DataFrame, centre_F: Array | None = None) -> tuple[Array, Array]:
        """The law's inputs as x_NF = ln(input) - centre, and the centre (by default the mean over the rows)."""
        logs = np.log(np.column_stack([rows[name].to_numpy(dtype=float) for name in self.inputs]))
        centre = logs.mean(axis=0) if centre_F is None else centre_F
        return logs - centre, centre

    def evaluate(self, theta_KP: Array, x_NF: Array) -> tuple[Array, Array]:
        """ln(metric)_KN and its derivatives by the parameters, _KNP.

        Terms are added on the logarithmic scale, where none is too small or too large for a float.
        """
        logs = [self._log_term(amplitude, theta_KP, x_NF) for amplitude in self.terms]
        if self.floor:
            logs.append(np.log(np.maximum(theta_KP[:, -1:], NO_FLOOR)))
        elif self.fixed_floor:
            logs.append(np.full((len(theta_KP), 1), np.log(self.fixed_floor)))
        largest = reduce(np.maximum, logs)
        total = largest + np.log(reduce(np.add, [np.exp(log - largest) for log in logs]))
        jacobian = np.zeros((*total.shape, len(self.parameters)))
        for amplitude, log in zip(self.terms, logs, strict=False):
            share = np.exp(log - total)
            jacobian[:, :, self.parameters.index(amplitude)] += share
            for column, exponent in self._slopes(amplitude):
                jacobian[:, :, exponent] -= x_NF[:, column] * share
        if self.floor:
            jacobian[:, :, -1] = np.exp(np.minimum(-total, 300.0))
        return total, jacobian

    def starts(self, x_NF: Array, y_N: Array, exponents: Array | None = None, floors: Array = FLOORS) -> Array:
        """Starting points theta_KP: a grid of exponents and floors, with the best amplitudes for each.

        Given those the metric is linear in the amplitudes (variable projection, Golub and Pereyra 1973).
        """
        count = len(self.exponents)
        grid = EXPONENTS[count] if exponents is None else exponents
        shares = floors if self.floor else np.zeros(1)
        starts = list(product(product(grid, repeat=count), shares))
        theta_KP, metric_N = np.zeros((len(starts), len(self.parameters))), np.exp(y_N)
        theta_KP[:, self.exponents] = [slopes for slopes, _ in starts]
        shares_K = np.array([share for _, share in starts])
        floor_K = shares_K * metric_N.min() if self.fixed_floor is None else np.full(len(starts), self.fixed_floor)
        if self.floor:
            theta_KP[:, -1] = floor_K
        columns_KNT = np.exp(np.stack([self._log_term(name, theta_KP, x_NF) for name in self.terms], axis=2))
        amplitude_KT = _not_negative(columns_KNT / metric_N[:, None], (metric_N - floor_K[:, None]) / metric_N)
        amplitude_KT = np.log(np.maximum(amplitude_KT, 1e-3 * metric_N.mean()))
        theta_KP[:, [self.parameters.index(name) for name in self.terms]] = amplitude_KT
        return theta_KP

    def _log_term(self, amplitude: str, theta_KP: Array, x_NF: Array) -> Array:
        power = theta_KP[:, self.parameters.index(amplitude), None]
        for column, exponent in self._slopes(amplitude):
            power = power - theta_KP[:, exponent, None] * x_NF[:, column]
        return power

    def _slopes(self, amplitude: str) -> list[tuple[int, int]]:
        """(input, exponent) of a term, as numbers."""
        slopes = self.terms[amplitude].items()
        return [(self.inputs.index(column), self.parameters.index(exponent)) for column, exponent in slopes]


def _not_negative(columns_KNT: Array, right_KN: Array) -> Array:
    """K least-squares problems in one or two unknowns that are not below 0: the best of all whose others are 0."""
    products_KTT = np.swapaxes(columns_KNT, 1, 2) @ columns_KNT
    right_KT = np.einsum("knt,kn->kt", columns_KNT, right_KN)
    squares_KT = np.einsum("ktt->kt", products_KTT)
    alone_KT = np.maximum(right_KT / squares_KT, 0.0)
    best = np.argmax(alone_KT * right_KT, axis=1)[:, None]
    alone_KT = np.where(np.arange(alone_KT.shape[1]) == best, alone_KT, 0.0)
    if alone_KT.shape[1] == 1:
        return alone_KT
    scale_KT = np.sqrt(squares_KT)
    cosine_K = products_KTT[:, 0, 1] / scale_KT.prod(axis=1)
    scaled_KT = right_KT / scale_KT
    both_KT = (
        (scaled_KT - cosine_K[:, None] * scaled_KT[:, ::-1]) / np.maximum(1 - cosine_K**2, 1e-12)[:, None] / scale_KT
    )
    return np.where((both_KT >= 0).all(axis=1, keepdims=True), both_KT, alone_KT)


C, N, D = "train_flops", "parameters", "images"
COMPUTE, SURFACE = (C,), (N, D)
POWER = Law("power", "a (C/C0)^-b", {"ln_a": {C: "b"}})
OFFSET = Law("offset", "a (C/C0)^-b + e", {"ln_a": {C: "b"}})
ADDITIVE = Law("additive", "a (N/N0)^-alpha + b (D/D0)^-beta + e", {"ln_a": {N: "alpha"}, "ln_b": {D: "beta"}})
TIED = Law("tied", "a (N/N0)^-alpha + b (D/D0)^-alpha + e", {"ln_a": {N: "alpha"}, "ln_b": {D: "alpha"}})
SEPARABLE = Law("separable", "a (N/N0)^-alpha (D/D0)^-beta + e", {"ln_a": {N: "alpha", D: "beta"}})
LAWS = {law.name: law for law in (POWER, OFFSET, ADDITIVE, TIED, SEPARABLE)}

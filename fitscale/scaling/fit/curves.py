"""Curves through the sizes of one compute budget: ln(metric) over ln(parameters) or ln(data), and where it is lowest.

    akima        Akima's interpolation of ln(metric) (Porian et al. 2024)
    parabola     the metric itself, a parabola through all sizes (Hoffmann et al. 2022, approach 2)
    parabola-7   ln(metric), a parabola through the seven sizes nearest the lowest

Shapes: N sizes, ascending, K curves through the same sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from fitscale.scaling.fit.solver import Array

NEAR = 7
FINE = 2001


class Curves(Protocol):
    """K curves of ln(metric)."""

    def at(self, x: float) -> Array:
        """ln(metric)_K at x."""
        ...

    def lowest(self) -> tuple[Array, Array]:
        """x_K and ln(metric)_K at the minimum; x is infinite where the curve has none, opening downward."""
        ...


@dataclass(frozen=True)
class Interpolated:
    """Akima's interpolation through every size."""

    x_N: Array
    y_NK: Array

    def at(self, x: float) -> Array:
        return np.asarray(Akima1DInterpolator(self.x_N, self.y_NK)(x))

    def lowest(self) -> tuple[Array, Array]:
        grid = np.linspace(self.x_N[0], self.x_N[-1], FINE)
        values = np.asarray(Akima1DInterpolator(self.x_N, self.y_NK)(grid))
        return grid[np.argmin(values, axis=0)], np.min(values, axis=0)


@dataclass(frozen=True)
class Parabolas:
    """c + b (x - centre) + a (x - centre)^2 in the metric, or in its logarithm."""

    abc_3K: Array
    centre: float
    log: bool

    @classmethod
    def through(cls, x_N: Array, y_NK: Array, log: bool) -> "Parabolas":
        centre = float(x_N.mean())
        return cls(np.polyfit(x_N - centre, y_NK if log else np.exp(y_NK), 2), centre, log)

    def at(self, x: float) -> Array:
        a_K, b_K, c_K = self.abc_3K
        return self._ln(c_K + (x - self.centre) * (b_K + (x - self.centre) * a_K))

    def lowest(self) -> tuple[Array, Array]:
        a_K, b_K, c_K = self.abc_3K
        upward = a_K > 0
        a_K = np.where(upward, a_K, 1.0)
        best_K = np.where(upward, self.centre - b_K / (2 * a_K), np.inf)
        return best_K, np.where(upward, self._ln(c_K - b_K**2 / (4 * a_K)), np.nan)

    def _ln(self, value_K: Array) -> Array:
        return value_K if self.log else np.log(np.maximum(value_K, 1e-300))


@dataclass(frozen=True)
class NearParabolas:
    """Every curve's parabola through the sizes nearest its own lowest."""

    x_N: Array
    y_NK: Array

    def at(self, x: float) -> Array:
        return self._each(lambda near: near.at(x)[None])[0]

    def lowest(self) -> tuple[Array, Array]:
        best_K, value_K = self._each(lambda near: np.stack(near.lowest()))
        return best_K, value_K

    def _each(self, of: Callable[[Parabolas], Array]) -> Array:
        lowest_K = np.argmin(self.y_NK, axis=0)
        found = np.empty((2, len(lowest_K)))
        for lowest in np.unique(lowest_K):
            near = np.sort(np.argsort(np.abs(self.x_N - self.x_N[lowest]), kind="stable")[:NEAR])
            alike = lowest_K == lowest
            found[:, alike] = of(Parabolas.through(self.x_N[near], self.y_NK[near][:, alike], log=True))
        return found


METHODS: dict[str, Callable[[Array, Array], Curves]] = {
    "akima": Interpolated,
    "parabola": lambda x_N, y_NK: Parabolas.through(x_N, y_NK, log=False),
    "parabola-7": NearParabolas,
}


def left_out(method: str, x_N: Array, y_N: Array) -> Array:
    """ln(measured / predicted) of the inner sizes near the lowest, each predicted by a curve without it."""
    inner = [i for i in range(1, len(x_N) - 1) if abs(i - int(np.argmin(y_N))) <= 2]
    predicted = [METHODS[method](np.delete(x_N, i), np.delete(y_N, i)[:, None]).at(x_N[i])[0] for i in inner]
    return y_N[inner] - np.array(predicted)

"""What a fitted law says of compute-optimal training: at C training FLOPs the best N and D, and the metric there.

An image costs c(N) = kappa N^s training FLOPs, a power law fitted to the table (language models: 6 N a token, so kappa
is 6 and s is 1). On kappa N^s D = C the law A N^-alpha + B D^-beta + E is least where its two terms fall alike:

    N* = (alpha A / (s beta B))^(1 / (alpha + s beta)) (C / kappa)^a,  a = beta / (alpha + s beta)
    D* = (C / kappa) N*^-s, which grows as C^b, b = alpha / (alpha + s beta)
    metric* = k C^-gamma + E,  gamma = alpha beta / (alpha + s beta)

With s = 1 and kappa = 6 this is equation 4 of Hoffmann et al. 2022 (approach 3), and the factor of N* is their G.
Shapes: K parameter sets.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fitscale.scaling.fit.fitting import Fit, exp
from fitscale.scaling.fit.laws import COMPUTE, Law
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.rows.refusals import Refusal

MOST_LN = 600.0  # a term of a resample may vanish: so small, it does


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of one image by a model of N parameters: kappa N^power."""

    kappa: float
    power: float

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "Cost":
        """Least squares in logarithms.

        Raises:
            Refusal: the rows do not say parameters and images of two sizes, or the cost does not grow with size.
        """
        known = rows[["train_flops", "images", "parameters"]].dropna().astype(float)
        known = known[(known > 0).all(axis=1)]
        if known["parameters"].nunique() < 2:
            text = "parameters and images of two sizes are needed to know what training an image costs"
            raise Refusal("missing_values", text)
        per_image = np.log(known["train_flops"] / known["images"])
        power, constant = np.polyfit(np.log(known["parameters"]), per_image, 1)
        if not power > 0:
            raise Refusal(
                "not_identified", "an image of a larger model costs no more compute, so no budget has a best size"
            )
        return cls(float(np.exp(constant)), float(power))

    def per_image(self, parameters: float) -> float:
        """Training FLOPs of one image."""
        return float(self.kappa * parameters**self.power)

    def parameters(self, per_image: float) -> float:
        """The size whose images cost this."""
        return float((per_image / self.kappa) ** (1 / self.power))


@dataclass(frozen=True)
class ComputeLaw:
    """metric = k C^-gamma + e, for K parameter sets."""

    ln_k_K: Array
    gamma_K: Array
    e_K: Array

    def metric(self, flops: float) -> Array:
        return exp(self.ln_k_K - self.gamma_K * np.log(flops)) + self.e_K

    def ln_compute(self, metric: float) -> Array:
        """ln(C) at which the law reaches the metric; infinite where its floor lies above."""
        above_K = metric - self.e_K
        reached_K = above_K > 0
        ln_K = (self.ln_k_K - np.log(np.where(reached_K, above_K, 1.0))) / self.gamma_K
        return np.where(reached_K, ln_K, np.inf)


@dataclass(frozen=True)
class Frontier:
    """N* = exp(ln_g) C^a, D* = exp(ln_h) C^b, and the metric there; D in images."""

    ln_g_K: Array
    a_K: Array
    ln_h_K: Array
    b_K: Array
    law: ComputeLaw

    def parameters(self, flops: float) -> Array:
        return exp(self.ln_g_K + self.a_K * np.log(flops))

    def images(self, flops: float) -> Array:
        return exp(self.ln_h_K + self.b_K * np.log(flops))

    def images_per_parameter(self, flops: float) -> Array:
        return exp(self.ln_h_K - self.ln_g_K + (self.b_K - self.a_K) * np.log(flops))


def at_unity(fit: Fit, theta_KP: Array) -> dict[str, Array]:
    """The law's parameters where its inputs are counted from 1: A, B at N = D = 1 (or A at C = 1), E, exponents.

    The logarithms of A and B are given, as ln_A and ln_B: at C = 1 they can be too large for a float.
    """
    law = fit.law
    column_K = dict(zip(law.parameters, theta_KP.T, strict=True))
    found: dict[str, Array] = {}
    for amplitude, slopes in law.terms.items():
        ln_K = column_K[amplitude]
        for column, exponent in slopes.items():
            ln_K = ln_K + column_K[exponent] * fit.points.centre_F[law.inputs.index(column)]
        found[f"ln_{amplitude.removeprefix('ln_').upper()}"] = np.clip(ln_K, -MOST_LN, MOST_LN)
    found |= {name: column_K[name] for name in law.exponent_names}
    return found | ({"E": floor_of(law, theta_KP)} if law.floor or law.fixed_floor else {})


def floor_of(law: Law, theta_KP: Array) -> Array:
    """The floor of each parameter set: fitted, held fixed, or 0."""
    return theta_KP[:, -1] if law.floor else np.full(len(theta_KP), law.fixed_floor or 0.0)


def frontier_of(fit: Fit, theta_KP: Array, cost: Cost) -> Frontier:
    """The compute-optimal frontier of a law of size and data.

    Raises:
        Refusal: the law has no best size inside: it is a product, which falls along a budget's line without end.
    """
    if len(fit.law.terms) != 2:
        text = f"{fit.law.name} law: along a budget it falls or rises without end, so it has no compute-optimal size"
        raise Refusal("edge_optimum", text)
    unity = at_unity(fit, theta_KP)
    alpha_K, beta_K = unity["alpha"], unity.get("beta", unity["alpha"])
    ln_A_K, ln_B_K, s = unity["ln_A"], unity["ln_B"], cost.power
    total_K = alpha_K + s * beta_K
    a_K, b_K = beta_K / total_K, alpha_K / total_K
    balance_K = np.log(alpha_K) + ln_A_K - np.log(s * beta_K) - ln_B_K
    ln_g_K = balance_K / total_K - a_K * np.log(cost.kappa)
    ln_h_K = -np.log(cost.kappa) - s * ln_g_K
    ln_k_K = np.logaddexp(ln_A_K - alpha_K * ln_g_K, ln_B_K - beta_K * ln_h_K)
    return Frontier(ln_g_K, a_K, ln_h_K, b_K, ComputeLaw(ln_k_K, a_K * alpha_K, floor_of(fit.law, theta_KP)))


def compute_law(fit: Fit, theta_KP: Array, rows: pd.DataFrame) -> ComputeLaw:
    """The fitted law as one of compute: itself, or along its compute-optimal frontier.

    Raises:
        Refusal: see `Cost.of` and `frontier_of`.
    """
    if fit.law.inputs != COMPUTE:
        return frontier_of(fit, theta_KP, Cost.of(rows)).law
    unity = at_unity(fit, theta_KP)
    return ComputeLaw(unity["ln_A"], unity["b"], floor_of(fit.law, theta_KP))

"""Frechet distances made comparable: without the bias of few samples, with an EMA of a fixed rule, with tuned guidance.

Every function takes rows of one metric and returns new rows, under a metric or a key of their own, so that they are
never fitted together with what they come from. The primary curve is guidance 1 with the EMA rule; tuned guidance is
the least of k values, hence biased low, and its cost is the samples of all k.
"""

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.table import key_columns

LEAST_COUNTS = 3
SAMPLES, GUIDANCE, WEIGHTS = "key_samples", "key_guidance", "key_weights"


def infinity(rows: pd.DataFrame) -> pd.DataFrame:
    """FID-infinity (Chong and Forsyth 2020): the bias is linear in 1 / samples, so a line is extrapolated to 0.

    One row, metric `<metric>_infinity`, per checkpoint measured at three different sample counts or more; its standard
    error is the regression's.

    Raises:
        Refusal: no checkpoint has three sample counts.
    """
    groups = _groups(rows.dropna(subset=["samples", "value"]), SAMPLES, "key_seed")
    whole = [group for group in groups if group["samples"].nunique() >= LEAST_COUNTS]
    if not whole:
        text = f"no checkpoint is measured at {LEAST_COUNTS} sample counts, as FID-infinity needs"
        raise Refusal("too_few_points", text)
    return pd.concat([_extrapolated(group) for group in whole], ignore_index=True)


def tuned_guidance(rows: pd.DataFrame) -> pd.DataFrame:
    """The best guidance of every checkpoint, metric `<metric>_tuned`; `samples` counts those of all that were tried.

    Raises:
        UserError: the rows do not say their guidance.
        Refusal: guidance was never varied.
    """
    if GUIDANCE not in rows:
        raise UserError(f"no column {GUIDANCE}: the table does not say with which guidance it was measured")
    tried = [group for group in _groups(rows.dropna(subset=["value"]), GUIDANCE) if group[GUIDANCE].nunique() > 1]
    if not tried:
        raise Refusal("too_few_points", "no checkpoint is measured at more than one guidance scale")
    best = [group.loc[[group["value"].idxmin()]].assign(samples=group["samples"].sum()) for group in tried]
    chosen = pd.concat(best, ignore_index=True)
    counts = [f"best of {group[GUIDANCE].nunique()}" for group in tried]
    return chosen.assign(metric=chosen["metric"] + "_tuned", **{GUIDANCE: counts})


def ema_rule(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """Of every checkpoint the EMA whose length, 1 / (1 - decay) steps, is nearest to `share` of its training.

    A fixed share is fair across budgets, where a fixed decay favours one of them. The key says `ema <share>`.

    Raises:
        UserError: `share` is not above 0 and at most 1, or a row does not say its step.
        Refusal: no row has weights named ema_<decay>.
    """
    if not 0 < share <= 1:
        raise UserError(f"--ema-share: {share:g} must be above 0 and at most 1")
    decay = pd.to_numeric(rows["weights"].str.removeprefix("ema_"), errors="coerce")
    if decay.isna().all():
        raise Refusal("no_rows", "no row has weights named ema_<decay>")
    rows, decay = rows[decay.notna()], decay.dropna()
    if missing := int(rows["step"].isna().sum()):
        raise UserError(f"column step is missing in {missing} of {len(rows)} rows, and an EMA's share depends on it")
    misses = np.abs(np.log((1 - decay) * rows["step"].astype(float) * share))
    nearest = [misses[group.index].idxmin() for group in _groups(rows, WEIGHTS, "weights")]
    return rows.loc[nearest].assign(**{WEIGHTS: f"ema {share:g} of training"})


def _groups(rows: pd.DataFrame, *but: str) -> list[pd.DataFrame]:
    """The rows that agree in everything that tells checkpoints and measurements apart, `but` for these columns."""
    names = ["run", "step", "train_flops", "images", "metric", "weights", *key_columns(rows)]  # steps may be missing
    same = [name for name in names if name not in but]
    return [group for _, group in rows.groupby(same, dropna=False, sort=False)]


def _extrapolated(group: pd.DataFrame) -> pd.DataFrame:
    """The line through (1 / samples, value), every point weighted by its samples, at 1 / samples = 0."""
    x_N = 1 / group["samples"].to_numpy(dtype=float)
    values_N = group["value"].to_numpy(dtype=float)
    (_, value), covariance_22 = np.polyfit(x_N, values_N, 1, w=1 / np.sqrt(x_N), cov=True)
    row = group.iloc[[int(np.argmin(x_N))]]
    keys = {SAMPLES: "infinity"} if SAMPLES in group else {}
    error = np.sqrt(covariance_22[1, 1])
    return row.assign(metric=row["metric"] + "_infinity", value=value, standard_error=error, **keys)

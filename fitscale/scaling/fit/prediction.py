"""What a size that was never trained would reach: median, intervals, and how far out on a limb that is.

Laws of compute speak of the frontier: their prediction holds if the target is among the best for its compute.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.config.schema import ModelConfig
from fitscale.model import flops
from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.laws import COMPUTE, SURFACE
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import LawResult, Study, refuse_far, study
from fitscale.scaling.rows.refusals import Refusal

INNER = 0.5  # level of the interval beside that of the question
SAME_TOKENS = 1.05  # means of runs on the same images differ by which of them they have seen


@dataclass(frozen=True)
class Target:
    """A training run that has not happened."""

    size: str
    parameters: int
    images: int
    train_flops: float
    family: str
    patch: int  # side of a patch in latent pixels


@dataclass(frozen=True)
class Prediction:
    """One law's answer. Ratios are to the largest fitted run; `held_out_error` is predicted / measured - 1."""

    law: str
    median: float
    intervals: dict[float, tuple[float, float]]
    compute_ratio: float
    parameter_ratio: float
    held_out: str | None
    held_out_error: float | None
    without_a_run: dict[str, float]  # the law's value if that run had not been made, where it can be fitted without


def target(model: ModelConfig, steps: int, batch: int, tokens: float, squared_tokens: float) -> Target:
    """The run of `steps` steps on images of `tokens` tokens in the mean, and `squared_tokens` in the mean square."""
    per_token, square = flops.cost(model)
    fixed = flops.linear_macs(model, 0) + flops.mixing_macs(model, 0)
    macs = fixed + per_token * tokens + square * squared_tokens
    images = steps * batch
    train_flops = flops.TRAIN_PASSES * flops.FLOPS_PER_MAC * macs * images
    return Target(model.name, flops.parameters(model), images, train_flops, model.family, model.patch_size)


def tokens_of(rows: pd.DataFrame) -> tuple[float, float]:
    """Mean and mean square of the tokens per image that the rows' runs were trained on.

    Raises:
        UserError: the rows do not say, or the runs' images were not of the same sizes.
    """
    rows = rows.dropna(subset=["tokens_per_image", "attention_macs", "width", "depth"])
    if rows.empty:
        raise UserError("the table does not hold tokens_per_image and attention_macs; give --tokens")
    of_runs = rows.groupby("run")["tokens_per_image"].mean()
    if of_runs.max() > SAME_TOKENS * of_runs.min():
        raise UserError(
            f"the runs were trained on images of {of_runs.min():.4g} to {of_runs.max():.4g} tokens; give --tokens, or "
            "choose runs with --where"
        )
    squared = rows["attention_macs"] / (2 * rows["width"] * rows["depth"])
    return float(rows["tokens_per_image"].mean()), float(squared.mean())


def batch_of(rows: pd.DataFrame) -> int:
    """The batch that all rows share.

    Raises:
        UserError: they share none.
    """
    batches = rows["batch"].dropna().unique()
    if len(batches) != 1:
        raise UserError(f"the runs have {len(batches)} different batch sizes; give --batch")
    return int(batches[0])


def predict(table: pd.DataFrame, question: Question, goal: Target) -> tuple[list[Prediction], Study]:
    """Every law of the question, fitted to all sizes, at `goal`; and the study that they come from.

    Raises:
        Refusal: no law could be fitted, the target is of another family or patch size than the runs, or it is too far
            without agreement.
    """
    whole = study(table, replace(question, hold_out=()))
    if not whole.results:
        raise whole.refusals[0]
    for column, wanted in (("family", goal.family), ("patch", goal.patch)):
        found = whole.rows[column].dropna().unique()  # one at most, or `study` refuses; none where nobody says
        if len(found) and found[0] != wanted:
            what = f"--size {goal.size}: {column} is {wanted}, the runs' is {found[0]}"
            raise Refusal("mixed_models", f"{what}, and they follow different laws")
    refuse_far(whole.rows["train_flops"].max(), goal.train_flops, question.extrapolate)
    test = study(table, replace(question, hold_out=("largest",), extrapolate=True))
    tested = {result.name: result.predictions.sort_values("train_flops").iloc[-1] for result in test.results}
    return [_prediction(result, whole, goal, tested.get(result.name)) for result in whole.results], whole


def _prediction(result: LawResult, whole: Study, goal: Target, tested: pd.Series | None) -> Prediction:
    row = pd.DataFrame([{name: float(getattr(goal, name)) for name in (*COMPUTE, *SURFACE)}])
    draws_K = result.draws_KN(row)[:, 0]
    levels = (INNER, whole.question.level)
    intervals = [(float(low[0]), float(high[0])) for low, high in (result.interval(row, level) for level in levels)]
    return Prediction(
        law=result.name,
        median=float(np.median(draws_K)),
        intervals=dict(zip(levels, intervals, strict=True)),
        compute_ratio=goal.train_flops / float(whole.rows["train_flops"].max()),
        parameter_ratio=goal.parameters / float(whole.rows["parameters"].max()),
        held_out=None if tested is None else str(tested["size"]),
        held_out_error=None if tested is None else float(tested["error"]),
        without_a_run=_without_a_run(result, row),
    )


def _without_a_run(result: LawResult, row: pd.DataFrame) -> dict[str, float]:
    """Sensitivity to outliers: the fit repeated without each run in turn."""
    found = {}
    for run in sorted(result.used["run"].unique()):
        with suppress(Refusal):
            fit = fit_law(result.fit.law, result.used[result.used["run"] != run], result.fit.loss)
            found[str(run)] = float(fit.metric(row)[0])
    return found


def describe(prediction: Prediction, metric: str) -> str:
    """One line for people."""
    (inner_low, inner_high), (low, high) = prediction.intervals.values()
    outer = max(prediction.intervals)
    tested = "never tested on a held-out size"
    if prediction.held_out_error is not None:
        tested = f"with {prediction.held_out} held out it erred by {prediction.held_out_error:+.1%}"
    influence = ""
    if without := prediction.without_a_run:
        most = max(without, key=lambda run: abs(np.log(without[run] / prediction.median)))
        span = f"{min(without.values()):.4g} to {max(without.values()):.4g}"
        influence = f"; without one run it would be {span}, most changed by {most}"
    return (
        f"{prediction.law} law: {metric} {prediction.median:.4g}, 50 % {inner_low:.4g} to {inner_high:.4g}, "
        f"{100 * outer:.3g} % {low:.4g} to {high:.4g}; {prediction.compute_ratio:.2g} times the largest fitted compute "
        f"and {prediction.parameter_ratio:.2g} times the parameters; {tested}{influence}"
    )

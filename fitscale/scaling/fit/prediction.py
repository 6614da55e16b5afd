"""What a run that was never made would reach: median, intervals, and how far out on a limb that is.

The run is a model and its steps, or any numbers that settle it: two of parameters N, images D and training FLOPs C, the
third by what the table's images cost; or one of them, completed along a law's compute-optimal frontier. Laws of compute
speak of the frontier: their prediction holds if the target is among the best for its compute.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.config.schema import ModelConfig
from fitscale.model import flops
from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.frontier import Cost, frontier_of
from fitscale.scaling.fit.laws import COMPUTE, SURFACE
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.slices import SAME_TOKENS, tokens_per_image
from fitscale.scaling.fit.study import FAR, LawResult, Study, study
from fitscale.scaling.rows.refusals import Refusal

WORDS = {"train_flops": "compute", "parameters": "parameters", "images": "data"}
INNER = 0.5  # level of the interval beside that of the question
SAME_UNIT = 1.5  # sizes of one family cost within 6 % of a power law of size; MACs for FLOPs are a factor of 2
SLACK = 0.05  # of that law's exponent, for sizes far from those that it is known from


@dataclass(frozen=True)
class Target:
    """A training run that has not happened; what is None is not settled (see this module's description)."""

    size: str
    parameters: float | None
    images: float | None
    train_flops: float | None
    family: str | None = None
    patch: int | None = None  # side of a patch in latent pixels


@dataclass(frozen=True)
class Prediction:
    """One law's answer for a run of `parameters`, `images` and `train_flops`; `optimal`: they are the law's own best.

    Ratios are to the largest fitted run; `held_out_error` is predicted / measured - 1.
    """

    law: str
    parameters: float | None
    images: float | None
    train_flops: float
    optimal: bool
    median: float
    intervals: dict[float, tuple[float, float]]
    compute_ratio: float
    parameter_ratio: float | None
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
    return Target(model.name, flops.parameters(model), images, train_flops, model.kind, model.patch_size)


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


def numbers_target(rows: pd.DataFrame, **asked: float | None) -> Target:
    """The run with some of `parameters`, `images` and `train_flops`; of two the third follows from what `rows` cost.

    Raises:
        UserError: none of them, or all three.
        Refusal: the rows do not say what an image costs.
    """
    known = {name: value for name, value in asked.items() if value is not None}
    if len(known) not in (1, 2):
        raise UserError("give --size and --steps, or one or two of --parameters, --data and --flops")
    if len(known) == 2:
        cost, size, images, total = Cost.of(rows), *(known.get(name) for name in (*SURFACE, *COMPUTE))
        if size is None:
            size = cost.parameters(known["train_flops"] / known["images"])
        images = known["train_flops"] / cost.per_image(size) if images is None else images
        known = {"parameters": size, "images": images, "train_flops": total or cost.per_image(size) * images}
    return Target("a run", known.get("parameters"), known.get("images"), known.get("train_flops"))


def refuse_other_unit(rows: pd.DataFrame, model: ModelConfig, tokens: float) -> None:
    """Refuse `rows` whose images cost by far another number of FLOPs than `model` spends on one.

    The image is as long as the rows' own, or of `tokens` tokens; where theirs differ nothing is known.

    Raises:
        Refusal: their data or their compute are counted in another unit.
    """
    lengths = rows["tokens_per_image"]
    own = tokens_per_image(rows)
    if own is None and lengths.notna().any():
        return
    if lengths.isna().all() and own is not None:
        advice = "give --parameters, --data or --flops"
        raise Refusal("mixed_models", f"the table counts tokens, {model.name} images; {advice}")
    own = own or tokens
    one = target(model, 1, 1, own, own**2)
    size, sizes = float(one.parameters or 0), rows["parameters"].astype(float)
    try:
        ratio = float(one.train_flops or 0) / Cost.of(rows).per_image(size)
    except Refusal:
        return  # the rows do not say what an image costs
    known = SAME_UNIT * max(size / sizes.max(), sizes.min() / size, 1.0) ** SLACK
    if not 1 / known < ratio < known:
        what = f"an image costs {one.size} {one.train_flops:.3g} training FLOPs, {ratio:.3g} times what the table says"
        unit = "so it counts data or compute in another unit (tokens, MACs, the papers' FLOPs)"
        advice = "choose rows in this one, or give --parameters, --data or --flops in the table's"
        raise Refusal("mixed_models", f"{what} at {one.parameters:.3g} parameters, {unit}; {advice}")


def predict(table: pd.DataFrame, question: Question, goal: Target) -> tuple[list[Prediction], Study]:
    """Every law of the question, fitted to all sizes, at `goal`; and the study that they come from.

    The study's refusals include those of laws that say nothing of the goal.

    Raises:
        Refusal: no law speaks of it: none could be fitted, the target is of another family or patch size than the
            runs, or it lies too far outside them without agreement.
    """
    whole = study(table, replace(question, hold_out=()))
    if not whole.results:
        raise whole.refusals[0]
    for column, wanted in (("family", goal.family), ("patch", goal.patch)):
        found = whole.rows[column].dropna().unique()  # one at most, or `study` refuses; none where nobody says
        if wanted is not None and len(found) and found[0] != wanted:
            what = f"--size {goal.size}: {column} is {wanted}, the runs' is {found[0]}"
            raise Refusal("mixed_models", f"{what}, and they follow different laws")
    settled = []
    for result in whole.results:
        try:
            settled.append((result, _settled(result, goal, whole)))
        except Refusal as refusal:
            whole.refusals.append(refusal)
    if not settled:
        raise whole.refusals[-1]
    test = study(table, replace(question, hold_out=("largest",), extrapolate=True))
    tested = {result.name: result.predictions.sort_values("train_flops").iloc[-1] for result in test.results}
    return [_prediction(result, whole, goal, row, tested.get(result.name)) for result, row in settled], whole


def _prediction(
    result: LawResult, whole: Study, goal: Target, row: pd.DataFrame, tested: pd.Series | None
) -> Prediction:
    draws_K = result.draws_KN(row)[:, 0]
    size, images, total = (row[name].iloc[0] for name in (*SURFACE, *COMPUTE))
    levels = (INNER, whole.question.level)
    ratio = float(size) / float(whole.rows["parameters"].max())  # NaN where the table or the run has no parameters
    intervals = [(float(low[0]), float(high[0])) for low, high in (result.interval(row, level) for level in levels)]
    return Prediction(
        law=result.name,
        parameters=None if np.isnan(size) else float(size),
        images=None if np.isnan(images) else float(images),
        train_flops=float(total),
        optimal=goal.parameters is None or goal.images is None,
        median=float(np.median(draws_K)),
        intervals=dict(zip(levels, intervals, strict=True)),
        compute_ratio=float(total) / float(whole.rows["train_flops"].max()),
        parameter_ratio=None if np.isnan(ratio) else ratio,
        held_out=None if tested is None else str(tested["size"]),
        held_out_error=None if tested is None else float(tested["error"]),
        without_a_run=_without_a_run(result, row),
    )


def _settled(result: LawResult, goal: Target, whole: Study) -> pd.DataFrame:
    """The run as one row; what the goal leaves open is where the law has its optimum.

    Raises:
        Refusal: the law has none, or speaks of compute alone and the goal has none; or the run is too far outside.
    """
    known = {name: getattr(goal, name) for name in (*SURFACE, *COMPUTE)}
    if result.fit.law.inputs == COMPUTE:
        if goal.train_flops is None:
            text = f"{result.name} law: it speaks of compute alone; give --flops, or two of --parameters and --data"
            raise Refusal("missing_values", text)
    elif None in known.values():
        best = frontier_of(result.fit, result.fit.theta_P[None], Cost.of(result.used))
        lines = {"parameters": (best.ln_g_K[0], best.a_K[0]), "images": (best.ln_h_K[0], best.b_K[0])}
        total = goal.train_flops
        for name, (constant, exponent) in lines.items():
            total = float(np.exp((np.log(known[name]) - constant) / exponent)) if known[name] else total
        if total is not None:
            known = {"parameters": float(best.parameters(total)[0]), "images": float(best.images(total)[0])}
            known["train_flops"] = total
    row = pd.DataFrame([{name: np.nan if value is None else float(value) for name, value in known.items()}])
    if not whole.question.extrapolate:
        _refuse_outside(result, whole, row)
    return row


def _refuse_outside(result: LawResult, whole: Study, row: pd.DataFrame) -> None:
    """Refuse what lies more than `FAR` times beyond the fitted rows, above or below, in any input of the law."""
    for name in dict.fromkeys((*COMPUTE, *result.fit.law.inputs)):
        asked, fitted = float(row[name].iloc[0]), whole.rows[name].astype(float)
        for ratio, which in (
            (asked / fitted.max(), "times the largest"),
            (fitted.min() / asked, "times below the least"),
        ):
            if ratio > FAR:
                what = f"{result.name} law: the prediction is for {ratio:.1f} {which} fitted {WORDS[name]}"
                raise Refusal("extrapolation", f"{what}; beyond {FAR:g} times say so with --extrapolate")


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
    size = "" if prediction.parameter_ratio is None else f" and {prediction.parameter_ratio:.2g} times the parameters"
    best = ""
    if prediction.optimal and prediction.parameters is not None and prediction.images is not None:
        per = prediction.images / prediction.parameters
        amounts = f"{prediction.parameters:.3g} parameters, {prediction.images:.3g} data ({per:.3g} for each)"
        best = f" at its compute-optimal {amounts}"
    return (
        f"{prediction.law} law{best}: {metric} {prediction.median:.4g}, 50 % {inner_low:.4g} to {inner_high:.4g}, "
        f"{100 * outer:.3g} % {low:.4g} to {high:.4g}; {prediction.compute_ratio:.2g} times the largest fitted "
        f"compute{size}; {tested}{influence}"
    )

"""A column map proposed from the names and cells of a table: a start to read and correct, never used unread.

1. A table of one column per run (a chart exported from wandb) is melted.
2. Every column of the runs table takes the first column of the source with a name that is usual for it, in its unit.
3. Columns that nothing claims: numbers with the name of a metric are metrics; of others what repeats is a label.
4. Training FLOPs that no column holds are computed from what there is.
"""

import keyword
import re
from collections import Counter
from typing import Any

import pandas as pd

from fitscale.scaling.rows.table import KEY, LABEL, numbers

USUAL = {  # column: usual names, best first; words of a name are joined by _
    "run": "run run_name run_id name id experiment exp trial",
    "family": "family model_family architecture arch",
    "size": "size model_size model model_name variant",
    "parameters": "parameters params n_params num_params num_parameters nparams n_parameters param_count "
    "model_params non_embedding_params n",
    "patch": "patch patch_size",
    "width": "width hidden_size d_model dim n_embd",
    "depth": "depth n_layers num_layers layers n_layer",
    "heads": "heads n_heads num_heads n_head",
    "batch": "batch batch_size global_batch_size bs",
    "step": "step steps train_steps training_steps global_step iteration iterations iters iter",
    "images": "images images_seen samples_seen num_images n_images train_images",
    "tokens": "tokens tokens_seen train_tokens num_tokens n_tokens training_tokens d",
    "train_flops": "train_flops training_flops flops total_flops compute training_compute train_compute c flop",
    "linear_macs": "macs forward_macs fwd_macs model_macs",
    "device_hours": "device_hours gpu_hours gpu_h",
    "device": "device gpu",
    "seed": "seed",
    "lr": "lr learning_rate",
    "samples": "fid_samples num_fid_samples n_samples",
    "key_guidance": "guidance cfg cfg_scale guidance_scale",
    "key_sampler": "sampler solver",
    "key_resolution": "resolution image_size",
    "key_weights": "ema ema_decay weights",
}
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "g": 1e9, "thousand": 1e3, "million": 1e6, "millions": 1e6}
UNITS |= {"billion": 1e9, "billions": 1e9, "trillion": 1e12, "giga": 1e9, "gflops": 1e9, "gmacs": 1e9, "gmac": 1e9}
WORDS_OF_METRICS = re.compile(
    r"(^|_)(fid|fd|kid|sfid|loss|ppl|perplexity|nll|bpb|bits_per_byte|error|err|ce|cross_entropy|mse)(\d|_|$)"
)
BESIDE_A_METRIC = re.compile(r"(^|_)(lo|hi|low|high|lower|upper|std|se|stderr|ci)\d*(_|$)|samples|(^|_)(min|max)$")
MOST_METRICS = 30
LONGEST_LABEL = 80  # characters


def guessed(source: pd.DataFrame) -> dict[str, Any]:
    """A column map for the cells of a table, as YAML would hold it."""
    mapping: dict[str, Any] = {}
    names = list(map(str, source.columns))
    if chart := _chart(names):
        mapping |= {"melt": f"* - {chart}", "run": "column", "size": "column", "metrics": {_metric_name(chart): "cell"}}
        names = [name for name in names if " - " not in name]
    words = {name: _words(name) for name in names}
    for column in USUAL:
        if column not in mapping and (rule := _usual(column, source, words)) is not None:
            mapping[column] = rule
    used = {
        name for rule in mapping.values() for name in words if name in (rule, *str(rule).split("`"), *str(rule).split())
    }
    if "metrics" not in mapping:
        found = [name for name in words if name not in used and _is_metric(words[name], source[name])]
        mapping["metrics"] = {_metric_name(name): name for name in found[:MOST_METRICS]}
        used |= set(found)
    if not {"size", "parameters"} & set(mapping) and "run" in mapping:
        mapping["size"] = mapping["run"]
    _add_compute(mapping, {word: name for name, word in words.items() if _is_numeric(source[name])})
    mapping |= {LABEL + words[name]: name for name in words if name not in used and _is_label(source[name])}
    rank = {name: index for index, name in enumerate(["melt", *USUAL])}
    return dict(sorted(mapping.items(), key=lambda pair: rank.get(pair[0], len(rank) + (pair[0] == "metrics"))))


def _add_compute(mapping: dict[str, Any], of_words: dict[str, str]) -> None:
    """Training FLOPs, or the data, from what else there is, if it is enough."""
    if {"batch", "step"} <= set(mapping) and not {"images", "tokens"} & set(mapping):
        mapping["images"] = f"{_part(mapping['batch'])} * {_part(mapping['step'])}"
    parameters, tokens, images = (mapping.get(name) for name in ("parameters", "tokens", "images"))
    gmacs = [name for word, name in of_words.items() if re.search(r"(^|_)g(macs?|flops)(_|$)", word)]
    if "train_flops" in mapping:
        if parameters and not (tokens or images or "step" in mapping):
            mapping["tokens"] = f"{_part(mapping['train_flops'])} / (6 * {_part(parameters)})"
    elif tokens and "flops_per_token" in of_words:
        mapping["train_flops"] = f"{_quoted(of_words['flops_per_token'])} * {_part(tokens)}"
    elif gmacs and images:
        mapping["train_flops"] = f"6e9 * {_quoted(gmacs[0])} * {_part(images)}"
    elif tokens and parameters:
        mapping["train_flops"] = f"6 * {_part(parameters)} * {_part(tokens)}"


def _words(name: str) -> str:
    """The words of a name in small letters: `Params (M)` and `params_m` are params_m."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name) if not name.isupper() else name
    return re.sub(r"\W+|_+", "_", apart.lower()).strip("_")


def _usual(column: str, source: pd.DataFrame, words: dict[str, str]) -> str | None:
    """The rule of the first column with a usual name, times its unit."""
    text = column in ("run", "family", "size", "device") or column.startswith(KEY)
    for usual in USUAL[column].split():
        for name, word in words.items():
            tail = word.removeprefix(usual).removeprefix("_") if word.startswith(f"{usual}_") else None
            unit = 1.0 if word == usual else UNITS.get(tail or "")
            if unit is None or (text and unit != 1.0) or not (text or _is_numeric(source[name])):
                continue
            if column == "run" and source[name].nunique() < 2:
                continue
            return name if unit == 1.0 else f"{_quoted(name)} * {unit:.0e}".replace("e+0", "e").replace("e+", "e")
    return None


def _part(rule: str) -> str:
    """A rule as a part of an expression."""
    return rule if " * " in rule else _quoted(rule)


def _quoted(name: str) -> str:
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"`{name}`"


def _is_numeric(cells: pd.Series) -> bool:
    known = cells.dropna()
    return len(known) > 0 and bool(numbers(known).notna().all())


def _is_metric(word: str, cells: pd.Series) -> bool:
    return bool(WORDS_OF_METRICS.search(word)) and not BESIDE_A_METRIC.search(word) and _is_numeric(cells)


def _metric_name(name: str) -> str:
    return _words(name.rsplit("/", 1)[-1]) or name


def _is_label(cells: pd.Series) -> bool:
    """What repeats tells rows apart, and is no remark about one."""
    known = cells.dropna().astype("string")
    return 1 < known.nunique() <= len(known) / 2 and known.str.len().max() < LONGEST_LABEL


def _chart(names: list[str]) -> str | None:
    """What follows the run in columns `RUN - METRIC`, as wandb exports a chart; None if there are not two of them."""
    ends = Counter(name.split(" - ", 1)[1] for name in names if " - " in name)
    of_metrics = {
        end: count for end, count in ends.items() if count > 1 and not end.endswith(("__MIN", "__MAX", "_step"))
    }
    return max(of_metrics, key=lambda end: of_metrics[end]) if of_metrics else None

"""Hostile configs and command lines: each ends well, or with one line that says what is wrong. Always the same ones."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from fitscale.cli import main
from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import MODEL_CONFIGS, Config
from fitscale.data.index import open_index
from fitscale.jobs.profile import ClusterConfig, LayoutConfig
from fitscale.jobs.submission import as_told, look_at
from fitscale.run.claim import check_claim
from tests.conftest import ROOT
from tests.shard_sets import PIXELS, indexed_set
from tests.tiny import OVERRIDES

MUTATIONS, COMMAND_LINES = 2000, 500
LONGEST = 700  # characters of a message
PROFILE = ClusterConfig(device="cpu", gpus_per_node=0, tasks_per_node=2)

NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e-320", "1e30", "1e308", "1e400", "true", "null", "~", ""),
    *(".nan", ".inf", "-.inf", "nan", "inf", "0x10", "1_0", "1:30", "2020-01-01", "999999", "2147483648"),
    *("9007199254740993", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30),
    *("18446744073709551616", "9" * 400, "9" * 5000, "1e" + "9" * 50, "-" * 50, "0x" + "f" * 5000),
]
NESTED = [
    *("[]", "{}", "[[]]", "[null]", "[1, a]", "[1, 2]", "[0.5, .nan]", "[.inf]", "{a: b}", "{1: 2}", "{null: 1}"),
    *(
        "[{}]",
        "[0.9, 0.9, 0.9]",
        "{shards: x}",
        "{a: {shards: x}}",
        "{a: {shards: x, weight: -1}}",
        "{a: {weight: .nan}}",
    ),
    *("{a: {shards: x, min_tokens: 99999999999999999999}}", "{'': {shards: x}}", "{'a.b': {shards: '{}'}}"),
    *("[" * 2000, "[" * 400 + "]" * 400, "{a: " * 300, "[" + "a," * 12_000 + "]", "[" + ", ".join("01" * 500) + "]"),
]
WORDS = [
    *("x", "auto", "cpu", "ema", "raw", "ema_0.9", "fit", "fitv2", "ddpm", "ddim", "dopri5", "sde", "yarn", "uniform"),
    *("x" * 300, "x" * 100_000, "/" * 300, "../" * 100, "a/" * 3000, "/dev/null", "/dev/zero", "/dev/stdin", "/", "."),
    *(
        "/dev/null/x",
        "/proc/self/mem",
        "~",
        "~nobody/x",
        "$(touch x)",
        "`touch x`",
        "; touch x",
        "'; touch x; '",
        "%s%n",
    ),
    *(
        '"a\\nb"',
        '"a\\rb"',
        '"a\\0b"',
        '"\\e[31m"',
        '"\\u202e"',
        '"\\ud800"',
        "é",
        "\u2028",
        "\ud800",
        "\x00",
        "\x1b[2J",
    ),
]
YAML = [
    *(
        "${oc.env:HOME}",
        "${run.name}",
        "${",
        "$",
        "???",
        "!!python/object/apply:os.system [id]",
        "!!binary gA==",
        "!x y",
    ),
    *(
        "&a [*a]",
        "[&a x, *a]",
        "*a",
        "<<",
        "{<<: {a: b}}",
        "{<<: 1}",
        "? x",
        "- x",
        "a: b: c",
        "a: b",
        "'",
        '"',
        "#",
        "|",
    ),
    *("%YAML 9.9", "---", "--- a\n--- b", "@", "`", ">", "[&a [1, 1], &b [*a, *a], &c [*b, *b], *c, *c, *c, *c, *c]"),
]
VALUES = [*NUMBERS, *NESTED, *WORDS, *YAML]


def leaves(tree: dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def keys_of(*schemas: object) -> list[str]:
    return sorted({key for schema in schemas if is_dataclass(schema) for key in leaves(asdict(schema))})


KEYS = keys_of(Config(), Config(model=MODEL_CONFIGS["fitv2"]()))
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS})


def damaged(key: str, rng: random.Random) -> str:
    place = rng.randrange(len(key))
    return rng.choice(
        [
            f"{key}[0]",
            f"{key}.0",
            f"{key}.x",
            f"{key}.{key}",
            f"{key}.",
            f".{key}",
            key.upper(),
            key.replace(".", ".."),
            key[:place] + key[place + 1 :],
            key[:place] + rng.choice("é\x00\n[]{}'\"$ =#") + key[place:],
            key * 100,
            "a." * 3000 + key,
            "x" * 50_000,
            "",
        ]
    )


def a_mutation(rng: random.Random) -> str:
    key = rng.choice(KEYS if rng.random() < 0.9 else SECTIONS)
    if rng.random() < 0.1:
        key = damaged(key, rng)
    return f"{key}={rng.choice(VALUES)}"


def sections(overrides: list[str]) -> dict:
    """One config of them all: 2,000 times 19 overrides would take their time."""
    root: dict = {}
    for override in overrides:
        key, _, value = override.partition("=")
        *outer, last = key.split(".")
        section = root
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    return root


def told_well(error: object) -> bool:
    text = str(error)
    return text.isprintable() and 0 < len(text) <= LONGEST


def test_every_value_of_every_key_is_accepted_or_told_in_one_line(tmp_path_factory, tmp_path, monkeypatch):
    """As a submission does: the config, the run directory, shards and files, the plan. And what it records."""
    monkeypatch.chdir(tmp_path)
    rng, opened = random.Random(0), cache(open_index)
    shards = tmp_path_factory.mktemp("shards")
    indexed_set(shards, 100, meta=replace(PIXELS, channels=1, num_classes=10))
    base = sections([*OVERRIDES, f"data.shards={shards}", "run.dir=run"])
    accepted, badly = 0, []
    for _ in range(MUTATIONS):
        mutation = a_mutation(rng)
        try:
            config = load_config([base, mutation])
            assert load_config([asdict(config)]) == config
            check_claim(config)
            str(as_told(look_at(config, opened), PROFILE, LayoutConfig(1, 2)))
            accepted += 1
        except UserError as error:
            if not told_well(error):
                badly.append((mutation[:200], str(error)[:1000]))
        except Exception as error:
            badly.append((mutation[:200], f"{type(error).__name__}: {error}"[:300]))
    assert not badly, "\n".join(map(repr, badly))
    assert MUTATIONS / 20 < accepted < MUTATIONS / 2  # neither is all refused, nor all taken
    assert not any(tmp_path.iterdir())


WORDS_OF = {  # what a command line of each command is made of, besides hostile words and values of its options
    "config": [*OVERRIDES[:4], "configs", "nowhere.yaml"],
    "train": [*OVERRIDES[:4], "model.nonsense=1"],
    "plan": [*OVERRIDES[:6]],
    "data": [],
    "sample": ["RUN", "--height=8", "--width=8"],
    "evaluate": ["RUN", "--samples=4"],
    "tune": ["RUN", "--over", "steps=1,2"],
}
SAMPLERS = ["--method", "--steps", "--spacing", "--guidance", "--power", "--rope", "--height", "--width", "--seed"]
SAMPLERS += [
    "--last-step",
    "--shift-base-tokens",
    "--guide",
    "--guide-step",
    "--guide-weights",
    "--tensor-parallel-size",
]
OPTIONS = {
    "plan": ["--gpus", "--gpu", "--mfu", "--measured", "--gpus-per-node", "--best", "--target-steps"],
    "data": ["--patch-size", "--batch", "--ranks", "--pack-tokens", "--out"],
    "sample": [*SAMPLERS, "--count", "--classes", "--out", "--step", "--weights", "--device"],
    "tune": ["--over", "--metric", "--samples", "--seed", "--out", "--step", "--weights", "--tensor-parallel-size"],
    "evaluate": [*SAMPLERS, "--samples", "--features", "--reference", "--step", "--weights"],
}
HOSTILE = [*NUMBERS, *WORDS, "0-9999999999", "1,,2", "9-0", "--help", "--nonsense", "-h", "--", "-", "--o", "@x", "0x8"]


def a_command_line(rng: random.Random, run: Path) -> list[str]:
    command = rng.choice([*WORDS_OF, rng.choice(HOSTILE)] if rng.random() < 0.1 else [*WORDS_OF])
    words = [str(run) if word == "RUN" else word for word in WORDS_OF.get(command, [])]
    if words and rng.random() < 0.1:
        words.pop(rng.randrange(len(words)))
    for _ in range(rng.randrange(1, 3)):
        if options := OPTIONS.get(command):
            words += [rng.choice(options), rng.choice(HOSTILE)]
        else:
            words.insert(rng.randrange(len(words) + 1), rng.choice([rng.choice(HOSTILE), a_mutation(rng)]))
    if command == "data" or rng.random() < 0.05:
        words.insert(0, rng.choice(WORDS))
    return [command, *words, *(["model.nonsense=1"] if command == "train" else [])]


def test_every_command_line_ends_well_or_is_told_in_one_line(tmp_path, monkeypatch, capfd):
    """In this process. The weights are damaged: a sample or an evaluation that could start is refused as well."""
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(ROOT / "tests" / "data" / "version_0_1" / "runs" / "fitv2", tmp_path / "run")
    for weights in run.glob("checkpoints/*/weights/*/*.safetensors"):
        weights.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    rng, codes, badly = random.Random(0), Counter(), []
    for _ in range(COMMAND_LINES):
        line = a_command_line(rng, run)
        try:
            code = main(line)
        except SystemExit as ended:  # argparse
            code = ended.code
        except Exception as error:
            code = f"{type(error).__name__}: {error}"[:300]
        told = capfd.readouterr().err.strip().splitlines() or [""]
        codes[code] += 1
        if code not in (0, 2) or (code == 2 and not ("error: " in told[-1] and told_well(told[-1]))):
            badly.append((code, [word[:100] for word in line], told[-1][:1000]))
    assert not badly, "\n".join(map(repr, badly))
    assert codes[2] > COMMAND_LINES / 2 and codes[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

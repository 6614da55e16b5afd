"""Hostile configs and command lines: each ends well, or with one line that says what is wrong. Seeded, so always alike."""

import random
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from functools import cache

from fitscale.jobs.allocate import as_told

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import MODEL_CONFIGS, Config
from fitscale.data.index import open_index
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.submission import look_at
from fitscale.jobs.sweep import LayoutConfig
from fitscale.run.claim import check_claim
from tests.tiny import OVERRIDES

MUTATIONS, COMMAND_LINES = 2000, 500
LONGEST = 600  # characters of a message
PROFILE = ClusterConfig(device="cpu", gpus_per_node=0, tasks_per_node=2)

VALUES = [
    *("0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e-320", "1e30", "1e308", "1e400", "true", "null", "~", ""),
    *(".nan", ".inf", "-.inf", "nan", "inf", "0x10", "1_0", "1:30", "2020-01-01", "999999", "2147483648"),
    *("9007199254740993", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616"),
    *("1" + "0" * 30, "9" * 400, "9" * 5000, "1e" + "9" * 50, "-" * 50),
    *("[]", "{}", "[[]]", "[null]", "[1, a]", "[1, 2]", "[0.5, .nan]", "[.inf]", "{a: b}", "{1: 2}", "{null: 1}", "[{}]"),
    *("[0.9, 0.9, 0.9]", "{shards: x}", "{a: {shards: x}}", "{a: {shards: x, weight: -1}}", "{a: {weight: .nan}}"),
    *("{a: {shards: x, min_tokens: 99999999999999999999}}", "{'': {shards: x}}", "{'a.b': {shards: '{}'}}"),
    *("x", "auto", "cpu", "ema", "raw", "ema_0.9", "fit", "fitv2", "ddpm", "ddim", "dopri5", "sde", "yarn", "uniform"),
    *("x" * 300, "x" * 100_000, "/" * 300, "../" * 100, "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/", "."),
    *("/dev/null/x", "a/" * 3000, "~", "~nobody/x", "$(touch x)", "`touch x`", "; touch x", "'; touch x; '", "%s%n%d"),
    *('"a\\nb"', '"a\\rb"', '"a\\0b"', '"\\e[31m"', '"\\u202e"', '"\\ud800"', "é", "日本", "\u2028", "\ud800", "\x00", "\x1b[2J"),
    *("${oc.env:HOME}", "${run.name}", "${", "$", "???", "!!python/object/apply:os.system [id]", "!!binary gA==", "!x y"),
    *("&a [*a]", "[&a x, *a]", "*a", "<<", "{<<: {a: b}}", "{<<: 1}", "? x", "- x", "a: b: c", "a: b", "'", '"', "#", "|", ">"),
    *("[" * 2000, "[" * 400 + "]" * 400, "{a: " * 300, "[" + "a," * 30_000 + "]", "%YAML 9.9", "---", "--- a\n--- b", "@", "`"),
]  # fmt: skip


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


def told_well(error: object) -> bool:
    text = str(error)
    return text.isprintable() and 0 < len(text) <= LONGEST


def test_every_value_of_every_key_is_accepted_or_told_in_one_line(digits_shards, tmp_path, monkeypatch):
    """As a submission does: the config, the run directory, shards and files, the plan. And what it records."""
    monkeypatch.chdir(tmp_path)
    rng, opened = random.Random(0), cache(open_index)
    base, accepted, badly = [*OVERRIDES, f"data.shards={digits_shards}", "run.dir=run"], 0, []
    for _ in range(MUTATIONS):
        mutation = a_mutation(rng)
        try:
            config = load_config([*base, mutation])
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

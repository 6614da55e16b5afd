"""500 damaged and hostile tables, column maps and sweeps through the real tools: each is used, or refused in one line.

What is refused ends with exit code 2 and leaves nothing behind; an exception would fail the test with its traceback.
"""

import random
import re
import shutil
from pathlib import Path

import pytest

from fitscale.scaling.rows.files import write_table
from fitscale.scaling.rows.runs import collect
from tests.programs import Done, run_tool
from tests.sample_folders import write_samples
from tests.synthetic_runs import write_sweep

pytestmark = pytest.mark.filterwarnings("error")  # it would be a second line, and is a mistake in an array
LONGEST_ERROR = 1500  # characters
HOSTILE = [
    *("", "0", "-1", "-0.0", "1e-320", "1e308", "1e999", "inf", "-inf", "nan", "NaN", "1e30", "9" * 400, "2**53"),
    *("9007199254740993", "3.5", "1,5", "1_000", "0x10", "true", "None", "[]", "{}", "2026-11-21", "٣", "$\\frac", "$"),
    *("$x$", "a|b", "<script>alert(1)</script>", "`x`", "[x](javascript:alert(1))", "../../etc/passwd", "/dev/zero"),
    *(
        '"',
        "'",
        "=1+1",
        "\\",
        "\x1b[31m",
        "\u202e",
        "\U0001f600",
        "é",
        "x" * 300,
        "x" * 200_000,
        "a;b",
        "#",
        "_",
        "%s{}",
    ),
]
MAP = """run: run
size: size
step: step
train_flops: [1.0, train_flops]
images: train_flops / (6 * parameters)
where: step > 0 and size != "none"
label_run: "={run} of {size}"
metrics: {fd: value}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, lambda flops, _: 50 * (flops / 1e12) ** -0.3, points=2, run_noise=0.02, point_noise=0.01)
    write_samples(folder / "s-seed0" / "samples" / "drawn", folder / "s-seed0", 4000)
    return folder


@pytest.fixture(scope="module")
def table(sweep, tmp_path_factory):
    rows = collect([sweep])
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    write_table(rows[rows["metric"] == "fd"], path)
    return path.read_bytes()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with some of its bytes, lines or cells changed."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data = rng.choice([_bytes, _lines, _cells, _cells, _cells, _columns])(data, rng)
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    new = rng.choice([b"", b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"\r", b"\n", b",", b";", rng.randbytes(4)])
    whole = [b"", b"\n", b"\xef\xbb\xbf" + data, b"\xff\xfe" + data.decode("latin-1").encode("utf-16-le"), b"PAR1" * 4]
    cut = [data[:start], data[:start] + new + data[start:], data[:start] + new + data[start + len(new) + 1 :]]
    tables = [
        data.replace(b",", b";"),
        data.replace(b",", b"\t"),
        data.replace(b".", b","),
        data.replace(b"\n", b"\r\n"),
    ]
    return rng.choice(cut if rng.random() < 0.6 else whole + tables)


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    return b"".join(
        rng.choice([lines[:1], lines[1:], lines[:first] + lines[second:], [*lines, lines[first]], [*lines, b"\n\n"]])
    )


def _cells(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    line = rng.randrange(len(lines))
    cells = lines[line].split(b",")
    cells[rng.randrange(len(cells))] = rng.choice(HOSTILE).encode()
    return b"\n".join([*lines[:line], b",".join(cells), *lines[line + 1 :]])


def _columns(data: bytes, rng: random.Random) -> bytes:
    """One column changed in every line: removed, doubled, named anew, or filled with one value."""
    rows = [line.split(b",") for line in data.split(b"\n")]
    column, what, value = rng.randrange(max(map(len, rows))), rng.randrange(4), rng.choice(HOSTILE).encode()
    for number, cells in enumerate(rows):
        old = cells[column : column + 1]
        new = [[], old * 2, [value] if old and number == 0 else old, [value] if old and number else old]
        cells[column : column + 1] = new[what]
    return b"\n".join(b",".join(cells) for cells in rows)


def check(done: Done, out: Path, allowed: tuple[int, ...] = (0,)) -> bool:
    """Whether the tool went through; else it has said why in one line and left nothing."""
    if done.returncode in allowed:
        return True
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert len(done.stderr) < LONGEST_ERROR and "Traceback" not in done.stderr, done.stderr
    assert not out.exists() and not list(out.parent.glob(".*")), "left behind"
    return False


def test_damaged_tables(table, tmp_path):
    """Every table through the tool that reads all of it; some of those that it takes through the other tools."""
    path, out, used = tmp_path / "runs.csv", tmp_path / "out" / "again.csv", 0
    for seed in range(400):
        path.write_bytes(damaged(table, random.Random(seed)))
        if seed % 8 == 0:
            check(run_tool("collect_runs", path, "--guess"), out, (0, 3))
        if not check(run_tool("collect_runs", path, "--check", "-o", out), out, (0, 3)):
            continue
        used += 1
        out.unlink()
        if used % 16 == 8:
            check(run_tool("holdout", path, "--law", "power", "-o", out), out)
        elif used % 16 == 0:
            size = ["configs/demo/digits.yaml", "configs/demo/l.yaml", "--steps", 4000]
            check(run_tool("predict", path, "--law", "power", "--size", *size, "--extrapolate", "-o", out), out)
        out.unlink(missing_ok=True)
    assert 40 < used < 340, "damage that always or never matters tests nothing"


def test_damaged_column_maps(table, tmp_path):
    path, columns, out, used = tmp_path / "runs.csv", tmp_path / "map.yaml", tmp_path / "out" / "runs.csv", 0
    path.write_bytes(table)
    for seed in range(70):
        rng = random.Random(seed)
        old, new = rng.choice(re.findall(r"\w+", MAP)), rng.choice(["run", "value", "5", "[2, step]", *HOSTILE])
        columns.write_bytes(damaged(MAP.encode(), rng) if seed % 3 == 0 else MAP.replace(old, new, 1).encode())
        used += check(run_tool("collect_runs", path, "--columns", columns, "-o", out), out)
        out.unlink(missing_ok=True)
    assert 2 < used < 60


def test_damaged_sweeps(sweep, tmp_path):
    """Files of run directories and of sample folders, as bytes and as JSON lines with a value that is not theirs."""
    out, used = tmp_path / "runs.csv", 0
    run = tmp_path / "runs" / "s-seed0"
    shutil.copytree(sweep / "s-seed0", run)
    for seed in range(24):
        rng = random.Random(seed)
        path = rng.choice([run / "evaluations.jsonl", run / "evaluations.jsonl", run / "environment.json"])
        whole = path.read_bytes()
        value = re.search(rb": ([^,{}]+)", whole[rng.randrange(len(whole) // 2) :])
        wrong = rng.choice([b"null", b"[]", b"{}", b"1e999", b"NaN", b"-1", b"9" * 400, b'"x"', b"true", b'"\\u0000"'])
        swapped = whole.replace(b": " + value[1], b": " + wrong, 1) if value else whole
        path.write_bytes(swapped if seed % 2 else damaged(whole, rng))
        used += check(run_tool("collect_runs", tmp_path / "runs", "-o", out), out)
        path.write_bytes(whole)
        out.unlink(missing_ok=True)
    assert 2 < used < 22


@pytest.mark.parametrize("seed", range(6))
def test_damaged_tables_are_fitted_and_drawn_or_refused(table, tmp_path, seed):
    """With all figures: what a law cannot be fitted to is refused in the report, which is whole."""
    path, out = tmp_path / "runs.csv", tmp_path / "report"
    lines = table.decode().splitlines()
    rng, header = random.Random(seed), lines[0].split(",")
    for _ in range(2):  # one value of a run, a size, a metric or of the compute, everywhere
        name = rng.choice(["run", "size", "train_flops", "value", "step", "parameters", "metric"])
        column, old = header.index(name), rng.choice(lines[1:]).split(",")[header.index(name)]
        numbers = ["1e-30", "1e30", "1e15", "0", "-1", ""]
        new = rng.choice(numbers if name in ("train_flops", "value", "step", "parameters") else HOSTILE[18:35])
        for number, line in enumerate(lines):
            cells = line.split(",")
            if len(cells) == len(header) and cells[column] == old and number:
                lines[number] = ",".join([*cells[:column], new, *cells[column + 1 :]])
    path.write_text("\n".join(lines) + "\n")
    done = run_tool("fit_scaling", path, "--law", "power", "--resamples", 20, "--extrapolate", "-o", out)
    if done.returncode == 0 or "refused (" in done.stderr:
        assert (out / "report.html").is_file() and (out / "fit.json").is_file() and len(done.stderr) < LONGEST_ERROR
    else:
        check(done, out)

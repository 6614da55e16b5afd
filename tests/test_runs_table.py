"""The schema of the runs table, and tables that others have made, damaged or meant to do harm."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.rows.files import read_table
from fitscale.scaling.rows.table import LARGEST_COUNT, key_columns, validate
from tests.programs import run_tool

TABLE = """run,size,batch,train_flops,metric,value,key_sampler
a,s,64,1e15,fd,40.5,euler
b,l,64,2e15,fd,30.25,euler
"""


def test_schema_is_checked():
    with pytest.raises(UserError, match="unknown columns fid"):
        validate(pd.DataFrame({"run": ["a"], "fid": [1.0]}))
    with pytest.raises(UserError, match="columns size, train_flops"):
        validate(pd.DataFrame({"run": ["a"], "metric": ["fd"], "value": [1.0]}))
    whole = {"run": ["a"], "size": ["s"], "train_flops": [1.0], "metric": ["fd"], "value": ["many"]}
    with pytest.raises(UserError, match=r"row 0, column value: 'many' is not a number .* \(the metric\)"):
        validate(pd.DataFrame(whole))
    assert key_columns(validate(pd.DataFrame({**whole, "value": [1], "key_b": ["x"], "key_a": [1]}))) == [
        "key_a",
        "key_b",
    ]


def edited(old, new):
    assert old in TABLE
    return TABLE.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edited("64,1e15", "inf,1e15"), "line 2, column batch: 'inf' is not a whole number from 0 to"),
        (edited("64,2e15", "3.5,2e15"), "line 3, column batch: '3.5' is not a whole number"),
        (edited("64,1e15", "-64,1e15"), "line 2, column batch: '-64' is not a whole number"),
        (edited("64,1e15", f"{LARGEST_COUNT + 2},1e15"), "line 2, column batch: '9007199254740994' is not a whole"),
        (edited("1e15", "1e999"), "line 2, column train_flops: '1e999' is not a number (0, or of a size from 1e-30"),
        (edited("1e15", "9" * 5000), f"column train_flops: '{'9' * 59}... is not a number"),
        (edited("30.25", "1e-320"), "line 3, column value: '1e-320' is not a number"),
        (edited("30.25", "30,25"), "line 3: 8 cells, where the header has 7 columns"),
        (edited("30.25", "1_000"), "line 3, column value: '1_000' is not a number"),
        (edited(",30.25,euler", ""), "line 3: 5 cells, where the header has 7 columns"),
        (edited("a,s,", "a,\x1b[31m,"), r"line 2, column size: '\x1b[31m' is not printable text of at most 250"),
        (edited("a,s,", f"a,{'s' * 300},"), f"line 2, column size: '{'s' * 59}... is not printable text"),
        (edited("a,s,", '"a\nb",s,'), r"line 3, column run: 'a\nb' is not printable text"),
        (edited("run,size", "run,run"), "line 1: more than one column is named run; keep one of each name"),
        (edited("key_sampler", "value"), "line 1: more than one column is named value"),
        (edited("batch", "fid"), "unknown columns fid; valid: run, family"),
        (edited(",batch", ","), "column 3 is named ''; a name is printable text"),
        (edited("value", "paper_flops"), "columns value are missing"),
        (edited("a,s,", "a,\0,"), "line 2: byte 0x00 is not text in UTF-8; save the file as UTF-8"),
        (TABLE.encode("utf-16"), "line 1: byte 0x00 is not text in UTF-8"),
        (edited("a,s,", "a,é,").decode().encode("latin-1"), "line 2: byte 0xe9 is not text in UTF-8"),
        (TABLE.replace(",", ";").encode(), "columns are separated by semicolons; save it with commas and decimal"),
        (TABLE.replace(",", "\t").encode(), "columns are separated by tabs"),
        (edited("a,s,", 'a,"s"x,'), "line 2: not CSV: "),
        (edited("a,s,", 'a,"s,'), "not CSV: unexpected end of data"),
        (edited("a,s,", f"a,{'s' * 200_000},"), "line 2: not CSV: field larger than field limit"),
        (",".join(f"key_{n}" for n in range(10**6)).encode(), "line 1: 1000000 columns; at most 1000 are read"),
        (b"", "line 1: no names of columns"),
        (b"PAR1" + bytes(100), "is not text in UTF-8"),
    ],
)
def test_a_damaged_csv_is_refused_by_line_and_column(tmp_path, data, message):
    path = tmp_path / "runs.csv"
    path.write_bytes(data)
    done = run_tool("collect_runs", path, "-o", tmp_path / "out.csv")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 1200 and not (tmp_path / "out.csv").exists()


def test_a_spreadsheets_byte_order_mark_and_line_ends_are_read_and_no_rows_are_a_table(tmp_path):
    for name, data in {
        "plain": TABLE.encode(),
        "bom": b"\xef\xbb\xbf" + TABLE.encode(),
        "dos": TABLE.replace("\n", "\r\n").encode(),
    }.items():
        (tmp_path / f"{name}.csv").write_bytes(data)
        pd.testing.assert_frame_equal(read_table(tmp_path / f"{name}.csv"), read_table(tmp_path / "plain.csv"))
    (tmp_path / "empty.csv").write_text(TABLE.splitlines()[0])
    assert read_table(tmp_path / "empty.csv").empty
    done = run_tool("fit_scaling", tmp_path / "empty.csv", "-o", tmp_path / "report")
    assert done.returncode == 2 and "no row has metric fd; the table holds: none" in done.stderr


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"size": [["s"]]}, "columns size hold neither numbers nor text"),
        ({"batch": [True]}, "columns batch hold neither numbers nor text"),
        ({"batch": [float("inf")]}, "row 0, column batch: inf is not a whole number"),
        ({"value": ["x"]}, "row 0, column value: 'x' is not a number"),
        ({f"key_{n}": ["x"] for n in range(1000)}, "1005 columns; at most 1000 are read"),
    ],
)
def test_a_parquet_file_of_other_kinds_is_refused(tmp_path, columns, message):
    whole = {"run": ["a"], "size": ["s"], "train_flops": [1e15], "metric": ["fd"], "value": [1.0]} | columns
    pa.parquet.write_table(pa.table(whole), tmp_path / "runs.parquet")
    done = run_tool("collect_runs", tmp_path / "runs.parquet", "--check")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done


def test_a_parquet_file_that_is_small_and_holds_much_is_refused_unread(tmp_path):
    columns = dict.fromkeys(("run", "size", "metric", "value", "batch", "status"), pa.nulls(2 * 10**7))
    pa.parquet.write_table(pa.table(columns), tmp_path / "b.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    assert (tmp_path / "b.parquet").stat().st_size < 10**6
    with pytest.raises(UserError, match="cells; at most 100000000 are read"):
        read_table(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable parquet file"):
        read_table(tmp_path / "cut.parquet")


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "none.csv", tmp_path / "folder.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            read_table(path)
    with pytest.raises(UserError, match=r"cannot be read \(embedded null byte\)"):
        read_table(tmp_path / "a\0.csv")

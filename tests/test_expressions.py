"""Expressions over columns: what they compute, and what they never reach."""

import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.rows.expressions import VALID, numbers_of, truth_of

CELLS = pd.DataFrame(
    {"C": ["6e15", "12", None], "N": ["1e6", "2", "3"], "model": ["S/2", "B/2", None], "eval/fd": ["1.5", "2", "4"]},
    dtype="string",
    index=pd.Index([2, 3, 4], name="line"),
)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C / (6 * N)", [1e9, 1, None]),
        ("`eval/fd` * 1e6", [1.5e6, 2e6, 4e6]),
        ("-N ** 2 + +1.5", [-1e12 + 1.5, -2.5, -7.5]),
        ("log10(N) + sqrt(4) - abs(-1)", [7, 1.3010299956639813, 1.4771212547196624]),
        ("1.0e6", [1e6] * 3),
        ("N % 2 + N // 2", [5e5, 1, 2]),
    ],
)
def test_numbers(text, expected):
    found = numbers_of(text, CELLS, "t.csv", "images")
    assert [None if pd.isna(value) else value for value in found] == [
        None if value is None else pytest.approx(value, rel=1e-14) for value in expected
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model == 'S/2'", [True, False, False]),
        ("model != 'S/2'", [False, True, True]),
        ("model in ['S/2', \"B/2\"] and N > 2", [True, False, False]),
        ("N in [2, 3.0]", [False, True, True]),
        ("not (N >= 2 and N < 1e3) or model == 'B/2'", [True, True, False]),
        ("(N == 2) | (`eval/fd` == 4)", [False, True, True]),
        ("C > 0", [True, True, False]),
    ],
)
def test_conditions(text, expected):
    assert list(truth_of(text, CELLS, "t.csv", "where")) == expected


def test_sums_of_many_terms_are_computed_and_deeper_trees_refused():
    rows = pd.DataFrame({"N": [1.0, 2.0]})
    assert numbers_of("+".join(["N"] * 40), rows, "table.csv", "images").tolist() == [40.0, 80.0]
    with pytest.raises(UserError, match=r"images: .* is nested more than 50 levels deep"):
        numbers_of("+".join(["N"] * 60), rows, "table.csv", "images")


@pytest.mark.parametrize(
    "text",
    [
        *("N.__class__", "N.values", "(1).real", "`N`.size", "@N", "N @ N", "N[0]", "N[N > 1]", "[N for N in N]"),
        *("__import__('os')", "eval('1')", "open('x')", "N.to_csv('x')", "exec('1')", "print(N)", "(lambda: 1)()"),
        *(
            "log(N, N)",
            "log(x=N)",
            "log(*N)",
            "log",
            "sum(N)",
            "f'{N}'",
            "'x' * 9",
            "b'x'",
            "1j",
            "True",
            "None",
            "...",
        ),
        *("N if N else N", "N := 1", "N; N", "N\nN", "import os", "lambda: N", "{N: 1}", "{1, 2}", "yield", "await N"),
        *("N == 1", "not N", "", " ", "(" * 400, "-" * 450 + "N", "N+" * 300 + "N", "`C", "'", "N is N", "9" * 400),
        *("9**9**9**9", "1 / 0", "0 ** -1", "'a' + model", "model * 2", "unknown + 1", "`un known` + 1", "_quoted_0_"),
    ],
)
def test_what_is_no_number_is_one_message(text):
    with pytest.raises(UserError) as refused:
        numbers_of(text, CELLS, "t.csv", "images")
    said = str(refused.value)
    assert said.startswith("t.csv: ") and "\n" not in said and len(said) < 700
    assert any(
        what in said
        for what in (VALID, "it has: C, N", "is not a number", "cannot be computed", "longer than", "levels deep")
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "N",
            "1",
            "N + 1",
            "1 < N < 3",
            "model < 'x'",
            "model in 'S/2'",
            "model in N",
            "model in [N]",
            "N in ['x', 1]",
        ),
        *("'a' == 'a'", "model is None", "model == model", "model == 1", "N and N", "model.str == 'x'", "any(N == 1)"),
    ],
)
def test_what_is_no_condition_is_one_message(text):
    with pytest.raises(UserError, match=r"^t\.csv: ") as refused:
        truth_of(text, CELLS, "t.csv", "where")
    assert "\n" not in str(refused.value)


def test_texts_are_compared_and_never_evaluated():
    cells = pd.DataFrame({"c0": ["@c0", "`x`", "1"], "__class__": ["1", "2", "3"]}, dtype="string")
    assert list(truth_of("c0 in ['@c0', '`x`']", cells, "t", "where")) == [True, True, False]
    assert list(numbers_of("`__class__` + __class__", cells, "t", "n")) == [2, 4, 6]
    with pytest.raises(UserError, match="is neither a column nor an expression"):
        numbers_of("@c0 + 1", cells, "t", "n")

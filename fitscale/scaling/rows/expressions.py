"""Expressions over the columns of a table, written by anybody: checked part by part, then computed by pandas.

    C / (6 * N)          `params (M)` * 1e6          role != "other" and step >= 50000          model in ["S/2", "B/2"]

1. Python's parser makes a tree; only the parts named in `VALID` may stand in it.
2. Columns, texts and lists become variables c0, c1 ..., and numbers floats, so no text from outside is evaluated.
3. `pandas.eval` computes what is left: variables, floats and operators.
"""

import ast
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.rows.refusals import listed, shown
from fitscale.scaling.rows.table import numbers, refuse

LONGEST = 500  # characters; deeper trees than fit into them would stop the parser
DEEPEST = 50  # levels of the tree; pandas takes several calls for each
FUNCTIONS = ("abs", "sqrt", "exp", "log", "log10", "floor", "ceil")
VALID = (
    "columns (`like this` where the name is no word), numbers, 'texts', + - * / // % **, == != < <= > >=, "
    f"in [...], and, or, not, and {', '.join(FUNCTIONS)} of one argument"
)
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
SAME = (ast.Eq, ast.NotEq)
MEMBER = (ast.In, ast.NotIn)


def numbers_of(text: str, source: pd.DataFrame, table: str, name: str) -> pd.Series:
    """The number that `text` makes of every row of `source`; NaN where a cell that it needs is missing.

    Raises:
        UserError: it is no expression of numbers, names a column that is not there, or meets a cell that is no number.
    """
    reader = _Reader(text, source, table, name)
    return reader.computed(reader.number(reader.tree)).astype(float)


def truth_of(text: str, source: pd.DataFrame, table: str, name: str) -> pd.Series:
    """Whether `text` holds in every row of `source`; a missing cell is unequal to everything.

    Raises:
        UserError: as `numbers_of`, or it is no condition.
    """
    reader = _Reader(text, source, table, name)
    return reader.computed(reader.truth(reader.tree)).astype(bool)


@dataclass
class _Reader:
    """Rewrites one expression, and holds what its variables stand for; messages begin with `table` and `name`."""

    text: str
    source: pd.DataFrame
    table: str
    name: str
    variables: dict[str, Any] = field(default_factory=dict)
    quoted: dict[str, str] = field(default_factory=dict)  # stand-in: column in backticks

    @property
    def tree(self) -> ast.expr:
        if len(self.text) > LONGEST:
            raise self._error(f"is longer than {LONGEST} characters")
        try:
            with warnings.catch_warnings(action="ignore"):  # of the parser, about style
                tree = ast.parse(QUOTED.sub(self._stand_in, self.text).strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise self._error(f"is neither a column nor an expression; valid: {VALID}") from error
        level: list[ast.AST] = [tree]
        for _ in range(DEEPEST):
            level = [part for node in level for part in ast.iter_child_nodes(node)]
        if level:
            raise self._error(f"is nested more than {DEEPEST} levels deep; compute a column of its own first")
        return tree

    def number(self, node: ast.expr) -> ast.expr:
        """`node` with its parts rewritten, if it makes numbers."""
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < 1e300:
                return ast.Constant(float(value))
            case ast.Name(id=name):
                return self._variable(self._numeric(name))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign):
                return ast.UnaryOp(sign, self.number(node.operand))
            case ast.BinOp() if isinstance(node.op, ARITHMETIC):
                return ast.BinOp(self.number(node.left), node.op, self.number(node.right))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
                return ast.Call(ast.Name(name), [self.number(argument)], [])
        raise self._unfit(node, "a number")

    def truth(self, node: ast.expr) -> ast.expr:
        """`node` with its parts rewritten, if it is a condition."""
        match node:
            case ast.BoolOp():
                return ast.BoolOp(node.op, [self.truth(part) for part in node.values])
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                word = ast.And() if isinstance(node.op, ast.BitAnd) else ast.Or()
                return ast.BoolOp(word, [self.truth(node.left), self.truth(node.right)])
            case ast.UnaryOp(op=ast.Not() | ast.Invert()):
                return ast.UnaryOp(ast.Not(), self.truth(node.operand))
            case ast.Compare(ops=[op], comparators=[right]):
                return self._comparison(node, op, right)
        raise self._unfit(node, "a condition (two sides, and one sign of comparison between them)")

    def computed(self, tree: ast.expr) -> pd.Series:
        try:
            with np.errstate(all="ignore"):  # what overflows or divides by 0 is refused as a cell
                found = pd.eval(
                    ast.unparse(ast.fix_missing_locations(tree)),
                    engine="python",
                    parser="pandas",
                    local_dict=self.variables,
                    global_dict={},
                )
        except (ArithmeticError, TypeError, ValueError, NotImplementedError) as error:
            raise self._error(f"cannot be computed ({shown(str(error))})") from error
        return found if isinstance(found, pd.Series) else pd.Series(found, self.source.index)

    def _comparison(self, node: ast.Compare, op: ast.cmpop, right: ast.expr) -> ast.expr:
        if isinstance(op, MEMBER):
            if not isinstance(right, ast.List | ast.Tuple):
                raise self._unfit(right, "a list")
            items = right.elts
        elif isinstance(op, ORDER + SAME):
            items = [right]
        else:
            raise self._unfit(node, "a condition")
        texts = [part.value for part in items if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if texts and len(texts) == len(items) and not isinstance(op, ORDER) and isinstance(node.left, ast.Name):
            cells = self._cells(node.left.id).astype(object)
            return ast.Compare(
                self._variable(cells.where(cells.notna(), None).map(lambda cell: cell if cell is None else str(cell))),
                [op],
                [self._variable(texts if isinstance(op, MEMBER) else texts[0])],
            )
        rewritten = [self.number(part) for part in items]
        if isinstance(op, MEMBER):
            if not all(isinstance(part, ast.Constant) for part in rewritten):
                raise self._unfit(right, "a list of numbers or of texts")
            return ast.Compare(self.number(node.left), [op], [ast.List(rewritten)])
        return ast.Compare(self.number(node.left), [op], rewritten)

    def _variable(self, value: Any) -> ast.expr:
        name = f"c{len(self.variables)}"
        self.variables[name] = value
        return ast.Name(name)

    def _numeric(self, name: str) -> pd.Series:
        cells = self._cells(name)
        found = numbers(cells)
        refuse(cells, (found.isna() & cells.notna()).to_numpy(dtype=bool), "a number", self.table)
        return found

    def _cells(self, name: str) -> pd.Series:
        name = self.quoted.get(name, name)
        if name not in self.source.columns:
            what = f"{self.table}: no column {shown(self.text)} for {self.name}"
            within = "" if name == self.text else f"; as an expression it names {shown(name)}"
            raise UserError(f"{what}; it has: {listed(list(self.source.columns), 20)}{within}")
        return self.source[name]

    def _stand_in(self, match: re.Match[str]) -> str:
        if not match[0].startswith("`"):
            return match[0]
        name = f"_quoted_{len(self.quoted)}_"
        self.quoted[name] = match[0][1:-1]
        return f" {name} "

    def _unfit(self, node: ast.AST, wanted: str) -> UserError:
        return self._error(f"holds {shown(ast.unparse(node))}, which is not {wanted}; valid: {VALID}")

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.table}: {self.name}: {shown(self.text)} {what}")

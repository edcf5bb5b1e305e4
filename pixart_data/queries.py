"""Subsets by query: a condition on the columns of an index, such as `bucket in ("1.00", "0.75") and aesthetic > 5.5`.

The language is a strict part of Python's: comparisons, `and`, `or`, `not`, `in`, `+ - * /`, `min`, `max`, `abs`, column
names, numbers, texts in quotes, True and False. Nothing else is understood, so nothing else can happen. Conditions are
evaluated on whole columns. A value that is missing makes a comparison neither true nor false, as in SQL, and a row
matches where the condition is true.
"""

import ast
import difflib
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.errors import ConfigError

_MAX_CHARACTERS = 20_000
_ASSIGNMENT = re.compile(r"(?<![=!<>])=(?!=)")
_KINDS = {"number": "numbers", "text": "texts", "truth value": "true and false"}
_KNOWN = "comparisons, and, or, not, in, + - * /, min, max, abs, column names, numbers and quoted texts"
_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[..., Any]]] = {
    ast.Eq: ("==", pc.equal),
    ast.NotEq: ("!=", pc.not_equal),
    ast.Lt: ("<", pc.less),
    ast.LtE: ("<=", pc.less_equal),
    ast.Gt: (">", pc.greater),
    ast.GtE: (">=", pc.greater_equal),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, Callable[..., Any]]] = {
    ast.Add: ("+", pc.add_checked),
    ast.Sub: ("-", pc.subtract_checked),
    ast.Mult: ("*", pc.multiply_checked),
    ast.Div: ("/", lambda a, b: pc.divide(a.cast(pa.float64()), b.cast(pa.float64()))),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": functools.partial(pc.min_element_wise, skip_nulls=False),
    "max": functools.partial(pc.max_element_wise, skip_nulls=False),
    "abs": pc.abs_checked,
}


@dataclass(frozen=True)
class Query:
    """A condition on the rows of a table. `parse` makes one.

    Attributes:
        text: As it was written.
        columns: The columns that it names.
    """

    text: str
    columns: set[str]
    _tree: ast.expr = field(repr=False, compare=False)

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which rows of a table match; (rows,).

        Raises:
            ConfigError: If the table lacks a column, or its values cannot be compared so.
        """
        self.require(table.schema.names)
        try:
            kind, found = _Evaluation(self.text, table).value(self._tree)
        except RecursionError as error:
            raise _too_deep(self.text) from error
        except pa.ArrowInvalid as error:
            raise ConfigError(f"query `{self.text}`: cannot be computed: {error}; use smaller numbers") from error
        if kind != "truth value":
            raise _wrong(self.text, f"expected a condition, found a {kind}; compare it, e.g. `{self.text} > 0`")
        matches: npt.NDArray[np.bool_] = pc.fill_null(found, False).to_numpy()
        return matches

    def require(self, names: Iterable[str], elsewhere: Callable[[str], str] = lambda name: "") -> None:
        """Check that these columns are all that the query names.

        Args:
            elsewhere: Says of a column that is not among them how to name one of another table, if that is possible.

        Raises:
            ConfigError: Naming a column that is not among them.
        """
        there = list(names)
        for name in sorted(self.columns - set(there)):
            close = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
            what = f"did you mean {close[0]}?" if close else "name another;"
            advice = elsewhere(name)
            listed = ", ".join(sorted(there)) + (f"; {advice}" if advice else "")
            raise _wrong(self.text, f"no column {name}; {what} there are {listed}")


def parse(text: str) -> Query:
    """Read a query.

    Raises:
        ConfigError: If it is not in the language, naming the part that is not.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"query: expected at most {_MAX_CHARACTERS:,} characters, found {len(text):,}; shorten it")
    try:
        tree = ast.parse(text.strip().replace("\n", " "), mode="eval").body
        columns = _columns(text, tree)
    except SyntaxError as error:
        what = "write == to compare" if _ASSIGNMENT.search(text) else f"known: {_KNOWN}"
        raise _wrong(
            text, f"expected a condition, found {error.msg} at character {error.offset or 0}; {what}"
        ) from error
    except (RecursionError, MemoryError) as error:
        raise _too_deep(text) from error
    if not columns:
        raise _wrong(text, "expected the name of a column, found none; texts stand in quotes, columns do not")
    return Query(text.strip(), columns, tree)


def _columns(text: str, tree: ast.expr) -> set[str]:
    """Return the names of columns in a tree, which must be of the language."""
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    nodes = [node for node in ast.walk(tree) if not isinstance(node, ast.expr_context)]
    for node in nodes:
        if not isinstance(node, _NODES):
            raise _wrong(text, f"{ast.unparse(node)} is not understood; known: {_KNOWN}")
        check = _CHECKS.get(type(node))
        if check is not None:
            check(text, node)
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in functions}


def _check_call(text: str, node: ast.Call) -> None:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in _FUNCTIONS:
        raise _wrong(text, f"{name}() is not known; there are min, max and abs")
    expected = "one value" if name == "abs" else "at least two values"
    if node.keywords or (len(node.args) != 1 if name == "abs" else len(node.args) < 2):
        raise _wrong(text, f"{name}: expected {expected}, found {ast.unparse(node)}")


def _check_compare(text: str, node: ast.Compare) -> None:
    for operator, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(operator, ast.Is | ast.IsNot):
            raise _wrong(text, f"{ast.unparse(node)} is not understood; compare with ==")
        values = right.elts if isinstance(right, ast.Tuple | ast.List) else []
        if isinstance(operator, ast.In | ast.NotIn) != bool(values):
            raise _wrong(text, f'{ast.unparse(node)}: expected a list after in, and there only, e.g. ("1.00", "0.75")')
        if not all(_is_constant(item) for item in values):
            raise _wrong(text, f"{ast.unparse(right)}: expected numbers and texts alone; write `a == b or a == c`")


def _check_constant(text: str, node: ast.Constant) -> None:
    if not isinstance(node.value, bool | int | float | str):
        raise _wrong(text, f"{ast.unparse(node)}: expected a number or a text in quotes; known: {_KNOWN}")
    if isinstance(node.value, int) and abs(node.value) >= 1 << 63:
        raise _wrong(text, f"{node.value}: expected a number of 64 bits; write it with a point")


def _check_operator(text: str, node: ast.BinOp) -> None:
    if type(node.op) not in _ARITHMETIC:
        hint = "write and, or" if isinstance(node.op, ast.BitAnd | ast.BitOr) else f"known: {_KNOWN}"
        raise _wrong(text, f"{ast.unparse(node)} is not understood; {hint}")


def _check_unary(text: str, node: ast.UnaryOp) -> None:
    if not isinstance(node.op, ast.Not | ast.USub):
        hint = "write not" if isinstance(node.op, ast.Invert) else f"known: {_KNOWN}"
        raise _wrong(text, f"{ast.unparse(node)} is not understood; {hint}")


_NODES = (
    ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Tuple, ast.List,
    ast.boolop, ast.unaryop, ast.operator, ast.cmpop,
)  # fmt: skip
_CHECKS: dict[type[ast.AST], Callable[..., None]] = {
    ast.Call: _check_call,
    ast.Compare: _check_compare,
    ast.Constant: _check_constant,
    ast.BinOp: _check_operator,
    ast.UnaryOp: _check_unary,
}


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


class _Evaluation:
    """A query on one table: values are pairs of their kind and the column or scalar."""

    def __init__(self, text: str, table: pa.Table) -> None:
        self.text, self.table = text, table

    def value(self, node: ast.expr) -> tuple[str, Any]:
        evaluators: dict[type[Any], Callable[[Any], tuple[str, Any]]] = {
            ast.BoolOp: self._bool,
            ast.UnaryOp: self._unary,
            ast.BinOp: self._arithmetic,
            ast.Compare: self._compare,
            ast.Call: self._call,
            ast.Name: self._name,
            ast.Constant: self._constant,
        }
        if type(node) not in evaluators:
            raise _wrong(self.text, f"{ast.unparse(node)}: a list stands after in only")
        return evaluators[type(node)](node)

    def _bool(self, node: ast.BoolOp) -> tuple[str, Any]:
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        return "truth value", functools.reduce(join, [self._of_kind("truth value", part, node) for part in node.values])

    def _unary(self, node: ast.UnaryOp) -> tuple[str, Any]:
        if isinstance(node.op, ast.Not):
            return "truth value", pc.invert(self._of_kind("truth value", node.operand, node))
        return "number", pc.negate_checked(self._of_kind("number", node.operand, node))

    def _arithmetic(self, node: ast.BinOp) -> tuple[str, Any]:
        left, right = (self._of_kind("number", part, node) for part in (node.left, node.right))
        return "number", _ARITHMETIC[type(node.op)][1](left, right)

    def _call(self, node: ast.Call) -> tuple[str, Any]:
        values = [self._of_kind("number", part, node) for part in node.args]
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return "number", _FUNCTIONS[name](*values)

    def _compare(self, node: ast.Compare) -> tuple[str, Any]:
        parts = [node.left, *node.comparators]
        found = [self._pair(*pair) for pair in zip(parts, node.ops, parts[1:], strict=False)]
        return "truth value", functools.reduce(pc.and_kleene, found)

    def _pair(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(right, ast.Tuple | ast.List):
            within = functools.reduce(pc.or_kleene, [self._pair(left, ast.Eq(), item) for item in right.elts])
            return within if isinstance(operator, ast.In) else pc.invert(within)
        sign, compare = _COMPARISONS[type(operator)]
        (kind, one), (other_kind, other) = self.value(left), self.value(right)
        if kind != other_kind:
            written = f"{ast.unparse(left)} {sign} {ast.unparse(right)}"
            hint = "texts stand in quotes, numbers do not" if {kind, other_kind} == {"text", "number"} else "mend it"
            raise _wrong(self.text, f"{written}: expected two of a kind, found a {kind} and a {other_kind}; {hint}")
        return compare(one, other)

    def _name(self, node: ast.Name) -> tuple[str, Any]:
        column = self.table[node.id]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return "text", column.cast(pa.large_string())
        if pa.types.is_boolean(column.type):
            return "truth value", column
        if pa.types.is_integer(column.type) and column.type != pa.uint64():
            return "number", column.cast(pa.int64())
        if pa.types.is_floating(column.type) or column.type == pa.uint64():
            return "number", column.cast(pa.float64(), safe=False)
        kinds = ", ".join(_KINDS.values())
        raise _wrong(self.text, f"column {node.id}: expected {kinds}, found {column.type}; name another column")

    def _constant(self, node: ast.Constant) -> tuple[str, Any]:
        if isinstance(node.value, bool):
            return "truth value", pa.scalar(node.value)
        if isinstance(node.value, str):
            return "text", pa.scalar(node.value, pa.large_string())
        return "number", pa.scalar(node.value)

    def _of_kind(self, wanted: str, node: ast.expr, inside: ast.expr) -> Any:
        kind, value = self.value(node)
        if kind != wanted:
            where = f"{ast.unparse(node)} in `{ast.unparse(inside)}`"
            raise _wrong(self.text, f"{where}: expected a {wanted}, found a {kind}; compare it, or name another column")
        return value


def _too_deep(text: str) -> ConfigError:
    return ConfigError(f"query `{text.strip()[:60]} ...`: expected fewer parts in each other; shorten it")


def _wrong(text: str, what: str) -> ConfigError:
    return ConfigError(f"query `{text.strip()}`: {what}")

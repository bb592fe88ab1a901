"""Reads nanoGPT's Python config files without running them.

nanoGPT executes such a file; we fold it with `ast`, so a config can set values and do nothing else. Folded are
literals, arithmetic on numbers, joined strings, names given a value earlier in the file, str() int() float(), and
time.time(), the one call nanoGPT's own files make. Imports and docstrings are skipped. The rest is an error.
"""

import ast
import difflib
import io
import logging
import operator
import time
import tokenize
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.files import read_small

log = logging.getLogger(__name__)
ALLOWED = (
    "NAME = VALUE, where VALUE is made of literals, + - * / // % ** on numbers, + on strings, "
    "names set above, str() int() float(), time.time()"
)
# A result beyond these is no setting but a slip or an attack: 9**9**9 would run for hours, s = s + s fill the memory.
MAX_BITS, MAX_CHARS = 256, 4096
MAX_FILE = 1 << 20  # bytes; nanoGPT's own configs have under 1,000

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CASTS = {"str": str, "int": int, "float": float}


class _Refused(Exception):
    """An expression or statement outside the language; `why` completes 'this line cannot be read: '."""

    def __init__(self, node: ast.expr | ast.stmt, why: str):
        super().__init__(why)
        self.node, self.why = node, why


def read(path: Path, known: Collection[str] | None = None) -> dict[str, tuple[Any, int]]:
    """{name: (value, line)} for every assignment in the file, a later one replacing an earlier.

    known: the settings there are; another name that a later assignment is made of is a helper, and left out.
    Values are bool, int, float, str or None. Raises ConfigError with file and line, OSError if it cannot be read.
    """
    data = read_small(path, MAX_FILE)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)  # a BOM and a coding line, as Python does
        source = io.StringIO(data.decode(encoding), newline=None).read()
        tree = ast.parse(source, filename=str(path))
    except (LookupError, UnicodeError) as error:  # rot13 is no text encoding; or these bytes are not in the one named
        raise ConfigError("the file is not text", where=str(path), expected="UTF-8", found=str(error)[:80]) from None
    except SyntaxError as error:
        where = f"{path}:{error.lineno or 1}"
        found = (error.text or "").strip()[:80]
        raise ConfigError(f"not valid Python: {error.msg}", where=where, expected=ALLOWED, found=found) from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nesting beyond the parser's stack
        raise ConfigError(
            f"not valid Python: {error or 'nested too deep'}", where=str(path), expected=ALLOWED
        ) from None

    names: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for statement in tree.body:
        try:
            for name, value in _assignments(statement, names):
                names[name], lines[name] = value, statement.lineno
        except _Refused as error:
            segment = ast.get_source_segment(source, error.node) or ""
            raise ConfigError(
                f"this line cannot be read: {error.why}",
                where=f"{path}:{error.node.lineno}",
                expected=ALLOWED,
                found=segment.partition("\n")[0][:80],
                hint="config files are read, never run: write the value itself, or give it as a flag",
            ) from None
        except RecursionError:
            raise ConfigError("nested too deep", where=f"{path}:{statement.lineno}", expected=ALLOWED) from None
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    helpers = names.keys() & used - set(names if known is None else known)
    for name in helpers:  # nanoGPT would say nothing: max_iter = 5000, lr_decay_iters = max_iter
        if near := difflib.get_close_matches(name, known or (), n=1, cutoff=0.85):
            log.warning(
                "%s:%d: %s is no setting but a helper of other lines; %s is one", path, lines[name], name, near[0]
            )
    return {name: (value, lines[name]) for name, value in names.items() if name not in helpers}


def _assignments(statement: ast.stmt, names: dict[str, Any]) -> list[tuple[str, Any]]:
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
            return []
        case ast.Assign(targets=targets, value=expression):
            pass
        case ast.AnnAssign(target=target, value=ast.expr() as expression):
            targets = [target]
        case _:
            raise _Refused(statement, "it is not an assignment")
    keys = []
    for target in targets:
        if not isinstance(target, ast.Name):
            raise _Refused(target, "only a plain name can be set")
        keys.append(target.id)
    value = _fold(expression, names)
    return [(key, value) for key in keys]


def _fold(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression of the little language, bounded in size."""
    try:
        value = _evaluate(node, names)
    except (ArithmeticError, ValueError) as error:  # 1 / 0, int("x"), 1e308 * 10 is inf and left to the range checks
        raise _Refused(node, str(error)) from None
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _Refused(node, f"a number of more than {MAX_BITS} bits")
    if isinstance(value, str) and len(value) > MAX_CHARS:
        raise _Refused(node, f"a string of more than {MAX_CHARS} characters")
    return value


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name):
            if name not in names:
                raise _Refused(node, f"{name!r} has no value above this line{did_you_mean(name, names)}")
            return names[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _number(operand, names)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _arithmetic(node, left, op, right, names)
        case ast.Call(func=ast.Name(id="str" | "int" | "float" as cast), args=[argument], keywords=[]):
            value = _fold(argument, names)
            if value is None and cast != "str":
                raise _Refused(node, f"{cast}() of None")
            return _CASTS[cast](value)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]):
            return time.time()
        case _:
            raise _Refused(node, "an expression that would have to be run")


def _arithmetic(node: ast.expr, left: ast.expr, op: ast.operator, right: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(op, ast.Add):
        a, b = _fold(left, names), _fold(right, names)
        if isinstance(a, str) and isinstance(b, str):
            return a + b
        if isinstance(a, str) or isinstance(b, str):
            raise _Refused(node, "text and a number do not add; use str()")
    a, b = _number(left, names), _number(right, names)
    if isinstance(op, ast.Pow):
        # Refused before it is computed: the result would have |a|'s bits times b.
        if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and a.bit_length() * b > 2 * MAX_BITS:
            raise _Refused(node, f"a number of more than {MAX_BITS} bits")
        if a < 0 and not float(b).is_integer():
            raise _Refused(node, "a root of a negative number")
    return _OPERATORS[type(op)](a, b)


def _number(node: ast.expr, names: dict[str, Any]) -> Any:
    value = _fold(node, names)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(node, "arithmetic needs a number")
    return value

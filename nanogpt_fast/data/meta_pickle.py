"""nanoGPT's meta.pkl without unpickling, which runs whatever code the file asks for.

`read_pickle` walks the opcodes and builds plain data alone. The few functions that numpy's scalars and Python's own
containers are pickled by are known by name and stood in for; any other name is refused.
"""

import pickle
import pickletools
import re
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_OPCODES = 4_000_000  # of a vocabulary of 800,000; bounds the memory of a file made of empty dicts
_NOTHING = {"PROTO", "FRAME"}
_VALUES = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_STORE = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_LOAD = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SCALAR = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_BUILTIN = {f"{module}.{kind.__name__}": kind for module in ("__builtin__", "builtins") for kind in (set, frozenset)}
_KNOWN = {"numpy.dtype", "_codecs.encode", "collections.OrderedDict", *_SCALAR, *_BUILTIN}
_PLAIN = (str, int, float, bytes, type(None))


@dataclass(frozen=True)
class _Named:
    """A function that the pickle names."""

    name: str


@dataclass
class _Dtype:
    """A numpy type on its way: its code, then (BUILD) its byte order."""

    code: str
    order: str = "="


def nanogpt_pickle(itos: list[str]) -> bytes:
    """The meta.pkl that nanoGPT's train.py and sample.py read for a character dataset."""
    stoi = {char: i for i, char in enumerate(itos)}
    return pickle.dumps({"vocab_size": len(itos), "itos": dict(enumerate(itos)), "stoi": stoi}, protocol=4)


def read_pickle(data: bytes) -> Any:
    """The value of a pickle of plain data: containers, strings, numbers (numpy's too). ValueError for any other."""
    try:
        return _read(data)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"not a well-formed pickle ({error})") from error


def _read(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def marked() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        if count >= MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES:,} opcodes")
        name = opcode.name
        if name in _NOTHING:
            continue
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _STORE:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in _LOAD:
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP_MARK":
            marked()
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("APPEND", "APPENDS"):
            items = marked() if name == "APPENDS" else [stack.pop()]
            _instance(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = marked() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            _instance(stack[-1], dict).update(_pairs(items))
        elif name == "ADDITEMS":
            items = marked()
            _instance(stack[-1], set).update(map(_key, items))
        elif name == "FROZENSET":
            stack.append(frozenset(map(_key, marked())))
        elif name == "LIST":
            stack.append(marked())
        elif name == "DICT":
            stack.append(_pairs(marked()))
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in _TUPLES:
            items = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(tuple(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = _instance(argument, str).split(" ") if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            dotted = ".".join(_instance(word, str) for word in words)
            if dotted not in _KNOWN:
                raise ValueError(f"opcode {name} at byte {position} names {dotted[:80]!r}: only plain data are read")
            stack.append(_Named(dotted))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_stand_in(_instance(stack.pop(), _Named).name, _instance(arguments, tuple)))
        elif name == "BUILD":
            state = _instance(stack.pop(), tuple)
            _instance(stack[-1], _Dtype).order = _instance(state[1], str)
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"opcode {name} at byte {position}: only plain data are read")
    raise ValueError("the pickle has no end")


def _stand_in(name: str, arguments: tuple[Any, ...]) -> Any:
    """What the function of this name makes of its arguments."""
    if name == "numpy.dtype":
        code = _instance(arguments[0], str)
        if not re.fullmatch(r"[biufU]\d{1,4}", code):
            raise ValueError(f"a numpy value of type {code[:20]!r}: only numbers and strings are read")
        return _Dtype(code)
    if name in _SCALAR:
        dtype, held = _instance(arguments[0], _Dtype), _instance(arguments[1], bytes)
        return np.frombuffer(held, dtype.order.replace("|", "=") + dtype.code, count=1)[0].item()
    if name == "_codecs.encode":
        return _instance(arguments[0], str).encode("latin-1")
    if name in _BUILTIN:
        return _BUILTIN[name](map(_key, arguments[0] if arguments else ()))
    return _pairs([part for row in arguments[0] for part in row]) if arguments else {}  # an OrderedDict


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(value: Any) -> Any:
    """The value, where hashing it cannot recurse: Python ends at a tuple in a tuple a million deep."""
    if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(part, _PLAIN) for part in value)):
        return value
    raise ValueError(f"a key of type {type(value).__name__}")


def _instance(value: Any, wanted: type) -> Any:
    if isinstance(value, wanted):
        return value
    raise ValueError(f"not a well-formed pickle ({reprlib.repr(value)} where a {wanted.__name__} belongs)")

"""Can a 32-bit integer on the way to an address wrap? Interval arithmetic over a kernel's TTIR, for a given launch.

Program ids lie in the grid, integer arguments have the launch's values, make_range its bounds; every 32-bit sum,
difference and product that some pointer offset is made of must stay within int32. Intervals forget how values are
related, so the answer can be a false alarm, never a false peace; what is loaded from memory is unknown.
"""

import re

INT32 = (-(2**31), 2**31 - 1)
UNKNOWN = (-(2**63), 2**63 - 1)
PASSES = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.index_cast",
          "tt.unsplat")  # fmt: skip

LOOP = re.compile(r"scf\.for (%[\w.]+) = (%[\w.#]+) to (%[\w.#]+) step %[\w.#]+(?: iter_args\((.*?)\) ->)?")

Interval = tuple[int, int]


def wrapping_offsets(ttir: str, arguments: dict[str, int], grid: tuple[int, ...]) -> list[str]:
    """The operations (TTIR lines) that can wrap on the way to an address."""
    makers, wraps = _propagate(_plain_lines(ttir), arguments, grid)
    guilty: dict[str, None] = {}
    for offset in {v for line in makers.values() for v in re.findall(r"tt\.addptr \S+, (%[\w.#]+)", line)}:
        seen, todo = set(), [offset]
        while todo:
            name = todo.pop()
            if name in seen or name not in makers:
                continue
            seen.add(name)
            if name in wraps:
                guilty[makers[name]] = None
            todo += _operands(makers[name])
    return list(guilty)


def _plain_lines(ttir: str) -> list[str]:
    """Without source locations."""
    return [re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line).strip() for line in ttir.splitlines()]


def _operands(line: str) -> list[str]:
    return re.findall(r"%[\w.#]+", line.split(" = ", 1)[-1].split(" : ")[0])


def _full(kind: str) -> Interval:
    return INT32 if kind == "32" else UNKNOWN


def _propagate(lines: list[str], arguments: dict[str, int], grid: tuple[int, ...]) -> tuple[dict[str, str], set[str]]:
    """({integer or pointer: its defining line}, those whose 32-bit arithmetic can leave int32)."""
    ranges: dict[str, Interval] = {f"%{name}": (value, value) for name, value in arguments.items()}
    makers: dict[str, str] = {}
    wraps: set[str] = set()
    settled = False
    while not settled:  # until no loop carries anything new
        settled = True
        regions: list[tuple[str, list[str] | None]] = []  # enclosing (result, carried values; None: no loop)
        for line in lines:
            match = re.match(r"(%[\w.]+)(?::\d+)? = ", line)
            result = match[1] if match else ""
            loop = re.search(
                r"scf\.for (%[\w.]+) = (%[\w.#]+) to (%[\w.#]+) step %[\w.#]+(?: iter_args\((.*?)\) ->)?", line
            )
            if loop:
                index, start, end, carried = loop.groups()
                low, high = ranges.get(start, UNKNOWN)[0], ranges.get(end, UNKNOWN)[1]
                ranges[index], makers[index] = (low, max(low, high - 1)), f"{index} = loop {start} {end}"
                pairs = re.findall(r"(%[\w.]+) = (%[\w.#]+)", carried or "")
                for name, first in pairs:
                    ranges.setdefault(name, ranges.get(first, UNKNOWN))
                    makers.setdefault(name, f"{name} = carried {first}")
                regions.append((result, [name for name, _ in pairs]))
            elif line.endswith("{") and not line.startswith("}"):
                regions.append((result, None))
            elif line.startswith("}") and not line.endswith("{") and regions:
                regions.pop()
            elif line.startswith("scf.yield") and regions:
                result, carried = regions[-1]
                for i, value in enumerate(_operands(line)):
                    given = ranges.get(value, UNKNOWN)
                    if carried is not None:
                        first = ranges[carried[i]]
                        if not (first[0] <= given[0] and given[1] <= first[1]):
                            ranges[carried[i]], settled = UNKNOWN, False  # it moves from turn to turn
                        given = ranges[carried[i]]
                        makers[carried[i]] += f" {value}"
                    for name in (result, f"{result}#{i}"):
                        have = ranges.get(name, given)
                        ranges[name] = min(have[0], given[0]), max(have[1], given[1])
                        makers[name] = f"{makers.get(name, f'{name} = yielded')} {value}"
            elif "tt.addptr" in line:
                makers[result] = line
            elif result and (kind := re.search(r"(?:^|[ x<(])i(32|64)>?$", line)):
                makers[result], ranges[result] = line, _evaluate(line, ranges, kind[1], grid)
                if kind[1] == "32" and not (INT32[0] <= ranges[result][0] and ranges[result][1] <= INT32[1]):
                    ranges[result] = INT32
                    wraps.add(result)
    return makers, wraps


def _evaluate(line: str, ranges: dict[str, Interval], kind: str, grid: tuple[int, ...]) -> Interval:
    operation = line.split(" = ", 1)[1].split(" ")[0].split(",")[0]
    values = [ranges.get(name, _full(kind)) for name in _operands(line)]
    if operation == "arith.constant":
        number = re.search(r"constant (?:dense<)?(-?\d+)>? :", line)
        return (int(number[1]), int(number[1])) if number else _full(kind)
    if operation == "tt.make_range":
        end, start = (int(re.findall(rf"{word} = (\d+)", line)[0]) for word in ("end", "start"))
        return start, end - 1
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        axis = "xyz".index(re.findall(r"tt\.get_\w+ ([xyz])", line)[0])
        programs = grid[axis] if axis < len(grid) else 1
        return (0, programs - 1) if operation == "tt.get_program_id" else (programs, programs)
    if operation in PASSES and len(values) == 1:
        return values[0]
    if operation == "arith.trunci":
        return values[0]  # wraps unless it fits
    if operation == "arith.select":
        return min(v[0] for v in values[1:]), max(v[1] for v in values[1:])
    if operation == "arith.extui":
        return values[0] if values[0][0] >= 0 else (0, 2**32 - 1)
    if len(values) != 2:
        return _full(kind)
    (a, b), (c, d) = values
    corners = {
        "arith.addi": lambda: [a + c, b + d],
        "arith.subi": lambda: [a - d, b - c],
        "arith.muli": lambda: [a * c, a * d, b * c, b * d],
        "arith.minsi": lambda: [min(a, c), min(b, d)],
        "arith.maxsi": lambda: [max(a, c), max(b, d)],
        "arith.divsi": lambda: [_quotient(x, max(y, 1)) for x in (a, b) for y in (c, d)] if c >= 0 else _full(kind),
        "arith.divui": lambda: [x // max(y, 1) for x in (a, b) for y in (c, d)] if a >= 0 and c >= 0 else _full(kind),
        "arith.remsi": lambda: [0 if a >= 0 else -max(abs(c), abs(d)) + 1, min(b, max(abs(c), abs(d)) - 1)],
        "arith.remui": lambda: [0, min(b, d - 1)] if a >= 0 and c >= 1 else _full(kind),
        "arith.shli": lambda: [a << c, b << d, a << d, b << c] if c >= 0 and d < 64 else _full(kind),
        "arith.shrsi": lambda: [a >> c, b >> d, a >> d, b >> c] if c >= 0 and d < 64 else _full(kind),
        "arith.andi": lambda: [0, min(b, d)] if a >= 0 and c >= 0 else _full(kind),
    }
    found = corners.get(operation, lambda: _full(kind))()
    return min(found), max(found)


def _quotient(x: int, y: int) -> int:
    """x / y rounded towards zero, y > 0."""
    return x // y if x >= 0 else -(-x // y)

"""Seeded damage to bytes and to JSON, and the bounds that a reader of it keeps to."""

import json
import random
import sys

FEW, MANY = 40, 2000
GIB, SECONDS = 2**30, 10.0
NUMBERS = [0, 1, 2, 127, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]
ODD = [None, True, -1, 0, 1.5, 1e308, 10**12, 10**400, "x", "", "\ud800", "a" * 5000, [], {}, [[[]]], {"a": {}}]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, runs, numbers at the edge of their types, cuts, repeats."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(max(1, len(out)))
        width = min(rng.choice((1, 2, 4, 8)), max(1, len(out) - at))
        match rng.randrange(7):
            case 0:
                out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ 1 << rng.randrange(8)])
            case 1:
                out[at : at + width] = rng.randbytes(width)
            case 2:
                out[at : at + width] = (rng.choice(NUMBERS) & (256**width - 1)).to_bytes(width, "little")
            case 3:
                del out[at : at + rng.choice((1, 3, 100, len(out)))]
            case 4:
                out[at:at] = out[at : at + rng.choice((1, 4, 300))]
            case 5:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
            case _:
                other = rng.randrange(max(1, len(out)))
                out[at : at + 8], out[other : other + 8] = out[other : other + 8], out[at : at + 8]
    return bytes(out)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """A value, at any depth, replaced, removed or put under another name; or the text itself."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    value = json.loads(data)
    place = value
    while isinstance(place, dict) and place:
        key = rng.choice(list(place))
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        old = place.pop(key)
        if (kind := rng.randrange(4)) < 3:
            place[key if kind else rng.choice(list(place) or ["x"])] = rng.choice([*ODD, old])
        break
    return json.dumps(value).encode()


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Structured mutation of bytes, of JSON and of lines of text."""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Texts that dumps() replaces, quotes included, by what json.dumps cannot write.
DEEP, DIGITS = "@deep@", "@digits@"
ODD_TEXTS = (
    *("", " ", "x", "0", "1e999", "NaN", "null", "../x", "/etc/passwd", "a\\b", "%s{0}{}", "$\\frac{$", "é" * 3),
    *("\0", "a\nb", "\x1b[2J", "\x85", "\u2028", "\u202e", "\ud800", "x" * 100_000, "s3://b/k", "file:///etc/passwd"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64),
    *(10**10, 10**18, 10**400, 0.5, -0.0, 1e-320, 1e308, 1e39, float("nan"), float("inf"), float("-inf")),
    *([], {}, [[]], [None], [1, "x"], [[1], [2, 3]], [[[1.0]]], {"a": 1}, {"": {}}, DEEP, DIGITS, [DEEP]),
)
ODD_INTS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0xFFFF,
    0x10000,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
)


# --------------------------------------------------------------------------------------------------------- bytes


def _range(rng: random.Random, data: bytes, longest: int = 4096) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(1, max(1, min(longest, len(data) // 4))))


def _flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _fill(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + rng.choice((b"\0", b"\xff", b" ", b"A")) * (stop - start) + data[stop:]


def _scramble(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, stop = _range(rng, data, 64)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def _insert(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 2, 3, 4, 188, 512, 4096))) + data[start:]


def _cut_end(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _cut_start(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[rng.randrange(len(data)) :]


def _remove(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + data[stop:]


def _repeat(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 20)) + data[stop:]


def _move(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, stop = _range(rng, data)
    rest = data[:start] + data[stop:]
    place = rng.randrange(len(rest) + 1)
    return rest[:place] + data[start:stop] + rest[place:]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def odd_integer(rng: random.Random, data: bytes, start: int, stop: int) -> bytes:
    """Replace an integer of 1 to 8 bytes within data[start:stop] by an extreme one, or change it a little."""
    size = rng.choice((1, 2, 4, 4, 4, 8))
    if stop - start < size:
        return data
    place = rng.randrange(start, stop - size + 1)
    if size == 4:
        place -= (place - start) % 4
    order: Any = rng.choice(("big", "big", "little"))
    value = int.from_bytes(data[place : place + size], order)
    value = rng.choice((rng.choice(ODD_INTS), value + rng.choice((-1, 1)), value << 8, -value))
    return data[:place] + (value % 2 ** (8 * size)).to_bytes(size, order) + data[place + size :]


def _odd_integer_anywhere(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return odd_integer(rng, data, 0, len(data))


_DAMAGES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    *(_flip, _fill, _scramble, _insert, _cut_end, _cut_start, _remove, _repeat, _move, _splice, _odd_integer_anywhere),
)


def damage_bytes(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Damage bytes in one place or in several. other: bytes that may be spliced in."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if data:
            data = rng.choice(_DAMAGES)(rng, data, other or data)
    return data


# ---------------------------------------------------------------------------------------------------------- JSON


def odd_value(rng: random.Random) -> Any:
    """Return a value that is extreme, of an odd type, or a text that means something elsewhere."""
    return copy.deepcopy(rng.choice(ODD_VALUES) if rng.random() < 0.6 else rng.choice(ODD_TEXTS))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Return each (container, key or index) of a tree of dicts and lists."""
    keys: Sequence[Any] = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _vary(rng: random.Random, value: Any) -> Any:
    """Return a value near another one, or an odd one."""
    if rng.random() < 0.4:
        return odd_value(rng)
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, 0, "true"))
    if isinstance(value, int) and abs(value) >= 2**64:
        return -value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2**20, value / 2, float(value), str(value), [value]))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice(
            (
                value[:cut] + rng.choice(ODD_TEXTS)[:50] + value[cut:],
                value[:cut],
                value.upper(),
                value * 2,
                "../" + value,
            )
        )
    if isinstance(value, list) and value:
        cut = rng.randrange(len(value))
        return rng.choice((value[:cut] + value[cut + 1 :], [*value, value[cut]], [value], value[cut], value * 2))
    return [value]


def mutate_json(rng: random.Random, tree: Any) -> Any:
    """Copy a tree of JSON values with one to four changes: odd values, keys renamed, removed, exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places or rng.random() < 0.01:
            return odd_value(rng)
        container, key = rng.choice(places)
        what = rng.random()
        if what < 0.65:
            container[key] = _vary(rng, container[key])
        elif what < 0.8:
            del container[key]
        elif what < 0.9:
            other, at = rng.choice(places)
            container[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(container[key])
        elif isinstance(container, dict):
            container[rng.choice(ODD_TEXTS)[:100] if rng.random() < 0.5 else f"{key}x"] = container.pop(key)
        else:
            container.insert(key, odd_value(rng))
    return tree


def dumps(rng: random.Random, value: Any, **options: Any) -> str:
    """json.dumps, with DEEP and DIGITS replaced by deep nesting and by a number of very many digits."""
    text = json.dumps(value, **options)
    depth = rng.choice((500, 3000, 200_000))
    text = text.replace(f'"{DEEP}"', rng.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1")))
    return text.replace(f'"{DIGITS}"', "9" * rng.choice((310, 4301, 20_000)))


# --------------------------------------------------------------------------------------------------------- lines

_JUNK = (
    *(
        "",
        " ",
        "\t",
        "{",
        "}",
        "[]",
        "null",
        "NaN",
        '"x"',
        "0",
        "{}",
        "[" * 100_000,
        "\ufeff",
        "\x00",
        "\x85",
        "\u2028",
    ),
    *('{"a": 1}{"b": 2}', "// comment", "\\", '{"file_name": "a.mp4", "file_name": "b.mp4"}', "9" * 5000),
)


def mutate_text(rng: random.Random, text: str) -> bytes:
    """Mutate the lines or the characters of a text, and its encoding."""
    lines = text.split("\n")
    for _ in range(rng.choice((0, 1, 1, 2))):
        at = rng.randrange(len(lines))
        what = rng.randrange(8)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[at])
        elif what == 2:
            lines.insert(at, rng.choice(_JUNK))
        elif what == 3:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif what == 4:
            lines[at] = lines[at].replace(rng.choice(('"', ":", ",", "{", "}", " ", "1")), rng.choice(_JUNK), 1)
        elif what == 5:
            lines[at] += "\r"
        elif what == 6:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(_JUNK) + lines[at][cut:]
        lines = lines or [""]
    text = "\n".join(lines)
    encoded = text.encode("utf-8", errors="surrogatepass")
    share = rng.random()
    if share < 0.1:
        return b"\xef\xbb\xbf" + encoded
    if share < 0.15:
        return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32")), errors="surrogatepass")
    if share < 0.2:
        return text.replace("\n", rng.choice(("\r\n", "\r", "\n\n"))).encode("utf-8", errors="surrogatepass")
    if share < 0.35:
        return damage_bytes(rng, encoded)
    return encoded

"""Ed25519 by the textbook (RFC 8032 section 5.1), to make the signatures that no library makes."""

from __future__ import annotations

import hashlib

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
Point = tuple[int, int]

_D = -121665 * pow(121666, P - 2, P) % P
_ROOT = pow(2, (P - 1) // 4, P)
NEUTRAL: Point = (0, 1)


def add(left: Point, right: Point) -> Point:
    """The sum of two points."""
    (x1, y1), (x2, y2) = left, right
    twist = _D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + twist, P - 2, P) % P, (y1 * y2 + x1 * x2) * pow(1 - twist, P - 2, P) % P


def multiply(times: int, point: Point) -> Point:
    """A multiple of a point."""
    total = NEUTRAL
    while times:
        if times & 1:
            total = add(total, point)
        point = add(point, point)
        times >>= 1
    return total


def point_of(y: int) -> Point | None:
    """The point with an even x, if there is one at this y."""
    square = (y * y - 1) * pow(_D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * _ROOT % P
    if (x * x - square) % P:
        return None
    return (P - x) % P if x & 1 else x, y


def encode(point: Point) -> bytes:
    """The 32 bytes of a point."""
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def _generator() -> Point:
    found = point_of(4 * pow(5, P - 2, P) % P)
    assert found is not None
    return found


def _torsion() -> list[Point]:
    """The eight points of small order."""
    y = 2
    while True:
        found = point_of(y)
        if found is not None and multiply(4, generator := multiply(ORDER, found)) != NEUTRAL:
            return [multiply(times, generator) for times in range(8)]
        y += 1


BASE = _generator()
TORSION = _torsion()

# y at or above the prime, and the sign of an x that is 0: encodings of points that have another one.
NON_CANONICAL = [
    *((y | sign << 255).to_bytes(32, "little") for y in range(P, 2**255) for sign in (0, 1)),
    *((y | 1 << 255).to_bytes(32, "little") for y in (1, P - 1)),
]

SECRET, NONCE = 12345678901234567890, 987654321
PUBLIC = multiply(SECRET, BASE)


def signature(message: bytes, r: bytes, public: bytes, nonce: int = NONCE) -> bytes:
    """R and the S that fits to it and to a public key, for the secret and nonce above."""
    challenge = int.from_bytes(hashlib.sha512(r + public + message).digest(), "little") % ORDER
    return r + ((nonce + challenge * SECRET) % ORDER).to_bytes(32, "little")

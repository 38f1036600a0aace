"""Hadamard transforms: orthonormal matrices of +-1/sqrt(n), their fast product with blocks of an axis, random signs.

Every matrix here is symmetric, hence its own inverse. That of order 2^k is Sylvester's; other orders are Kronecker
products of it with Paley's matrices (R. Paley, "On orthogonal matrices", 1933), which exist for n = q + 1 with a prime
power q = 3 mod 4 (I), and for n = 2 (q + 1) with q = 1 mod 4 (II). Paley I is skew as it is written in books;
with its columns j and -j exchanged it is symmetric.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jqopt.errors import PlanError

_DENSE = 128
"""Powers of two up to this are one small matrix product; larger ones are several."""


def matrix(n: int) -> np.ndarray:
    """The orthonormal Hadamard matrix [n, n] in float32: symmetric, `x @ matrix(n)` is the transform of rows x.

    Raises:
        PlanError: no matrix of this order is known to jqopt.
    """
    check(n, n)
    return (functools.reduce(np.kron, _factors(n), np.ones((1, 1))) / math.sqrt(n)).astype(np.float32)


def transform(x: jax.Array, block: int) -> jax.Array:
    """The last axis of x, in blocks of `block`, times the orthonormal Hadamard matrix of that order.

    Computed in float32 (float64 for float64), with a few matrices of the order's Kronecker factors instead of one;
    the result has the type of x. It is its own inverse.

    Raises:
        PlanError: the axis isn't a multiple of the block, or there is no such matrix.
    """
    check(x.shape[-1], block)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    factors = _factors(block)
    lead = x.ndim - 1
    y = x.astype(wide).reshape(*x.shape[:-1], x.shape[-1] // block, *(len(f) for f in factors))
    for f in factors:
        # The contracted axis goes to the end, so that after all factors they stand in their first order again.
        y = jax.lax.dot_general(y, jnp.asarray(f, wide), (((lead + 1,), (0,)), ((), ())), precision="highest")
    return (y * jnp.asarray(1 / math.sqrt(block), wide)).reshape(x.shape).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """The last axis of x in blocks of the largest power of two that divides it: its own inverse."""
    return transform(x, x.shape[-1] & -x.shape[-1])


def inverse(x: jax.Array, block: int) -> jax.Array:
    """What undoes `transform`: the transform itself, since its matrices are symmetric."""
    return transform(x, block)


def host(x: np.ndarray, block: int) -> np.ndarray:
    """`transform` in float64 with NumPy, for weights that are rotated once."""
    check(x.shape[-1], block)
    factors = _factors(block)
    lead = x.ndim - 1
    y = np.asarray(x, np.float64).reshape(*x.shape[:-1], x.shape[-1] // block, *(len(f) for f in factors))
    for f in factors:
        y = np.tensordot(y, f, ((lead + 1,), (0,)))
    return (y / math.sqrt(block)).reshape(x.shape)


def signs(n: int, seed: int) -> np.ndarray:
    """n random signs, +1 or -1, in float32: the same for a seed in every NumPy (RandomState's stream is frozen)."""
    return np.random.RandomState(seed).randint(0, 2, n).astype(np.float32) * 2 - 1


def check(k: int, block: int) -> None:
    """Can an axis of k be transformed in blocks of `block`?

    Raises:
        PlanError: it can't; the text names the nearest block sizes that can.
    """
    if block < 1:
        raise PlanError(f"found a Hadamard block of {block}, expected a positive number")
    if k % block == 0 and _orders(block) is not None:
        return
    why = (
        f"{block} does not divide it"
        if k % block
        else f"jqopt knows no Hadamard matrix of order {block} (a power of two, or one of Paley's orders times one)"
    )
    known = sizes(k)
    near = sorted(sorted(known, key=lambda d: (abs(math.log(d / block)), -d))[:2])
    most = f"; the largest is {known[-1]}" if known[-1] not in near else ""
    raise PlanError(
        f"an axis of {k} can't be transformed in Hadamard blocks of {block}: {why}; "
        f"write a block of {' or '.join(map(str, near))}{most}"
    )


def sizes(k: int) -> tuple[int, ...]:
    """The block sizes that divide k and have a matrix, in order; 1 is always one of them."""
    small = [d for d in range(1, math.isqrt(k) + 1) if k % d == 0]
    return tuple(sorted(d for d in {*small, *(k // d for d in small)} if _orders(d) is not None))


# ------------------------------------------------------------------------------------------ constructions


@functools.lru_cache(256)
def _orders(n: int) -> tuple[int, ...] | None:
    """Orders of the Kronecker factors of a matrix of order n, at most one of them a power of two; None: not known."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return (n,) if n > 1 else ()
    base = 4 * odd
    while n % base == 0:
        if _paley(base):
            return (base, n // base) if n > base else (base,)
        base *= 2
    # A product of two smaller orders, such as 4a x 4b.
    for a in range(3, math.isqrt(odd) + 1, 2):
        for left in (a << i for i in range(2, n.bit_length())) if odd % a == 0 else ():
            if n % left == 0 and _paley(left) and (rest := _orders(n // left)) is not None:
                return (left, *rest)
    return None


def _paley(n: int) -> int:
    """1 or 2: which of Paley's constructions gives the order; 0: neither."""
    if n % 4 == 0 and (n - 1) % 4 == 3 and _prime_power(n - 1):
        return 1
    return 2 if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1) else 0


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, p prime; None if there is none."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 else None


@functools.lru_cache(32)
def _factors(n: int) -> tuple[np.ndarray, ...]:
    """Matrices of +-1 in float64 whose Kronecker product has order n."""
    found: list[np.ndarray] = []
    for order in _orders(n) or ():
        found += _sylvester(order) if order & (order - 1) == 0 else [_paley_matrix(order)]
    for f in found:
        f.setflags(write=False)
    return tuple(found)


def _sylvester(n: int) -> list[np.ndarray]:
    """Factors of Sylvester's matrix, of even sizes as far as that goes."""
    k = n.bit_length() - 1
    parts = -(-k // (_DENSE.bit_length() - 1))
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    return [functools.reduce(np.kron, [two] * (k // parts + (i < k % parts))) for i in range(parts)]


def _paley_matrix(n: int) -> np.ndarray:
    kind = _paley(n)
    q = n - 1 if kind == 1 else n // 2 - 1
    chi, total = _field(q)
    out = np.ones((q + 1, q + 1))
    if kind == 1:
        # chi(a + b) is chi(a - b) with the columns b and -b exchanged; so is the unit matrix.
        out[1:, 1:] = chi[total] - (total == 0)
        return out
    out[0, 0] = 0
    out[1:, 1:] = chi[total]
    # Exchanging columns would spoil the zero diagonal here; chi(a - b) is symmetric by itself, as -1 is a square.
    negative = np.argmin(total, axis=1)
    out[1:, 1:] = out[1:, 1:][:, negative]
    return np.kron(out, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])


def _field(q: int) -> tuple[np.ndarray, np.ndarray]:
    """The quadratic character [q] of the field with q elements (1 squares, -1 others, 0 zero), its sums [q, q].

    An element is the number whose digits to base p are the coefficients of a polynomial over the integers mod p.
    """
    p, e = _prime_power(q) or (q, 1)
    place = p ** np.arange(e)
    digits = np.arange(q)[:, None] // place % p
    total = (digits[:, None] + digits[None, :]) % p @ place
    one = [1] + [0] * (e - 1)
    for tail in digits[1:]:
        # Is x a generator modulo x^e - tail? Then its even powers are the squares.
        power, seen = one, []
        while not seen or (power != one and len(seen) < q):
            seen.append(int(np.dot(power, place)))
            power = [(a + power[-1] * int(c)) % p for a, c in zip([0, *power[:-1]], tail)]
        if len(set(seen)) == len(seen) == q - 1:
            chi = np.zeros(q)
            chi[seen[0::2]], chi[seen[1::2]] = 1, -1
            return chi, total
    raise AssertionError(f"no generator of the field with {q} elements")

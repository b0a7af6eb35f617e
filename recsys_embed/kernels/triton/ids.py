"""The transforms of ids to rows (:mod:`recsys_embed.core.transforms`) on the GPU, bit for bit."""

# No `from __future__ import annotations`: triton reads annotations as objects.
import triton
import triton.language as tl

from recsys_embed.kernels.kinds import KINDS
from recsys_embed.kernels.triton.fields import MAP

# One bit per kind, for the set of kinds in a collection; then the numbers of the kinds.
DIGITS = tl.constexpr(1 << KINDS.index("digit"))
HASHES = tl.constexpr(1 << KINDS.index("hash"))
MURMURS = tl.constexpr(1 << KINDS.index("murmur"))
RANGES = tl.constexpr(1 << KINDS.index("range"))
BITMAPS = tl.constexpr(1 << KINDS.index("bitmap"))
SORTED = tl.constexpr(1 << KINDS.index("sorted"))
IDENTITIES = tl.constexpr(1 << KINDS.index("identity"))
CODES = tl.constexpr(1 << KINDS.index("codes"))
MEMBERS = tl.constexpr(RANGES.value | BITMAPS.value | SORTED.value)

KIND = tl.constexpr(MAP.index("kind"))
DIV = tl.constexpr(MAP.index("div"))
MOD = tl.constexpr(MAP.index("mod"))
AFFINE = tl.constexpr(MAP.index("affine"))
A = tl.constexpr(MAP.index("a"))
B = tl.constexpr(MAP.index("b"))
P = tl.constexpr(MAP.index("p"))
SALT = tl.constexpr(MAP.index("salt"))
SIZE = tl.constexpr(MAP.index("size"))
STRIDE = tl.constexpr(MAP.index("stride"))
OFFSET = tl.constexpr(MAP.index("offset"))
NUM_FREQUENT = tl.constexpr(MAP.index("num_frequent"))
ABSENT = tl.constexpr(MAP.index("absent"))
WORD = tl.constexpr(MAP.index("word"))
START = tl.constexpr(MAP.index("start"))
COUNT = tl.constexpr(MAP.index("count"))
ARRAY = tl.constexpr(MAP.index("array"))
AT = tl.constexpr(MAP.index("at"))
REST = tl.constexpr(MAP.index("rest"))
BITS = tl.constexpr(MAP.index("bits"))
STEPS = tl.constexpr(MAP.index("steps"))
DIV_INVERSE = tl.constexpr(MAP.index("div_inverse"))
MOD_INVERSE = tl.constexpr(MAP.index("mod_inverse"))
P_INVERSE = tl.constexpr(MAP.index("p_inverse"))
SIZE_INVERSE = tl.constexpr(MAP.index("size_inverse"))


@triton.jit
def floor_divide(x, divisor, inverse):
    """floor(x / divisor) of int64 x, by the divisor's reciprocal."""
    sign = x >> 63
    # For negative x: floor(x / d) = ~floor(~x / d).
    y = (x ^ sign).to(tl.uint64)
    d = divisor.to(tl.uint64)
    q = tl.umulhi(y, inverse.to(tl.uint64))
    q = tl.where(y - q * d >= d, q + 1, q)
    return q.to(tl.int64) ^ sign


@triton.jit
def remainder(x, divisor, inverse):
    return x - floor_divide(x, divisor, inverse) * divisor


@triton.jit
def splitmix(z):
    """splitmix64 of uint64 bits."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def hashed(x, salt, size):
    """Rows in [0, size), as :func:`recsys_embed.core.hashing.hash_rows`."""
    bits = splitmix((x ^ salt).to(tl.uint64))
    return tl.umulhi(bits, size.to(tl.uint64)).to(tl.int64)


@triton.jit
def sign_of(x, salt):
    """-1.0 or 1.0, as :func:`recsys_embed.core.hashing.hash_signs`."""
    bits = splitmix((x ^ salt).to(tl.uint64))
    return tl.where((bits >> 63) != 0, -1.0, 1.0)


@triton.jit
def _fmix(h):
    h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCD
    h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53
    return h ^ (h >> 33)


@triton.jit
def _murmur(x, at):
    word, size, size_inverse = tl.load(at + WORD), tl.load(at + SIZE), tl.load(at + SIZE_INVERSE)
    seed = tl.load(at + SALT).to(tl.uint64) ^ 8
    k = x.to(tl.uint64) * 0x87C37B91114253D5
    k = ((k << 31) | (k >> 33)) * 0x4CF5AD432745937F
    h1 = (k ^ seed) + seed
    h2 = seed + h1
    h1 = _fmix(h1)
    h2 = _fmix(h2)
    h1 = h1 + h2
    h2 = h2 + h1
    half = tl.where(word < 2, h1, h2)
    key = tl.where((word & 1) != 0, half >> 32, half & 0xFFFFFFFF).to(tl.int64)
    return remainder(key, size, size_inverse)


@triton.jit
def _digit(x, at):
    # All loads before the first branch, so that their latencies overlap.
    affine, a, b, p, p_inverse = (
        tl.load(at + AFFINE), tl.load(at + A), tl.load(at + B), tl.load(at + P), tl.load(at + P_INVERSE),
    )  # fmt: skip
    div, div_inverse, mod, mod_inverse = (
        tl.load(at + DIV), tl.load(at + DIV_INVERSE), tl.load(at + MOD), tl.load(at + MOD_INVERSE),
    )  # fmt: skip
    y = x
    if affine != 0:
        y = remainder(y * a + b, p, p_inverse)
    if div != 1:
        y = floor_divide(y, div, div_inverse)
    if mod != 0:
        y = remainder(y, mod, mod_inverse)
    return y


@triton.jit
def _hash(x, at):
    num_frequent, absent = tl.load(at + NUM_FREQUENT), tl.load(at + ABSENT)
    rows = hashed(x, tl.load(at + SALT), tl.load(at + SIZE)) * tl.load(at + STRIDE) + tl.load(at + OFFSET)
    private = tl.where(absent != 0, tl.full(x.shape, -1, tl.int64), x)
    return tl.where((x >= 0) & (x < num_frequent), private, rows)


@triton.jit
def _bits_set(v):
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (v * 0x0101010101010101) >> 56


@triton.jit
def _array(at, index, number: tl.constexpr, TYPE: tl.constexpr):
    """Array ``number`` of the transform's index, from the index's offset on."""
    array = tl.load(index + tl.load(at + ARRAY) + number).to(tl.pointer_type(TYPE))
    return array + tl.load(at + AT)


@triton.jit
def _bitmap(x, at, index, live):
    words, ranks = _array(at, index, 0, tl.int64), _array(at, index, 1, tl.int32)
    inside = live & (x >= 0) & (x < tl.load(at + SIZE))
    place = x >> 6
    word = tl.load(words + place, mask=inside, other=0).to(tl.uint64)
    bit = (x & 63).to(tl.uint64)
    one = tl.full(x.shape, 1, tl.uint64)
    present = inside & (((word >> bit) & 1) != 0)
    below = _bits_set(word & ((one << bit) - 1)).to(tl.int64)
    return tl.where(present, tl.load(ranks + place, mask=present, other=0).to(tl.int64) + below, -1)


@triton.jit
def _sorted(x, at, index, live):
    count, steps = tl.load(at + COUNT), tl.load(at + STEPS)
    first = _array(at, index, 0, tl.int32)
    place = tl.full(x.shape, -1, tl.int64)
    # Binary search for the last id that is not above x.
    for step in range(steps):
        ahead = place + (tl.full(x.shape, 1, tl.int64) << (steps - 1 - step))
        within = live & (ahead < count)
        known = tl.load(first + ahead, mask=within, other=0).to(tl.int64)
        place = tl.where(within & (known <= x), ahead, place)
    found = live & (place >= 0)
    known = tl.load(first + place, mask=found, other=0).to(tl.int64)
    return tl.where(found & (known == x), place, -1)


@triton.jit
def _codes(x, at, index, live):
    words, bits = _array(at, index, 0, tl.int32), tl.load(at + BITS)
    inside = live & (x >= 0) & (x < tl.load(at + SIZE))
    bit = (x * tl.load(at + STRIDE) + tl.load(at + OFFSET)) * bits
    low = tl.load(words + (bit >> 5), mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(words + (bit >> 5) + 1, mask=inside, other=0).to(tl.int64)
    code = ((low | (high << 32)) >> (bit & 31)) & ((tl.full(x.shape, 1, tl.int64) << bits) - 1)
    return tl.where(inside, code, -1)


@triton.jit
def _set_rank(x, at, kind, index, live, OCCURRING: tl.constexpr):
    rows = tl.full(x.shape, -1, tl.int64)
    if RANGES & OCCURRING:
        if (1 << kind) == RANGES:
            place = x - tl.load(at + START)
            rows = tl.where((place >= 0) & (place < tl.load(at + COUNT)), place, -1)
    if BITMAPS & OCCURRING:
        if (1 << kind) == BITMAPS:
            rows = _bitmap(x, at, index, live)
    if SORTED & OCCURRING:
        if (1 << kind) == SORTED:
            rows = _sorted(x, at, index, live)
    rest = tl.load(at + REST)
    if rest != 0:
        rows = tl.where(rows < 0, tl.load(at + COUNT) + hashed(x, tl.load(at + SALT), rest), rows)
    return rows


@triton.jit
def rows_of(x, at, index, live, OCCURRING: tl.constexpr):
    """Rows of ids, -1 for none. ``at`` points to the transform's fields; OCCURRING: bits of the kinds in use."""
    kind = tl.load(at + KIND)
    rows = tl.full(x.shape, -1, tl.int64)
    if IDENTITIES == OCCURRING:
        rows = x
    elif DIGITS == OCCURRING:
        rows = _digit(x, at)
    elif HASHES == OCCURRING:
        rows = _hash(x, at)
    else:
        if IDENTITIES & OCCURRING:
            if (1 << kind) == IDENTITIES:
                rows = x
        if DIGITS & OCCURRING:
            if (1 << kind) == DIGITS:
                rows = _digit(x, at)
        if HASHES & OCCURRING:
            if (1 << kind) == HASHES:
                rows = _hash(x, at)
        if MURMURS & OCCURRING:
            if (1 << kind) == MURMURS:
                rows = _murmur(x, at)
        if CODES & OCCURRING:
            if (1 << kind) == CODES:
                rows = _codes(x, at, index, live)
        if MEMBERS & OCCURRING:
            if ((1 << kind) & MEMBERS) != 0:
                rows = _set_rank(x, at, kind, index, live, OCCURRING)
    return rows

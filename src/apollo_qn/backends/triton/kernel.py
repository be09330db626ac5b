"""Algorithm 1 as a Triton kernel, for all tensors in a few launches. It knows addresses only.

One program processes one run of elements of one tensor, according to its role. The sums over a run
are taken in blocks of a fixed size in the arithmetic's type. Blocks, and then runs, are added up in
float64 in a fixed order. There are no atomics, so results are bit-identical at every call, whatever
else is in the launch. The letters are those of ``algorithm.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Elements that a program holds in registers at once: 8 per thread.
BLOCK = 1024
WARPS = 4
# Largest number of runs of a tensor. A program that updates a run reads the sums of all runs.
RUNS = 512
# Number of columns of the tables, which launch_schedule.py fills.
TENSOR = 9  # p, m, B, threshold, compensation, first row of its sums, number of its runs, row in
# `full_sums` (-1 for a full tensor), RNG key
WORK = 5  # tensor, role, first element, number of elements, row of sums
SUMS = 4  # scale (a power of 2), q4, k, largest: secant.Sums
SCALARS = 16  # in the order of base.step_scalars

# Roles of a program.
ALL = 0  # take the sums and update, for a tensor of one run
MEASURE = 1  # write the sums of the run into their row
APPLY = 2  # update the run with the sums of its tensor
KEEP = 3  # store the threshold of belief, after all runs of the tensor have been updated
WRITE_SUMS = 4  # write the sums over a shard into `full_sums`

_ALL, _MEASURE, _APPLY, _KEEP = (tl.constexpr(role) for role in (ALL, MEASURE, APPLY, KEEP))
_WRITE_SUMS = tl.constexpr(WRITE_SUMS)
_TENSOR, _WORK, _SUMS, _SCALARS = (tl.constexpr(n) for n in (TENSOR, WORK, SUMS, SCALARS))


@triton.jit
def one(out):
    """Store 1, to try the compiler."""
    tl.store(out, 1.0)


@triton.jit
def _quotient(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _exponent(x):
    """Return e with 2^e <= x < 2^(e + 1) for x >= 0, limited so that 2^-e is normal too."""
    if x.dtype == tl.float32:
        e = (x.to(tl.int32, bitcast=True) >> 23) - 127
        return tl.minimum(tl.maximum(e, -120), 120)
    else:
        e = (x.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
        return tl.minimum(tl.maximum(e, -1000), 1000)


@triton.jit
def _power(e):
    """Return 2^e in float64, for |e| <= 1022."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _share(e):
    """Return 2^e for e <= 0, and 2^-250 where it is smaller: a negligible share."""
    return _power(tl.maximum(e, -250))


@triton.jit
def _pointer(address, start, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(T)) + start
    if ALIGNED:  # 4 elements per thread for every type, so that no layout has to be converted
        pointer = tl.multiple_of(pointer, 4 * T.primitive_bitwidth // 8)
    return pointer


@triton.jit
def _fetch(pointer, i, mask, MASKED: tl.constexpr, S: tl.constexpr):
    if MASKED:
        return tl.load(pointer + i, mask=mask, other=0.0).to(S)
    else:
        return tl.load(pointer + i).to(S)


@triton.jit
def _store(pointer, i, mask, x, MASKED: tl.constexpr):
    x = x.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + i, x, mask=mask)
    else:
        tl.store(pointer + i, x)


@triton.jit
def _mix(x):
    """Compute rounding.mix."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _drawn(x, random, T: tl.constexpr):
    """Compute rounding.stochastic of float32 numbers; ``random`` is uint32."""
    if tl.float16 == T:
        dropped: tl.constexpr = 13
        smallest = 0.00006103515625  # 2^-14
        largest = 65504.0
    else:
        dropped: tl.constexpr = 16
        smallest = 0.0
        largest = 3.3895313892515355e38
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.abs(x)
    shift = tl.where(size < smallest, smallest, 0.0)
    pattern = (size + shift).to(tl.uint32, bitcast=True) + (random >> (32 - dropped))
    rounded = ((pattern >> dropped) << dropped).to(tl.float32, bitcast=True) - shift
    signed = rounded.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return tl.where(size < largest, signed.to(tl.float32, bitcast=True), x).to(T)


@triton.jit
def _secant_pair(theta, g, m, B, s):
    """Return d, the displacement of the step before, and g - m."""
    sign, l2, kappa, omega, threshold, offset = s
    size = tl.abs(B)
    d = _quotient(m, tl.where(threshold > size, threshold, size) + offset)
    return kappa * d + omega * theta, sign * g - m + l2 * theta


@triton.jit
def _measured(
    total, p, low, g, m, B, i, end, needed, s, alpha,
    S: tl.constexpr, BELIEF: tl.constexpr, KAHAN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the sums over one block: e, q4 and k of u = d / 2^e, and max |g - m|."""
    e, q4, k, most = total
    mask = i < end
    b, mi = _fetch(B, i, mask, MASKED, S), _fetch(m, i, mask, MASKED, S)
    if MASKED:
        needed = mask & needed
    theta = _fetch(p, i, needed, True, S)
    if KAHAN:
        theta += _fetch(low, i, needed, True, S)
    d, delta = _secant_pair(theta, _fetch(g, i, mask, MASKED, S), mi, b, s)
    e_block = _exponent(tl.max(tl.abs(d), 0))
    e_new = tl.maximum(e, e_block)
    u = d * _power(-e_block).to(S)
    u2 = u * u
    before, share = _share(e - e_new), _share(e_block - e_new)
    before2, share2 = before * before, share * share
    q4 = q4 * (before2 * before2) + tl.sum(u2 * u2, 0).to(tl.float64) * (share2 * share2)
    k = k * before + tl.sum(u * (alpha * delta + b * d), 0).to(tl.float64) * share
    if BELIEF:
        most = tl.maximum(most, tl.max(tl.abs(delta), 0).to(tl.float64))
    return e_new, q4, k, most


@triton.jit
def _update(
    p, low, g, m, B, i, start, end, s, alpha, rate, decoupled, c, inverse, threshold, offset,
    draws, key, second,
    S: tl.constexpr, KAHAN: tl.constexpr, DRAWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store m', B' and theta' of one block, with B' = B - c u^2 and u = d * inverse."""
    mask = i < end
    b, mi = _fetch(B, i, mask, MASKED, S), _fetch(m, i, mask, MASKED, S)
    theta = _fetch(p, i, mask, MASKED, S)
    if KAHAN:
        theta += _fetch(low, i, mask, MASKED, S)
    d, delta = _secant_pair(theta, _fetch(g, i, mask, MASKED, S), mi, b, s)
    u = d * inverse
    mi = mi + alpha * delta
    b = b - c * (u * u)
    size = tl.abs(b)
    d = _quotient(mi, tl.where(threshold > size, threshold, size) + offset) + decoupled * theta
    theta = theta - rate * d

    P: tl.constexpr = p.dtype.element_ty
    M: tl.constexpr = m.dtype.element_ty
    stored = theta.to(P)
    if KAHAN:
        high = stored.to(S)  # an infinity has no rounding error
        _store(low, i, mask, tl.where(high - high == 0, theta - high, 0.0), MASKED)
    if DRAWS:
        offset_in_tensor = start + i
        low_half, high_half = offset_in_tensor.to(tl.uint32), (offset_in_tensor >> 32).to(tl.uint32)
        random = _mix(_mix(low_half ^ key) ^ second ^ high_half)
        if P.primitive_bitwidth == 16:
            if draws != 0:
                stored = _drawn(theta, random, P)
        if M.primitive_bitwidth == 16:
            b = _drawn(b, random << 16, M)
    _store(m, i, mask, mi, MASKED)
    _store(B, i, mask, b, MASKED)
    _store(p, i, mask, stored, MASKED)


@triton.jit
def _gathered(row, count, RUNS: tl.constexpr):
    """Return the sums of a tensor from those of its runs."""
    i = tl.arange(0, RUNS)
    there = i < count
    at = row + i * _SUMS
    scales = tl.load(at, mask=there, other=0.0)
    scale = tl.max(scales, 0)
    share = scales * (1.0 / scale)  # exact, because scales are powers of 2
    share2 = share * share
    q4 = tl.sum(tl.load(at + 1, mask=there, other=0.0) * (share2 * share2), 0)
    k = tl.sum(tl.load(at + 2, mask=there, other=0.0) * share, 0)
    return scale, q4, k, tl.max(tl.load(at + 3, mask=there, other=0.0), 0)


@triton.jit
def _concluded(scale, q4, k, eps, S: tl.constexpr):
    """Return c and e with B' = B - c u^2 and u = d / 2^e.

    The function is secant.secant_coefficient followed by secant.saturate.
    """
    norm = scale * tl.sqrt(tl.sqrt(q4))
    e = _exponent(norm)
    if tl.float32 == S:
        e = tl.minimum(tl.maximum(e, -120), 120)
        most = 4.253529586511731e37  # 2^125
    else:
        most = 1.1235582092889474e307  # 2^1020
    n = norm + eps
    nothing = n == 0
    n = tl.where(nothing, 1.0, n)
    share = _power(e) / n
    c = share * share * share * (k * (scale / _power(e)) / n)  # k belongs to d / scale
    c = tl.where(c > most, most, tl.where(c < -most, -most, c))  # NaN stays NaN
    return tl.where(nothing, 0.0, c), e


@triton.jit(do_not_specialize=["first"])
def step(
    tensors, work, first, gradients, scalars, rows, full_sums,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    BELIEF: tl.constexpr, KAHAN: tl.constexpr, DRAWS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Run one program per row of ``work``, beginning with row ``first``.

    ``gradients`` holds the address of each tensor's gradient and the tensor's row in ``scalars``.
    ``rows`` holds the sums of runs, ``full_sums`` the global sums of sharded tensors. P, G, M and S
    are the types of parameter, gradient, state and arithmetic.
    """
    mine = work + (first + tl.program_id(0)).to(tl.int64) * _WORK
    tensor, role, start = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    count = tl.load(mine + 3).to(tl.int32)
    its = tensors + tensor * _TENSOR
    address = gradients + tensor * 2
    p = _pointer(tl.load(its), start, P, ALIGNED)
    m = _pointer(tl.load(its + 1), start, M, ALIGNED)
    B = _pointer(tl.load(its + 2), start, M, ALIGNED)
    low = _pointer(tl.load(its + 4), start, P, ALIGNED)
    g = _pointer(tl.load(address), start, G, ALIGNED)
    threshold_of = tl.load(its + 3).to(tl.pointer_type(S))
    full_row = tl.load(its + 7)

    number = scalars + tl.load(address + 1) * _SCALARS
    alpha, rate = tl.load(number).to(S), tl.load(number + 1).to(S)
    offset = tl.load(number + 2).to(S)
    previous = tl.load(number + 3).to(S)
    threshold = tl.load(number + 7)
    belief = tl.load(number + 13) != 0
    if BELIEF:
        if belief:
            previous = tl.load(threshold_of)
    s = (
        tl.load(number + 9).to(S),
        tl.load(number + 10).to(S),
        tl.load(number + 5).to(S),
        tl.load(number + 6).to(S),
        previous,
        tl.load(number + 4).to(S),
    )
    full = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    # the sums need the parameter only if it decays
    needed = lane * 0 + tl.load(number + 12).to(tl.int32) != 0

    e = tl.full((), -1000, tl.int32)
    q4 = tl.full((), 0.0, tl.float64)
    k = tl.full((), 0.0, tl.float64)
    most = tl.full((), 0.0, tl.float64)
    scale = tl.full((), 1.0, tl.float64)
    if (role == _ALL) | (role == _MEASURE):
        for at in range(0, full, BLOCK):
            e, q4, k, most = _measured(
                (e, q4, k, most), p, low, g, m, B, at + lane, count, needed, s, alpha,
                S, BELIEF, KAHAN, False,
            )  # fmt: skip
        if full < count:
            e, q4, k, most = _measured(
                (e, q4, k, most), p, low, g, m, B, full + lane, count, needed, s, alpha,
                S, BELIEF, KAHAN, True,
            )  # fmt: skip
        scale = _power(e)
    elif (full_row >= 0) & (role != _WRITE_SUMS):
        scale, q4, k, most = _gathered(full_sums + full_row * _SUMS, 1, 2)
    else:
        scale, q4, k, most = _gathered(
            rows + tl.load(its + 5) * _SUMS, tl.load(its + 6).to(tl.int32), RUNS
        )
    if BELIEF:
        if belief:
            threshold = tl.where(k != k, k, most)  # a maximum may ignore a NaN, k does not

    if (role == _MEASURE) | (role == _WRITE_SUMS):
        row = rows + tl.load(mine + 4) * _SUMS
        if role == _WRITE_SUMS:
            row = full_sums + full_row * _SUMS
        tl.store(row, scale)
        tl.store(row + 1, q4)
        tl.store(row + 2, k)
        tl.store(row + 3, most)
    elif role != _KEEP:
        c, e = _concluded(scale, q4, k, tl.load(number + 8), S)
        c, inverse = c.to(S), _power(-e).to(S)
        decoupled = tl.load(number + 11).to(S)
        draws = tl.load(number + 14)
        rng_key = tl.load(its + 8).to(tl.uint32)
        key = _mix(tl.load(number + 15).to(tl.int64).to(tl.uint32) ^ rng_key)
        second = _mix(key ^ rng_key ^ 0x9E3779B9)
        for at in range(0, full, BLOCK):
            _update(
                p, low, g, m, B, at + lane, start, count, s, alpha, rate, decoupled,
                c, inverse, threshold.to(S), offset, draws, key, second, S, KAHAN, DRAWS, False,
            )  # fmt: skip
        if full < count:
            _update(
                p, low, g, m, B, full + lane, start, count, s, alpha, rate, decoupled,
                c, inverse, threshold.to(S), offset, draws, key, second, S, KAHAN, DRAWS, True,
            )  # fmt: skip
    if BELIEF:
        if belief & ((role == _ALL) | (role == _KEEP)):
            tl.store(threshold_of, threshold.to(S))

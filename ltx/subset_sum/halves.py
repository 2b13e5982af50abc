"""Meet in the middle for single hard problems, after Horowitz and Sahni (1974): CPU, compiled, parallel.

Values that no better subset can have are left out: zeros, and what dwarfs all the rest. Of the others the last two are
pivots; the rest is split into two halves whose subset sums are sorted by merging. For each of the four choices of
pivots a staircase sweep over both lists passes the pair whose sum is closest to what
is missing. The four sweeps run side by side, because each step of one waits for the step before.

Sums that are formed half by half differ from those of the specification (ascending indices) in their rounding.
They only nominate: where errors come within rounding of each other, the sums are formed again in the right order
and compared exactly, ties included.
"""

from __future__ import annotations

import numba
import numpy as np

from ltx.compiled import compiled

CHUNK = 8  # problems that share their scratch
_UNIT = 2.0**-53


@compiled()
def _count(mask):
    count = 0
    while mask:
        mask &= mask - 1
        count += 1
    return count


@compiled()
def _precedes(a, b):
    """Whether subset a comes before b: fewer elements, then the lexicographically first."""
    more = _count(a) - _count(b)
    lowest = (a ^ b) & -(a ^ b)
    return more < 0 or (more == 0 and (a & lowest) != 0)


@compiled()
def _better(x, theta, candidate, mask, error):
    """The better one of `candidate` and the subset `mask` of that error, compared exactly."""
    total = 0.0
    for s in range(len(x)):
        if candidate >> s & 1:
            total += x[s]
    e = abs(total - theta)
    if e < error or (e == error and _precedes(candidate, mask)):
        return candidate, e
    return mask, error


@compiled()
def _useful(x, theta, error, useful, bits):
    """Copy the values that a subset better than `error` can have, in their order, and their bits; how many.

    There are at least two: for want of values, zeros that set no bit.
    """
    m = len(x)
    for s in range(m):
        useful[s], bits[s] = x[s], np.int64(1) << s if x[s] != 0.0 else np.int64(0)  # zeros: never in the smallest
    while True:
        largest, rest = -1, abs(theta) + error
        for s in range(m):
            if bits[s] and (largest < 0 or abs(x[s]) > abs(x[largest])):
                largest = s
        for s in range(m):
            if bits[s] and s != largest:
                rest += abs(x[s])
        if largest < 0 or abs(x[largest]) <= (1 + 2.0**-40) * rest:
            break
        bits[largest] = 0  # whatever else is chosen with it, the error is larger
    n = 0
    for s in range(m):
        if bits[s]:
            useful[n], bits[n] = useful[s], bits[s]
            n += 1
    while n < 2:
        useful[n], bits[n] = 0.0, 0
        n += 1
    return n


@compiled()
def _sorted_sums(x, bits, sums, masks, other_sums, other_masks):
    """The subset sums of x in ascending order and their masks, in two of the four arrays given.

    A merge fills its output from both ends at once: two chains of dependent steps instead of one, and no bounds
    to check.
    """
    sums[0], masks[0] = 0.0, 0
    n = 1
    for s in range(len(x)):
        bit = bits[s]
        i, j, up, above = np.int64(0), np.int64(0), np.int64(n - 1), np.int64(n - 1)
        for o in range(n):
            a, b = sums[i], sums[j] + x[s]
            without = np.int64(a <= b)
            other_sums[o] = min(a, b)
            other_masks[o] = (masks[i] & -without) | ((masks[j] | bit) & (without - 1))
            i += without
            j += 1 - without
            a, b = sums[up], sums[above] + x[s]
            without = np.int64(a > b)
            other_sums[2 * n - 1 - o] = max(a, b)
            other_masks[2 * n - 1 - o] = (masks[up] & -without) | ((masks[above] | bit) & (without - 1))
            up -= without
            above -= 1 - without
        sums, other_sums, masks, other_masks = other_sums, sums, other_masks, masks
        n *= 2
    return sums[:n], masks[:n]


@compiled(fastmath={"nnan"})
def _least_gap(sums):
    gap = np.inf
    for i in range(len(sums) - 1):
        d = sums[i + 1] - sums[i]
        gap = d if d < gap else gap
    return gap


@compiled()
def _four_sweeps(x, theta, missing, given, slack, left, left_masks, right, right_masks, mask, error):
    """The best of the subset `mask` and of the pairs that four sweeps pass, a step of each in turn.

    Sweep c looks for pairs whose sum is close to missing[c]; its subsets have the bits given[c] as well. It passes
    all pairs within slack of the least error where neighbours in either list lie further apart than that.
    left[-1] = inf and right[0] = -inf are sentinels: with them, every sweep takes the same number of steps.
    """
    nominee, close = mask, error  # the closest one so far, by its approximate error; compared exactly at the end
    limit = close + slack
    m0, m1, m2, m3 = missing[0], missing[1], missing[2], missing[3]
    i0 = i1 = i2 = i3 = 0
    j0 = j1 = j2 = j3 = len(right) - 1
    for _ in range(len(left) + len(right) - 2):
        s0, s1 = left[i0] + right[j0] - m0, left[i1] + right[j1] - m1
        s2, s3 = left[i2] + right[j2] - m2, left[i3] + right[j3] - m3
        if min(min(abs(s0), abs(s1)), min(abs(s2), abs(s3))) <= limit:
            for c, s, i, j in ((0, s0, i0, j0), (1, s1, i1, j1), (2, s2, i2, j2), (3, s3, i3, j3)):
                if abs(s) > limit:
                    continue
                candidate = left_masks[i] | right_masks[j - 1] | given[c]
                if abs(s) < close - slack:  # better whatever the rounding
                    nominee, close = candidate, abs(s)
                else:
                    mask, error = _better(x, theta, nominee, mask, error)
                    nominee, close = candidate, min(close, abs(s))
                limit = close + slack
        d0, d1, d2, d3 = np.int64(s0 > 0), np.int64(s1 > 0), np.int64(s2 > 0), np.int64(s3 > 0)
        j0, j1, j2, j3 = j0 - d0, j1 - d1, j2 - d2, j3 - d3
        i0, i1, i2, i3 = i0 + 1 - d0, i1 + 1 - d1, i2 + 1 - d2, i3 + 1 - d3
    return _better(x, theta, nominee, mask, error)


@compiled()
def _all_close(x, theta, missing, given, slack, left, left_masks, right, right_masks, mask, error):
    """The best of the subset `mask` and of all pairs that could be as good, neighbours of equal sums included."""
    low = high = len(right)
    for i in range(len(left)):
        rest, limit = missing - left[i], error + slack  # both only fall
        while low > 0 and right[low - 1] - rest >= -limit:
            low -= 1
        while high > 0 and right[high - 1] - rest > limit:
            high -= 1
        for j in range(low, high):
            if abs(left[i] + right[j] - missing) <= error + slack:
                mask, error = _better(x, theta, left_masks[i] | right_masks[j] | given, mask, error)
    return mask, error


@compiled()
def _distinct(sums, masks):
    """One subset for each of the sums of the first half: the one that precedes the others.

    These sums begin the sums of the specification, so subsets with the same one are worth the same.
    """
    n = 0
    for i in range(1, len(sums)):
        if sums[i] != sums[n]:
            n += 1
            sums[n], masks[n] = sums[i], masks[i]
        elif _precedes(masks[i], masks[n]):
            masks[n] = masks[i]
    return sums[: n + 1], masks[: n + 1]


@compiled()
def _by_size(sums, masks, grouped, grouped_masks, start):
    """Copy the sums, size by size and ascending within: size a takes grouped[start[a] : start[a + 1]]."""
    for a in range(len(start)):
        start[a] = 0
    for i in range(len(sums)):
        start[_count(masks[i]) + 1] += 1
    for a in range(1, len(start)):
        start[a] += start[a - 1]
    free = start.copy()
    for i in range(len(sums)):
        a = _count(masks[i])
        grouped[free[a]], grouped_masks[free[a]] = sums[i], masks[i]
        free[a] += 1


@compiled(parallel=True)
def improve(values, targets, which, sizes, epsilon, mask, size, error):
    """Replace the solutions of the problems `which` by better ones, over subsets of all sizes.

    Args:
        values, targets: (n, m) and (n,) float64, m >= 2.
        which: (hard,) int64, the problems to look at.
        sizes: no subset of this size or below is within epsilon.
        epsilon: where a subset is within epsilon, the best one of the least such size is taken, else the best of
            all; negative for the best of all.
        mask, size, error: (n,) uint32, int64, float64; hold a subset and its error for each problem, and are changed.
    """
    m = values.shape[1]
    room = 1 << (m - 2 - (m - 2) // 2)
    for chunk in numba.prange((len(which) + CHUNK - 1) // CHUNK):
        useful, bits = np.empty(m), np.empty(m, np.int64)
        scratch, scratch_masks = np.empty((4, room)), np.empty((4, room), np.int64)
        fenced_left, fenced_right = np.empty(room + 1), np.empty(room + 1)
        missing, given = np.empty(4), np.empty(4, np.int64)
        left_start, right_start = np.empty(m, np.int64), np.empty(m, np.int64)
        for hard in range(chunk * CHUNK, min(len(which), (chunk + 1) * CHUNK)):
            p = which[hard]
            x, theta, best, least = values[p], targets[p], np.int64(mask[p]), error[p]
            free = _useful(x, theta, least, useful, bits) - 2
            half = free // 2
            reach = 0.0
            for s in range(free + 2):
                reach += abs(useful[s])
            if reach <= _UNIT / 4 * abs(theta):
                continue  # no subset changes the rounded error
            slack = 4 * (m + 2) * _UNIT * (reach + abs(theta))  # twice what another order of additions can change
            for c in range(4):
                missing[c], given[c] = theta, 0
                for s in range(2):
                    if c >> s & 1:
                        missing[c] -= useful[free + s]
                        given[c] |= bits[free + s]
            left, left_masks = _sorted_sums(
                useful[:half], bits[:half], scratch[0], scratch_masks[0], scratch[1], scratch_masks[1]
            )
            right, right_masks = _sorted_sums(
                useful[half:free], bits[half:free], scratch[2], scratch_masks[2], scratch[3], scratch_masks[3]
            )
            nl, nr = len(left), len(right)
            fenced_left[:nl], fenced_left[nl] = left, np.inf
            fenced_right[0], fenced_right[1 : nr + 1] = -np.inf, right
            best, least = _four_sweeps(
                x, theta, missing, given, slack, fenced_left[: nl + 1], left_masks, fenced_right[: nr + 1],
                right_masks, best, least,
            )  # fmt: skip
            if min(_least_gap(left), _least_gap(right)) <= 4 * slack:
                left, left_masks = _distinct(left, left_masks)
                for c in range(4):
                    best, least = _all_close(
                        x, theta, missing[c], given[c], slack, left, left_masks, right, right_masks, best, least
                    )
            if least <= epsilon:  # some subset is within epsilon: now the least size
                ls, lm, rs, rm = np.empty(room), np.empty(room, np.int64), np.empty(room), np.empty(room, np.int64)
                _by_size(left, left_masks, ls, lm, left_start[: half + 2])
                _by_size(right, right_masks, rs, rm, right_start[: free - half + 2])
                for k in range(sizes + 1, _count(best) + 1):
                    found, within = np.int64(-1), np.nextafter(epsilon, np.inf)
                    for c in range(4):
                        rest = k - _count(given[c])
                        for a in range(max(0, rest - (free - half)), min(half, rest) + 1):
                            l0, l1 = left_start[a], left_start[a + 1]
                            r0, r1 = right_start[rest - a], right_start[rest - a + 1]
                            found, within = _all_close(
                                x, theta, missing[c], given[c], slack, ls[l0:l1], lm[l0:l1], rs[r0:r1], rm[r0:r1],
                                found, within,
                            )  # fmt: skip
                    if within <= epsilon:
                        best, least = found, within
                        break
            mask[p], size[p], error[p] = best, _count(best), least

"""What one would use instead of the engine, to measure it against: a Python search, and a general exact solver."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ltx.errors import LtxError

GRID = 2.0**23  # CP-SAT takes integers, and gives wrong answers where an objective exceeds a double's 53 bits
Solution = tuple[int, float]  # size and error


def python_search(x: np.ndarray, theta: float, epsilon: float, selection: str) -> Solution:
    """Subsets by ascending size, one by one with numpy, as the paper's published code does (`main_ssa_stats.py`).

    Args:
        x: base set, (m,). theta, epsilon, selection: as in `ltx.subset_sum.solve`.
    """
    size, least = 0, abs(theta)
    for k in range(1, len(x) + 1):
        if selection == "smallest" and least <= epsilon:
            break
        for subset in combinations(range(len(x)), k):
            error = np.abs(theta - np.sum(x[np.array(subset)]))
            if error < least:
                size, least = k, error
    return size, float(least)


def cp_sat(x: np.ndarray, theta: float, epsilon: float, selection: str) -> Solution:
    """Google OR-tools' CP-SAT, one thread; exact for problems whose numbers are multiples of 1 / GRID.

    Raises:
        LtxError: OR-tools is not installed; numbers off the grid.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise LtxError("OR-tools is not installed; pip install ortools") from error
    if not all(float(v * GRID).is_integer() for v in (*x, theta)):
        raise LtxError("CP-SAT takes integers: base sets and targets must be multiples of 2^-23")
    weights, target = [int(v * GRID) for v in x], int(theta * GRID)
    bound = int(min(epsilon, sum(map(abs, x)) + abs(theta)) * GRID)

    def minimise(within: int | None) -> Solution | None:
        model = cp_model.CpModel()
        chosen = [model.new_bool_var(f"x{s}") for s in range(len(weights))]
        largest = sum(map(abs, weights)) + abs(target)
        error = model.new_int_var(0, largest if within is None else within, "error")
        total = sum(w * c for w, c in zip(weights, chosen, strict=True)) - target
        model.add(total <= error)
        model.add(-total <= error)
        size = sum(chosen)
        model.minimize(error * (len(x) + 1) + size if within is None else size * (within + 1) + error)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.catch_sigint_signal = False  # Ctrl-C is the caller's
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return None
        return sum(solver.value(c) for c in chosen), solver.value(error) / GRID

    found = minimise(bound) if selection == "smallest" else None
    found = found or minimise(None)
    assert found is not None  # the empty subset is always there
    return found

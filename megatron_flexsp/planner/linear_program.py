"""A linear or mixed-integer program, built column by column as arrays and solved by HiGHS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """What HiGHS found."""

    objective: float
    """The value of ``columns``."""

    columns: Floats
    """A value for each column."""

    row_duals: Floats
    """What the optimum gains for each unit of a row's limit; for linear programs only."""

    is_optimal: bool
    """Whether HiGHS proved that no better one exists (within its gap); else a limit stopped it."""


class _QuietHighs(highspy.Highs):
    """HiGHS 1.16 prints its name while it is constructed, when it can't have been told to be quiet."""

    def enableCallbacks(self) -> None:  # the first thing that its constructor calls
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


@dataclass
class LinearProgram:
    """Minimise cost x columns, every column at least 0 and every row within its limits."""

    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _costs: list[Floats] = field(default_factory=list)
    _column_uppers: list[Floats] = field(default_factory=list)
    _integers: list[NDArray[np.bool_]] = field(default_factory=list)
    _rows: list[NDArray[np.int64]] = field(default_factory=list)
    _columns: list[NDArray[np.int64]] = field(default_factory=list)
    _values: list[Floats] = field(default_factory=list)
    _num_columns: int = 0

    def add_row(self, lower: float = -math.inf, upper: float = math.inf) -> int:
        """A further row; returns its number."""
        self._lower.append(lower)
        self._upper.append(upper)
        return len(self._lower) - 1

    def add_rows(self, count: int, lower: float = -math.inf, upper: float = math.inf) -> NDArray[np.int64]:
        """Further rows with the same limits; returns their numbers."""
        first = len(self._lower)
        self._lower += [lower] * count
        self._upper += [upper] * count
        return np.arange(first, first + count)

    def add_columns(
        self,
        cost: ArrayLike,
        entries: Sequence[tuple[ArrayLike, ArrayLike]],
        *,
        upper: float = math.inf,
        is_integer: bool = False,
    ) -> NDArray[np.int64]:
        """Further columns; returns their numbers.

        Parameters
        ----------
        cost
            Cost of each column, shape (new columns,).
        entries
            Pairs of row and value, each a number or one for each new column.
        upper
            The greatest value of the new columns.
        is_integer
            Whether they are whole numbers.
        """
        costs = np.atleast_1d(np.asarray(cost, dtype=np.float64))
        count = len(costs)
        numbers = np.arange(self._num_columns, self._num_columns + count)
        self._num_columns += count
        self._costs.append(costs)
        self._column_uppers.append(np.full(count, upper))
        self._integers.append(np.full(count, is_integer))
        for row, value in entries:
            self._rows.append(np.broadcast_to(np.asarray(row, dtype=np.int64), (count,)))
            self._values.append(np.broadcast_to(np.asarray(value, dtype=np.float64), (count,)))
            self._columns.append(numbers)
        return numbers

    def solve(
        self,
        *,
        time_limit_seconds: float = math.inf,
        most_nodes: int | None = None,
        first_will_do: bool = False,
        seed: int = 0,
    ) -> Solution | None:
        """The best columns, or None where HiGHS has found none.

        Parameters
        ----------
        time_limit_seconds
            When HiGHS gives up and returns the best that it has.
        most_nodes
            With whole numbers, stop after so many nodes, which, unlike a time, is the same in every process.
        first_will_do
            With whole numbers, stop at the first columns that keep the rows.
        seed
            HiGHS breaks ties by it.
        """
        solver = _QuietHighs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", seed)
        if most_nodes is not None:
            solver.setOptionValue("mip_max_nodes", most_nodes)
        if first_will_do:
            solver.setOptionValue("mip_max_improving_sols", 1)
            solver.setOptionValue("mip_heuristic_run_feasibility_jump", False)  # it costs more than it finds here
        if math.isfinite(time_limit_seconds):
            solver.setOptionValue("time_limit", max(0.0, time_limit_seconds))
        has_integers = any(flags.any() for flags in self._integers)
        solver.passModel(self._model(has_integers))
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        is_optimal = status == highspy.HighsModelStatus.kOptimal
        if not is_optimal and not (
            has_integers and info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        ):
            return None
        found = solver.getSolution()
        return Solution(
            objective=float(info.objective_function_value),
            columns=np.array(found.col_value),
            row_duals=np.array([] if has_integers else found.row_dual),
            is_optimal=is_optimal,
        )

    def _model(self, has_integers: bool) -> highspy.HighsLp:
        columns = np.concatenate(self._columns)
        order = np.argsort(columns, kind="stable")
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self._num_columns, len(self._lower)
        model.col_cost_ = np.concatenate(self._costs)
        model.col_lower_ = np.zeros(self._num_columns)
        model.col_upper_ = np.concatenate(self._column_uppers)
        model.row_lower_, model.row_upper_ = np.array(self._lower), np.array(self._upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=self._num_columns))])
        model.a_matrix_.index_ = np.concatenate(self._rows)[order]
        model.a_matrix_.value_ = np.concatenate(self._values)[order]
        if has_integers:
            kinds = highspy.HighsVarType
            model.integrality_ = [
                kinds.kInteger if flag else kinds.kContinuous for flag in np.concatenate(self._integers).tolist()
            ]
        return model

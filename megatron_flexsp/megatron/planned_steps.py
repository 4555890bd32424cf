"""A cost model's own check: real batches, planned with it, predicted against measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from megatron.training import get_args
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError, named_by_flags
from megatron_flexsp.megatron.batches import PlannedBatch, SliceReader
from megatron_flexsp.megatron.context import Context
from megatron_flexsp.megatron.measured_steps import StepRunner
from megatron_flexsp.megatron.sequences import Sequences, SequenceSource
from megatron_flexsp.megatron.settings import PLANNER_FLAGS
from megatron_flexsp.planner import CostModel, Plan, step_seconds, usable_capacity


def repeated(seconds: Sequence[Sequence[float]], limit_seconds: float) -> list[int]:
    """Which steps to run next: all that did not run yet, and the short ones, which noise disturbs most, again.

    Parameters
    ----------
    seconds
        What each step took so far, on the slowest rank: so all ranks choose the same.
    limit_seconds
        What all runs of all steps may take, once each has run.
    """
    spent = sum(map(sum, seconds))
    chosen = [number for number, taken in enumerate(seconds) if not taken]
    for taken, number in sorted((taken[0], number) for number, taken in enumerate(seconds) if taken):
        spent += taken
        if spent > limit_seconds:
            break
        chosen.append(number)
    return chosen


class PlannedSteps:
    """Steps of the training data, over several choices of degrees.

    Parameters
    ----------
    runner, context
        Runs the steps; the run's groups.
    source, reader
        The training data, and what reads this rank's slices of it.
    tokens_per_rank
        Tokens that a rank can hold in one micro-batch.
    recomputed_tokens_per_rank
        The same where activations are recomputed; None: nowhere.
    """

    def __init__(
        self,
        runner: StepRunner,
        context: Context,
        source: SequenceSource,
        reader: SliceReader,
        tokens_per_rank: int,
        recomputed_tokens_per_rank: int | None,
    ) -> None:
        self._runner = runner
        self._context = context
        self._source = source
        self._reader = reader
        self._capacity = tokens_per_rank
        self._recomputed_capacity = recomputed_tokens_per_rank

    def plan(self, cost_model: CostModel | None) -> list[PlannedBatch]:
        """Batches of the training data, planned. Collective.

        Parameters
        ----------
        cost_model
            On the planning rank what plans rest on; None on the others.
        """
        batches = []
        for degrees, sequences in self._choices():
            lengths = sequences.lengths
            plan = self._context.channel.share(lengths, self._planned(cost_model, degrees, lengths))
            batches.append(self._runner.batch(plan, sequences, self._reader))
        return batches

    def compared(
        self, cost_model: CostModel, batches: Sequence[PlannedBatch], seconds: Sequence[Sequence[float]]
    ) -> list[dict[str, Any]]:
        """What each batch was, what that cost model predicts for its plan, and what it took."""
        stages = self._context.settings.pipeline_stages
        return [
            {
                "degrees": sorted({item.degree for item in batch.plan.micro_batches if not item.is_filler}),
                "micro_batches": len(batch.plan.micro_batches),
                "recomputed": sum(item.recomputed for item in batch.plan.micro_batches),
                "tokens": int(batch.lengths.sum()),
                "predicted_seconds": cost_model.step_overhead_seconds
                + step_seconds(batch.plan, batch.lengths, cost_model, pipeline_stages=stages),
                "measured_seconds": float(np.median(taken)),
                "repeats": len(taken),
            }
            for batch, taken in zip(batches, seconds, strict=True)
        ]

    def _planned(
        self, cost_model: CostModel | None, degrees: tuple[int, ...], lengths: NDArray[np.int64]
    ) -> Plan | FlexSPError | None:
        """On the planning rank a plan under the new cost model, or why there is none."""
        if cost_model is None:
            return None
        request = self._context.request
        measured = replace(
            request,
            cost_model=cost_model,
            token_capacity=self._capacity,
            recomputed_token_capacity=self._recomputed_capacity,
            options={**request.options, "degrees": degrees},
        )
        try:
            with named_by_flags(PLANNER_FLAGS):
                return measured.make(lengths)
        except FlexSPError as error:
            return error

    def _choices(self) -> Iterator[tuple[tuple[int, ...], Sequences]]:
        """Degrees that a plan may use, and sequences that they can hold: all, the widest and others, narrow ones.

        Collective.
        """
        settings, size = self._context.settings, get_args().global_batch_size
        degrees = settings.degrees
        widest = degrees[-1]
        choices = [degrees, degrees, degrees, (widest,)]
        choices += [(degree, widest) for degree in degrees[:-1] if len(degrees) > 2]
        choices += [degrees[:count] for count in range(1, len(degrees))]
        total, begin = len(self._source), 0
        static = settings.schedule == "static"
        for allowed in choices[:1] if static else choices:
            found = self._source.sequences([(begin + k) % total for k in range(size)], self._context.channel)
            begin += size
            most = self._recomputed_capacity or self._capacity
            room = allowed[-1] * usable_capacity(most, settings.slice_multiple)
            fitting = found.chosen(found.lengths <= room)
            if len(fitting.lengths):
                yield allowed, fitting

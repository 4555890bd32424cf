"""FlexSP inside Megatron's training: its data, its forward step, and the micro-batches of each step."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.utils import StragglerDetector
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training import training as megatron_training
from numpy.typing import NDArray
from torch import Tensor

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import releases
from megatron_flexsp.megatron.autotune import Autotune
from megatron_flexsp.megatron.background import Background
from megatron_flexsp.megatron.batches import (
    GivenBatch,
    LocalMicroBatch,
    PlannedBatch,
    PlannedBatches,
    SliceReader,
    batches_from,
)
from megatron_flexsp.megatron.context import Context, build_context, on_cpu
from megatron_flexsp.megatron.data import build_sources, evaluation_batch_size, train_batch_size
from megatron_flexsp.megatron.drift import DriftWatch, profile_command
from megatron_flexsp.megatron.dropout import has_dropout, seed_dropout
from megatron_flexsp.megatron.multi_token_prediction import Successors, logs_each_token
from megatron_flexsp.megatron.packed_attention import FlexSPPackedSeqParams
from megatron_flexsp.megatron.recomputation import asked_configurations, each_layer_recomputed
from megatron_flexsp.megatron.routers import RoutedPack, check_routers, routed
from megatron_flexsp.megatron.sequences import SequenceSource, TokenSource
from megatron_flexsp.megatron.settings import Settings
from megatron_flexsp.megatron.step_log import log_step
from megatron_flexsp.megatron.tracing import Tracer
from megatron_flexsp.megatron.validation import WholeSet, all_batches
from megatron_flexsp.planner import Plan

Iterators = tuple[PlannedBatches | None, PlannedBatches | list[WholeSet] | None, PlannedBatches | None]
"""Of training, validation and test."""

_LAST_PLANS_SECONDS = 30.0
"""Plans that are still under way when training ends are waited for, so that no group is destroyed under them."""


class FlexSPTraining:
    """Stands between Megatron's ``pretrain`` and the user's script."""

    def __init__(self) -> None:
        self._configured: Settings | None = None
        self._context: Context | None = None
        self._iterators: Iterators | None = None
        self._accounted: Plan | None = None
        self._lengths: NDArray[np.int64] | None = None
        self._tracer: Tracer | None = None
        self._drift: DriftWatch | None = None
        self._autotune: Autotune | None = None
        self._background: Background | None = None
        self._batch_tokens = 0
        self._recomputing: dict[Any, tuple[Any, ...]] = {}
        """For each model, once it is checked, the configurations that say whether its layers recompute."""

    def configure(self, settings: Settings) -> None:
        """Take the checked flags; Megatron has parsed them by now."""
        self._configured = settings

    @property
    def is_configured(self) -> bool:
        """Whether the flags have been taken before."""
        return self._configured is not None

    @property
    def _settings(self) -> Settings:
        assert self._configured is not None
        return self._configured

    @property
    def context(self) -> Context:
        """The run's groups and cost model; there once the data is built."""
        assert self._context is not None
        return self._context

    def settle(self, limit_seconds: float) -> bool:
        """Wait until the thread behind training has shared and read all that it was asked for; whether it has.

        Before this thread speaks with the other hosts itself: two threads' collectives would mix.
        """
        return self._background is None or self._background.finish(limit_seconds)

    def wrap_pretrain(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``pretrain`` with our data and forward step in place of the script's."""

        @functools.wraps(original)
        def pretrain(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(*args, **kwargs)
            if bound.arguments.get("process_non_loss_data_func") is not None:
                raise FlexSPError("the script passes process_non_loss_data_func to pretrain: it is not supported")
            script_step = bound.arguments["forward_step_func"]
            script_provider = bound.arguments["train_valid_test_dataset_provider"]
            bound.arguments["train_valid_test_dataset_provider"] = self._dataset_provider(script_provider)
            bound.arguments["forward_step_func"] = functools.partial(self._forward_step, _script_loss(script_step))
            result = original(*bound.args, **bound.kwargs)
            self.settle(_LAST_PLANS_SECONDS)
            return result

        return pretrain

    def wrap_get_forward_backward_func(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``get_forward_backward_func`` whose function runs a plan's micro-batches."""

        @functools.wraps(original)
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            return functools.partial(self._run_step, original(*args, **kwargs))

        return get_forward_backward_func

    def _run_step(
        self,
        schedule: Callable[..., Any],
        *,
        data_iterator: Any,
        num_microbatches: int,
        forward_only: bool = False,
        **others: Any,
    ) -> Any:
        """One step of training or evaluation: ``schedule`` on this rank's micro-batches of the next plan."""
        chunks = len(data_iterator) if isinstance(data_iterator, list) else None
        # Under interleaving every model chunk has an iterator, all of the same object; one batch serves all.
        iterator = data_iterator if chunks is None else data_iterator[0]
        # Inside Megatron's RerunDataIterator; a WholeSet may be in a generator there.
        batches = iterator.iterable
        batch: Any = next(iterator, None)
        tracer = None
        if forward_only:
            for watch in (self._drift, self._autotune):
                if watch is not None:
                    watch.pause()
        if isinstance(batches, PlannedBatches):
            batch = batches.expect(batch, num_microbatches * self._settings.domain_size)
            if not forward_only and batch.plan is not self._accounted:
                # Once for each batch, though Megatron runs it again where it checks for faults. Before the
                # schedule, so that copying the lengths waits for nothing.
                self._account(batch)
                log_step(self.context, batch)
                self._watch_time(batch)
                self._accounted = batch.plan
            tracer = None if forward_only else self._tracer
        if tracer is not None:
            tracer.begin(get_args().curr_iteration + 1, batch)
        self._batch_tokens = int(batch.lengths.sum())
        if not forward_only and has_dropout(get_args()):
            seed_dropout(get_args(), self.context.domain_rank)
        micro_batches = batch.micro_batches
        if chunks is not None:
            releases.keep_what_is_being_sent(others["model"])
        result = schedule(
            data_iterator=iter(micro_batches) if chunks is None else [iter(micro_batches) for _ in range(chunks)],
            num_microbatches=len(micro_batches),
            forward_only=forward_only,
            **others,
        )
        if tracer is not None:
            tracer.end()
        # Only asks: the thread behind training agrees with the other ranks on the steps after the next.
        if isinstance(batches, (PlannedBatches, GivenBatch)):
            batches.prepare()
        return result

    def _watch_time(self, batch: PlannedBatch) -> None:
        if self._drift is not None and (warning := self._drift.begin_step(batch.plan.predicted_seconds)) is not None:
            print_rank_0(f" > [flexsp] warning: {warning}")
        if self._autotune is not None:
            self._autotune.begin_step(batch.plan, batch.lengths)

    def wrap_num_floating_point_operations(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``num_floating_point_operations`` of the last step, for releases that take all sequences for equally long."""

        @functools.wraps(original)
        def num_floating_point_operations(args: Any, batch_size: int) -> Any:
            if self._lengths is None:
                return original(args, batch_size)
            return releases.count_operations(original, args, self._lengths)

        return num_floating_point_operations

    def _account(self, batch: PlannedBatch) -> None:
        """Tell Megatron's count of operations which sequences ran here; it adds the ranks up, so each counts once."""
        self._lengths = batch.lengths
        if not releases.sequences_report_lengths():
            return
        bounds = [0]
        for item in batch.micro_batches:
            if item.layout.member == 0:
                for length in item.layout.lengths:
                    bounds.append(bounds[-1] + length)
        if len(bounds) == 1:
            bounds.append(0)  # every rank must report, or the sum over the ranks hangs
        counted = torch.tensor(bounds, dtype=torch.int32)
        # From pinned memory, so that the host doesn't wait for what the device still has to do of the step before.
        megatron_training.update_seqlen_stats_from_cu_seqlens(counted if on_cpu() else _on_device(counted.pin_memory()))

    def _forward_step(
        self, script_loss: Callable[..., Any], data_iterator: Iterator[LocalMicroBatch], model: Any
    ) -> tuple[Tensor, Callable[..., Any]]:
        """Run the model on the next micro-batch; the script's own loss function follows."""
        if model not in self._recomputing:
            _check_attention(model)
            check_routers(model)
            self._recomputing[model] = asked_configurations(model)
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        item = next(data_iterator)
        tokens, labels, loss_mask = (_to_device(x) for x in (item.tokens, item.labels, item.loss_mask))
        positions, cu_seqlens = _to_device(item.positions), _to_device(item.cu_seqlens)
        assert positions is not None and cu_seqlens is not None
        group = self.context.groups.group(item.first_rank, item.layout.degree)
        ring = None if item.ring is None else item.ring.with_table(_on_device(item.ring.table))
        params = FlexSPPackedSeqParams.of(
            item.layout, group, positions, cu_seqlens, ring, self._settings.exchange_parts
        )
        tokens_1t, positions_1t = None if tokens is None else tokens.unsqueeze(0), positions.unsqueeze(0)
        if item.further is not None:
            assert tokens_1t is not None
            params.successors = Successors(item.further.map(_on_device), tokens_1t, positions_1t)
        timers("batch-generator").stop()
        micro_batches_expected = num_microbatches_calculator.get_num_microbatches()
        pack = RoutedPack(params, self._batch_tokens, self._settings.domain_size, micro_batches_expected)
        # As in Megatron's own forward step: --log-straggler divides by the time that it sees here.
        watched = StragglerDetector()
        recomputing = each_layer_recomputed(self._recomputing[model]) if item.recomputed else nullcontext()
        traced = nullcontext() if self._tracer is None else self._tracer.forward(item)
        with routed(pack), recomputing, watched, traced:
            output = model(
                tokens_1t,
                positions_1t,
                None,
                labels=None if labels is None else labels.unsqueeze(0),
                packed_seq_params=params,
            )
        if self._tracer is not None:
            self._tracer.watch_backward(item, output)
        return output, functools.partial(script_loss, loss_mask, model=model)

    def _dataset_provider(self, of_script: Callable[..., Any]) -> Callable[..., Any]:
        def provider(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> Any:
            if self._iterators is None:
                self._iterators = self._build(num_samples, of_script)
            return self._iterators

        provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron reads it: every rank calls
        return provider

    def _build(self, num_samples: tuple[int, int | None, int], of_script: Callable[..., Any]) -> Iterators:
        """Collective: data first, then groups, then the iterators over planned batches."""
        args, settings = get_args(), self._settings
        sources = build_sources(args, settings, num_samples, of_script)
        if getattr(args, "sft", False):
            # Megatron's evaluation would average over micro-batches instead of tokens, which depends on the plan.
            args.sft = False
            print_rank_0(" > [flexsp] arguments set to what it needs, now that the data is built: sft=False")
        parts = sources.parts
        longest = max(parts, key=lambda part: part.longest)
        self._context = build_context(args, settings, longest.longest, longest.name)
        if settings.trace is not None:
            self._tracer = Tracer(Path(settings.trace), self.context)
        _announce(self.context)
        if settings.cost_model is not None and self.context.channel.plans_here and not settings.autotune:
            path = args.flexsp_cost_model
            overhead = settings.cost_model.step_overhead_seconds
            self._drift = DriftWatch(path, overhead, profile_command(sys.argv, path))
        for part in parts:
            print_rank_0(f" > [flexsp] {part.describe()}")
        # CUDA's current device is each thread's own.
        begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
        self._background = Background("flexsp-batches", (lambda: None) if on_cpu() else begin)
        if settings.autotune and self.context.planner is not None:
            self._autotune = Autotune(
                self.context.cost_model,
                settings.pipeline_stages,
                use=self.context.planner.use,
                tell=lambda change: print_rank_0(f" > [flexsp] autotune: {change}"),
                submit=self._background.submit,
            )
        train = self._batches_of(sources.train, args.consumed_train_samples, train_batch_size)
        if args.full_validation:
            sets = [self._whole_set(source) for source in sources.validation]
            # Megatron would ask the test set for as many batches as validation has.
            return train, sets, None
        consumed = 0 if args.skip_train else args.consumed_valid_samples
        validation = self._batches_of(sources.validation[0], consumed, evaluation_batch_size)
        return train, validation, self._batches_of(sources.test, 0, evaluation_batch_size)

    def reader(self, source: TokenSource) -> SliceReader:
        """Reads this rank's slices of what a source holds."""
        args = get_args()
        first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
        # A layout may put what predicts further tokens on any stage.
        anywhere = args.mtp_num_layers and getattr(args, "pipeline_model_parallel_layout", None)
        return SliceReader(
            source,
            self.context.domain_rank,
            self._settings.slice_multiple,
            reads_tokens=bool(first(ignore_virtual=True) or last(ignore_virtual=True) or anywhere),
            gpu=None if on_cpu() else torch.cuda.current_device(),
            query_heads=self._settings.query_heads,
            further_depths=args.mtp_num_layers or 0,
            logs_each_token=logs_each_token(),
        )

    @property
    def training_source(self) -> SequenceSource:
        """The samples to train on; there once the data is built."""
        assert self._iterators is not None
        batches = self._iterators[0]
        assert batches is not None
        return batches.source

    def _batches_of(
        self, source: SequenceSource | None, consumed: int, size_at: Callable[[int], int]
    ) -> PlannedBatches | None:
        return None if source is None else self._planned(source, batches_from(consumed, len(source), size_at))

    def _whole_set(self, source: SequenceSource | None) -> WholeSet:
        assert source is not None
        batches = all_batches(len(source), evaluation_batch_size())
        return WholeSet(len(batches), lambda: self._planned(source, iter(batches)))

    def _planned(self, source: SequenceSource, batches: Iterator[range]) -> PlannedBatches:
        assert self._background is not None
        context = self.context
        return PlannedBatches(
            source,
            self.reader(source),
            context.channel,
            batches,
            context.planner,
            context.settings.plan_ahead,
            self._background,
        )


def _check_attention(model: Any) -> None:
    """Refuse a model whose layers would attend over slices without knowing that they are slices."""
    for name, module in model.named_modules():
        if name.endswith("core_attention") and type(module) not in (DotProductAttention, TEDotProductAttention):
            raise FlexSPError(
                f"the model's {name} is a {type(module).__name__}; FlexSP works with Megatron's own "
                "TEDotProductAttention and DotProductAttention (--transformer-impl transformer_engine or local)"
            )


def _script_loss(script_step: Any) -> Callable[..., Any]:
    """The ``loss_func`` that stands beside the script's forward step."""
    function = inspect.unwrap(script_step)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    loss = getattr(function, "__globals__", {}).get("loss_func")
    if loss is None:
        raise FlexSPError(
            f"the script's forward step ({getattr(function, '__module__', function)}) has no loss_func(loss_mask, "
            "output_tensor, model) beside it, as Megatron's pretrain_gpt.py has; FlexSP needs it"
        )
    if "model" in inspect.signature(loss).parameters:
        return loss  # type: ignore[no-any-return]
    return lambda loss_mask, output_tensor, model=None: loss(loss_mask, output_tensor)


def _to_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _on_device(tensor)


def _on_device(tensor: Tensor) -> Tensor:
    return tensor.to(device=torch.cuda.current_device(), non_blocking=True)


def _announce(context: Context) -> None:
    settings = context.settings
    degrees = settings.degrees if context.static_degree is None else (context.static_degree,)
    recomputed = context.recomputed_token_capacity
    print_rank_0(
        f" > [flexsp] {settings.schedule} schedule over {settings.domain_size} data-parallel ranks, degrees "
        f"{', '.join(map(str, degrees))}; {context.token_capacity:,} tokens a rank and micro-batch"
        + ("; " if recomputed is None else f", {recomputed:,} where activations are recomputed; ")
        + f"{context.groups.communicators} communicators on this rank"
    )
    if context.cost_model.note:
        print_rank_0(f" > [flexsp] cost model: {context.cost_model.note}")

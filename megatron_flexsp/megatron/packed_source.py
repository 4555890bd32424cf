"""``--flexsp-samples packed``: the script's own data sets, whose samples are packs of sequences.

Megatron's counts go to the script's provider, and its samples keep their order. Lengths are in no index: the samples of
a coming batch are dealt to all ranks, each reads its part ahead of time, and all hear the lengths. Then each rank reads
those samples that it has a slice of.
"""

from __future__ import annotations

import inspect
import signal
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.packed_samples import Pack, Unpacking, unpack
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.megatron.sample_readers import SampleReaders
from megatron_flexsp.megatron.sequences import Sequences, Stretch

_CACHE_BYTES = 256 << 20
"""Samples that a rank keeps, beside those that it needs now."""

_SPLITS = ("training", "validation", "test")


class PackedSequence(NamedTuple):
    """A sequence, by the sample that it is in."""

    sample: int
    start: int
    """Its first token in the sample."""
    checksum: int
    """The sample's, when its lengths were read."""


class PackedSource:
    """The packs of one split.

    Parameters
    ----------
    dataset
        The script's: ``len`` and items.
    name
        What errors call it.
    how
        What the job asks of packs.
    workers, ignored
        Processes that read, and a signal that they don't heed.
    """

    has_index = False

    def __init__(
        self, dataset: Any, name: str, how: Unpacking, workers: int = 0, ignored: signal.Signals | None = None
    ) -> None:
        self._dataset = dataset
        self.name = name
        self._how = how
        self._readers = SampleReaders(self._read, workers, ignored)
        self._cache: OrderedDict[int, Pack] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def parts(self) -> list[PackedSource]:
        """Itself: what a blend is made of is the script's own."""
        return [self]

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return self._how.longest

    def describe(self) -> str:
        """One line for the log."""
        kept = "" if self._how.unlearned_count else ", each up to the last label that counts"
        return f"{self.name}: {len(self):,} packed samples; their sequences are planned{kept}"

    def sequences(self, samples: Sequence[int], channel: PlanChannel) -> Sequences:
        """The sequences of these samples, in the samples' order. Collective."""
        mine = range(channel.rank, len(samples), channel.size)
        packs = channel.together(lambda: self._packs([samples[place] for place in mine]))
        heads = np.zeros((len(samples), 2), dtype=np.int64)
        for place, pack in zip(mine, packs, strict=True):
            heads[place] = len(pack.starts), pack.checksum
        heads = channel.sum(heads)
        ends = np.cumsum(heads[:, 0])
        bounds = np.zeros((int(ends[-1]), 2), dtype=np.int64)
        for place, pack in zip(mine, packs, strict=True):
            bounds[ends[place] - len(pack.starts) : ends[place]] = np.stack((pack.starts, pack.lengths), axis=1)
        bounds = channel.sum(bounds)
        owners = np.arange(len(samples)).repeat(heads[:, 0])
        if not len(bounds):
            # A step must have something to run: one token whose label doesn't count.
            bounds, owners = np.array([[0, 1]]), np.array([0])
        handles = [
            PackedSequence(samples[place], start, int(heads[place, 1]))
            for place, start in zip(owners.tolist(), bounds[:, 0].tolist(), strict=True)
        ]
        return Sequences(bounds[:, 1], handles, len(samples))

    def prepare(self, handles: Iterable[PackedSequence]) -> None:
        """Have these sequences at hand: the next that are read."""
        checksums = {handle.sample: handle.checksum for handle in handles}
        for (sample, checksum), pack in zip(checksums.items(), self._packs(list(checksums)), strict=True):
            if pack.checksum != checksum:
                raise FlexSPError(
                    f"{self.name}: sample {sample} is not what it was when its batch was planned. Several ranks read "
                    "each sample, so it must be the same every time and everywhere: random choices in the data set "
                    "must follow from the sample's number, and every node must see the same files"
                )

    def stretch(self, handle: PackedSequence, start: int, count: int) -> Stretch:
        """``count`` tokens of a sequence that was prepared, from ``start``, with their labels."""
        return self._cache[handle.sample].stretch(handle.start + start, count)

    def learned(self, handle: PackedSequence, length: int) -> NDArray[np.bool_] | None:
        """Which labels of a sequence of so many tokens count."""
        return self.stretch(handle, 0, length).learned

    def _packs(self, samples: list[int]) -> list[Pack]:
        """These samples, taken apart. Others make room where the cache is full."""
        missing = list(dict.fromkeys(sample for sample in samples if sample not in self._cache))
        for sample, found in zip(missing, self._readers.read(missing), strict=True):
            if isinstance(found, str):
                raise FlexSPError(found)
            self._cache[sample] = found
            self._cached_bytes += found.nbytes
        for sample in samples:
            self._cache.move_to_end(sample)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > len(samples):
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return [self._cache[sample] for sample in samples]

    def _read(self, sample: int) -> Pack | str:
        """One sample, taken apart, or why there is none; runs in a process of its own."""
        try:
            return unpack(self._dataset[sample], self._how)
        except FlexSPError as error:
            return f"{self.name}: sample {sample} can't be planned: {error}"
        except Exception as error:  # the script's own code
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}, line {last.lineno}"
            return f"{self.name}: sample {sample} can't be read: {type(error).__name__}: {error} ({where})"


ScriptSources = tuple[PackedSource | None, tuple[PackedSource | None, ...], PackedSource | None]


def script_sources(args: Any, provider: Callable[..., Any], num_samples: Sequence[int | None]) -> ScriptSources:
    """The data sets of the script's provider. Collective over the world.

    Parameters
    ----------
    args
        Megatron's validated arguments.
    provider
        ``train_valid_test_datasets_provider``.
    num_samples
        Megatron's counts for the three splits.

    Raises
    ------
    FlexSPError
        Where a data set is none that can be read by number, or ranks have got different ones.
    """
    options = {}
    if "vp_stage" in inspect.signature(provider).parameters:
        options["vp_stage"] = None if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None else 0
    with _as_first_rank():
        train, validation, test = provider(num_samples, **options)
    sets = validation if isinstance(validation, (list, tuple)) else [validation]
    named = [(_SPLITS[0], train), *((_SPLITS[1], dataset) for dataset in sets), (_SPLITS[2], test)]
    found = [_source(args, dataset, split) for split, dataset in named]
    _agree([None if source is None else len(source) for source in found], [split for split, _ in named])
    return found[0], tuple(found[1:-1]), found[-1]


def unpacking(args: Any) -> Unpacking:
    """What a job asks of its packs, by Megatron's arguments."""
    coefficients = np.atleast_1d(np.array(getattr(args, "moe_aux_loss_coeff", 0.0) or 0.0, dtype=float))
    balances = bool(coefficients.any() or args.moe_z_loss_coeff or args.moe_router_enable_expert_bias)
    return Unpacking(
        longest=args.seq_length,
        positions_count=args.position_embedding_type == "learned_absolute",
        unlearned_count=bool(args.num_experts) and balances,
    )


@contextmanager
def _as_first_rank() -> Iterator[None]:
    """Megatron's ranks as those of the first stage's first tensor-parallel rank.

    Scripts build data sets there alone, where Megatron's own loop reads them; here every rank reads. Collectives know
    their own ranks and go on as they are.
    """
    parallel_state.set_tensor_model_parallel_rank(0)
    parallel_state.set_pipeline_model_parallel_rank(0)
    try:
        yield
    finally:
        parallel_state.set_tensor_model_parallel_rank(None)
        parallel_state.set_pipeline_model_parallel_rank(None)


def _source(args: Any, dataset: Any, split: str) -> PackedSource | None:
    if dataset is None:
        return None
    kind = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise FlexSPError(
            f"--flexsp-samples packed: the script's {split} set is a {kind}, whose samples can't be read by number. It "
            "must have __len__ and __getitem__, as PyTorch's map-style data sets have"
        )
    if not len(dataset):
        return None
    ignored = getattr(args, "exit_signal", signal.SIGTERM) if args.exit_signal_handler else None
    return PackedSource(dataset, f"the script's {split} set ({kind})", unpacking(args), args.num_workers, ignored)


def _agree(sizes: list[int | None], splits: list[str]) -> None:
    """Stop all ranks where some have another data set than others, or none."""
    device = "cpu" if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    numbers = torch.tensor([-1 if size is None else size for size in sizes], dtype=torch.int64, device=device)
    bounds = torch.stack((numbers, -numbers))
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    for split, most, least in zip(splits, bounds[0].tolist(), (-bounds[1]).tolist(), strict=True):
        if most != least:
            raise FlexSPError(
                f"--flexsp-samples packed: the script's {split} set has {most:,} samples on some ranks and "
                f"{'is not there' if least < 0 else f'{least:,}'} on others. Every rank reads samples, so the provider "
                "must build the same data set on all of them"
            )

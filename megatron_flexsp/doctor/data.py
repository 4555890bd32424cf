"""A job's files: are they there, and how long are the documents?"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split
from numpy.typing import NDArray

from megatron_flexsp.doctor.findings import Finding, error, ok, refused, warning
from megatron_flexsp.doctor.tokenizer import examine_tokenizer
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.conversations import tokenization_of
from megatron_flexsp.megatron.mock_documents import mock_lengths
from megatron_flexsp.megatron.settings import Settings
from megatron_flexsp.megatron.stored_documents import check_files
from megatron_flexsp.planner.batches import with_longest
from megatron_flexsp.simulator.document_lengths import count_documents, read_document_lengths

Lengths = NDArray[np.int64]

_DOCUMENTS_READ = 1_000_000
"""Of all data sets together: reading the lengths of a whole web corpus takes longer than a doctor may."""

_JSON_LINES = "give the path of a file of JSON lines, which --sft takes"
_TRACKER = "latest_checkpointed_iteration.txt"


class _NotTokenizedError(Exception):
    """The lengths of conversations are not known yet."""


@dataclass(frozen=True)
class Corpus:
    """The sequences of a job, or a sample of them."""

    sequences: Lengths
    """Tokens of each, after ``--flexsp-overlong``."""

    name: str
    is_sample: bool
    """Whether longer ones may exist."""


def examine_files(args: argparse.Namespace) -> Generator[Finding, None, None]:
    """Data sets, tokenizer and the checkpoint to go on from."""
    yield from _examine_data_sets(args)
    yield from examine_tokenizer(args)
    yield from _examine_load(args)


def _blends(args: argparse.Namespace) -> list[tuple[list[str], list[float] | None]]:
    """Data sets and weights: one blend for all splits, or those of the splits; the training one first."""
    if args.mock_data:
        return []
    blend, per_split = get_blend_and_blend_per_split(args)
    return [found for found in ([blend] if blend is not None else per_split or ()) if found is not None]


def _examine_data_sets(args: argparse.Namespace) -> Iterator[Finding]:
    if args.flexsp_samples == "packed":
        yield ok("data", "--flexsp-samples packed: the script's own data sets, which are not looked at here")
        return
    if args.mock_data:
        yield ok("data", "--mock-data")
        return
    try:
        blends = _blends(args)
    except Exception as problem:
        yield error("data", f"the list of data sets can't be read: {problem}", "correct --data-path or its file")
        return
    prefixes = list(dict.fromkeys(prefix for names, _ in blends for prefix in names))
    if not prefixes:
        yield error("data", "no --data-path and no --mock-data", "give one; flexsp prepare makes one of text")
        return
    broken = 0
    for prefix in prefixes:
        if is_object_storage_path(prefix):
            yield warning("data", f"{prefix}: object storage is not looked at", "the job will")
            continue
        try:
            if getattr(args, "sft", False):
                _check_conversations(prefix)
                continue
            check_files(prefix)
            if not os.access(f"{prefix}.bin", os.R_OK):
                raise FlexSPError(f"{prefix}.bin can't be read", "correct its permissions")
        except FlexSPError as problem:
            broken += 1
            yield refused("data", problem)
        except OSError as problem:
            broken += 1
            yield error("data", f"{prefix} can't be read: {problem}", "correct the path or its permissions")
    if not broken:
        yield ok("data", f"{prefixes[0]}" + (f" and {len(prefixes) - 1} more" if len(prefixes) > 1 else ""))


def _check_conversations(path: str) -> None:
    """Refuse what --sft could not read, by its first line."""
    try:
        with open(path, encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except OSError as problem:
        raise FlexSPError(f"{path}: cannot read ({problem.strerror})", _JSON_LINES) from None
    except ValueError as problem:
        raise FlexSPError(f"{path}: line 1 is no JSON ({problem})", _JSON_LINES) from None
    if not isinstance(first, dict) or "messages" not in first:
        raise FlexSPError(f"{path}: line 1 has no messages", "make each line an object with a list of them")


def examine_steps(args: argparse.Namespace) -> Generator[Finding, None, None]:
    """How long the job trains and when it evaluates: what Megatron doesn't check and then stumbles over."""
    if not args.train_iters and not args.train_samples and not args.skip_train:
        yield error("steps", "neither --train-iters nor --train-samples", "say how long to train")
    elif args.eval_interval is None and not args.skip_train:
        yield error(
            "steps",
            "no --eval-interval: Megatron divides by it, evaluation or not, and ends with a TypeError",
            "give it; where nothing is to be evaluated, beside --eval-iters 0",
        )
    own = args.mock_data or args.flexsp_samples == "packed"
    if args.eval_iters and args.split and not own and len(parts := args.split.split(",")) > 1:
        with suppress(ValueError):
            if float(parts[1]) == 0:
                yield error(
                    "steps",
                    f"--eval-iters {args.eval_iters} asks for validation, but --split {args.split} leaves no documents "
                    "for it",
                    "give it a part, or set --eval-iters 0",
                )


def _examine_load(args: argparse.Namespace) -> Iterator[Finding]:
    if args.load is None:
        return
    if os.path.isfile(os.path.join(args.load, _TRACKER)):
        with suppress(OSError):
            at = Path(args.load, _TRACKER).read_text(encoding="utf-8").strip()
            yield ok("load", f"{args.load}: checkpoint of iteration {at}")
        return
    found = f"--load {args.load} holds no checkpoint (no {_TRACKER})"
    if args.exit_on_missing_checkpoint:
        yield error("load", found, "correct the path, or take --exit-on-missing-checkpoint out")
    elif args.load == args.save:
        yield ok("load", f"{args.load} holds no checkpoint yet: training begins anew")
    else:
        yield warning("load", f"{found}: Megatron begins with random weights", "correct the path, or take --load out")


def examine_lengths(args: argparse.Namespace, settings: Settings) -> Generator[Finding, None, Corpus | None]:
    """What the documents become; returns the corpus, or None where there is none to read."""
    if settings.samples == "packed":
        yield ok("lengths", "packed samples are read a few steps before they are needed, and their lengths known then")
        return None
    try:
        documents, name, total = _documents(args, settings)
    except _NotTokenizedError as problem:
        yield ok(
            "lengths", f"{problem}: its conversations are tokenised at the first start, and their lengths known then"
        )
        return None
    except (FlexSPError, OSError) as problem:
        if args.mock_data and isinstance(problem, FlexSPError):
            yield refused("lengths", problem)
        return None
    if not len(documents):
        if total:
            yield error("lengths", f"{name}: no document has two tokens or more", "make the data set again")
        return None
    yield from _examine_overlong(args, settings, documents)
    overlong = "split" if settings.overlong == "error" else settings.overlong
    sequences = with_longest(documents, args.seq_length, overlong)
    if not len(sequences):
        yield error(
            "lengths",
            f"every document is longer than --seq-length {args.seq_length:,}, and --flexsp-overlong drops them",
            "raise --seq-length, or choose split or truncate",
        )
        return None
    is_sample = total > len(documents)
    whole = f"{total:,} documents" + (f" (a sample of {len(documents):,})" if is_sample else "")
    percentiles = np.percentile(sequences, [50, 99])
    yield ok(
        "lengths",
        f"{whole}: sequences of median {percentiles[0]:,.0f}, mean {sequences.mean():,.0f}, 99% up to "
        f"{percentiles[1]:,.0f}, longest {sequences.max():,} tokens",
    )
    if len(sequences) < args.global_batch_size and not is_sample:
        yield warning(
            "lengths",
            f"{len(sequences):,} sequences are less than a --global-batch-size of {args.global_batch_size:,}",
            "a step then sees some of them twice; --global-batch-size counts documents",
        )
    return Corpus(sequences, name, is_sample)


def _documents(args: argparse.Namespace, settings: Settings) -> tuple[Lengths, str, int]:
    """Tokens that the documents predict (those of a blend by their weights), a name, and how many there are in all."""
    if args.mock_data:
        lengths = mock_lengths(settings.mock_lengths, args.seq_length, args.seed)
        return lengths, "mock data", len(lengths)
    blends = [
        (_index_of(args, prefix), None if weights is None else weights[place])
        for prefixes, weights in _blends(args)[:1]
        for place, prefix in enumerate(prefixes)
        if not is_object_storage_path(prefix)
    ]
    if not blends:
        return np.zeros(0, dtype=np.int64), "", 0
    name = blends[0][0] + (f" and {len(blends) - 1} more" if len(blends) > 1 else "")
    counts = [count_documents(prefix) for prefix, _ in blends]
    each = max(1000, _DOCUMENTS_READ // len(blends))
    read = [read_document_lengths(prefix, at_most=each) for prefix, _ in blends]
    if len(read) == 1:
        return read[0], name, counts[0]
    return _mixed(read, [weight for _, weight in blends], counts), name, sum(counts)


def _index_of(args: argparse.Namespace, path: str) -> str:
    """The prefix of a data set; of conversations, that of their tokens."""
    if not getattr(args, "sft", False):
        return path
    tokenization = tokenization_of(args, path, tokenizer=None)
    if not tokenization.is_there:
        raise _NotTokenizedError(path)
    return tokenization.prefix


def _mixed(read: Sequence[Lengths], weights: Sequence[float | None], counts: Sequence[int]) -> Lengths:
    """Documents of several data sets as often as a blend shows them; the longest of each stays in."""
    shares = np.array([count if weight is None else weight for weight, count in zip(weights, counts, strict=True)])
    shares = shares / shares.sum()
    # As many draws as the data set that is seen least often, for its size, allows without repeating.
    total = min(len(part) / share for part, share in zip(read, shares, strict=True) if share > 0 and len(part))
    generator = np.random.default_rng(0)
    drawn = []
    for part, share in zip(read, shares, strict=True):
        if share > 0 and len(part):
            size = min(len(part), max(1, round(total * share)))
            drawn.append(generator.choice(part, size, replace=False))
            drawn[-1][0] = part.max()
    return np.concatenate(drawn)


def _examine_overlong(args: argparse.Namespace, settings: Settings, documents: Lengths) -> Iterator[Finding]:
    """What becomes of documents beyond --seq-length."""
    limit = args.seq_length
    longer = documents[documents > limit]
    if not len(longer):
        yield ok("overlong", f"no document is longer than --seq-length {limit:,}")
        return
    share, tokens = len(longer) / len(documents), longer.sum() / documents.sum()
    found = (
        f"{share:.2%} of the documents with {tokens:.1%} of the tokens are longer than --seq-length {limit:,}, up to "
        f"{longer.max():,}"
    )
    if settings.overlong == "split":
        pieces = int((-(-longer // limit)).sum())
        yield ok("overlong", f"{found}; split into {pieces / len(longer):.1f} sequences each, as the job would do")
    elif settings.overlong == "error":
        yield error("overlong", f"{found}: the job stops", "raise --seq-length, or --flexsp-overlong split")
    else:
        lost = longer.sum() - (limit * len(longer) if settings.overlong == "truncate" else 0)
        yield warning(
            "overlong",
            f"{found}; --flexsp-overlong {settings.overlong} loses {lost / documents.sum():.1%} of all tokens",
            "--flexsp-overlong split keeps them",
        )

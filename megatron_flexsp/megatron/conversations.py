"""Conversations for ``--sft``: tokenised once by Megatron's own SFT tokenizer, then read like documents.

The planner must know every length before any token is read, so the conversations of a file of JSON lines are
tokenised at start-up and kept beside the file, or under ``--data-cache-path``: tokens as a Megatron data set, and
which of them the model shall learn. A line may hold several conversations, each beginning with a system message; each
is a sequence.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training import print_rank_0
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.stored_documents import Lengths, StoredDocuments

_IGNORED = -100
"""The target that Megatron's SFT tokenizer gives tokens which are not to be learned."""

_EDITION = 1
"""Of what is kept; older files are made again."""

_LINES_AT_ONCE = 32
_REPORT_SECONDS = 10.0
_WORKER_LIMIT_SECONDS = 300.0
"""For a few lines. Less than what the other ranks' collective waits by default, so that the error names the cause."""
_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Tokenization:
    """What a file of conversations is made into, and by which tokenizer."""

    path: str
    tokenizer: Any
    """Megatron's, with ``tokenize_conversation`` and ``pad``."""

    tokenizer_name: str
    """Whatever changes the tokens: the tokenizer's path and the prompt format."""

    folder: str | None
    """``--data-cache-path``"""

    workers: int

    @property
    def prefix(self) -> str:
        """Where the tokens are kept, without ``.bin`` and ``.idx``. Another file or tokenizer has another."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise FlexSPError(
                f"--data-path {self.path}: cannot read ({error.strerror})",
                "give the path of a file of JSON lines, which --sft takes",
            ) from None
        what = f"{_EDITION} {status.st_size} {status.st_mtime_ns} {self.tokenizer_name}"
        name = f"{Path(self.path).stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
        folder = Path(self.folder) if self.folder else Path(self.path).resolve().parent / "cache"
        return str(folder / "flexsp_conversations" / name)

    @property
    def is_there(self) -> bool:
        """Whether it has been done; the index is written last."""
        return os.path.exists(f"{self.prefix}.idx")


def tokenization_of(args: argparse.Namespace, path: str, tokenizer: Any) -> Tokenization:
    """How a job with Megatron's arguments tokenises one of its files. Where its tokens are kept needs no tokenizer."""
    name = f"{args.tokenizer_model} {args.sft_tokenizer_prompt_format}"
    return Tokenization(path, tokenizer, name, args.data_cache_path, args.num_workers)


class Conversations(StoredDocuments):
    """Tokenised conversations: their lengths, any stretch of their tokens, and which of those are learned.

    One without anything to learn within the first ``limit`` tokens has no tokens at all here.
    """

    def __init__(self, prefix: str, limit: int) -> None:
        super().__init__(prefix)
        self._learned = np.memmap(f"{prefix}.learned", dtype=np.bool_, mode="r")
        self._is_idle = np.load(f"{prefix}.first.npy") > limit
        self._starts = self._indexed.index.sequence_pointers // self._indexed.index.dtype_size

    def token_counts(self, documents: NDArray[np.int64]) -> Lengths:
        return np.where(self._is_idle[documents], 0, super().token_counts(documents))

    def learned(self, document: int, start: int, count: int) -> NDArray[np.bool_]:
        first = int(self._starts[document]) + start
        return np.asarray(self._learned[first : first + count])


def tokenize_all(tokenizations: list[Tokenization]) -> None:
    """See to it that every rank finds all of these. Collective.

    The first rank tokenises what is missing; then, where a node doesn't see its files, the first rank of the node does.
    All others hear from it every few seconds, so that no collective times out however long it takes.

    Raises
    ------
    FlexSPError
        On the rank where something is wrong, naming file and line; on the others, that it is.
    """
    is_first, is_first_of_node = torch.distributed.get_rank() == 0, int(os.environ.get("LOCAL_RANK", "0")) == 0
    for is_called in (is_first, is_first_of_node):
        missing = [item for item in tokenizations if not item.is_there] if is_called else []
        _work_while_others_wait(itertools.chain.from_iterable(_tokenize(item) for item in missing))


_DONE, _BUSY, _FAILED = range(3)


def _work_while_others_wait(work: Iterator[None]) -> None:
    state, error = _BUSY, None
    while True:
        begun = time.monotonic()
        while state == _BUSY and time.monotonic() - begun < _REPORT_SECONDS:
            try:
                if next(work, StopIteration) is StopIteration:
                    state = _DONE
            except (FlexSPError, OSError, RuntimeError) as caught:
                state, error = _FAILED, caught
        worst = torch.tensor([state], device=torch.cuda.current_device())
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        if error is not None:
            raise error if isinstance(error, FlexSPError) else FlexSPError(f"tokenising for --sft: {error}")
        if worst.item() == _FAILED:
            raise FlexSPError("tokenising for --sft failed on another rank, whose message says why")
        if worst.item() == _DONE:
            return


def _tokenize(job: Tokenization) -> Iterator[None]:
    """Write what ``Conversations`` reads; yields after each few lines."""
    lines = _Lines(job)
    print_rank_0(f" > [flexsp] tokenising {len(lines):,} lines of {job.path} into {job.prefix}.bin, once")
    folder = os.path.dirname(job.prefix)
    try:
        os.makedirs(folder, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, suffix=".part")
    except OSError as error:
        raise FlexSPError(
            f"--sft: tokenised conversations can't be written to {folder} ({error.strerror}): give --data-cache-path a "
            "writable folder"
        ) from None
    with scratch as part:
        yield from _write(job, lines, os.path.join(part, "conversations"))


def _write(job: Tokenization, lines: _Lines, partial: str) -> Iterator[None]:
    """The files under a passing name, then under their own."""
    builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=np.int32)
    first_learned: list[int] = []
    # Tokenizers would warn of their own threads in every worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        lines,
        batch_size=_LINES_AT_ONCE,
        num_workers=job.workers,
        collate_fn=list,
        timeout=_WORKER_LIMIT_SECONDS if job.workers else 0,
    )
    reported = time.monotonic()
    with open(f"{partial}.learned", "wb") as stream:
        for number, made in enumerate(loader):
            for conversations in made:
                if isinstance(conversations, str):
                    raise FlexSPError(conversations)
                for tokens, learned in conversations:
                    builder.add_document(torch.from_numpy(tokens), [len(tokens)])
                    stream.write(learned.tobytes())
                    labels = np.flatnonzero(learned[1:])
                    first_learned.append(int(labels[0]) + 1 if len(labels) else _NEVER)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                print_rank_0(f" > [flexsp] {job.path}: {(number + 1) * _LINES_AT_ONCE:,} of {len(lines):,} lines")
            yield
    np.save(f"{partial}.first.npy", np.array(first_learned, dtype=np.int32))
    builder.finalize(f"{partial}.idx")
    # Others may have made the same meanwhile; the index comes last, for it says that the rest is there.
    for ending in (".bin", ".learned", ".first.npy", ".idx"):
        os.replace(partial + ending, job.prefix + ending)


class _Lines(Dataset[Any]):
    """The lines of a file; each becomes its conversations' tokens and which of them are learned, or an error's text."""

    def __init__(self, job: Tokenization) -> None:
        self._job = job
        self._places: list[tuple[int, int]] = []
        """Of each line that isn't blank: its number in the file, from 1, and its first byte."""
        position = 0
        with open(job.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    self._places.append((number, position))
                position += len(line)
        if not self._places:
            raise FlexSPError(f"--data-path {job.path}: it has no lines; --sft takes a file of JSON lines")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]] | str:
        number, position = self._places[place]
        with open(self._job.path, "rb") as stream:
            stream.seek(position)
            line = stream.readline()
        where = f"--data-path {self._job.path}, line {number}"
        try:
            messages = json.loads(line)["messages"]
            return [self._tokens(conversation) for conversation in split_conversations(messages)]
        except (ValueError, KeyError, TypeError) as error:
            return (
                f'{where}: expected {{"messages": [{{"role": "user", "content": "..."}}, ...]}} that the prompt format '
                f"takes ({type(error).__name__}: {error})"
            )
        except AssertionError as error:
            return f"{where}: the SFT tokenizer does not take this conversation ({error})"

    def _tokens(self, conversation: list[dict[str, Any]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        tokenizer = self._job.tokenizer
        tokens, targets = tokenizer.tokenize_conversation(conversation, return_target=True, add_generation_prompt=False)
        # As Megatron's SFTDataset has it: targets that are padding are not learned either.
        learned = (targets != _IGNORED) & (targets != tokenizer.pad)
        return np.asarray(tokens, dtype=np.int32), np.asarray(learned, dtype=np.bool_)


def split_conversations(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The conversations that a line holds; each system message begins one."""
    conversations: list[list[dict[str, Any]]] = []
    for message in messages:
        if message["role"] == "system" or not conversations:
            conversations.append([])
        conversations[-1].append(message)
    return conversations

"""A user's script whose own data sets give packs, as Megatron's SFTDataset does: scripts/pretrain_gpt.py with them.

FLEXSP_TEST_BAD_SAMPLE is the number of a training sample that is broken; FLEXSP_TEST_CHANGES makes another of each
sample every time that it is read.
"""

import importlib.util
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import get_args

VOCABULARY = 256


class Packs(torch.utils.data.Dataset):
    """Packs of one to five sequences, padded to ``length`` tokens in one of three ways."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self._count, self._length, self._seed = count, length, seed
        self._reads = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self._reads += 1
        again = self._reads if "FLEXSP_TEST_CHANGES" in os.environ else 0
        generator = np.random.default_rng([self._seed, number, again])
        lengths = generator.integers(1, self._length // 3, 5)
        lengths = lengths[np.cumsum(lengths) <= self._length]
        if number % 6 == 1:
            lengths = np.array([self._length])
        total, kind = int(lengths.sum()), number % 3
        ends = np.concatenate(([0], np.cumsum(lengths)))
        # Labels that are no shifted tokens show that they are taken as they are.
        tokens, labels = generator.integers(0, VOCABULARY, (2, self._length))
        mask = generator.random(self._length) < 0.7
        mask[total:] = False
        if number % 4 == 2:  # nothing to learn in the first sequence
            mask[: ends[1]] = False
        if number % 5 == 3:  # nor at the end of the last one
            mask[ends[-2] + 1 :] = False
        labels[~mask] = -100
        positions = np.arange(self._length) - np.repeat([*ends[:-1], total], [*lengths, self._length - total])
        if kind == 0:  # padding is the end of the last sequence
            ends[-1] = self._length
            positions[ends[-2] :] = np.arange(self._length - ends[-2])
        if kind == 1:  # cu_seqlens is padded, as it is for collating
            ends = np.concatenate((ends, np.full(self._length + 1 - len(ends), ends[-1])))
        if number == int(os.environ.get("FLEXSP_TEST_BAD_SAMPLE", "-1")) and self._seed == 1:
            ends[1] = 3 * self._length
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask).float(),
            "position_ids": torch.from_numpy(positions),
            "cu_seqlens": torch.from_numpy(ends).int(),
            "max_seqlen": torch.tensor(np.diff(ends).max()),
        }


def one_by_one(packs: Packs, samples: range) -> Iterator[dict[str, torch.Tensor]]:
    """The sequences of these samples, each a micro-batch."""
    for number in samples:
        sample = packs[number]
        ends = sample["cu_seqlens"].tolist()
        for start, stop in pairwise(ends):
            if stop > start:
                names = ("tokens", "labels", "loss_mask", "position_ids")
                yield {name: sample[name][start:stop][None] for name in names}


def train_valid_test_datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Where Megatron's own loop reads: on the first tensor-parallel rank."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return None, None, None
    return tuple(Packs(count, get_args().seq_length, seed + 1) for seed, count in enumerate(num_samples))


def main() -> None:
    """Train."""
    path = Path(__file__).parents[2] / "scripts" / "pretrain_gpt.py"
    spec = importlib.util.spec_from_file_location("pretrain_gpt", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.train_valid_test_datasets_provider = train_valid_test_datasets_provider  # type: ignore[attr-defined]
    script.main()


if __name__ == "__main__":
    main()

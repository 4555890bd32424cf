"""Gathers tensors on each rank as Megatron does, in turn and together, and says what arrived."""

import json
import sys
from pathlib import Path

from megatron_flexsp.cpu import install

install()

import torch  # noqa: E402  # after its names are replaced
import torch.distributed as dist  # noqa: E402


def main() -> None:
    dist.init_process_group("nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shards = [torch.full((2, size), float(rank + 1)) for size in (3, 5)]
    arrived = {}
    for case in ("in turn", "waited for", "together", "together, waited for"):
        gathered = [torch.zeros(2 * ranks, shard.shape[1]) for shard in shards]
        pairs = list(zip(gathered, shards, strict=True))
        if case == "in turn":
            for whole, shard in pairs:
                assert dist.all_gather_into_tensor(whole, shard) is None
        elif case == "waited for":
            works = [dist.all_gather_into_tensor(whole, shard, async_op=True) for whole, shard in pairs]
            for work in works:
                work.wait()
        else:
            waits = case == "together, waited for"
            with dist._coalescing_manager(async_ops=waits) as manager:
                for whole, shard in pairs:
                    dist.all_gather_into_tensor(whole, shard, async_op=waits)
            if waits:
                manager.wait()
        arrived[case] = [whole.tolist() for whole in gathered]

    # What else goes together still does, in the stand-in as without it.
    sums = [torch.full((2,), float(rank + 1)) for _ in range(2)]
    with dist._coalescing_manager():
        for values in sums:
            dist.all_reduce(values)
    arrived["sums"] = [values.tolist() for values in sums]
    (Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(arrived))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

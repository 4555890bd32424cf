"""Run on four ranks with a checkout of Megatron's dev branch on PYTHONPATH: three steps of its packing with our plans.

Each rank writes what it was given to FOLDER/rankN.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_flexsp import cpu

FLAGS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
    --micro-batch-size 1 --global-batch-size 16 --train-iters 3 --lr 1e-3 --bf16 --calculate-per-token-loss
    --use-varlen-dataset --mock-data --tokenizer-type NullTokenizer --vocab-size 512 --dataloader-type single
    --moe-token-dispatcher-type alltoall --max-seqlen-per-dp-cp-rank 64 --context-parallel-size 2
    --cp-comm-type all_gather --dynamic-context-parallel --sequence-packing-scheduler flexsp
"""
PADDED_TO = 8


def samples(data_rank: int) -> Any:
    """Endless: sample n of a data-parallel rank, all of whose tokens are one number."""
    generator = torch.Generator().manual_seed(data_rank)
    number = 100 * data_rank
    while True:
        length = int(torch.randint(2, 250, (1,), generator=generator))
        padded = -(-length // PADDED_TO) * PADDED_TO
        number += 1
        yield [
            {
                "tokens": torch.full((padded,), number),
                "labels": torch.full((padded,), number),
                "loss_mask": torch.ones(padded),
                "position_ids": torch.arange(padded),
                "original_seq_len": torch.tensor([length], dtype=torch.int32),
                "padded_seq_len": torch.tensor([padded], dtype=torch.int32),
            }
        ]


def main(folder: Path) -> None:
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, initialize_rerun_state_machine

    from megatron_flexsp.megatron import plugin
    from megatron_flexsp.megatron.packing_scheduler import NAME, PackingJob

    command_line = FLAGS.split()
    sys.argv = ["pretrain_gpt.py", *command_line]
    ahead = 0
    original = PackingJob.plan

    def counted(self: PackingJob, source: Any, lengths: Any, count_multiple: int) -> Any:
        nonlocal ahead
        pending = None if source is None else source.pending
        ahead += pending is not None and pending.lengths.tolist() == lengths.tolist()
        return original(self, source, lengths, count_multiple)

    PackingJob.plan = counted  # type: ignore[method-assign]
    plugin.install(command_line)
    from megatron.core.datasets.data_schedule import scheduler_map, wrap_data_iterator
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    args = validate_args(parse_args())
    config = core_transformer_config_from_args(args)
    assert config.sequence_packing_scheduler == args.sequence_packing_scheduler == NAME
    assert set(scheduler_map) == {"dp_balanced", "default_dynamic_cp", "flexsp"}

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=2, dynamic_context_parallel=True)
    initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
    data_rank = parallel_state.get_data_parallel_rank()
    iterator = RerunDataIterator(samples(data_rank))
    steps = []
    for _ in range(3):
        iterator.advance()
        packed, count, tokens, _ = wrap_data_iterator(iterator, config, 8)
        given = []
        for _ in range(count):
            batch = next(packed)
            group = parallel_state.get_dynamic_data_context_parallel_groups(group_size=int(batch["local_cp_size"]))
            # The members of the group hold the same pack, and none of them too much of it.
            packs: list[Any] = [None] * group.size()
            dist.all_gather_object(packs, batch["tokens"].tolist(), group=group)
            assert all(pack == packs[0] for pack in packs)
            assert int(batch["cu_seqlens_padded"][-1]) <= 64 * group.size()
            for begin, end in zip(batch["cu_seqlens_padded"][:-1], batch["cu_seqlens_padded"][1:], strict=True):
                sequence = batch["tokens"][begin:end]
                assert (sequence == sequence[0]).all() and len(sequence) % (2 * group.size()) == 0
                given.append((int(sequence[0]), len(sequence)))
        steps.append({"micro_batches": count, "sequences": given, "sequences_of_batch": 16, "tokens": tokens})
    seen = {"steps": steps, "ahead": f"{ahead} plans ahead"}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The reference: the same sequences one by one, unpacked, through Megatron's stock attention and rotary embedding.

Uses nothing of megatron_flexsp but the stand-in for CUDA, the sample order and what mends an old release; no seam is
in place.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_flexsp import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.training import arguments, get_args, get_tokenizer, initialize, training  # noqa: E402
from megatron.training.utils import get_blend_and_blend_per_split  # noqa: E402

from megatron_flexsp.megatron import releases  # noqa: E402
from megatron_flexsp.megatron.data import tokenize_conversations  # noqa: E402
from megatron_flexsp.megatron.documents import DocumentDataset, DocumentDatasetConfig  # noqa: E402
from tests.end_to_end.packs import Packs  # noqa: E402
from tests.end_to_end.packs import one_by_one as one_by_one_of  # noqa: E402

if "transformer_engine" in sys.argv:
    # The stand-in for it computes on the CPU, so the stand-in for CUDA needn't choose other kernels.
    from megatron_flexsp.cpu import megatron_patches

    for name in ("transformer_impl", "apply_rope_fusion"):
        del megatron_patches.CPU_KERNELS[name]

path = Path(__file__).parents[2] / "scripts" / "pretrain_gpt.py"
spec = importlib.util.spec_from_file_location("pretrain_gpt", path)
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def targets_of(path: str) -> dict[tuple[int, ...], Any]:
    """What Megatron's tokenizer has each conversation predict, by the tokens that fit a sequence."""
    tokenizer, args, known = get_tokenizer(), get_args(), {}
    for line in Path(path).read_text().splitlines():
        messages = json.loads(line)["messages"]
        starts = [number for number, message in enumerate(messages) if message["role"] == "system"]
        for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
            tokens, targets = tokenizer.tokenize_conversation(
                messages[start:stop], return_target=True, add_generation_prompt=False
            )
            known[tuple(tokens[: args.seq_length + 1].tolist())] = torch.from_numpy(targets)
    return known


def loss_mask(text: torch.Tensor, known: dict[tuple[int, ...], Any]) -> torch.Tensor:
    if not known:
        return torch.ones(1, len(text) - 1)
    targets = known[tuple(text.tolist())][1 : len(text)]
    return ((targets != -100) & (targets != get_tokenizer().pad)).float()[None]


def one_by_one(dataset: DocumentDataset, known: dict[tuple[int, ...], Any]) -> Any:
    # More than one data-parallel rank only where experts, or a loss, want several.
    ranks = parallel_state.get_data_parallel_world_size()
    for sample in range(parallel_state.get_data_parallel_rank(), len(dataset), ranks):
        text = torch.from_numpy(dataset[sample]["text"].astype("int64"))
        yield {
            "tokens": text[None, :-1],
            "labels": text[None, 1:],
            "loss_mask": loss_mask(text, known),
            "position_ids": torch.arange(len(text) - 1)[None],
        }


coming: Any = None
"""Under FLEXSP_TEST_PACKS: the sequences of each global batch, as many as its packs hold."""


def provider(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> Any:
    args = get_args()
    if "FLEXSP_TEST_PACKS" in os.environ:
        global coming
        packs = Packs(num_samples[0], args.seq_length, seed=1)
        size = args.global_batch_size
        coming = (list(one_by_one_of(packs, range(first, first + size))) for first in range(0, len(packs), size))
        return iter(()), None, None
    blend, _ = get_blend_and_blend_per_split(args)
    config = DocumentDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=blend, split=args.split
    )
    known = {}
    if args.conversations:
        config.conversations = tokenize_conversations(args, blend, None)
        known, config.overlong = targets_of(blend[0][0]), "truncate"
    train, _, _ = BlendedMegatronDatasetBuilder(DocumentDataset, list(num_samples), lambda: True, config).build()
    return one_by_one(train, known), None, None


provider.is_distributed = True  # type: ignore[attr-defined]
script.train_valid_test_datasets_provider = provider
training.save_checkpoint_and_time = lambda *args, **kwargs: None

get_forward_backward_func = training.get_forward_backward_func


def keeping_outputs(*args: Any, **kwargs: Any) -> Any:
    schedule = get_forward_backward_func(*args, **kwargs)

    def run(**options: Any) -> Any:
        releases.keep_what_is_being_sent(options["model"])
        if coming is not None:
            sequences = next(coming)
            options |= {"data_iterator": iter(sequences), "num_microbatches": len(sequences)}
        return schedule(**options)

    return run


training.get_forward_backward_func = keeping_outputs
validate_args = arguments.validate_args


def validate(args: Any, defaults: Any) -> Any:
    validate_args(args, defaults)
    args.variable_seq_lengths = True
    args.moe_token_dispatcher_type = "alltoall"
    args.dataloader_type = "external"
    args.conversations, args.sft = getattr(args, "sft", False), False
    return args


for module in (arguments, initialize):  # the second is where Megatron 0.17 looks
    module.validate_args = validate
script.main()

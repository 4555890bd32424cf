"""Room for a job's checkpoints: bytes from the model's arguments, against what the file system has left."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from megatron_flexsp.doctor.findings import Finding, error, ok, warning
from megatron_flexsp.megatron import experts
from megatron_flexsp.megatron.head_sizes import attention_weights, head_sizes, is_latent

_GIB = 1 << 30


def parameter_count(args: argparse.Namespace, vocabulary: int) -> int:
    """Parameters of the whole model, all ranks together.

    Parameters
    ----------
    args
        Megatron's arguments, validated.
    vocabulary
        Rows of the embedding.
    """
    width, layers, sizes = args.hidden_size, args.num_layers, head_sizes(args)
    norm = width * (1 if args.normalization == "RMSNorm" else 2)
    bias = int(args.add_bias_linear)

    attention = sum(attention_weights(args)) + width * bias
    has_norms = getattr(args, "qk_layernorm", False)
    if is_latent(args):
        attention += has_norms * (args.kv_lora_rank + (args.q_lora_rank or 0)) * norm // width
    else:
        projected = sizes.query_values + sizes.key_value_values
        attention += projected * int(bool(bias or getattr(args, "add_qkv_bias", False)))
        attention += has_norms * 2 * sizes.key_width * norm // width

    def mlp(inner: int) -> int:
        up = 2 * inner if args.swiglu else inner
        return width * (up + inner) + (up + width) * bias

    routed = experts.routed_layers(args)
    dense_layers = (layers - routed) * mlp(args.ffn_hidden_size)
    routed_layers = 0
    if routed:
        inner = args.moe_ffn_hidden_size or args.ffn_hidden_size
        shared = args.moe_shared_expert_intermediate_size
        routed_layers = args.num_experts * (mlp(inner) + width) + (mlp(shared) if shared else 0)
    embedding = vocabulary * width * (2 if args.untie_embeddings_and_output_weights else 1)
    if args.position_embedding_type == "learned_absolute":
        embedding += args.max_position_embeddings * width
    further = 0
    if args.mtp_num_layers:
        # Each is like the last layer, after a projection of two hidden states to one; three norms.
        last = attention + 2 * norm + (routed_layers if experts.is_last_routed(args) else mlp(args.ffn_hidden_size))
        distinct = 1 if getattr(args, "mtp_use_repeated_layer", False) else args.mtp_num_layers
        further = distinct * (last + 2 * width**2 + 3 * norm)
    return int(layers * (attention + 2 * norm) + dense_layers + routed * routed_layers + norm + embedding + further)


def bytes_per_parameter(args: argparse.Namespace) -> float:
    """What a checkpoint keeps of each parameter: its weight, and with the optimizer its two moments and fp32 copy."""
    mixed = args.bf16 or args.fp16
    weight = 2 if mixed else 4
    if args.no_save_optim or args.optimizer != "adam":
        return weight if args.no_save_optim else weight + (8 if mixed else 4)
    # The distributed optimizer keeps its own copy of the parameters, whatever their type.
    copy = 4 if mixed or args.use_distributed_optimizer else 0
    return weight + copy + 8


def examine_room(args: argparse.Namespace, vocabulary: int | None) -> Generator[Finding, None, None]:
    """Whether --save can be written to, and holds what will be kept there."""
    if args.save is None:
        yield warning("save", "no --save: the trained weights are not kept", "give a folder, and --save-interval")
        return
    folder = Path(args.save).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield error("save", f"--save {args.save}: {folder} can't be written to", "correct its permissions or the path")
        return
    yield ok("save", args.save)
    count = parameter_count(args, vocabulary or 0)
    size = count * bytes_per_parameter(args)
    kept = _kept(args)
    free = shutil.disk_usage(folder).free
    found = (
        f"a checkpoint of {count:,} parameters takes about {_text(size)}, {kept} will be kept: {_text(size * kept)} of "
        f"{_text(free)} free on the file system of {folder} (quotas are not seen)"
    )
    if vocabulary is None:
        found += "; the embedding, whose size only the tokenizer knows, comes on top"
    if size > free:
        yield error("checkpoint-room", found, "make room, or give --save a larger file system")
    elif size * kept > free:
        yield warning(
            "checkpoint-room",
            f"{found}; it is full after {int(free // size)}",
            "make room, raise --save-interval, or set --save-retain-interval, which deletes those in between",
        )
    else:
        yield ok("checkpoint-room", found)


def _kept(args: argparse.Namespace) -> int:
    """Checkpoints that lie on disk at the end: one for each interval, or fewer where those in between are deleted."""
    steps = args.train_iters or -(-(args.train_samples or 0) // args.global_batch_size)
    if not steps or not args.save_interval:
        return 1
    written = -(-steps // args.save_interval)
    retained = getattr(args, "save_retain_interval", None)
    if retained:
        # The newest is deleted only after the next one is there.
        return int(min(written, steps // retained + 2))
    return int(written)


def _text(size: float) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"

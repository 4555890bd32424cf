"""Where a measurement comes from: the machine, the versions, and the shape of the job."""

from __future__ import annotations

import argparse
import os
import platform
import socket
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_flexsp import __version__
from megatron_flexsp.megatron.context import on_cpu
from megatron_flexsp.megatron.seams import version as megatron_version

_INFINIBAND = Path("/sys/class/infiniband")


def describe_machine() -> dict[str, Any]:
    """Device, network, versions and date."""
    versions = {"megatron-flexsp": __version__, "megatron": megatron_version(), "torch": torch.__version__}
    for package in ("transformer-engine", "numpy", "highspy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if on_cpu():
        device = f"{os.cpu_count()} cores, {platform.machine()}"
    else:
        device = torch.cuda.get_device_name()
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "ranks_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "network": _network(),
        "versions": versions,
    }


def _network() -> list[str]:
    """The adapters that collectives can use: InfiniBand's, else the chosen interface, else all."""
    if _INFINIBAND.is_dir() and (adapters := sorted(item.name for item in _INFINIBAND.iterdir())):
        return adapters
    chosen = os.environ.get("GLOO_SOCKET_IFNAME" if on_cpu() else "NCCL_SOCKET_IFNAME")
    return [chosen] if chosen else sorted(name for _, name in socket.if_nameindex())


def describe_job(args: argparse.Namespace) -> dict[str, Any]:
    """What the costs of a step depend on, by the name of Megatron's flag."""
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "padded_vocab_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "sequence_parallel",
        "recompute_granularity",
        "transformer_impl",
    )
    job = {name: getattr(args, name) for name in names}
    job["num_query_groups"] = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    job["params_dtype"] = str(args.params_dtype).removeprefix("torch.")
    return job

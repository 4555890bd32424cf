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
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.context import on_cpu
from megatron_flexsp.megatron.seams import version as megatron_version
from megatron_flexsp.planner import CostModel

_INFINIBAND = Path("/sys/class/infiniband")


def installed_versions() -> dict[str, str]:
    """Of everything that the costs of a step may depend on, by package."""
    versions = {"megatron-flexsp": __version__, "megatron": megatron_version(), "torch": torch.__version__}
    for package in ("transformer-engine", "numpy", "highspy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> dict[str, Any]:
    """Device, network, versions and date."""
    versions = installed_versions()
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
        "multi_latent_attention",
        "mtp_num_layers",
        "padded_vocab_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "num_experts",
        "sequence_parallel",
        "recompute_granularity",
        "transformer_impl",
        "flexsp_exchange_parts",
    )
    latent = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    job = {name: getattr(args, name, None) for name in names + latent * bool(args.multi_latent_attention)}
    job["num_query_groups"] = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    job["fp8"] = f"{args.fp8}, {args.fp8_recipe}" if args.fp8 else None
    job["params_dtype"] = str(args.params_dtype).removeprefix("torch.")
    return job


def check_same_job(args: argparse.Namespace, cost_model: CostModel, domain_size: int) -> None:
    """Refuse a cost model that was measured on another job. One that does not say where it is from is taken.

    Raises
    ------
    FlexSPError
        Names what differs.
    """
    measured = cost_model.measurement.get("job")
    if not isinstance(measured, dict):
        return
    here = {**describe_job(args), "data-parallel ranks": domain_size}
    there = {**measured, "data-parallel ranks": cost_model.measurement.get("domain_size")}
    differences = [
        f"{name.replace('_', '-')} {there[name]}, here {value}"
        for name, value in here.items()
        if name in there and there[name] != value and not (name == "padded_vocab_size" and value is None)
    ]
    if differences:
        raise FlexSPError(
            f"--flexsp-cost-model {args.flexsp_cost_model}: it was measured on another job: {'; '.join(differences)}",
            "measure this one with --flexsp-profile",
        )

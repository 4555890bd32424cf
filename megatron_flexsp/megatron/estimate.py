"""A cost model from the model's arguments alone, for runs that have not measured one.

The counts of operations and bytes follow the model exactly; what a device or a network makes of them is
a guess at a common machine. The ratios between them, which are all that a plan depends on, are sound
enough to train with; the seconds are not a forecast.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron_flexsp.megatron import experts
from megatron_flexsp.megatron.head_sizes import attention_weights, head_sizes, kept_apart, latent_activations
from megatron_flexsp.planner import CostModel
from megatron_flexsp.runtime import ring_size_of

# Operations a second that training reaches on a device, not its peak.
_GPU_FLOPS_BY_CAPABILITY = {7: 50e12, 8: 140e12, 9: 400e12, 10: 800e12, 12: 200e12}
_CPU_FLOPS = 5e9
_NODE_BYTES_PER_SECOND, _NETWORK_BYTES_PER_SECOND, _CPU_BYTES_PER_SECOND = 150e9, 20e9, 0.5e9
_GPU_COLLECTIVE_SECONDS, _CPU_COLLECTIVE_SECONDS_PER_RANK = 30e-6, 2.2e-3
_GPU_LAYER_SECONDS, _CPU_LAYER_SECONDS = 500e-6, 15e-3
_USABLE_MEMORY = 0.9


def estimate_cost_model(
    args: argparse.Namespace,
    degrees: tuple[int, ...],
    *,
    gpu: tuple[int, int] | None,
    ranks_per_node: int,
    micro_batches_in_flight: int,
) -> CostModel:
    """Count the model's operations, bytes and parameters on one rank of its fullest pipeline stage.

    Parameters
    ----------
    args
        Megatron's validated arguments.
    degrees
        The group sizes that plans may use.
    gpu
        Compute capability (major) and memory in bytes, or None on a CPU; there, memory is taken to hold
        one sequence of ``--seq-length``.
    ranks_per_node
        Decides which groups cross the network.
    micro_batches_in_flight
        Micro-batches that the memory of a CPU is taken to hold.
    """
    tensor_size = args.tensor_model_parallel_size
    layers, predictions = _layers(args), 1 + (args.mtp_num_layers or 0)
    width, vocabulary = args.hidden_size, args.padded_vocab_size or args.vocab_size or 0
    sizes = head_sizes(args)
    shared_weights, own_weights = attention_weights(args)
    matrices = 3 if args.swiglu else 2
    routed_layers = min(layers, experts.routed_layers_of_a_stage(args))
    dense_weights = (layers - routed_layers) * matrices * width * args.ffn_hidden_size
    # What a token meets, and what lies on a rank.
    met, held_of_experts, held_beside = experts.weights_of_layer(args, matrices)
    weights = (layers * shared_weights + dense_weights + routed_layers * met + width * vocabulary) / tensor_size
    weights += layers * own_weights + (predictions - 1) * 2 * width**2 / tensor_size
    held_weights = weights + routed_layers * (held_beside - met / tensor_size)
    weights += (predictions - 1) * width * vocabulary / tensor_size
    passes = 4 if args.recompute_granularity == "full" else 3
    linear_operations = 2 * passes * weights
    # Two products of a causal half square, forward; twice that backward.
    attention_operations = passes * layers * (sizes.query_values + sizes.result_values) / tensor_size

    logit_bytes = predictions * 6 * vocabulary / tensor_size
    apart = kept_apart(args, degrees)
    recomputed_bytes = logit_bytes + _recomputed_layer_bytes(args, layers, matrices, apart)
    if args.recompute_granularity == "full":
        activation_bytes, recomputed_bytes = recomputed_bytes, 0.0
    else:
        activation_bytes = logit_bytes + _kept_bytes(args, layers, routed_layers, matrices, apart)
    state_bytes = held_weights * _state_bytes_per_weight(args, args.data_parallel_size)
    if args.num_experts:
        expert_bytes = _state_bytes_per_weight(args, experts.optimizer_ranks(args))
        state_bytes += routed_layers * held_of_experts * expert_bytes

    if gpu is None:
        flops, layer_seconds = _CPU_FLOPS, _CPU_LAYER_SECONDS
        # A whole number of tokens must survive the division by bytes that finds the capacity.
        budget_bytes = state_bytes + activation_bytes * (args.seq_length * micro_batches_in_flight + 0.5)
    else:
        flops = _GPU_FLOPS_BY_CAPABILITY.get(gpu[0], _GPU_FLOPS_BY_CAPABILITY[10])
        layer_seconds = _GPU_LAYER_SECONDS
        budget_bytes = _USABLE_MEMORY * gpu[1]

    exchanges = exchanges_per_micro_batch(args)
    wide = [degree for degree in degrees if degree > 1]
    return CostModel(
        memory_budget_bytes=budget_bytes,
        model_state_bytes=state_bytes,
        activation_bytes_per_token=activation_bytes,
        attention_seconds_per_token_squared=attention_operations / flops,
        linear_seconds_per_token=linear_operations / flops,
        micro_batch_overhead_seconds=layers * layer_seconds * passes / 3,
        exchange_bytes_per_token=exchange_bytes_per_token(args),
        exchange_bandwidth_bytes_per_second={
            degree: _with_ring(args, degree, _bandwidth(degree * tensor_size, ranks_per_node, gpu is None))
            for degree in wide
        },
        exchange_latency_seconds={degree: exchanges * _latency(degree, gpu is None) for degree in wide},
        recomputed_activation_bytes_per_token=recomputed_bytes,
        note="estimated from the model's arguments, not measured",
    )


def _kept_bytes(args: argparse.Namespace, layers: int, routed_layers: int, matrices: int, apart: float) -> float:
    """What layers keep of a token on one rank: Korthikanti et al. (arXiv 2205.05198), table 2, but attention scores.

    ``apart``: values that attention's kernel keeps besides (``kept_apart``).
    """
    tensor_size, shared = args.tensor_model_parallel_size, _ranks_that_share(args)
    # In the table, 19 of the 34 are a dense layer's second half.
    kept = layers * 34 * args.hidden_size
    kept += routed_layers * (experts.kept_bytes_of_layer(args, matrices) - 19 * args.hidden_size)
    of_heads, of_latents = latent_activations(args)
    return _bytes_per_value(args) * (
        kept / 2 / shared + layers * ((of_heads + apart) / tensor_size + of_latents / shared)
    )


def _recomputed_layer_bytes(args: argparse.Namespace, layers: int, matrices: int, apart: float) -> float:
    """The same where layers are recomputed one by one: what goes into each, and all of one."""
    routed = min(1, experts.routed_layers_of_a_stage(args))
    inputs = layers * args.hidden_size * _bytes_per_value(args) / _ranks_that_share(args)
    return inputs + _kept_bytes(args, 1, routed, matrices, apart)


def _bytes_per_value(args: argparse.Namespace) -> int:
    return 4 if args.params_dtype.itemsize == 4 else 2


def _ranks_that_share(args: argparse.Namespace) -> float:
    """Tensor-parallel ranks among which what lies between a layer's matrices is spread."""
    tensor_size: int = args.tensor_model_parallel_size
    return tensor_size if args.sequence_parallel or tensor_size == 1 else max(tensor_size / 2, 1)


def _state_bytes_per_weight(args: argparse.Namespace, ranks: float) -> float:
    """Weight in 2 bytes, gradient in 4, the optimizer's copy and moments in 12; less what others of the ranks hold."""
    sharded = 12 if args.use_distributed_optimizer else 0
    if getattr(args, "use_megatron_fsdp", False):
        strategies = {"no_shard": 0, "optim": 12, "optim_grads": 16, "optim_grads_params": 18}
        sharded = strategies.get(args.data_parallel_sharding_strategy, 0)
    return 18 - sharded + sharded / ranks


def with_ring_exchange(cost_model: CostModel, args: argparse.Namespace) -> CostModel:
    """An estimate whose groups attend in a ring, as Transformer Engine's ``p2p`` does, in place of our all-to-alls.

    Each rank passes on keys and values of all others, and backward their gradients too: what it sends grows with the
    ranks. None of it is taken to be hidden, which holds while a rank has a few thousand tokens of a sequence.
    """
    layers = _layers(args)
    bytes_per_value = _bytes_per_value(args)
    passed_on = 3 * head_sizes(args).key_value_values * bytes_per_value / args.tensor_model_parallel_size
    # Two rounds of d - 1 steps a layer, in place of four exchanges.
    steps = 2 / 4
    return replace(
        cost_model,
        exchange_bytes_per_token=layers * passed_on,
        exchange_bandwidth_bytes_per_second={
            degree: bandwidth / (degree - 1)
            for degree, bandwidth in cost_model.exchange_bandwidth_bytes_per_second.items()
        },
        exchange_latency_seconds={
            degree: seconds * steps * (degree - 1) for degree, seconds in cost_model.exchange_latency_seconds.items()
        },
    )


def _layers(args: argparse.Namespace) -> int:
    """Layers of the fullest pipeline stage; those that predict further tokens are on the last one."""
    return -(-args.num_layers // args.pipeline_model_parallel_size) + (args.mtp_num_layers or 0)


def exchanges_per_micro_batch(args: argparse.Namespace) -> int:
    """All-to-alls of the fullest pipeline stage: one before and one after each attention, for each pass through it."""
    passes = 3 if args.recompute_granularity == "full" else 2
    return 2 * passes * _layers(args)


def exchange_bytes_per_token(args: argparse.Namespace) -> float:
    """Bytes that a micro-batch's all-to-alls carry for each token: queries, keys, values and the result."""
    sizes = head_sizes(args)
    # The mean of the two ways.
    values = (sizes.query_values + sizes.key_value_values + sizes.result_values) / 2
    bytes_per_value = _bytes_per_value(args)
    return exchanges_per_micro_batch(args) * values * bytes_per_value / args.tensor_model_parallel_size


def _with_ring(args: argparse.Namespace, degree: int, bandwidth: float) -> float:
    """The bandwidth that carries a group's all-to-alls in the time that they and its ring's transfers take.

    In a ring of R blocks keys and values of every block, those heads that a rank holds, pass R - 1 times: once forward;
    backward again, and with them their gradients in fp32. Nothing is taken to hide behind compute.
    """
    heads = args.num_attention_heads // args.tensor_model_parallel_size
    ring_size = ring_size_of(degree, heads)
    if ring_size == 1:
        return bandwidth
    sizes = head_sizes(args)
    held_heads = max(1.0, sizes.key_value_heads / args.tensor_model_parallel_size / (degree // ring_size))
    bytes_per_value = _bytes_per_value(args)
    layers = _layers(args)
    passed_bytes = layers * held_heads * sizes.widest * (2 * 2 * bytes_per_value + 2 * 4)
    ring_bytes = passed_bytes * (ring_size - 1) / ring_size
    exchanged_bytes = exchange_bytes_per_token(args) / degree
    return bandwidth * exchanged_bytes / (exchanged_bytes + ring_bytes)


def _bandwidth(ranks: int, ranks_per_node: int, cpu: bool) -> float:
    if cpu:
        return _CPU_BYTES_PER_SECOND
    return _NODE_BYTES_PER_SECOND if ranks <= ranks_per_node else _NETWORK_BYTES_PER_SECOND


def _latency(degree: int, cpu: bool) -> float:
    # Processes that share a few cores are woken one after the other.
    return degree * _CPU_COLLECTIVE_SECONDS_PER_RANK if cpu else _GPU_COLLECTIVE_SECONDS

"""The flags of a Megatron job that don't go with FlexSP: which, why, and what to do. Needs neither torch nor Megatron.

One table for the launcher, which refuses at start-up, and for ``flexsp convert`` and ``flexsp doctor``, which read a
job's arguments before it is started. In: an ``argparse`` namespace with Megatron's names, Megatron's defaults where a
flag isn't given. Out: the entries that apply.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Something in a job's arguments that FlexSP can't be combined with."""

    flags: tuple[str, ...]
    """Every command line flag that can bring it about; the first is the one to name."""

    subject: str
    """What is refused, in the words of an error message: flags, and the values that matter."""

    reason: str

    remedy: str = ""
    """What to do, as sentences; empty where there is nothing but to leave the flag out or FlexSP off."""

    mendable: bool = False
    """Whether setting or taking out the flags leaves the job what it was, so that ``flexsp convert`` may do it."""

    applies: Callable[[argparse.Namespace], object]
    """Whether a job has it; any true or false value."""

    @property
    def message(self) -> str:
        """One line: subject, reason and remedy."""
        return f"{self.subject}: {self.reason}" + (f". {self.remedy}" if self.remedy else "")


def refusals(args: argparse.Namespace) -> list[Refusal]:
    """What of a job's arguments doesn't go with FlexSP, in the table's order.

    Parameters
    ----------
    args
        Megatron's arguments, as parsed and not yet validated. Names that only some Megatron versions have may be
        missing.
    """
    table = JOB_REFUSALS
    if args.num_experts:
        table += EXPERT_REFUSALS
    if _recomputes_some(args):
        table += RECOMPUTE_REFUSALS
    return [entry for entry in table if entry.applies(args)]


def _local(args: argparse.Namespace) -> bool:
    return bool(args.transformer_impl == "local")


def load_balancing_types(args: argparse.Namespace) -> set[str]:
    """The job's ``--moe-router-load-balancing-type``, one or several."""
    chosen = args.moe_router_load_balancing_type
    return {chosen} if isinstance(chosen, str) else set(chosen)


def _flex_backend(args: argparse.Namespace) -> str:
    if args.moe_token_dispatcher_type != "flex":
        return ""
    return str(getattr(args, "moe_flex_dispatcher_backend", "deepep"))


def _packed(args: argparse.Namespace) -> bool:
    """Whether samples are the script's own."""
    return getattr(args, "flexsp_samples", "documents") == "packed"


def _delayed_scaling(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "fp8", None)) and getattr(args, "fp8_recipe", "delayed") == "delayed"


def _recomputes_some(args: argparse.Namespace) -> bool:
    """Whether plans may recompute single micro-batches."""
    return bool(getattr(args, "flexsp_recompute", False))


JOB_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        flags=("--yaml-cfg",),
        subject="--yaml-cfg",
        reason="Megatron ignores the command line beside it, where FlexSP's flags are, and no release from 0.17 on "
        "starts from such a file",
        remedy="`flexsp convert FILE --output arguments.txt` writes the file's settings as flags, FlexSP's among them: "
        "put them in the place of all arguments that the script has now, and -m megatron_flexsp.run before it",
        applies=lambda args: args.yaml_cfg,
    ),
    Refusal(
        flags=("--context-parallel-size",),
        subject="--context-parallel-size > 1",
        reason="FlexSP forms context-parallel groups itself, out of the data-parallel ranks",
        remedy="Take the flag out; its ranks become data-parallel ones. Long documents still get groups, and "
        "--flexsp-max-tokens-per-rank set to sequence length / context-parallel size keeps the memory use",
        mendable=True,
        applies=lambda args: args.context_parallel_size > 1,
    ),
    Refusal(
        flags=("--hybrid-context-parallel",),
        subject="--hybrid-context-parallel",
        reason="it is another way to do what FlexSP does; use one of them",
        mendable=True,
        applies=lambda args: args.hybrid_context_parallel,
    ),
    Refusal(
        flags=("--dynamic-context-parallel", "--sequence-packing-scheduler"),
        subject="--dynamic-context-parallel and --sequence-packing-scheduler",
        reason="they are another way to do what FlexSP does; use one of them",
        mendable=True,
        applies=lambda args: (
            getattr(args, "dynamic_context_parallel", False) or getattr(args, "sequence_packing_scheduler", None)
        ),
    ),
    Refusal(
        flags=("--use-varlen-dataset",),
        subject="--use-varlen-dataset",
        reason="it is another way to do what FlexSP does; use one of them",
        # Without it the run reads another data set.
        applies=lambda args: getattr(args, "use_varlen_dataset", False),
    ),
    Refusal(
        flags=("--calculate-per-token-loss",),
        subject="--calculate-per-token-loss is missing",
        reason="without it each micro-batch weighs the same, however many tokens it has, and the result would depend "
        "on the plan",
        remedy="Add the flag",
        mendable=True,
        applies=lambda args: not args.calculate_per_token_loss,
    ),
    Refusal(
        flags=("--micro-batch-size",),
        subject="--micro-batch-size other than 1",
        reason="the planner decides what a micro-batch holds",
        remedy="Set it to 1 and give the memory by --flexsp-max-tokens-per-rank",
        mendable=True,
        applies=lambda args: args.micro_batch_size not in (None, 1),
    ),
    Refusal(
        flags=("--eval-micro-batch-size",),
        subject="--eval-micro-batch-size other than 1",
        reason="the planner decides what a micro-batch holds",
        mendable=True,
        applies=lambda args: getattr(args, "eval_micro_batch_size", None) not in (None, 1),
    ),
    Refusal(
        flags=("--cuda-graph-impl", "--enable-cuda-graph", "--external-cuda-graph"),
        subject="CUDA graphs",
        reason="micro-batches differ in length from step to step",
        applies=lambda args: (
            getattr(args, "cuda_graph_impl", "none") != "none"
            or getattr(args, "enable_cuda_graph", False)
            or getattr(args, "external_cuda_graph", False)
        ),
    ),
    Refusal(
        flags=("--mtp-hsm",),
        subject="--mtp-hsm",
        reason="it rolls hidden states, whose successors lie on other ranks",
        applies=lambda args: getattr(args, "mtp_hsm", False),
    ),
    Refusal(
        flags=("--multi-latent-attention",),
        subject="--multi-latent-attention with --transformer-impl local",
        reason="Megatron's own attention takes no values whose width is not that of the queries",
        remedy="Set --transformer-impl transformer_engine",
        applies=lambda args: _local(args) and args.multi_latent_attention,
    ),
    Refusal(
        flags=("--experimental-attention-variant", "--linear-attention-type"),
        subject="--experimental-attention-variant",
        reason="it is not supported",
        applies=lambda args: (
            getattr(args, "experimental_attention_variant", None) or getattr(args, "linear_attention_type", None)
        ),
    ),
    Refusal(
        flags=("--enable-hyper-connections", "--enable-mhc-connections"),
        subject="--enable-hyper-connections and --enable-mhc-connections",
        reason="they are not tried yet",
        applies=lambda args: (
            getattr(args, "enable_hyper_connections", False) or getattr(args, "enable_mhc_connections", False)
        ),
    ),
    Refusal(
        flags=("--rotary-base-per-layer",),
        subject="--rotary-base-per-layer",
        reason="each layer would number the tokens of a slice from 0",
        applies=lambda args: getattr(args, "rotary_base_per_layer", None),
    ),
    Refusal(
        flags=("--hybrid-layer-pattern", "--hybrid-override-pattern", "--is-hybrid-model"),
        subject="Mamba and hybrid layers",
        reason="their state runs along a sequence, across ranks",
        applies=lambda args: (
            getattr(args, "hybrid_layer_pattern", None)
            or getattr(args, "hybrid_override_pattern", None)
            or getattr(args, "is_hybrid_model", False)
        ),
    ),
    Refusal(
        flags=("--use-torch-fsdp2",),
        subject="--use-torch-fsdp2",
        reason="it is not tried yet",
        remedy="Use --use-megatron-fsdp",
        applies=lambda args: args.use_torch_fsdp2,
    ),
    Refusal(
        flags=("--transformer-impl",),
        subject="--transformer-impl inference_optimized",
        reason="it does not train",
        applies=lambda args: args.transformer_impl not in ("local", "transformer_engine"),
    ),
    Refusal(
        flags=("--window-size",),
        subject="--window-size with --transformer-impl local",
        reason="PyTorch's attention would need a mask as large as the square of a sequence",
        remedy="Set --transformer-impl transformer_engine",
        applies=lambda args: _local(args) and getattr(args, "window_size", None),
    ),
    Refusal(
        flags=("--fp4-format",),
        subject="--fp4-format",
        reason="it is not tried yet",
        remedy="Use --fp8-format, or bf16",
        applies=lambda args: getattr(args, "fp4", None),
    ),
    Refusal(
        flags=("--fp8-param-gather",),
        subject="--fp8-param-gather with --fp8-recipe delayed (Megatron's default)",
        reason="the scale of a weight would follow from how many micro-batches its rank has run",
        remedy="Take the flag out, or choose another --fp8-recipe",
        applies=lambda args: _delayed_scaling(args) and getattr(args, "fp8_param_gather", False),
    ),
    Refusal(
        flags=("--fp8-recipe",),
        subject="--fp8-recipe custom",
        reason="how many tokens its kernels ask a slice to divide by is not known",
        remedy="Choose tensorwise, blockwise or mxfp8",
        applies=lambda args: getattr(args, "fp8", None) and getattr(args, "fp8_recipe", None) == "custom",
    ),
    Refusal(
        flags=("--te-precision-config-file", "--kitchen-config-file", "--kitchen-recipe-number"),
        subject="--te-precision-config-file, --kitchen-config-file and --kitchen-recipe-number",
        reason="how many tokens their kernels ask a slice to divide by is not known",
        remedy="Give one precision to all layers, by --fp8-format",
        applies=lambda args: (
            getattr(args, "te_precision_config_file", None)
            or getattr(args, "kitchen_config_file", None)
            or getattr(args, "kitchen_recipe_number", None) is not None
        ),
    ),
    Refusal(
        flags=("--softmax-type",),
        subject="--softmax-type other than vanilla with --transformer-impl local",
        reason="PyTorch's attention has no other",
        remedy="Set --transformer-impl transformer_engine",
        applies=lambda args: _local(args) and getattr(args, "softmax_type", "vanilla") != "vanilla",
    ),
    Refusal(
        flags=("--qk-clip", "--log-max-attention-logit"),
        subject="--qk-clip and --log-max-attention-logit",
        reason="the attention scores are never whole in memory",
        applies=lambda args: getattr(args, "qk_clip", False) or getattr(args, "log_max_attention_logit", False),
    ),
    Refusal(
        flags=("--position-embedding-type",),
        subject="--position-embedding-type mrope and relative",
        reason="they are not supported",
        applies=lambda args: args.position_embedding_type in ("mrope", "relative"),
    ),
    Refusal(
        flags=("--fim-data",),
        subject="--fim-data",
        reason="it is not supported",
        applies=lambda args: getattr(args, "fim_data", False),
    ),
    Refusal(
        flags=("--perform-rl-step",),
        subject="--perform-rl-step",
        reason="it is not supported",
        applies=lambda args: getattr(args, "perform_rl_step", False),
    ),
    Refusal(
        flags=("--eod-mask-loss",),
        subject="--eod-mask-loss",
        reason="a document is a sequence, so that nothing follows its end",
        mendable=True,
        applies=lambda args: args.eod_mask_loss and not _packed(args),
    ),
    Refusal(
        flags=("--tp-comm-overlap",),
        subject="--tp-comm-overlap",
        reason="its buffers have one size, micro-batches have many",
        # It changes speed alone.
        mendable=True,
        applies=lambda args: args.tp_comm_overlap,
    ),
    Refusal(
        flags=("--ddp-average-in-collective",),
        subject="--ddp-average-in-collective",
        reason="gradients are divided by the tokens of the global batch, which Megatron doesn't combine with it",
        mendable=True,
        applies=lambda args: getattr(args, "ddp_average_in_collective", False),
    ),
    Refusal(
        flags=("--dataloader-type",),
        subject="--dataloader-type other than single",
        reason="samples come in the order of the data set, which shuffles documents itself",
        mendable=True,
        applies=lambda args: args.dataloader_type not in (None, "single"),
    ),
    Refusal(
        flags=("--spec", "--use-kitchen-attention"),
        subject="--spec and --use-kitchen-attention",
        reason="their attention is not Megatron's own",
        applies=lambda args: args.spec or getattr(args, "use_kitchen_attention", False),
    ),
    Refusal(
        flags=("--use-legacy-models",),
        subject="--use-legacy-models",
        reason="FlexSP changes the attention of megatron.core, which they don't have",
        remedy="Take the flag out where a checkpoint allows it",
        applies=lambda args: getattr(args, "use_legacy_models", False),
    ),
    Refusal(
        flags=("--logits-load-dir",),
        subject="--logits-load-dir",
        reason="the teacher's logits are stored in the order of Megatron's own samples",
        applies=lambda args: getattr(args, "logits_load_dir", None),
    ),
    Refusal(
        flags=("--tensor-parallel-num-weight-shards", "--expert-tensor-parallel-num-weight-shards"),
        subject="--tensor-parallel-num-weight-shards and --expert-tensor-parallel-num-weight-shards",
        reason="they are not supported",
        applies=lambda args: any(
            getattr(args, f"{expert}tensor_parallel_num_weight_shards", None) not in (None, 1)
            for expert in ("", "expert_")
        ),
    ),
    Refusal(
        flags=("--inprocess-restart",),
        subject="--inprocess-restart",
        reason="it is not supported yet",
        applies=lambda args: getattr(args, "inprocess_restart", False),
    ),
    Refusal(
        flags=("--no-align-grad-reduce", "--disable-align-grad-reduce"),
        subject="--no-align-grad-reduce",
        reason="ranks of a pipeline that end at different times would wait for each other",
        # It moves communication in time and leaves the sums as they are.
        mendable=True,
        applies=lambda args: not getattr(args, "align_grad_reduce", True),
    ),
    Refusal(
        flags=("--fine-grained-activation-offloading",),
        subject="--fine-grained-activation-offloading",
        reason="it takes every step's micro-batches for as many, and as long, as those of the first",
        remedy="Recompute activations, or lower --flexsp-max-tokens-per-rank",
        applies=lambda args: getattr(args, "fine_grained_activation_offloading", False),
    ),
    Refusal(
        flags=("--iterations-to-skip",),
        subject="--iterations-to-skip",
        reason="it is not supported",
        applies=lambda args: args.iterations_to_skip,
    ),
    Refusal(
        flags=("--multiple-validation-sets",),
        subject="--multiple-validation-sets without --full-validation",
        reason="Megatron doesn't do it",
        remedy="Add --full-validation",
        applies=lambda args: args.multiple_validation_sets and not args.full_validation,
    ),
    Refusal(
        flags=("--full-validation",),
        subject="--full-validation without --multiple-validation-sets",
        reason="Megatron ends at the first validation with a TypeError, since it takes the count of batches for a list",
        remedy="Add --multiple-validation-sets, for one set too",
        applies=lambda args: args.full_validation and not args.multiple_validation_sets,
    ),
    Refusal(
        flags=("--multiple-validation-sets",),
        subject="--multiple-validation-sets with interleaved pipelines",
        reason="Megatron takes each model chunk's data for a validation set",
        applies=lambda args: (
            args.multiple_validation_sets
            and (args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank)
        ),
    ),
    Refusal(
        flags=("--phase-transition-iterations",),
        subject="--phase-transition-iterations",
        reason="it is not supported",
        applies=lambda args: args.phase_transition_iterations,
    ),
)

EXPERT_REFUSALS = (
    Refusal(
        flags=("--moe-router-load-balancing-type",),
        subject="--moe-router-load-balancing-type sinkhorn and quantile_balancing",
        reason="where a token goes would depend on the tokens beside it, and so on the plan",
        remedy="Use aux_loss, seq_aux_loss, global_aux_loss or none",
        applies=lambda args: load_balancing_types(args) & {"sinkhorn", "quantile_balancing"},
    ),
    Refusal(
        flags=("--moe-expert-capacity-factor", "--moe-expert-rank-capacity-factor"),
        subject="--moe-expert-capacity-factor and --moe-expert-rank-capacity-factor",
        reason="which tokens are dropped would depend on the plan",
        remedy="Take them out: no token is dropped then",
        applies=lambda args: (
            (args.moe_expert_capacity_factor or -1) >= 0
            or getattr(args, "moe_expert_rank_capacity_factor", None) is not None
        ),
    ),
    Refusal(
        flags=("--moe-input-jitter-eps",),
        subject="--moe-input-jitter-eps",
        reason="the noise would depend on the plan",
        applies=lambda args: args.moe_input_jitter_eps,
    ),
    Refusal(
        flags=("--moe-enable-routing-replay",),
        subject="--moe-enable-routing-replay",
        reason="a recorded route is one of Megatron's own micro-batches",
        applies=lambda args: getattr(args, "moe_enable_routing_replay", False),
    ),
    Refusal(
        flags=("--overlap-moe-expert-parallel-comm",),
        subject="--overlap-moe-expert-parallel-comm",
        reason="it runs layers of two micro-batches by turns, and they may differ in length",
        # It changes speed alone.
        mendable=True,
        applies=lambda args: getattr(args, "overlap_moe_expert_parallel_comm", False),
    ),
    Refusal(
        flags=("--moe-flex-dispatcher-backend",),
        subject="--moe-flex-dispatcher-backend ncclep",
        reason="its buffers have one size, micro-batches have many",
        applies=lambda args: _flex_backend(args) == "ncclep",
    ),
    Refusal(
        flags=("--moe-flex-dispatcher-backend",),
        subject="--moe-flex-dispatcher-backend hybridep without --moe-hybridep-pad-uneven-dispatch-inputs (Megatron "
        "0.19)",
        reason="it takes for granted that all ranks have equally many tokens",
        applies=lambda args: (
            _flex_backend(args) == "hybridep"
            and not getattr(args, "moe_hybridep_pad_uneven_dispatch_inputs", False)
            and not getattr(args, "moe_hybridep_pad_variable_tokens", False)  # its name on the dev branch
        ),
    ),
    Refusal(
        flags=("--moe-n-hash-layers",),
        subject="--moe-n-hash-layers",
        reason="it is not tried yet",
        applies=lambda args: getattr(args, "moe_n_hash_layers", 0),
    ),
    Refusal(
        flags=("--sequence-parallel",),
        subject="--num-experts with --tensor-model-parallel-size > 1 and no --sequence-parallel",
        reason="Megatron doesn't train it",
        remedy="Add --sequence-parallel",
        applies=lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
    ),
    Refusal(
        flags=("--fp8-format",),
        subject="--num-experts with --fp8-format and recomputed experts",
        reason="Transformer Engine's recomputation doesn't tell a router which micro-batch is running",
        applies=lambda args: (
            (args.recompute_granularity == "full" or "moe" in (args.recompute_modules or ()) or _recomputes_some(args))
            and getattr(args, "fp8", None)
        ),
    ),
)

RECOMPUTE_REFUSALS = (
    Refusal(
        flags=("--recompute-granularity",),
        subject="--flexsp-recompute with --recompute-granularity full",
        reason="everything is recomputed already",
        remedy="Take --recompute-granularity out, and --recompute-method and --recompute-num-layers with it; "
        "--flexsp-max-tokens-per-rank is then what fits without",
        applies=lambda args: args.recompute_granularity == "full",
    ),
    Refusal(
        flags=("--recompute-modules", "--moe-layer-recompute"),
        subject="--flexsp-recompute with --recompute-modules other than core_attn",
        reason="Megatron doesn't recompute these inside of layers that are recomputed",
        remedy="Leave core_attn, or take --flexsp-recompute out",
        applies=lambda args: (
            getattr(args, "moe_layer_recompute", False)
            or (args.recompute_granularity == "selective" and set(args.recompute_modules or ()) - {"core_attn"})
        ),
    ),
    Refusal(
        flags=("--cpu-offloading-num-layers",),
        subject="--flexsp-recompute with --cpu-offloading-num-layers",
        reason="Megatron doesn't offload layers that are recomputed",
        remedy="Take one of them out",
        applies=lambda args: (
            getattr(args, "cpu_offloading", False) or (getattr(args, "cpu_offloading_num_layers", None) or 0) > 0
        ),
    ),
    Refusal(
        flags=("--distribute-saved-activations",),
        subject="--flexsp-recompute with --distribute-saved-activations",
        reason="Megatron distributes them only where it recomputes everything",
        remedy="Use --sequence-parallel, which does so with all activations",
        applies=lambda args: getattr(args, "distribute_saved_activations", False),
    ),
)

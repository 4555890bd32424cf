"""What no job may have, whatever its model."""

from __future__ import annotations

import argparse

from megatron_flexsp.compatibility.refusal import Refusal


def _local(args: argparse.Namespace) -> bool:
    return bool(args.transformer_impl == "local")


def _packed(args: argparse.Namespace) -> bool:
    """Whether samples are the script's own."""
    return getattr(args, "flexsp_samples", "documents") == "packed"


JOB_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        flags=("--yaml-cfg",),
        subject="--yaml-cfg",
        reason="Megatron ignores the command line beside it, where FlexSP's flags are, and no release from 0.17 on "
        "starts from such a file",
        remedy="run `flexsp convert FILE --output arguments.txt`, which writes the file's settings as flags, FlexSP's "
        "among them; put them in the place of all arguments that the script has now, and -m megatron_flexsp.run before "
        "it",
        applies=lambda args: args.yaml_cfg,
    ),
    Refusal(
        flags=("--context-parallel-size",),
        subject="--context-parallel-size > 1",
        reason="FlexSP forms context-parallel groups itself, out of the data-parallel ranks",
        remedy="take the flag out; its ranks become data-parallel ones. Long documents still get groups, and "
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
        remedy="add the flag",
        mendable=True,
        applies=lambda args: not args.calculate_per_token_loss,
    ),
    Refusal(
        flags=("--micro-batch-size",),
        subject="--micro-batch-size other than 1",
        reason="the planner decides what a micro-batch holds",
        remedy="set it to 1 and give the memory by --flexsp-max-tokens-per-rank",
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
        remedy="set --transformer-impl transformer_engine",
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
        remedy="use --use-megatron-fsdp",
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
        remedy="set --transformer-impl transformer_engine",
        applies=lambda args: _local(args) and getattr(args, "window_size", None),
    ),
    Refusal(
        flags=("--fp4-format",),
        subject="--fp4-format",
        reason="it is not tried yet",
        remedy="use --fp8-format, or bf16",
        applies=lambda args: getattr(args, "fp4", None),
    ),
    Refusal(
        flags=("--fp8-recipe",),
        subject="--fp8-recipe custom",
        reason="how many tokens its kernels ask a slice to divide by is not known",
        remedy="choose tensorwise, blockwise or mxfp8",
        applies=lambda args: getattr(args, "fp8", None) and getattr(args, "fp8_recipe", None) == "custom",
    ),
    Refusal(
        flags=("--te-precision-config-file", "--kitchen-config-file", "--kitchen-recipe-number"),
        subject="--te-precision-config-file, --kitchen-config-file and --kitchen-recipe-number",
        reason="how many tokens their kernels ask a slice to divide by is not known",
        remedy="give one precision to all layers, by --fp8-format",
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
        remedy="set --transformer-impl transformer_engine",
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
        remedy="take the flag out where a checkpoint allows it",
        applies=lambda args: getattr(args, "use_legacy_models", False),
    ),
    Refusal(
        flags=("--logits-load-dir", "--logits-save-dir"),
        subject="--logits-load-dir and --logits-save-dir",
        reason="a teacher's logits are stored in the order of Megatron's own samples",
        applies=lambda args: getattr(args, "logits_load_dir", None) or getattr(args, "logits_save_dir", None),
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
        flags=("--defer-embedding-wgrad-compute",),
        subject="--defer-embedding-wgrad-compute",
        reason="it takes a rank's micro-batches for equally long, and for more than one",
        # It moves compute in time and leaves the sums as they are.
        mendable=True,
        applies=lambda args: getattr(args, "defer_embedding_wgrad_compute", False),
    ),
    Refusal(
        flags=("--cpu-offloading-retain-pinned-cpu-buffers",),
        subject="--cpu-offloading-retain-pinned-cpu-buffers",
        reason="these buffers have one size, micro-batches have many",
        # It changes speed alone.
        mendable=True,
        applies=lambda args: getattr(args, "cpu_offloading_retain_pinned_cpu_buffers", False),
    ),
    Refusal(
        flags=("--fine-grained-activation-offloading",),
        subject="--fine-grained-activation-offloading",
        reason="it takes every step's micro-batches for as many, and as long, as those of the first",
        remedy="recompute activations, or lower --flexsp-max-tokens-per-rank",
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
        remedy="add --full-validation",
        applies=lambda args: args.multiple_validation_sets and not args.full_validation,
    ),
    Refusal(
        flags=("--full-validation",),
        subject="--full-validation without --multiple-validation-sets",
        reason="Megatron ends at the first validation with a TypeError, since it takes the count of batches for a list",
        remedy="add --multiple-validation-sets, for one set too",
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

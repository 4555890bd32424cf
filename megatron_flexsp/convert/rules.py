"""What has to change in a job's arguments for FlexSP, and why; what can't be, and why not. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_flexsp.compatibility import Refusal, in_place_of_full, refusals
from megatron_flexsp.convert import batch_size
from megatron_flexsp.convert.arguments import Job, Value, namespace
from megatron_flexsp.convert.changes import Add, Change, Formula, Launch, Remove, SetValue
from megatron_flexsp.planner import legal_degrees

OTHER_MODELS = frozenset({
    "bert", "t5", "ict", "biencoder", "vision", "vit", "vlm", "vl", "mamba", "hybrid", "retro", "realm", "rl", "mimo",
    "llava", "multimodal", "dino", "swin", "inpaint", "orqa", "clip", "diffusion", "bagel", "ssm", "jamba",
})  # fmt: skip
"""Parts of a training script's name that say that its model is no GPT."""

_POINTLESS = {
    "--hybrid-context-parallel": "FlexSP forms the groups instead",
    "--dynamic-context-parallel": "FlexSP forms the groups instead",
    "--sequence-packing-scheduler": "FlexSP's planner packs instead",
    "--max-seqlen-per-dp-cp-rank": "--flexsp-max-tokens-per-rank takes its place",
    "--cp-comm-type": "FlexSP's groups exchange in one way of their own",
    "--hierarchical-context-parallel-sizes": "FlexSP's groups exchange in one way of their own",
    "--eod-mask-loss": "a document is a sequence, so that nothing follows its end",
    "--reset-position-ids": "a document is a sequence, so that its positions start at 0",
    "--reset-attention-mask": "a document is a sequence, so that attention never leaves it",
    "--dataloader-inter-document-masking": "a document is a sequence, so that attention never leaves it",
    "--tp-comm-overlap": "its buffers have one size, micro-batches have many; it changes speed alone",
    "--no-align-grad-reduce": "ranks of a pipeline that end at different times would wait; it changes speed alone",
    "--disable-align-grad-reduce": "ranks of a pipeline that end at different times would wait; it changes speed alone",
    "--defer-embedding-wgrad-compute": "it takes micro-batches for equally long; it changes speed alone",
    "--cpu-offloading-retain-pinned-cpu-buffers": "these buffers have one size, micro-batches have many; it changes "
    "speed alone",
    "--overlap-moe-expert-parallel-comm": "it runs two micro-batches by turns, and they may differ in length; it "
    "changes speed alone",
    "--delay-wgrad-compute": "it needs --overlap-moe-expert-parallel-comm; it changes speed alone",
    "--ddp-average-in-collective": "gradients are divided by the tokens of the global batch instead",
    "--eval-micro-batch-size": "the planner decides what a micro-batch holds",
}
"""Flags that mean nothing, or nothing good, where each document is a sequence with a group of its own."""

_FOREIGN = (
    "--bert-", "--retro-", "--img-", "--ict-", "--biencoder-", "--dino-", "--swin-", "--vision-", "--mask-prob",
    "--encoder-seq-length", "--decoder-seq-length", "--vocab-extra-ids",
)  # fmt: skip
"""Beginnings of flags that other models than GPT have."""

_GONE = frozenset({
    "--data-impl", "--DDP-impl", "--log-batch-size-to-tensorboard", "--checkpoint-activations",
    "--checkpoint-num-layers", "--batch-size", "--model-parallel-size", "--warmup",
})  # fmt: skip
"""Flags of old scripts with which no Megatron that FlexSP works with starts."""

_CAPACITY, _RECOMPUTED_CAPACITY = "--flexsp-max-tokens-per-rank", "--flexsp-max-recomputed-tokens-per-rank"


@dataclass(frozen=True)
class Wishes:
    """What the user says of the data."""

    mean_length: int | None = None
    """Tokens of a document on average."""
    mean_within: Callable[[int | None], int] | None = None
    """The same of documents that are split at a length."""

    def mean_of(self, job: Job) -> int | None:
        """Tokens of a job's sequences on average; None if nothing was said of it."""
        if self.mean_within is None:
            return self.mean_length
        return self.mean_within(job.number("--seq-length"))


@dataclass
class Decision:
    changes: list[Change] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Reasons for which the job can't be converted."""
    notes: list[str] = field(default_factory=list)
    """What stays, and what to know of it."""


def decide(job: Job, wishes: Wishes) -> Decision:
    """The changes that make a job a FlexSP job, or the reasons why it can't be one."""
    decision = Decision()
    _refuse(job, decision)
    if decision.problems:
        return decision
    new = job.last("--flexsp") is None
    capacity = _capacity(job) if new else None
    if new and job.last(_CAPACITY) is None and capacity is None:
        decision.problems.append(
            f"line {job.line}: --seq-length isn't there to see, and without it nobody knows how many tokens a rank "
            f"holds. Convert the file that sets it, and put -m megatron_flexsp.run before {job.script or 'the script'} "
            f"here yourself; or give --seq-length, or {_CAPACITY}, here and convert again"
            + (f". Arguments may be in {', '.join(job.unseen)}" if job.unseen else "")
        )
        return decision
    if not job.launched and not new:
        decision.notes.append(
            f"{job.script} has --flexsp and isn't started through -m megatron_flexsp.run: right in a Megatron-LM that "
            "is patched for it, else put that before it"
        )
    elif not job.launched:
        decision.changes.append(
            Launch(f"line {job.line}: -m megatron_flexsp.run put before {job.script}: FlexSP's launcher")
        )
    _add(job, new, capacity, decision)
    _mend(job, decision)
    if new:
        batch_size.keep_tokens(job, wishes.mean_of(job), decision.changes, decision.notes)
        _note(job, decision)
    _note_recomputation(job, capacity, decision)
    return decision


def _refuse(job: Job, decision: Decision) -> None:
    """Everything that can't be converted, each with its reason."""
    certain = refusals(namespace(argument for argument in job.arguments if argument.likely))
    for entry in certain:
        if not entry.mendable:
            decision.problems.append(_blamed(job, entry))
    deepspeed = [argument for argument in job.arguments if argument.flag.startswith(("--deepspeed", "--zero-stage"))]
    if deepspeed:
        decision.problems.append(
            f"{deepspeed[0].when}: {deepspeed[0].flag}: DeepSpeed's engine runs the micro-batches there, and FlexSP "
            "works with Megatron's own training loop"
        )
    foreign = next((argument for argument in job.arguments if argument.flag.startswith(_FOREIGN)), None)
    if foreign is not None:
        decision.problems.append(
            f"{foreign.when}: {foreign.flag}: it belongs to a model that is no GPT, and FlexSP runs GPT's forward step"
        )
    external = job.value("--dataloader-type")
    if external is not None and external.text == "external":
        decision.problems.append(
            f"line {job.line}: --dataloader-type external: the script brings its own batches, and FlexSP's are made of "
            "the documents of a Megatron data set"
        )
    if decision.problems:
        return
    for entry in refusals(namespace(job.arguments)):
        if not entry.mendable and entry not in certain:
            decision.notes.append(f"refused if it comes to that: {_blamed(job, entry)}")


def _blamed(job: Job, entry: Refusal) -> str:
    blamed = [argument for argument in job.arguments if argument.flag in entry.flags]
    chosen = next((argument for argument in blamed if argument.likely), blamed[0] if blamed else None)
    message = str(entry.problem)
    if chosen is not None and chosen.flag == "--yaml-cfg" and chosen.values:
        message = message.replace("convert FILE", f"convert {chosen.values[0].source}")
    return f"{chosen.when if chosen else f'line {job.line}'}: {message}"


def _add(job: Job, new: bool, capacity: Formula | None, decision: Decision) -> None:
    where = f"line {job.line}: "
    add = decision.changes.append
    if new:
        add(Add("--flexsp", None, f"{where}--flexsp added: it switches FlexSP on"))
    if not job.certain("--calculate-per-token-loss"):
        add(
            Add(
                "--calculate-per-token-loss",
                None,
                f"{where}--calculate-per-token-loss added: every token weighs the same, whichever micro-batch it is in",
            )
        )
    if new and capacity is not None and job.last(_CAPACITY) is None:
        add(
            Add(
                _CAPACITY,
                capacity,
                f"{where}{_CAPACITY} added{_said(capacity)}: {capacity.meaning}, which is what a rank held before",
            )
        )
    if new and job.last("--flexsp-degrees") is None:
        _rings(job, capacity, decision)


def _said(formula: Formula) -> str:
    return "" if formula.number is None else f" ({formula.number} as the file stands)"


def _capacity(job: Job) -> Formula | None:
    """Tokens that a rank held: micro-batch size x sequence length / context-parallel size."""
    if job.last("--hybrid-context-parallel") is not None:
        limit = job.value("--max-seqlen-per-dp-cp-rank")
        if limit is not None:
            return Formula("{}", (limit,), "--max-seqlen-per-dp-cp-rank")
    length = job.value("--seq-length")
    if length is None:
        return None
    micro, context = job.value("--micro-batch-size"), job.value("--context-parallel-size")
    template, operands, meaning = "{}", [length], "sequence length"
    if micro is not None and not (micro.number == 1 and micro.fixed):
        template, operands, meaning = "{} * {}", [micro, length], f"micro-batch size x {meaning}"
    if context is not None and not (context.number == 1 and context.fixed):
        template, operands, meaning = template + " / {}", [*operands, context], f"{meaning} / context-parallel size"
    return Formula(template, tuple(operands), meaning)


def _rings(job: Job, capacity: Formula | None, decision: Decision) -> None:
    """What to say of groups wider than the attention heads, where the longest sequence needs them."""
    length, heads = job.number("--seq-length"), job.number("--num-attention-heads")
    tensor = job.number("--tensor-model-parallel-size", 1)
    tokens = capacity.number if capacity is not None else None
    if not length or not heads or not tensor or not tokens:
        return
    needed = -(-length // tokens)
    domain = batch_size.domain_size(job)
    legal = legal_degrees(domain) if domain else tuple(1 << power for power in range(needed.bit_length() + 1))
    shared = [degree for degree in legal if (heads // tensor) % degree == 0]
    if max(shared) >= needed:
        return
    wide = next((degree for degree in legal if degree >= needed), None)
    where = f"line {job.line}: "
    if wide is None:
        decision.problems.append(
            f"{where}a sequence of {length} tokens needs {needed} ranks of {tokens} tokens, and there are "
            f"{domain} data-parallel ranks: give {_CAPACITY} more tokens, or start more ranks"
        )
        return
    dropout = job.value("--attention-dropout")
    without = [flag for flag in ("--window-size", "--softmax-type") if job.last(flag) is not None]
    if dropout is None or not _is_zero(dropout):
        without.append("--attention-dropout (Megatron's default is 0.1; set it to 0)")
    if without:
        decision.problems.append(
            f"{where}a sequence of {length} tokens needs {wide} ranks, more than the {heads // tensor} attention heads "
            f"of a tensor-parallel rank: ring attention, which has no {' and no '.join(without)}"
        )
        return
    decision.notes.append(
        f"{where}a sequence of {length} tokens needs {wide} ranks, more than the {heads // tensor} attention heads of "
        "a tensor-parallel rank: groups so wide use ring attention"
    )


def _is_zero(value: Value) -> bool:
    try:
        return float(value.text or "nan") == 0 and value.fixed
    except ValueError:
        return False


def _mend(job: Job, decision: Decision) -> None:
    """Take out or set what an argument list has in it, wherever it stands and under whatever condition."""
    for argument in job.arguments:
        value = argument.values[0] if argument.values else None
        where = f"{argument.when}: "
        if argument.flag == "--context-parallel-size":
            if value is None or not (value.number == 1 and value.fixed):
                decision.changes.append(Remove(argument, f"{where}{argument.written} taken out: {_ranks(job)}"))
        elif argument.flag in _POINTLESS:
            decision.changes.append(
                Remove(argument, f"{where}{argument.written} taken out: {_POINTLESS[argument.flag]}")
            )
        elif argument.flag == "--dataloader-type":
            if value is not None and value.text != "single":
                decision.changes.append(
                    Remove(argument, f"{where}{argument.written} taken out: the data set shuffles its documents")
                )
        elif argument.flag == "--micro-batch-size" and value is not None and not (value.number == 1 and value.fixed):
            why = f"the planner decides what a micro-batch holds, up to {_CAPACITY}"
            decision.changes.append(SetValue(argument, (Formula.of(1),), f"{where}{argument.written} set to 1: {why}"))


def _ranks(job: Job) -> str:
    """What becomes of the ranks of static context parallelism."""
    size, domain = job.number("--context-parallel-size", 1), batch_size.domain_size(job)
    if size and domain and domain % size == 0:
        ranks = "1 data-parallel rank becomes" if domain == size else f"{domain // size} data-parallel ranks become"
        return f"its ranks become data-parallel ranks, out of which FlexSP forms groups; {ranks} {domain}"
    return "its ranks become data-parallel ranks, out of which FlexSP forms groups" + (
        f"; there are {size} times as many of them" if size else ""
    )


def _note(job: Job, decision: Decision) -> None:
    notes = decision.notes
    if job.script is None:
        notes.append(
            "the file doesn't say what is started: it must be a GPT, as `-m megatron_flexsp.run pretrain_gpt.py ...`"
        )
    elif "pretrain_gpt" not in job.script.lower():
        notes.append(
            f"{job.script} is not Megatron's pretrain_gpt.py: it must call Megatron's pretrain() with a GPT model; its "
            "own data sets and forward step are replaced, its loss function stays"
        )
    gone = [argument.flag for argument in job.arguments if argument.flag in _GONE]
    if gone:
        notes.append(f"no Megatron from 0.17 on starts with {', '.join(dict.fromkeys(gone))}: see what replaces them")
    if job.unseen:
        notes.append(
            f"arguments in {', '.join(job.unseen)} can't be seen here; what doesn't go with FlexSP among them is "
            "refused when training starts"
        )
    balancing = job.last("--moe-router-load-balancing-type")
    over_all = balancing is not None and any(value.text == "global_aux_loss" for value in balancing.values)
    if over_all and job.number("--context-parallel-size", 1) != 1:
        notes.append(
            "Megatron divides global_aux_loss by the number of data-parallel ranks, to which those of context "
            "parallelism now belong: multiply its --moe-aux-loss-coeff by the context-parallel size"
        )
    if job.last("--load") is not None:
        notes.append("a checkpoint of a run without FlexSP goes on; its consumed samples then count documents")


def _note_recomputation(job: Job, capacity: Formula | None, decision: Decision) -> None:
    """What could take the place of recomputing everything, which stays: memory use is what it was."""
    full = job.last("--recompute-granularity")
    args = namespace(argument for argument in job.arguments if argument.likely)
    if full is None or in_place_of_full(args) is None:
        return
    given = job.value(_CAPACITY) or capacity
    tokens = f"(what {_CAPACITY} has now)" if given is None or given.number is None else f"{given.number}"
    method = job.value("--recompute-method")
    if method is not None and method.text == "uniform" and job.number("--recompute-num-layers", 1) != 1:
        tokens += " or so, since it recomputes layer by layer"
    if job.number("--pipeline-model-parallel-size", 1) != 1:
        tokens += " (less, since a pipeline's other micro-batches keep theirs)"
    decision.notes.append(
        f"{full.when}: {full.written} stays, for every micro-batch. To recompute only where it pays, put "
        f"--flexsp-recompute {_RECOMPUTED_CAPACITY} {tokens} in its place and in that of --recompute-method and "
        f"--recompute-num-layers, and lower {_CAPACITY} to what fits without recomputing; or leave both numbers to a "
        "cost model that --flexsp-profile FILE --flexsp-recompute has measured"
    )

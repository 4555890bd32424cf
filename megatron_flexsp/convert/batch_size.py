"""The global batch: under FlexSP it counts documents, and before it counted samples of a fixed number of tokens."""

from __future__ import annotations

from megatron_flexsp.convert.arguments import Argument, Job, Value
from megatron_flexsp.convert.changes import Add, Change, Formula, SetValue

_SAMPLES = ("--train-samples", "--lr-decay-samples", "--lr-warmup-samples", "--lr-wsd-decay-samples")


def domain_size(job: Job) -> int | None:
    """Data-parallel ranks once there is no static context parallelism; None where the file doesn't tell."""
    tensor = job.number("--tensor-model-parallel-size", 1)
    pipeline = job.number("--pipeline-model-parallel-size", 1)
    if not job.ranks or not tensor or not pipeline or job.ranks % (tensor * pipeline):
        return None
    return job.ranks // (tensor * pipeline)


def keep_tokens(job: Job, mean_length: int | None, changes: list[Change], notes: list[str]) -> None:
    """Scale what counts samples by the length of a document, or say how to."""
    domain = domain_size(job)
    length = job.value("--seq-length")
    batch = job.value("--global-batch-size")
    if job.last("--step-batch-size-schedule") is not None:
        notes.append(
            "--step-batch-size-schedule counts documents now, and its tokens are --seq-length for each of them: adjust "
            "it by hand" + (f"; its sizes must be multiples of {domain}" if domain else "")
        )
    if mean_length is None or length is None:
        _keep_numbers(job, batch, domain, changes, notes)
        return
    if batch is None:
        _state_batch(job, length, mean_length, domain, changes, notes)
        return
    multiple = domain or 1
    for flag in ("--global-batch-size", "--eval-global-batch-size"):
        for argument in _all(job, flag):
            scaled = _scaled(argument.values[0], length, mean_length, multiple)
            changes.append(SetValue(argument, (scaled,), _why_scaled(argument, length, mean_length, scaled)))
    if domain is None:
        notes.append(f"--global-batch-size {_multiple(None)}")
    for flag in _SAMPLES:
        for argument in _all(job, flag):
            scaled = Formula(f"{{}} * {{}} / {mean_length}", (argument.values[0], length))
            if scaled.text != argument.values[0].text:
                changes.append(
                    SetValue(
                        argument,
                        (scaled,),
                        f"{argument.when}: {argument.written} set to {scaled.text or 'as many tokens'}: it counts "
                        f"documents now, of {mean_length} tokens on average",
                    )
                )
    _ramp(job, length, mean_length, multiple, changes, notes)


def _all(job: Job, flag: str) -> list[Argument]:
    return [argument for argument in job.arguments if argument.flag == flag and argument.values]


def _scaled(value: Value, length: Value, mean_length: int, multiple: int) -> Formula:
    """As many documents as hold the samples' tokens, to the nearest multiple and at least one of it."""
    if value.number is not None and length.number is not None:
        nearest = (value.number * length.number + mean_length * multiple // 2) // (mean_length * multiple) * multiple
        if nearest == 0:
            return Formula.of(multiple)
    half, unit = mean_length * multiple // 2, mean_length * multiple
    times = f" * {multiple}" if multiple > 1 else ""
    return Formula(f"({{}} * {{}} + {half}) / {unit}{times}", (value, length))


def _why_scaled(argument: Argument, length: Value, mean_length: int, scaled: Formula) -> str:
    why = f"{argument.when}: {argument.written} set to {scaled.text or 'as many tokens'}: it counts documents now"
    before, after = argument.values[0].number, scaled.number
    if before is None or after is None or length.number is None:
        return f"{why}, of {mean_length} tokens on average"
    tokens, kept = before * length.number, after * mean_length
    return (
        f"{why}; {before} x {length.number} = {tokens:,} tokens before, {after} x {mean_length} = {kept:,} on average "
        f"now ({kept / tokens - 1:+.1%})"
    )


def _multiple(domain: int | None) -> str:
    if domain:
        return f"must stay a multiple of the {domain} data-parallel ranks"
    return "must be a multiple of the data-parallel ranks (all ranks / tensor- and pipeline-parallel size)"


def _keep_numbers(job: Job, batch: Value | None, domain: int | None, changes: list[Change], notes: list[str]) -> None:
    """Without a mean length numbers stay, but for what the data-parallel ranks must divide."""
    length = job.value("--seq-length")
    tokens = f"{length.number:,}" if length is not None and length.number else "--seq-length"
    if batch is None:
        notes.append(
            "--global-batch-size isn't set and so is the number of data-parallel ranks, in documents; to keep the "
            "tokens of a step, set it, or convert with --mean-length TOKENS or --data-path PREFIX"
        )
    else:
        notes.append(
            f"--global-batch-size {batch.source} counts documents now, of {tokens} tokens at most: to keep the tokens "
            f"of a step, multiply it by {tokens} / your documents' mean length (convert with --mean-length TOKENS or "
            f"--data-path PREFIX); it {_multiple(domain)}"
        )
    samples = [flag for flag in _SAMPLES if job.last(flag) is not None]
    if samples:
        notes.append(f"{', '.join(samples)} count documents now: multiply them by the same factor")
    if domain is None:
        return
    for flag in ("--global-batch-size", "--eval-global-batch-size"):
        for argument in _all(job, flag):
            number = argument.values[0].number
            if number is None or number % domain == 0:
                continue
            raised = Formula(f"({{}} + {domain - 1}) / {domain} * {domain}", (argument.values[0],))
            changes.append(
                SetValue(
                    argument,
                    (raised,),
                    f"{argument.when}: {argument.written} set to {raised.text}: it {_multiple(domain)}",
                )
            )
    _ramp(job, None, None, domain, changes, notes)


def _state_batch(
    job: Job, length: Value, mean_length: int, domain: int | None, changes: list[Change], notes: list[str]
) -> None:
    """Write down the global batch that Megatron would take: a micro-batch for each data-parallel rank."""
    micro, context = job.number("--micro-batch-size", 1), job.number("--context-parallel-size", 1)
    if domain is None or not micro or not context or length.number is None:
        notes.append(
            "--global-batch-size isn't set: Megatron takes the number of data-parallel ranks, in documents. Set it to "
            f"tokens of a step / {mean_length}; it {_multiple(domain)}"
        )
        return
    before = Value(str(micro * domain // context), str(micro * domain // context))
    scaled = _scaled(before, Value(str(length.number), str(length.number)), mean_length, domain)
    changes.append(
        Add(
            "--global-batch-size",
            Formula.of(scaled.text),
            f"line {job.line}: --global-batch-size {scaled.text} added: Megatron took micro-batch size x data-parallel "
            f"ranks = {before.text} samples of {length.number} tokens; as many tokens are {scaled.text} documents of "
            f"{mean_length} on average",
        )
    )


def _ramp(
    job: Job, length: Value | None, mean_length: int | None, multiple: int, changes: list[Change], notes: list[str]
) -> None:
    """``--rampup-batch-size START INCREMENT SAMPLES``: sizes that the ranks divide, and that reach the last one."""
    ramp, batch = job.last("--rampup-batch-size"), job.number("--global-batch-size")
    if ramp is None or len(ramp.values) < 3:
        return
    numbers = [value.number for value in ramp.values[:3]]
    if any(number is None for number in numbers) or batch is None or (length is not None and length.number is None):
        notes.append(f"{ramp.when}: {ramp.written}: its sizes count documents now: adjust them by hand")
        return
    start, increment, samples = (number or 0 for number in numbers)
    factor = length.number / mean_length if length is not None and length.number and mean_length else 1.0
    last = (
        max(multiple, round(batch * factor / multiple) * multiple)
        if factor != 1.0
        else -(-batch // multiple) * multiple
    )
    first = min(last, max(multiple, round(start * factor / multiple) * multiple))
    steps = max(1, round((batch - start) / increment)) if increment else 1
    while (last - first) % (steps * multiple):
        steps -= 1
    new = (first, max(multiple, (last - first) // steps), round(samples * factor))
    if new == (start, increment, samples):
        return
    changes.append(
        SetValue(
            ramp,
            tuple(map(Formula.of, new)),
            f"{ramp.when}: {ramp.written} set to {new[0]} {new[1]} {new[2]}: it counts documents now, and its sizes "
            f"must be multiples of the {multiple} data-parallel ranks",
        )
    )

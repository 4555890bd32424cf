"""Scripts that nobody wrote: for any of them bash starts the same but for what FlexSP needs, and comments stay."""

import shlex

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Calls, converted

# Flags that stay as they are, and flags that don't.
KEPT = ["--bf16", "--lr 1e-3", "--train-iters 5", "--swiglu", "--split 99,1,0", "--save 'a b'", "--log-interval=1"]
KEPT += ["--attention-dropout 0.1", "--hidden-dropout $DROPOUT"]
TAKEN_OUT = [
    "--eod-mask-loss",
    "--cp-comm-type p2p a2a",
    "--reset-position-ids",
    "--tp-comm-overlap",
    "--context-parallel-size=2",
]
SET = {"--micro-batch-size 2": "1"}
FORMS = ["array", "string", "command", "appended"]


@st.composite
def scripts(draw: st.DrawFn) -> str:
    """A launch with its flags in groups of several forms, with comments where the form has room for them."""
    flags = ["--seq-length $SEQ", *draw(st.permutations([*KEPT, *TAKEN_OUT, *SET]))]
    flags = flags[: draw(st.integers(3, len(flags)))]
    lines, used = ["#!/bin/bash", "SEQ=512; DROPOUT=0.1"], []
    while flags:
        count = draw(st.integers(1, len(flags)))
        group, flags = flags[:count], flags[count:]
        form = draw(st.sampled_from(FORMS))
        if form == "string" and any("'" in flag for flag in group):
            form = "array"
        name = f"ARGS{len(used)}"
        if form == "array":
            comment = draw(st.sampled_from(["", "  # why", "\n    # above"]))
            lines += [f"{name}=(", *(f"    {flag}{comment}" for flag in group), ")"]
            used.append(f'"${{{name}[@]}}"')
        elif form == "string":
            joint = draw(st.sampled_from([" ", " \\\n  ", "\n  "]))
            lines.append(f'{name}="{joint.join(group)}"')
            used.append(f"${name}")
        elif form == "appended":
            lines += [f"{name}=()", *(f"{name}+=({flag})" for flag in group)]
            used.append(f"${{{name}[@]}}" if not any("'" in flag for flag in group) else f'"${{{name}[@]}}"')
        else:
            used += group
    joint = draw(st.sampled_from([" ", " \\\n    "]))
    lines.append(joint.join(["torchrun --nproc-per-node 2 pretrain_gpt.py", *used]))
    return "\n".join(lines) + draw(st.sampled_from(["\n", "", " 2>&1\n"]))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=scripts())
def test_any_script_starts_the_same_but_for_what_flexsp_needs(script: str, calls: Calls) -> None:
    once = converted(script.encode())
    assert converted(once.data).data == once.data
    (before,), (after,) = calls(script.encode()), calls(once.data)
    wanted = {
        flag: values
        for flag, values in before.flags.items()
        if flag not in {f.split("=")[0].split()[0] for f in TAKEN_OUT}
    }
    for written, value in SET.items():
        flag = shlex.split(written)[0]
        if flag in wanted:
            wanted[flag] = [value]
    micro, context = ("--micro-batch-size" in before.flags) + 1, ("--context-parallel-size" in before.flags) + 1
    wanted |= {"--flexsp": [], "--calculate-per-token-loss": []}
    wanted["--flexsp-max-tokens-per-rank"] = [str(micro * 512 // context)]
    assert after.flags == wanted
    assert [line.partition("#")[2] for line in script.splitlines() if "#" in line] == [
        line.partition("#")[2] for line in once.data.decode().splitlines() if "#" in line
    ]

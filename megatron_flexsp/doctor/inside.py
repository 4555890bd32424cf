"""The doctor's second process imports PyTorch and Megatron, which may crash; it looks at patch points and job.

``main`` reads a ``Request`` on stdin and writes a JSON object on each line of
stdout: what it is about to do, so that a crash can be told where it was, and the findings. Imports are kept short: what
Megatron compiles as it is imported is left uncompiled, since nothing is computed here.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron_flexsp.doctor.findings import Finding, error, ok, refused, warning
from megatron_flexsp.errors import FlexSPError

Say = Callable[[str], None]
"""Is told what comes next."""


@dataclass(frozen=True)
class Request:
    """What to look at."""

    words: tuple[str, ...] | None
    """The job's arguments; None for the installation alone."""

    script: str | None = None
    cpu: bool = False
    world_size: int | None = None
    ranks_per_node: int = 8
    gpu_capability: tuple[int, int] = (9, 0)
    gpu_memory_bytes: int = 80 << 30
    gpu_is_assumed: bool = True
    """No GPU is here to be asked."""

    gpu_name: str | None = None

    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that ``json.dumps(asdict(request))`` made."""
        values: dict[str, Any] = json.loads(text)
        values["words"] = None if values["words"] is None else tuple(values["words"])
        values["gpu_capability"] = tuple(values["gpu_capability"])
        return cls(**values)


def examine(request: Request, say: Say) -> Iterator[Finding]:
    """Everything that needs PyTorch and Megatron."""
    from megatron_flexsp.megatron import releases, seams

    if request.script is not None:  # as the launcher does: a checkout's own Megatron is found first
        sys.path.insert(0, os.path.dirname(os.path.abspath(request.script)))
    started = time.monotonic()
    try:
        found = seams.version()
        seams.check_version()
    except FlexSPError as problem:
        yield refused("megatron", problem)
        found = ""
    for imports in (_import_torch, _import_megatron):
        try:
            imports(request, say)
        except Exception as problem:
            name = imports.__name__.removeprefix("_import_")
            reason = f"{type(problem).__name__}: {problem}"
            yield error(f"import-{name}", f"{name} can't be imported: {reason}", _import_remedy(name, reason))
            return
    if found:
        seconds = time.monotonic() - started
        about = f"{found} in {seams.location().parents[1]}; imported with PyTorch in {seconds:.1f} s"
        if seams.warning() is None:
            yield ok("megatron", f"{about} (tried: {releases.RANGE})")
        else:
            remedy = "training goes on where all patch points fit; compare the first losses with a tried release's"
            yield warning("megatron", f"{about}; tried: {releases.RANGE}", remedy)
    yield from _examine_transformer_engine(say)
    if request.words is None:
        from megatron_flexsp.doctor.patch_points import examine_patch_points

        say("looking at the patch points")
        yield from examine_patch_points(None)
    else:
        from megatron_flexsp.doctor.job import examine_job

        yield from examine_job(request, say)


def _import_torch(request: Request, say: Say) -> None:
    say("importing PyTorch")
    import torch

    if request.cpu:
        os.environ["FLEXSP_DEVICE"] = "cpu"
        return
    # Compilers take seconds to import, and Megatron decorates functions with them.
    torch.compile = _uncompiled  # type: ignore[assignment]
    if not torch.cuda.is_available():
        # Megatron asks for the device when it validates arguments.
        major, minor = request.gpu_capability
        device = SimpleNamespace(major=major, minor=minor, total_memory=request.gpu_memory_bytes, name="assumed")
        torch.cuda.get_device_properties = lambda *_, **__: device  # type: ignore[assignment]
        torch.cuda.get_device_capability = lambda *_, **__: request.gpu_capability  # type: ignore[assignment]


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return _uncompiled if function is None else function


def _import_megatron(request: Request, say: Say) -> None:
    say("importing Megatron")
    if request.cpu:
        from megatron_flexsp import cpu

        cpu.install()
    import megatron.training.arguments  # noqa: F401


_TRANSFORMER_ENGINE_REMEDY = (
    "install the one built for this PyTorch: pip install --no-build-isolation 'transformer-engine[pytorch]'"
)


def _import_remedy(name: str, reason: str) -> str:
    if "transformer_engine" in reason:
        return _TRANSFORMER_ENGINE_REMEDY
    if name == "torch":
        return "install it: pip install 'megatron-flexsp[train]', or the build of PyTorch that suits this cluster"
    return "install it: pip install 'megatron-flexsp[train]', or put what is missing beside the Megatron-LM checkout"


def _examine_transformer_engine(say: Say) -> Iterator[Finding]:
    """A Transformer Engine that is installed and can't be imported is built for another PyTorch or CUDA."""
    from importlib.util import find_spec

    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE or find_spec("transformer_engine") is None:
        return
    say("importing Transformer Engine")
    try:
        import transformer_engine.pytorch  # noqa: F401

        reason = "Megatron does not take it"
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
    yield error(
        "import-transformer-engine",
        f"Transformer Engine is installed and can't be imported: {reason}",
        _TRANSFORMER_ENGINE_REMEDY,
    )


def main() -> None:
    """The process: a request in, lines out."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # Megatron and the libraries under it print; that goes to stderr, which is shown only where something fails.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    gc.disable()  # imports make much that stays; a tenth of their time
    request = Request.from_json(sys.stdin.read())

    def write(**line: object) -> None:
        print(json.dumps(line), file=lines, flush=True)

    for finding in examine(request, lambda doing: write(doing=doing)):
        write(finding=asdict(finding))
    write(done=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that libraries started are not waited for

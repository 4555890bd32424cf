"""What is installed, against what was tried: read from metadata and from files, since importing takes seconds.

Whether it can be imported as well, the process of ``inside`` finds out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_flexsp import __version__
from megatron_flexsp.doctor.findings import Finding, error, ok, warning
from megatron_flexsp.tried import NEWEST_TRIED, OLDEST_TRANSFORMER_ENGINE, PYTHON_TRIED

_PACKAGE = "megatron-flexsp"
_NEEDED = {
    "numpy": "install it: pip install {requirement}",
    "highspy": "install it, the planner's solver: pip install {requirement}",
    "torch": "install it: pip install 'megatron-flexsp[train]', or the build of PyTorch that suits this cluster; "
    "{requirement}",
}
_CUDNN_PACKAGES = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")


def examine_environment(*, cpu: bool) -> Iterator[Finding]:
    """Versions of everything that a run needs; ``cpu`` leaves out what only a GPU needs."""
    yield _python()
    yield ok("megatron-flexsp", f"{__version__} in {Path(__file__).parents[1]}")
    for name, remedy in _NEEDED.items():
        yield _package(name, remedy)
    yield _transformer_engine(cpu)
    yield examine_apex()
    if not cpu:
        yield _nccl()
        yield from _cudnn()


def installed(package: str) -> str | None:
    """The version that a package's metadata states, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """The CUDA version that PyTorch was built for; None for a build without CUDA, or where it can't be told."""
    spec = _spec("torch")
    if spec is None or spec.origin is None:
        return None
    with suppress(OSError):
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
        found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
        return found and found.group(1)
    return None


def _requirements() -> dict[str, Requirement]:
    """What this package asks for, by name; empty where it runs from a clone that is not installed."""
    try:
        declared = metadata.requires(_PACKAGE) or ()
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name.lower(): requirement for requirement in map(Requirement, declared)}


def _python() -> Finding:
    found = platform.python_version()
    tried = f"tried: {' and '.join(PYTHON_TRIED)}"
    asked = ""
    with suppress(metadata.PackageNotFoundError):
        asked = metadata.metadata(_PACKAGE).get("Requires-Python") or ""
    if not SpecifierSet(asked).contains(found, prereleases=True):
        return error("python", f"{found}; {asked} is needed", f"make an environment with Python {PYTHON_TRIED[0]}")
    if found.rpartition(".")[0] not in PYTHON_TRIED:
        return warning("python", f"{found}; {tried}", "if something fails, try one of those")
    return ok("python", f"{found} ({tried})")


def _package(name: str, remedy: str) -> Finding:
    """One needed package: there, and in the range that setup.py declares."""
    requirement = _requirements().get(name)
    asked = str(requirement) if requirement is None or not requirement.marker else f"{name}{requirement.specifier}"
    advice = remedy.format(requirement=f"'{asked}'" if requirement else name)
    found = installed(name)
    if found is None:
        return error(name, "not installed", advice)
    tried = NEWEST_TRIED.get(name)
    about = f"{found} (tried: up to {tried})" if tried else found
    if requirement is not None and not requirement.specifier.contains(found, prereleases=True):
        return error(name, f"{found}; {requirement.specifier} is needed", advice)
    if requirement is None:
        return warning(
            name, f"{about}; megatron-flexsp itself is not installed, so its range is unknown", "pip install"
        )
    if tried and _release(found)[:2] > _release(tried)[:2]:
        return warning(name, f"{found}; the newest that was tried is {tried}", f"if something fails, try {tried}")
    return ok(name, about)


def _transformer_engine(cpu: bool) -> Finding:
    check = "transformer-engine"
    found = installed("transformer-engine")
    oldest = ".".join(map(str, OLDEST_TRANSFORMER_ENGINE))
    if found is None and (spec := _spec("transformer_engine")) is not None:
        return ok(check, f"of unknown version, {spec.origin}")
    if found is None:
        if cpu:
            return ok(check, "not installed (nor needed without a GPU)")
        return warning(
            check,
            "not installed: training needs --transformer-impl local, which attends to one sequence at a time",
            "pip install 'transformer-engine[pytorch]'",
        )
    if _release(found) < OLDEST_TRANSFORMER_ENGINE:
        return error(check, f"{found}; {oldest} or newer is needed", "upgrade it, or set --transformer-impl local")
    return ok(check, f"{found} (read: {oldest} to {NEWEST_TRIED[check]}; the real one has not been run yet)")


def examine_apex() -> Finding:
    """NVIDIA's apex, its namesake on PyPI, or none; told apart by their files."""
    spec = _spec("apex")
    folders = list((spec and spec.submodule_search_locations) or ())
    if not folders:
        return ok("apex", "not installed (nor needed: Megatron falls back to Transformer Engine or PyTorch)")
    folder = Path(folders[0])
    version = installed("apex") or "of unknown version"
    if (folder / "multi_tensor_apply").is_dir():
        if _spec("amp_C") is None:
            return warning(
                "apex",
                f"NVIDIA's, {version} in {folder}, but without its CUDA extensions (amp_C), which Megatron asks for",
                "build it again with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or pip uninstall apex",
            )
        return ok("apex", f"NVIDIA's, {version} in {folder}")
    summary = ""
    with suppress(metadata.PackageNotFoundError):
        summary = metadata.metadata("apex").get("Summary") or ""
    is_pypis = (folder / "lib" / "libapex.py").is_file() or "pyramid" in summary.lower()
    what = "the namesake on PyPI, a toolkit for Pyramid web sites" if is_pypis else "an unknown package of that name"
    return warning(
        "apex",
        f"not NVIDIA's: {what} ({version} in {folder})",
        "pip uninstall apex; NVIDIA's is built from https://github.com/NVIDIA/apex and isn't on PyPI",
    )


def _nccl() -> Finding:
    packages = {name: version for name in _NCCL_PACKAGES if (version := installed(name))}
    if len(packages) > 1:
        found = ", ".join(f"{name} {version}" for name, version in packages.items())
        return warning("nccl", f"{found}: they install the same file", "uninstall those that PyTorch does not ask for")
    for name, version in packages.items():
        return ok("nccl", f"{version} ({name}); not tried yet")
    with suppress(OSError, AttributeError):
        code = ctypes.c_int()
        if ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(code)) == 0:
            major, rest = divmod(code.value, 10_000)
            return ok("nccl", f"{major}.{rest // 100}.{rest % 100} (libnccl.so.2 of the system); not tried yet")
    return warning(
        "nccl",
        "no nvidia-nccl package and no libnccl.so.2",
        "PyTorch may have one built in: python -c 'import torch; print(torch.cuda.nccl.version())'",
    )


def _cudnn() -> Iterator[Finding]:
    """What Transformer Engine attends with, unless flash-attn is there. A container's own copy has no metadata."""
    for name in _CUDNN_PACKAGES:
        version = installed(name)
        if version is None:
            continue
        if _release(version) < (9, 6):
            yield warning(
                "cudnn",
                f"{version} ({name}): before 9.6 it prepares packed attention anew for every shape of a pack",
                "upgrade it, or install flash-attn and set NVTE_FUSED_ATTN=0",
            )
        else:
            yield ok("cudnn", f"{version} ({name}); not tried yet")
        return


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module would be imported from."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _release(version: str) -> tuple[int, ...]:
    try:
        return Version(version).release
    except InvalidVersion:
        return ()

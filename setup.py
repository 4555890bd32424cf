"""Package metadata: what is installed, and what each extra adds."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def package_version() -> str:
    """Read ``__version__`` from the package without importing it: the one place that holds it."""
    source = (ROOT / "megatron_flexsp" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_flexsp/__init__.py has no line __version__ = "..."')
    return match.group(1)


# Planning and simulating: no torch, so that a laptop or another framework can use them.
BASE = ["click>=8.1,<9", "highspy>=1.7,<2", "numpy>=1.26,<3", "packaging>=23", "rich>=13,<16"]

CONVERT = ["ruamel.yaml>=0.18,<0.20", "tree-sitter>=0.23,<0.27", "tree-sitter-bash>=0.23,<0.26"]

EXTRAS = {
    "train": [
        "megatron-core>=0.17.1,<0.21",
        "torch>=2.6,<3",
        # Two packages that Megatron imports and its wheel does not declare.
        "psutil>=5.9,<8",  # saving a torch_dist checkpoint
        "PyYAML>=6,<7",  # importing megatron.training, in 0.18
    ],
    # The pictures of `flexsp report`.
    "report": ["matplotlib>=3.8,<4", "plotly>=6,<8"],
    # Reading the files of `flexsp convert`.
    "convert": CONVERT,
    "test": [
        *CONVERT,
        "einops>=0.7,<1",  # what Megatron-FSDP computes with
        "hypothesis>=6.100,<7",
        "matplotlib>=3.8,<4",
        "mypy>=1.13,<3",
        "plotly>=6,<8",
        "psutil>=5.9,<8",
        "pytest>=8,<10",
        "pytest-xdist>=3.5,<4",
        "ruff>=0.9,<1",
        "tensorboard>=2.16,<3",
        "transformers>=4.50,<6",  # what --sft tokenises with
    ],
}

setup(
    name="megatron-flexsp",
    version=package_version(),
    description="A context-parallel group for each sequence: Megatron-LM trains faster on long-tailed text.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # megatron-core asks for 3.12 as well.
    python_requires=">=3.12",
    package_data={
        "megatron_flexsp.planner": ["cost_models/*.json"],
        "megatron_flexsp.report": ["page.html"],
        "megatron_flexsp.convert": ["megatron_flags.txt"],
    },
    packages=find_packages(include=["megatron_flexsp", "megatron_flexsp.*"]),
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["flexsp = megatron_flexsp.cli:main"]},
)

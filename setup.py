"""Packaging: metadata, the one sglang pin, the supported versions beside it, and which folder is which package."""

from pathlib import Path

from setuptools import find_packages, setup

SGLANG_VERSION = "0.5.23"
SUPPORTED_SGLANG = [SGLANG_VERSION]  # versions with which the tests pass

INSTALL_REQUIRES = [
    f"sglang=={SGLANG_VERSION}",
    "torch",
    "triton",
    "numpy",
    "numba",
    "scipy",
    "regex",
    "highspy>=1.9",
    "safetensors",
    "math-verify[antlr4_13_2]",
    "openai",
    "rich",
    "prometheus-client",
    "pyyaml",
    "tqdm",
]
TEST_REQUIRES = ["pytest", "hypothesis", "ruff", "mypy", "pulp", "matplotlib", "schemathesis", "sglang-router"]

setup(
    name="sglang-ets",
    version="0.1.0",
    description="PRM-guided tree search inside the SGLang scheduler",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[
        *find_packages(include=["sglang_ets", "sglang_ets.*"]),
        "sglang_ets.kernels",
        "sglang_ets.patches",
    ],
    package_dir={"sglang_ets.kernels": "kernels", "sglang_ets.patches": "patches"},
    package_data={"sglang_ets": ["models/*", "models/*/*", "stand_in/*/*", "py.typed", "api/view_page.*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={"test": TEST_REQUIRES},
    entry_points={
        "sglang.srt.plugins": ["sglang_ets = sglang_ets.plugin:register"],
        "console_scripts": ["sglang-ets = sglang_ets.cli:main"],
    },
)

"""Fetches the files of frameworks that call DeepEP into `.frameworks/`, which git ignores.

From the package registry by pip, without dependencies; what is not there from a git repository:

    python tests/frameworks/fetch.py
    python tests/frameworks/fetch.py megatron-core vllm==0.11.0
    python tests/frameworks/fetch.py --git xtuner=https://github.com/InternLM/xtuner
    python tests/frameworks/fetch.py --git deepep=https://github.com/deepseek-ai/DeepEP
    python tests/frameworks/fetch.py --git torchtitan=https://github.com/pytorch/torchtitan
    python tests/frameworks/fetch.py --git lightllm=https://github.com/ModelTC/LightLLM
    python tests/frameworks/fetch.py --git megatron-dev=https://github.com/NVIDIA/Megatron-LM#dev
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".frameworks"
FROM_REGISTRY = ("megatron-core", "nemo-automodel", "deepspeed", "vllm", "sglang", "lmdeploy")
PYTHON = "3.12"  # the least that all of them accept; nothing of them is installed
MARK = "VERSION"
# What the tests load, by the first letters of the path: a few megabytes instead of hundreds.
KEPT = {
    "megatron-core": ("megatron/core/fusions/", "megatron/core/transformer/moe/"),
    "megatron-dev": ("megatron/core/fusions/", "megatron/core/transformer/moe/"),
    "nemo-automodel": ("nemo_automodel/components/moe/",),
    "deepspeed": ("deepspeed/module_inject/auto_ep_comm.py",),
    "vllm": (
        "vllm/model_executor/layers/fused_moe/",
        "vllm/utils/math_utils.py",
        "vllm/v1/worker/ubatching.py",
    ),
    "sglang": ("sglang/srt/environ.py", "sglang/srt/layers/moe/"),
    "lmdeploy": ("lmdeploy/pytorch/backends/", "lmdeploy/pytorch/envs.py"),
    "deepep": ("tests/elastic/",),
    "deepep-2.5": ("tests/ep/",),
    "torchtitan": ("torchtitan/distributed/deepep/",),
    "lightllm": ("lightllm/common/basemodel/layer_weights/meta_weights/fused_moe/impl/",),
    "xtuner": ("xtuner/v1/module/dispatcher/", "xtuner/v1/ops/"),
}


def from_registry(requirement: str) -> str:
    """Downloads a wheel, or the source where there is none; returns the version.

    What the tests load is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder]
        subprocess.run([*command, "--python-version", PYTHON, requirement], check=True)
        (file,) = Path(folder).iterdir()
        name, version = file.name.removesuffix(".tar.gz").split("-")[:2]
        name = name.replace("_", "-")
        target, kept = FOLDER / name, KEPT[name]
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist():
                    if member.endswith(".py") and member.startswith(kept):
                        archive.extract(member, target)
        else:
            with tarfile.open(file) as archive:
                for item in archive.getmembers():
                    item.name = item.name.partition("/")[2]
                    if item.name.endswith(".py") and item.name.startswith(kept):
                        archive.extract(item, target, filter="data")
        (target / MARK).write_text(version)
    return f"{name} {version}"


def from_git(name: str, source: str) -> str:
    """Clones a repository without history, keeps what the tests load; returns the commit.

    The source may end in `#` and a branch.
    """
    target = FOLDER / name
    target.mkdir(parents=True, exist_ok=True)
    source, _, branch = source.partition("#")
    clone = ["git", "clone", "-q", "--bare", "--depth", "1"]
    with tempfile.TemporaryDirectory() as folder:
        of_branch = ["--branch", branch] if branch else []
        subprocess.run([*clone, *of_branch, source, folder], check=True)
        git = ["git", "-C", folder]
        commit = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        archive = Path(folder) / "files.tar"
        subprocess.run([*git, "archive", "-o", str(archive), "HEAD", *KEPT[name]], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    (target / MARK).write_text(f"commit {commit}")
    return f"{name} {commit}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("requirements", nargs="*", help=f"default: {' '.join(FROM_REGISTRY)}")
    parser.add_argument("--git", action="append", default=[], metavar="NAME=SOURCE")
    args = parser.parse_args()
    failed = []
    jobs = args.requirements or ([] if args.git else FROM_REGISTRY)
    for requirement in jobs:
        try:
            print(from_registry(requirement), flush=True)
        except subprocess.CalledProcessError as error:
            failed.append(f"{requirement}: {error}")
    for pair in args.git:
        name, _, source = pair.partition("=")
        try:
            print(from_git(name, source), flush=True)
        except subprocess.CalledProcessError as error:
            failed.append(f"{pair}: {error}")
    if failed:
        sys.exit("not fetched:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()

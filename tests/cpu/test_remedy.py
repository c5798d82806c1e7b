"""The commands that messages name: they work where this copy of epjit came from."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from epjit import errors, remedy

ROOT = Path(__file__).resolve().parents[2]


def has_torch_of(monkeypatch: pytest.MonkeyPatch, cuda: str | None, driver: int = 0) -> None:
    """A torch that was built for a CUDA, or for none; a driver of a CUDA, or none."""

    def version(pointer: object) -> None:
        pointer._obj.value = driver * 1000 + 80  # type: ignore[attr-defined]

    library = SimpleNamespace(cuDriverGetVersion=version) if driver else None
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(remedy, "_driver", lambda: library)


def is_installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """This copy does not lie in a checkout; what its wheel says is what pyproject.toml says."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    found = re.findall(r"^([\w-]+) = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL)
    requires = [
        f"{each}; extra == '{extra}'"
        for extra, body in found
        for each in re.findall('"(.*?)"', body)
    ]
    monkeypatch.setattr(remedy, "__file__", str(folder / "epjit" / "remedy.py"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=1.26", *requires])


def test_a_checkout_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    has_torch_of(monkeypatch, "13.0")
    assert remedy.install_command("cu*") == f"pip install -e '{ROOT}[cu13]'"
    assert remedy.install_command("") == f"pip install -e {ROOT}"


def test_of_an_installed_copy_the_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyPI has no epjit, or a stranger's."""
    is_installed(monkeypatch, tmp_path)
    has_torch_of(monkeypatch, "12.8")
    command = remedy.install_command("cu*-rdma")
    assert "'cuda-bindings>=12.8,<13'" in command
    assert "nvidia-nvshmem-cu12" in command
    assert shlex.split(command)[:2] == ["pip", "install"]
    assert not re.search(r"epjit|cu13|cuda13", command)
    assert remedy.install_command("") == "pip install 'numpy>=1.26'"


def test_of_a_copied_folder_at_least_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    is_installed(monkeypatch, tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert "its extra bench" in remedy.install_command("bench")


@pytest.mark.parametrize(
    ("cuda", "driver", "major"),
    [("12.8", 13, 12), ("13.0", 12, 13), (None, 12, 12), (None, 14, 13), (None, 0, None)],
)
def test_the_cuda_is_that_of_torch_or_of_the_driver(
    cuda: str | None, driver: int, major: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_torch_of(monkeypatch, cuda, driver)
    assert remedy.cuda_major() == major
    both = "cu13" in remedy.install_command("cu*") and "cu12" in remedy.install_command("cu*")
    assert both == (major is None)
    assert ("-cu12" in remedy.upgrade_command("nvidia-nvjitlink")) == (major != 13)


def test_without_a_driver_torch_is_that_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has_torch_of(monkeypatch, None)
    assert remedy.install_command("torch").endswith("https://download.pytorch.org/whl/cpu")
    has_torch_of(monkeypatch, None, driver=13)
    assert remedy.install_command("torch").endswith("[torch]'")


def test_each_package_is_brought_by_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs the package matplotlib.*\[bench\]'$"):
        errors.require("matplotlib", package="matplotlib", extra="bench")


def test_no_message_sends_the_user_to_an_index_for_epjit() -> None:
    for file in (ROOT / "epjit").rglob("*.py"):
        assert not re.search(r"pip install[^\n]*epjit\[", file.read_text()), file

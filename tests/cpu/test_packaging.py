"""Contents of wheel and sdist, and modules that `import epjit` loads."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(kind: str, project: Path, folder: Path) -> Path:
    """Builds a wheel or an sdist without network, in a folder of its own."""
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "-n", "--outdir", folder, project],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (file,) = folder.iterdir()
    return file


def tracked(*patterns: str) -> list[str]:
    """Files of git, and those that would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def copy_tree(folder: Path) -> Path:
    """Copies the project, so that no build folder is left in the working tree."""
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    return copy_tree(tmp_path_factory.mktemp("tree"))


def test_wheel_holds_every_source(tree: Path, tmp_path: Path) -> None:
    wheel = build("wheel", tree, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(tree).as_posix()
        for path in (tree / "epjit").rglob("*")
        if path.suffix in {".py", ".cu", ".cuh", ".typed"}
    }
    assert any(name.endswith(".cu") for name in wanted)
    assert any(name.endswith(".cuh") for name in wanted)
    assert not wanted - packed
    assert not {name for name in packed if not name.startswith(("epjit/", "epjit-"))}


def test_compat_wheel_holds_only_the_drop_in(tree: Path, tmp_path: Path) -> None:
    wheel = build("wheel", tree / "compat", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {
        path.relative_to(tree / "compat").as_posix()
        for path in (tree / "compat").glob("deep_ep*/**/*.py")
    }


def test_sdist_holds_what_one_needs_to_work_on_it(tree: Path, tmp_path: Path) -> None:
    sdist = build("sdist", tree, tmp_path)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("bench", "compat", "docs", "epjit", "examples", "tests")
    files = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md")
    assert not set(tracked(*folders, *files)) - packed


def test_versions_agree() -> None:
    import epjit

    for project in (ROOT, ROOT / "compat"):
        assert f'version = "{epjit.__version__}"' in (project / "pyproject.toml").read_text()
    assert f"epjit[torch]=={epjit.__version__}" in (ROOT / "compat/pyproject.toml").read_text()


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)  # a .pth file of another package may import it\n"
        "import epjit\n"
        "loaded = set(sys.modules) - before\n"
        "heavy = {'torch', 'numpy', 'cupy', 'cuda', 'filelock'} & loaded\n"
        "assert not heavy, heavy\n"
        "assert set(epjit.__all__) <= set(dir(epjit))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)


def test_every_public_name_resolves() -> None:
    import epjit

    for name in epjit.__all__:
        assert getattr(epjit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        epjit.nothing  # noqa: B018

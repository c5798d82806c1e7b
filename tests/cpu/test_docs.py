"""README and docs: every block runs, every message that is explained exists, the site builds.

README's Python also passes mypy and pyright as a user's own code would.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epjit.bench.timing import free_port
from tests.cpu.test_cli import cache_dir, invoke  # noqa: F401
from tests.harness.launch import run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "compat/README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = {"python": "python", "bash": "bash"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_is_of_a_language_that_is_run(page: Path) -> None:
    languages = {language for language, _ in BLOCK.findall(page.read_text())}
    assert languages <= set(RUN) | {"text"}, "```text is for what is not code"


# ---- Python -------------------------------------------------------------------------------------


def prelude(group: Any) -> dict[str, Any]:
    """Names that the pages take for granted: a group of two ranks, tokens, experts."""
    import torch

    torch.manual_seed(group.rank())
    probabilities = torch.rand(16, 8)
    topk_weights, topk_idx = probabilities.topk(2, dim=1)
    return {
        "group": group,
        "x": torch.randn(16, 256).bfloat16().requires_grad_(),
        "topk_idx": topk_idx,
        "topk_weights": topk_weights.requires_grad_(),
        "num_experts": 8,
        "expert_matrices": torch.randn(4, 256, 256).bfloat16().requires_grad_(),
        "my_experts": lambda rows, *_: rows.to(torch.bfloat16),
        "max_tokens": 16,
        "hidden": 256,
        "num_ranks": group.size(),
    }


def run_page(group: Any, name: str) -> None:
    """All blocks of a page, one after the other, in one namespace."""
    page = ROOT / name
    sys.path.insert(0, str(ROOT / "compat"))
    names = prelude(group)
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


README, *OTHERS = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", OTHERS, ids=ids)
def test_python_blocks_run(page: Path) -> None:
    run(run_page, 2, page.relative_to(ROOT).as_posix())


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """README's program, saved under the name that README gives it; it needs nothing else."""
    (program,) = blocks(README, "python")
    file = tmp_path / "layer.py"
    file.write_text(program)
    return file


def outside(layer: Path, *command: str) -> str:
    """Runs a command of this Python's beside the file; returns what it says."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=layer.parent,
        env={**os.environ, "PYTHONPATH": path, "EPJIT_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_program_of_the_readme_runs(layer: Path) -> None:
    ranks = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    said = outside(layer, "torch.distributed.run", *ranks, layer.name)
    assert len(re.findall(r"rank [01]: 512 tokens, \d+ rows", said)) == 2


def test_the_program_of_the_readme_passes_mypy(layer: Path) -> None:
    pytest.importorskip("mypy")
    # torch's own functions are not all typed; what is inside of epjit, `make type` looks at.
    lenient = ["--allow-untyped-calls", "--follow-imports=silent", f"--cache-dir={layer.parent}"]
    outside(layer, "mypy", "--strict", *lenient, layer.name)


def test_the_program_of_the_readme_passes_pyright(layer: Path) -> None:
    pytest.importorskip("pyright")
    if not shutil.which("npm"):
        pytest.skip("pyright's package fetches the checker itself by npm, which is not here")
    outside(layer, "pyright", "--pythonpath", sys.executable, layer.name)


# ---- commands -----------------------------------------------------------------------------------


def check_by_reading(command: list[str]) -> str:
    """The fault of a command that a test cannot run; empty when there is none."""
    project = (ROOT / "pyproject.toml").read_text()
    match command:
        case ["pip", "install", *requirements]:
            section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
            extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
            for requirement in requirements:
                asked = re.fullmatch(r"(?:epjit|\.)\[([\w,]+)\]", requirement)
                if asked and not set(asked[1].split(",")) <= extras:
                    return f"{requirement}: the extras are {sorted(extras)}"
                if requirement.startswith("./") and not (ROOT / requirement).is_dir():
                    return f"there is no {requirement}"
            return ""
        case ["make", target, *_]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return "" if target in targets else f"the Makefile has no {target}"
        case ["bash", script, *_]:
            syntax = ["bash", "-n", script]
            return subprocess.run(syntax, cwd=ROOT, capture_output=True, text=True).stderr
        case ["python3", "-m", "venv", folder]:
            return "" if folder else "a folder is missing"
        case ["torchrun", "--nproc-per-node", _, script]:
            known = (ROOT / script).exists() or script == "layer.py"
            return "" if known else f"there is no {script}"
        case ["python", script, *_]:
            return "" if (ROOT / script).exists() else f"there is no {script}"
        case ["git", "clone", *_] | ["cd", _] | ["source", _]:
            return ""
    return "nothing runs or checks this command"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=ids)
@pytest.mark.usefixtures("cache_dir")
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has torch already; test_cli.py has some in processes of their own."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks(page, "bash")).splitlines():
        for part in line.partition("#")[0].split("&&"):
            command = shlex.split(part)
            if command[:3] == ["python", "-m", "epjit"]:
                invoke(*command[3:])
            else:
                assert not command or not check_by_reading(command), (
                    line,
                    check_by_reading(command),
                )


def test_the_launch_script_runs() -> None:
    """On this host alone: four ranks in two domains; every sum is checked."""
    environment = {**os.environ, "EPJIT_BACKEND": "cpu", "PYTHON": sys.executable, "RANKS": "4"}
    done = subprocess.run(
        ["bash", "examples/launch_two_nodes.sh", "try", "--tokens=16", "--hidden=64", "--rounds=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"of 4, node \d of 2, cpu: 2 of 2 rounds right", done.stdout)) == 4


def test_the_launch_script_leaves_the_choice_to_nvshmem_and_the_user() -> None:
    """It exported IBRC and IBGDA=0: nobody got IBGDA without knowing of it."""
    script = (ROOT / "examples/launch_two_nodes.sh").read_text()
    assert not re.search(r"^\s*export NVSHMEM", script, re.MULTILINE)
    assert re.search(r"^\s*# export NVSHMEM_DEBUG=INFO", script, re.MULTILINE)
    assert "ulimit -l" in script


# ---- messages -----------------------------------------------------------------------------------


def texts_of(source: Path) -> list[str]:
    """Every string of a module; what is filled in is ``…``."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            found.append("".join(map(str, parts)))
    return found


def test_every_message_that_is_explained_exists() -> None:
    """A problem is a heading, and under it stands what is said: in a block, with … for values."""
    texts = "\n".join(t for file in (ROOT / "epjit").rglob("*.py") for t in texts_of(file))
    page = ROOT / "docs/troubleshooting.md"
    assert len(re.findall("^### ", page.read_text(), re.MULTILINE)) > 20
    for message in "".join(blocks(page, "text")).splitlines():
        pattern = r"[^\n]*".join(re.escape(part.strip()) for part in message.split("…"))
        assert re.search(pattern, texts), f"nothing says {message!r}"


# ---- places in the code -------------------------------------------------------------------------

PLACE = re.compile(r"`([\w/]+\.(?:py|cuh?)): ([\w.]+)`")  # `file: name`, the file from epjit/


def python_names(tree: ast.AST, owner: str = "") -> set[str]:
    """Classes and functions of a module; a method is `Class.method`."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            names |= {node.name, *python_names(node, f"{node.name}.")}
        elif isinstance(node, ast.FunctionDef):
            names.add(owner + node.name)
    return names


def cuda_names(source: str) -> set[str]:
    """Classes and device functions of a source, a method by the class that it follows."""
    names, owner = set(), ""
    declared = r"^(?:class|struct) (\w+)[^;{}]*{|^}|__device__[^;{}()]*?(\w+)\("
    for found in re.finditer(declared, source, re.MULTILINE):
        kind, function = found.groups(default="")
        if not function:
            owner = f"{kind}." if kind else ""
        names.add(owner + function if function else kind)
    return names


def missing_place(file: str, name: str) -> str:
    """The fault of a place; empty when there is none."""
    folder = ROOT / "epjit"
    path = folder / file
    if not path.is_file():
        return f"there is no epjit/{file}"
    text = path.read_text()
    names = python_names(ast.parse(text)) if path.suffix == ".py" else cuda_names(text)
    return "" if name in names else f"epjit/{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_place_that_is_named_exists(page: Path) -> None:
    places = PLACE.findall(page.read_text())
    assert not [wrong for place in places if (wrong := missing_place(*place))]
    if page.name.startswith("life-"):
        assert len(places) > 20


def test_a_place_that_does_not_exist_is_found() -> None:
    assert not missing_place("modes/base.py", "Mode.launch")
    assert not missing_place("cuda_src/epjit/sync.cuh", "enter")
    assert not missing_place("cuda_src/low_latency/plan.cuh", "Plan.make")
    for place in (
        ("modes/none.py", "Mode.launch"),
        ("modes/base.py", "launch"),
        ("modes/base.py", "Mode.dispatch"),
        ("cuda_src/epjit/sync.cuh", "Plan.make"),
        ("cuda_src/low_latency/plan.cuh", "make"),
    ):
        assert missing_place(*place), place


# ---- generated parts ----------------------------------------------------------------------------


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_variables_is_that_of_the_code() -> None:
    from epjit import env

    page = hooks().on_page_markdown((ROOT / "docs" / "environment.md").read_text())
    assert "<!--" not in page
    for variable in env.VARIABLES:
        assert f"| `{variable.name}` |" in page
    readme = (ROOT / "README.md").read_text()
    known = {variable.name for variable in env.VARIABLES}
    assert set(re.findall(r"`(EPJIT_\w+)`", readme)) <= known


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    ids = set(re.findall(r'<h\d id="([\w.]+)"', api))
    assert not {name for name in ids if "__" in name}
    for name in public_names():
        assert name in ids, f"docs/api.md lacks {name}"


def public_names() -> set[str]:
    """Public names, as users import them."""
    import epjit
    from epjit import moe

    names = ("Buffer", "Config", "ElasticBuffer", "EventOverlap")
    classes = {name: getattr(epjit, name) for name in names}
    methods = {
        f"epjit.{name}.{method}"
        for name, found in classes.items()
        for method in vars(found)
        if method[0] != "_" and callable(getattr(found, method))
        if not (getattr(found, method).__doc__ or "").startswith("Not served")
    }
    names = {f"epjit.{name}" for name in epjit.__all__} | {f"epjit.moe.{n}" for n in moe.__all__}
    return (names | methods) - {"epjit.__version__", "epjit.topk_idx_t"}

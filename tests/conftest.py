"""Tiers of the tests: a bare ``pytest`` runs every one that this machine can run.

``tests/cpu`` must see no GPU, or its calls would take the CUDA backend; ``tests/gpu`` needs its
variables before CUDA starts; the ranks of ``tests/dist`` inherit theirs from a server that is
started once. So each tier gets a process of its own when paths of several are asked for, and what
was skipped in all of them is said again at the end. Paths of one tier run as with any pytest.

Nothing that a test keeps lies outside of temporary folders: epjit's cache is one of the session,
unless EPJIT_CACHE_DIR is set. The workers of pytest-xdist and processes that tests start share it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

# One OpenMP thread for every process, before any imports torch: several run side by side as it is,
# and threads that wait for others at the end of a parallel loop spin on cores that those need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_HERE = Path(__file__).parent
_SUMMARY = "EPJIT_TEST_SUMMARY"  # names the file that a tier's process leaves its numbers in
_summary = os.environ.pop(_SUMMARY, "")  # not for a pytest that a test starts
_FOLDER = pytest.StashKey[str]()  # of the cache
_NOT_RUN = pytest.StashKey[dict[str, str]]()
_FAILURES = ("failed", "error")
_OUTCOMES = ("passed", *_FAILURES, "skipped", "xfailed", "xpassed")


@dataclass(frozen=True)
class Tier:
    """A folder of tests that runs in a process of its own.

    Attributes:
        needs_gpu: It is left out where torch finds no GPU.
        first: Options of pytest that the user's come after, and win over.
        last: Options of pytest that win over the user's.
    """

    needs_gpu: bool
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


# Virtual ranks need a GPU to themselves.
TIERS = {
    "cpu": Tier(needs_gpu=False, first=("-n", "auto", "--dist", "worksteal")),
    "gpu": Tier(needs_gpu=True, last=("-n", "0")),
    "dist": Tier(needs_gpu=True),
}
_FETCHED = {"frameworks": "`make test-frameworks` fetches what it needs"}


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _paths_by_tier(config: pytest.Config) -> dict[str, list[str]]:
    """Paths of the command line by tier; those of a tier that nobody asked for are missing."""
    paths: dict[str, list[str]] = {}
    for argument in config.args:
        path = Path(config.invocation_params.dir, argument.partition("::")[0]).resolve()
        if path in (_HERE, _HERE.parent):
            for tier in TIERS:
                paths.setdefault(tier, []).append(str(_HERE / tier))
        elif _HERE in path.parents:
            paths.setdefault(path.relative_to(_HERE).parts[0], []).append(argument)
    return paths


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Runs each tier of several in its own process; leaves one alone to pytest."""
    if hasattr(config, "workerinput") or config.option.help or config.option.version:
        return None
    paths = _paths_by_tier(config)
    if len(paths) < 2:
        return None
    everything = set(TIERS) <= set(paths)
    num_gpus = _num_gpus()
    not_run = dict(_FETCHED) if everything else {}
    for name in [name for name in paths if name in TIERS and TIERS[name].needs_gpu]:
        if not num_gpus:
            not_run[name] = "torch finds no GPU"
            del paths[name]
    if len(paths) == 1:  # no process beside this one is needed
        (config.args,) = paths.values()
        config.stash[_NOT_RUN] = not_run
        return None
    return _run_tiers(config, paths, not_run)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Hides the GPUs from the tier that is about machines without one."""
    if set(_paths_by_tier(session.config)) == {"cpu"}:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run_tiers(config: pytest.Config, paths: dict[str, list[str]], not_run: dict[str, str]) -> int:
    """One pytest after the other; the exit code is the first that is not 0."""
    given = [str(argument) for argument in config.invocation_params.args]
    options = [argument for argument in given if argument not in config.option.file_or_dir]
    xdist = config.pluginmanager.hasplugin("xdist")
    lines: list[str] = []
    failed: list[str] = []
    skipped, total, code = Counter[str](), Counter[str](), 0
    for name, of_tier in paths.items():
        tier = TIERS.get(name, Tier(needs_gpu=False)) if xdist else Tier(needs_gpu=False)
        sys.stdout.write(f"\n==== tests/{name} ====\n")
        sys.stdout.flush()
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "summary.json"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *tier.first, *options, *tier.last, *of_tier],
                env={**os.environ, _SUMMARY: str(file)},
                cwd=config.invocation_params.dir,
                check=False,
            )
            found = json.loads(file.read_text()) if file.exists() else {}
        counts = found.get("counts", {})
        total.update(counts)
        failed += found.get("failed", [])
        skipped.update(found.get("skipped", {}))
        what = _in_words(counts) or f"no test ran, exit code {done.returncode}"
        lines.append(f"{name:<11} {what} ({time.monotonic() - start:.0f} s)")
        if not code and done.returncode != pytest.ExitCode.NO_TESTS_COLLECTED:
            code = done.returncode
        if done.returncode == pytest.ExitCode.INTERRUPTED:
            break
    lines += [f"{name:<11} not run: {reason}" for name, reason in not_run.items()]
    lines += [f"failed       {test}" for test in failed]
    lines += [f"skipped {number:<4} {reason}" for reason, number in skipped.most_common()]
    sys.stdout.write("\n".join(["", "==== all tiers ====", *lines, _in_words(total), ""]))
    return code


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in _OUTCOMES if counts.get(name))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Says which tiers did not run; in a tier's own process, leaves the numbers for the end."""
    for name, reason in config.stash.get(_NOT_RUN, {}).items():
        terminalreporter.write_line(f"tests/{name} did not run: {reason}")
    if _summary:
        reports = terminalreporter.stats
        summary = {
            "counts": {name: len(reports.get(name, ())) for name in _OUTCOMES},
            "failed": [report.nodeid for name in _FAILURES for report in reports.get(name, ())],
            "skipped": Counter(
                report.longrepr[2].removeprefix("Skipped: ")
                for report in reports.get("skipped", ())
            ),
        }
        Path(_summary).write_text(json.dumps(summary))


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the folder, before a test or a fork server starts."""
    if "EPJIT_CACHE_DIR" not in os.environ:
        config.stash[_FOLDER] = tempfile.mkdtemp(prefix="epjit-tests-")
        os.environ["EPJIT_CACHE_DIR"] = config.stash[_FOLDER]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Deletes it; where the workers of pytest-xdist have inherited it, the one that chose it."""
    folder = config.stash.get(_FOLDER, None)
    if folder is not None:
        del os.environ["EPJIT_CACHE_DIR"]
        shutil.rmtree(folder, ignore_errors=True)

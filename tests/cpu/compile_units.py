"""Compiles units with the NVRTC of the interpreter that runs this file (no torch needed).

Reads a JSON list of {text, sources, arch, name_expression} from stdin and writes the list of
{nvrtc, log, error} to stdout; `log` is ptxas's report.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from epjit.errors import CompileError
from epjit.runtime import nvrtc, sources


def compile_unit(unit: dict[str, Any]) -> dict[str, str]:
    """Compiles one unit; a refusal is a result, not an exception."""
    log = error = ""
    try:
        _, _, log = nvrtc.compile_unit(
            unit["text"],
            unit["name_expression"],
            arch=unit["arch"],
            headers=sources.closure(*unit["sources"]),
            name_expression=unit["name_expression"],
        )
    except CompileError as refused:
        error = str(refused)
    return {"nvrtc": ".".join(map(str, nvrtc.version())), "log": log, "error": error}


if __name__ == "__main__":
    json.dump([compile_unit(unit) for unit in json.load(sys.stdin)], sys.stdout)

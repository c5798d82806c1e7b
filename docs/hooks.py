"""Hooks of mkdocs: the parts of pages that are generated from the code."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the marker of the table of environment variables."""
    return markdown.replace("<!-- environment -->", environment_table())


def environment_table() -> str:
    """Every variable of `epjit.env`, as a table."""
    from epjit import env

    lines = ["| variable | default | value | meaning |", "|---|---|---|---|"]
    for variable in env.VARIABLES:
        default = "" if variable.default in (None, ()) else f"`{_text(variable.default)}`"
        lines.append(
            f"| `{variable.name}` | {default} | {variable.kind} | {variable.description} |"
        )
    return "\n".join(lines)


def _text(default: object) -> str:
    return str(int(default)) if isinstance(default, bool) else str(default)

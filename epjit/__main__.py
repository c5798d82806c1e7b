"""`python -m epjit`: see `epjit.cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; an error of epjit is one message, not a traceback."""
    try:
        from rich.console import Console
        from rich.text import Text

        from epjit.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        from epjit.remedy import install_command

        sys.exit(f"the command line needs the package {error.name}: {install_command('')}")
    try:
        app()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Names of GPU architectures."""

from __future__ import annotations


def arch_name(major: int, minor: int) -> str:
    """Architecture to compile for, from a compute capability.

    From 9.0 on with the ``a`` suffix: the code runs on that architecture alone, and may use all of
    it.
    """
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def arch_number(arch: str) -> int:
    """90 for ``"sm_90"`` and ``"sm_90a"``.

    Raises:
        ValueError: `arch` is no architecture.
    """
    digits = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not digits.isdigit():
        raise ValueError(f"arch is {arch!r}, expected one such as 'sm_80' or 'sm_90a'")
    return int(digits)

"""Implementations to choose from: one named variant for each, in one registry."""

from __future__ import annotations

from dataclasses import dataclass

from epjit import env
from epjit.arch import arch_number

_AUTO = "auto"
_SM90 = 90


@dataclass(frozen=True)
class Variant:
    """One implementation of an operation.

    Attributes:
        op: Operation, such as ``"dispatch"``.
        name: Name of the variant, unique within the operation.
        min_arch: First architecture that runs it, as a number: 90 for sm_90.
        description: One line for users.
        opt_in: Whether only its name chooses it, never ``auto`` or what was tuned.
    """

    op: str
    name: str
    min_arch: int
    description: str
    opt_in: bool = False


_registry: dict[tuple[str, str], Variant] = {}


def register(variant: Variant) -> None:
    """Adds a variant. Of one operation, ``auto`` takes the first that can run and is not opt-in.

    Raises:
        ValueError: Another variant has this name.
    """
    known = _registry.setdefault((variant.op, variant.name), variant)
    if known != variant:
        raise ValueError(f"{variant.op} has a variant {variant.name!r} already: {known}")


def registered() -> tuple[Variant, ...]:
    """All variants, in the order of registration."""
    return tuple(_registry.values())


def operations() -> tuple[str, ...]:
    """Operations that have variants, in the order of registration."""
    return tuple(dict.fromkeys(variant.op for variant in _registry.values()))


def names(op: str) -> tuple[str, ...]:
    """Names of an operation's variants, in the order of preference."""
    return tuple(variant.name for variant in _registry.values() if variant.op == op)


def is_opt_in(op: str, name: str) -> bool:
    """Whether only its name chooses a variant."""
    return _registry[op, name].opt_in


def choices(op: str) -> tuple[str, ...]:
    """What ``EPJIT_<OP>_VARIANT`` may say."""
    return (_AUTO, *names(op))


def runs_on(op: str, name: str, arch: str) -> bool:
    """Whether an architecture such as ``"sm_90a"`` can run a variant.

    Raises:
        ValueError: There is no such variant.
    """
    if (op, name) not in _registry:
        raise ValueError(f"{op} has no variant {name!r}; it has {', '.join(names(op)) or 'none'}")
    return arch_number(arch) >= _registry[op, name].min_arch


def resolve(op: str, arch: str, *, preferred: str | None = None) -> str:
    """The variant to use: what ``EPJIT_<OP>_VARIANT`` says, else the best that can run.

    Args:
        op: Operation.
        arch: Architecture of the device, such as ``"sm_90a"``.
        preferred: What ``auto`` takes before all others, where it can run.

    Returns:
        Name of the variant.

    Raises:
        ValueError: The variable names no variant, or one that cannot run on `arch` or that
            ``DISABLE_SM90_FEATURES`` excludes.
    """
    wanted = env.variant(op)
    variable = env.variant_name(op)
    without_sm90 = env.disable_sm90_features()
    if wanted != _AUTO:
        if wanted not in names(op):
            allowed = ", ".join(choices(op))
            raise ValueError(f"{variable}={wanted!r} is not a variant of {op}; valid are {allowed}")
        min_arch = _registry[op, wanted].min_arch
        if not runs_on(op, wanted, arch):
            raise ValueError(
                f"{variable}={wanted!r} needs sm_{min_arch} or later; the device is {arch}"
            )
        if without_sm90 and min_arch >= _SM90:
            raise ValueError(
                f"{variable}={wanted!r} needs sm_{min_arch} features, which "
                "DISABLE_SM90_FEATURES=1 excludes; unset one of the two"
            )
        return wanted
    for name in sorted(names(op), key=lambda name: name != preferred):
        variant = _registry[op, name]
        excluded = variant.opt_in or (without_sm90 and variant.min_arch >= _SM90)
        if runs_on(op, name, arch) and not excluded:
            return name
    raise ValueError(f"{op} has no variant that {arch} can run; it has {names(op) or 'none'}")

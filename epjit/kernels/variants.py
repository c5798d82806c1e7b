"""Implementations to choose from: a table with the named variants of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from epjit import env
from epjit.arch import arch_number

_AUTO = "auto"
_SM90, _NO_END = 90, 1 << 16
# With more, a token is better staged once and pulled: 4096 tokens of BF16 on four H200s, 586 us
# instead of 602 with 24 SMs, 620 instead of 692 with 12; on two, 223 instead of 207.
MOST_PUSHING_RANKS = 2


@dataclass(frozen=True)
class Variant:
    """One implementation of an operation.

    Attributes:
        name: Name of the variant, unique within the operation.
        min_arch: First architecture that runs it, as a number: 90 for sm_90.
        description: One line for users.
        opt_in: Whether only its name chooses it, never ``auto`` or a tuned file.
        end_arch: First architecture that does not run it any more.
    """

    name: str
    min_arch: int
    description: str
    opt_in: bool = False
    end_arch: int = _NO_END

    def runs_on(self, arch: str) -> bool:
        """Whether an architecture such as ``"sm_90a"`` can run it."""
        return self.min_arch <= arch_number(arch) < self.end_arch


@dataclass(frozen=True)
class Choice:
    """The implementations of one operation.

    Attributes:
        variable: Variable of the environment that chooses one.
        variants: All of them. ``auto`` takes the first that can run and is not opt-in.
        among_many: Name of the one that ``auto`` prefers with more ranks than `MOST_PUSHING_RANKS`.
    """

    variable: env.Variable[str]
    variants: tuple[Variant, ...]
    among_many: str | None = None

    @property
    def allowed(self) -> tuple[str, ...]:
        """Values of the variable."""
        return (_AUTO, *(each.name for each in self.variants))

    def preferred(self, num_ranks: int) -> str | None:
        """The variant that ``auto`` takes before all others in a group of one NVLink domain."""
        return self.among_many if num_ranks > MOST_PUSHING_RANKS else None


# GPUs of sm_120 have no NVLink.
_LINES = Variant(
    "lines", 90, "128 bytes of rows carry their own flag (NVLink)", opt_in=True, end_arch=120
)

CHOICES: Mapping[str, Choice] = {
    "dispatch": Choice(
        env.dispatch_variant,
        (
            Variant("push", 90, "tokens are pushed to peers by TMA bulk copies"),
            Variant("tma", 90, "peers pull by TMA bulk copies"),
            Variant("ldst", 80, "peers pull by 16-byte loads and stores"),
            Variant("direct", 90, "the source writes rows to their final place", opt_in=True),
        ),
        among_many="tma",
    ),
    "combine": Choice(
        env.combine_variant,
        (
            Variant("tma", 90, "rows are pushed by TMA bulk copies"),
            Variant("ldst", 80, "rows are pushed by 16-byte loads and stores"),
        ),
    ),
    "permute": Choice(
        env.permute_variant,
        (
            Variant("tma", 90, "rows are copied by TMA bulk copies"),
            Variant("ldst", 80, "rows are copied by 16-byte loads and stores"),
        ),
    ),
    "low_latency_dispatch": Choice(
        env.low_latency_dispatch_variant,
        (
            Variant("words", 80, "each row is followed by a word that says that it is here"),
            _LINES,
        ),
    ),
    "low_latency_combine": Choice(
        env.low_latency_combine_variant,
        (
            # First, so that auto takes it: with two H200s a pair of calls in a graph takes 52.9 us
            # against 53.2 with 128 tokens (BF16: 54.3 against 56.5) and 23.9 against 25.0 with 8.
            Variant("ldst", 80, "rows are pushed by 16-byte stores"),
            Variant("tma", 90, "rows are pushed by TMA bulk copies"),
            Variant("reduced", 80, "a rank's rows are summed, and rounded, before they cross"),
            _LINES,
        ),
    ),
}


def names(op: str, arch: str) -> tuple[str, ...]:
    """Names of an operation's variants that an architecture can run, in the order of preference."""
    return tuple(each.name for each in CHOICES[op].variants if each.runs_on(arch))


def resolve(op: str, arch: str, *, preferred: str | None = None) -> str:
    """The variant to use: the one that ``EPJIT_<OP>_VARIANT`` names, else the best that can run.

    Args:
        op: Operation, a key of `CHOICES`.
        arch: Architecture of the device, such as ``"sm_90a"``.
        preferred: The variant that ``auto`` takes before all others, where it can run.

    Returns:
        Name of the variant.

    Raises:
        ValueError: The variable names no variant, or one that cannot run on `arch` or that
            ``DISABLE_SM90_FEATURES`` excludes.
    """
    choice = CHOICES[op]
    wanted, variable = choice.variable(), choice.variable.name
    without_sm90 = env.disable_sm90_features()
    if wanted == _AUTO:
        for variant in sorted(choice.variants, key=lambda each: each.name != preferred):
            excluded = variant.opt_in or (without_sm90 and variant.min_arch >= _SM90)
            if variant.runs_on(arch) and not excluded:
                return variant.name
        has = ", ".join(each.name for each in choice.variants)
        raise ValueError(f"{op} has no variant that {arch} can run; it has {has}")
    if wanted not in choice.allowed:
        allowed = ", ".join(choice.allowed)
        raise ValueError(f"{variable}={wanted!r} is not a variant of {op}; valid are {allowed}")
    (variant,) = (each for each in choice.variants if each.name == wanted)
    if not variant.runs_on(arch):
        last = " or later" if variant.end_arch == _NO_END else f" and before sm_{variant.end_arch}"
        raise ValueError(
            f"{variable}={wanted!r} needs sm_{variant.min_arch}{last}; the device is {arch}"
        )
    if without_sm90 and variant.min_arch >= _SM90:
        raise ValueError(
            f"{variable}={wanted!r} needs sm_{variant.min_arch} features, which "
            "DISABLE_SM90_FEATURES=1 excludes; unset one of the two"
        )
    return wanted

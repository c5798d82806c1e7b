"""The matcher of tensor arguments: one place that says what was expected and what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from epjit.config import MAX_ROW_BYTES, MAX_TOPK, check_row_bytes
from epjit.handles import (
    ExpertHandle,
    InternodeHandle,
    IntranodeHandle,
    LowLatencyHandle,
    Placement,
)

if TYPE_CHECKING:
    from epjit.checks.values import ValueChecks

K = TypeVar("K")
V = TypeVar("V")
H = TypeVar("H", IntranodeHandle, InternodeHandle, LowLatencyHandle, ExpertHandle, Placement)
INDEX_DTYPES = (torch.int64, torch.int32)
MOST_REMEMBERED = 4096  # a few MB

# torch has no public names for these.
_num_modes, _mode = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_transform = torch._C._functorch.peek_interpreter_stack
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


def check_runs(what: str) -> None:
    """Checks that tensors which are made here have values, as communication needs them.

    Args:
        what: The act that is about to be done, for the message.

    Raises:
        RuntimeError: A FakeTensorMode is active.
    """
    if _num_modes() and _mode(_FAKE) is not None:
        raise RuntimeError(
            f"{what} communicates, and under FakeTensorMode there is nothing to send; leave the "
            "mode, or call epjit.moe's functions, which give shapes there"
        )


def is_dry(tensor: torch.Tensor) -> bool:
    """Whether only shapes are asked for: a meta or fake tensor, or an active FakeTensorMode."""
    is_active = _num_modes() and _mode(_FAKE) is not None
    return is_active or tensor.is_meta or isinstance(tensor, FakeTensor)


def check_dry_rows(x: torch.Tensor, num_worst_tokens: int) -> None:
    """Checks that the shape of what a dry run (`is_dry`) receives can be said.

    Raises:
        ValueError: It depends on values, and there are no symbols for such sizes.
    """
    mode = _mode(_FAKE) or getattr(x, "fake_mode", None)
    if not num_worst_tokens and (mode is None or mode.shape_env is None):
        raise ValueError(
            "how many rows arrive is known only when tokens travel, and meta and fake tensors do "
            "not: pass num_worst_tokens, or use FakeTensorMode(shape_env=ShapeEnv()), where the "
            "number is a symbol"
        )


def check_no_transform(name: str, tensor: torch.Tensor) -> None:
    """Checks that a tensor belongs to no transform of torch.func.

    Raises:
        ValueError: It does; torch would say so in other words, or not.
    """
    if _is_transformed(tensor):
        raise ValueError(
            f"{name} belongs to a transform of torch.func (grad, vjp, vmap, ...), which can see "
            "nothing of communication; take gradients of epjit.moe's functions by torch.autograd "
            "(requires_grad_() and backward(), or torch.autograd.grad)"
        )


def _check_values(name: str, tensor: torch.Tensor) -> None:
    """Checks that a tensor has values, not only a shape.

    Raises:
        ValueError: It is a meta or a fake tensor, or belongs to a transform of torch.func.
    """
    if is_dry(tensor):
        raise ValueError(
            f"{name} is {'on meta' if tensor.is_meta else 'a fake tensor'}, which has a shape and "
            "no values to send; pass a real tensor, or call epjit.moe's functions, which give "
            "shapes for it"
        )
    check_no_transform(name, tensor)


def check(
    name: str,
    tensor: object,
    shape: tuple[int | str, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    *,
    why: str = "",
    contiguous: bool = True,
) -> torch.Tensor:
    """Checks one tensor argument.

    Args:
        name: Name of the argument, for the message.
        tensor: The argument.
        shape: Expected extents: a number, or a word that names an extent of any size.
        dtype: Expected dtype, one of several, or None for any.
        device: Expected device, or None for any.
        why: Reason of the expectation, for the message.
        contiguous: Whether the tensor must be contiguous.

    Returns:
        The tensor.

    Raises:
        TypeError: Not a tensor, or another dtype.
        ValueError: Another shape or device, not contiguous, or without values.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    _check_values(name, tensor)
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits:  # a loop: any() with a generator takes 1 us more, and a call makes up to six checks
        for want, have in zip(shape, got, strict=True):
            if want != have and isinstance(want, int):
                fits = False
    if not fits:
        expected = ", ".join(str(extent) for extent in shape)
        raise ValueError(
            f"{name} has shape {tuple(got)}, expected ({expected}){': ' + why if why else ''}"
        )
    if (
        dtype is not None
        and tensor.dtype != dtype
        and tensor.dtype not in (dtype if isinstance(dtype, tuple) else ())
    ):
        allowed = " or ".join(str(d) for d in (dtype if isinstance(dtype, tuple) else (dtype,)))
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected {allowed}; convert it with .to()"
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, but this Buffer is on {device}; "
            f"move it with .to({str(device)!r})"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()} for shape {tuple(got)}, expected a contiguous "
            "tensor; pass .contiguous()"
        )
    return tensor


def signature(*tensors: torch.Tensor | None) -> tuple[object, ...]:
    """All that `check` looks at: of tensors with a signature that passed, none is checked again."""
    if _transform() is not None:  # its tensors look like others
        return (object(),)
    try:
        return tuple(
            [
                None
                if each is None
                else (type(each), each.shape, each.dtype, each.device, each.is_contiguous())
                for each in tensors
            ]
        )
    except AttributeError:  # not a tensor, which never passes
        return tuple(type(each) for each in tensors)


def remember(memory: dict[K, V], key: K, value: V) -> V:
    """Keeps what was found out about calls of one kind; kinds that come and go do not pile up."""
    if len(memory) >= MOST_REMEMBERED:
        memory.clear()
    memory[key] = value
    return value


def check_aligned(name: str, tensor: torch.Tensor) -> None:
    """Checks the address of a tensor whose rows are moved in pieces of 16 bytes.

    Raises:
        ValueError: The address is not a multiple of 16.
    """
    if tensor.data_ptr() % 16:
        raise ValueError(
            f"{name} starts at address {tensor.data_ptr():#x}, which is not a multiple of "
            "16 bytes (a view into another tensor?); pass .clone()"
        )


def as_handle(handle: Any, kind: type[H], op: str) -> H:
    """A caller's handle with names; nothing of what is in it is looked at.

    Args:
        handle: As the caller passes it: also a list, or a tuple without names.
        kind: Type that it must become.
        op: The call that returns such handles.

    Raises:
        TypeError: No such tuple.
    """
    if type(handle) is kind:
        return handle
    is_tuple, length = isinstance(handle, tuple | list), len(kind._fields)
    if not is_tuple or len(handle) != length:
        got = type(handle).__name__ + (f" of {len(handle)}" if is_tuple else "")
        raise TypeError(f"handle is a {got}, expected the tuple of {length} that {op} returned")
    return kind(*handle)


def check_rows(name: str, x: torch.Tensor, *, most: int | None = MAX_ROW_BYTES) -> int:
    """Checks the length of the rows of a matrix, and its address.

    Returns:
        Bytes of a row.

    Raises:
        ValueError: They cannot be moved in pieces of 16 bytes, or are longer than `most`.
    """
    row_bytes = x.shape[1] * x.element_size()
    what = f"{name} has rows of {row_bytes} bytes ({x.shape[1]} x {x.dtype})"
    check_row_bytes(what, row_bytes, most=most)
    check_aligned(name, x)
    return row_bytes


def check_topk(tensor: torch.Tensor) -> None:
    """Checks the number of choices a token, the second extent of a tensor.

    Raises:
        ValueError: None, or more than a kernel has lanes for.
    """
    if not 1 <= tensor.shape[1] <= MAX_TOPK:
        raise ValueError(f"top-k is {tensor.shape[1]}, but must be between 1 and {MAX_TOPK}")


def check_experts(num_experts: int, num_ranks: int, most: int) -> None:
    """Checks the number of experts.

    Raises:
        ValueError: The ranks do not share them evenly, or there are more than `most`.
    """
    if num_experts <= 0 or num_experts % num_ranks or num_experts > most:
        raise ValueError(
            f"num_experts is {num_experts}, but must be a positive multiple of the "
            f"{num_ranks} ranks, at most {most}"
        )


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Base of the checks of one Buffer's calls; every method raises TypeError or ValueError.

    Calls repeat: arguments that passed are remembered by their `signature`, and of those only
    addresses are looked at again. With ``EPJIT_CHECK=1`` values are checked as well, last.

    Attributes:
        num_ranks: `R`.
        num_domains: NVLink domains that the ranks span.
        device: Of the buffer.
        values: Checks of values, if they are asked for.
    """

    num_ranks: int
    num_domains: int = 1
    device: torch.device
    values: ValueChecks | None = None

    @property
    def spans_domains(self) -> bool:
        """Whether there are several domains."""
        return self.num_domains > 1

    def _check(
        self,
        name: str,
        tensor: object,
        shape: tuple[int | str, ...],
        dtype: torch.dtype | tuple[torch.dtype, ...] | None,
        why: str = "",
        *,
        contiguous: bool = True,
    ) -> None:
        """Checks a tensor that must be where the buffer is; see `check`."""
        check(name, tensor, shape, dtype, self.device, why=why, contiguous=contiguous)

    def _check_topk_idx(self, topk_idx: torch.Tensor, *, x: torch.Tensor | None = None) -> None:
        """Checks choices, one row for each token of `x`, or of any number."""
        of_x = ("num_tokens", "") if x is None else (x.shape[0], "one row for each token of x")
        num_tokens, why = of_x
        self._check("topk_idx", topk_idx, (num_tokens, "num_topk"), INDEX_DTYPES, why)
        check_topk(topk_idx)

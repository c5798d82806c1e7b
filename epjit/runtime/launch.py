"""Launches: a kernel with its parameters, again and again."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, Generic

from epjit.runtime import driver
from epjit.runtime.kernel import C, Kernel, KernelConfig
from epjit.runtime.params import fields_of, setter_of


class Launch(Generic[C]):
    """A kernel with its parameters, to be launched again and again.

    Args:
        kernel: To be launched.
        **bound: Parameters that stay the same from call to call. Arrays take any sequence of their
            length, pointers take integers.

    Raises:
        TypeError: A name is no parameter, or a value has another type.
        ValueError: A value does not fit its field, or a sequence has another length.
    """

    def __init__(self, kernel: Kernel[C], **bound: Any) -> None:
        self.kernel = kernel
        config = kernel.config
        cuda = driver.load()
        self._cu_launch = cuda.cuLaunchKernelEx
        self._function = cuda.CUfunction(kernel.function)
        self._shape = _launch_shape(config, starts_early=kernel.starts_early)
        self._record = kernel.params()
        self._fields = fields_of(self._record)
        self._unset = set(self._fields)
        # The driver takes one pointer for each argument of the kernel: here, the record.
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._record))
        self._arguments = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()
        self._set(bound)

    def __call__(self, stream: int, grid: int, **values: Any) -> None:
        """Sets parameters and launches. A parameter keeps its value until it is set again.

        Args:
            stream: Handle of the CUDA stream.
            grid: Number of blocks.
            **values: Parameters that change.

        Raises:
            TypeError: A name is no parameter, a parameter was never set, or a value has another
                type.
            ValueError: A value does not fit its field.
            RuntimeError: The driver refuses the launch.
        """
        self.start(stream, grid, values)

    @functools.cached_property
    def set(self) -> Callable[..., None]:
        """Sets all parameters that are not bound, by keyword, for the `start` that follows.

        In a third of the time that `start` takes for its dict. One thread at a time.

        Raises:
            TypeError: As a launch.
            ValueError: As a launch.
        """
        names, self._unset = sorted(self._unset), set()
        return setter_of(self._record, names, self.kernel.config.op)

    def start(
        self,
        stream: int,
        grid: int,
        values: dict[str, Any] | None = None,
    ) -> None:
        """The same with the parameters in a dict, which saves the copies that `**` makes.

        Args:
            stream: Handle of the CUDA stream.
            grid: Number of blocks.
            values: Parameters that change; None: as they are.
        """
        with self._lock:
            if values is not None:
                self._set(values)
            if self._unset:
                raise TypeError(f"{self.kernel.config.op} was never given {sorted(self._unset)}")
            shape = self._shape
            shape.gridDimX, shape.hStream = grid, stream
            (status,) = self._cu_launch(shape, self._function, self._arguments, 0)
            if status:
                self._recover(status, grid)

    def _set(self, values: dict[str, Any]) -> None:
        fields = self._fields
        name, value = "", None
        try:
            for name, value in values.items():
                fields[name][0] = value
        except KeyError:
            unknown = sorted(values.keys() - fields.keys())
            op = self.kernel.config.op
            raise TypeError(f"{op} has no parameters {unknown}; it has {sorted(fields)}") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.kernel.config.op}: {name}={value!r}: {error}") from None
        if self._unset:
            self._unset -= values.keys()

    def _recover(self, status: Any, grid: int) -> None:
        """Launches again with the kernel's GPU current, if that may be what was missing.

        A thread has no context before it first uses a GPU, or another GPU is current in it.
        """
        results = driver.load().CUresult
        if status in (results.CUDA_ERROR_INVALID_CONTEXT, results.CUDA_ERROR_INVALID_HANDLE):
            with driver.using(self.kernel.device):
                (status,) = self._cu_launch(self._shape, self._function, self._arguments, 0)
        if status:
            raise RuntimeError(
                f"{self.kernel.config.op} cannot be launched with {grid} blocks of "
                f"{self._shape.blockDimX} threads and {self._shape.sharedMemBytes} bytes of shared "
                f"memory on device {self.kernel.device}: {driver.describe(status)}; "
                f"{self.kernel.config}"
            )


def _launch_shape(config: KernelConfig, *, starts_early: bool) -> Any:
    """A CUlaunchConfig that lacks the number of blocks and the stream."""
    cuda = driver.load()
    shape = cuda.CUlaunchConfig()
    shape.gridDimY = shape.gridDimZ = shape.blockDimY = shape.blockDimZ = 1
    shape.blockDimX, shape.sharedMemBytes = config.threads, config.shared_bytes
    if starts_early:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = (
            cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        shape.attrs, shape.numAttrs = [attribute], 1
    return shape

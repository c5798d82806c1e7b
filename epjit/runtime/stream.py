"""The stream that communication runs on."""

from __future__ import annotations

import torch

from epjit.runtime import driver


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event | None:
    """An event recorded on a stream; None if the stream is being captured."""
    with driver.using(stream.device.index):
        status, capturing = driver.load().cuStreamIsCapturing(int(stream.cuda_stream))
    # The legacy stream gives an error while another one of its context is captured.
    if int(status) or int(capturing):
        return None
    event: torch.cuda.Event = stream.record_event()
    return event


class CommStream:
    """A high-priority stream, with cheap waits between it and other streams.

    One thread uses it at a time, with the device current.

    Args:
        device: Number of the GPU.

    Attributes:
        device: As passed.
        torch_stream: The same as a torch stream.
        handle: The CUstream, as an integer.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.torch_stream = torch.cuda.Stream(device=device, priority=-1)
        self.handle = int(self.torch_stream.cuda_stream)
        cuda = driver.load()
        self._record, self._wait = cuda.cuEventRecord, cuda.cuStreamWaitEvent
        with driver.using(device):
            flag = cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
            # A wait keeps what its event stood for at that time, so an event can be recorded again.
            self._before, self._after = (driver.call("cuEventCreate", flag) for _ in range(2))

    def wait_for(self, stream_handle: int) -> None:
        """What is queued on this stream from now on waits for all that `stream_handle` has now."""
        self._order(self._before, stream_handle, self.handle)

    def make_wait(self, stream_handle: int) -> None:
        """What is queued on `stream_handle` from now on waits for all that this stream has now."""
        self._order(self._after, self.handle, stream_handle)

    def order(self, first: int, then: int) -> None:
        """What is queued on `then` from now on waits for all that `first` has now."""
        self._order(self._before, first, then)

    def close(self) -> None:
        """Destroys the events; the stream must not be used any more. Idempotent."""
        events, self._before, self._after = (self._before, self._after), None, None
        for event in events:
            if event is not None:
                driver.call("cuEventDestroy", event)

    def _order(self, event: object, first: int, then: int) -> None:
        (recorded,) = self._record(event, first)
        (waited,) = self._wait(then, event, 0)
        if recorded or waited:
            raise RuntimeError(
                f"stream {then:#x} cannot be made to wait for stream {first:#x}: "
                f"{driver.describe(recorded or waited)}"
            )

"""The kernels that a GPU would run: what they refuse, the CPU backend refuses as well.

It is there to be tested against, so a buffer that is too small for a GPU is too small, and a
variant that no GPU has is an error. The GPU is an H200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epjit.kernels import internode, intranode, low_latency
from epjit.kernels.shapes import AnyShape
from epjit.modes.normal import agree_on_kernel

if TYPE_CHECKING:
    from epjit.calls import CombineSizes, Setup

_ARCH = "sm_90a"


class ChosenKernels:
    """The kernels of one Buffer on the CPU, by shape.

    Args:
        setup: All that it is made from.
    """

    def __init__(self, setup: Setup) -> None:
        self._settings, self._group, self._topology, *_ = setup
        self._configs: dict[tuple[type, AnyShape], Any] = {}

    def launch(self, shape: AnyShape) -> Any:
        """The kernel of a shape; collective when it is the first of its kind, as on a GPU.

        Raises:
            ValueError: There is no such variant, or the buffer cannot hold two tokens.
            RuntimeError: The ranks chose different kernels.
            CommunicationError: A rank does not come; names it.
        """
        config = self._configs.get((type(shape), shape))
        if config is None:
            num_domains, num_local = self._topology.num_domains, self._topology.num_local
            if not self._topology.spans_domains:
                config = intranode.config_of(shape, num_local, _ARCH)
                intranode.num_slots(config, self._settings.num_nvl_bytes)
            else:
                config = internode.config_of(shape, num_domains, num_local, _ARCH)
                internode.ring_slots(config, self._settings.num_rdma_bytes)
                if isinstance(config, internode.InternodeCombineConfig):
                    internode.combine_slots(config, self._settings.num_nvl_bytes)
            agree_on_kernel(self._group, config)
            self._configs[type(shape), shape] = config
        return config

    def check(self, shape: AnyShape, num_sms: int) -> None:
        """Refuses a call of this shape that a GPU would refuse; see `launch`.

        Raises:
            ValueError: Also when the SMs are too few.
        """
        config = self.launch(shape)
        if self._topology.spans_domains:
            internode.check_warps(config, num_sms)
        elif isinstance(config, intranode.CombineConfig):
            intranode.check_warps(config, num_sms)

    def reduces(self, sizes: CombineSizes) -> bool:
        """Whether a low-latency combine sums a rank's rows before they travel.

        Raises:
            ValueError: A GPU would refuse it: there is no such variant, or it has no room for so
                many tokens.
        """
        several = self._topology.spans_domains
        shape = low_latency.LowLatencyCombineShape.of(sizes)
        config = low_latency.config_of(shape, self._group.size, _ARCH, remote=several)
        if isinstance(config, low_latency.LowLatencyReducedCombineConfig):
            config.num_parts(sizes.max_tokens)
            return True
        return False

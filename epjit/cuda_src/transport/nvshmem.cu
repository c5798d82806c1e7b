// The body of transport.cuh over NVSHMEM; the only source that includes NVSHMEM's headers. Compiled
// by itself to LTO-IR, once for an architecture and a version of NVSHMEM, and joined with each kernel
// by nvJitLink.
//
// EPJIT_NVSHMEM_INLINE: everything comes from the headers and nothing is left to link, without
// IBGDA (its header wants libibverbs' own). Else the functions that NVSHMEM does not inline, IBGDA
// among them, come from libnvshmem_device.a.
#ifdef EPJIT_NVSHMEM_INLINE
#define __NVSHMEM_NUMBA_SUPPORT__  // what NVIDIA's headers call this way of use
#include <non_abi/nvshmem_build_options.h>
#undef NVSHMEM_IBGDA_SUPPORT
#undef NVSHMEM_GPUNETIO_SUPPORT
#endif

#include <non_abi/nvshmem_version.h>
#if NVSHMEM_VENDOR_MAJOR_VERSION == 3 && NVSHMEM_VENDOR_MINOR_VERSION < 5
// These headers take the traits from <type_traits>, which NVRTC has not.
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
namespace std {
using ::cuda::std::is_integral;
using ::cuda::std::is_signed;
using ::cuda::std::is_unsigned;
}  // namespace std
#endif

// The parts of nvshmem.h that are needed: all of it takes twice as long, for the collectives.
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>

#include "epjit/transport.cuh"

// NVSHMEM's uint64_t may be `unsigned long`, which is as wide and another type.
static_assert(sizeof(::uint64_t) == sizeof(epjit::uint64_t));

extern "C" {

__device__ void epjit_put(epjit::uint64_t, void* dst, const void* src, epjit::uint64_t bytes,
                          epjit::int32_t pe) {
  nvshmemx_putmem_nbi_warp(dst, src, bytes, pe);
}

__device__ void epjit_put_signal(epjit::uint64_t, void* dst, const void* src, epjit::uint64_t bytes,
                                 epjit::uint64_t* signal, epjit::uint64_t value,
                                 epjit::int32_t pe) {
  nvshmemx_putmem_signal_nbi_warp(dst, src, bytes, reinterpret_cast<::uint64_t*>(signal), value,
                                  NVSHMEM_SIGNAL_SET, pe);
}

__device__ void epjit_signal(epjit::uint64_t, epjit::uint64_t* signal, epjit::uint64_t value,
                             epjit::int32_t pe) {
  nvshmemx_signal_op(reinterpret_cast<::uint64_t*>(signal), value, NVSHMEM_SIGNAL_SET, pe);
}

__device__ void epjit_fence(epjit::uint64_t) { nvshmem_fence(); }

__device__ void epjit_quiet(epjit::uint64_t) { nvshmem_quiet(); }

}  // extern "C"

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

#include "epjit/pieces.cuh"
#include "epjit/transport.cuh"

// NVSHMEM's uint64_t may be `unsigned long`, which is as wide and another type.
static_assert(sizeof(::uint64_t) == sizeof(epjit::uint64_t));

namespace {

// Where loads and stores reach a pe, a warp copies by itself: NVSHMEM's loop has one load in flight a
// lane and moves 1 GB/s a warp over NVLink.
constexpr int kUnroll = 4;

// The address at `pe`, or null.
template <typename T>
__device__ __forceinline__ T* reachable(T* ptr, epjit::int32_t pe) {
  return static_cast<T*>(nvshmem_ptr(ptr, pe));
}

// By a whole warp; afterwards any lane may publish the bytes.
__device__ __forceinline__ void copy(void* dst, const void* src, epjit::uint64_t bytes) {
  const int lane = threadIdx.x % epjit::kWarpSize;
  for (epjit::uint64_t at = 0; at < bytes; at += epjit::kPieceBytes<kUnroll>)
    epjit::copy_piece<kUnroll>(static_cast<char*>(dst) + at, static_cast<const char*>(src) + at,
                               bytes - at, lane);
  __syncwarp();
}

}  // namespace

extern "C" {

__device__ void epjit_put(epjit::uint64_t, void* dst, const void* src, epjit::uint64_t bytes,
                          epjit::int32_t pe) {
  if (void* const there = reachable(dst, pe); there != nullptr)
    copy(there, src, bytes);
  else
    nvshmemx_putmem_nbi_warp(dst, src, bytes, pe);
}

// Copied: the lanes' stores -> __syncwarp -> st.release.sys of one lane, which is cumulative.
__device__ void epjit_put_signal(epjit::uint64_t, void* dst, const void* src, epjit::uint64_t bytes,
                                 epjit::uint64_t* signal, epjit::uint64_t value,
                                 epjit::int32_t pe) {
  if (void* const there = reachable(dst, pe); there != nullptr) {
    copy(there, src, bytes);
    if (threadIdx.x % epjit::kWarpSize == 0)
      epjit::ptx::st_release_sys(reachable(signal, pe), value);
    __syncwarp();
  } else {
    nvshmemx_putmem_signal_nbi_warp(dst, src, bytes, reinterpret_cast<::uint64_t*>(signal), value,
                                    NVSHMEM_SIGNAL_SET, pe);
  }
}

__device__ void epjit_signal(epjit::uint64_t, epjit::uint64_t* signal, epjit::uint64_t value,
                             epjit::int32_t pe) {
  nvshmemx_signal_op(reinterpret_cast<::uint64_t*>(signal), value, NVSHMEM_SIGNAL_SET, pe);
}

// The last step of NVSHMEM's own waits: some NICs and GPUs need it, and the state says for the whole
// process whether these do.
__device__ void epjit_received(epjit::uint64_t) {
  if (nvshmemi_device_state_d.job_connectivity > NVSHMEMI_JOB_GPU_PROXY)
    nvshmemi_transfer_enforce_consistency_at_target(true);
}

__device__ void epjit_fence(epjit::uint64_t) { nvshmem_fence(); }

__device__ void epjit_quiet(epjit::uint64_t) { nvshmem_quiet(); }

}  // extern "C"

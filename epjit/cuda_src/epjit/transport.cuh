// The transport: it carries bytes to ranks that no load and no store reaches, and is all that kernels
// know of RDMA. A kernel that includes this is linked with one of the bodies in cuda_src/transport:
//
//   nvshmem   the device functions of NVSHMEM
//   loopback  ranks that share a host or a process: loads and stores, with delays drawn from a seed
//
// `transport` is what the host gave the kernel (loopback: address of its record; NVSHMEM: unused),
// `pe` the transport's number of a rank. dst and signal are addresses in this rank's own symmetric
// memory and mean the same place of that rank's. Signals are set, never added to; the owner waits for
// them with the functions of sync.cuh.
//
// A signal that is seen is not enough with every NIC: it and the bytes can take two ways into the GPU.
// Whoever has acquired it calls received() before it reads what came before the signal, or lets others
// read it. That is free where it is not needed, and may cost a message where it is, so a warp does it
// once for all that it has waited for.
//
// Order. Nothing is ordered but this: the bytes of put_signal are there before its signal; what a
// thread sent to a pe before fence() is there before what it sends to that pe after it. A put reads
// src, which lies in symmetric memory too, at any time until quiet(), or until the receiver has
// answered: src must not change before. What other threads wrote to src needs fence.acq_rel.sys before
// the put, and so does what they read before a signal that lets a peer overwrite it.
#pragma once
#include "epjit/types.cuh"

extern "C" {

// By a whole warp, with equal arguments. bytes and addresses are multiples of 16.
__device__ void epjit_put(epjit::uint64_t transport, void* dst, const void* src,
                          epjit::uint64_t bytes, epjit::int32_t pe);
__device__ void epjit_put_signal(epjit::uint64_t transport, void* dst, const void* src,
                                 epjit::uint64_t bytes, epjit::uint64_t* signal,
                                 epjit::uint64_t value, epjit::int32_t pe);

// By one thread.
__device__ void epjit_signal(epjit::uint64_t transport, epjit::uint64_t* signal,
                             epjit::uint64_t value, epjit::int32_t pe);
__device__ void epjit_received(epjit::uint64_t transport);
__device__ void epjit_fence(epjit::uint64_t transport);
__device__ void epjit_quiet(epjit::uint64_t transport);

}  // extern "C"

namespace epjit {

// By a whole warp, when its lanes have acquired signals and met since (all_lanes).
__device__ __forceinline__ void warp_received(uint64_t transport, int lane) {
  if (lane == 0) epjit_received(transport);
  __syncwarp();
}

}  // namespace epjit

// Every asm statement of the project, one function an instruction; the comment is the exact PTX.
// All that orders or touches memory has the "memory" clobber. The emulation (tests/emulation) gives
// the same names a CPU meaning.
#pragma once
#include "epjit/types.cuh"

#ifdef EPJIT_EMULATE
#include "emulate_ptx.h"
#else

namespace epjit::ptx {

// ---- signals and counters -----------------------------------------------------------------------

// ld.acquire.sys.global.u32
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* ptr) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(ptr) : "memory");
  return value;
}

// ld.acquire.sys.global.u64
__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* ptr) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(ptr) : "memory");
  return value;
}

// ld.relaxed.gpu.global.u32
__device__ __forceinline__ uint32_t ld_relaxed_gpu(const uint32_t* ptr) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(ptr) : "memory");
  return value;
}

// st.release.sys.global.u32
__device__ __forceinline__ void st_release_sys(uint32_t* ptr, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(ptr), "r"(value) : "memory");
}

// st.release.sys.global.u64
__device__ __forceinline__ void st_release_sys(uint64_t* ptr, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(ptr), "l"(value) : "memory");
}

// st.relaxed.sys.global.u64
__device__ __forceinline__ void st_relaxed_sys(uint64_t* ptr, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(ptr), "l"(value) : "memory");
}

// st.relaxed.gpu.global.u32
__device__ __forceinline__ void st_relaxed_gpu(uint32_t* ptr, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(ptr), "r"(value) : "memory");
}

// atom.add.acq_rel.gpu.global.u32
__device__ __forceinline__ uint32_t atom_add_acq_rel_gpu(uint32_t* ptr, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(ptr), "r"(value)
               : "memory");
  return old;
}

// elect.sync: a lane of the warp, always the same one; before sm_90 lane 0
__device__ __forceinline__ uint32_t elected_lane() {
  uint32_t lane = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; elect.sync %0|p, 0xffffffff;}" : "=r"(lane));
#endif
  return lane;
}

// In elected_lane() alone, which gets what was there: atom.add.relaxed.gpu.global.u32. In `if (lane == 0)`
// ptxas adds up what a warp's lanes want and hands out the sums: a shuffle directly behind the atomic,
// which waits for it. Of one elected lane it knows that there is nothing to add up.
__device__ __forceinline__ uint32_t elect_atom_add_gpu(uint32_t* ptr, uint32_t value) {
  uint32_t old;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p; elect.sync _|p, 0xffffffff; @p atom.add.relaxed.gpu.global.u32 %0, [%1], %2;}"
      : "=r"(old)
      : "l"(ptr), "r"(value)
      : "memory");
#else
  asm volatile(
      "{.reg .pred p; .reg .u32 lane; mov.u32 lane, %%laneid; setp.eq.u32 p, lane, 0; "
      "@p atom.add.relaxed.gpu.global.u32 %0, [%1], %2;}"
      : "=r"(old)
      : "l"(ptr), "r"(value)
      : "memory");
#endif
  return old;
}

// atom.cas.acq_rel.sys.global.b32
__device__ __forceinline__ uint32_t atom_cas_sys(uint32_t* ptr, uint32_t expected,
                                                 uint32_t desired) {
  uint32_t old;
  asm volatile("atom.cas.acq_rel.sys.global.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(ptr), "r"(expected), "r"(desired)
               : "memory");
  return old;
}

// fence.acq_rel.sys
__device__ __forceinline__ void fence_acq_rel_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// mov.u64 %clock64: cycles of the SM
__device__ __forceinline__ uint64_t clock64() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(value)::"memory");
  return value;
}

// mov.u64 %globaltimer: nanoseconds; ticks coarsely (about 1 us)
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

// ---- the kernel ahead in the stream ---------------------------------------------------------------

// griddepcontrol.wait (sm_90 and newer; before, no kernel starts early): returns when that kernel has
// ended and all that it has written is visible
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// griddepcontrol.launch_dependents: the blocks of the kernel behind may start once all blocks of this
// one are here
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- 16 bytes at a time -------------------------------------------------------------------------

// ld.global.v4.u32
__device__ __forceinline__ Vec16 ld_v4(const void* ptr) {
  Vec16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr)
               : "memory");
  return v;
}

// st.global.v4.u32
__device__ __forceinline__ void st_v4(void* ptr, Vec16 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- lines of 128 bytes -------------------------------------------------------------------------

// By all lanes of a warp, 16 bytes a lane: eight neighbours have the line that contains their bytes. PTX
// promises the atomicity of four bytes; low_latency/lines.cuh says who vouches for that of a line.

// ld.relaxed.sys.global.v4.u32
__device__ __forceinline__ Vec16 ld_line(const void* ptr) {
  Vec16 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(ptr)
               : "memory");
  return v;
}

// st.relaxed.sys.global.v4.u32
__device__ __forceinline__ void st_line(void* ptr, Vec16 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- conversions --------------------------------------------------------------------------------

// A bf16 is the upper half of a float: no instruction of its own is needed.
__device__ __forceinline__ Float2 bf16x2_to_float2(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// cvt.rn.bf16x2.f32: the first source operand becomes the upper half
__device__ __forceinline__ uint32_t float2_to_bf16x2(Float2 v) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  return pair;
}

// cvt.f32.f16
__device__ __forceinline__ Float2 f16x2_to_float2(uint32_t pair) {
  Float2 v;
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}

// cvt.rn.f16x2.f32: the first source operand becomes the upper half
__device__ __forceinline__ uint32_t float2_to_f16x2(Float2 v) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  return pair;
}

// cvt.rn.satfinite.e4m3x2.f32 (sm_89 and newer): the first source operand becomes the upper byte.
// Before sm_89 by arithmetic, as float_to_e4m3 says.
__device__ __forceinline__ uint32_t float2_to_e4m3x2(Float2 v) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(v.y), "f"(v.x));
  return pair;
#else
  return float_to_e4m3(v.x) | float_to_e4m3(v.y) << 8;
#endif
}

// ---- shared memory, and bulk copies -------------------------------------------------------------

// Bulk copies need sm_90 or newer: for an older GPU nothing may instantiate their callers.

// The block's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char epjit_dynamic_shared[];
  return epjit_dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

// The same: atom.add.relaxed.cta.shared::cta.u32
__device__ __forceinline__ uint32_t elect_atom_add_shared(uint32_t* ptr, uint32_t value) {
  uint32_t old;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p; elect.sync _|p, 0xffffffff; "
      "@p atom.add.relaxed.cta.shared::cta.u32 %0, [%1], %2;}"
      : "=r"(old)
      : "r"(shared_address(ptr)), "r"(value)
      : "memory");
#else
  asm volatile(
      "{.reg .pred p; .reg .u32 lane; mov.u32 lane, %%laneid; setp.eq.u32 p, lane, 0; "
      "@p atom.add.relaxed.cta.shared::cta.u32 %0, [%1], %2;}"
      : "=r"(old)
      : "r"(shared_address(ptr)), "r"(value)
      : "memory");
#endif
  return old;
}

// mbarrier.init.shared::cta.b64
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count)
               : "memory");
}

// fence.mbarrier_init.release.cluster: makes the initialised mbarrier visible to the async proxy
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.expect_tx.shared::cta.b64
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity.shared::cta.b64
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* bar, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(shared_address(bar)), "r"(phase)
      : "memory");
  return done != 0;
}

// cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
__device__ __forceinline__ void bulk_load(void* shared_dst, const void* global_src, uint32_t bytes,
                                          uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared_dst)),
      "l"(global_src), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}

// cp.async.bulk.global.shared::cta.bulk_group
__device__ __forceinline__ void bulk_store(void* global_dst, const void* shared_src,
                                           uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global_dst),
               "r"(shared_address(shared_src)), "r"(bytes)
               : "memory");
}

// cp.async.bulk.commit_group
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read 0: shared memory may be written again
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// cp.async.bulk.wait_group 0: all bytes are written and visible to this thread
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// fence.proxy.async: generic accesses before it are ordered before bulk copies after it
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace epjit::ptx

#endif  // EPJIT_EMULATE

// The functions of epjit/ptx.cuh with a CPU meaning. Waits and looks at other threads' memory yield
// to other fibers; bulk copies complete at a drawn time, no earlier than the PTX manual promises
// (emulate.cpp). The fences do nothing: the emulation says nothing about memory order.
#pragma once
#include "emulate.h"
#include "epjit/types.cuh"

namespace epjit::ptx {

// ---- signals and counters -----------------------------------------------------------------------

EMULATE_INLINE uint32_t ld_acquire_sys(const uint32_t* ptr) {
  emulate::poll();
  return *ptr;
}
EMULATE_INLINE uint64_t ld_acquire_sys(const uint64_t* ptr) {
  emulate::poll();
  const uint64_t value = *ptr;
  emulate::acquired(ptr);
  return value;
}
EMULATE_INLINE uint32_t ld_relaxed_gpu(const uint32_t* ptr) {
  emulate::poll();
  return *ptr;
}

template <typename T>
EMULATE_INLINE void emulated_store(T* ptr, T value) {
  emulate::perhaps_yield();
  *ptr = value;
  emulate::perhaps_yield();
}
EMULATE_INLINE void st_release_sys(uint32_t* ptr, uint32_t value) { emulated_store(ptr, value); }
EMULATE_INLINE void st_release_sys(uint64_t* ptr, uint64_t value) { emulated_store(ptr, value); }
EMULATE_INLINE void st_relaxed_sys(uint64_t* ptr, uint64_t value) { emulated_store(ptr, value); }
EMULATE_INLINE void st_relaxed_gpu(uint32_t* ptr, uint32_t value) { emulated_store(ptr, value); }

EMULATE_INLINE uint32_t atom_add_acq_rel_gpu(uint32_t* ptr, uint32_t value) {
  return atomicAdd(ptr, value);
}
// Any lane may be elected: here the last one, on which nobody relies.
EMULATE_INLINE uint32_t elected_lane() { return 31; }
EMULATE_INLINE uint32_t elect_atom_add_gpu(uint32_t* ptr, uint32_t value) {
  __syncwarp();
  return emulate::lane() == 31 ? atomicAdd(ptr, value) : 0xdead;
}
EMULATE_INLINE uint32_t elect_atom_add_shared(uint32_t* ptr, uint32_t value) {
  return elect_atom_add_gpu(ptr, value);
}
EMULATE_INLINE uint32_t atom_cas_sys(uint32_t* ptr, uint32_t expected, uint32_t desired) {
  return atomicCAS(ptr, expected, desired);
}

EMULATE_INLINE void fence_acq_rel_sys() {}
EMULATE_INLINE void fence_proxy_async() {}
EMULATE_INLINE void fence_proxy_async_shared() {}
EMULATE_INLINE void fence_mbarrier_init() {}

EMULATE_INLINE void griddepcontrol_wait() {}
EMULATE_INLINE void griddepcontrol_launch_dependents() {}

EMULATE_INLINE uint64_t clock64() { return emulate::nanoseconds(); }
EMULATE_INLINE uint64_t globaltimer() { return emulate::nanoseconds(); }

// ---- 16 bytes at a time -------------------------------------------------------------------------

EMULATE_INLINE Vec16 ld_v4(const void* ptr) {
  if (reinterpret_cast<uintptr_t>(ptr) % 16)
    emulate::fail("ld_v4 of %p, which is not 16-byte aligned", ptr);
  return *static_cast<const Vec16*>(ptr);
}
EMULATE_INLINE void st_v4(void* ptr, Vec16 v) {
  if (reinterpret_cast<uintptr_t>(ptr) % 16)
    emulate::fail("st_v4 to %p, which is not 16-byte aligned", ptr);
  *static_cast<Vec16*>(ptr) = v;
}

// ---- lines of 128 bytes -------------------------------------------------------------------------

struct EmulatedLane {
  void* ptr;
  Vec16 v;
};

// One lane moves the lines of all, and other fibers may run between two lines, not within one; between
// any two lanes of what is looked at elsewhere.
EMULATE_INLINE Vec16 emulated_lines(EmulatedLane lane, bool is_store) {
  if (reinterpret_cast<uintptr_t>(lane.ptr) % 16)
    emulate::fail("a line at %p, which is not 16-byte aligned", lane.ptr);
  const uint64_t* lanes =
      emulate::meet(emulate::kShuffle, kFullMask, reinterpret_cast<uint64_t>(&lane), is_store);
  if (emulate::lane() == 0) {
    EmulatedLane* each[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) each[i] = reinterpret_cast<EmulatedLane*>(lanes[i]);
    const bool before = emulate::is_preemptible;
    for (int first = 0; first < kWarpSize; first += 8) {
      const uintptr_t line = reinterpret_cast<uintptr_t>(each[first]->ptr) / 128 * 128;
      bool is_line = true;
      for (int i = 0; i < 8; ++i)
        is_line &= reinterpret_cast<uintptr_t>(each[first + i]->ptr) == line + i * 16;
      if (is_store && !is_line)
        emulate::fail("lanes %d to %d do not store a line at %p", first, first + 7,
                      each[first]->ptr);
      emulate::poll();
      emulate::is_preemptible = before && !is_line;
      for (int i = first; i < first + 8; ++i) {
        if (!is_line) emulate::poll();
        Vec16& there = *static_cast<Vec16*>(each[i]->ptr);
        is_store ? there = each[i]->v : each[i]->v = there;
      }
      emulate::is_preemptible = before;
    }
  }
  emulate::meet(emulate::kSync, kFullMask, 0, 2 + is_store);
  return lane.v;
}

EMULATE_INLINE Vec16 ld_line(const void* ptr) {
  return emulated_lines({const_cast<void*>(ptr), {}}, false);
}
EMULATE_INLINE void st_line(void* ptr, Vec16 v) { emulated_lines({ptr, v}, true); }

// ---- conversions: to nearest even; a NaN becomes 0x7fff, as cvt.rn does -------------------------

EMULATE_INLINE Float2 bf16x2_to_float2(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

EMULATE_INLINE uint32_t emulated_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
EMULATE_INLINE uint32_t float2_to_bf16x2(Float2 v) {
  return emulated_bf16(v.x) | emulated_bf16(v.y) << 16;
}

EMULATE_INLINE float emulated_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31,
                 mantissa = half & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // exact
  return sign ? -magnitude : magnitude;
}
EMULATE_INLINE Float2 f16x2_to_float2(uint32_t pair) {
  return {emulated_float(pair & 0xffff), emulated_float(pair >> 16)};
}

EMULATE_INLINE uint32_t emulated_half(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more, infinity
  // Below 2^-14: one unit in the last place of 0.5 is the smallest half.
  if (magnitude < 0x38800000u)
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
}
EMULATE_INLINE uint32_t float2_to_f16x2(Float2 v) {
  return emulated_half(v.x) | emulated_half(v.y) << 16;
}

EMULATE_INLINE uint32_t float2_to_e4m3x2(Float2 v) {
  return float_to_e4m3(v.x) | float_to_e4m3(v.y) << 8;
}

// ---- shared memory and bulk copies --------------------------------------------------------------

EMULATE_INLINE char* dynamic_shared() { return emulate::current->shared; }

EMULATE_INLINE void mbarrier_init(uint64_t* bar, uint32_t count) {
  emulate::mbarrier_init(bar, count);
}
EMULATE_INLINE void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  emulate::mbarrier_arrive(bar, 1, bytes);
}
EMULATE_INLINE bool mbarrier_try_wait(uint64_t* bar, uint32_t phase) {
  return emulate::mbarrier_try_wait(bar, phase);
}
EMULATE_INLINE void bulk_load(void* shared_dst, const void* global_src, uint32_t bytes,
                              uint64_t* bar) {
  emulate::bulk_load(shared_dst, global_src, bytes, bar);
}
EMULATE_INLINE void bulk_store(void* global_dst, const void* shared_src, uint32_t bytes) {
  emulate::bulk_store(global_dst, shared_src, bytes);
}
EMULATE_INLINE void bulk_commit() { emulate::bulk_commit(); }
EMULATE_INLINE void bulk_wait_read() { emulate::bulk_wait(0, true); }
EMULATE_INLINE void bulk_wait() { emulate::bulk_wait(0, false); }

}  // namespace epjit::ptx

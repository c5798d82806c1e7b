// Fixed-width names and the constants that every kernel shares. NVRTC has no <cstdint>, so no
// header of anyone else is needed to compile a kernel: that is what keeps a compile at 0.1 s.
#pragma once

#ifdef EPJIT_EMULATE
#include "emulate.h"  // tests/emulation: CUDA's built-ins with a CPU meaning
#endif

namespace epjit {

#ifndef EPJIT_EMULATE
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
using ::uint16_t, ::int32_t, ::uint32_t, ::int64_t, ::uint64_t;
#endif

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;
constexpr int kMaxRanks = 8;  // of one NVLink domain
constexpr int kMaxTopk = 32;  // one lane a selection

struct alignas(16) Vec16 {
  uint32_t x, y, z, w;
};

struct Float2 {
  float x, y;
};

// 8 bits, to nearest even, saturating; for where no instruction does it. As of the instruction,
// what is not a number loses its sign.
__device__ __forceinline__ uint32_t float_to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x);
  uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 24 & 0x80;
  if (magnitude > 0x7f800000u) return 0x7f;  // not a number
  magnitude = min(magnitude, 0x43e00000u);   // 448.0
  // Below 2^-6: the last place of 2^14 is worth 2^-9, the step of these values.
  if (magnitude < 0x3c800000u)
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000u);
  return sign | (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int align_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace epjit

// Fixed-width names and the constants that every kernel shares. NVRTC has no <cstdint>, so no
// header of anyone else is needed to compile a kernel: that is what keeps a compile at 0.1 s.
#pragma once

#ifdef EPJIT_EMULATE
#include "emulate.h"  // tests/emulation: CUDA's built-ins with a CPU meaning
#endif

namespace epjit {

#ifndef EPJIT_EMULATE
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
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

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int align_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace epjit

// Bytes by loads and stores: a piece is what a warp moves at once.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

// kUnroll 16-byte loads in flight a lane.
template <int kUnroll>
constexpr int kPieceBytes = kUnroll * kWarpSize * 16;

// The piece at src, `bytes` of it at most (a multiple of 16). By a whole warp.
template <int kUnroll>
__device__ __forceinline__ void copy_piece(char* dst, const char* src, uint64_t bytes, int lane) {
  Vec16 v[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const uint64_t at = (i * kWarpSize + lane) * 16;
    if (at < bytes) v[i] = ptx::ld_v4(src + at);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const uint64_t at = (i * kWarpSize + lane) * 16;
    if (at < bytes) ptx::st_v4(dst + at, v[i]);
  }
}

}  // namespace epjit

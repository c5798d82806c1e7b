// Bytes by loads and stores: a piece is what a warp moves at once.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

// kUnroll 16-byte loads in flight a lane.
template <int kUnroll>
constexpr int kPieceBytes = kUnroll * kWarpSize * 16;

template <int kUnroll>
struct Piece {
  Vec16 v[kUnroll];
};

// The piece at src, `bytes` of it at most (a multiple of 16); kShared: in shared memory. By a whole
// warp.
template <int kUnroll, bool kShared = false>
__device__ __forceinline__ Piece<kUnroll> load_piece(const char* src, uint64_t bytes, int lane) {
  Piece<kUnroll> piece;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const uint64_t at = (i * kWarpSize + lane) * 16;
    if (at >= bytes) continue;
    if constexpr (kShared)
      piece.v[i] = *reinterpret_cast<const Vec16*>(src + at);
    else
      piece.v[i] = ptx::ld_v4(src + at);
  }
  return piece;
}

template <int kUnroll>
__device__ __forceinline__ void store_piece(char* dst, const Piece<kUnroll>& piece, uint64_t bytes,
                                            int lane) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const uint64_t at = (i * kWarpSize + lane) * 16;
    if (at < bytes) ptx::st_v4(dst + at, piece.v[i]);
  }
}

template <int kUnroll>
__device__ __forceinline__ void copy_piece(char* dst, const char* src, uint64_t bytes, int lane) {
  store_piece(dst, load_piece<kUnroll>(src, bytes, lane), bytes, lane);
}

}  // namespace epjit

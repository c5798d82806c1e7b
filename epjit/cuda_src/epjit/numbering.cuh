// Numbers tokens: how many before each go the same way.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

// Exclusive sum over the threads of a whole block of kNumWarps, and the sum of all in `total`;
// warp_sums [kNumWarps] is shared, and free when all have left.
template <int kNumWarps>
__device__ int block_prefix(int value, int* warp_sums, int& total) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int left = __shfl_up_sync(kFullMask, inclusive, step);
    if (lane >= step) inclusive += left;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kNumWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

// Calls store(token, position) for all tokens: position among those for which is_in(token) holds, -1
// for the others. By a whole block of kNumWarps; warp_sums [kNumWarps] is shared. Returns how many.
template <int kNumWarps, typename IsIn, typename Store>
__device__ int number_tokens(int num_tokens, int* warp_sums, IsIn is_in, Store store) {
  constexpr int kTokens = 8;  // neighbours a thread, so that 4096 tokens are one round of 512
  int before = 0;             // in the rounds before
  for (int base = 0; base < num_tokens; base += kTokens * kNumWarps * kWarpSize) {
    const int first = base + kTokens * threadIdx.x;
    bool in[kTokens];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      in[i] = first + i < num_tokens && is_in(first + i);
      own += in[i];
    }
    int sum;
    int position = before + block_prefix<kNumWarps>(own, warp_sums, sum);
    before += sum;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first + i >= num_tokens) break;
      store(first + i, in[i] ? position : -1);
      position += in[i];
    }
  }
  return before;
}

}  // namespace epjit

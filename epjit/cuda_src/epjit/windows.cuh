// Slots in windows (sync.cuh): how rows get into them, and how they are given back.
#pragma once
#include "epjit/copy.cuh"

namespace epjit {

// By a whole warp: pushes the rows first .. first + num_rows - 1 of p.x, a lane a row, and their
// weights to the slots of `index`, which ascends with the lane; then word(index) says so. Rows go a
// window at a time: wait(window) until its slots are free. Params has what combine kernels have.
template <int kRowBytes, int kTopk, typename Params, typename Copier, typename Wait, typename Slot,
          typename Word>
__device__ __forceinline__ bool push_rows(const Params& p, uint32_t epoch, Copier& copier,
                                          int first, int num_rows, int index, Wait wait, Slot slot,
                                          Word word) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = first + lane, window = index / (p.num_slots / 2);
  uint32_t pending = __ballot_sync(kFullMask, lane < num_rows);
  while (pending != 0) {
    // The rows of the first pending window are those of the lowest pending lanes.
    const int current = __shfl_sync(kFullMask, window, __ffs(pending) - 1);
    const bool mine = (pending >> lane & 1) != 0 && window == current;
    const uint32_t movers = __ballot_sync(kFullMask, mine);
    pending &= ~movers;

    if (!all_lanes(lane != 0 || wait(current))) return false;
    if (current >= 2) copier.acquired();

    copier.load(0, mine ? p.x + static_cast<int64_t>(row) * kRowBytes : nullptr);
    copier.store(0, mine ? slot(index) : nullptr);
    if constexpr (kTopk > 0) {
      for (int first_item = 0; first_item < num_rows * kTopk; first_item += kWarpSize) {
        const int row_lane = (first_item + lane) / kTopk, k = (first_item + lane) % kTopk;
        const int row_index = __shfl_sync(kFullMask, index, row_lane % kWarpSize);
        if (row_lane < num_rows && (movers >> row_lane & 1) != 0)
          reinterpret_cast<float*>(slot(row_index) + kRowBytes)[k] =
              p.topk_weights[static_cast<int64_t>(first + row_lane) * kTopk + k];
      }
    }
    // Rows and weights are written -> flush (each lane its own, then __syncwarp) -> release of any
    // lane: cumulative.
    copier.flush();
    if (mine) ptx::st_release_sys(word(index), make_word(epoch, window, 0));
  }
  return true;
}

// By one lane: the slots of tokens first .. first + num_rows - 1 of a channel of num_tokens are read.
// Calls signal(window) for each window that this completes; the writer may then write window + 2.
// `counters` [2] count by window & 1, and are zero again before it can.
template <typename Signal>
__device__ __forceinline__ void release_rows(uint32_t* counters, int window_tokens, int first,
                                             int num_rows, int num_tokens, Signal signal) {
  const int last = first + num_rows;
  for (int window = first / window_tokens; window * window_tokens < last; ++window) {
    const int begin = window * window_tokens, end = min(begin + window_tokens, num_tokens);
    const uint32_t read = min(last, end) - max(first, begin);
    uint32_t* const counter = counters + (window & 1);
    if (ptx::atom_add_acq_rel_gpu(counter, read) + read != static_cast<uint32_t>(end - begin))
      continue;
    *counter = 0;
    signal(window);
  }
}

// By a whole warp, which has used the slots of one of `units` of a window. Whoever completes it
// calls signal(rank) for all kNumRanks, by a lane each, which may then write window + 2; the counter
// is zero again before it can.
template <int kNumRanks, typename Signal>
__device__ __forceinline__ void release_unit(uint32_t* counter, uint32_t units, int rank,
                                             Signal signal) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t complete = 0;
  if (lane == 0 && ptx::atom_add_acq_rel_gpu(counter, 1) + 1 == units) {
    *counter = 0;
    complete = 1;
  }
  complete = __shfl_sync(kFullMask, complete, 0);
  __syncwarp();
  if (complete != 0 && lane < kNumRanks && lane != rank) signal(lane);
  // The own signal last: whoever sees it may complete window + 2, and that must not be overtaken on
  // its way to a peer.
  __syncwarp();
  if (complete != 0 && lane == 0) signal(rank);
}

}  // namespace epjit

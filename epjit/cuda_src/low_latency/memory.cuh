// Slots and words of the low-latency kernels: each in two halves, for operations of even and of odd
// epoch. An operation writes to its half without a wait; dispatch.cu says why it may.
#pragma once
#include "epjit/sync.cuh"
#include "epjit/work.cuh"

namespace epjit {

// Base of the parameters.
struct LowLatencyParams {
  uint64_t slots[kMaxRanks];  // symmetric, of each rank of the domain
  uint64_t words[kMaxRanks];  // symmetric, of each rank of the domain
  uint32_t* mask;             // own [num_ranks], or null; see shrink
  int64_t half_bytes;         // of the slots
};

// The half of an operation, by the index of a rank in `slots` and `words`.
template <typename Params>
__device__ __forceinline__ char* half_of_slots(const Params& p, int index, uint32_t epoch) {
  const int half = epoch & 1;
  return reinterpret_cast<char*>(p.slots[index]) + half * p.half_bytes;
}

// From there on, the first line of 128 bytes; a half has room for it.
__device__ __forceinline__ char* whole_lines(char* half) {
  return reinterpret_cast<char*>((reinterpret_cast<uint64_t>(half) + 127) / 128 * 128);
}

template <typename Params>
__device__ __forceinline__ uint64_t* half_of_words(const Params& p, int index, uint32_t epoch) {
  const int half = epoch & 1;
  return reinterpret_cast<uint64_t*>(p.words[index]) + half * static_cast<int64_t>(p.words_stride);
}

// Waits for a word of this operation; `seen` is what it says.
__device__ __forceinline__ bool wait_stamp(const Waiter& waiter, WaitTag tag, int peer, int index,
                                           const uint64_t* word, uint64_t& seen) {
  return wait_until(waiter, tag, peer, index, stamp(waiter.epoch, 0), word, seen,
                    [&](uint64_t value) { return value >> 32 == waiter.epoch; });
}

// Of a combine: whether this rank has received its own token. Not if it masks, or has masked, itself; its
// routes say nothing then.
template <bool kShrink, typename Params>
__device__ __forceinline__ bool has_own_token(const Params& p, const Waiter& waiter, int token) {
  return !kShrink || (token < p.source_tokens[p.rank] && !is_masked(waiter, p.rank));
}

// The end of a kernel that publishes nothing by it: the last block zeroes the counters and moves the
// epoch on, and what it needs for that is that every warp has read the epoch and has drawn from the
// counters for the last time. So a warp takes its ticket as soon as a draw has shown that nothing is
// left, before it waits and copies; all else is ordered by the end of the kernel.
//
// Order: no fence, which would wait for the stores of rows. A warp adds a number made of the epoch that
// it has read to the block's sum, behind a branch on what it has drawn; the last one adds to the grid's
// behind a branch on that sum, and the last one of these writes behind a branch on that. All accesses
// are strong. A draw, or a read of the epoch, that saw what is written at the end of this chain would
// have made its own value (PTX: no value comes out of thin air).
class Ticket {
 public:
  // `block`: a word of shared memory, zeroed by one thread; followed by a barrier of the block.
  __device__ Ticket(uint32_t* block, uint32_t* counters, int num_warps)
      : block_(block), counters_(counters), num_warps_(num_warps) {}

  // By all warps, each once at least: only the first time counts. The atomic on the grid's counter is
  // on its way until is_last().
  __device__ void take(uint32_t epoch) {
    if (is_taken_) return;
    is_taken_ = true;
    const uint32_t before = ptx::elect_atom_add_shared(block_, epoch << 8 | 1);
    const uint32_t others = __shfl_sync(kFullMask, before, ptx::elected_lane()) & 0xff;
    ends_block_ = others == num_warps_ - 1;
    if (ends_block_) grid_ = Draw(counters_);
  }

  // True in one warp of the grid.
  __device__ bool is_last() const { return ends_block_ && grid_.unit() == gridDim.x - 1; }

 private:
  uint32_t* const block_;
  uint32_t* const counters_;
  const uint32_t num_warps_;
  bool is_taken_ = false, ends_block_ = false;
  Draw grid_;
};

// By the last warp of a kernel: what the next one finds.
template <typename Params>
__device__ __forceinline__ void end_operation(const Params& p, uint32_t epoch, int lane) {
  constexpr int kCounters = 3;
  if (lane < kCounters) ptx::st_relaxed_gpu(p.counters + lane, 0);
  if (lane == 0 && p.receives) ptx::st_relaxed_gpu(p.epoch, epoch);
}

}  // namespace epjit

// Slots and words of the low-latency kernels: each in two halves, for operations of even and of odd
// epoch. An operation writes to its half without a wait; dispatch.cu says why it may.
#pragma once
#include "epjit/sync.cuh"

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

}  // namespace epjit

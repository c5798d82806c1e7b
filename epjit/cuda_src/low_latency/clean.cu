// Clean: the ranks meet, and go on from the same epoch.
//
// Nothing has to be cleared: signals and words lie outside what users may write, and hold the epoch
// that they belong to. What a rank that was masked for a while needs is the epoch of the others:
//
//   epoch = the largest epoch of all ranks that take part
//
//   meetings[d]  [3, num_ranks] u64 in the memory of rank d; column s is written by s:
//     0 asks     number of s's present call: s is here and wants an answer
//     1 epochs   epoch of s, before its answer
//     2 answers  asked number of d << 32 | number of s's present call
//
// A number that was left by a call that d missed or gave up says nothing about now; so each rank
// waits for an answer to its own number, and goes on answering until it has answered the number that
// the peer's answer names.
//
// Order: epochs -> st.release.sys of the answer -> ld.acquire.sys of it.
//
// Launch: one block of one warp, lane r for rank r. Graph-safe.
#include "epjit/sync.cuh"

namespace epjit {

struct CleanConfig {
  int32_t num_ranks;
};

struct CleanParams {
  uint64_t meetings[8];  // symmetric, of each rank
  uint64_t signals[8];   // symmetric, of each rank
  uint32_t* state;  // local [1 + num_ranks]: number of calls; last number answered to each rank
  uint32_t* epoch;  // local [1]
  uint64_t* fault;  // host [8]
  uint32_t* abort;  // local [1]
  uint32_t* mask;   // local [num_ranks], or null
  uint64_t timeout_ns;
  int32_t rank;
};

constexpr int clean_threads(CleanConfig) { return kWarpSize; }

constexpr int clean_shared_bytes(CleanConfig) { return 0; }

template <CleanConfig kCfg>
__device__ void clean(const CleanParams& p) {
  constexpr int kRanks = kCfg.num_ranks;
  static_assert(kRanks >= 1 && kRanks <= kMaxRanks);
  const int peer = threadIdx.x;
  const Waiter waiter = start_operation<kRanks>(p, kWaitCleanStart);
  const uint32_t own_epoch = *p.epoch, number = p.state[0] + 1;
  uint32_t epoch = own_epoch;
  if (ptx::ld_relaxed_gpu(p.abort) == 0 && peer < kRanks && peer != p.rank &&
      !is_masked(waiter, peer)) {
    uint64_t* const theirs = reinterpret_cast<uint64_t*>(p.meetings[peer]) + p.rank;
    const uint64_t* const mine = reinterpret_cast<const uint64_t*>(p.meetings[p.rank]) + peer;
    ptx::st_release_sys(theirs, static_cast<uint64_t>(number));
    uint64_t answer;
    const bool met = wait_until(
        waiter, kWaitCleanStart, peer, 0, stamp(number, 0), mine + 2 * kRanks, answer,
        [&](uint64_t value) {
          const uint32_t asked = static_cast<uint32_t>(ptx::ld_acquire_sys(mine));
          if (asked != p.state[1 + peer]) {
            ptx::st_relaxed_sys(theirs + kRanks, own_epoch);
            ptx::st_release_sys(theirs + 2 * kRanks, stamp(asked, number));
            p.state[1 + peer] = asked;
          }
          return value >> 32 == number && static_cast<uint32_t>(value) == p.state[1 + peer];
        });
    if (met) epoch = static_cast<uint32_t>(ptx::ld_acquire_sys(mine + kRanks));
  }
  // The difference survives the wrap-around.
#pragma unroll
  for (int other = 1; other < kWarpSize; other *= 2) {
    const uint32_t theirs = __shfl_xor_sync(kFullMask, epoch, other);
    if (static_cast<int32_t>(theirs - epoch) > 0) epoch = theirs;
  }
  __syncwarp();
  if (threadIdx.x == 0) {
    *p.epoch = epoch;
    p.state[0] = number;
  }
}

}  // namespace epjit

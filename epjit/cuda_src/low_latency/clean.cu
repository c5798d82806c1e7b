// Clean: the ranks meet, and go on from the same epoch.
//
// Nothing has to be cleared: signals and words lie outside what users may write, and hold the epoch
// that they belong to. What a rank that was masked for a while needs is the epoch of the others:
//
//   epoch = the largest epoch of all ranks that take part
//
//   meetings[d]  [3, num_ranks] u64 in the memory of rank d; column s is written by s:
//     0 asks     number of the last call of d that s has met << 32 | number of s's present call: s is
//                here and wants an answer
//     1 epochs   epoch of s, before its answer
//     2 answers  asked number of d << 32 | number of s's present call
//
// A number that was left by a call that d missed or gave up says nothing about now; so each rank
// waits for an answer to its own number, and goes on answering until it has answered the number that
// the peer's answer names. A peer that asks again and has met this very call is in its next one, and
// is answered there: all that is left to wait for is its answer, which may come after its question.
//
// Order: epochs -> st.release.sys of the answer -> ld.acquire.sys of it. To another NVLink domain
// (peers.cuh): signals, a fence before each, and received() after the answer's. A word is not sent
// again before it has landed: a rank asks anew when it has been answered, and is answered anew when it
// asks anew. That is not so for what a peer was sent that did not come in time.
//
// A lane waits for its own peer alone, so a record names who did not come; `entered` says nothing
// about remote ranks here and is not asked.
//
// Launch: one block, thread r for rank r. Graph-safe.
#include "low_latency/peers.cuh"

namespace epjit {

struct CleanConfig {
  int32_t num_ranks;
  bool remote;  // the group spans several NVLink domains
};

struct CleanParams : Operation, PeerParams {
  uint64_t meetings[kMaxRanks];  // symmetric, of each rank of the domain
  uint32_t* state;  // own [1 + 2 * num_ranks]: number of calls; last number that each rank was
                    // answered; last number of each rank that was met
  uint32_t* mask;   // own [num_ranks], or null
  int32_t rank;
  int32_t local;  // index of this rank in meetings and signals
};

constexpr int clean_threads(CleanConfig cfg) { return align_up(cfg.num_ranks, kWarpSize); }

// The latest epoch of each warp.
constexpr int clean_shared_bytes(CleanConfig cfg) {
  return clean_threads(cfg) > kWarpSize ? 4 * clean_threads(cfg) / kWarpSize : 0;
}

// Of two epochs; the difference survives the wrap-around.
__device__ __forceinline__ uint32_t later(uint32_t a, uint32_t b) {
  return static_cast<int32_t>(a - b) > 0 ? a : b;
}

template <CleanConfig kCfg>
__device__ void clean(const CleanParams& p) {
  constexpr int kRanks = kCfg.num_ranks, kThreads = clean_threads(kCfg);
  constexpr bool kRemote = kCfg.remote;
  static_assert(kRanks >= 1 && (kRemote || kRanks <= kMaxRanks));
  const int peer = threadIdx.x;
  Waiter waiter = start_low_latency<kRanks, kRemote, false>(p, kWaitCleanStart, p.mask);
  if constexpr (kRemote) waiter.num_ranks = 0;  // a record asks for no `entered`
  const uint32_t own_epoch = *p.epoch, number = p.state[0] + 1;
  uint32_t epoch = own_epoch;
  if (ptx::ld_relaxed_gpu(p.abort) == 0 && peer < kRanks && peer != p.rank &&
      !is_masked(waiter, peer)) {
    const int index = index_of<kRemote>(p, peer);
    uint64_t* const here = reinterpret_cast<uint64_t*>(p.meetings[own_index<kRemote>(p)]);
    // Writes this rank's word of a row of the peer's; a release.
    const auto tell = [&](int row, uint64_t value) {
      if (!kRemote || index >= 0) {
        uint64_t* const there = reinterpret_cast<uint64_t*>(p.meetings[index]);
        ptx::st_release_sys(there + row * kRanks + p.rank, value);
      } else {
        epjit_fence(p.transport);
        epjit_signal(p.transport, here + row * kRanks + p.rank, value, pe_of(index));
      }
    };
    const uint64_t* const mine = here + peer;
    uint32_t& answered = p.state[1 + peer];
    uint32_t& last_met = p.state[1 + kRanks + peer];
    tell(0, stamp(last_met, number));
    uint64_t answer;
    const bool met = wait_until(waiter, kWaitCleanStart, peer, 0, stamp(number, 0),
                                mine + 2 * kRanks, answer, [&](uint64_t value) {
                                  const uint64_t question = ptx::ld_acquire_sys(mine);
                                  const uint32_t asked = static_cast<uint32_t>(question);
                                  const bool is_answer = value >> 32 == number;
                                  if (question >> 32 == number) return is_answer;
                                  if (asked != answered) {
                                    tell(1, own_epoch);
                                    tell(2, stamp(asked, number));
                                    answered = asked;
                                  }
                                  return is_answer && static_cast<uint32_t>(value) == answered;
                                });
    if (met) {
      if (kRemote && index < 0) epjit_received(p.transport);
      epoch = static_cast<uint32_t>(ptx::ld_acquire_sys(mine + kRanks));
      last_met = static_cast<uint32_t>(answer);
    }
  }
#pragma unroll
  for (int other = 1; other < kWarpSize; other *= 2)
    epoch = later(epoch, __shfl_xor_sync(kFullMask, epoch, other));
  __syncwarp();
  if constexpr (kThreads > kWarpSize) {
    uint32_t* const latest = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
    if (threadIdx.x % kWarpSize == 0) latest[threadIdx.x / kWarpSize] = epoch;
    __syncthreads();
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) epoch = later(epoch, latest[warp]);
  }
  if (threadIdx.x == 0) {
    *p.epoch = epoch;
    p.state[0] = number;
  }
}

}  // namespace epjit

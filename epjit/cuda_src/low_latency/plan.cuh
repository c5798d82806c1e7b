// The plan of a low-latency dispatch: the counts of all ranks (dispatch.cu has their memory picture),
// and from them where each row goes.
//
// Every block plans for itself, in shared memory. With a mask, blocks could find different sources
// late; so for each source the first block that has looked decides whether it is received.
#pragma once
#include "low_latency/memory.cuh"
#include "low_latency/peers.cuh"

namespace epjit {

// Params has the fields of the dispatch kernel's parameters that are named here.
template <int kRanks, int kExpertsARank, int kThreads, bool kRemote, typename Params>
class Plan {
  static constexpr int kColumns = kExpertsARank + 1;  // one for the tokens

 public:
  // In a row of counts; what is put begins at a multiple of 16 bytes.
  static constexpr int kTokensWord = kRemote ? 0 : kExpertsARank;
  static constexpr int kSelectionsWord = kRemote ? 2 : 0;
  static constexpr int kBitsWord = kSelectionsWord + kExpertsARank;  // between domains alone

  // In shared memory: table [kRanks, kColumns], arrived [kRanks].
  __device__ Plan(const Params& params, const Waiter& who, uint32_t* table, uint32_t* arrived)
      : p(params), waiter(who), table_(table), arrived_(arrived) {}

  // ---- rows of counts ---------------------------------------------------------------------------

  // Counts that `source` tells a reader of this domain, by its index in `counts`.
  __device__ uint64_t* counts(int reader, int source) const {
    return reinterpret_cast<uint64_t*>(p.counts[reader]) + offset(source);
  }

  // Counts that this rank is going to tell a remote reader.
  __device__ uint64_t* staged_counts(int reader) const { return p.staged_counts + offset(reader); }

  // In such a row: selections of local expert e; e = kExpertsARank: tokens.
  static __device__ int count_word(int e) {
    return e < kExpertsARank ? kSelectionsWord + e : kTokensWord;
  }

  static __device__ uint32_t* token_bits(uint64_t* row) {
    return reinterpret_cast<uint32_t*>(row + kBitsWord);
  }

  // ---- the plan ---------------------------------------------------------------------------------

  // After make(): begin[e, source]; e = kExpertsARank: tokens of the source, 0 when it is masked.
  __device__ uint32_t& at(int source, int e) const { return table_[source * kColumns + e]; }

  __device__ uint32_t rows_a_slab() const { return kRanks * p.max_tokens; }

  // Fills the table with the counts of all ranks that are not masked: selections, then tokens.
  // `tells`: this block writes the outputs that follow from them. False: leave.
  __device__ bool wait_for_counts(bool tells) const {
    const Waiter patient = tells || is_staying(p) ? waiter : leaving(waiter);
    if (threadIdx.x < kRanks) arrived_[threadIdx.x] = !is_masked(waiter, threadIdx.x);
    __syncthreads();
    const uint64_t start = ptx::clock64();
    const int own = own_index<kRemote>(p);
    constexpr int kWords = kRanks * kColumns;
    for (int first = 0; first < kWords; first += kThreads) {
      const int i = first + threadIdx.x, source = i / kColumns, e = i % kColumns;
      bool is_late = false;
      if (i < kWords && arrived_[source] != 0) {
        uint64_t seen;
        is_late = !wait_stamp(patient, kWaitLowLatencyDispatchCounts, source, e,
                              counts(own, source) + awaited_word(source, e), seen);
        if constexpr (kRemote)
          if (is_remote(source) && !is_late && e == kExpertsARank)
            ptx::st_relaxed_sys(entered_signal(waiter.signals, source), stamp(waiter.epoch, 0));
        at(source, e) = static_cast<uint32_t>(seen);
        if (tells && e == kExpertsARank && p.wait_cost != nullptr && source != p.rank)
          p.wait_cost[source] += static_cast<int64_t>(ptx::clock64() - start);
      }
      if (!__syncthreads_and(!is_late || is_masked(waiter, source))) return false;
      if (waiter.mask == nullptr) continue;
      if (is_late) arrived_[source] = 0;
      __syncthreads();
    }
    if (waiter.mask != nullptr) {
      if (threadIdx.x < kRanks) {
        const bool mine = arrived_[threadIdx.x] != 0;
        arrived_[threadIdx.x] = !decide(threadIdx.x) ? 0 : mine ? 1 : 2;
      }
      __syncthreads();
      // Of 2 another block has all counts, so they are here, and this block gave up too early.
      for (int i = threadIdx.x; i < kWords; i += kThreads) {
        const int source = i / kColumns, e = i % kColumns;
        if (arrived_[source] == 2)
          at(source, e) = static_cast<uint32_t>(
              ptx::ld_acquire_sys(counts(own, source) + awaited_word(source, e)));
      }
      __syncthreads();
    }
    if constexpr (kRemote) {
      // By the warps that have seen the words of the tokens.
      warp_received(p.transport, threadIdx.x % kWarpSize);
      for (int i = threadIdx.x; i < kWords; i += kThreads) {
        const int source = i / kColumns, e = i % kColumns;
        if (arrived_[source] != 0 && is_remote(source))
          at(source, e) = static_cast<uint32_t>(counts(own, source)[count_word(e)]);
      }
      __syncthreads();
    }
    return true;
  }

  // Makes the table say where rows go; `tells`: also the outputs.
  __device__ void make(bool tells) const {
    for (int e = threadIdx.x; e < kExpertsARank; e += kThreads) {
      uint32_t begin = 0;
      for (int source = 0; source < kRanks; ++source) {
        const uint32_t sent = arrived_[source] != 0 ? at(source, e) : 0;
        const uint32_t count = min(sent, rows_a_slab() - begin);
        at(source, e) = begin;
        if (tells)
          p.layout_range[e * kRanks + source] =
              static_cast<int64_t>(static_cast<uint64_t>(begin) << 32 | count);
        begin += count;
      }
      if (!tells) continue;
      p.recv_count[e] = static_cast<int32_t>(begin);
      if (p.recv_stats != nullptr) p.recv_stats[e] += static_cast<int32_t>(begin);
    }
    if (threadIdx.x < kRanks) {
      uint32_t& tokens = at(threadIdx.x, kExpertsARank);
      // A peer that was called with another maximum has no places for more.
      tokens = arrived_[threadIdx.x] == 0 ? 0 : min(tokens, static_cast<uint32_t>(p.max_tokens));
      if (tells) p.source_tokens[threadIdx.x] = static_cast<int32_t>(tokens);
    }
    __syncthreads();
  }

  // ---- masked sources ---------------------------------------------------------------------------

  // A source that was masked while its rows were waited for. Blocks that plan later still count
  // them, as those before did.
  __device__ void drop(int source) const {
    atomicExch(p.decisions + source, waiter.epoch << 2 | 3);
  }

  // By the last warp: a source that was dropped, or never received, has sent nothing.
  __device__ void forget_dropped(int lane) const {
    for (int source = 0; source < kRanks; ++source) {
      if (ptx::ld_relaxed_gpu(p.decisions + source) == (waiter.epoch << 2 | 1)) continue;
      p.source_tokens[source] = 0;
      for (int e = lane; e < kExpertsARank; e += kWarpSize)
        reinterpret_cast<uint32_t*>(p.layout_range)[2 * (e * kRanks + source)] = 0;
    }
  }

 private:
  __device__ bool is_remote(int source) const {
    return kRemote && index_of<kRemote>(p, source) < 0;
  }

  // What says that a count of a source is here: between domains all of a row has come when the word
  // of the tokens has.
  __device__ int awaited_word(int source, int e) const {
    return is_remote(source) ? kTokensWord : count_word(e);
  }

  __device__ int64_t offset(int row) const {
    const int half = waiter.epoch & 1;
    return static_cast<int64_t>(half * kRanks + row) * p.counts_stride;
  }

  // Whether a source is received: what the first block has found.
  __device__ bool decide(int source) const {
    const uint32_t mine = waiter.epoch << 2 | arrived_[source];
    const uint32_t before = ptx::ld_relaxed_gpu(p.decisions + source);
    if (before >> 2 == mine >> 2) return before & 1;
    const uint32_t now = atomicCAS(p.decisions + source, before, mine);
    return (now == before ? mine : now) & 1;
  }

  const Params& p;
  const Waiter waiter;
  uint32_t* const table_;
  uint32_t* const arrived_;
};

}  // namespace epjit

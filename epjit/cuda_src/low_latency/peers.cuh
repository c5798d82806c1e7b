// Peers of the low-latency kernels in a group that spans several NVLink domains: how each is reached.
//
// The parameters' arrays of addresses have an entry for each rank of the own domain, `local` is that
// of this rank. `peers` has the index of every rank of the group in these arrays; a rank of another
// domain has -1 - pe and is reached through transport.cuh alone, by the addresses that the same
// bytes have in this rank's own memory. In one domain the index is the rank, there are no remote
// ranks, and what is said here does not exist.
//
// What is sent to remote ranks lies in this rank's symmetric memory, and is not waited for:
//
//   slots, counts of a dispatch, staging of a combine: all in the half of the operation's epoch n.
//
// That half is written again in n + 2, by this rank or by a peer that is ahead. Whoever is in n + 2 has
// ended n + 1; so all ranks have begun n + 1 and ended n, and none ends n before all that goes to it
// has landed. It holds for replays of a graph, as the epoch is counted on the device, and with a hook,
// as the launch that receives moves it on. No buffer of the user is ever a source (of zero_copy
// neither: only stores read that), so the end of an operation waits for nothing that it has sent.
//
// It does not hold for a rank that is masked. It is not sent to, but bytes may be on their way to it
// when that happens; what it makes of them is lost in any case.
//
// entered (sync.cuh) has two words for each rank, one for each parity of the epoch: signals of one
// rank to one word may overtake each other. The second one is sent after all ranks have ended the
// first one's operation, and must find it landed. A combine ends after the words of all ranks have
// come. A dispatch sends none to remote ranks: their counts say the same, and whoever sees these
// writes the word in its own memory.
#pragma once
#include "epjit/sync.cuh"
#include "epjit/transport.cuh"

namespace epjit {

// Base of the parameters of kernels that reach remote ranks.
struct PeerParams {
  const int32_t* peers;  // own [num_ranks]; null in one domain
  uint64_t transport;
};

// Index of this rank in the arrays of addresses.
template <bool kRemote, typename Params>
__device__ __forceinline__ int own_index(const Params& p) {
  if constexpr (kRemote)
    return p.local;
  else
    return p.rank;
}

// Index of a rank in the arrays of addresses; negative: it is remote.
template <bool kRemote, typename Params>
__device__ __forceinline__ int index_of(const Params& p, int rank) {
  if constexpr (kRemote)
    return p.peers[rank];
  else
    return rank;
}

__device__ __forceinline__ int pe_of(int index) { return -1 - index; }

// start_operation(), of a group that may have remote ranks; kTellsRemote: also these.
template <int kNumRanks, bool kRemote, bool kTellsRemote, typename Params>
__device__ __forceinline__ Waiter start_low_latency(const Params& p, WaitTag start_tag,
                                                    uint32_t* mask) {
  if constexpr (!kRemote) {
    return start_operation<kNumRanks>(p, start_tag, mask);
  } else {
    const uint32_t epoch = ptx::ld_relaxed_gpu(p.epoch) + 1;
    const uint64_t half = (epoch & 1) * kNumRanks * sizeof(uint64_t);
    const uint64_t own = p.signals[p.local] + half;
    const Waiter waiter{p.fault,   p.abort, p.timeout_ns, own, p.rank,
                        kNumRanks, epoch,   start_tag,    mask};
    for (int peer = threadIdx.x; blockIdx.x == 0 && peer < kNumRanks; peer += blockDim.x) {
      const int index = p.peers[peer];
      draw_along(waiter, peer);
      if (index >= 0)
        ptx::st_relaxed_sys(entered_signal(p.signals[index] + half, p.rank), stamp(epoch, 0));
      else if constexpr (kTellsRemote)
        if (p.sends && !is_masked(waiter, peer))
          epjit_signal(p.transport, entered_signal(own, p.rank), stamp(epoch, 0), pe_of(index));
    }
    return waiter;
  }
}

// The whole warp sends bytes, then a word, to the same places of a remote rank's memory. What other
// threads have written of the bytes, this warp has seen (a barrier of the block or of the warp).
__device__ __forceinline__ void put_with_word(uint64_t transport, void* dst, const void* src,
                                              uint64_t bytes, uint64_t* word, uint64_t value,
                                              int index) {
  ptx::fence_acq_rel_sys();
  __syncwarp();  // whichever lane sends it, all have fenced
  epjit_put_signal(transport, dst, src, bytes, word, value, pe_of(index));
}

}  // namespace epjit

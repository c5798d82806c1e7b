// Rails, for the three kernels between NVLink domains: who is who, the rings between rail peers, and
// what these tell each other.
//
// A rank is (domain, local). Its rail peers are the ranks of the same `local` in the other domains;
// only these exchange anything over RDMA, and the ranks of a domain reach each other by NVLink.
//
// The *channel* (n, j) of a rank of domain m is the sequence of tokens that go from ranks[n, j] to
// domain m, in the order of tokens. Rank (m, j) is where it enters or leaves the domain. Index i of
// a channel lies in slot i % ring_slots of a ring, and belongs to window i / (ring_slots / 2). Window
// w overwrites the slots of w - 2, so its writer waits until those are used up: by `done` of each
// reader inside a domain, by `credits` between rail peers.
//
// In symmetric memory of the transport, of each rank, outside what users may write:
//   entered  [num_domains, 2] u64           written by the rail peer in domain n: epoch of the last
//            operation that it has started, epoch & 1 (only a fault record reads that)
//   ready    [num_domains, 2] u64           behind it, written by the rail peer in domain n: epoch of
//            the last operation that n may be written in, epoch & 1: all its ranks have finished the
//            one before
//   credits  [num_domains, 2] u64           by the rail peer in n: (epoch, window + 1), window & 1:
//            n has used up what this rank sent to it in that window
//   arrived  [num_domains, ring chunks] u64 by the rail peer in n, with the chunk: a word (sync.cuh)
// In memory of this rank alone:
//   staged   [num_domains, ring chunks] u64 a word: the chunk lies in the stage, to be put
// In symmetric memory of the NVLink domain:
//   signals  see sync.cuh
//   done     [num_domains, num_local, 2] u64  column j by local rank j: (epoch, window + 1),
//            window & 1: j has used up the slots of that window of the ring of domain n
//
// A put or signal of an operation has come before its sender can begin the one after the next: the
// sender's peers wait for all of it (for `entered` as their last act, when it has long come), or (a
// credit) it is sent only if it will be waited for. So nothing is on its way to memory that a Buffer
// has given back, and two words are enough where the later of two signals could come first. `ready`
// may come before the `entered` of its operation: to a fault record either says that the peer has
// started.
//
// A rank ends an operation while its last puts may still read its stage. The next operation writes
// for domain n when n is ready: the rail peer there has ended the one before, so all puts to it have
// come, but those to other domains may still read. So ring n lies in the same ring_bytes in every
// operation, however long its slots are: nothing but a put to n has read there.
#pragma once
#include "epjit/sync.cuh"
#include "epjit/transport.cuh"

namespace epjit {

constexpr int kMaxDomains = 32;  // one lane a domain

// Bases of the parameters of all three kernels, and of those with rings.
struct RailParams {
  uint64_t entered[kMaxRanks];  // symmetric, with `ready`, of each local rank, as mapped here
  uint64_t* arrived;            // this rank's; of notify [num_domains]
  const int32_t* ranks;         // [num_domains, num_local]: numbers in the group
  const int32_t* pes;           // [ranks]: numbers for the transport
  uint64_t transport;
};

struct RingParams {
  uint64_t done[kMaxRanks];  // symmetric, of each local rank
  char* stage;               // this rank's
  int64_t ring_bytes;        // of a ring of inbox or stage, whatever the operation's slots
  uint64_t* credits;         // this rank's
  uint64_t* staged;
};

// kDomains x kLocal ranks; Params has the bases above, ring_slots and who this rank is.
template <int kDomains, int kLocal, int kChunk, typename Params>
class Rail {
  static_assert(kDomains >= 2 && kDomains <= kMaxDomains);
  static_assert(kLocal >= 1 && kLocal <= kMaxRanks);
  static_assert(kChunk >= 1 && kChunk <= kWarpSize, "one lane a token");

 public:
  // Numbers of the waits in a fault record.
  struct Tags {
    WaitTag start, entry, ready;
  };

  __device__ Rail(const Params& params, Tags tags)
      : p(params),
        tags_(tags),
        lane_(threadIdx.x % kWarpSize),
        waiter(start_operation<kLocal>(p, tags.start, p.local,
                                       {p.ranks, p.entered, p.domain, kDomains})) {}

  // ---- who is who -------------------------------------------------------------------------------

  __device__ int rank_of(int domain, int local) const { return p.ranks[domain * kLocal + local]; }
  __device__ int rail_peer(int domain) const { return rank_of(domain, p.local); }
  __device__ int rail_pe(int domain) const { return p.pes[rail_peer(domain)]; }

  // ---- the beginning ----------------------------------------------------------------------------

  // The ranks of this domain have finished the operation before. Called by a whole warp.
  __device__ bool enter() const { return epjit::enter<kLocal>(waiter, tags_.entry, lane_); }

  // One warp of one block: tells the rail peers that this rank has started, and then that this
  // domain may be written to.
  __device__ bool announce() const {
    const bool tells = lane_ < kDomains && lane_ != p.domain;
    if (tells) epjit_signal(p.transport, entered(p.domain), stamp(waiter.epoch, 0), rail_pe(lane_));
    __syncwarp();
    if (!enter()) return false;
    ptx::fence_acq_rel_sys();  // what the local ranks have read -> what the peers may overwrite
    if (tells) epjit_signal(p.transport, ready(p.domain), stamp(waiter.epoch, 0), rail_pe(lane_));
    __syncwarp();
    return true;
  }

  // Domain n may be written to.
  __device__ bool is_ready(int n) const {
    return wait_signal(waiter, tags_.ready, rail_peer(n), ready(n), stamp(waiter.epoch, 0));
  }

  // What the rail peer in n has told by announce() is all here.
  __device__ bool has_announced(int n) const {
    return is_ready(n) &&
           wait_signal(waiter, tags_.start, rail_peer(n), entered(n), stamp(waiter.epoch, 0));
  }

  // That of all: nobody ends an operation that a rail peer has not begun. By a whole warp.
  __device__ bool all_announced() const {
    bool ok = true;
    if (lane_ < kDomains && lane_ != p.domain) ok = has_announced(lane_);
    return all_lanes(ok);
  }

  // ---- windows ----------------------------------------------------------------------------------

  __device__ uint64_t* done(int owner, int n, int j, int window) const {
    return reinterpret_cast<uint64_t*>(p.done[owner]) + (n * kLocal + j) * 2 + (window & 1);
  }

  // Local rank j has used up what window `window` of the ring of domain n here overwrites.
  __device__ bool wait_done(WaitTag tag, int n, int j, int window) const {
    return window < 2 || wait_signal(waiter, tag, rank_of(p.domain, j), done(p.local, n, j, window),
                                     stamp(waiter.epoch, window - 1));
  }

  // Tells local rank `owner` that this rank has used up a window of its ring of domain n.
  __device__ void signal_done(int owner, int n, int window) const {
    ptx::st_release_sys(done(owner, n, p.local, window), stamp(waiter.epoch, window + 1));
  }

  // Domain n has used up what window `window` of the ring there overwrites.
  __device__ bool wait_credit(WaitTag tag, int n, int window) const {
    return window < 2 || wait_signal(waiter, tag, rail_peer(n), p.credits + 2 * n + (window & 1),
                                     stamp(waiter.epoch, window - 1));
  }

  // Tells the rail peer in n that this domain has used up a window; not when it will not ask. What
  // was read of it (acquired by this thread) -> fence -> what the peer may overwrite.
  __device__ void signal_credit(int n, int window, int num_tokens) const {
    if ((window + 2) * (p.ring_slots / 2) >= num_tokens) return;
    ptx::fence_acq_rel_sys();
    epjit_signal(p.transport, p.credits + 2 * p.domain + (window & 1),
                 stamp(waiter.epoch, window + 1), rail_pe(n));
  }

  // ---- chunks between rail peers ----------------------------------------------------------------

  __device__ int ring_window(int index) const { return index / (p.ring_slots / 2); }

  // The word of a chunk of domain n.
  __device__ uint64_t* chunk_word(uint64_t* words, int n, int index) const {
    return words + n * (p.ring_slots / kChunk) + index % p.ring_slots / kChunk;
  }

  // The chunk of domain n that holds `index` is here.
  __device__ bool wait_arrival(WaitTag tag, int n, int index) const {
    return wait_chunk(tag, p.arrived, n, index);
  }

  // Puts take long where the warp itself moves the bytes (NVSHMEM over NVLink: 1 GB/s a warp), so
  // they have warps of their own. This warp has written a chunk to the stage: each lane's writes ->
  // fence (sys, for whoever reads for RDMA) -> __syncwarp -> the word (release).
  __device__ void publish_staged(int n, int first) const {
    ptx::fence_acq_rel_sys();
    __syncwarp();
    if (lane_ == 0)
      ptx::st_release_sys(chunk_word(p.staged, n, first),
                          make_word(waiter.epoch, ring_window(first), 0));
  }

  // One of `num_putters` warps, at least one a channel, from the start: puts the chunks of one
  // channel into the inbox of the rail peer when they are staged. Lane n has the tokens of the
  // channel to domain n; `tag` is what staging itself waits for.
  __device__ bool put_staged(WaitTag tag, int putter, int num_putters, int num_tokens, char* inbox,
                             int slot_bytes) const {
    const int channel = putter % (kDomains - 1);
    const int n = (p.domain + 1 + channel) % kDomains;
    const int num_sharers = ceil_div(num_putters - channel, kDomains - 1);
    const int last = __shfl_sync(kFullMask, num_tokens, n);
    for (int first = putter / (kDomains - 1) * kChunk; first < last;
         first += num_sharers * kChunk) {
      if (!all_lanes(wait_chunk(tag, p.staged, n, first))) return false;
      epjit_put_signal(p.transport, inbox + ring_offset(p.domain, first, slot_bytes),
                       p.stage + ring_offset(n, first, slot_bytes),
                       static_cast<uint64_t>(min(kChunk, last - first)) * slot_bytes,
                       chunk_word(p.arrived, p.domain, first),
                       make_word(waiter.epoch, ring_window(first), 0), rail_pe(n));
    }
    return true;
  }

  // In an inbox or a stage.
  __device__ int64_t ring_offset(int n, int index, int slot_bytes) const {
    return n * p.ring_bytes + static_cast<int64_t>(index % p.ring_slots) * slot_bytes;
  }

 private:
  __device__ bool wait_chunk(WaitTag tag, uint64_t* words, int n, int index) const {
    uint64_t found;
    return wait_word(waiter, tag, rail_peer(n), index, ring_window(index),
                     chunk_word(words, n, index), found);
  }

  __device__ uint64_t* entered(int n) const {
    return reinterpret_cast<uint64_t*>(p.entered[p.local]) + 2 * n + (waiter.epoch & 1);
  }
  __device__ uint64_t* ready(int n) const { return entered(kDomains + n); }

  const Params& p;
  const Tags tags_;
  const int lane_;

 public:
  const Waiter waiter;
};

}  // namespace epjit

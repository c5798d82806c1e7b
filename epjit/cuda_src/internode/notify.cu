// Notify between NVLink domains: before a dispatch with a new routing, the ranks tell each other how
// many tokens will come.
//
//   rank_prefix[s]          = tokens that the ranks 0..s send to this rank, at most num_recv_rows
//   fits[n, j]              = of the tokens of ranks[n, local] for local rank j: those, the first
//                             ones, that lie below the end of rank_prefix there
//   channel_tokens[n, j]    = tokens that ranks[n, j] sends to this rank's domain
//   passing_prefix[n]       = sum over the domains 0..n of channel_tokens[., local]
//   expert_counts[e]        = selections of this rank's expert e, over all ranks
//   send_head[t, d]         = how many tokens before t go to rank d, or -1 if t does not
//   send_domain_head[t, n]  = how many tokens before t go to domain n, or -1 if t does not
//   send_tokens[n, i]       = the token of index i among those; [n, num_tokens] = their number
//
// Block 0 exchanges counts. The message of (m, l) to domain n, in the symmetric memory of its rail
// peer (n, l):
//   inbox[m] = { num_tokens to n, num_recv_rows of (m, l), num_local times { tokens to (n, j),
//              counts of its experts [experts_per_rank] } }
// put after (n, l) is ready, with the signal arrived[m] = (epoch, 0); for the own domain it is
// written in place. When all messages of its ring are here, a rank raises notify_signal of its local
// peers (release), which then read them by NVLink (acquire).
// Blocks 1 .. ranks + num_domains number the tokens for a rank or for a domain, and need no peer.
// The counts also go to host memory: first host_counts[2 + e] (rounded up to the alignment) and
// host_counts[1], the tokens that pass through; then, released, the rows in host_counts[0], which
// the host polls.
//
// Launch: 1 + ranks + num_domains blocks of notify_threads() threads. Graph-safe. Dispatch may be
// queued behind it at once (intranode/dispatch.cu, "guessed room"), and takes its places when the
// counts of all ranks are here.
#include "epjit/numbering.cuh"
#include "internode/rail.cuh"

namespace epjit {

struct InternodeNotifyConfig {
  int32_t num_domains;
  int32_t num_local;
};

struct InternodeNotifyParams : Operation, RailParams {
  const int32_t* num_tokens_per_rank;    // [ranks]
  const int32_t* num_tokens_per_domain;  // [num_domains]
  const int32_t* num_tokens_per_expert;  // [ranks * experts_per_rank]
  const bool* is_token_in_rank;          // [num_tokens, ranks]
  int32_t* rank_prefix;                  // [ranks]
  int32_t* channel_tokens;               // [num_domains, num_local]
  int32_t* passing_prefix;               // [num_domains]
  int32_t* expert_counts;                // [experts_per_rank]
  int32_t* send_head;                    // [num_tokens, ranks]
  int32_t* send_domain_head;             // [num_tokens, num_domains]
  int32_t* send_tokens;                  // [num_domains, num_tokens + 1]
  int32_t* fits;                         // [num_domains, num_local]
  uint64_t* host_counts;                 // host [2 + experts_per_rank]
  uint64_t inbox[kMaxRanks];  // symmetric [num_domains, notify_stride] i32, of each local rank
  int32_t* stage;             // this rank's [num_domains, notify_stride]: messages to be put
  uint32_t* counters;         // own [1]; zero on entry and on exit
  int32_t notify_stride;      // a multiple of 4
  int32_t num_tokens;
  int32_t num_recv_rows;  // that this rank has room for; 0 = the host will make room for all
  int32_t experts_per_rank;
  int32_t expert_alignment;
  int32_t rank;
  int32_t domain;
  int32_t local;
};

constexpr int notify_threads(InternodeNotifyConfig) { return 512; }

// Sums of the warps, or rows of each source for each local rank and the room of these.
constexpr int notify_shared_bytes(InternodeNotifyConfig cfg) {
  return 4 *
         (notify_threads(cfg) / kWarpSize + (cfg.num_domains * cfg.num_local + 1) * cfg.num_local);
}

template <InternodeNotifyConfig kCfg>
class InternodeNotify {
  static constexpr int kDomains = kCfg.num_domains, kLocal = kCfg.num_local;
  static constexpr int kRanks = kDomains * kLocal;
  static constexpr int kNumWarps = notify_threads(kCfg) / kWarpSize;
  using Params = InternodeNotifyParams;

 public:
  __device__ explicit InternodeNotify(const Params& params)
      : p(params),
        thread(threadIdx.x),
        rail(p, {kWaitNotifyStart, kWaitNotifyEntry, kWaitNotifyReady}),
        shared(reinterpret_cast<int*>(ptx::dynamic_shared())) {}

  __device__ void run() {
    if (__syncthreads_and(ptx::ld_relaxed_gpu(p.abort) == 0)) {
      if (blockIdx.x == 0)
        exchange_counts();
      else
        number_column(static_cast<int>(blockIdx.x) - 1);
    }
    finish_operation<kLocal>(p, rail.waiter, 1);
  }

 private:
  // ---- numbers ----------------------------------------------------------------------------------

  // Whether a token goes to rank `column`, or to domain `column - kRanks`.
  __device__ bool is_in(int token, int column) const {
    const bool* const in_rank = p.is_token_in_rank + static_cast<int64_t>(token) * kRanks;
    if (column < kRanks) return in_rank[column];
    bool in = false;
    for (int j = 0; j < kLocal; ++j) in |= in_rank[rail.rank_of(column - kRanks, j)];
    return in;
  }

  __device__ void number_column(int column) {
    const int count = number_tokens<kNumWarps>(
        p.num_tokens, shared, [&](int token) { return is_in(token, column); },
        [&](int token, int position) { store_number(token, column, position); });
    if (thread == 0 && column >= kRanks) *send_token(column - kRanks, p.num_tokens) = count;
  }

  __device__ int32_t* send_token(int n, int index) const {
    return p.send_tokens + static_cast<int64_t>(n) * (p.num_tokens + 1) + index;
  }

  __device__ void store_number(int token, int column, int position) const {
    if (column < kRanks) {
      p.send_head[static_cast<int64_t>(token) * kRanks + column] = position;
      return;
    }
    const int n = column - kRanks;
    p.send_domain_head[static_cast<int64_t>(token) * kDomains + n] = position;
    if (position >= 0) *send_token(n, position) = token;
  }

  // ---- counts -----------------------------------------------------------------------------------

  __device__ int message_size() const { return 2 + kLocal * (1 + p.experts_per_rank); }

  // Element i of the message to domain n.
  __device__ int message(int n, int i) const {
    if (i == 0) return p.num_tokens_per_domain[n];
    if (i == 1) return p.num_recv_rows;
    const int rank = rail.rank_of(n, (i - 2) / (1 + p.experts_per_rank));
    const int e = (i - 2) % (1 + p.experts_per_rank) - 1;
    return e < 0 ? p.num_tokens_per_rank[rank]
                 : p.num_tokens_per_expert[rank * p.experts_per_rank + e];
  }

  // The message of ranks[n, j], in the memory of local rank j.
  __device__ const int32_t* received(int n, int j) const {
    return reinterpret_cast<const int32_t*>(p.inbox[j]) + static_cast<int64_t>(n) * p.notify_stride;
  }

  // The part of it for a local rank: tokens, then the counts of its experts.
  __device__ const int32_t* received_for(int reader, int n, int j) const {
    return received(n, j) + 2 + reader * (1 + p.experts_per_rank);
  }

  // Rows that a local rank has room for.
  __device__ int room_of(int reader) const {
    const int num_rows = reader == p.local ? p.num_recv_rows : received(p.domain, reader)[1];
    return num_rows > 0 ? num_rows : kNoBound;
  }

  __device__ void exchange_counts() {
    const int warp = thread / kWarpSize;
    // Entry: local peers may still read the messages of the previous notify.
    if (!__syncthreads_and(warp == 0 ? rail.announce() : true)) return;
    // A warp a domain: the peer there has received what it was last sent, then the next message.
    bool ok = true;
    for (int i = warp; i < kDomains && ok; i += kNumWarps)
      ok = send_message((p.domain + i) % kDomains);
    if (ok && thread < kDomains && thread != p.domain)
      ok = rail.has_announced(thread) &&
           wait_signal(rail.waiter, kWaitNotifyArrival, rail.rail_peer(thread), p.arrived + thread,
                       stamp(rail.waiter.epoch, 0));
    if (warp == 0) {
      ok = all_lanes(ok);
      if (ok) warp_received(p.transport, thread);
    }
    if (!__syncthreads_and(ok)) return;

    // What has arrived here, the local peers may read; and this rank theirs.
    if (thread < kLocal) {
      ptx::st_release_sys(notify_signal(p.signals[thread], p.local), stamp(rail.waiter.epoch, 0));
      ok = wait_signal(rail.waiter, kWaitNotifyCounts, rail.rank_of(p.domain, thread),
                       notify_signal(rail.waiter.signals, thread), stamp(rail.waiter.epoch, 0));
    }
    if (!__syncthreads_and(ok)) return;
    ptx::griddepcontrol_launch_dependents();  // all peers are here: dispatch takes its places
    add_up();
  }

  // By a whole warp.
  __device__ bool send_message(int n) const {
    const int lane = thread % kWarpSize;
    const bool stays = n == p.domain;
    if (!stays && !all_lanes(rail.is_ready(n))) return false;
    int32_t* const inbox = reinterpret_cast<int32_t*>(p.inbox[p.local]) +
                           static_cast<int64_t>(p.domain) * p.notify_stride;
    int32_t* const stage = p.stage + static_cast<int64_t>(n) * p.notify_stride;
    for (int i = lane; i < message_size(); i += kWarpSize)
      (stays ? inbox : stage)[i] = message(n, i);
    if (stays) return true;
    ptx::fence_acq_rel_sys();
    __syncwarp();
    epjit_put_signal(p.transport, inbox, stage, 4 * align_up(message_size(), 4),
                     p.arrived + p.domain, stamp(rail.waiter.epoch, 0), rail.rail_pe(n));
    return true;
  }

  __device__ void add_up() const {
    int* const rows = shared;  // [ranks, num_local]: of each source for each reader
    int* const rooms = rows + kRanks * kLocal;  // [num_local]
    // By the last threads, while the first ones are busy with the experts.
    for (int i = blockDim.x - 1 - thread; i < kRanks * kLocal; i += blockDim.x) {
      const int n = i / kLocal / kLocal, j = i / kLocal % kLocal, reader = i % kLocal;
      const int room = room_of(reader);
      const bool counts = reader == p.local || room != kNoBound;
      rows[rail.rank_of(n, j) * kLocal + reader] =
          counts ? received_for(reader, n, j)[0] : kNoBound;
      if (i < kLocal) rooms[i] = room;
      if (reader == p.local) p.channel_tokens[n * kLocal + j] = received(n, j)[0];
    }
    for (int e = thread; e < p.experts_per_rank; e += blockDim.x) {
      int sum = 0;
#pragma unroll 1
      for (int i = 0; i < kRanks; ++i) sum += received_for(p.local, i / kLocal, i % kLocal)[1 + e];
      p.expert_counts[e] = sum;
      const int64_t aligned = (static_cast<int64_t>(sum) + p.expert_alignment - 1) /
                              p.expert_alignment * p.expert_alignment;
      ptx::st_relaxed_sys(p.host_counts + 2 + e, aligned);
    }
    __syncthreads();
    if (thread < kLocal) cut_to_room(rows, thread, rooms[thread]);
    if (thread == kWarpSize) {
      int passing = 0;
#pragma unroll 1
      for (int n = 0; n < kDomains; ++n) {
        passing += p.channel_tokens[n * kLocal + p.local];
        p.passing_prefix[n] = passing;
      }
      ptx::st_relaxed_sys(p.host_counts + 1, static_cast<uint64_t>(passing));
    }
    __syncthreads();
    if (thread == 0) {
      ptx::st_release_sys(p.host_counts, static_cast<uint64_t>(p.rank_prefix[kRanks - 1]));
      if (p.num_recv_rows > 0)  // the handle has room for so many
        report_overflow(p, rail.waiter.epoch, kRoomDispatchPassing, kLocal * p.num_recv_rows,
                        p.passing_prefix[kDomains - 1]);
    }
    for (int i = thread; i < kRanks; i += blockDim.x)
      p.fits[i] = rows[rail.rail_peer(i / kLocal) * kLocal + i % kLocal];
  }

  // Leaves of the rows of each source for a local rank those that it has room for.
  __device__ void cut_to_room(int* rows, int reader, int room) const {
    if (reader != p.local && room == kNoBound) return;
    int sum = 0;
#pragma unroll 1
    for (int s = 0; s < kRanks; ++s) {
      int& count = rows[s * kLocal + reader];
      const int before = min(sum, room);
      sum += count;
      count = min(sum, room) - before;
      if (reader == p.local) p.rank_prefix[s] = before + count;
    }
    if (reader == p.local) report_overflow(p, rail.waiter.epoch, kRoomDispatchRows, room, sum);
  }

  const Params& p;
  const int thread;
  const Rail<kDomains, kLocal, 1, Params> rail;
  int* const shared;
};

template <InternodeNotifyConfig kCfg>
__device__ void notify(const InternodeNotifyParams& p) {
  ptx::griddepcontrol_wait();
  InternodeNotify<kCfg>(p).run();
}

}  // namespace epjit

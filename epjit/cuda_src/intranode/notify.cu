// Notify: before a dispatch with a new routing, the ranks tell each other how many tokens will
// come.
//
//   rank_prefix[s, d]     = tokens that the ranks 0..s send to rank d, at most num_recv_rows of d
//   source_tokens[s]      = tokens that rank s holds
//   expert_counts[e]      = selections of this rank's expert e, over all ranks
//   send_head[t, d]       = how many tokens before t go to rank d, or -1 if t does not
//
// So the rows that a rank has no room for, the last ones, are in no segment of rank_prefix, which all
// ranks have: dispatch leaves them out, and combine waits for none of them.
//
// Block 0 exchanges counts. Message of rank s, in rank d's symmetric memory, written by s:
//   notify[s] = { num_tokens_per_rank [num_ranks], num_tokens, num_recv_rows,
//                 counts of d's experts [experts_per_rank] }
//   notify_signal[s] of d: epoch, raised (release) after the message, which d reads after it
//                 (acquire).
// With by_expert a dispatch places rows by expert, and needs besides
//
//   ends[e]           = the end of expert e's rows, padding included, at most num_expert_rows
//   row_base[s, e]    = the row of the first selection of e by rank s
//   block_base[b, e]  = selections of e (of all ranks) here in the blocks of layout before b
//
// so that row_base + block_base + local_position (layout.cu) is the row of a selection, and rows are
// by expert, source rank, token and choice. Rows are numbered whether there is room for them or not.
//
// Blocks 1 .. num_ranks need no peer: block 1 + d numbers the tokens that go to rank d. Nor do those
// behind, which add up the blocks of layout. The counts
// also go to host memory: first host_counts[1 + e] (rounded up to the alignment), then, released,
// the total in host_counts[0], which the host polls.
//
// Launch: 1 + num_ranks blocks of notify_threads() threads; with by_expert a block more for each
// notify_threads() experts. Dispatch may be queued behind it at once (dispatch.cu, "guessed room"),
// and takes its places when the counts of all ranks are here.
#include "epjit/numbering.cuh"
#include "epjit/sync.cuh"

namespace epjit {

struct NotifyConfig {
  int32_t num_ranks;
  bool by_expert;
};

struct NotifyParams : Operation {
  const int32_t* num_tokens_per_rank;    // [num_ranks]
  const int32_t* num_tokens_per_expert;  // [num_ranks * experts_per_rank]
  const bool* is_token_in_rank;          // [num_tokens, num_ranks]
  int32_t* rank_prefix;                  // [num_ranks, num_ranks]
  int32_t* source_tokens;                // [num_ranks]
  int32_t* expert_counts;                // [experts_per_rank]
  int32_t* send_head;                    // [num_tokens, num_ranks]
  uint64_t* host_counts;                 // host [1 + experts_per_rank]
  uint64_t notify[kMaxRanks];            // symmetric [num_ranks, notify_stride] i32, of each rank
  uint32_t* counters;                    // own [1]; zero on entry and on exit
  int32_t* ends;                         // [experts_per_rank]; by_expert
  int32_t* row_base;                     // [num_ranks, experts_per_rank]; by_expert
  int32_t* block_base;      // [num_blocks, num_ranks * experts_per_rank]: counts before
  int32_t num_blocks;       // of layout; by_expert
  int32_t num_expert_rows;  // that this rank has room for; 0 = for all; by_expert
  int32_t notify_stride;
  int32_t num_tokens;
  int32_t num_recv_rows;  // that this rank has room for; 0 = the host will make room for all
  int32_t experts_per_rank;
  int32_t expert_alignment;
  int32_t rank;
};

constexpr int notify_threads(NotifyConfig) { return 512; }

constexpr int notify_shared_bytes(NotifyConfig cfg) { return notify_threads(cfg) / kWarpSize * 4; }

// By one block.
template <NotifyConfig kCfg>
__device__ void number_tokens_to(const NotifyParams& p, int dst) {
  const auto at = [&](int token) { return static_cast<int64_t>(token) * kCfg.num_ranks + dst; };
  number_tokens<notify_threads(kCfg) / kWarpSize>(
      p.num_tokens, reinterpret_cast<int*>(ptx::dynamic_shared()),
      [&](int token) { return p.is_token_in_rank[at(token)]; },
      [&](int token, int position) { p.send_head[at(token)] = position; });
}

// Counts of the blocks of layout become sums of the blocks before. By one block.
template <NotifyConfig kCfg>
__device__ void add_up_blocks(const NotifyParams& p, int part) {
  constexpr int kUnroll = 8;
  const int num_experts = kCfg.num_ranks * p.experts_per_rank;
  const int expert = part * notify_threads(kCfg) + threadIdx.x;
  if (expert >= num_experts) return;
  int32_t* const base = p.block_base + expert;
  int sum = 0;
  for (int first = 0; first < p.num_blocks; first += kUnroll) {
    int counts[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (first + i < p.num_blocks) counts[i] = base[static_cast<int64_t>(first + i) * num_experts];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i >= p.num_blocks) break;
      base[static_cast<int64_t>(first + i) * num_experts] = sum;
      sum += counts[i];
    }
  }
}

// Where the rows of each expert, and in them those of each rank, begin and end. By block 0, when the
// messages are there.
template <NotifyConfig kCfg>
__device__ void place_experts(const NotifyParams& p, const int32_t* counts) {
  constexpr int kThreads = notify_threads(kCfg);
  int* const warp_sums = reinterpret_cast<int*>(ptx::dynamic_shared());
  int before = 0;  // rows of the experts in the rounds before
  for (int first = 0; first < p.experts_per_rank; first += kThreads) {
    const int expert = first + threadIdx.x;
    const bool is_one = expert < p.experts_per_rank;
    int count = 0;
    for (int src = 0; is_one && src < kCfg.num_ranks; ++src)
      count += counts[static_cast<int64_t>(src) * p.notify_stride + expert];
    const int aligned = ceil_div(count, p.expert_alignment) * p.expert_alignment;
    int sum;
    const int start = before + block_prefix<kThreads / kWarpSize>(aligned, warp_sums, sum);
    before += sum;
    if (!is_one) continue;
    p.ends[expert] = min(start + aligned, p.num_expert_rows > 0 ? p.num_expert_rows : kNoBound);
    int row = start;
    for (int src = 0; src < kCfg.num_ranks; ++src) {
      p.row_base[src * p.experts_per_rank + expert] = row;
      row += counts[static_cast<int64_t>(src) * p.notify_stride + expert];
    }
  }
}

template <NotifyConfig kCfg>
__device__ void exchange_counts(const NotifyParams& p, const Waiter& waiter) {
  constexpr int kRanks = kCfg.num_ranks, kTokens = kRanks, kRoom = kRanks + 1, kCounts = kRanks + 2;
  const int thread = threadIdx.x;
  const int message_size = kCounts + p.experts_per_rank;

  int* const all_ok = reinterpret_cast<int*>(ptx::dynamic_shared());

  // Entry: a peer may still read my message of the previous notify.
  if (thread < kWarpSize) {
    const bool ok = enter<kRanks>(waiter, kWaitNotifyEntry, thread);
    if (thread == 0) *all_ok = ok;
  }
  __syncthreads();
  if (!*all_ok) return;

  // Step 1: my message to every rank, myself included
  for (int i = thread; i < kRanks * message_size; i += blockDim.x) {
    const int dst = i / message_size, j = i % message_size;
    int value;
    if (j < kRanks)
      value = p.num_tokens_per_rank[j];
    else if (j == kTokens)
      value = p.num_tokens;
    else if (j == kRoom)
      value = p.num_recv_rows;
    else
      value = p.num_tokens_per_expert[dst * p.experts_per_rank + j - kCounts];
    reinterpret_cast<int32_t*>(p.notify[dst])[static_cast<int64_t>(p.rank) * p.notify_stride + j] =
        value;
  }
  __syncthreads();
  if (thread < kRanks)
    ptx::st_release_sys(notify_signal(p.signals[thread], p.rank), stamp(waiter.epoch, 0));

  // Step 2: everyone's message to me
  if (thread < kWarpSize) {
    bool ok = true;
    if (thread < kRanks) {
      const uint64_t* signal = notify_signal(p.signals[p.rank], thread);
      ok = wait_signal(waiter, kWaitNotifyCounts, thread, signal, stamp(waiter.epoch, 0));
    }
    ok = __all_sync(kFullMask, ok);
    if (thread == 0) *all_ok = ok;
  }
  __syncthreads();
  if (!*all_ok) return;
  ptx::griddepcontrol_launch_dependents();  // all peers are here: dispatch takes its places
  const int32_t* const messages = reinterpret_cast<const int32_t*>(p.notify[p.rank]);

  // Step 3: sums
  if (thread < kRanks) {
    const int32_t* const message = messages + static_cast<int64_t>(thread) * p.notify_stride;
    const int room = message[kRoom] > 0 ? message[kRoom] : kNoBound;
    int sum = 0;
    for (int src = 0; src < kRanks; ++src) {
      sum += messages[static_cast<int64_t>(src) * p.notify_stride + thread];
      p.rank_prefix[src * kRanks + thread] = min(sum, room);
    }
    p.source_tokens[thread] = message[kTokens];
    if (thread == p.rank) report_overflow(p, waiter.epoch, kRoomDispatchRows, room, sum);
  }
  for (int e = thread; e < p.experts_per_rank; e += blockDim.x) {
    int sum = 0;
    for (int src = 0; src < kRanks; ++src)
      sum += messages[static_cast<int64_t>(src) * p.notify_stride + kCounts + e];
    p.expert_counts[e] = sum;
    const int64_t aligned = (static_cast<int64_t>(sum) + p.expert_alignment - 1) /
                            p.expert_alignment * p.expert_alignment;
    ptx::st_relaxed_sys(p.host_counts + 1 + e, aligned);
  }
  __syncthreads();
  if constexpr (kCfg.by_expert) place_experts<kCfg>(p, messages + kCounts);
  if (thread == 0) {
    const int total = p.rank_prefix[(kRanks - 1) * kRanks + p.rank];
    ptx::st_release_sys(p.host_counts, static_cast<uint64_t>(total));
  }
}

template <NotifyConfig kCfg>
__device__ void notify(const NotifyParams& p) {
  ptx::griddepcontrol_wait();
  static_assert(kCfg.num_ranks >= 1 && kCfg.num_ranks <= kMaxRanks);
  const Waiter waiter = start_operation<kCfg.num_ranks>(p, kWaitNotifyStart);
  if (blockIdx.x == 0)
    exchange_counts<kCfg>(p, waiter);
  else if (!kCfg.by_expert || blockIdx.x <= kCfg.num_ranks)
    number_tokens_to<kCfg>(p, blockIdx.x - 1);
  else
    add_up_blocks<kCfg>(p, blockIdx.x - 1 - kCfg.num_ranks);
  finish_operation<kCfg.num_ranks>(p, waiter, 1);
}

}  // namespace epjit

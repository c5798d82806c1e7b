// Low-latency combine: every expert's output goes back to the rank of its token, which weights and
// sums them.
//
//   out[t] = round(sum over k of topk_weights[t, k] * y[t, k]),   k ascending, from +0.0
//
// y[t, k] is the row of expert topk_idx[t, k]; products and sums are rounded to fp32, one rounding
// to bf16 at the end. Entries that are no expert, and experts of masked ranks, are left out. With
// the log format (cast.cuh) y is what decoding gives, also for rows that do not leave the rank.
//
//   slots[s]  two halves of half_bytes: operations of even and of odd epoch
//             [max_tokens, num_topk, slot_bytes]; (t, k) of owner s is written by the rank of expert
//             topk_idx_s[t, k]
//   words[s]  two halves [max_tokens, num_topk, push_parts] u64, by the same rank, after that part of
//             the slot: stamp(epoch, 0)
//   staging   between NVLink domains, symmetric, own: two halves of staging_half_bytes, for
//             operations of even and of odd epoch; each as x, with rows of slot_bytes
//
// Push    the first warps of a block: draw (token, group of its selections, part of the row, owner),
//         tokens ascending; rows of x -> slots, then the words (release). With few rows several warps
//         share one: what a warp copies is then one batch of loads, and all of it is on its way at
//         once. Rows that stay are read where they lie; with a hook they are pushed as well, to this
//         rank's own slots: x is the caller's after the send. Between NVLink domains (peers.cuh) they draw (selections in a row, owner): with many ranks
//         few selections of an owner are here. Rows for another domain go to the staging memory, to
//         the place that they have in x, and are put from there, each with its word. Nothing waits
//         for them to leave: staging has two halves as well, and x is the caller's after the send.
// Reduce  the other warps, and all when nothing is left to push: wait for the words of a token's
//         selections (acquire), add their rows
//
// With `lines` rows travel in lines (lines.cuh) instead, which say themselves that they are here: there
// are no words and no releases, and whoever adds looks at the rows.
//
// Progress: pushing waits for nothing and is drawn from one counter, so the blocks that run do all
// of it; the grid need not be resident as a whole. While a peer is late, few blocks wait for it
// (sync.cuh, "blocks that leave"). Halves are free for the reason that dispatch.cu gives: the last
// warp of block 0 waits until all peers have begun this operation. With a hook the two phases are two
// launches.
//
// Launch: any grid, low_latency_combine_threads() threads. Graph-safe.
#include "epjit/cast.cuh"
#include "epjit/copy.cuh"
#include "epjit/sum.cuh"
#include "epjit/topk.cuh"
#include "low_latency/lines.cuh"
#include "low_latency/memory.cuh"
#include "low_latency/peers.cuh"

namespace epjit {

struct LowLatencyCombineConfig {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t hidden;
  int32_t num_topk;
  bool topk_is_int64;
  bool logfmt;  // rows travel in the log format
  bool tma;     // rows are pushed by bulk copies, else through registers
  bool lines;   // rows travel in lines
  int32_t num_warps;
  int32_t num_push_warps;  // of num_warps
  int32_t rows_per_warp;   // rows of a pushing warp in shared memory
  bool remote;             // the group spans several NVLink domains
  bool shrink;             // ranks may be masked
};

struct LowLatencyCombineParams : Operation, PeerParams, LowLatencyParams {
  const char* x;                 // [experts_per_rank, num_ranks * max_tokens, hidden] bf16
  const void* topk_idx;          // [num_tokens, num_topk] int32 or int64, global experts
  const float* topk_weights;     // [num_tokens, num_topk]
  const int32_t* source_tokens;  // [num_ranks]: tokens of each owner
  const int32_t* source_rows;    // [num_ranks, max_tokens, num_topk]: row of x of each selection of
                                 // each owner, -1 = none here, -2 = beyond the slab
  char* out;                     // [num_tokens, hidden] bf16
  int64_t* wait_cost;            // [num_ranks], += cycles until it had begun; or null
  char* staging;                 // symmetric, own; null in one domain
  int64_t staging_half_bytes;
  // own [3]: ticket, next pushing unit, next reducing unit; zero on entry and on exit
  uint32_t* counters;
  int32_t words_stride;  // words of a half
  int32_t num_tokens;
  int32_t max_tokens;  // of any rank
  int32_t num_parts;   // warps that share the sum of one token
  int32_t push_parts;  // warps that share a row on its way, the same on all ranks; 1 by bulk copies
                       // and between domains
  int32_t num_staying;  // blocks that wait for a late peer
  int32_t rank;
  int32_t local;  // index of this rank in slots, words and signals
  bool sends;     // this launch has the send phase
  bool receives;  // this launch has the receive phase
};

constexpr int low_latency_combine_threads(LowLatencyCombineConfig cfg) {
  return cfg.num_warps * kWarpSize;
}

constexpr int copiers_bytes(LowLatencyCombineConfig cfg) {
  return copier_shared_bytes(cfg.tma && !cfg.logfmt, cfg.num_push_warps, cfg.rows_per_warp,
                             2 * cfg.hidden);
}

// Those of the copiers, then the block's word of the ticket.
constexpr int low_latency_combine_shared_bytes(LowLatencyCombineConfig cfg) {
  return copiers_bytes(cfg) + 4;
}

constexpr int low_latency_combine_slot_bytes(LowLatencyCombineConfig cfg) {
  if (cfg.lines) return line_slot_bytes(2 * cfg.hidden);
  return align_up(cfg.logfmt ? log_row_bytes(cfg.hidden) : 2 * cfg.hidden, 16);
}

template <LowLatencyCombineConfig kCfg>
class LowLatencyCombine {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kExperts = kCfg.num_experts;
  static constexpr int kExpertsARank = kExperts / kRanks;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kRows = kCfg.rows_per_warp;
  static constexpr int kRowBytes = 2 * kCfg.hidden;
  static constexpr int kVecs = kRowBytes / 16;
  static constexpr bool kLines = kCfg.lines;
  // Of a row: 16 bytes, or what a lane encodes, or a unit of lines.
  static constexpr int kPieces = kLines        ? line_units(kRowBytes)
                                 : kCfg.logfmt ? kCfg.hidden / kCastElements
                                               : kVecs;
  static constexpr int kSlotBytes = low_latency_combine_slot_bytes(kCfg);
  static constexpr int kGroups = ceil_div(kTopk, kRows);
  static constexpr bool kRemote = kCfg.remote;
  // Selections that are looked at together between domains: one of them is here, on average.
  static constexpr int kChunk = kRanks < kWarpSize ? kRanks : kWarpSize;
  static_assert(kRanks >= 1 && (kRemote || kRanks <= kMaxRanks) && kExperts % kRanks == 0);
  static_assert(kTopk >= 1 && kTopk <= kMaxTopk);
  static_assert(kRowBytes % 16 == 0, "a row is moved in pieces of 16 bytes");
  static_assert(!kCfg.logfmt || kCfg.hidden % kLogBlock == 0);
  static_assert(kCfg.num_push_warps >= 1 && kCfg.num_push_warps < kCfg.num_warps,
                "someone must reduce from the start");
  static_assert(!kLines || (!kRemote && !kCfg.shrink && !kCfg.logfmt && !kCfg.tma && kRows == 1));
  static constexpr bool kTma = kCfg.tma && !kCfg.logfmt;
  using Unit = LineUnit<kRowBytes>;
  using Copier = RowCopier<kTma, kCfg.num_push_warps, kRows, kRowBytes>;

 public:
  __device__ explicit LowLatencyCombine(const LowLatencyCombineParams& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        waiter(start_low_latency<kRanks, kRemote, true>(p, kWaitLowLatencyCombineStart,
                                                        kCfg.shrink ? p.mask : nullptr)),
        ticket(ticket_word(), p.counters, kCfg.num_warps) {}

  // Before the kernel ahead has ended: touches nothing but shared memory.
  static __device__ void prepare() {
    if (threadIdx.x == 0) *ticket_word() = 0;
  }

  __device__ void run() {
    const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);
    const bool pushes = p.sends && num_owners() > 0 && warp < kCfg.num_push_warps;
    // Loaded and drawn early: all of it is on its way at once.
    int tokens = pushes && lane < kRanks && is_pushed_to(lane) ? p.source_tokens[lane] : 0;
    Draw first;
    if (pushes) first = Draw(p.counters + 1);
    if (!p.receives || blockIdx.x != 0) ptx::griddepcontrol_launch_dependents();
    if (__syncthreads_and(aborted == 0)) {
      if constexpr (kRemote) {
        for (int owner = lane + kWarpSize; pushes && owner < kRanks; owner += kWarpSize)
          if (is_pushed_to(owner)) tokens = max(tokens, p.source_tokens[owner]);
        if (pushes) push_between(first.unit(), __reduce_max_sync(kFullMask, tokens));
      } else {
        if (pushes) push(first.unit(), tokens);
      }
      if (p.receives && goes_on()) reduce();
    }
    ticket.take(waiter.epoch);
    if (ticket.is_last()) end_operation(p, waiter.epoch, lane);
  }

 private:
  static __device__ uint32_t* ticket_word() {
    return reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + copiers_bytes(kCfg));
  }

  __device__ int own() const { return own_index<kRemote>(p); }

  // Rows that stay are read where they lie, and not from slots.
  __device__ bool is_whole() const { return p.sends && p.receives; }
  __device__ int num_owners() const { return kRanks - is_whole(); }
  __device__ bool is_pushed_to(int owner) const { return owner != p.rank || !is_whole(); }

  // Of selection token * kTopk + k of an owner of this domain, by its index in `slots`.
  __device__ char* slot(int owner, int selection) const {
    char* const half = half_of_slots(p, owner, waiter.epoch);
    return (kLines ? whole_lines(half) : half) + static_cast<int64_t>(selection) * kSlotBytes;
  }

  __device__ uint64_t* word(int owner, int selection, int part = 0) const {
    return half_of_words(p, owner, waiter.epoch) + selection * push_parts() + part;
  }

  __device__ int push_parts() const { return kTma || kRemote ? 1 : p.push_parts; }

  // Of the pieces of a row, shared by `num_parts` warps.
  static __device__ int part_pieces(int num_parts) {
    if constexpr (kLines) return ceil_div(kPieces, num_parts);
    return align_up(ceil_div(kPieces, num_parts), kWarpSize);
  }

  // The half of this operation: row r of x is put from place r.
  __device__ char* staging() const {
    const int half = waiter.epoch & 1;
    return p.staging + half * p.staging_half_bytes;
  }

  // ---- push -------------------------------------------------------------------------------------

  // Lane s has the number of tokens of owner s.
  __device__ void push(uint32_t unit, int tokens) {
    Copier copier(ptx::dynamic_shared(), warp, lane);
    const uint32_t owners = num_owners();
    const uint32_t parts = push_parts();
    const uint32_t num_units = __reduce_max_sync(kFullMask, tokens) * kGroups * parts * owners;
    while (unit < num_units) {
      const int owner = (p.rank + 1 + unit % owners) % kRanks, part = unit / owners % parts;
      const int group = unit / owners / parts, token = group / kGroups;
      uint64_t* written = nullptr;
      if (token < __shfl_sync(kFullMask, tokens, owner) && warp_may_send(waiter, owner))
        written = copy_group(copier, owner, token, group % kGroups * kRows, part);
      // The release hides its latency. Drawn before the copy, early warps would have two units where
      // others have none.
      const Draw next(p.counters + 1);
      // Rows are written -> copy_group -> release of any lane: cumulative. Lines need none.
      if (!kLines && written != nullptr) ptx::st_release_sys(written, stamp(waiter.epoch, 0));
      unit = next.unit();
    }
  }

  // A part of the rows of the selections first .. first + kRows - 1 of a token that are here. Lane i
  // gets the word that says so for selection first + i, or null.
  __device__ uint64_t* copy_group(Copier& copier, int owner, int token, int first, int part) const {
    // Lane i has selection first + i.
    const int64_t tokens_before = static_cast<int64_t>(owner) * p.max_tokens;
    const int selection = token * kTopk + first + lane;
    int row = -1;
    if (lane < kRows && first + lane < kTopk)
      row = p.source_rows[tokens_before * kTopk + selection];
    const bool has_row = row >= 0;
    if (!__any_sync(kFullMask, has_row)) return nullptr;
    const char* const src = has_row ? p.x + static_cast<int64_t>(row) * kRowBytes : nullptr;
    char* const dst = has_row ? slot(owner, selection) : nullptr;
    copy_rows(copier, src, dst, part);
    return has_row ? word(owner, selection, part) : nullptr;
  }

  // Lane i < kRows has row i, or null; all lanes may publish what is written.
  __device__ void copy_rows(Copier& copier, const char* src, char* dst, int part) const {
    if constexpr (kTma) {
      copier.load(0, src);
      copier.store(0, dst);
    } else {
      const int pieces = part_pieces(push_parts()), begin = part * pieces;
      const int end = min(kPieces, begin + pieces);
      for (int i = 0; i < kRows; ++i) {
        const char* const from = of_lane(src, i);
        if (from != nullptr) copy_pieces(from, of_lane(dst, i), begin, end);
      }
    }
    // Each lane its own, then __syncwarp.
    copier.flush();
  }

  // ---- push between domains ---------------------------------------------------------------------

  // `tokens`: the most that any owner has.
  __device__ void push_between(uint32_t unit, int tokens) {
    Copier copier(ptx::dynamic_shared(), warp, lane);
    const uint32_t owners = num_owners();
    const uint32_t num_units = ceil_div(tokens * kTopk, kChunk) * owners;
    while (unit < num_units) {
      const Draw next(p.counters + 1);
      const int owner = (p.rank + 1 + unit % owners) % kRanks;
      const int first = unit / owners * kChunk;
      // Lane i has the row of selection first + i.
      int row = -1;
      if (lane < kChunk && first + lane < p.source_tokens[owner] * kTopk)
        row = p.source_rows[static_cast<int64_t>(owner) * p.max_tokens * kTopk + first + lane];
      if (!warp_may_send(waiter, owner)) row = -1;
      const int index = p.peers[owner];
      for (uint32_t left = __ballot_sync(kFullMask, row >= 0); left != 0;) {
        // Now lane i has the i-th of them.
        const int num_rows = min(__popc(left), kRows);
        uint32_t mine = left;
        for (int i = 0; i < lane && i < num_rows; ++i) mine &= mine - 1;
        for (int i = 0; i < num_rows; ++i) left &= left - 1;
        const int i = max(__ffs(mine) - 1, 0);
        push_rows_between(copier, index, first + i, __shfl_sync(kFullMask, row, i), num_rows);
      }
      unit = next.unit();
    }
  }

  // Lane i < num_rows has a selection of an owner and its row.
  __device__ void push_rows_between(Copier& copier, int index, int selection, int row,
                                    int num_rows) const {
    const bool has_row = lane < num_rows;
    const char* const src = has_row ? p.x + static_cast<int64_t>(row) * kRowBytes : nullptr;
    char* dst = nullptr;
    if (has_row)
      dst =
          index >= 0 ? slot(index, selection) : staging() + static_cast<int64_t>(row) * kSlotBytes;
    copy_rows(copier, src, dst, 0);
    if (index >= 0) {
      if (has_row) ptx::st_release_sys(word(index, selection), stamp(waiter.epoch, 0));
      return;
    }
    for (int i = 0; i < num_rows; ++i) {
      const int each = __shfl_sync(kFullMask, selection, i);
      put_with_word(p.transport, slot(own(), each), of_lane(dst, i), kSlotBytes, word(own(), each),
                    stamp(waiter.epoch, 0), index);
    }
  }

  // Pieces begin .. end - 1 of a row, by all lanes.
  __device__ void copy_pieces(const char* src, char* dst, int begin, int end) const {
    if constexpr (kLines) {
      constexpr int kBatch = 8;
      for (int first = begin; first < end; first += kBatch) {
        Unit units[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          units[i].v = ptx::ld_v4(Unit::in_row(src, min(first + i, end - 1), lane));
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i >= end) break;
          units[i].take_half(lane);
          units[i].send(dst, first + i, waiter.epoch, lane);
        }
      }
    } else if constexpr (kCfg.logfmt) {
      encode_items(src, dst, begin, end);
    } else {
      for (int at = begin * 16; at < end * 16; at += kPieceBytes<8>)
        copy_piece<8>(dst + at, src + at, end * 16 - at, lane);
    }
  }

  // ---- the log format ---------------------------------------------------------------------------

  __device__ void encode_items(const char* src, char* dst, int begin, int end) const {
    uint32_t* const words = reinterpret_cast<uint32_t*>(dst);
    for (int first = begin; first < end; first += kWarpSize) {
      const int item = first + lane;
      const LogItem code = load_encoded(src, item, item < end);
      if (item >= end) continue;
#pragma unroll
      for (int j = 0; j < kLogWords; ++j) words[j * kPieces + item] = code.words[j];
      constexpr int kLanes = kLogBlock / kCastElements;
      if (item % kLanes == 0) words[kLogWords * kPieces + item / kLanes] = code.range;
    }
  }

  // 16 channels of a row in the log format; all lanes take part.
  __device__ static LogItem load_encoded(const char* src, int item, bool valid) {
    Vec16 pieces[2] = {};
    if (valid) {
      pieces[0] = ptx::ld_v4(src + item * 32);
      pieces[1] = ptx::ld_v4(src + item * 32 + 16);
    }
    return log_encode(pieces);
  }

  // ---- reduce -----------------------------------------------------------------------------------

  // False: leave. Of the blocks that stay one warp meets the peers.
  __device__ bool goes_on() const {
    if (!is_staying(p)) return meet_peers<kRanks>(leaving(waiter), nullptr, lane);
    const bool is_herald = blockIdx.x == 0 && warp == kCfg.num_warps - 1;
    return !is_herald || meet_peers<kRanks>(waiter, p.wait_cost, lane);
  }

  __device__ void reduce() {
    const uint32_t num_units = static_cast<uint32_t>(p.num_tokens) * p.num_parts;
    uint32_t unit = Draw(p.counters + 2).unit();
    while (unit < num_units) {
      const Draw next(p.counters + 2);
      const int token = unit / p.num_parts, part = unit % p.num_parts;
      const auto draw_on = [&] {
        unit = next.unit();
        if (unit >= num_units) ticket.take(waiter.epoch);
      };
      if (!reduce_token(token, part, draw_on)) return;
    }
  }

  // draw_on() is called when the warp has nothing to do but to wait.
  template <typename DrawOn>
  __device__ bool reduce_token(int token, int part, DrawOn draw_on) const {
    const int begin = part * part_pieces(p.num_parts);
    const int end = min(kPieces, begin + part_pieces(p.num_parts));
    // Lane k has selection k.
    bool ok = true, is_own = false, is_remote = false;
    const char* row = nullptr;
    float weight = 0.0f;
    int e = -1;
    int64_t stays = -1;
    const int selection = token * kTopk + lane;
    if (lane < kTopk) {
      e = load_choice<kCfg.topk_is_int64>(p.topk_idx, selection, kExperts);
      weight = p.topk_weights[selection];
      if (e >= 0 && e / kExpertsARank == p.rank && has_own_token<kCfg.shrink>(p, waiter, token))
        stays = p.source_rows[static_cast<int64_t>(p.rank) * p.max_tokens * kTopk + selection];
    }
    draw_on();
    if (lane < kTopk) {
      const int peer = e / kExpertsARank;
      is_own = is_whole() && stays >= 0;
      if (stays == -2) {  // of other ranks such a row does not come
        report_at_once(waiter, kRoomLowLatencyCombineSlab, selection);
        ok = false;
      } else if (is_own) {
        row = p.x + stays * kRowBytes;
      } else if (e >= 0 && !is_masked(waiter, peer) && (peer != p.rank || stays >= 0)) {
        const bool here = wait_for_row(peer, selection, begin, end);
        if (here) row = slot(own(), selection);
        if constexpr (kRemote) is_remote = here && p.peers[peer] < 0;
        ok = here || is_masked(waiter, peer);
      }
    }
    if (!all_lanes(ok)) return false;
    if constexpr (kRemote)
      if (__any_sync(kFullMask, is_remote)) warp_received(p.transport, lane);
    char* const out = p.out + static_cast<int64_t>(token) * kRowBytes;
    if constexpr (kLines)
      return sum_lines(row, __ballot_sync(kFullMask, is_own), e / kExpertsARank, selection, weight,
                       out, begin, end);
    else if constexpr (kCfg.logfmt)
      sum_log(row, __ballot_sync(kFullMask, is_own), weight, out, begin, end);
    else
      sum_rows(row, weight, out, begin, end);
    return true;
  }

  // Waits for the words of pieces begin .. end - 1. Of lines, when there are many rows, for one flag of
  // the row, or else every warp would read all of its rows again and again while they come.
  __device__ bool wait_for_row(int peer, int selection, int begin, int end) const {
    if constexpr (kLines) {
      if (push_parts() > 1 || begin >= end) return true;
      const uint64_t flag = line_flag(waiter.epoch);
      uint64_t seen;
      return wait_until(waiter, kWaitLowLatencyCombineRow, peer, selection, flag,
                        last_flag(slot(own(), selection), end - 1), seen,
                        [&](uint64_t value) { return value == flag; });
    }
    const int pieces = part_pieces(push_parts());
    for (int part = begin / pieces; part * pieces < end; ++part) {
      uint64_t seen;
      if (!wait_stamp(waiter, kWaitLowLatencyCombineRow, peer, selection,
                      word(own(), selection, part), seen))
        return false;
    }
    return true;
  }

  __device__ void sum_rows(const char* row, float weight, char* out, int begin, int end) const {
    const uint32_t rows = __ballot_sync(kFullMask, row != nullptr);
    for (int first = begin; first < end; first += kWarpSize) {
      const int vec = first + lane;
      const Vec16 sum = weighted_sum<8>(row, weight, rows, vec, vec < end);
      if (vec < end) ptx::st_v4(out + vec * 16, sum);
    }
  }

  // Looks at units begin .. end - 1 of each row and adds them. Lane k has row k, its selection and weight,
  // and the rank that it comes from; `own`: bit k: row k is one of this rank, and not in lines. False: leave.
  __device__ bool sum_lines(const char* row, uint32_t own, int peer, int selection, float weight,
                            char* out, int begin, int end) const {
    constexpr int kBatch = 8;
    const uint32_t rows = __ballot_sync(kFullMask, row != nullptr);
    for (int unit = begin; unit < end; ++unit) {
      float sum[8] = {};
      for (uint32_t left = rows, next; left != 0; left = next) {
        // Places of the next rows; where there are fewer, of the last one again, so that nothing branches.
        const char* places[kBatch];
        next = left;
        int k = 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (next != 0) k = __ffs(next) - 1;
          next &= next - 1;
          const char* const src = of_lane(row, k);
          places[i] =
              (own >> k & 1) != 0 ? Unit::in_row(src, unit, lane) : Unit::in_lines(src, unit, lane);
        }
        Unit units[kBatch];
        const auto look_at = [&] {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) units[i].look(places[i]);
          uint32_t missing = 0, rest = left;
          int k = 0;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            if (rest != 0) k = __ffs(rest) - 1;
            rest &= rest - 1;
            missing |= units[i].is_here(waiter.epoch, lane) ? 0 : 1u << k;
          }
          return missing & ~own;
        };
        if (!warp_wait(waiter, kWaitLowLatencyCombineRow, peer, selection, look_at)) return false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (left == next) break;
          k = __ffs(left) - 1;
          left &= left - 1;
          if ((own >> k & 1) != 0) units[i].take_half(lane);
          add_weighted(sum, __shfl_sync(kFullMask, weight, k), units[i].v);
        }
      }
      Unit{to_bf16(sum)}.store(out, unit, lane);
    }
    return true;
  }

  // `own`: bit k: row k is one of this rank, which nobody has encoded yet.
  __device__ void sum_log(const char* row, uint32_t own, float weight, char* out, int begin,
                          int end) const {
    for (int first = begin; first < end; first += kWarpSize) {
      const int item = first + lane;
      float total[2][8] = {};
      for (int k = 0; k < kTopk; ++k) {
        const float w = __shfl_sync(kFullMask, weight, k);
        const char* const src = of_lane(row, k);
        if (src == nullptr) continue;
        LogItem code{};
        if ((own >> k & 1) != 0) {
          code = load_encoded(src, item, item < end);
        } else if (item < end) {
          const auto words = reinterpret_cast<const uint32_t*>(src);
#pragma unroll
          for (int j = 0; j < kLogWords; ++j) code.words[j] = words[j * kPieces + item];
          code.range = words[kLogWords * kPieces + item / (kLogBlock / kCastElements)];
        }
        const LogRange range = log_range(code.range);
#pragma unroll
        for (int i = 0; i < kCastElements; ++i)
          add_weighted(total[i / 8][i % 8], w, log_decode(code.words, i, range));
      }
      if (item >= end) continue;
      ptx::st_v4(out + item * 32, to_bf16(total[0]));
      ptx::st_v4(out + item * 32 + 16, to_bf16(total[1]));
    }
  }

  const LowLatencyCombineParams& p;
  const int warp, lane;
  const Waiter waiter;
  Ticket ticket;
};

template <LowLatencyCombineConfig kCfg>
__device__ void low_latency_combine(const LowLatencyCombineParams& p) {
  LowLatencyCombine<kCfg>::prepare();
  ptx::griddepcontrol_wait();
  LowLatencyCombine<kCfg>(p).run();
}

}  // namespace epjit

// Combine inside one NVLink domain: the rows that a dispatch spread come back and are summed, token
// by token.
//
//   combined_x[t] = round(bias_0[t] + bias_1[t] + sum over ranks r of x_r[row of t on r])
//   combined_topk_weights[t, k] = sum over ranks r of topk_weights_r[row of t on r, k]
//
// over r in ascending order, in fp32, with one rounding at the end; the sum starts from bias_0, or
// from +0.0. No weight is applied to x. With `choice_bits` the ranks of x come in another order (DeepEP
// 2's): by the last choice that the token has on each, as the owner's topk_idx says.
//
// The rank that holds an expert's output pushes each row to the rank that owns the token; the owner
// adds. A row crosses NVLink once and is written once; the owner reads it from its own memory. Own
// rows are read where they lie. A position behind the segment of its source in rank_prefix is a row
// that its rank had no room for: it is left out of the sum.
//
// With by_expert x are rows by expert, and the row of t on r is the sum of the rows that row_of names
// for it: in fp32, in the order of k, each multiplied with its weight if there are row_weights,
// rounded once. It is summed while it is read (with tma by bulk copies through shared memory, those
// of peers in the slots too: slices.cuh), and pushed by 16-byte stores. topk_weights are one a row
// then; what comes back for selection k is that of its row.
//
//   slots[s]  [num_ranks, num_slots, slot_bytes]  of owner s; row (r, .) is written by r. Token t
//             lies in slot t % num_slots: { row [hidden_bytes], topk_weights [num_topk] f32 }
//   words[s]  [num_ranks, num_slots]              row (r, .) is written by r, after the row
//
// Push    the first warps of a block: wait until the owner's slots are free; x -> slots; then the
//         words (release)
// Reduce  the other warps, and all when there is nothing to push: wait for a token's words
//         (acquire), add its rows
//
// Progress: a warp that pushes draws units (runs of rows) of one owner in ascending order of its
// tokens and goes to another owner only when none is left, so a channel (r -> s) never waits for
// another one. The push into window w waits for the owner's reduction of window w - 2 and for
// nothing later; the reduction of w - 2 waits for pushes into w - 2 only (and is counted after that
// of w - 4: a token without rows from peers could otherwise be done long before). By induction
// everything moves, whatever the size of the buffer. Rows of one unit that lie in several windows
// go one window at a time.
//
// Launch: any grid that is resident as a whole and has a pushing warp for each peer,
// combine_threads() threads. Graph-safe.
#include "epjit/slices.cuh"
#include "epjit/sum.cuh"
#include "epjit/topk.cuh"
#include "epjit/windows.cuh"

namespace epjit {

struct CombineConfig {
  int32_t num_ranks;
  int32_t hidden_bytes;  // of a row
  int32_t num_topk;      // 0 = no weights
  bool is_f16;           // else bf16
  bool tma;              // rows are pushed by bulk copies, else through registers; by_expert: read
  int32_t num_warps;
  int32_t num_push_warps;  // of num_warps
  int32_t rows_per_warp;   // of a pushing warp in shared memory; by_expert: slices, of each warp
  int32_t choice_bits;     // width of topk_idx, which orders the ranks; 0 = they are ascending
  bool by_expert;          // rows by expert; num_topk is not 0
  bool is_weighted;        // by_expert: rows are multiplied with row_weights
  bool has_weights;        // by_expert: topk_weights go back
  int32_t slice_bytes;     // by_expert with tma: that a warp reads of a row at a time
};

struct CombineParams : Operation {
  const char* x;                 // [num_rows, hidden], num_rows >= rank_prefix[num_ranks - 1, rank]
  const float* topk_weights;     // [as x, num_topk]; by_expert [num_expert_rows]
  const char* bias_0;            // [num_tokens, hidden] or null
  const char* bias_1;            // [num_tokens, hidden] or null
  const int32_t* recv_src_idx;   // [as x]: token of the owner
  const int32_t* send_head;      // [num_tokens, num_ranks]: position in r's segment, -1 = none
  const int32_t* rank_prefix;    // [num_ranks, num_ranks]: inclusive over sources (rows)
  const void* topk_idx;          // [num_tokens, num_choices], with choice_bits
  char* combined_x;              // [num_tokens, hidden]
  float* combined_topk_weights;  // [num_tokens, num_topk]
  uint64_t slots[kMaxRanks];     // symmetric, of each rank
  uint64_t words[kMaxRanks];     // symmetric, of each rank
  const int32_t* row_of;         // [num_rows, num_topk]: rows of x, none outside; by_expert
  int64_t row_of_stride;         // of its rows, in elements; by_expert
  const float* row_weights;      // [num_expert_rows]; by_expert
  // own [4 + num_ranks]: ticket, next reduce unit, units reduced of (window & 1), next push
  // units; zero on entry and on exit
  uint32_t* counters;
  int32_t num_slots;        // even, at least 2
  int32_t num_rows;         // nothing beyond is read, whatever rank_prefix and send_head say
  int32_t num_expert_rows;  // of x; by_expert
  int32_t num_tokens;
  int32_t num_parts;  // warps that share the sum of one token
  int32_t rank;
  int32_t num_choices;  // of a token, at most 32
  int32_t experts_per_rank;
};

constexpr int combine_threads(CombineConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int combine_shared_bytes(CombineConfig cfg) {
  if (cfg.by_expert)
    return cfg.tma ? slices_shared_bytes(cfg.num_warps, cfg.rows_per_warp, cfg.slice_bytes) : 0;
  return copier_shared_bytes(cfg.tma, cfg.num_push_warps, cfg.rows_per_warp, cfg.hidden_bytes);
}

// Weights that go back with a row.
constexpr int combine_weights(CombineConfig cfg) {
  return cfg.by_expert && !cfg.has_weights ? 0 : cfg.num_topk;
}

constexpr int combine_slot_bytes(CombineConfig cfg) {
  return align_up(cfg.hidden_bytes + 4 * combine_weights(cfg), 128);
}

template <CombineConfig kCfg>
class Combine {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kTopk = combine_weights(kCfg);
  static constexpr bool kByExpert = kCfg.by_expert;
  static constexpr bool kSliced = kByExpert && kCfg.tma;
  static constexpr int kRows = kByExpert ? 2 : kCfg.rows_per_warp;  // that a warp publishes at once
  static constexpr int kRowBatch = 4;  // rows by expert that are read at once
  static constexpr int kSlotBytes = combine_slot_bytes(kCfg);
  static constexpr int kVecs = kCfg.hidden_bytes / 16;
  static constexpr int kSlices = kSliced ? ceil_div(kCfg.hidden_bytes, kCfg.slice_bytes) : 0;
  static_assert(kRanks >= 1 && kRanks <= kMaxRanks);
  static_assert(kTopk >= 0 && kCfg.num_topk <= kMaxTopk);
  static_assert(!kByExpert || kCfg.num_topk > 0);
  static_assert(!kSliced || kCfg.slice_bytes % (16 * kWarpSize) == 0,
                "all lanes have a part of it");
  static_assert(!kSliced || kCfg.rows_per_warp >= kCfg.num_topk + kRanks - 1,
                "a token has so many rows here and in slots");
  static_assert(kCfg.num_push_warps >= 1 && kCfg.num_push_warps < kCfg.num_warps,
                "someone must reduce from the start");
  using Copier = RowCopier<kCfg.tma && !kByExpert, kCfg.num_push_warps, kRows, kCfg.hidden_bytes>;
  // Pieces of 16 bytes that a lane has of a sum at a time, when rows are pushed and when they are
  // reduced: those of a slice, else so many that up to eight loads are in flight.
  static constexpr int kSliceUnroll = kCfg.slice_bytes / (16 * kWarpSize);
  static constexpr int kPushUnroll = kSliced ? kSliceUnroll : 2;
  static constexpr int kReduceUnroll = kSliced                   ? kSliceUnroll
                                       : kByExpert && kRanks < 4 ? 2
                                                                 : 8 / kRanks;
  using Ring =
      SliceRing<kSliced, kCfg.num_warps, kCfg.rows_per_warp, kCfg.slice_bytes, kCfg.hidden_bytes>;

 public:
  __device__ Combine(const CombineParams& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        waiter(start_operation<kRanks>(p, kWaitCombineStart)),
        ring(ptx::dynamic_shared(), warp, lane) {}

  __device__ void run() {
    // What an operation that failed was to write (rank_prefix, recv_src_idx) is garbage.
    bool ok = __all_sync(kFullMask, ptx::ld_relaxed_gpu(p.abort) == 0);
    if constexpr (kRanks > 1)
      if (ok && warp < kCfg.num_push_warps) ok = push();
    if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1 && ok)
      report_overflow(p, waiter.epoch, kRoomCombineRows, p.num_rows, segment_start(kRanks, p.rank));
    if (ok) reduce();
    if constexpr (kSliced) ring.drain();
    finish_operation<kRanks>(p, waiter, 4 + kRanks);
  }

 private:
  __device__ int window_of(int token) const { return token / (p.num_slots / 2); }

  // Slot that rank `writer` puts the row of the owner's token into.
  __device__ char* slot(int owner, int writer, int token) const {
    const int64_t i = static_cast<int64_t>(writer) * p.num_slots + token % p.num_slots;
    return reinterpret_cast<char*>(p.slots[owner]) + i * kSlotBytes;
  }

  __device__ uint64_t* word(int owner, int writer, int token) const {
    return word_address(p.words[owner], writer, p.num_slots, token);
  }

  // Rows of the tokens of `source` on `rank`.
  __device__ int segment_rows(int source, int rank) const {
    return segment_start(source + 1, rank) - segment_start(source, rank);
  }

  // First row on `rank` of the tokens of `source`.
  __device__ int segment_start(int source, int rank) const {
    return source == 0 ? 0 : p.rank_prefix[(source - 1) * kRanks + rank];
  }

  // The same on this rank, among the rows that there are.
  __device__ int row_start(int source) const {
    return min(max(segment_start(source, p.rank), 0), p.num_rows);
  }

  // ---- push -------------------------------------------------------------------------------------

  __device__ bool push() {
    if (!enter<kRanks>(waiter, kWaitCombineEntry, lane)) return false;
    Copier copier(ptx::dynamic_shared(), warp, lane);
    copier.acquired();
    const int num_warps = gridDim.x * kCfg.num_push_warps;
    const int unit_rows = rows_at_a_time<kRows>(segment_start(kRanks, p.rank), num_warps, kRows);
    const int first_owner = (blockIdx.x * kCfg.num_push_warps + warp) % (kRanks - 1);
    for (int i = 0; i < kRanks - 1; ++i) {
      const int owner = (p.rank + 1 + (first_owner + i) % (kRanks - 1)) % kRanks;
      const int begin = row_start(owner), end = row_start(owner + 1);
      const uint32_t num_units = ceil_div(max(end - begin, 0), unit_rows);
      uint32_t* const counter = p.counters + 4 + owner;
      if constexpr (kByExpert) {
        if (!push_sums(owner, begin, end, unit_rows, counter)) return false;
        continue;
      }
      uint32_t unit = Draw(counter).unit();
      while (unit < num_units) {
        // Drawn early: its latency hides behind the copy.
        const Draw next(counter);
        const int first = begin + static_cast<int>(unit) * unit_rows;
        if (!push_rows(copier, owner, first, min(unit_rows, end - first))) return false;
        unit = next.unit();
      }
    }
    return true;
  }

  __device__ bool push_rows(Copier& copier, int owner, int first, int num_rows) {
    const int token = lane < num_rows ? max(p.recv_src_idx[first + lane], 0) : 0;
    return epjit::push_rows<kCfg.hidden_bytes, kTopk>(
        p, waiter.epoch, copier, first, num_rows, token,
        [&](int window) { return wait_slots(owner, window); },
        [&](int token) { return slot(owner, p.rank, token); },
        [&](int token) { return word(owner, p.rank, token); });
  }

  __device__ bool wait_slots(int owner, int window) const {
    return window < 2 || wait_window(waiter, kWaitCombineWindow, owner, window);
  }

  // Rows by expert of one token, lane k that of selection k.
  struct ExpertRows {
    const char* row = nullptr;
    float weight = 0.0f;  // that it is multiplied with
    float back = 0.0f;    // that goes back
    uint32_t chosen = 0;  // bit k: selection k has a row
  };

  // Row of x of this lane's selection of row `row` in the order of the sources, -1: none, as where that
  // is negative.
  __device__ int selected(int64_t row) const {
    return row >= 0 && lane < kCfg.num_topk ? p.row_of[row * p.row_of_stride + lane] : -1;
  }

  // The rows that the lanes have selected.
  __device__ ExpertRows expert_rows(int at) const {
    ExpertRows found;
    const bool exists = static_cast<uint32_t>(at) < static_cast<uint32_t>(p.num_expert_rows);
    if (exists) {
      found.row = p.x + static_cast<int64_t>(at) * kCfg.hidden_bytes;
      if constexpr (kCfg.is_weighted) found.weight = p.row_weights[at];
      if constexpr (kTopk > 0) found.back = p.topk_weights[at];
    }
    found.chosen = __ballot_sync(kFullMask, exists);
    return found;
  }

  // Adds the pieces from `vec` on, below `last`, of a token's rows here. `slice`: of the first of these
  // in shared memory, behind which it then points.
  template <int kBatch, int kUnroll>
  __device__ void add_expert_rows(Sum8<kCfg.is_f16> (&sums)[kUnroll], const ExpertRows& rows,
                                  int vec, int last, const char*& slice) const {
    if constexpr (kSliced) {
      const auto valid = [&](int i) { return is_piece(vec + i * kWarpSize, last); };
      const auto load = [&](Vec16(&v)[kUnroll], int) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
          if (valid(i)) v[i] = shared_piece(slice, i);
        slice += kCfg.slice_bytes;
      };
      add_rows<kBatch, kCfg.is_weighted>(sums, rows.weight, rows.chosen, valid, load);
    } else {
      add_rows<kBatch, kCfg.is_weighted>(sums, rows.row, rows.weight, rows.chosen, vec, last);
    }
  }

  // Whether the lane that asks for piece `vec`, of a row or of a part that ends with `last`, has one.
  __device__ static bool is_piece(int vec, int last) {
    if constexpr (kSliced && kCfg.hidden_bytes % (kSliced ? kCfg.slice_bytes : 1) == 0) return true;
    return vec < last;
  }

  // Of this lane, number i in a slice.
  __device__ Vec16 shared_piece(const char* slice, int i) const {
    return *reinterpret_cast<const Vec16*>(slice + (lane + i * kWarpSize) * 16);
  }

  // Pushes rows begin .. end - 1, which are sums, to their owner. What a row is the sum of is looked up
  // while the one before is summed, and its first slices are on their way before the rows behind it are
  // published: a release waits for everything that this warp has stored. Rows of a unit that lie in
  // several windows are published a window at a time.
  __device__ bool push_sums(int owner, int begin, int end, int unit_rows, uint32_t* counter) {
    const uint32_t num_units = ceil_div(max(end - begin, 0), unit_rows);
    const auto first_row = [&](uint32_t unit) {
      return unit < num_units ? begin + static_cast<int>(unit) * unit_rows : -1;
    };
    int row = first_row(Draw(counter).unit());
    ExpertRows rows = expert_rows(selected(row));
    if constexpr (kSliced) ring.start(rows.row, nullptr, 0, row >= 0 ? kSlices : 0);
    while (row >= 0) {
      const Draw next(counter);
      const int num_rows = min(unit_rows, end - row);
      const int token = lane < num_rows ? max(p.recv_src_idx[row + lane], 0) : 0;
      const int window = window_of(token);
      int here = -1;         // window whose slots are free
      uint32_t written = 0;  // lanes whose rows are in their slots, not published
      int following = -1;
      for (int i = 0; i < num_rows; ++i) {
        const int row_window = __shfl_sync(kFullMask, window, i);
        if (row_window != here) {
          publish(owner, token, written);
          written = 0, here = row_window;
          if (!all_lanes(lane != 0 || wait_slots(owner, here))) return false;
        }
        following = i + 1 < num_rows ? row + i + 1 : first_row(next.unit());
        const int at = selected(following);
        push_sum(slot(owner, p.rank, __shfl_sync(kFullMask, token, i)), rows);
        written |= 1u << i;
        rows = expert_rows(at);
        if constexpr (kSliced) ring.start(rows.row, nullptr, 0, following >= 0 ? kSlices : 0);
      }
      publish(owner, token, written);
      row = following;
    }
    return true;
  }

  __device__ void push_sum(char* to, const ExpertRows& rows) {
#pragma unroll 1
    for (int vec = lane; vec - lane < kVecs; vec += kPushUnroll * kWarpSize) {
      Sum8<kCfg.is_f16> sums[kPushUnroll];
      const char* slice = nullptr;
      if constexpr (kSliced) slice = ring.wait();
      add_expert_rows<kRowBatch>(sums, rows, vec, kVecs, slice);
      if constexpr (kSliced) ring.leave();
#pragma unroll
      for (int i = 0; i < kPushUnroll; ++i)
        if (is_piece(vec + i * kWarpSize, kVecs))
          ptx::st_v4(to + (vec + i * kWarpSize) * 16, sums[i].rounded());
    }
    if constexpr (kTopk > 0)
      if (lane < kTopk) slot_weights(to)[lane] = rows.back;
  }

  // The tokens of these lanes are in their slots.
  __device__ void publish(int owner, int token, uint32_t lanes) const {
    __syncwarp();  // all lanes have stored; the release is cumulative
    if ((lanes >> lane & 1) != 0)
      ptx::st_release_sys(word(owner, p.rank, token), make_word(waiter.epoch, window_of(token), 0));
  }

  __device__ static float* slot_weights(char* slot) {
    return reinterpret_cast<float*>(slot + kCfg.hidden_bytes);
  }

  // ---- reduce -----------------------------------------------------------------------------------

  __device__ void reduce() {
    const uint32_t num_units = static_cast<uint32_t>(p.num_tokens) * p.num_parts;
    // Lane r has the rows of this rank's tokens on rank r.
    const uint32_t num_rows = lane < kRanks ? max(segment_rows(p.rank, lane), 0) : 0;
    uint32_t unit = Draw(p.counters + 1).unit();
    while (unit < num_units) {
      const Draw next(p.counters + 1);
      const int token = unit / p.num_parts;
      if (!reduce_token(token, unit % p.num_parts, num_rows)) return;
      if (p.num_tokens > p.num_slots && !release_slots(token)) return;
      unit = next.unit();
    }
  }

  __device__ bool reduce_token(int token, int part, uint32_t num_rows) {
    // Lane r has the row on rank r, if it is one of num_rows there.
    bool ok = true, is_waited_for = false;
    const char* row = nullptr;
    const float* weights = nullptr;
    int own_row_at = -1;  // by expert, in lane `rank`
    if (lane < kRanks) {
      const int position = p.send_head[static_cast<int64_t>(token) * kRanks + lane];
      const bool has_row = static_cast<uint32_t>(position) < num_rows;  // not -1 either
      if (has_row && lane == p.rank) {
        const int64_t own_row = row_start(p.rank) + static_cast<int64_t>(position);
        if (kByExpert && own_row < p.num_rows) {
          own_row_at = static_cast<int>(own_row);
        } else if (own_row < p.num_rows) {
          row = p.x + own_row * kCfg.hidden_bytes;
          if constexpr (kTopk > 0) weights = p.topk_weights + own_row * kTopk;
        }
      } else if (has_row) {
        is_waited_for = true;
        if constexpr (!kSliced) ok = wait_token(lane, token);
        row = slot(p.rank, lane, token);
        if constexpr (kTopk > 0) weights = slot_weights(slot(p.rank, lane, token));
      }
    }
    if (!all_lanes(ok)) return false;

    ExpertRows own;
    bool has_own = false;
    if constexpr (kByExpert) {
      own_row_at = __shfl_sync(kFullMask, own_row_at, p.rank);
      own = expert_rows(selected(own_row_at));
      has_own = own_row_at >= 0;
    }
    const char* rows[kRanks];
    int own_turn = p.rank;
    if constexpr (kCfg.choice_bits > 0) {
      const int turn = rank_of_turn(token);
      row = of_lane(row, turn);
      own_turn = __ffs(__ballot_sync(kFullMask, turn == p.rank)) - 1;
    }
#pragma unroll
    for (int r = 0; r < kRanks; ++r) rows[r] = of_lane(row, r);
    const int64_t out = static_cast<int64_t>(token) * kCfg.hidden_bytes;

    constexpr int kUnroll = kReduceUnroll;
    constexpr int kOwnBatch = kRanks > 2 ? 2 : kRowBatch;  // more would spill
    // With slices all parts but the last one consist of whole ones.
    const int part_vecs =
        align_up(ceil_div(kVecs, p.num_parts), (kSliced ? kUnroll : 1) * kWarpSize);
    const int last = min(kVecs, (part + 1) * part_vecs);
    if constexpr (kSliced) {
      // The own rows are on their way while the others are waited for. Slots may be read whatever comes
      // of that: what was started must end.
      ring.start(own.row, row, part * part_vecs / (kUnroll * kWarpSize),
                 ceil_div(last, kUnroll * kWarpSize));
      ok = all_lanes(!is_waited_for || wait_token(lane, token));
      ptx::fence_proxy_async();
      ring.start_later();
      if (!ok) return false;
    }
#pragma unroll 1
    for (int first = part * part_vecs + lane; (kByExpert ? first - lane : first) < last;
         first += kUnroll * kWarpSize) {
      Vec16 own_sums[kUnroll];
      const char* slice = nullptr;
      if constexpr (kSliced) slice = ring.wait();
      if constexpr (kByExpert)
        if (has_own) {
          Sum8<kCfg.is_f16> sums[kUnroll];
          add_expert_rows<kOwnBatch>(sums, own, first, last, slice);
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) own_sums[i] = sums[i].rounded();
        }
      Vec16 v[kUnroll][kRanks];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const char* of_rank = slice;
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          if (rows[r] == nullptr) continue;
          if (is_piece(first + i * kWarpSize, last)) {
            if constexpr (kSliced)
              v[i][r] = shared_piece(of_rank, i);
            else
              v[i][r] = ptx::ld_v4(rows[r] + (first + i * kWarpSize) * 16);
          }
          of_rank += kCfg.slice_bytes;
        }
      }
      if constexpr (kSliced) ring.leave();
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int offset = (first + i * kWarpSize) * 16;
        if (!is_piece(first + i * kWarpSize, last)) continue;
        Sum8<kCfg.is_f16> sum;
        if (p.bias_0 != nullptr) sum.start(ptx::ld_v4(p.bias_0 + out + offset));
        if (p.bias_1 != nullptr) sum.add(ptx::ld_v4(p.bias_1 + out + offset));
#pragma unroll
        for (int r = 0; r < kRanks; ++r)
          if (rows[r] != nullptr)
            sum.add(v[i][r]);
          else if (kByExpert && has_own && r == own_turn)
            sum.add(own_sums[i]);
        ptx::st_v4(p.combined_x + out + offset, sum.rounded());
      }
    }

    if constexpr (kTopk > 0) {
      if (part == 0) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          const float* const of_rank = of_lane(weights, r);
          if (of_rank != nullptr && lane < kTopk) sum += of_rank[lane];
          if (kByExpert && r == p.rank) sum += own.back;
        }
        if (lane < kTopk) p.combined_topk_weights[static_cast<int64_t>(token) * kTopk + lane] = sum;
      }
    }
    return true;
  }

  __device__ bool wait_token(int writer, int token) const {
    uint64_t found;
    return wait_word(waiter, kWaitCombineToken, writer, token, window_of(token),
                     word(p.rank, writer, token), found);
  }

  // Lane i has the rank that is added as number i; behind the last one a lane that has no row.
  __device__ int rank_of_turn(int token) const {
    const int64_t choice = static_cast<int64_t>(token) * p.num_choices + lane;
    const int expert = lane < p.num_choices ? load_choice<kCfg.choice_bits == 64>(
                                                  p.topk_idx, choice, kRanks * p.experts_per_rank)
                                            : -1;
    const int rank = expert < 0 ? kRanks : expert / p.experts_per_rank;
    uint32_t last = 0;  // lanes whose choice is the last one of its rank
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const uint32_t of_rank = __ballot_sync(kFullMask, rank == r);
      if (of_rank != 0) last |= 1u << (kWarpSize - 1 - __clz(of_rank));
    }
    int turn = kRanks;
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const int of_turn = __shfl_sync(kFullMask, rank, __ffs(last) - 1);
      if (lane == i && last != 0) turn = of_turn;
      last &= last - 1;
    }
    return turn;
  }

  __device__ bool release_slots(int token) const {
    __syncwarp();
    const int window = window_of(token), window_tokens = p.num_slots / 2;
    bool ok = true;
    if (window >= 2 && lane == 0) ok = wait_window(waiter, kWaitCombineWindow, p.rank, window);
    if (!all_lanes(ok)) return false;
    const int units = min(window_tokens, p.num_tokens - window * window_tokens) * p.num_parts;
    release_unit<kRanks>(p.counters + 2 + (window & 1), units, p.rank,
                         [&](int rank) { signal_window(waiter, p.signals[rank], window); });
    return true;
  }

  const CombineParams& p;
  const int warp, lane;
  const Waiter waiter;
  Ring ring;
};

template <CombineConfig kCfg>
__device__ void combine(const CombineParams& p) {
  ptx::griddepcontrol_wait();
  Combine<kCfg>(p).run();
}

}  // namespace epjit

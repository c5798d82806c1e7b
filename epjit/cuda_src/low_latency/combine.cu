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
//   words[s]  two halves [max_tokens, num_topk] u64, by the same rank, after the slot: stamp(epoch,
//             0), or stamp(epoch, 1 + row of x) for a row of s itself that is read where it lies
//
// Push    the first warps of a block: runs of rows in the order of layout_range; x -> slots, then
//         the words (release)
// Reduce  the other warps: wait for the words of a token's selections (acquire), add their rows
//
// Progress: pushing waits for nothing and is drawn from one counter, so the blocks that run do all
// of it; the grid need not be resident as a whole. Halves are free for the reason that dispatch.cu
// gives: the first reducing warp of block 0 waits until all peers have begun this operation. With a
// hook the two phases are two launches.
//
// Launch: any grid, combine_threads() threads. Graph-safe.
#include "epjit/cast.cuh"
#include "epjit/copy.cuh"

namespace epjit {

struct LowLatencyCombineConfig {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t hidden;
  int32_t num_topk;
  bool topk_is_int64;
  bool logfmt;  // rows travel in the log format
  bool tma;     // rows are pushed by bulk copies, else through registers
  int32_t num_warps;
  int32_t num_push_warps;  // of num_warps
  int32_t rows_per_warp;   // rows of a pushing warp in shared memory
};

struct LowLatencyCombineParams {
  const char* x;                // [experts_per_rank, num_ranks * max_tokens, hidden] bf16
  const void* topk_idx;         // [num_tokens, num_topk] int32 or int64, global experts
  const float* topk_weights;    // [num_tokens, num_topk]
  const int32_t* src_info;      // [2, experts_per_rank, num_ranks * max_tokens]: token, selection
  const int64_t* layout_range;  // [experts_per_rank, num_ranks]: begin << 32 | count
  char* out;                    // [num_tokens, hidden] bf16
  int64_t* wait_cost;           // [num_ranks], += cycles until it had begun; or null
  uint64_t slots[8];            // symmetric, of each rank
  uint64_t words[8];            // symmetric, of each rank
  uint64_t signals[8];          // symmetric, of each rank
  uint32_t*
      counters;     // local [3]: ticket, next pushing unit, next reducing unit; zero on entry and
                    // on exit
  uint32_t* epoch;  // local [1]
  uint64_t* fault;  // host [8]
  uint32_t* abort;  // local [1]
  uint32_t* mask;   // local [num_ranks], or null
  uint64_t timeout_ns;
  int64_t half_bytes;
  int32_t words_stride;  // words of a half
  int32_t num_tokens;
  int32_t max_tokens;  // of any rank
  int32_t num_parts;   // warps that share the sum of one token
  int32_t rank;
  bool sends;     // this launch has the send phase
  bool receives;  // this launch has the receive phase
};

constexpr int combine_threads(LowLatencyCombineConfig cfg) { return cfg.num_warps * kWarpSize; }

// Rows on their way, then the first row of each (expert, source), then a sum a warp.
constexpr int combine_copier_bytes(LowLatencyCombineConfig cfg) {
  return copier_shared_bytes(cfg.tma && !cfg.logfmt, cfg.num_push_warps, cfg.rows_per_warp,
                             2 * cfg.hidden);
}

constexpr int combine_shared_bytes(LowLatencyCombineConfig cfg) {
  return combine_copier_bytes(cfg) + 4 * (cfg.num_experts + 1 + cfg.num_warps);
}

constexpr int combine_slot_bytes(LowLatencyCombineConfig cfg) {
  return align_up(cfg.logfmt ? log_row_bytes(cfg.hidden) : 2 * cfg.hidden, 16);
}

template <LowLatencyCombineConfig kCfg>
class LowLatencyCombine {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kExperts = kCfg.num_experts;
  static constexpr int kLocal = kExperts / kRanks;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kRows = kCfg.rows_per_warp;
  static constexpr int kRowBytes = 2 * kCfg.hidden;
  static constexpr int kVecs = kRowBytes / 16;
  static constexpr int kSlotBytes = combine_slot_bytes(kCfg);
  static constexpr int kThreads = combine_threads(kCfg);
  static_assert(kRanks >= 1 && kRanks <= kMaxRanks && kExperts % kRanks == 0);
  static_assert(kTopk >= 1 && kTopk <= kMaxTopk);
  static_assert(kRowBytes % 16 == 0, "a row is moved in pieces of 16 bytes");
  static_assert(!kCfg.logfmt || kCfg.hidden % kLogBlock == 0);
  static_assert(kCfg.num_push_warps >= 1 && kCfg.num_push_warps < kCfg.num_warps,
                "someone must reduce from the start");
  using Copier = RowCopier<kCfg.tma && !kCfg.logfmt, kCfg.num_push_warps, kRows, kRowBytes>;

 public:
  __device__ explicit LowLatencyCombine(const LowLatencyCombineParams& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        waiter(start_operation<kRanks>(p, kWaitLowLatencyCombineStart)),
        first_rows(reinterpret_cast<int*>(ptx::dynamic_shared() + combine_copier_bytes(kCfg))) {}

  __device__ void run() {
    if (__syncthreads_and(ptx::ld_relaxed_gpu(p.abort) == 0)) {
      if (p.sends) {
        number_rows();
        if (warp < kCfg.num_push_warps) push();
      }
      if (p.receives && warp >= kCfg.num_push_warps && meet_peers()) reduce();
    }
    if (is_last_block(p.counters, 3) && lane == 0 && p.receives) *p.epoch = waiter.epoch;
  }

 private:
  __device__ int half() const { return waiter.epoch & 1; }

  __device__ int64_t rows_a_slab() const { return static_cast<int64_t>(kRanks) * p.max_tokens; }

  // Of selection token * kTopk + k of `owner`.
  __device__ char* slot(int owner, int selection) const {
    return reinterpret_cast<char*>(p.slots[owner]) + half() * p.half_bytes +
           static_cast<int64_t>(selection) * kSlotBytes;
  }

  __device__ uint64_t* word(int owner, int selection) const {
    return reinterpret_cast<uint64_t*>(p.words[owner]) +
           static_cast<int64_t>(half()) * p.words_stride + selection;
  }

  // Global expert of a selection, -1 for none.
  __device__ int expert(int64_t selection) const {
    if constexpr (kCfg.topk_is_int64) {
      const int64_t e = static_cast<const int64_t*>(p.topk_idx)[selection];
      return e >= 0 && e < kExperts ? static_cast<int>(e) : -1;
    } else {
      const int32_t e = static_cast<const int32_t*>(p.topk_idx)[selection];
      return e >= 0 && e < kExperts ? e : -1;
    }
  }

  // ---- push -------------------------------------------------------------------------------------

  // first_rows[e * kRanks + s] = rows of this rank before those of expert e and source s; called by
  // the whole block. Each thread takes a run of neighbours.
  __device__ void number_rows() {
    int* const warp_sums = first_rows + kExperts + 1;
    constexpr int kRun = ceil_div(kExperts, kThreads);
    int counts[kRun], own = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int pair = threadIdx.x * kRun + i;
      counts[i] = pair < kExperts ? static_cast<int>(p.layout_range[pair] & 0xffffffff) : 0;
      own += counts[i];
    }
    int inclusive = own;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int left = __shfl_up_sync(kFullMask, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    int before = inclusive - own;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int pair = threadIdx.x * kRun + i;
      if (pair < kExperts) first_rows[pair] = before;
      before += counts[i];
    }
    if (threadIdx.x == kThreads - 1) first_rows[kExperts] = before;
    __syncthreads();
  }

  // A row on its way back.
  struct Row {
    const char* src;  // null: none
    int owner;
    int selection;  // of the owner
    int64_t index;  // in x
  };

  // Row `number` in the order of number_rows().
  __device__ Row find_row(int number) const {
    int pair = 0;  // the last one that starts at or before it
#pragma unroll
    for (int step = power_of_two(kExperts); step > 0; step /= 2)
      if (pair + step < kExperts && first_rows[pair + step] <= number) pair += step;
    const int owner = pair % kRanks;
    if (is_masked(waiter, owner)) return {};
    const int64_t index =
        pair / kRanks * rows_a_slab() + (p.layout_range[pair] >> 32) + (number - first_rows[pair]);
    const int token = p.src_info[index], k = p.src_info[kLocal * rows_a_slab() + index];
    return {p.x + index * kRowBytes, owner, token * kTopk + k, index};
  }

  static constexpr int power_of_two(int limit) {
    int power = 1;
    while (power * 2 < limit) power *= 2;
    return power;
  }

  __device__ void push() {
    Copier copier(ptx::dynamic_shared(), warp, lane);
    const int num_rows = first_rows[kExperts];
    const int unit_rows = rows_at_a_time<kRows>(num_rows, gridDim.x * kCfg.num_push_warps, kRows);
    const uint32_t num_units = ceil_div(num_rows, unit_rows);
    uint32_t unit = next_unit(p.counters + 1, lane);
    while (unit < num_units) {
      // Drawn early: its latency hides behind the copy.
      const uint32_t next = next_unit(p.counters + 1, lane);
      const int number = unit * unit_rows + lane;
      const Row row = lane < unit_rows && number < num_rows ? find_row(number) : Row{};
      uint32_t value = 0;
      if constexpr (kCfg.logfmt) {
        for (int i = 0; i < unit_rows; ++i) encode_row(row, i);
        __syncwarp();
      } else {
        // Rows of this rank are read where they lie.
        const bool leaves = row.src != nullptr && row.owner != p.rank;
        copier.load(0, leaves ? row.src : nullptr);
        copier.store(0, leaves ? slot(row.owner, row.selection) : nullptr);
        copier.flush();
        if (row.src != nullptr && row.owner == p.rank) value = 1 + static_cast<uint32_t>(row.index);
      }
      // Rows are written -> flush, or __syncwarp -> release of any lane: cumulative.
      if (row.src != nullptr)
        ptx::st_release_sys(word(row.owner, row.selection), stamp(waiter.epoch, value));
      unit = next;
    }
  }

  // All lanes encode the row of one of them.
  __device__ void encode_row(const Row& row, int of_lane) const {
    const auto src = reinterpret_cast<const char*>(
        __shfl_sync(kFullMask, reinterpret_cast<uint64_t>(row.src), of_lane));
    const int owner = __shfl_sync(kFullMask, row.owner, of_lane);
    const int selection = __shfl_sync(kFullMask, row.selection, of_lane);
    if (src == nullptr) return;
    constexpr int kItems = kCfg.hidden / kCastElements;
    uint32_t* const words = reinterpret_cast<uint32_t*>(slot(owner, selection));
    for (int first = 0; first < kItems; first += kWarpSize) {
      const int item = first + lane;
      Vec16 pieces[2] = {};
      if (item < kItems) {
        pieces[0] = ptx::ld_v4(src + item * 32);
        pieces[1] = ptx::ld_v4(src + item * 32 + 16);
      }
      const LogItem code = log_encode(pieces);
      if (item >= kItems) continue;
#pragma unroll
      for (int j = 0; j < kLogWords; ++j) words[j * kItems + item] = code.words[j];
      constexpr int kLanes = kLogBlock / kCastElements;
      if (item % kLanes == 0) words[kLogWords * kItems + item / kLanes] = code.range;
    }
  }

  // ---- reduce -----------------------------------------------------------------------------------

  // One warp waits until all peers have begun, so that none of them is in an earlier operation when
  // this one ends.
  __device__ bool meet_peers() const {
    if (blockIdx.x != 0 || warp != kCfg.num_push_warps) return true;
    bool ok = true;
    if (lane < kRanks && lane != p.rank && !is_masked(waiter, lane)) {
      const uint64_t start = ptx::clock64();
      ok = wait_signal(waiter, kWaitLowLatencyCombineStart, lane,
                       entered_signal(waiter.signals, lane), stamp(waiter.epoch, 0)) ||
           is_masked(waiter, lane);
      if (p.wait_cost != nullptr) p.wait_cost[lane] += static_cast<int64_t>(ptx::clock64() - start);
    }
    return all_lanes(ok);
  }

  __device__ void reduce() {
    const uint32_t num_units = static_cast<uint32_t>(p.num_tokens) * p.num_parts;
    uint32_t unit = next_unit(p.counters + 2, lane);
    while (unit < num_units) {
      const uint32_t next = next_unit(p.counters + 2, lane);
      if (!reduce_token(unit / p.num_parts, unit % p.num_parts)) return;
      unit = next;
    }
  }

  __device__ bool reduce_token(int token, int part) const {
    // Lane k has selection k.
    bool ok = true;
    const char* row = nullptr;
    float weight = 0.0f;
    if (lane < kTopk) {
      const int selection = token * kTopk + lane;
      const int e = expert(selection);
      const int peer = e / kLocal;
      if (e >= 0 && !is_masked(waiter, peer)) {
        weight = p.topk_weights[selection];
        uint64_t seen;
        const bool here = wait_until(waiter, kWaitLowLatencyCombineRow, peer, selection,
                                     stamp(waiter.epoch, 0), word(p.rank, selection), seen,
                                     [&](uint64_t value) { return value >> 32 == waiter.epoch; });
        const uint32_t own = static_cast<uint32_t>(seen);
        if (here)
          row =
              own != 0 ? p.x + static_cast<int64_t>(own - 1) * kRowBytes : slot(p.rank, selection);
        ok = here || is_masked(waiter, peer);
      }
    }
    if (!all_lanes(ok)) return false;
    char* const out = p.out + static_cast<int64_t>(token) * kRowBytes;
    if constexpr (kCfg.logfmt)
      sum_log(row, weight, out, part);
    else
      sum(row, weight, out, part);
    return true;
  }

  // Adds weight * y: the product is rounded, then the sum.
  __device__ static void add(float& sum, float weight, float y) {
    sum = __fadd_rn(sum, __fmul_rn(weight, y));
  }

  static constexpr int kBatch = 8;  // selections whose loads are in flight at once

  __device__ void sum(const char* row, float weight, char* out, int part) const {
    const int part_vecs = align_up(ceil_div(kVecs, p.num_parts), kWarpSize);
    const int last = min(kVecs, (part + 1) * part_vecs);
    for (int first = part * part_vecs; first < last; first += kWarpSize) {
      const int vec = first + lane;
      float total[8] = {};
#pragma unroll
      for (int batch = 0; batch < kTopk; batch += kBatch) {
        Vec16 v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch && batch + i < kTopk; ++i) {
          const char* const src = of_lane(row, batch + i);
          if (src != nullptr && vec < last) v[i] = ptx::ld_v4(src + vec * 16);
        }
#pragma unroll
        for (int i = 0; i < kBatch && batch + i < kTopk; ++i) {
          const float w = __shfl_sync(kFullMask, weight, batch + i);
          if (of_lane(row, batch + i) == nullptr) continue;
          const uint32_t pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Float2 y = ptx::bf16x2_to_float2(pairs[j]);
            add(total[2 * j], w, y.x);
            add(total[2 * j + 1], w, y.y);
          }
        }
      }
      if (vec < last) ptx::st_v4(out + vec * 16, pack(total));
    }
  }

  __device__ void sum_log(const char* row, float weight, char* out, int part) const {
    constexpr int kItems = kCfg.hidden / kCastElements;
    const int part_items = align_up(ceil_div(kItems, p.num_parts), kWarpSize);
    const int last = min(kItems, (part + 1) * part_items);
    for (int first = part * part_items; first < last; first += kWarpSize) {
      const int item = first + lane;
      float total[2][8] = {};
      for (int k = 0; k < kTopk; ++k) {
        const float w = __shfl_sync(kFullMask, weight, k);
        const auto src = reinterpret_cast<const uint32_t*>(of_lane(row, k));
        if (src == nullptr || item >= last) continue;
        uint32_t words[kLogWords];
#pragma unroll
        for (int j = 0; j < kLogWords; ++j) words[j] = src[j * kItems + item];
        const LogRange range =
            log_range(src[kLogWords * kItems + item / (kLogBlock / kCastElements)]);
#pragma unroll
        for (int i = 0; i < kCastElements; ++i)
          add(total[i / 8][i % 8], w, log_decode(words, i, range));
      }
      if (item >= last) continue;
      ptx::st_v4(out + item * 32, pack(total[0]));
      ptx::st_v4(out + item * 32 + 16, pack(total[1]));
    }
  }

  __device__ static const char* of_lane(const char* row, int lane) {
    return reinterpret_cast<const char*>(
        __shfl_sync(kFullMask, reinterpret_cast<uint64_t>(row), lane));
  }

  __device__ static Vec16 pack(const float (&v)[8]) {
    return {ptx::float2_to_bf16x2({v[0], v[1]}), ptx::float2_to_bf16x2({v[2], v[3]}),
            ptx::float2_to_bf16x2({v[4], v[5]}), ptx::float2_to_bf16x2({v[6], v[7]})};
  }

  const LowLatencyCombineParams& p;
  const int warp, lane;
  const Waiter waiter;
  int* const first_rows;  // in shared memory
};

template <LowLatencyCombineConfig kCfg>
__device__ void combine(const LowLatencyCombineParams& p) {
  LowLatencyCombine<kCfg>(p).run();
}

}  // namespace epjit

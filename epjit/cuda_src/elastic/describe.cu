// Describe: what the handle of DeepEP 2's interface says about a dispatch, from what notify and the
// dispatch have written. Local; no peer is waited for.
//
//   rank_ends[s]    = rows from the ranks 0..s
//   expert_ends[e]  = aligned counts of the experts 0..e; with `columns` (rows by expert) the end of
//                     the rows of e, without its padding
//   recv_stats[e]  += counts[e]
//   metadata[row]   = { source * max_tokens + token, source * num_topk + last k here, then for each
//                     k the row by expert (`columns`), else the local expert; -1 = not here }
//                     and -1 in rows that nothing arrived for
//   slots[t, k]     = rank * max_tokens + place of t among the tokens for the rank of choice k, at
//                     the last choice of that rank; else -1
//   choices[t, k]   = topk_idx[t, k]
//
// A warp takes a received row, or a token of this rank; lane k has choice k. The first warp of the
// grid sums up the counts of the experts.
//
// Launch: any grid of describe_threads() threads.
#include "epjit/topk.cuh"

namespace epjit {

struct DescribeConfig {
  int32_t num_topk;
  bool topk_is_int64;
};

struct DescribeParams {
  const void* topk_idx;        // [num_tokens, num_topk]
  const int32_t* send_head;    // [num_tokens, num_ranks]
  const int32_t* source_ends;  // [num_ranks], source_stride apart
  const int32_t* recv_tokens;  // [num_rows], token_stride apart
  const void* recv_topk_idx;   // [num_rows, num_topk], local experts; null with columns
  const int32_t* columns;      // [num_rows, num_topk] or null
  const int32_t* counts;       // [num_local]
  int32_t* rank_ends;          // [num_ranks]
  int32_t* expert_ends;        // [num_local]
  int32_t* recv_stats;         // [num_local] or null
  int32_t* metadata;           // [num_rows, 2 + num_topk]
  int32_t* slots;              // [num_tokens, num_topk]
  void* choices;               // as topk_idx, or null
  int32_t source_stride;
  int32_t token_stride;
  int32_t num_tokens;
  int32_t num_rows;
  int32_t num_ranks;
  int32_t num_local;
  int32_t rank;
  int32_t max_tokens;
  int32_t alignment;
};

constexpr int kDescribeWarps = 8;

constexpr int describe_threads(DescribeConfig) { return kDescribeWarps * kWarpSize; }

constexpr int describe_shared_bytes(DescribeConfig) { return 0; }

template <DescribeConfig kCfg>
class Describe {
  static constexpr int kTopk = kCfg.num_topk;
  static_assert(kTopk >= 1 && kTopk <= kMaxTopk);

 public:
  __device__ explicit Describe(const DescribeParams& params)
      : p(params), lane(threadIdx.x % kWarpSize) {}

  __device__ void run() const {
    const int warp = blockIdx.x * kDescribeWarps + threadIdx.x / kWarpSize;
    const int num_warps = gridDim.x * kDescribeWarps;
    if (warp == 0) {
      sum_experts();
      for (int r = lane; r < p.num_ranks; r += kWarpSize) p.rank_ends[r] = source_end(r);
    }
    for (int row = warp; row < p.num_rows; row += num_warps) describe_row(row);
    for (int token = warp; token < p.num_tokens; token += num_warps) describe_token(token);
  }

 private:
  __device__ int source_end(int source) const { return p.source_ends[source * p.source_stride]; }

  // Lane k has choice k of a row of choices, -1 for what is none of num_experts.
  __device__ int choice_of_lane(const void* idx, int row, int num_experts) const {
    if (lane >= kTopk) return -1;
    const int64_t i = static_cast<int64_t>(row) * kTopk + lane;
    return load_choice<kCfg.topk_is_int64>(idx, i, num_experts);
  }

  __device__ void sum_experts() const {
    int start = 0;
    for (int first = 0; first < p.num_local; first += kWarpSize) {
      const int expert = first + lane;
      const int count = expert < p.num_local ? p.counts[expert] : 0;
      const int aligned = align_up(count, p.alignment);
      int end = aligned;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int before = __shfl_up_sync(kFullMask, end, step);
        if (lane >= step) end += before;
      }
      end += start;
      start = __shfl_sync(kFullMask, end, kWarpSize - 1);
      if (expert < p.num_local) {
        p.expert_ends[expert] = p.columns == nullptr ? end : end - aligned + count;
        if (p.recv_stats != nullptr) p.recv_stats[expert] += count;
      }
    }
  }

  __device__ void describe_row(int row) const {
    int32_t* const out = p.metadata + static_cast<int64_t>(row) * (kTopk + 2);
    const bool arrived = row < source_end(p.num_ranks - 1);
    unsigned num_before = 0;  // ranks whose rows end before this one
    for (int s = lane; s < p.num_ranks; s += kWarpSize) num_before += source_end(s) <= row;
    const int source = static_cast<int>(__reduce_add_sync(kFullMask, num_before));
    const int column = arrived ? column_of_lane(row) : -1;
    const uint32_t here = __ballot_sync(kFullMask, column >= 0);
    if (lane == 0) {
      const int token = arrived ? p.recv_tokens[static_cast<int64_t>(row) * p.token_stride] : 0;
      out[0] = arrived ? source * p.max_tokens + token : -1;
      out[1] = arrived ? source * kTopk + (kWarpSize - 1 - __clz(here)) : -1;
    }
    if (lane < kTopk) out[2 + lane] = column;
  }

  // Lane k has the row by expert of choice k, else its local expert; -1 if it is not here.
  __device__ int column_of_lane(int row) const {
    if (p.columns == nullptr) return choice_of_lane(p.recv_topk_idx, row, p.num_local);
    return lane < kTopk ? p.columns[static_cast<int64_t>(row) * kTopk + lane] : -1;
  }

  __device__ void describe_token(int token) const {
    const int expert = choice_of_lane(p.topk_idx, token, p.num_ranks * p.num_local);
    const int rank = expert < 0 ? -1 : expert / p.num_local;
    bool is_last = rank >= 0;
#pragma unroll
    for (int k = 1; k < kTopk; ++k) {
      const int other = __shfl_sync(kFullMask, rank, k);
      if (k > lane && other == rank) is_last = false;
    }
    if (lane >= kTopk) return;
    const int64_t i = static_cast<int64_t>(token) * kTopk + lane;
    const int64_t head = static_cast<int64_t>(token) * p.num_ranks + rank;
    p.slots[i] = is_last ? p.rank * p.max_tokens + p.send_head[head] : -1;
    if (p.choices == nullptr) return;
    if constexpr (kCfg.topk_is_int64)
      static_cast<int64_t*>(p.choices)[i] = static_cast<const int64_t*>(p.topk_idx)[i];
    else
      static_cast<int32_t*>(p.choices)[i] = static_cast<const int32_t*>(p.topk_idx)[i];
  }

  const DescribeParams& p;
  const int lane;
};

template <DescribeConfig kCfg>
__device__ void describe(const DescribeParams& p) {
  Describe<kCfg>(p).run();
}

}  // namespace epjit

// Place: which row each selection gets when received tokens are ordered by expert, without a host
// that knows the counts.
//
//   expert e's rows are start[e] .. start[e] + count[e] - 1 in the order of the selections, then
//   padding up to a multiple of `alignment`, where start[e + 1] begins
//
//   row_of[i]   = row of selection i, -1 when it selects no expert here (or does not fit)
//   source[row] = selection of a row, -1 for padding and behind the last expert
//   end[e]      = start[e + 1], at most num_rows: what a grouped GEMM takes as offsets
//   count[e]    = selections of expert e, also those that do not fit
//
// Counts that are known include selections whose token was left out for want of room, the last ones:
// these have rows that stay empty (source -1), and move no others.
//
// Block e does expert e: it counts all selections, then numbers its own. Every block reads the whole
// of topk_idx twice; it is small and stays in the L2.
//
// Launch: num_experts blocks of place_threads() threads.
#include "epjit/topk.cuh"

namespace epjit {

struct PlaceConfig {
  bool topk_is_int64;
};

struct PlaceParams {
  const void* topk_idx;  // [num_selections], local experts; anything outside selects nothing
  const int32_t* known;  // [num_experts]: counts, or null
  int32_t* row_of;       // [num_selections]
  int32_t* source;       // [num_rows]
  int32_t* end;          // [num_experts]
  int32_t* count;        // [num_experts]; not written where they are known
  int32_t num_selections;
  int32_t num_experts;  // of this rank
  int32_t num_rows;
  int32_t alignment;
};

constexpr int kPlaceWarps = 16;

constexpr int place_threads(PlaceConfig) { return kPlaceWarps * kWarpSize; }

// A counter an expert, then one a warp.
constexpr int kMaxLocalExperts = 8192;
constexpr int place_shared_bytes(PlaceConfig) { return (kMaxLocalExperts + kPlaceWarps) * 4; }

template <PlaceConfig kCfg>
__device__ void place(const PlaceParams& p) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int own = blockIdx.x;
  const auto choice = [&](int i) {
    return load_choice<kCfg.topk_is_int64>(p.topk_idx, i, p.num_experts);
  };
  int* const counts = reinterpret_cast<int*>(ptx::dynamic_shared());
  int* const warp_counts = counts + kMaxLocalExperts;
  for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x)
    counts[e] = p.known != nullptr ? p.known[e] : 0;
  __syncthreads();

  // Each warp has one contiguous part, so that the order of rows is that of the selections.
  const int part = align_up(ceil_div(p.num_selections, kPlaceWarps), kWarpSize);
  const int first = min(warp * part, p.num_selections);
  const int last = min(first + part, p.num_selections);
  int num_own = 0;
  for (int i = first + lane; i - lane < last; i += kWarpSize) {
    const int expert = i < last ? choice(i) : -1;
    if (expert >= 0 && p.known == nullptr) atomicAdd(counts + expert, 1);
    if (own == 0 && expert < 0 && i < last) p.row_of[i] = -1;
    num_own += __popc(__ballot_sync(kFullMask, expert == own));
  }
  if (lane == 0) warp_counts[warp] = num_own;
  __syncthreads();

  // Every warp computes these for itself: no other barrier is needed.
  unsigned before = 0;
  for (int e = lane; e < own; e += kWarpSize) before += align_up(counts[e], p.alignment);
  const int start = static_cast<int>(__reduce_add_sync(kFullMask, before));
  const unsigned of_warp = lane < kPlaceWarps ? warp_counts[lane] : 0;
  const unsigned of_warps_before = lane < warp ? of_warp : 0;
  const int num_placed = static_cast<int>(__reduce_add_sync(kFullMask, of_warp));
  int row = start + static_cast<int>(__reduce_add_sync(kFullMask, of_warps_before));

  for (int i = first + lane; i - lane < last; i += kWarpSize) {
    const bool mine = i < last && choice(i) == own;
    const uint32_t lanes = __ballot_sync(kFullMask, mine);
    const int my_row = row + __popc(lanes & ((1u << lane) - 1));
    const bool fits = my_row < p.num_rows;
    if (mine) p.row_of[i] = fits ? my_row : -1;
    if (mine && fits) p.source[my_row] = i;
    row += __popc(lanes);
  }

  const int end = start + align_up(counts[own], p.alignment);
  const bool is_last = own == p.num_experts - 1;
  for (int r = start + num_placed + threadIdx.x; r < (is_last ? p.num_rows : min(end, p.num_rows));
       r += blockDim.x)
    p.source[r] = -1;
  if (threadIdx.x == 0) {
    p.end[own] = min(end, p.num_rows);
    if (p.known == nullptr) p.count[own] = counts[own];
  }
}

}  // namespace epjit

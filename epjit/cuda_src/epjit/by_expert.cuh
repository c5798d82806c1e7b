// Rows by expert: which rows the selections of a received token are, and what lies beside a row.
//
//   row of selection k of token t of rank s = row_base[s, e] + block_base[t / 64, e] +
//                                             local_position[t, k]       (notify.cu, layout.cu)
//
// The source adds the last two and sends the sum along; the receiver knows the first. What it finds
// it leaves in row_of, and everything else (rows, scales, a cached dispatch) goes by that. Params has
// the fields of the dispatch kernel's parameters that are named here.
#pragma once
#include "epjit/work.cuh"

namespace epjit {

constexpr int kLayoutTokens = 64;  // of a block of layout

template <int kScales, int kTopk, bool kWeighted, int kRowBytes, typename Params>
class ByExpert {
 public:
  __device__ explicit ByExpert(const Params& params) : p(params) {}

  // Number of a selection among those of its expert on this rank, the source.
  __device__ int position(int num_experts, int token, int k, int expert) const {
    if (expert < 0 || expert >= num_experts) return -1;
    const int64_t block = token / kLayoutTokens;
    return p.block_base[block * num_experts + expert] +
           p.local_position[static_cast<int64_t>(token) * kTopk + k];
  }

  // Selection k of the token that lies in row `token_row` of the order of the sources; -1: it is left
  // out for want of room, and so are its rows.
  __device__ void place(int64_t token_row, int k, int source, int expert, int position,
                        float weight) const {
    const int64_t local = static_cast<int64_t>(expert) - p.rank * p.experts_per_rank;
    const bool mine = local >= 0 && local < p.experts_per_rank;
    const int row =
        mine ? existing(p.row_base[source * p.experts_per_rank + local] + position) : -1;
    if (token_row >= 0) *row_of(token_row, k) = row;
    if (row < 0) return;
    p.source[row] = token_row >= 0 ? static_cast<int32_t>(token_row * kTopk + k) : -1;
    if constexpr (kWeighted) p.recv_topk_weights[row] = token_row >= 0 ? weight : 0.0f;
  }

  // Row of selection k of a token that was placed, -1 where it has none.
  __device__ int row(int64_t token_row, int k) const {
    return token_row >= 0 ? existing(*row_of(token_row, k)) : -1;
  }

  // Address of that row; null where there is none.
  __device__ char* address(int64_t token_row, int k) const {
    const int64_t at = row(token_row, k);
    return at >= 0 ? p.recv_x + at * kRowBytes : nullptr;
  }

  __device__ void store_weight(int64_t token_row, int k, float weight) const {
    const int at = row(token_row, k);
    if (at >= 0) p.recv_topk_weights[at] = weight;
  }

  // Scale i of a token, to all of its rows.
  __device__ void store_scale(int64_t token_row, int i, uint32_t scale) const {
    for (int k = 0; k < kTopk; ++k) {
      const int at = row(token_row, k);
      if (at >= 0) store_scale_at(at, i, scale);
    }
  }

  __device__ void store_scale_at(int64_t row, int i, uint32_t scale) const {
    p.recv_scales[row * p.recv_scale_row_stride + i * p.recv_scale_stride] = scale;
  }

  // Worst-case outputs have more tokens than the `num_rows` that arrive. By all threads of the grid.
  __device__ void fill_unused_rows(int num_rows) const {
    const int64_t last = static_cast<int64_t>(p.num_recv_rows) * kTopk;
    const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t first = static_cast<int64_t>(max(num_rows, 0)) * kTopk;
    for (int64_t i = first + blockIdx.x * blockDim.x + threadIdx.x; i < last; i += num_threads)
      *row_of(i / kTopk, static_cast<int>(i % kTopk)) = -1;
  }

  // What no selection is: padding, and rows behind the last expert. By all warps of the grid, which
  // draw a part of an expert's padding at a time. `places`: also source.
  __device__ void fill_padding(uint32_t* counter, int lane, bool places) const {
    constexpr int kParts = 8;  // of the padding of an expert
    const uint32_t num_units = static_cast<uint32_t>(p.experts_per_rank) * kParts;
    for (uint32_t unit = Draw(counter).unit(); unit < num_units; unit = Draw(counter).unit()) {
      const int expert = unit / kParts, part = unit % kParts;
      const int start = expert == 0 ? 0 : p.ends[expert - 1];
      const int end = min(p.ends[expert], p.num_expert_rows);
      const int first = max(start + p.expert_counts[expert], 0);  // whatever a handle says
      for (int row = first + part; row < end; row += kParts) {
        if (lane == 0) mark_unused(row, places);
        if (!p.zero_padding) continue;
        char* const zeros = p.recv_x + static_cast<int64_t>(row) * kRowBytes;
        for (int at = lane * 16; at < kRowBytes; at += kWarpSize * 16)
          ptx::st_v4(zeros + at, Vec16{});
        for (int i = lane; i < kScales; i += kWarpSize) store_scale_at(row, i, 0);
      }
    }
    const int end = max(p.ends[p.experts_per_rank - 1], 0);
    for (int row = end + blockIdx.x * blockDim.x + threadIdx.x; row < p.num_expert_rows;
         row += gridDim.x * blockDim.x)
      mark_unused(row, places);
  }

 private:
  __device__ int32_t* row_of(int64_t token_row, int k) const {
    return p.row_of + token_row * p.row_of_stride + k;
  }

  // A row that the outputs have, else -1.
  __device__ int existing(int row) const {
    return static_cast<uint32_t>(row) < static_cast<uint32_t>(p.num_expert_rows) ? row : -1;
  }

  __device__ void mark_unused(int row, bool places) const {
    if (places) p.source[row] = -1;
    if constexpr (kWeighted) p.recv_topk_weights[row] = 0.0f;
  }

  const Params& p;
};

}  // namespace epjit

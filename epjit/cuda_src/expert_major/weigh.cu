// Weigh: gradients of rows that a combine multiplied with weights, from that of their sums.
//
//   grad_weights[r] = grad[r] . rows[r]           0 where source[r] is -1
//   grad[r]         = round(row_weights[r] * grad[r])   there as it is
//
// The dot product is in fp32, in an order of its own (reference/expert_major.py, dot): lane i adds the
// products of the 16-byte pieces i, i + 32, ... one by one, then lanes at a distance of 16, 8, 4, 2
// and 1 add what they have.
//
// Launch: any grid, weigh_threads() threads. A warp takes a row at a time.
#include "epjit/sum.cuh"

namespace epjit {

struct WeighConfig {
  int32_t row_bytes;
  bool is_f16;  // else bf16
};

struct WeighParams {
  char* grad;                // [num_rows, row_bytes]
  const char* rows;          // [num_rows, row_bytes]
  const float* row_weights;  // [num_rows]
  const int32_t* source;     // [num_rows]
  float* grad_weights;       // [num_rows]
  int32_t num_rows;
};

constexpr int kWeighWarps = 16;

constexpr int weigh_threads(WeighConfig) { return kWeighWarps * kWarpSize; }
constexpr int weigh_shared_bytes(WeighConfig) { return 0; }

template <WeighConfig kCfg>
__device__ void weigh(const WeighParams& p) {
  constexpr int kVecs = kCfg.row_bytes / 16;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int row = blockIdx.x * kWeighWarps + warp; row < p.num_rows;
       row += gridDim.x * kWeighWarps) {
    float sum = 0.0f;
    if (p.source[row] >= 0) {
      const int64_t first = static_cast<int64_t>(row) * kCfg.row_bytes;
      const float weight = p.row_weights[row];
#pragma unroll 4
      for (int vec = lane; vec < kVecs; vec += kWarpSize) {
        const Vec16 grad = ptx::ld_v4(p.grad + first + vec * 16);
        Sum8<kCfg.is_f16> weighted;
        weighted.start(grad, weight);
        sum = add_products<kCfg.is_f16>(sum, grad, ptx::ld_v4(p.rows + first + vec * 16));
        ptx::st_v4(p.grad + first + vec * 16, weighted.rounded());
      }
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      sum = __fadd_rn(sum, __shfl_xor_sync(kFullMask, sum, distance));
    if (lane == 0) p.grad_weights[row] = sum;
  }
}

}  // namespace epjit

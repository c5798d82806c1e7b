// How warps share the work of a grid, and lanes that of a warp.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

// Rows that a warp takes at a time, when `num_warps` share `num_rows`: a multiple of kRows up to
// `most`, for one release takes 3 us on an idle link and more on a busy one (H200) and publishes
// them all; but with few rows each warp has some.
template <int kRows>
__device__ __forceinline__ int rows_at_a_time(int num_rows, int num_warps, int most) {
  const int rows = min(num_rows / max(3 * num_warps, 1), most);
  return rows < kRows ? max(rows, 1) : rows / kRows * kRows;
}

// The next unit of work, which a warp takes from a counter. One lane draws it, and the others get it
// when they ask: what stands between the two hides the latency of the atomic (0.5 us and more, H200).
class Draw {
 public:
  Draw() = default;

  __device__ __forceinline__ explicit Draw(uint32_t* counter)
      : drawn_(ptx::elect_atom_add_gpu(counter, 1)) {}

  __device__ __forceinline__ uint32_t unit() const {
    return __shfl_sync(kFullMask, drawn_, ptx::elected_lane());
  }

 private:
  uint32_t drawn_ = 0;  // of the elected lane
};

// The pointer that a lane has.
template <typename T>
__device__ __forceinline__ T* of_lane(T* pointer, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(kFullMask, reinterpret_cast<uint64_t>(pointer), lane));
}

}  // namespace epjit

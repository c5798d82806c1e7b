// The ceiling of rows by expert: each row is loaded once and stored several times, without flags.
//
//   taken[k, i] = own[i] or peer[i]   for i < num_rows, k < num_stores
//
// Every second row of a warp, all of them or none are the peer's (peer_halves): half are, of the rows
// of a dispatch between two ranks. A warp has two rows of shared memory, loaded by bulk
// copies; they leave by bulk copies again, or, without `bulk`, by 16-byte stores of all lanes.
//
// Launch: any grid, fan_threads() threads.
#include "epjit/sync.cuh"

namespace epjit {

struct FanConfig {
  int32_t num_warps;
  int32_t row_bytes;
  int32_t num_stores;
  bool bulk;  // stores are bulk copies
};

struct FanParams {
  const char* own;      // [num_rows, row_bytes]
  const char* peer;     // the same on another rank
  char* taken;          // [num_stores, num_rows, row_bytes]
  int32_t num_rows;     // a store
  int32_t peer_halves;  // 0, 1, 2: none, half or all of the rows are the peer's
};

constexpr int kFanStages = 2;

constexpr int fan_threads(FanConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int fan_shared_bytes(FanConfig cfg) {
  return cfg.num_warps * kFanStages * (cfg.row_bytes + static_cast<int>(sizeof(uint64_t)));
}

template <FanConfig kCfg>
class Fan {
  static_assert(kCfg.row_bytes % 128 == 0, "the second stage must be as aligned as the first");

 public:
  __device__ Fan(const FanParams& params, char* shared, int warp, int lane)
      : p(params),
        lane(lane),
        rows(shared + warp * kFanStages * kCfg.row_bytes),
        bars(reinterpret_cast<uint64_t*>(shared + kCfg.num_warps * kFanStages * kCfg.row_bytes) +
             warp * kFanStages) {
    if (lane == 0) {
      for (int stage = 0; stage < kFanStages; ++stage) ptx::mbarrier_init(bars + stage, 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  // Rows first, first + step, ...
  __device__ void run(int first, int step) {
    if (first < p.num_rows) load(first, 0);
    for (int row = first, i = 0; row < p.num_rows; row += step, ++i) {
      const int stage = i % kFanStages;
      if (row + step < p.num_rows) load(row + step, i + 1);
      wait_bulk_loads(bars + stage, i / kFanStages & 1);
      store(row, rows + stage * kCfg.row_bytes);
    }
    if constexpr (kCfg.bulk) ptx::bulk_wait();
  }

 private:
  // The i-th row of this warp. Whatever reads the stage has ended: the stores of the row before.
  __device__ void load(int row, int i) {
    if constexpr (kCfg.bulk)
      ptx::bulk_wait_read();
    else
      ptx::fence_proxy_async();  // its reads are those of all lanes
    __syncwarp();
    if (lane != 0) return;
    const int stage = i % kFanStages;
    const char* const source = i % 2 < p.peer_halves ? p.peer : p.own;
    ptx::mbarrier_arrive_expect_tx(bars + stage, kCfg.row_bytes);
    ptx::bulk_load(rows + stage * kCfg.row_bytes, source + offset(row), kCfg.row_bytes,
                   bars + stage);
  }

  __device__ void store(int row, const char* staged) const {
    if constexpr (kCfg.bulk) {
      if (lane == 0)
        for (int k = 0; k < kCfg.num_stores; ++k)
          ptx::bulk_store(p.taken + offset(k * p.num_rows + row), staged, kCfg.row_bytes);
      ptx::bulk_commit();
    } else {
#pragma unroll 7
      for (int at = lane * 16; at < kCfg.row_bytes; at += kWarpSize * 16) {
        const Vec16 v = *reinterpret_cast<const Vec16*>(staged + at);
#pragma unroll
        for (int k = 0; k < kCfg.num_stores; ++k)
          ptx::st_v4(p.taken + offset(k * p.num_rows + row) + at, v);
      }
    }
  }

  __device__ static int64_t offset(int row) { return static_cast<int64_t>(row) * kCfg.row_bytes; }

  const FanParams& p;
  const int lane;
  char* const rows;
  uint64_t* const bars;
};

template <FanConfig kCfg>
__device__ void fan(const FanParams& p) {
  const int warp = threadIdx.x / kWarpSize;
  Fan<kCfg>(p, ptx::dynamic_shared(), warp, threadIdx.x % kWarpSize)
      .run(warp * gridDim.x + blockIdx.x, gridDim.x * kCfg.num_warps);
}

}  // namespace epjit

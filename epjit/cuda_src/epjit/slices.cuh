// Rows that a warp adds up, on their way through shared memory: by bulk copies, a slice of each row at
// a time, so that loads are in flight while sums are made and stored.
//
//   ring of a warp  [kRows, kSliceBytes], as many as one sum can have rows, at least
//
// Of n rows kRows / n slices are on their way at once. Slice i of all of them is one stage, row by row,
// with an mbarrier; when it is read, the next slice that is not on its way takes its place.
//
// An SM takes up to 64 bytes a cycle (126 GB/s), and memory answers in 0.7 to 1 us when it is busy: about
// 110 KB must be on their way. Four rows of 1 KB slices in a ring of 14 are 12 KB a warp, 190 KB for 16
// warps, so that it may stand still for a third of the time: between two sums, and during a release.
// (Loads through registers had 0 to 4 KB a warp on their way, on average 2, and took 36 GB/s.)
//
// Who must order what: rows that a peer has written are acquired by generic loads, a bulk copy works
// through the async proxy, hence fence.proxy.async before start_later(). A stage is loaded again when all
// lanes have read it: the __syncwarp in leave().
#pragma once
#include "epjit/sync.cuh"

namespace epjit {

constexpr int slice_stages(int rows) { return rows < 8 ? rows : 8; }

constexpr int slices_shared_bytes(int num_warps, int rows, int slice_bytes) {
  return num_warps * (rows * slice_bytes + slice_stages(rows) * static_cast<int>(sizeof(uint64_t)));
}

// kUsed: else it is nothing, and has no shared memory.
template <bool kUsed, int kNumWarps, int kRows, int kSliceBytes, int kRowBytes>
class SliceRing {
  static_assert(kRowBytes > 0 && kRowBytes % 16 == 0, "a row is moved in pieces of 16 bytes");
  static_assert(!kUsed || (kRows >= 1 && kSliceBytes > 0 && kSliceBytes % 16 == 0));
  static constexpr int kStages = slice_stages(kRows);

 public:
  // shared: slices_shared_bytes() bytes, the same address in all warps.
  __device__ SliceRing(char* shared, int warp, int lane) : lane_(lane) {
    if constexpr (kUsed) {
      ring_ = shared + warp * (kRows * kSliceBytes);
      bars_ =
          reinterpret_cast<uint64_t*>(shared + kNumWarps * kRows * kSliceBytes) + warp * kStages;
      if (lane < kStages) {
        ptx::mbarrier_init(bars_ + lane, 1);
        ptx::fence_mbarrier_init();
      }
      __syncwarp();
    }
  }

  // Starts to read slices first .. last - 1 of the rows of all lanes, kRows at most: of `row`, and of
  // `later`, which lie behind them in each stage and are not touched before start_later(); null = none.
  // What was started before is read. By a whole warp.
  __device__ void start(const char* row, const char* later, int first, int last) {
    const uint32_t rows = __ballot_sync(kFullMask, row != nullptr);
    const uint32_t laters = __ballot_sync(kFullMask, later != nullptr);
    const uint32_t below = (1u << lane_) - 1;
    row_ = row, later_ = later;
    place_ = __popc(rows & below) * kSliceBytes;
    later_place_ = (__popc(rows) + __popc(laters & below)) * kSliceBytes;
    num_rows_ = __popc(rows) + __popc(laters);
    num_stages_ = min(kStages, kRows / max(num_rows_, 1));
    stage_ = 0;
    next_ = loaded_ = first, last_ = last;
#pragma unroll 1
    for (int stage = 0; stage < num_stages_ && loaded_ < last_; ++stage) {
      expect(stage);
      copy(stage, loaded_, row_, place_);
      ++loaded_;
    }
  }

  // Those of `later`, when they may be read. To be called after each start() that has any.
  __device__ void start_later() const {
#pragma unroll 1
    for (int slice = next_; slice < loaded_; ++slice)
      copy(slice - next_, slice, later_, later_place_);
  }

  // Waits for the next slice: that of the first row; those of the others lie kSliceBytes behind each
  // other.
  __device__ const char* wait() {
    wait_bulk_loads(bars_ + stage_, phases_ >> stage_ & 1);
    phases_ ^= 1u << stage_;
    return stage_address(stage_);
  }

  // It is read.
  __device__ void leave() {
    __syncwarp();
    if (loaded_ < last_) {
      expect(stage_);
      copy(stage_, loaded_, row_, place_);
      copy(stage_, loaded_, later_, later_place_);
      ++loaded_;
    }
    ++next_;
    stage_ = stage_ + 1 == num_stages_ ? 0 : stage_ + 1;
  }

  // Waits for what was started and is not wanted: nothing may land in shared memory after the block has
  // left it.
  __device__ void drain() {
    last_ = loaded_;
#pragma unroll 1
    while (next_ < loaded_) {
      wait();
      leave();
    }
  }

 private:
  __device__ char* stage_address(int stage) const {
    return ring_ + stage * num_rows_ * kSliceBytes;
  }

  __device__ static int bytes_of(int slice) {
    if constexpr (kRowBytes % kSliceBytes == 0) return kSliceBytes;
    return min(kSliceBytes, kRowBytes - slice * kSliceBytes);
  }

  // The bytes of slice `loaded_` in its stage.
  __device__ void expect(int stage) const {
    if (lane_ == 0) ptx::mbarrier_arrive_expect_tx(bars_ + stage, num_rows_ * bytes_of(loaded_));
    __syncwarp();
  }

  __device__ void copy(int stage, int slice, const char* row, int place) const {
    if (row != nullptr)
      ptx::bulk_load(stage_address(stage) + place, row + slice * kSliceBytes, bytes_of(slice),
                     bars_ + stage);
  }

  int lane_;
  char* ring_ = nullptr;
  uint64_t* bars_ = nullptr;
  const char* row_ = nullptr;
  const char* later_ = nullptr;
  int place_ = 0, later_place_ = 0;  // in a stage
  int num_rows_ = 0, num_stages_ = 1, stage_ = 0;
  int next_ = 0, loaded_ = 0, last_ = 0;  // slices
  uint32_t phases_ = 0;
};

}  // namespace epjit

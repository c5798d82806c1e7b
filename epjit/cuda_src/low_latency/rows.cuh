// Rows of the low-latency dispatch: cast on their way out, copied with their scales on their way in.
#pragma once
#include "epjit/cast.cuh"

namespace epjit {

// Scales are moved in words where they can be.
template <bool kWords>
struct ScaleUnitOf {
  using Type = uint32_t;
};

template <>
struct ScaleUnitOf<false> {
  using Type = unsigned char;
};

// A slot begins with a row and its scales.
template <int kFormat, int kHidden>
struct RowOf {
  static constexpr int kBytes = format_row_bytes(kFormat, kHidden);
  static constexpr int kScaleBytes = format_row_scale_bytes(kFormat, kHidden);
  using ScaleUnit = typename ScaleUnitOf<kScaleBytes % 4 == 0>::Type;
  static constexpr int kScaleUnits = kScaleBytes / static_cast<int>(sizeof(ScaleUnit));
  static constexpr bool kScalesByColumn = kFormat >= kFp8 && kFormat <= kFp8Ue8m0;

  // First scale of row `row` of the slabs, of rows_a_slab rows each; null if it is none. The division
  // takes as long as many stores: a lane a row.
  static __device__ ScaleUnit* first_scale(char* recv_scales, int row, uint32_t rows_a_slab) {
    if (kScaleUnits == 0 || row < 0) return nullptr;
    const int64_t slab = row / rows_a_slab, position = row % rows_a_slab;
    return reinterpret_cast<ScaleUnit*>(recv_scales) +
           (kScalesByColumn ? slab * kScaleUnits * rows_a_slab + position
                            : static_cast<int64_t>(row) * kScaleUnits);
  }

  // From a scale of a row to the next one.
  static __device__ int64_t scale_step(uint32_t rows_a_slab) {
    return kScalesByColumn ? rows_a_slab : 1;
  }

  static_assert(kBytes % 16 == 0, "a row is moved in pieces of 16 bytes");
  static_assert(kFormat == kBf16 || kHidden % format_block(kFormat, kHidden) == 0);
  static_assert(!kScalesByColumn || kScaleBytes % 4 == 0);
};

// A row of bf16 in the registers of a block, to be cast.
template <int kFormat, int kHidden, int kThreads>
class OutgoingRow {
  // A thread's part of a row: 16 bytes of bf16, or the elements of a cast.
  static constexpr int kElements = kFormat == kBf16 ? 8 : kCastElements;
  static constexpr int kPieces = kElements / 8;  // of 16 bytes
  static constexpr int kItems = kHidden / kElements;
  static constexpr int kItemsAThread = ceil_div(kItems, kThreads);
  static constexpr int kRowBytes = RowOf<kFormat, kHidden>::kBytes;

 public:
  __device__ void load(const char* row) {
#pragma unroll
    for (int i = 0; i < kItemsAThread; ++i) {
      const int item = i * kThreads + threadIdx.x;
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
        pieces_[i][j] = item < kItems ? ptx::ld_v4(row + (item * kPieces + j) * 16) : Vec16{};
    }
  }

  // To slot(reader) of each bit in `readers`, with its scales; kShared: in shared memory.
  template <bool kShared = false, typename Slot>
  __device__ void store(uint32_t readers, [[maybe_unused]] float global_scale, Slot slot) const {
#pragma unroll
    for (int i = 0; i < kItemsAThread; ++i) {
      const int item = i * kThreads + threadIdx.x;
      if constexpr (kFormat == kBf16) {
        for (uint32_t left = readers; left != 0 && item < kItems; left &= left - 1)
          put<kShared>(slot(__ffs(left) - 1) + item * 16, pieces_[i][0]);
      } else {
        // All lanes take part: neighbours share a scale.
        const CastItem cast = cast_item<kFormat>(pieces_[i], global_scale);
        constexpr int kLanes = format_block(kFormat, kHidden) / kCastElements;
        const bool has_scale = threadIdx.x % kLanes == 0;
        for (uint32_t left = readers; left != 0 && item < kItems; left &= left - 1) {
          char* const row = slot(__ffs(left) - 1);
          store_cast<kFormat, kShared>(row, item, cast);
          if (!has_scale) continue;
          if constexpr (format_scale_bytes(kFormat) == 4)
            reinterpret_cast<uint32_t*>(row + kRowBytes)[item / kLanes] = cast.scale;
          else
            row[kRowBytes + item / kLanes] = static_cast<char>(cast.scale);
        }
      }
    }
  }

 private:
  template <bool kShared>
  static __device__ void put(char* dst, Vec16 v) {
    if constexpr (kShared)
      *reinterpret_cast<Vec16*>(dst) = v;
    else
      ptx::st_v4(dst, v);
  }

  Vec16 pieces_[kItemsAThread][kPieces];
};

// A batch of a row's pieces of 16 bytes in the registers of a warp, and the row's scales.
template <int kFormat, int kHidden, int kBatch>
class IncomingRow {
  using Row = RowOf<kFormat, kHidden>;
  using ScaleUnit = typename Row::ScaleUnit;
  static constexpr int kUnitsALane = ceil_div(Row::kScaleUnits, kWarpSize);

 public:
  static constexpr int kVecs = Row::kBytes / 16;

  // Pieces first .. first + kBatch * kWarpSize - 1, below `last`.
  __device__ void load(const char* src, int first, int last, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int vec = first + i * kWarpSize + lane;
      if (vec < last) pieces_[i] = ptx::ld_v4(src + vec * 16);
    }
  }

  __device__ void store(char* dst, int first, int last, int lane) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int vec = first + i * kWarpSize + lane;
      if (vec < last) ptx::st_v4(dst + vec * 16, pieces_[i]);
    }
  }

  __device__ void load_scales(const char* row, int lane) {
#pragma unroll
    for (int i = 0; i < kUnitsALane; ++i)
      if (i * kWarpSize + lane < Row::kScaleUnits)
        scales_[i] = reinterpret_cast<const ScaleUnit*>(row + Row::kBytes)[i * kWarpSize + lane];
  }

  // To the first scale of a row, and those that follow it `step` apart.
  __device__ void store_scales(ScaleUnit* first, int64_t step, int lane) const {
#pragma unroll
    for (int i = 0; i < kUnitsALane; ++i) {
      const int unit = i * kWarpSize + lane;
      if (unit < Row::kScaleUnits) first[unit * step] = scales_[i];
    }
  }

 private:
  Vec16 pieces_[kBatch];
  ScaleUnit scales_[kUnitsALane + 1];  // there may be none
};

}  // namespace epjit

// Casts of a row on its way: what a dispatch sends, and the log format of its combine.
//
// Block formats (x in bf16 or fp16; a block has one scale; e4m3 and e2m1 as epjit/formats.py says,
// also of what is not a number, which amax leaves out):
//   kFp8       blocks of 128: amax = max(|x|, 1e-4), scale = amax / 448, q = e4m3(x * (448 / amax))
//   kFp8Round  scale = the power of two from amax / 448 upward, q = e4m3(x * (1 / scale))
//   kFp8Ue8m0  the same, a scale stored as its exponent byte
//   kMxfp8     as kFp8Ue8m0 with blocks of 32, amax without a floor
//   kNvfp4     blocks of 16: s = e4m3(g * (amax / 6)) for one global g, q = e2m1(x * (g / s))
//   kFp8Row    as kFp8, the whole row a block
//
// Log format: a block of 128 bf16, 10 bits a value: the sign, and which of 511 steps the 15-bit
// pattern of |x| lies at, between the block's smallest (not below 8 octaves under its largest) and
// its largest. A pattern is linear in the logarithm between powers of two, so its steps are of
// nearly constant ratio, and everything is integer or single fp32 operations: the same bits on every
// machine. Blocks whose patterns span up to 510 lose nothing.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

enum RowFormat : int32_t {  // as epjit/formats.py numbers them
  kBf16 = 0,
  kFp8 = 1,
  kFp8Round = 2,
  kFp8Ue8m0 = 3,
  kMxfp8 = 4,
  kNvfp4 = 5,
  kFp8Row = 6,
};

constexpr int format_block(int format, int hidden) {  // elements that share a scale; 0 = no scales
  return format == kBf16     ? 0
         : format == kMxfp8  ? 32
         : format == kNvfp4  ? 16
         : format == kFp8Row ? hidden
                             : 128;
}

constexpr int format_row_bytes(int format, int hidden) {
  return format == kBf16 ? 2 * hidden : format == kNvfp4 ? hidden / 2 : hidden;
}

constexpr int format_scale_bytes(int format) {  // of one scale
  if (format == kBf16) return 0;
  return format == kFp8 || format == kFp8Round || format == kFp8Row ? 4 : 1;
}

constexpr int format_row_scale_bytes(int format, int hidden) {
  return format == kBf16 ? 0 : hidden / format_block(format, hidden) * format_scale_bytes(format);
}

// ---- values -------------------------------------------------------------------------------------

// The smallest power of two that is not below x; x is positive or zero.
__device__ __forceinline__ float ceil_power_of_two(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x7fffffu) & 0x7f800000u);
}

// 4 bits, to nearest even, saturating. What is not a number becomes 6: a product of that is
// positive.
__device__ __forceinline__ uint32_t float_to_e2m1(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude = min(bits & 0x7fffffffu, 0x40c00000u);  // 6.0
  // Below 1.0: the last place of 2^22 is worth 0.5, the step of these values.
  const uint32_t code = magnitude < 0x3f800000u
                            ? __float_as_uint(__uint_as_float(magnitude) + 4194304.0f) - 0x4a800000u
                            : (magnitude - 0x3f000000u + 0x1fffffu + (magnitude >> 22 & 1)) >> 22;
  return (bits >> 28 & 8) | code;
}

__device__ __forceinline__ float e4m3_to_float(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9f
                                        : __uint_as_float((exponent + 120) << 23 | mantissa << 20);
  return code & 0x80 ? -magnitude : magnitude;
}

// ---- a block format, 16 elements a lane ---------------------------------------------------------

constexpr int kCastElements = 16;

// The largest magnitude of a row of `items` times 16 elements, for all lanes of the warp.
template <bool kIsF16>
__device__ __forceinline__ float row_amax(const char* x, int items, int lane) {
  float amax = 0.0f;
#pragma unroll 4
  for (int piece = lane; piece < 2 * items; piece += kWarpSize) {
    const Vec16 values = ptx::ld_v4(x + piece * 16);
    const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
    for (const uint32_t two : pairs) {
      const Float2 pair = kIsF16 ? ptx::f16x2_to_float2(two) : ptx::bf16x2_to_float2(two);
      amax = fmaxf(amax, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
#pragma unroll
  for (int other = 1; other < kWarpSize; other *= 2)
    amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, other));
  return amax;
}

// The cast of a lane's 16 elements: up to 16 bytes, and the scale of its block.
struct CastItem {
  uint32_t words[4];  // kNvfp4 uses two
  uint32_t scale;     // its bits, in format_scale_bytes()
};

// `given` is the global scale of kNvfp4, and the largest magnitude of the row of kFp8Row.
template <int kFormat, bool kIsF16 = false>
__device__ __forceinline__ CastItem cast_item(const Vec16 (&pieces)[2], float given) {
  const uint32_t pairs[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                             pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
  float x[kCastElements];
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Float2 pair = kIsF16 ? ptx::f16x2_to_float2(pairs[i]) : ptx::bf16x2_to_float2(pairs[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    amax = fmaxf(amax, fmaxf(fabsf(pair.x), fabsf(pair.y)));
  }
  if constexpr (kFormat == kFp8Row) {
    amax = given;
  } else {
#pragma unroll
    for (int other = 1; other < format_block(kFormat, 0) / kCastElements; other *= 2)
      amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, other));
  }

  CastItem item{};
  float factor;
  if constexpr (kFormat == kFp8 || kFormat == kFp8Row) {
    amax = fmaxf(amax, 1e-4f);
    item.scale = __float_as_uint(amax / 448.0f);
    factor = 448.0f / amax;
  } else if constexpr (kFormat == kNvfp4) {
    const uint32_t code = ptx::float2_to_e4m3x2({given * (amax / 6.0f), 0.0f}) & 0xff;
    const float scale = e4m3_to_float(code);
    item.scale = code;
    factor = scale == 0.0f ? 0.0f : given / scale;
  } else {
    if constexpr (kFormat != kMxfp8) amax = fmaxf(amax, 1e-4f);
    const float scale = ceil_power_of_two(amax / 448.0f);
    item.scale =
        kFormat == kFp8Round ? __float_as_uint(scale) : (__float_as_uint(scale) >> 23 & 0xff);
    factor = scale == 0.0f ? 0.0f : 1.0f / scale;
  }

  if constexpr (kFormat == kNvfp4) {
#pragma unroll
    for (int i = 0; i < kCastElements; ++i)
      item.words[i / 8] |= float_to_e2m1(__fmul_rn(x[i], factor)) << 4 * (i % 8);
  } else {
#pragma unroll
    for (int i = 0; i < kCastElements; i += 2)
      item.words[i / 4] |=
          ptx::float2_to_e4m3x2({__fmul_rn(x[i], factor), __fmul_rn(x[i + 1], factor)})
          << 16 * (i / 2 % 2);
  }
  return item;
}

// To `row`, of which this is item `item`; kShared: in shared memory.
template <int kFormat, bool kShared = false>
__device__ __forceinline__ void store_cast(char* row, int item, const CastItem& cast) {
  if constexpr (kFormat == kNvfp4)
    *reinterpret_cast<uint64_t*>(row + item * 8) =
        static_cast<uint64_t>(cast.words[1]) << 32 | cast.words[0];
  else if constexpr (kShared)
    *reinterpret_cast<Vec16*>(row + item * 16) = {cast.words[0], cast.words[1], cast.words[2],
                                                  cast.words[3]};
  else
    ptx::st_v4(row + item * 16, {cast.words[0], cast.words[1], cast.words[2], cast.words[3]});
}

// To the scales of a row, that of block `block`.
template <int kFormat>
__device__ __forceinline__ void store_cast_scale(void* scales, int block, uint32_t scale) {
  if constexpr (format_scale_bytes(kFormat) == 1)
    static_cast<unsigned char*>(scales)[block] = static_cast<unsigned char>(scale);
  else
    static_cast<uint32_t*>(scales)[block] = scale;
}

// Rows that a warp casts one behind the other, into shared memory. Between two casts kBatch times 32
// items of 16 elements are on their way in its registers, a lane each: while one is cast, the loads of
// those behind it are in flight, and at the end of a row those of the next.
template <int kFormat, bool kIsF16, int kHidden, int kBatch>
class RowCaster {
  static constexpr int kItems = kHidden / kCastElements;
  static constexpr int kRounds = ceil_div(kItems, kWarpSize);
  static constexpr int kLanes = format_block(kFormat, kHidden) / kCastElements;  // share a scale

 public:
  __device__ explicit RowCaster(int lane) : lane_(lane) {}

  // Starts to load the row that is cast next.
  __device__ void load(const char* x) {
    x_ = x;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) load_item(i, i);
  }

  // Casts that row to `row` and `scales`, and starts to load the one at `next`, unless that is null.
  __device__ void cast(char* row, void* scales, float given, const char* next) {
    if constexpr (kFormat == kFp8Row) given = row_amax<kIsF16>(x_, kItems, lane_);
#pragma unroll 1
    for (int first = 0; first < kRounds; first += kBatch) {
      int ahead = first + kBatch;
      if (ahead >= kRounds) ahead = 0, x_ = next;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < kRounds) {
          const int item = (first + i) * kWarpSize + lane_;
          const CastItem cast = cast_item<kFormat, kIsF16>(pieces_[i], given);
          if (item < kItems) {
            store_cast<kFormat, true>(row, item, cast);
            if (item % kLanes == 0) store_cast_scale<kFormat>(scales, item / kLanes, cast.scale);
          }
        }
        load_item(i, ahead + i);
      }
    }
  }

 private:
  __device__ void load_item(int i, int round) {
    const int item = round * kWarpSize + lane_;
    if (x_ == nullptr || item >= kItems) return;
    pieces_[i][0] = ptx::ld_v4(x_ + item * 32);
    pieces_[i][1] = ptx::ld_v4(x_ + item * 32 + 16);
  }

  const int lane_;
  const char* x_ = nullptr;
  Vec16 pieces_[kBatch][2] = {};
};

// ---- the log format -----------------------------------------------------------------------------

// A row of n blocks of 128: n * 8 items of 16 elements, word j of all items side by side
// [5, n * 8] u32, then the blocks' ranges [n] u32: lowest pattern, highest pattern << 16.
constexpr int kLogBlock = 128;
constexpr int kLogWords = 5;  // 16 codes of 10 bits

constexpr int log_row_bytes(int hidden) {
  return hidden / kCastElements * kLogWords * 4 + hidden / kLogBlock * 4;
}

struct LogItem {
  uint32_t words[kLogWords];
  uint32_t range;
};

// Eight neighbouring lanes have the 128 elements of a block; all lanes of the warp take part.
__device__ __forceinline__ LogItem log_encode(const Vec16 (&pieces)[2]) {
  const uint32_t pairs[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                             pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
  uint32_t lowest = 0x7fff, highest = 0;
#pragma unroll
  for (int i = 0; i < kCastElements; ++i) {
    const uint32_t pattern = pairs[i / 2] >> 16 * (i % 2) & 0x7fff;
    highest = max(highest, pattern);
    if (pattern != 0) lowest = min(lowest, pattern);
  }
#pragma unroll
  for (int other = 1; other < kLogBlock / kCastElements; other *= 2) {
    highest = max(highest, __shfl_xor_sync(kFullMask, highest, other));
    lowest = min(lowest, __shfl_xor_sync(kFullMask, lowest, other));
  }
  if (highest == 0) lowest = 0;
  if (highest > 1024) lowest = max(lowest, highest - 1024);  // 8 octaves of 128 patterns

  const float span = static_cast<float>(highest - lowest);
  const float inverse = highest - lowest > 510 ? 510.0f / span : 1.0f;
  LogItem item{};
  item.range = lowest | highest << 16;
#pragma unroll
  for (int i = 0; i < kCastElements; ++i) {
    const uint32_t pattern = pairs[i / 2] >> 16 * (i % 2) & 0x7fff;
    uint32_t code = 0;
    if (pattern != 0 && pattern >= lowest)
      code = 1 + static_cast<uint32_t>(
                     __fadd_rn(__fmul_rn(static_cast<float>(pattern - lowest), inverse), 0.5f));
    code |= (pairs[i / 2] >> (16 * (i % 2) + 15) & 1) << 9;
    const int bit = 10 * i;
    item.words[bit / 32] |= code << bit % 32;
    if (bit % 32 > 22) item.words[bit / 32 + 1] |= code >> (32 - bit % 32);
  }
  return item;
}

// The values of the codes of a block: the lowest, and the step from one to the next.
struct LogRange {
  uint32_t lowest;
  float step;
};

__device__ __forceinline__ LogRange log_range(uint32_t range) {
  const uint32_t lowest = range & 0xffff, span = (range >> 16) - lowest;
  return {lowest << 16,
          span > 510 ? __fmul_rn(static_cast<float>(span), 65536.0f) / 510.0f : 65536.0f};
}

// Element i of an item.
__device__ __forceinline__ float log_decode(const uint32_t (&words)[kLogWords], int i,
                                            LogRange range) {
  const int bit = 10 * i;
  uint32_t code = words[bit / 32] >> bit % 32;
  if (bit % 32 > 22) code |= words[bit / 32 + 1] << (32 - bit % 32);
  const uint32_t index = code & 0x1ff;
  if (index == 0) return 0.0f;
  const uint32_t pattern =
      range.lowest + static_cast<uint32_t>(__fmul_rn(static_cast<float>(index - 1), range.step));
  return __uint_as_float(pattern | (code & 0x200) << 22);
}

}  // namespace epjit

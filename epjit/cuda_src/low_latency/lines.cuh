// Rows in lines of 128 bytes that carry a flag each (NCCL calls it LL128): who looks at a line finds all
// of it, or sees that it is not here yet. A line is a message by itself: nothing is released after it,
// no order between lines is needed, and looking is relaxed loads, of which many are on their way at once,
// whose registers are the data.
//
//   row   units of 512 bytes, each 4 lines of { 120 bytes of the row, flag u64 }; unit u has bytes 480 u
//         to 480 u + 479, and the last one is written whole
//   flag  epoch << 32 | epoch ^ kLineSalt
//
// Lane l of a warp has 16 bytes of line l / 8. The last lane of a line has 8 of the row, beside the flag:
// those of bytes 448 to 479 of the unit, so that the others have pieces of 16 in a row.
//
// Nothing has to be cleared: flags of earlier operations never match. What is no line never matches
// either, but with a chance of 2^-64: rows of other kernels, or what a user has written there.
//
// What PTX does not promise: that the eight stores of 16 bytes that one instruction makes to a line
// arrive together, and that the eight loads of one instruction see them so. NVIDIA's NCCL builds on it,
// by default where GPUs of sm_90 and newer are joined by NVLink (src/graph/tuning.cc), and names links
// where it does not hold (PCIe). So: only for these, and by name.
#pragma once
#include "epjit/sum.cuh"
#include "epjit/sync.cuh"

namespace epjit {

constexpr int kLineUnitBytes = 512;
constexpr int kLineUnitData = 480;  // of a row
constexpr uint32_t kLineSalt = 0x9e3779b9u;

constexpr int line_units(int row_bytes) { return ceil_div(row_bytes, kLineUnitData); }
constexpr int line_slot_bytes(int row_bytes) { return line_units(row_bytes) * kLineUnitBytes; }

__device__ __forceinline__ uint64_t line_flag(uint32_t epoch) {
  return stamp(epoch, epoch ^ kLineSalt);
}

// The flag of the last line of a unit.
__device__ __forceinline__ const uint64_t* last_flag(const char* slot, int unit) {
  return reinterpret_cast<const uint64_t*>(slot + (unit + 1) * kLineUnitBytes) - 1;
}

// One unit in the registers of a warp; of a row of kRowBytes bytes.
template <int kRowBytes>
struct LineUnit {
  Vec16 v;

  static __device__ bool has_flag(int lane) { return lane % 8 == 7; }

  // Where the lane's bytes are in a row.
  static __device__ int offset(int unit, int lane) {
    return unit * kLineUnitData + (has_flag(lane) ? 448 + lane / 8 * 8 : (lane - lane / 8) * 16);
  }

  // From shared memory.
  __device__ void load_shared(const char* row, int unit, int lane) {
    const int at = offset(unit, lane);
    if (at >= kRowBytes) return;
    const auto words = reinterpret_cast<const uint32_t*>(row + at);
    v.x = words[0], v.y = words[1];
    if (!has_flag(lane)) v.z = words[2], v.w = words[3];
  }

  __device__ void store(char* row, int unit, int lane) const {
    const int at = offset(unit, lane);
    if (at >= kRowBytes) return;
    if (has_flag(lane))
      *reinterpret_cast<uint64_t*>(row + at) = static_cast<uint64_t>(v.y) << 32 | v.x;
    else
      ptx::st_v4(row + at, v);
  }

  __device__ void send(char* slot, int unit, uint32_t epoch, int lane) const {
    __syncwarp();  // lanes have loaded by different paths, and a line is written by one instruction
    ptx::st_line(slot + unit * kLineUnitBytes + lane * 16,
                 has_flag(lane) ? Vec16{v.x, v.y, epoch ^ kLineSalt, epoch} : v);
  }

  // The 16 bytes of a unit in lines that are the lane's.
  static __device__ const char* in_lines(const char* slot, int unit, int lane) {
    return slot + unit * kLineUnitBytes + lane * 16;
  }

  // The same in a row as it is; of a lane with a flag, the 16 that hold its 8.
  static __device__ const char* in_row(const char* row, int unit, int lane) {
    return row + min(offset(unit, lane), kRowBytes - 16) / 16 * 16;
  }

  // As it lies there; it may not be here yet. Who looks at several units looks at all before it asks
  // for any: a question waits for its load.
  __device__ void look(const char* place) { v = ptx::ld_line(place); }

  // Of what was loaded from there: as from lines.
  __device__ void take_half(int lane) {
    if (has_flag(lane) && lane / 8 % 2 != 0) v.x = v.z, v.y = v.w;
  }

  // Without a branch, which would divide loads from loads.
  __device__ bool is_here(uint32_t epoch, int lane) const {
    return !has_flag(lane) | ((v.w ^ epoch) | (v.z ^ epoch ^ kLineSalt)) == 0;
  }
};

}  // namespace epjit

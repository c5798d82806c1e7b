// How one warp moves whole rows: lane i says where row i lies (load) and where it goes (store).
//
//   TMA   global -> the warp's part of shared memory -> global, by bulk copies; one SM moves
//         42 GB/s over NVLink this way and 48 GB/s within the GPU (H200), and its threads are free
//   ldst  16-byte loads and stores through registers, eight in flight a thread; any architecture
//
// A load is only started, so that other work, or the end of the stores before it, hides behind it;
// with ldst it happens inside store(). Both leave the stores in flight; flush() waits until this
// warp's bytes are written, which is needed before a signal that says so; drain() ends the warp's
// copies, before the kernel ends.
//
// Who must order what: what another GPU has written or left was acquired by generic loads, a bulk
// copy works through the async proxy, hence acquired() between the two. flush() makes the bulk
// stores visible to the lane that issued them; the __syncwarp in it, then a st.release.sys of any
// lane, publishes all of them (release is cumulative).
#pragma once
#include "epjit/pieces.cuh"
#include "epjit/sync.cuh"
#include "epjit/work.cuh"

namespace epjit {

// made: rows are made in shared memory, whatever the way that they are copied.
constexpr int copier_shared_bytes(bool tma, int num_warps, int rows_per_warp, int row_bytes,
                                  bool made = false) {
  return tma || made ? num_warps * (rows_per_warp * row_bytes + static_cast<int>(sizeof(uint64_t)))
                     : 0;
}

template <bool kTma, int kNumWarps, int kRows, int kRowBytes>
class RowCopier {
  static_assert(kRowBytes > 0 && kRowBytes % 16 == 0, "a row is moved in pieces of 16 bytes");
  static_assert(kRows >= 1 && kRows <= kWarpSize, "one lane a row");
  static constexpr int kLdstUnroll = 8;

 public:
  // shared: copier_shared_bytes() bytes, the same address in all warps. Followed by a __syncwarp of
  // the caller.
  __device__ RowCopier(char* shared, int warp, int lane)
      : lane_(lane), rows_(shared + warp * (kRows * kRowBytes)) {
    if constexpr (kTma) {
      bar_ = reinterpret_cast<uint64_t*>(shared + kNumWarps * kRows * kRowBytes) + warp;
      if (lane == 0) {
        ptx::mbarrier_init(bar_, 1);
        ptx::fence_mbarrier_init();
      }
      __syncwarp();
    }
  }

  // To be called between a wait for a peer and the copies that depend on it: of rows that it wrote,
  // or to slots that it has left.
  __device__ void acquired() const {
    if constexpr (kTma) ptx::fence_proxy_async();
  }

  // Starts to read the rows of the lanes first .. first + kRows - 1; a lane with src = null reads
  // nothing. `first` is a multiple of kRows.
  __device__ void load(int first, const char* src) {
    if (lane_ < first || lane_ >= first + kRows) src = nullptr;
    if constexpr (kTma) {
      ptx::bulk_wait_read();  // of all lanes: shared memory is free
      __syncwarp();
      const uint32_t readers = __ballot_sync(kFullMask, src != nullptr);
      pending_ = readers != 0;
      if (!pending_) return;
      if (lane_ == 0) ptx::mbarrier_arrive_expect_tx(bar_, __popc(readers) * kRowBytes);
      __syncwarp();
      if (src != nullptr) ptx::bulk_load(slot(lane_), src, kRowBytes, bar_);
    } else {
      src_ = src;
    }
  }

  // Instead of load(): the warp writes rows into its shared memory itself. Between blank() and made()
  // it may write those of kRows neighbouring lanes to slot(lane); store<true>() takes them from there.
  __device__ void blank() const {
    if constexpr (kTma) ptx::bulk_wait_read();
    __syncwarp();
  }

  __device__ char* slot(int lane) const { return rows_ + lane % kRows * kRowBytes; }

  __device__ void made() const {
    if constexpr (kTma) ptx::fence_proxy_async();
    __syncwarp();
  }

  // Writes the rows of these lanes, loaded (kMade: made) before, to dst where that is not null. May be
  // called several times for one load: for other lanes, or to other places.
  template <bool kMade = false>
  __device__ void store(int first, char* dst) {
    if (lane_ < first || lane_ >= first + kRows) dst = nullptr;
    if constexpr (kTma) {
      if (pending_) {
        wait_bulk_loads(bar_, phase_);
        phase_ ^= 1;
        pending_ = false;
      }
      if (dst != nullptr) ptx::bulk_store(dst, slot(lane_), kRowBytes);
      ptx::bulk_commit();
    } else {
      for (int i = first; i < first + kRows; ++i) {
        char* const row_dst = of_lane(dst, i);
        const char* const row_src = kMade ? slot(i) : of_lane(src_, i);
        for (int at = 0; row_dst != nullptr && at < kRowBytes; at += kPieceBytes<kLdstUnroll>)
          store_piece(row_dst + at,
                      load_piece<kLdstUnroll, kMade>(row_src + at, kRowBytes - at, lane_),
                      kRowBytes - at, lane_);
      }
    }
  }

  // Writes each of these rows to up to kNum places, for one load: target(k) is a place of this lane's
  // row, or null.
  template <int kNum, bool kMade = false, typename Target>
  __device__ void store_each(int first, Target target) {
    constexpr int kBatch = kNum < 8 ? kNum : 8;  // places that are looked up at once
    if constexpr (kTma) {
      for (int k = 0; k < kNum; k += kBatch) {
        char* to[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) to[i] = k + i < kNum ? target(k + i) : nullptr;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) store<kMade>(first, to[i]);
      }
    } else {
      for (int i = first; i < first + kRows; ++i) {
        const char* const from = kMade ? slot(i) : of_lane(src_, i);
        for (int at = 0; from != nullptr && at < kRowBytes; at += kPieceBytes<kLdstUnroll>) {
          const auto piece = load_piece<kLdstUnroll, kMade>(from + at, kRowBytes - at, lane_);
          for (int k = 0; k < kNum; ++k) {
            char* const to = of_lane(target(k), i);
            if (to != nullptr) store_piece(to + at, piece, kRowBytes - at, lane_);
          }
        }
      }
    }
  }

  // Waits until everything this warp has stored is written.
  __device__ void flush() const {
    if constexpr (kTma) ptx::bulk_wait();
    __syncwarp();
  }

  // Also waits for what was loaded in vain: nothing may land in shared memory after the block has
  // left it.
  __device__ void drain() {
    store(0, nullptr);
    flush();
  }

 private:
  int lane_;
  char* rows_;
  uint64_t* bar_ = nullptr;
  const char* src_ = nullptr;
  uint32_t phase_ = 0;
  bool pending_ = false;
};

}  // namespace epjit

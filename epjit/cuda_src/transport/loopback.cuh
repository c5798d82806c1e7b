// The body of transport.cuh for ranks that share a host or a process: loads and stores. Included by
// the unit, so nothing is linked. Written for tests: with a seed it waits before the bytes, between
// pieces of them and before the signal, and writes the pieces in another order; with seed 0 it does
// neither. It completes each put before it returns; late reads of src and puts that pass one another
// in one thread are the emulation's to try (tests/emulation).
//
// Not inlined: a kernel that puts in several places must keep its registers.
//
// Order: the lanes' stores -> __syncwarp -> st.release.sys or fence.acq_rel.sys of one lane, which is
// cumulative. A signal by itself orders nothing, as in NVSHMEM.
#pragma once
#include "epjit/pieces.cuh"
#include "epjit/transport.cuh"

namespace epjit::loopback {

constexpr int kMaxRegions = 16;
constexpr int kMaxPes = 256;
constexpr int kUnroll = 4;
constexpr uint32_t kMaxDelay = 16384;      // ns, before the bytes or the signal: one call in four
constexpr uint32_t kMaxPieceDelay = 2048;  // ns, between pieces: one piece in eight
constexpr uint64_t kStep = 7919;           // prime: no number of pieces that occurs divides it

// One symmetric allocation of this rank, and where it lies at each pe. Written by the host
// (runtime/transport.py).
struct Region {
  uint64_t base;
  uint64_t bytes;  // 0: the entry is free
  uint64_t bases[kMaxPes];
};

struct Record {
  uint64_t seed;
  uint64_t draws;  // how many calls have drawn
  Region regions[kMaxRegions];
};

__device__ inline char* address_at(const Record* record, const void* ptr, int pe) {
  for (const Region& region : record->regions) {
    const uint64_t offset = reinterpret_cast<uint64_t>(ptr) - region.base;
    if (offset < region.bytes) return reinterpret_cast<char*>(region.bases[pe] + offset);
  }
  __trap();  // no symmetric memory: a mistake of the kernel
}

// Random numbers of one call; the same in all lanes that were given the same ticket.
class Delays {
 public:
  __device__ Delays(const Record* record, uint64_t ticket)
      : state_(static_cast<uint32_t>(record->seed * 0x9e3779b97f4a7c15u >> 32) ^
               static_cast<uint32_t>(ticket) * 0x85ebca6bu),
        on_(record->seed != 0) {}

  __device__ bool on() const { return on_; }

  __device__ uint32_t draw() {  // PCG
    state_ = state_ * 747796405u + 2891336453u;
    const uint32_t word = (state_ >> ((state_ >> 28) + 4) ^ state_) * 277803737u;
    return word >> 22 ^ word;
  }

  // Waits up to `most` ns, in one of `one_in` cases.
  __device__ void wait(uint32_t most, uint32_t one_in) {
    if (!on_ || draw() % one_in != 0) return;
    const uint64_t end = ptx::globaltimer() + draw() % most;
    while (ptx::globaltimer() < end) {
    }
  }

 private:
  uint32_t state_;
  bool on_;
};

// Number of this call, for Delays.
__device__ inline uint64_t take_ticket(Record* record) {
  return record->seed == 0 ? 0 : atomicAdd(&record->draws, uint64_t{1});
}

__device__ inline Delays warp_delays(Record* record, int lane) {
  uint64_t ticket = 0;
  if (lane == 0) ticket = take_ticket(record);
  return Delays(record, __shfl_sync(kFullMask, ticket, 0));
}

// By a whole warp; afterwards any lane may publish the bytes.
__device__ inline void put(const Record* record, Delays& delays, void* dst, const void* src,
                           uint64_t bytes, int pe, int lane) {
  char* const to = address_at(record, dst, pe);
  const char* const from = static_cast<const char*>(src);
  delays.wait(kMaxDelay, 4);
  const uint64_t num_pieces = (bytes + kPieceBytes<kUnroll> - 1) / kPieceBytes<kUnroll>;
  uint64_t piece = delays.on() && num_pieces != 0 ? delays.draw() % num_pieces : 0;
  const uint64_t step = delays.on() ? kStep : 1;
  for (uint64_t i = 0; i < num_pieces; ++i) {
    const uint64_t at = piece * kPieceBytes<kUnroll>;
    copy_piece<kUnroll>(to + at, from + at, bytes - at, lane);
    delays.wait(kMaxPieceDelay, 8);
    piece = (piece + step) % num_pieces;
  }
  __syncwarp();
}

}  // namespace epjit::loopback

extern "C" {

__device__ __noinline__ void epjit_put(epjit::uint64_t transport, void* dst, const void* src,
                                       epjit::uint64_t bytes, epjit::int32_t pe) {
  using namespace epjit;
  auto* const record = reinterpret_cast<loopback::Record*>(transport);
  const int lane = threadIdx.x % kWarpSize;
  loopback::Delays delays = loopback::warp_delays(record, lane);
  loopback::put(record, delays, dst, src, bytes, pe, lane);
}

__device__ __noinline__ void epjit_put_signal(epjit::uint64_t transport, void* dst, const void* src,
                                              epjit::uint64_t bytes, epjit::uint64_t* signal,
                                              epjit::uint64_t value, epjit::int32_t pe) {
  using namespace epjit;
  auto* const record = reinterpret_cast<loopback::Record*>(transport);
  const int lane = threadIdx.x % kWarpSize;
  loopback::Delays delays = loopback::warp_delays(record, lane);
  loopback::put(record, delays, dst, src, bytes, pe, lane);
  delays.wait(loopback::kMaxDelay, 4);
  if (lane == 0)
    ptx::st_release_sys(reinterpret_cast<uint64_t*>(loopback::address_at(record, signal, pe)),
                        value);
  __syncwarp();
}

__device__ __forceinline__ void epjit_signal(epjit::uint64_t transport, epjit::uint64_t* signal,
                                             epjit::uint64_t value, epjit::int32_t pe) {
  using namespace epjit;
  auto* const record = reinterpret_cast<loopback::Record*>(transport);
  loopback::Delays(record, loopback::take_ticket(record)).wait(loopback::kMaxDelay, 4);
  ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(loopback::address_at(record, signal, pe)), value);
}

__device__ __forceinline__ void epjit_received(epjit::uint64_t) {}

__device__ __forceinline__ void epjit_fence(epjit::uint64_t) { epjit::ptx::fence_acq_rel_sys(); }

__device__ __forceinline__ void epjit_quiet(epjit::uint64_t) { epjit::ptx::fence_acq_rel_sys(); }

}  // extern "C"

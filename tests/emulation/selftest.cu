// Kernels that test the emulation itself, right ones and wrong ones.
#include "epjit/ptx.cuh"
#include "epjit/transport.cuh"

namespace epjit {

struct SelftestConfig {
  int32_t num_warps;
  int32_t row_bytes;
};

enum Case : int32_t {
  kIndices,
  kCollectives,
  kAtomics,
  kPlainIncrement,
  kCopy,
  kCopyNoLoadWait,
  kCopyNoStoreWait,
  kCopyNoReadWait,
  kCopyNoCommit,
  kCopyMisaligned,
  kCopyOddSize,
  kCopyOutside,
  kRing,
  kBarrierOfHalf,
  kWarpAgainstBlock,
  kDivergentShuffle,
  kShuffleFromOutside,
  kPollForever,
  kConvert,
  kOverrun,
  kBadShift,
  kMisalignedVector,
  kNoBarrierInit,
  kPut,
  kPutNoQuiet,
  kPutFillsLate,
  kPutNotReceived,
  kPutTwice,
  kPutFence,
  kPutNoFence,
  kPutOtherThread,
  kPutUnequal,
  kPutOutside,
  kPutMisaligned,
  kExchange,
  kReadRace,
  kWriteRace,
  kWarpRace,
  kAtomicRace,
};

struct SelftestParams {
  uint32_t* out;
  const char* src;  // [num_rows, row_bytes]
  char* dst;        // [num_rows, row_bytes]
  uint64_t* own;    // signal of this rank
  uint64_t* next;   // signal of the next rank
  uint64_t timeout_ns;
  uint64_t transport;
  int32_t num_rows;
  int32_t kind;
  int32_t rank;
  int32_t pe;  // of the next rank
};

constexpr int selftest_threads(SelftestConfig cfg) { return cfg.num_warps * kWarpSize; }
constexpr int selftest_shared_bytes(SelftestConfig cfg) {
  return cfg.num_warps * (cfg.row_bytes + 16);
}

__device__ inline void collectives(const SelftestParams& p, int lane) {
  uint32_t* const out = p.out + lane * 16;
  const uint32_t own = 100 + lane;
  out[0] = __shfl_sync(kFullMask, own, 5);
  out[1] = __shfl_sync(kFullMask, own, lane + 1, 8);
  out[2] = __shfl_up_sync(kFullMask, own, 3);
  out[3] = __shfl_down_sync(kFullMask, own, 3);
  out[4] = __shfl_xor_sync(kFullMask, own, 9);
  out[5] = __ballot_sync(kFullMask, lane % 3 == 0);
  out[6] = __any_sync(kFullMask, lane == 31);
  out[7] = __all_sync(kFullMask, lane != 31);
  out[8] = __reduce_add_sync(kFullMask, own);
  const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16)
    out[9] = __ballot_sync(0xffffu, lane % 2);
  else
    out[9] = __ballot_sync(0xffff0000u, lane % 4 == 0);
  out[10] = __shfl_sync(half, own, lane < 16 ? 2 : 20);
  uint64_t wide = static_cast<uint64_t>(lane) << 40;
  out[11] = static_cast<uint32_t>(__shfl_sync(kFullMask, wide, 7) >> 40);
  if (lane % 2 == 0) __syncwarp(0x55555555u);
  out[12] = __syncthreads_count(lane < 7);
  if (lane >= 24) return;
  out[13] = __ballot_sync(kFullMask, 1);  // lanes that have ended are not waited for
  __syncthreads();
}

// One warp a row at a time: global -> shared -> global; then the signal.
template <SelftestConfig kCfg>
__device__ void copy(const SelftestParams& p, int warp, int lane) {
  char* const rows = ptx::dynamic_shared();
  char* row = rows + warp * kCfg.row_bytes;
  uint64_t* const bar = reinterpret_cast<uint64_t*>(rows + kCfg.num_warps * kCfg.row_bytes) + warp;
  uint32_t bytes = kCfg.row_bytes;
  if (p.kind == kCopyMisaligned) row += 8;
  if (p.kind == kCopyOddSize) bytes -= 8;
  if (p.kind == kCopyOutside) row += (kCfg.num_warps - warp) * kCfg.row_bytes + kCfg.num_warps * 16;
  if (lane == 0) {
    if (p.kind != kNoBarrierInit) ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
    uint32_t phase = 0;
    for (int i = blockIdx.x * kCfg.num_warps + warp; i < p.num_rows;
         i += gridDim.x * kCfg.num_warps) {
      const int64_t at = static_cast<int64_t>(i) * kCfg.row_bytes;
      ptx::mbarrier_arrive_expect_tx(bar, bytes);
      ptx::bulk_load(row, p.src + at, bytes, bar);
      if (p.kind != kCopyNoLoadWait)
        while (!ptx::mbarrier_try_wait(bar, phase)) {
        }
      phase ^= 1;
      for (uint32_t j = 0; j < bytes; ++j) row[j] ^= 0x5a;
      ptx::fence_proxy_async();
      ptx::bulk_store(p.dst + at, row, bytes);
      if (p.kind != kCopyNoCommit) ptx::bulk_commit();
      if (p.kind != kCopyNoReadWait) ptx::bulk_wait_read();
    }
    if (p.kind != kCopyNoStoreWait) ptx::bulk_wait();
  }
  __syncthreads();
  if (threadIdx.x == 0) ptx::st_release_sys(p.own + blockIdx.x, 1);
}

// Another rank sums up what the first one has published.
template <SelftestConfig kCfg>
__device__ void consume(const SelftestParams& p) {
  for (int b = 0; b < p.num_rows; ++b)
    while (ptx::ld_acquire_sys(p.own + b) == 0) {
    }
  uint32_t wrong = 0;
  for (int i = threadIdx.x; i < p.num_rows * kCfg.row_bytes; i += blockDim.x)
    wrong += (p.dst[i] ^ 0x5a) != p.src[i];
  atomicAdd(p.out, wrong);
}

__device__ inline void ring(const SelftestParams& p) {
  if (threadIdx.x != 0) return;
  const uint64_t start = ptx::globaltimer();
  for (uint64_t round = 1; round <= 10; ++round) {
    if (p.rank == 0) ptx::st_release_sys(p.next, round);
    while (ptx::ld_acquire_sys(p.own) < round)
      if (ptx::globaltimer() - start > p.timeout_ns) {
        p.out[0] = 1;
        return;
      }
    if (p.rank != 0) ptx::st_release_sys(p.next, round);
  }
  p.out[0] = 0;
}

__device__ inline bool signals_itself(const SelftestParams& p) {
  return p.kind == kPutFence || p.kind == kPutNoFence || p.kind == kPutOtherThread;
}

// One warp a row at a time, from one place to all rows of the next rank.
template <SelftestConfig kCfg>
__device__ void put_rows(const SelftestParams& p, int warp, int lane) {
  char* const src = const_cast<char*>(p.src) + warp * kCfg.row_bytes;
  uint64_t bytes = kCfg.row_bytes;
  if (p.kind == kPutMisaligned) bytes -= 8;
  for (int i = warp; i < p.num_rows; i += kCfg.num_warps) {
    char* dst = p.dst + i * kCfg.row_bytes;
    if (p.kind == kPutOutside) dst += (p.num_rows - i) * kCfg.row_bytes - 16;
    if (p.kind == kPutUnequal && lane == 7) dst += 16;
    const auto fill = [&] {
      for (int j = lane; j < kCfg.row_bytes; j += kWarpSize) src[j] = static_cast<char>(i * 7 + j);
      __syncwarp();
    };
    if (p.kind != kPutFillsLate) fill();
    if (signals_itself(p)) {
      epjit_put(p.transport, dst, src, bytes, p.pe);
      if (lane == 0 && p.kind != kPutNoFence) epjit_fence(p.transport);
      if (lane == (p.kind == kPutOtherThread)) epjit_signal(p.transport, p.own + i, 1, p.pe);
    } else {
      epjit_put_signal(p.transport, dst, src, bytes, p.own + i, 1, p.pe);
      if (p.kind == kPutTwice) epjit_put_signal(p.transport, dst, src, bytes, p.own + i, 1, p.pe);
    }
    if (p.kind == kPutFillsLate) fill();
    if (lane == 0 && p.kind != kPutNoQuiet) epjit_quiet(p.transport);
    __syncwarp();
  }
}

// Counts the bytes that are wrong when the signal of their row is there.
template <SelftestConfig kCfg>
__device__ void take_rows(const SelftestParams& p, int warp, int lane) {
  uint32_t wrong = 0;
  for (int i = warp; i < p.num_rows; i += kCfg.num_warps) {
    while (ptx::ld_acquire_sys(p.own + i) == 0) {
    }
    if (!signals_itself(p) && p.kind != kPutNotReceived) {
      __syncwarp();
      warp_received(p.transport, lane);
    }
    for (int j = lane; j < kCfg.row_bytes; j += kWarpSize)
      wrong += p.dst[i * kCfg.row_bytes + j] != static_cast<char>(i * 7 + j);
  }
  atomicAdd(p.out, wrong);
}

// Every thread reads the word of a neighbour: across a warp and across the block. Wrong ones leave a
// barrier out.
__device__ inline void exchange(const SelftestParams& p, int thread, int lane) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const int num_threads = static_cast<int>(blockDim.x);
  uint32_t& own = words[thread];
  own = thread;
  if (p.kind != kWarpRace) __syncwarp();
  uint32_t sum = words[thread - lane + (lane + 1) % kWarpSize];
  if (p.kind != kReadRace) __syncthreads();
  sum += words[(thread + kWarpSize) % num_threads];
  if (p.kind != kWriteRace) __syncthreads();
  own = 0;
  __syncthreads();
  atomicAdd(&words[0], 1u);
  if (p.kind != kAtomicRace) __syncthreads();
  p.out[thread] = sum + words[0];
}

template <SelftestConfig kCfg>
__device__ void selftest(const SelftestParams& p) {
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  switch (p.kind) {
    case kIndices:
      p.out[blockIdx.x * blockDim.x + thread] =
          p.rank * 1000000 + gridDim.x * 10000 + blockIdx.x * 1000 + thread;
      break;
    case kCollectives:
      collectives(p, lane);
      break;
    case kAtomics: {
      uint32_t* const counter = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
      if (thread == 0) *counter = 0;
      __syncthreads();
      atomicAdd(counter, 1u);
      __syncthreads();
      if (thread == 0) atomicAdd(p.out, *counter);
      ptx::atom_add_acq_rel_gpu(p.out + 1, 2);
      ptx::atom_cas_sys(p.out + 2, 0, 100 + thread);
      break;
    }
    case kPlainIncrement:
      for (int i = 0; i < 20; ++i) {
        const uint32_t old = *static_cast<volatile uint32_t*>(p.out);
        if (old < 1000000) *static_cast<volatile uint32_t*>(p.out) = old + 1;
      }
      break;
    case kCopy:
    case kCopyNoLoadWait:
    case kCopyNoStoreWait:
    case kCopyNoReadWait:
    case kCopyNoCommit:
    case kCopyMisaligned:
    case kCopyOddSize:
    case kCopyOutside:
    case kNoBarrierInit:
      if (p.rank == 0)
        copy<kCfg>(p, warp, lane);
      else
        consume<kCfg>(p);
      break;
    case kPut:
    case kPutNoQuiet:
    case kPutFillsLate:
    case kPutNotReceived:
    case kPutTwice:
    case kPutFence:
    case kPutNoFence:
    case kPutOtherThread:
    case kPutUnequal:
    case kPutOutside:
    case kPutMisaligned:
      if (p.rank == 0)
        put_rows<kCfg>(p, warp, lane);
      else
        take_rows<kCfg>(p, warp, lane);
      break;
    case kExchange:
    case kReadRace:
    case kWriteRace:
    case kWarpRace:
    case kAtomicRace:
      exchange(p, thread, lane);
      break;
    case kRing:
      ring(p);
      break;
    case kBarrierOfHalf:
      if (warp == 0) __syncthreads();
      if (warp != 0)
        while (ptx::ld_acquire_sys(p.own) == 0) {
        }
      __syncthreads();
      __syncthreads();
      break;
    case kWarpAgainstBlock:
      if (lane < 16)
        __syncwarp();
      else
        __syncthreads();
      break;
    case kDivergentShuffle: {
      uint32_t value;
      if (lane < 16)
        value = __shfl_sync(kFullMask, lane, 0);
      else
        value = __shfl_sync(kFullMask, lane, 1);
      p.out[thread] = value;
      break;
    }
    case kShuffleFromOutside:
      if (lane < 16) p.out[thread] = __shfl_sync(0xffffu, lane, 20);
      break;
    case kPollForever:
      while (ptx::ld_acquire_sys(p.own) == 0) {
      }
      break;
    case kConvert:
      for (int i = thread; i < p.num_rows; i += blockDim.x) {
        const Float2 pair = reinterpret_cast<const Float2*>(p.src)[i];
        p.out[6 * i] = ptx::float2_to_bf16x2(pair);
        p.out[6 * i + 1] = ptx::float2_to_f16x2(pair);
        const Float2 bf16 = ptx::bf16x2_to_float2(p.out[6 * i]),
                     f16 = ptx::f16x2_to_float2(p.out[6 * i + 1]);
        p.out[6 * i + 2] = __float_as_uint(bf16.x);
        p.out[6 * i + 3] = __float_as_uint(bf16.y);
        p.out[6 * i + 4] = __float_as_uint(f16.x);
        p.out[6 * i + 5] = __float_as_uint(f16.y);
      }
      break;
    case kOverrun:
      p.out[p.num_rows + thread] = 1;
      break;
    case kBadShift:
      p.out[thread] = 1 << (p.num_rows + thread);
      break;
    case kMisalignedVector:
      ptx::st_v4(p.dst + 4, ptx::ld_v4(p.src));
      break;
  }
}

}  // namespace epjit

// CUDA's language and built-ins with a CPU meaning, so that g++ compiles the kernel files as they
// are.
//
// Every CUDA thread is a fiber: a stack of its own, all on one OS thread. Fibers change hands only
// inside the functions declared here (a poll, a collective, an atomic) and, seldom, at the end of a
// basic block (-fsanitize-coverage=trace-pc), in an order drawn from a seed; emulate.cpp is the
// scheduler. A launch that is wrong (a barrier that cannot complete, a misaligned bulk copy, a wild
// pointer, a race in shared memory) ends with a message that names rank, block, thread and place.
//
// What it cannot say: order of global memory (fences do nothing; every write is seen at once, by
// everybody) and speed.
#pragma once
#include <stdint.h>

// Always inlined, so that the place of a yield is a line of the kernel.
#define EMULATE_INLINE inline __attribute__((always_inline))

#define __CUDA_ARCH__ 900
#define __device__
#define __host__
#define __global__
#define __forceinline__ EMULATE_INLINE
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

namespace emulate {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// A thread, as it knows itself. `shared` is the dynamic shared memory of its block.
struct Thread {
  Dim3 thread_index, block_index, block_dim, grid_dim;
  char* shared;
  unsigned shared_bytes;
  int rank;
};

extern Thread* current;      // the fiber that runs
extern bool is_preemptible;  // false: a basic block does not end in a yield

// ---- the scheduler (emulate.cpp) ----------------------------------------------------------------

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void poll();           // another fiber runs; called on each look at memory that others write
void perhaps_yield();  // the same, now and then
void acquired(const uint64_t* word);  // this thread has looked at it
uint64_t nanoseconds();

// Waits until all lanes named in `mask` are here; the 32 values that they brought (0 for the
// others). `kind` and `line` tell one collective from another: lanes that meet in different ones
// are an error.
const uint64_t* meet(int kind, unsigned mask, uint64_t value, int line);
// Waits for all threads of the block; how many brought true.
unsigned block_barrier(bool value);
// bar.sync id, count
void named_barrier(int id, unsigned count);

// ---- bulk copies (emulate.cpp): complete at a drawn time ----------------------------------------

void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_arrive(uint64_t* barrier, unsigned count, int64_t expect_bytes);
bool mbarrier_try_wait(uint64_t* barrier, unsigned parity);
void bulk_load(void* shared_dst, const void* global_src, unsigned bytes, uint64_t* barrier);
void bulk_store(void* global_dst, const void* shared_src, unsigned bytes);
void bulk_commit();
void bulk_wait(int pending_groups, bool read_only);

// ---- epjit/transport.cuh (emulate.cpp) -----------------------------------------------------------
//
// `transport` is the address of a record of u64, made by transport() of build.py:
//   number of ranks, own pe, number of regions; then for each region its bytes and the address of
//   each pe's
// Addresses may lie in any region of the own pe; a copy may not leave its region. A put goes in up to
// three pieces, each at a time drawn from the seed. It reads its source when it lands or, less often,
// at once, so that a source that changes too early or is filled too late is seen. Only what the
// header promises holds back a message: a signal its own bytes; a fence what its thread sends to the
// same pe (a warp's put is sent by each of its threads). quiet() waits for what its thread has sent.
// The end of a kernel waits for nothing, the end of the run for everything.

// ---- helpers of the built-ins -------------------------------------------------------------------

enum Kind : int { kSync, kShuffle, kBallot, kAny, kAll, kReduce, kMatch, kPut };

template <typename T>
EMULATE_INLINE uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
EMULATE_INLINE T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

EMULATE_INLINE int lane() { return static_cast<int>(current->thread_index.x % 32); }

template <typename T>
EMULATE_INLINE T shuffle(unsigned mask, T value, int source, bool in_range, int line) {
  const uint64_t* values = meet(kShuffle, mask, to_bits(value), line);
  if (!in_range) return value;
  if (!(mask >> source & 1))
    fail("shuffle reads lane %d, which mask %#x does not name", source, mask);
  return from_bits<T>(values[source]);
}

template <typename Fold>
EMULATE_INLINE unsigned reduce(unsigned mask, unsigned value, int line, Fold fold) {
  const uint64_t* values = meet(kReduce, mask, value, line);
  bool first = true;
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const unsigned other = static_cast<unsigned>(values[i]);
    result = first ? other : fold(result, other);
    first = false;
  }
  return result;
}

template <typename T, typename Change>
EMULATE_INLINE T atomic(T* address, Change change) {
  perhaps_yield();
  is_preemptible = false;
  const T old = *address;
  *address = change(old);
  is_preemptible = true;
  perhaps_yield();
  return old;
}

}  // namespace emulate

#define threadIdx (::emulate::current->thread_index)
#define blockIdx (::emulate::current->block_index)
#define blockDim (::emulate::current->block_dim)
#define gridDim (::emulate::current->grid_dim)

// ---- barriers -----------------------------------------------------------------------------------

EMULATE_INLINE void __syncthreads() { emulate::block_barrier(false); }
EMULATE_INLINE int __syncthreads_count(int value) {
  return static_cast<int>(emulate::block_barrier(value != 0));
}
EMULATE_INLINE int __syncthreads_or(int value) { return emulate::block_barrier(value != 0) != 0; }
EMULATE_INLINE int __syncthreads_and(int value) { return emulate::block_barrier(value == 0) == 0; }
EMULATE_INLINE void __syncwarp(unsigned mask = 0xffffffffu, int line = 0) {
  emulate::meet(emulate::kSync, mask, 0, line);
}

// ---- shuffles and votes -------------------------------------------------------------------------

template <typename T>
EMULATE_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                             int line = __builtin_LINE()) {
  const int base = emulate::lane() & ~(width - 1);
  return emulate::shuffle(mask, value, base + (source & (width - 1)), true, line);
}
template <typename T>
EMULATE_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                int line = __builtin_LINE()) {
  const int source = emulate::lane() - static_cast<int>(delta);
  return emulate::shuffle(mask, value, source, source >= (emulate::lane() & ~(width - 1)), line);
}
template <typename T>
EMULATE_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                  int line = __builtin_LINE()) {
  const int source = emulate::lane() + static_cast<int>(delta);
  return emulate::shuffle(mask, value, source, source <= (emulate::lane() | (width - 1)), line);
}
template <typename T>
EMULATE_INLINE T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                                 int line = __builtin_LINE()) {
  const int source = emulate::lane() ^ flip;
  return emulate::shuffle(mask, value, source, source <= (emulate::lane() | (width - 1)), line);
}

EMULATE_INLINE unsigned __ballot_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  const uint64_t* values = emulate::meet(emulate::kBallot, mask, value != 0, line);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(values[i]) << i;
  return result;
}
EMULATE_INLINE int __any_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  const uint64_t* values = emulate::meet(emulate::kAny, mask, value != 0, line);
  for (int i = 0; i < 32; ++i)
    if (values[i]) return 1;
  return 0;
}
EMULATE_INLINE int __all_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  const uint64_t* values = emulate::meet(emulate::kAll, mask, value == 0, line);
  for (int i = 0; i < 32; ++i)
    if (values[i]) return 0;
  return 1;
}
template <typename T>
EMULATE_INLINE unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  const uint64_t own = emulate::to_bits(value);
  const uint64_t* values = emulate::meet(emulate::kMatch, mask, own, line);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(values[i] == own) << i;
  return result & mask;
}
EMULATE_INLINE unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                          int line = __builtin_LINE()) {
  return emulate::reduce(mask, value, line, [](unsigned a, unsigned b) { return a + b; });
}
EMULATE_INLINE unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                         int line = __builtin_LINE()) {
  return emulate::reduce(mask, value, line, [](unsigned a, unsigned b) { return a | b; });
}
EMULATE_INLINE unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                          int line = __builtin_LINE()) {
  return emulate::reduce(mask, value, line, [](unsigned a, unsigned b) { return a > b ? a : b; });
}

// ---- atomics ------------------------------------------------------------------------------------

template <typename T>
EMULATE_INLINE T atomicAdd(T* address, T value) {
  return emulate::atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
EMULATE_INLINE T atomicMax(T* address, T value) {
  return emulate::atomic(address, [&](T old) { return old > value ? old : value; });
}
template <typename T>
EMULATE_INLINE T atomicOr(T* address, T value) {
  return emulate::atomic(address, [&](T old) { return static_cast<T>(old | value); });
}
template <typename T>
EMULATE_INLINE T atomicExch(T* address, T value) {
  return emulate::atomic(address, [&](T) { return value; });
}
template <typename T>
EMULATE_INLINE T atomicCAS(T* address, T expected, T desired) {
  return emulate::atomic(address, [&](T old) { return old == expected ? desired : old; });
}

// ---- arithmetic ---------------------------------------------------------------------------------

template <typename A, typename B>
constexpr auto min(A a, B b) -> decltype(a + b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr auto max(A a, B b) -> decltype(a + b) {
  return a < b ? b : a;
}

EMULATE_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATE_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMULATE_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMULATE_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
EMULATE_INLINE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
EMULATE_INLINE float __uint_as_float(unsigned x) { return emulate::from_bits<float>(x); }
EMULATE_INLINE float __int_as_float(int x) {
  return emulate::from_bits<float>(static_cast<unsigned>(x));
}
EMULATE_INLINE unsigned __float_as_uint(float x) {
  return static_cast<unsigned>(emulate::to_bits(x));
}
EMULATE_INLINE int __float_as_int(float x) { return static_cast<int>(emulate::to_bits(x)); }

// Of NaNs a GPU's arithmetic knows one, positive; those of the CPU have signs.
EMULATE_INLINE float emulated_result(float x) { return x == x ? x : __uint_as_float(0x7fffffffu); }
EMULATE_INLINE float __fmul_rn(float a, float b) { return emulated_result(a * b); }
EMULATE_INLINE float __fadd_rn(float a, float b) { return emulated_result(a + b); }
EMULATE_INLINE float fabsf(float x) { return __builtin_fabsf(x); }
EMULATE_INLINE float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }

EMULATE_INLINE void __threadfence() {}
EMULATE_INLINE void __threadfence_block() {}
EMULATE_INLINE void __threadfence_system() {}
EMULATE_INLINE void __nanosleep(unsigned) { emulate::poll(); }
[[noreturn]] EMULATE_INLINE void __trap() { emulate::fail("__trap()"); }

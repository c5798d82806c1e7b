// The only place that waits, and what a rank tells its peers.
//
// Every rank owns, in symmetric memory, outside what users may write:
//   signals [40] u64
//      0 ..  7  finish[peer]            epoch of the last operation that the peer has finished
//      8 .. 23  done[peer][window & 1]  (epoch, window + 1): the peer has used up its slots
//     24 .. 31  notify[peer]            epoch of the last notify whose counts the peer has written
//     32 .. 39  entered[peer]           epoch of the last operation that the peer has started
//   words   [num_ranks, num_slots] u64  one a (source rank, slot): what lies in the slot
//   places  [num_ranks, 8] u64          a row a peer: where its outputs lie
//   notify  [num_ranks, notify_stride] i32  counts, written by notify.cu
// One writer each, and every comparison tells what an earlier operation has left, however long ago
// (has_reached, make_word), so nothing is ever reset.
//
// An operation (notify, dispatch, combine) has an epoch: one more than the word `epoch` in own
// memory holds. Its first write to memory that a peer may still use is preceded by enter(): every
// peer has finished epoch - 1. Its last block calls finish_operation(). The epoch lives on the
// device, so a CUDA graph replays.
//
// Slots are used in windows: token t lies in slot t % num_slots and belongs to window t /
// (num_slots / 2). Window w overwrites the slots of window w - 2, so its writer first waits for
// done(w - 2) of all that read those.
//
// A wait that runs out of time does not trap: it writes one fault record to host memory, raises the
// rank's abort word, and from then on every wait of this rank fails. A failed wait makes its warp
// leave for the end of the kernel. The record names the peer that never started the operation, if
// there is one: ranks that wait for it make others wait in turn. With a mask (the low-latency
// mode's enable_shrink) the peer is masked instead: every wait for it fails, and nothing else.
//
// More rows than a rank has room for are no fault of a wait: they are left out, all others go where
// they belong, and nobody waits for those that were. The rank writes an overflow record, which its
// host raises once, and no abort word: its peers, and the operations behind, go on.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

// Number of a wait in a fault record.
// Python reads these lines: "name = value,  // operation: text".
enum WaitTag : int32_t {
  kWaitNotifyStart = 1,                // notify: its start
  kWaitNotifyEntry = 2,                // notify: the end of its previous operation
  kWaitNotifyCounts = 3,               // notify: its counts
  kWaitDispatchStart = 4,              // dispatch: its start
  kWaitDispatchEntry = 5,              // dispatch: the end of its previous operation
  kWaitDispatchWindow = 6,             // dispatch: slots that it still reads
  kWaitDispatchToken = 7,              // dispatch: its token
  kWaitCombineStart = 8,               // combine: its start
  kWaitCombineEntry = 9,               // combine: the end of its previous operation
  kWaitCombineWindow = 10,             // combine: slots that it still reads
  kWaitCombineToken = 11,              // combine: the row of token
  kWaitLowLatencyDispatchStart = 12,   // low_latency_dispatch: its start
  kWaitLowLatencyDispatchCounts = 13,  // low_latency_dispatch: its count
  kWaitLowLatencyDispatchToken = 14,   // low_latency_dispatch: its token
  kWaitLowLatencyCombineStart = 15,    // low_latency_combine: its start
  kWaitLowLatencyCombineRow = 16,      // low_latency_combine: the row of selection
  kWaitCleanStart = 17,                // clean_low_latency_buffer: its start
  kWaitNotifyReady = 18,               // notify: the start of its NVLink domain
  kWaitNotifyArrival = 19,             // notify: its counts from another NVLink domain
  kWaitDispatchReady = 20,             // dispatch: the start of its NVLink domain
  kWaitDispatchCredit = 21,            // dispatch: slots that its NVLink domain still reads
  kWaitDispatchArrival = 22,           // dispatch: its chunk from another NVLink domain, at token
  kWaitCombineReady = 23,              // combine: the start of its NVLink domain
  kWaitCombineCredit = 24,             // combine: slots that it still reads, between NVLink domains
  kWaitCombineArrival = 25,            // combine: the sum of its NVLink domain for token
  kWaitDispatchPlace = 26,             // dispatch: where its outputs lie
  kWaitDispatchRows = 27,              // dispatch: the last of its rows
  // Not waits: what report_at_once says of the rank itself, and what an overflow record says.
  kRoomLowLatencyCombineSlab = 28,  // low_latency_combine: no room in a slab for selection
  kRoomDispatchRows = 29,           // dispatch: rows come to
  kRoomDispatchPassing = 30,        // dispatch: tokens pass into the NVLink domain through
  kRoomCombineRows = 31,            // combine: rows are to go back from
};

// Base of the parameters of all kernels that wait; "own" is memory of a rank that no peer reaches.
// (Bases have fields of 64 bits alone: numbers that are neighbours are loaded together, and a kernel
// near the limit of its registers spills when its neighbours are others.)
struct Operation {
  uint64_t signals[kMaxRanks];  // symmetric, of each rank that shares them
  uint32_t* epoch;              // own [1]
  uint64_t* fault;              // host [2, 8], see Waiter; of the low-latency mode [8]
  uint32_t* abort;              // own [1]
  uint64_t timeout_ns;          // of one wait
};

// ---- signals ------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t* finish_signal(uint64_t signals, int peer) {
  return reinterpret_cast<uint64_t*>(signals) + peer;
}

__device__ __forceinline__ uint64_t* done_signal(uint64_t signals, int peer, int window) {
  return reinterpret_cast<uint64_t*>(signals) + kMaxRanks + 2 * peer + (window & 1);
}

__device__ __forceinline__ uint64_t* notify_signal(uint64_t signals, int peer) {
  return reinterpret_cast<uint64_t*>(signals) + 3 * kMaxRanks + peer;
}

__device__ __forceinline__ uint64_t* entered_signal(uint64_t signals, int peer) {
  return reinterpret_cast<uint64_t*>(signals) + 4 * kMaxRanks + peer;
}

// Epochs and windows share one number; the epoch is its upper half.
__device__ __forceinline__ uint64_t stamp(uint32_t epoch, uint32_t window) {
  return static_cast<uint64_t>(epoch) << 32 | window;
}

// ---- waits --------------------------------------------------------------------------------------

// Place of the ranks that share the signals in the group, when there are several NVLink domains.
struct Domains {
  const int32_t* ranks;   // [num_domains, num_ranks]: numbers in the group; null: one domain
  const uint64_t* rails;  // [num_ranks], address of [2, num_domains, 2] u64 of each of these ranks:
                          // epoch & 1: last operation that its rail peer in a domain has started,
                          // by two messages, either of which may come first
  int32_t domain;
  int32_t num_domains;
};

// Who waits; the same for a whole kernel.
struct Waiter {
  uint64_t* fault;      // host memory, [2, 8]: state, tag, rank, peer, index, expected, seen, epoch
                        // of a wait; the same of an overflow: expected = room, seen = what came
  uint32_t* abort;      // own [1]: not zero once a wait of this rank has failed
  uint64_t timeout_ns;  // of one wait
  uint64_t signals;     // this rank's
  int32_t rank;         // among those that share the signals
  int32_t num_ranks;    // that share the signals
  uint32_t epoch;
  WaitTag start_tag;  // what a record calls a peer that never started
  uint32_t* mask;     // own [num_ranks], 1 = masked; null: a late peer is a fault
  Domains domains;
  bool leaves = false;  // a wait that runs out of time says nothing: the block leaves

  // Number in the group, as a fault record has it, of a rank that shares the signals.
  __device__ __forceinline__ int name(int peer) const {
    return domains.ranks == nullptr ? peer : domains.ranks[domains.domain * num_ranks + peer];
  }
};

__device__ __forceinline__ bool is_masked(const Waiter& waiter, int peer) {
  return waiter.mask != nullptr && ptx::ld_relaxed_gpu(waiter.mask + peer) != 0;
}

// A peer that is masked may start nothing for ever; its `entered` is drawn along behind this rank, or
// after 2^31 operations it would look like one of the future.
__device__ __forceinline__ void draw_along(const Waiter& waiter, int peer) {
  if (!is_masked(waiter, peer)) return;
  uint32_t* const epoch = reinterpret_cast<uint32_t*>(entered_signal(waiter.signals, peer)) + 1;
  const uint32_t seen = ptx::ld_acquire_sys(epoch), oldest = waiter.epoch - (1u << 30);
  if (static_cast<int32_t>(seen - oldest) < 0) ptx::atom_cas_sys(epoch, seen, oldest);
}

// From the parameters of a kernel; tells the peers that this rank has started the operation. `rank`
// and the peers are counted among those that share the signals. `mask` as in Waiter.
template <int kNumRanks, typename Params>
__device__ __forceinline__ Waiter start_operation(const Params& p, WaitTag start_tag, int rank,
                                                  Domains domains, uint32_t* mask = nullptr) {
  const Waiter waiter{p.fault,
                      p.abort,
                      p.timeout_ns,
                      p.signals[rank],
                      rank,
                      kNumRanks,
                      ptx::ld_relaxed_gpu(p.epoch) + 1,
                      start_tag,
                      mask,
                      domains};
  if (blockIdx.x == 0 && threadIdx.x < kNumRanks && threadIdx.x != rank) {
    ptx::st_relaxed_sys(entered_signal(p.signals[threadIdx.x], rank), stamp(waiter.epoch, 0));
    draw_along(waiter, threadIdx.x);
  }
  return waiter;
}

template <int kNumRanks, typename Params>
__device__ __forceinline__ Waiter start_operation(const Params& p, WaitTag start_tag,
                                                  uint32_t* mask = nullptr) {
  return start_operation<kNumRanks>(p, start_tag, p.rank, Domains{nullptr, nullptr, 0, 1}, mask);
}

// Whether a signal of this operation has come, or already one of the next: no peer is further ahead,
// for it enters no operation before this rank has finished the one before. A signal of any other
// operation is old, also where the epoch has wrapped around since: `done`, say, is only told in
// operations with more tokens than slots, and there may be none for 2^31 others. (Only one of exactly
// 2^32 operations ago, or one less, would look new: a month of them without such an operation, and
// then one in that very place.)
__device__ __forceinline__ bool has_reached(uint64_t signal, uint64_t expected) {
  return signal - expected < uint64_t{2} << 32;
}

// Whether a peer has started an operation, by `entered`. It may be any number ahead (what is queued
// behind its fault does not wait), and is never far behind, as every operation tells.
__device__ __forceinline__ bool has_started(uint64_t entered, uint32_t epoch) {
  return static_cast<int32_t>(static_cast<uint32_t>(entered >> 32) - epoch) >= 0;
}

// Whether this rank may write to a peer in a mode without waits before writing: the peer is not
// masked, nor so far ahead (which it can be when it has masked this rank) that it uses the half of
// this operation again. A peer that gets there between this and the write is not noticed.
__device__ __forceinline__ bool may_send(const Waiter& waiter, int peer) {
  if (waiter.mask == nullptr || peer == waiter.rank) return true;
  return ptx::ld_relaxed_gpu(waiter.mask + peer) == 0 &&
         !has_started(ptx::ld_acquire_sys(entered_signal(waiter.signals, peer)), waiter.epoch + 2);
}

// The same for all lanes of a warp.
__device__ __forceinline__ bool warp_may_send(const Waiter& waiter, int peer) {
  return __all_sync(kFullMask, may_send(waiter, peer));
}

// Rank i of all domains: its number, and what says which operation it has started.
__device__ inline const uint64_t* entered_by(const Waiter& waiter, int i, int& number) {
  const int domain = i / waiter.num_ranks, rank = i % waiter.num_ranks;
  number = waiter.domains.ranks == nullptr ? i : waiter.domains.ranks[i];
  if (domain == waiter.domains.domain) return entered_signal(waiter.signals, rank);
  return reinterpret_cast<const uint64_t*>(waiter.domains.rails[rank]) + 2 * domain +
         (waiter.epoch & 1);
}

constexpr int kRecordWords = 8;
constexpr int kNoBound = 0x7fffffff;  // room for whatever comes

__device__ __forceinline__ void write_record(uint64_t* to, WaitTag tag, int rank, int peer,
                                             uint64_t index, uint64_t expected, uint64_t seen,
                                             uint32_t epoch) {
  const uint64_t record[kRecordWords] = {1,
                                         static_cast<uint64_t>(tag),
                                         static_cast<uint64_t>(rank),
                                         static_cast<uint64_t>(peer),
                                         index,
                                         expected,
                                         seen,
                                         epoch};
  for (int i = 1; i < kRecordWords; ++i) ptx::st_relaxed_sys(to + i, record[i]);
  ptx::st_release_sys(to, record[0]);
}

__device__ inline void report_fault(const Waiter& waiter, WaitTag tag, int peer, uint64_t index,
                                    uint64_t expected, uint64_t seen) {
  if (ptx::atom_cas_sys(waiter.abort, 0, 1) != 0) return;  // the first one speaks
#pragma unroll 1  // or the registers of every kernel grow for what never happens
  for (int i = 0; i < waiter.domains.num_domains * waiter.num_ranks; ++i) {
    if (i == waiter.domains.domain * waiter.num_ranks + waiter.rank) continue;
    int number;
    const uint64_t* const word = entered_by(waiter, i, number);
    const uint64_t entered = ptx::ld_acquire_sys(word);
    if (has_started(entered, waiter.epoch)) continue;
    // Or by the other message of a rail peer.
    if (waiter.domains.ranks != nullptr && i / waiter.num_ranks != waiter.domains.domain &&
        has_started(ptx::ld_acquire_sys(word + 2 * waiter.domains.num_domains), waiter.epoch))
      continue;
    tag = waiter.start_tag, peer = number, index = 0;
    expected = stamp(waiter.epoch, 0), seen = entered;
    break;
  }
  write_record(waiter.fault, tag, waiter.name(waiter.rank), peer, index, expected, seen,
               waiter.epoch);
}

// Reports a fault that this rank finds by itself, without a wait.
__device__ inline void report_at_once(const Waiter& waiter, WaitTag tag, uint64_t index) {
  if (ptx::atom_cas_sys(waiter.abort, 0, 1) == 0)
    write_record(waiter.fault, tag, waiter.name(waiter.rank), waiter.name(waiter.rank), index,
                 stamp(waiter.epoch, 0), 0, waiter.epoch);
}

// By one thread, from the parameters of a kernel: `came` rows, of which `room` have a place. Not while
// the host has not read the last record.
template <typename Params>
__device__ __forceinline__ void report_overflow(const Params& p, uint32_t epoch, WaitTag tag,
                                                int room, int came) {
  uint64_t* const record = p.fault + kRecordWords;
  if (came > room && ptx::ld_acquire_sys(record) == 0)
    write_record(record, tag, p.rank, p.rank, 0, room, came, epoch);
}

// Polls until reached(value of *word) holds. False: the peer is masked, out of time, or another wait
// of this rank has failed.
template <typename Reached>
__device__ __forceinline__ bool wait_until(const Waiter& waiter, WaitTag tag, int peer,
                                           uint64_t index, uint64_t expected, const uint64_t* word,
                                           uint64_t& seen, Reached reached) {
  seen = ptx::ld_acquire_sys(word);
  if (reached(seen)) return true;
  const uint64_t start = ptx::globaltimer();
  for (uint32_t polls = 1;; ++polls) {
    seen = ptx::ld_acquire_sys(word);
    if (reached(seen)) return true;
    if (polls % 64 != 0) continue;
    if (ptx::ld_relaxed_gpu(waiter.abort) != 0 || is_masked(waiter, peer)) return false;
    if (ptx::globaltimer() - start > waiter.timeout_ns) {
      if (waiter.leaves) return false;
      if (waiter.mask != nullptr)
        atomicExch(waiter.mask + peer, 1u);
      else
        report_fault(waiter, tag, peer, index, expected, seen);
      return false;
    }
  }
}

__device__ __forceinline__ bool wait_signal(const Waiter& waiter, WaitTag tag, int peer,
                                            const uint64_t* signal, uint64_t expected) {
  uint64_t seen;
  return wait_until(waiter, tag, peer, 0, expected, signal, seen,
                    [&](uint64_t value) { return has_reached(value, expected); });
}

// ---- blocks that leave --------------------------------------------------------------------------

// A low-latency kernel takes all SMs, and a peer may be late. Were all of its blocks to wait for that
// peer, no other kernel of this GPU could start, and the peer may be waiting for one of those: two
// Buffers that two ranks use in different order, or a collective of another library beside them. So
// most blocks leave when a peer has not begun within kPatienceNs, and the first `num_staying` blocks,
// which are few, do their work: all work is drawn from counters, and no block waits for another one
// of its grid, so any blocks will do. A block waits so before it draws what depends on a peer; once
// all peers have begun, nothing that it waits for needs an SM that is not held already.
//
// For the same reason the next kernel in the stream, which starts early, is not let in before all
// peers have begun: its blocks would take the SMs that others have left.
constexpr uint64_t kPatienceNs = 1'000'000;

template <typename Params>
__device__ __forceinline__ bool is_staying(const Params& p) {
  return static_cast<int32_t>(blockIdx.x) < p.num_staying;
}

// A waiter of a block that leaves.
__device__ __forceinline__ Waiter leaving(Waiter waiter) {
  waiter.timeout_ns = kPatienceNs;
  waiter.leaves = true;
  return waiter;
}

// Waits for the bulk loads that complete on `bar`. They read mapped memory and need no peer to act,
// so there is nobody to name and no time limit; leaving before they land would let them overwrite
// shared memory that is in use again.
__device__ __forceinline__ void wait_bulk_loads(uint64_t* bar, uint32_t phase) {
  while (!ptx::mbarrier_try_wait(bar, phase)) {
  }
}

// True when all lanes of the warp say so; what any of them has acquired, all may use (a vote alone
// orders no memory).
__device__ __forceinline__ bool all_lanes(bool ok) {
  ok = __all_sync(kFullMask, ok);
  __syncwarp();
  return ok;
}

// A whole warp looks, until nothing is missing: look_at() gives each lane a bit for each thing that it
// misses; lane k knows which peer writes thing k, and its index. What lanes have found they hold in
// registers, so no memory is ordered; but they look together, as a line is read by one instruction.
// Without a mask.
template <typename LookAt>
__device__ __forceinline__ bool warp_wait(const Waiter& waiter, WaitTag tag, int peer,
                                          uint64_t index, LookAt look_at) {
  uint64_t start = 0;
#pragma unroll 1
  for (uint32_t polls = 1;; ++polls) {
    __syncwarp();
    const uint32_t missing = look_at();
    if (!__any_sync(kFullMask, missing != 0)) return true;
    if (polls == 1) start = ptx::globaltimer();
    if (polls % 64 != 0) continue;
    if (__any_sync(kFullMask, ptx::ld_relaxed_gpu(waiter.abort) != 0)) return false;
    if (!__any_sync(kFullMask, ptx::globaltimer() - start > waiter.timeout_ns)) continue;
    const int first = __ffs(__reduce_or_sync(kFullMask, missing)) - 1;
    if (threadIdx.x % kWarpSize == first)
      report_fault(waiter, tag, peer, index, stamp(waiter.epoch, 0), 0);
    return false;
  }
}

// One warp waits until all peers have begun, so that none of them is in an earlier operation when
// this one ends; it adds the cycles that it waited for each to `wait_cost`, if there is one. Then it
// lets the next kernel in.
template <int kRanks>
__device__ __forceinline__ bool meet_peers(const Waiter& waiter, int64_t* wait_cost, int lane) {
  bool ok = true;
  for (int peer = lane; peer < kRanks && ok; peer += kWarpSize) {
    if (peer == waiter.rank || is_masked(waiter, peer)) continue;
    const uint64_t start = ptx::clock64();
    uint64_t seen;
    ok = wait_until(waiter, waiter.start_tag, peer, 0, stamp(waiter.epoch, 0),
                    entered_signal(waiter.signals, peer), seen,
                    [&](uint64_t value) { return has_started(value, waiter.epoch); }) ||
         is_masked(waiter, peer);
    if (wait_cost != nullptr) wait_cost[peer] += static_cast<int64_t>(ptx::clock64() - start);
  }
  ok = all_lanes(ok);
  if (ok) ptx::griddepcontrol_launch_dependents();
  return ok;
}

// Lane r < num_ranks waits until rank r has finished the operation `epoch`. Called by a whole warp.
template <int kNumRanks>
__device__ __forceinline__ bool wait_finished(const Waiter& waiter, WaitTag tag, int lane,
                                              uint32_t epoch) {
  bool ok = true;
  if (lane < kNumRanks && lane != waiter.rank)
    ok = wait_signal(waiter, tag, waiter.name(lane), finish_signal(waiter.signals, lane),
                     stamp(epoch, 0));
  return all_lanes(ok);
}

// All peers have finished the operation before this one. Called by a whole warp.
template <int kNumRanks>
__device__ __forceinline__ bool enter(const Waiter& waiter, WaitTag tag, int lane) {
  return wait_finished<kNumRanks>(waiter, tag, lane, waiter.epoch - 1);
}

// ---- windows ------------------------------------------------------------------------------------

// Waits until `peer` has used up what window `window` overwrites: the slots of window - 2, which
// must exist.
__device__ __forceinline__ bool wait_window(const Waiter& waiter, WaitTag tag, int peer,
                                            int window) {
  return wait_signal(waiter, tag, peer, done_signal(waiter.signals, peer, window),
                     stamp(waiter.epoch, window - 1));
}

// Tells a rank, by its signals, that this rank has used up the slots of `window`.
__device__ __forceinline__ void signal_window(const Waiter& waiter, uint64_t signals, int window) {
  ptx::st_release_sys(done_signal(signals, waiter.rank, window), stamp(waiter.epoch, window + 1));
}

// ---- words --------------------------------------------------------------------------------------

// A word says which token of which call lies in a slot: epoch (32 bits), window / 2 modulo 256 (8
// bits), value (24 bits). Compared for equality, so that what an earlier call or window left behind
// never matches.
constexpr uint32_t kNoRow = 0xffffff;  // value: the token does not go to this rank

__device__ __forceinline__ uint64_t make_word(uint32_t epoch, int window, uint32_t value) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>((window >> 1) & 0xff) << 24 |
         value;
}

// The word of `token` in a rank's words [num_ranks, num_slots], whose row `writer` writes.
__device__ __forceinline__ uint64_t* word_address(uint64_t words, int writer, int num_slots,
                                                  int token) {
  return reinterpret_cast<uint64_t*>(words) + static_cast<int64_t>(writer) * num_slots +
         token % num_slots;
}

__device__ __forceinline__ uint32_t word_value(uint64_t word) {
  return static_cast<uint32_t>(word) & 0xffffff;
}

// Waits for the word of `token`; `word` is what was read.
__device__ __forceinline__ bool wait_word(const Waiter& waiter, WaitTag tag, int peer, int token,
                                          int window, const uint64_t* address, uint64_t& word) {
  const uint64_t expected = make_word(waiter.epoch, window, 0);
  return wait_until(waiter, tag, peer, token, expected, address, word,
                    [&](uint64_t value) { return value >> 24 == expected >> 24; });
}

// ---- places -------------------------------------------------------------------------------------

// A rank whose outputs lie in symmetric memory tells each peer where, for it to write rows there:
// { (epoch, 1), offsets of up to 6 arrays, 0 = no such array, rows of each }, or { (epoch, 0), . }
// when they lie elsewhere.
//
// The owner writes it again in its next dispatch. By then it has ended this one, so all that anybody
// was to write for it has come, and whoever reads the place only now, and takes it for that of this
// dispatch, has no more rows for the owner.
constexpr int kPlaceWords = 8;

__device__ __forceinline__ uint64_t* place_address(uint64_t places, int owner) {
  return reinterpret_cast<uint64_t*>(places) + owner * kPlaceWords;
}

// Waits for the place of `peer` and says whether it has one; then its offsets can be read.
__device__ __forceinline__ bool wait_place(const Waiter& waiter, WaitTag tag, int peer,
                                           const uint64_t* place, bool& has_place) {
  const uint64_t expected = stamp(waiter.epoch, 0);
  uint64_t seen;
  const bool ok = wait_until(waiter, tag, peer, 0, expected, place, seen,
                             [&](uint64_t value) { return has_reached(value, expected); });
  has_place = ok && (seen & 1) != 0;
  return ok;
}

// ---- the end of an operation --------------------------------------------------------------------

// Called by all threads of all blocks as their last act. True in the first warp of the block that
// comes last; it has zeroed `counters`, so that they are zero on entry of every kernel and no memset
// is launched.
//
// Order: writes of any thread -> __syncthreads -> acq_rel ticket (gpu) -> the last block.
__device__ __forceinline__ bool is_last_block(uint32_t* counters, int num_counters) {
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return false;
  const int lane = threadIdx.x;
  uint32_t ticket = 0;
  if (lane == 0) ticket = ptx::atom_add_acq_rel_gpu(counters, 1);
  ticket = __shfl_sync(kFullMask, ticket, 0);
  if (ticket != gridDim.x - 1) return false;
  for (int i = lane; i < num_counters; i += kWarpSize) counters[i] = 0;
  return true;
}

// is_last_block(), which then moves the epoch on and tells the peers (st.release.sys: cumulative). A
// rank with a fault stays silent: its peers must not take its rows for whole. True where
// is_last_block() is.
template <int kNumRanks, typename Params>
__device__ __forceinline__ bool finish_operation(const Params& p, const Waiter& waiter,
                                                 int num_counters) {
  if (!is_last_block(p.counters, num_counters)) return false;
  const int lane = threadIdx.x;
  if (lane == 0) *p.epoch = waiter.epoch;
  __syncwarp();
  if (lane < kNumRanks && lane != waiter.rank && ptx::ld_relaxed_gpu(waiter.abort) == 0)
    ptx::st_release_sys(finish_signal(p.signals[lane], waiter.rank), stamp(waiter.epoch, 0));
  return true;
}

}  // namespace epjit

// Dispatch inside one NVLink domain: each token goes once to every rank that owns one of its
// experts.
//
//   recv_x[rank_prefix[s - 1, d] + send_head_s[t, d]] = x_s[t]
//                              on rank d, for every rank s and token t with send_head_s[t, d] >= 0
//
// and the same for what travels with a token: scales, top-k (as local expert indices, -1
// elsewhere), its index t. Rows are bytes: one kernel serves every dtype. A row that does not lie
// below num_recv_rows of d is written nowhere, whatever rank_prefix and send_head say.
//
// The source writes each token to slots and tells every peer by a word; the peer copies it to its
// final row. A rank's own tokens touch no peer. Two places for the slots:
//
//   at the source (pull)  a token is staged once, and each peer pulls it from there straight to its
//                         final row: one copy a token before the links, none after them
//   at the reader (push)  a token goes straight over the links to each of its ranks, and is copied
//                         there once more: none before the links, one a row after them
//
// With `direct` (which pushes) a reader may have its outputs in symmetric memory. It says so to
// every peer at its start, with where they lie (sync.cuh, places), and the peers write to final rows
// there, and no words: every rank has the whole rank_prefix, so a source knows the row, and how many
// there may be is told with the place. There is room for these, so nobody waits for slots of this
// reader, and it pulls nothing. Whether it has room is its own affair: a peer without, in the same
// operation, is pushed to as ever.
//
//   slots[s]  [num_slots, slot_bytes]             pull: tokens of s; written by s, read by all
//   slots[d]  [num_ranks, num_slots, slot_bytes]  push: tokens for d; row (s, .) is written by s
//             Token t lies in slot t % num_slots: { row [hidden_bytes], scales [num_scales] u32,
//             topk_idx [num_topk] i32, topk_weights [num_topk] f32 }
//   words[d]  [num_ranks, num_slots]              row (s, .) on rank d is written by s: which token
//             lies in the slot, and its position among those that go to d, or that it does not
//
// With by_expert the outputs are rows by expert (by_expert.cuh): a token is loaded once, and stored
// once for each of its selections here. What follows it is then { scales, expert [num_topk] i32,
// position [num_topk] i32, topk_weights [num_topk] f32 }; a cached dispatch knows the first two from
// row_of, and sends none. Padding is filled by warps that have nothing else to do any more.
//
// With a format, rows of bf16 or fp16 are cast by the warps that stage them (cast.cuh), once, into the
// shared memory that rows are copied from, in both orders of rows: the links carry cast rows and their
// scales, and so do slots. hidden_bytes and num_scales (words) are of these.
//
// Stage   the first warps of a block: wait until the slots are free; x -> slots, and own tokens ->
//         recv_x; then the word of each token to each peer (release)
// Pull    all warps, when they have nothing to stage: wait for the words of a chunk of tokens
//         (acquire); slot -> recv_x
//
// Progress: a chunk is a run of neighbouring tokens. Staging warps take chunks in ascending order
// and only wait for peers to have pulled window w - 2 before they write window w. Pulling warps
// draw chunks in ascending order of tokens, the same for all sources, so whoever waits for window w
// has all earlier chunks drawn by a warp that needs nothing later. By induction over windows
// everything moves, whatever the size of the buffer, as a chunk spans at most two windows. Readers
// with room only add waits for what a rank says before it waits for anything: its place, and, at the
// end, that it has finished. The last block of a reader with room first says that it has finished
// (which is so for its peers: nothing of theirs is in its slots, and its own rows are written), then
// waits until all peers have, and with that all its rows have come: finish is a release after
// everything that a rank wrote. So peers never wait for a wait at the end.
//
// A place may be written to until its owner's kernel ends: the owner's stream has come past all that
// read the memory before (BlockPool in runtime/pool.py), so the word itself is the permission.
//
// Guessed room: the host may launch this kernel behind notify, before it knows how many rows come,
// with outputs of a guessed size and least_rows >= 0. A launch compares rank_prefix with these before
// all else, and when the rows do not fit, or leave too much of the outputs unused, it leaves at once:
// it reads no epoch, draws no ticket, tells nobody, and touches no output, so it is as if it had never
// been. The host sees the same counts, makes other outputs, and launches again; that launch does all.
// Each rank decides for itself. To its peers a rank between the two launches is a late one: they may
// push into its slots, which are free since it has finished notify, and wait for its words, windows
// and place as ever. Nothing of it waits for them: what its host does in between, such as a cudaFree
// that waits for all kernels of its GPU, waits for notify at most, which waits for the peers' notify,
// and no host holds that back for a dispatch. So every rank comes. (Had the first launch staged its
// tokens, it would wait for windows that peers pull, whose hosts may sit in such a cudaFree, which
// waits for their own first launches: a circle.)
//
// Launch: any grid that is resident as a whole, dispatch_threads() threads. Graph-safe.
#include "epjit/by_expert.cuh"
#include "epjit/cast.cuh"
#include "epjit/payload.cuh"
#include "epjit/windows.cuh"

namespace epjit {

struct DispatchConfig {
  int32_t num_ranks;
  int32_t hidden_bytes;  // of a row of x
  int32_t num_scales;    // 4-byte scales a token; 0 = none
  int32_t num_topk;      // 0 = none
  bool topk_is_int64;
  bool push;    // slots lie at the receiver, else at the source
  bool direct;  // with push: receivers may have room where rows go to their final place
  bool tma;     // rows move by bulk copies, else through registers
  int32_t num_warps;
  int32_t rows_per_warp;  // rows of a warp in shared memory, the most that it moves at a time
  bool by_expert;         // rows by expert; num_topk is not 0
  bool is_cached;         // by_expert: along row_of of an earlier dispatch
  bool has_weights;       // by_expert: topk_weights travel
  int32_t format;         // that rows are cast to (cast.cuh); kBf16: they stay as they are
  bool is_f16;            // rows that are cast are fp16, else bf16
};

struct DispatchParams : Operation {
  const char* x;           // [num_tokens, hidden_bytes], or what is cast to that
  const uint32_t* scales;  // [num_tokens, num_scales], strides below, in elements
  int64_t scale_token_stride;
  int64_t scale_stride;
  const void* topk_idx;          // [num_tokens, num_topk] int32 or int64, global experts
  const float* topk_weights;     // [num_tokens, num_topk]
  const int32_t* send_head;      // [num_tokens, num_ranks]: position in its segment, -1 = not sent
  const int32_t* rank_prefix;    // [num_ranks, num_ranks]: inclusive over sources (rows)
  const int32_t* source_tokens;  // [num_ranks]: tokens that each rank holds
  char* recv_x;                  // [num_recv_rows, hidden_bytes]
  uint32_t* recv_scales;         // [num_recv_rows, num_scales]
  void* recv_topk_idx;           // [num_recv_rows, num_topk], dtype of topk_idx, local experts
  float* recv_topk_weights;      // [num_recv_rows, num_topk]
  int32_t* recv_src_idx;         // [num_recv_rows]; null when the handle has it already
  uint64_t slots[kMaxRanks];     // symmetric, of each rank
  uint64_t words[kMaxRanks];     // symmetric, of each rank
  uint64_t places[kMaxRanks];    // symmetric, of each rank; direct only
  uint64_t outputs[kMaxRanks];   // symmetric, of each rank: what places count from; direct only
  // The next ones, up to the strides, are for by_expert alone; rows, scales and weights are
  // [num_expert_rows] then.
  const uint16_t* local_position;  // [num_tokens, num_topk], from layout; null when cached
  const int32_t* block_base;       // [blocks, num_experts], from notify; null when cached
  const int32_t* row_base;         // [num_ranks, experts_per_rank], from notify; null when cached
  const int32_t* ends;             // [experts_per_rank], from notify
  const int32_t* expert_counts;    // [experts_per_rank], from notify
  int32_t* row_of;                 // [num_recv_rows, num_topk]; read when cached, else written
  int64_t row_of_stride;           // of its rows, in elements
  int32_t* source;                 // [num_expert_rows]; null when cached
  int64_t recv_scale_row_stride;   // of recv_scales, in elements
  int64_t recv_scale_stride;
  const float* global_scale;  // [1], for kNvfp4
  // own [2 + 2 * num_ranks, one more by_expert]: ticket, next chunk, tokens pulled of (source, window
  // & 1), next part of the padding; zero on entry and on exit
  uint32_t* counters;
  bool has_room;            // the outputs lie in symmetric memory: peers write them; direct only
  int32_t num_slots;        // even, at least 2
  int32_t num_stage_warps;  // of a block, at least 1; fewer than all unless nothing is to be pulled
  int32_t num_tokens;
  int32_t num_recv_rows;  // rows of the outputs; those beyond what arrives get topk_idx -1
  int32_t least_rows;     // of a guess: fewer do not fit either; -1 = the rows are known or bounded
  int32_t experts_per_rank;
  int32_t num_expert_rows;  // by_expert
  bool zero_padding;        // by_expert: padding becomes zeros
  int32_t rank;
};

constexpr int dispatch_threads(DispatchConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int kCastRows = 4;  // whose scales a warp has in shared memory

constexpr int dispatch_shared_bytes(DispatchConfig cfg) {
  const bool casts = cfg.format != kBf16;
  return copier_shared_bytes(cfg.tma, cfg.num_warps, cfg.rows_per_warp, cfg.hidden_bytes, casts) +
         casts * cfg.num_warps * kCastRows * cfg.num_scales * 4;
}

// Words that travel with a selection.
constexpr int dispatch_choice_words(DispatchConfig cfg) {
  if (!cfg.by_expert) return 2;
  return (cfg.is_cached ? 0 : 2) + cfg.has_weights;
}

constexpr int dispatch_slot_bytes(DispatchConfig cfg) {
  const int words = cfg.num_scales + dispatch_choice_words(cfg) * cfg.num_topk;
  return align_up(cfg.hidden_bytes + 4 * words, 128);
}

// The outputs of a peer that has room; named as in DispatchParams.
struct DispatchOutputs {
  char* recv_x;
  uint32_t* recv_scales;
  void* recv_topk_idx;
  float* recv_topk_weights;
  int32_t* recv_src_idx;
  int32_t num_recv_rows;
  int32_t rank;
  int32_t experts_per_rank;

  __device__ bool has(int64_t row) const { return row >= 0 && row < num_recv_rows; }
};

template <DispatchConfig kCfg>
class Dispatch {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kRows = kCfg.rows_per_warp;
  static constexpr int kMostRows = kRows > 4 ? kRows : 4 / kRows * kRows;  // of a chunk
  static constexpr int kScales = kCfg.num_scales;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr bool kByExpert = kCfg.by_expert;
  static constexpr bool kCasts = kCfg.format != kBf16;
  // Items that travel beside a row; a selection is one. By expert selections go first, alone: they
  // say which rows there are.
  static constexpr int kChoices = kByExpert && dispatch_choice_words(kCfg) > 0 ? kTopk : 0;
  static constexpr int kItems = kByExpert ? kScales : kScales + kTopk;
  static constexpr bool kPlaces = kByExpert && !kCfg.is_cached;
  static constexpr int kWeightsAt = kScales + (kPlaces ? 2 * kTopk : 0);  // by expert, in a slot
  static constexpr int kSlotBytes = dispatch_slot_bytes(kCfg);
  static_assert(kRanks >= 1 && kRanks <= kMaxRanks);
  static_assert(kTopk >= 0 && kTopk <= kMaxTopk);
  static constexpr bool kDirect = kCfg.direct && kRanks > 1;
  static_assert(kRanks == 1 || kCfg.num_warps > 1, "someone must pull from the start");
  static_assert(!kCfg.direct || kCfg.push, "who has no room is pushed to");
  static_assert(!kByExpert || (kTopk > 0 && !kCfg.direct),
                "a peer would store each row over the links");
  static constexpr int kHidden =
      kCfg.hidden_bytes * (kCfg.format == kNvfp4 ? 2 : 1);  // if it casts
  static_assert(!kCasts || (format_row_scale_bytes(kCfg.format, kHidden) == 4 * kScales &&
                            kMostRows <= kCastRows));
  template <typename Params>
  using PayloadOf = Payload<kScales, kTopk, kCfg.topk_is_int64, Params>;
  using Copier = RowCopier<kCfg.tma, kCfg.num_warps, kRows, kCfg.hidden_bytes>;
  // More in flight would spill.
  // Items on their way; more would spill.
  static constexpr int kCastBatch = !kCasts ? 1 : kDirect ? 4 : kCfg.format == kFp8Row ? 6 : 7;
  using Caster = RowCaster<kCfg.format, kCfg.is_f16, kHidden, kCastBatch>;
  using Experts = ByExpert<kScales, kTopk, kCfg.has_weights, kCfg.hidden_bytes, DispatchParams>;

 public:
  __device__ Dispatch(const DispatchParams& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        waiter(start_operation<kRanks>(p, kWaitDispatchStart)),
        payload(p),
        experts(p),
        copier(ptx::dynamic_shared(), warp, lane),
        caster(lane),
        cast_scales(reinterpret_cast<uint32_t*>(ptx::dynamic_shared() +
                                                copier_shared_bytes(kCfg.tma, kCfg.num_warps, kRows,
                                                                    kCfg.hidden_bytes, true)) +
                    warp * kCastRows * kScales) {}

  __device__ void run() {
    // What an operation that failed was to write (rank_prefix, send_head) is garbage.
    if (__all_sync(kFullMask, ptx::ld_relaxed_gpu(p.abort) == 0)) {
      if constexpr (kDirect) publish_place();
      const int num_rows = segment_start(p.rank, kRanks);
      if constexpr (!kByExpert)
        payload.fill_unused_rows(num_rows);
      else if constexpr (kPlaces)
        experts.fill_unused_rows(num_rows);
      if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1)
        report_overflow(p, waiter.epoch, kRoomDispatchRows, p.num_recv_rows, num_rows);
      if (warp >= p.num_stage_warps || stage())
        if constexpr (kRanks > 1) pull();
      copier.drain();
      if constexpr (kByExpert) experts.fill_padding(p.counters + 2 + 2 * kRanks, lane, kPlaces);
    }
    const bool last = finish_operation<kRanks>(p, waiter, 2 + 2 * kRanks + kByExpert);
    if (kDirect && last && p.has_room)
      wait_finished<kRanks>(waiter, kWaitDispatchRows, lane, waiter.epoch);
  }

 private:
  __device__ int window_tokens() const { return p.num_slots / 2; }

  // Slot in which `reader` finds the token of `source`.
  __device__ char* slot(int reader, int source, int token) const {
    const int64_t i = token % p.num_slots;
    if constexpr (kCfg.push)
      return reinterpret_cast<char*>(p.slots[reader]) +
             (static_cast<int64_t>(source) * p.num_slots + i) * kSlotBytes;
    else
      return reinterpret_cast<char*>(p.slots[source]) + i * kSlotBytes;
  }

  // Calls visit(reader) for each different slot that a token of this rank is written to.
  template <typename Visit>
  __device__ void for_each_slot(Visit visit) const {
    if constexpr (kRanks == 1) return;
    if constexpr (kCfg.push) {
#pragma unroll
      for (int i = 1; i < kRanks; ++i) visit((p.rank + i) % kRanks);
    } else {
      visit(p.rank);
    }
  }

  __device__ uint64_t* word(int rank, int source, int token) const {
    return word_address(p.words[rank], source, p.num_slots, token);
  }

  // Rows of `reader` before those of `source`.
  __device__ int segment_start(int reader, int source) const {
    return source == 0 ? 0 : p.rank_prefix[(source - 1) * kRanks + reader];
  }

  // A row of this rank, -1 where its outputs have none.
  __device__ int row_or_none(int row) const {
    return static_cast<uint32_t>(row) < static_cast<uint32_t>(p.num_recv_rows) ? row : -1;
  }

  // ---- places -----------------------------------------------------------------------------------

  // This rank's outputs, to all peers.
  __device__ void publish_place() const {
    if (blockIdx.x != 0 || warp != 0 || lane >= kRanks || lane == p.rank) return;
    uint64_t* const place = place_address(p.places[lane], p.rank);
    const void* const arrays[] = {p.recv_x, p.recv_scales, p.recv_topk_idx, p.recv_topk_weights,
                                  p.recv_src_idx};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const uint64_t offset = reinterpret_cast<uint64_t>(arrays[i]) - p.outputs[p.rank];
      ptx::st_relaxed_sys(place + 1 + i, arrays[i] == nullptr ? 0 : offset);
    }
    ptx::st_relaxed_sys(place + kPlaceWords - 1, static_cast<uint64_t>(p.num_recv_rows));
    ptx::st_release_sys(place, stamp(waiter.epoch, p.has_room));
  }

  // Finds out which peers have room.
  __device__ bool wait_for_places() {
    if constexpr (!kDirect) return true;
    bool ok = true, has_place = false;
    if (lane < kRanks && lane != p.rank)
      ok = wait_place(waiter, kWaitDispatchPlace, lane, place_address(p.places[p.rank], lane),
                      has_place);
    with_room = __ballot_sync(kFullMask, has_place);
    return all_lanes(ok);
  }

  __device__ bool has_room(int reader) const { return kDirect && (with_room >> reader & 1) != 0; }

  // Of a peer that has room. Read each time: it is in the L1, and registers are few.
  __device__ DispatchOutputs outputs_of(int reader) const {
    const uint64_t* const offsets = place_address(p.places[p.rank], reader) + 1;
    const uint64_t base = p.outputs[reader];
    return {reinterpret_cast<char*>(base + offsets[0]),
            reinterpret_cast<uint32_t*>(base + offsets[1]),
            reinterpret_cast<void*>(base + offsets[2]),
            reinterpret_cast<float*>(base + offsets[3]),
            offsets[4] == 0 ? nullptr : reinterpret_cast<int32_t*>(base + offsets[4]),
            static_cast<int32_t>(offsets[kPlaceWords - 2]),
            reader,
            p.experts_per_rank};
  }

  // The row of a token of this rank at `reader`, which gets it.
  __device__ int64_t final_row(int reader, int token) const {
    return segment_start(reader, p.rank) +
           p.send_head[static_cast<int64_t>(token) * kRanks + reader];
  }

  // Address that the row of a token of this rank is written to for `reader`; null: it is not.
  __device__ char* destination(int reader, int token) const {
    if (!has_room(reader)) return slot(reader, p.rank, token);
    const DispatchOutputs outputs = outputs_of(reader);
    const int64_t row = final_row(reader, token);
    return outputs.has(row) ? outputs.recv_x + row * kCfg.hidden_bytes : nullptr;
  }

  // ---- stage ------------------------------------------------------------------------------------

  __device__ bool wait_for_slots(int window) const {
    if (window < 2) return true;
    bool ok = true;
    if (lane < kRanks && lane != p.rank && !has_room(lane))
      ok = wait_window(waiter, kWaitDispatchWindow, lane, window);
    return all_lanes(ok);
  }

  // Tokens a chunk, when `num_warps` share `num_rows`; a chunk spans two windows at most.
  __device__ int chunk_rows(int num_rows, int num_warps) const {
    return min(rows_at_a_time<kRows>(num_rows, num_warps, kMostRows), window_tokens());
  }

  // A chunk of tokens to stage: lane i has token first + i.
  struct Chunk {
    int first, num_rows;
    int own_row;       // of this lane's token in recv_x, -1 = not for this rank
    uint32_t readers;  // bit r: this lane's token goes to peer r
  };

  // Whether a token goes to the slot that `reader` reads: all share one, or each has its own.
  __device__ bool is_written(const Chunk& chunk, int reader) const {
    return kCfg.push ? (chunk.readers >> reader & 1) != 0 : chunk.readers != 0;
  }

  __device__ Chunk chunk_at(int first, int rows, int own_start) const {
    Chunk chunk{first, min(rows, p.num_tokens - first), -1, 0};
    if (lane < chunk.num_rows) {
      const int32_t* const positions = p.send_head + static_cast<int64_t>(first + lane) * kRanks;
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const int position = positions[r];
        if (r != p.rank)
          chunk.readers |= static_cast<uint32_t>(position >= 0) << r;
        else if (position >= 0)
          chunk.own_row = row_or_none(own_start + position);
      }
    }
    return chunk;
  }

  __device__ const char* row_of_x(int token) const {
    return p.x + static_cast<int64_t>(token) * (kCasts ? 2 * kHidden : kCfg.hidden_bytes);
  }

  // Bit i: the token of lane i goes somewhere.
  __device__ uint32_t going_rows(const Chunk& chunk) const {
    return __ballot_sync(kFullMask, chunk.readers != 0 || chunk.own_row >= 0);
  }

  // Starts to read the rows first .. first + kRows - 1, or the first of those that are cast.
  __device__ void load_rows(const Chunk& chunk, int first) {
    if constexpr (kCasts) {
      const uint32_t going = going_rows(chunk);
      if (going != 0) caster.load(row_of_x(chunk.first + __ffs(going) - 1));
    } else {
      const bool goes = chunk.readers != 0 || chunk.own_row >= 0;
      copier.load(first, goes ? row_of_x(chunk.first + lane) : nullptr);
    }
  }

  __device__ bool stage() {
    if (!enter<kRanks>(waiter, kWaitDispatchEntry, lane)) return false;
    copier.acquired();
    const int own_start = segment_start(p.rank, p.rank);
    // Neighbouring chunks lie on different SMs, so that the first tokens are ready first.
    const int num_warps = gridDim.x * p.num_stage_warps;
    const int rows = chunk_rows(p.num_tokens, num_warps);
    Chunk chunk = chunk_at((warp * gridDim.x + blockIdx.x) * rows, rows, own_start);
    if (chunk.num_rows > 0) load_rows(chunk, 0);
    if (!wait_for_places()) return false;
    if constexpr (kDirect) copier.acquired();
    while (chunk.num_rows > 0) {
      const int last_window = (chunk.first + chunk.num_rows - 1) / window_tokens();
      for (int window = chunk.first / window_tokens(); window <= last_window; ++window)
        if (!wait_for_slots(window)) return false;
      if (last_window >= 2) copier.acquired();

      const int token = chunk.first + lane;
      if constexpr (kChoices > 0) stage_choices(chunk);
      for (int first = 0; first < chunk.num_rows; first += kRows) {
        if constexpr (kCasts) cast_rows(chunk, first);
        store_here<kCasts>(first, chunk.own_row);
        for_each_slot([&](int reader) {
          copier.template store<kCasts>(
              first, is_written(chunk, reader) ? destination(reader, token) : nullptr);
        });
        if (!kCasts && first + kRows < chunk.num_rows) load_rows(chunk, first + kRows);
      }
      for_each_item<kItems>(chunk.num_rows, lane, [&](int row_lane, int item, bool valid) {
        const int row_own = __shfl_sync(kFullMask, chunk.own_row, row_lane % kWarpSize);
        const uint32_t readers = __shfl_sync(kFullMask, chunk.readers, row_lane % kWarpSize);
        if (valid)
          stage_item({chunk.first + row_lane, 1, row_own, readers}, item,
                     cast_scales + row_lane * kScales);
      });
      if (p.recv_src_idx != nullptr && chunk.own_row >= 0) p.recv_src_idx[chunk.own_row] = token;
      for_each_slot([&](int reader) {
        if (!has_room(reader) || !is_written(chunk, reader)) return;
        const DispatchOutputs outputs = outputs_of(reader);
        const int64_t row = final_row(reader, token);
        if (outputs.recv_src_idx != nullptr && outputs.has(row)) outputs.recv_src_idx[row] = token;
      });

      // The next rows are on their way while these are written and published. (Loading needs no
      // free slot, so nothing is waited for with tokens in hand that a peer may wait for.)
      const Chunk next = chunk_at(chunk.first + num_warps * rows, rows, own_start);
      if (next.num_rows > 0) load_rows(next, 0);
      if constexpr (kRanks > 1) publish(chunk);
      chunk = next;
    }
    return true;
  }

  // Rows of this rank, a lane each: to their place in the order of the sources, or to all that their
  // selections have. kMade: they are cast.
  template <bool kMade = false>
  __device__ void store_here(int first, int row) {
    if constexpr (kByExpert)
      copier.template store_each<kTopk, kMade>(first,
                                               [&](int k) { return experts.address(row, k); });
    else
      copier.template store<kMade>(
          first, row >= 0 ? p.recv_x + static_cast<int64_t>(row) * kCfg.hidden_bytes : nullptr);
  }

  // Rows first .. first + kRows - 1 of a chunk, cast into the copier's shared memory, and their scales
  // beside it.
  __device__ void cast_rows(const Chunk& chunk, int first) {
    const uint32_t going = going_rows(chunk);
    const float global_scale = kCfg.format == kNvfp4 ? *p.global_scale : 0.0f;
    copier.blank();
#pragma unroll 1
    for (int i = first; i < first + kRows; ++i) {
      if ((going >> i & 1) == 0) continue;
      const uint32_t later = going >> i >> 1;
      caster.cast(copier.slot(i), cast_scales + i * kScales, global_scale,
                  later == 0 ? nullptr : row_of_x(chunk.first + i + __ffs(later)));
    }
    copier.made();
  }

  // By expert: selections of the tokens of a chunk, to their slots, and placed where they are this
  // rank's. Behind it, all lanes may look at row_of.
  __device__ void stage_choices(const Chunk& chunk) const {
    constexpr int kExperts = kScales, kPositions = kScales + kTopk;
    for_each_item<kChoices>(chunk.num_rows, lane, [&](int row_lane, int k, bool valid) {
      const int row_own = __shfl_sync(kFullMask, chunk.own_row, row_lane % kWarpSize);
      const uint32_t readers = __shfl_sync(kFullMask, chunk.readers, row_lane % kWarpSize);
      if (!valid) return;
      const Chunk token{chunk.first + row_lane, 1, row_own, readers};
      const float weight = kCfg.has_weights ? payload.load_weight(token.first, k) : 0.0f;
      int expert = -1, position = -1;
      if constexpr (kPlaces) {
        expert = payload.load_expert(token.first, k);
        position = experts.position(kRanks * p.experts_per_rank, token.first, k, expert);
        experts.place(row_own, k, p.rank, expert, position, weight);
      } else {
        experts.store_weight(row_own, k, weight);
      }
      for_each_slot([&](int reader) {
        if (!is_written(token, reader)) return;
        uint32_t* const items =
            reinterpret_cast<uint32_t*>(slot(reader, p.rank, token.first) + kCfg.hidden_bytes);
        if constexpr (kPlaces) {
          items[kExperts + k] = static_cast<uint32_t>(expert);
          items[kPositions + k] = static_cast<uint32_t>(position);
        }
        if constexpr (kCfg.has_weights) reinterpret_cast<float*>(items)[kWeightsAt + k] = weight;
      });
    });
    __syncwarp();
  }

  // Rows and items are written -> flush (each lane its own, then __syncwarp) -> release of any
  // lane: cumulative.
  __device__ void publish(const Chunk& chunk) {
    if (kDirect && (with_room | 1u << p.rank) == (1u << kRanks) - 1) return;
    copier.flush();
    for (int i = lane; i < chunk.num_rows * kRanks; i += kWarpSize) {
      const int token = chunk.first + i / kRanks, r = i % kRanks;
      if (r == p.rank || has_room(r)) continue;
      const int position = p.send_head[static_cast<int64_t>(token) * kRanks + r];
      const uint32_t value = position >= 0 ? static_cast<uint32_t>(position) : kNoRow;
      ptx::st_release_sys(word(r, p.rank, token),
                          make_word(waiter.epoch, token / window_tokens(), value));
    }
  }

  __device__ void store_scale(int64_t row, int i, uint32_t scale) const {
    if constexpr (kByExpert)
      experts.store_scale(row, i, scale);
    else
      payload.store_scale(row, i, scale);
  }

  // Scales (those of a cast from `cast_row_scales`), then selections, of one token to its slots and to
  // the own row.
  __device__ void stage_item(const Chunk& token, int item, const uint32_t* cast_row_scales) const {
    uint32_t scale = 0;
    int expert = 0;
    float weight = 0.0f;
    const int k = item - kScales;
    if (kByExpert || item < kScales) {
      scale = kCasts ? cast_row_scales[item] : payload.load_scale(token.first, item);
      if (token.own_row >= 0) store_scale(token.own_row, item, scale);
    } else {
      expert = payload.load_expert(token.first, k);
      weight = payload.load_weight(token.first, k);
      if (token.own_row >= 0) payload.store_selection(token.own_row, k, expert, weight);
    }
    for_each_slot([&](int reader) {
      if (!is_written(token, reader)) return;
      if (has_room(reader)) {
        const DispatchOutputs outputs = outputs_of(reader);
        const PayloadOf<DispatchOutputs> theirs(outputs);
        const int64_t row = final_row(reader, token.first);
        if (!outputs.has(row)) return;
        if (kByExpert || item < kScales)
          theirs.store_scale(row, item, scale);
        else
          theirs.store_selection(row, k, expert, weight);
        return;
      }
      uint32_t* const items =
          reinterpret_cast<uint32_t*>(slot(reader, p.rank, token.first) + kCfg.hidden_bytes);
      if (kByExpert || item < kScales) {
        items[item] = scale;
      } else {
        items[kScales + k] = static_cast<uint32_t>(expert);
        reinterpret_cast<float*>(items)[kScales + kTopk + k] = weight;
      }
    });
  }

  // ---- pull -------------------------------------------------------------------------------------

  __device__ void pull() {
    if (kDirect && p.has_room) return;
    int most_tokens = 0;
    for (int s = 0; s < kRanks; ++s)
      if (s != p.rank) most_tokens = max(most_tokens, p.source_tokens[s]);
    const int rows = chunk_rows(most_tokens * (kRanks - 1), gridDim.x * kCfg.num_warps);
    const uint32_t num_chunks = static_cast<uint32_t>(ceil_div(most_tokens, rows)) * (kRanks - 1);

    uint32_t chunk = Draw(p.counters + 1).unit();
    while (chunk < num_chunks) {
      // Drawn early: its latency hides behind the copy.
      const Draw next(p.counters + 1);
      // Each rank starts with another source, so that no source is asked by all at once.
      const int source = (p.rank + 1 + chunk % (kRanks - 1)) % kRanks;
      if (!pull_chunk(source, chunk / (kRanks - 1) * rows, rows)) return;
      chunk = next.unit();
    }
  }

  __device__ bool pull_chunk(int source, int first, int rows) {
    const int source_tokens = p.source_tokens[source];
    const int num_rows = min(rows, source_tokens - first);
    if (num_rows <= 0) return true;

    // Lane i has token first + i.
    const int token = first + lane;
    bool ok = true, is_here = false;
    int row = -1;
    if (lane < num_rows) {
      uint64_t found;
      ok = wait_word(waiter, kWaitDispatchToken, source, token, token / window_tokens(),
                     word(p.rank, source, token), found);
      is_here = word_value(found) != kNoRow;
      if (is_here)
        row = row_or_none(segment_start(p.rank, source) + static_cast<int>(word_value(found)));
    }
    if (!all_lanes(ok)) return false;
    copier.acquired();

    const bool has_row = lane < num_rows && row >= 0;
    const char* const src = has_row ? slot(p.rank, source, token) : nullptr;
    copier.load(0, src);
    if constexpr (kChoices > 0) {
      const uint32_t here = __ballot_sync(kFullMask, is_here);
      for_each_item<kChoices>(num_rows, lane, [&](int row_lane, int k, bool valid) {
        const int dst = __shfl_sync(kFullMask, row, row_lane % kWarpSize);
        if (valid && (here >> row_lane & 1) != 0) pull_choice(source, first + row_lane, k, dst);
      });
      __syncwarp();
    }
    for_each_item<kItems>(num_rows, lane, [&](int row_lane, int item, bool valid) {
      const int64_t dst = __shfl_sync(kFullMask, row, row_lane % kWarpSize);
      if (valid && dst >= 0) pull_item(source, first + row_lane, item, dst);
    });
    if (p.recv_src_idx != nullptr && has_row) p.recv_src_idx[row] = token;
    for (int first_row = 0; first_row < num_rows; first_row += kRows) {
      store_here(first_row, row);
      if (first_row + kRows < num_rows) copier.load(first_row + kRows, src);
    }

    if (source_tokens > p.num_slots) {
      __syncwarp();
      if (lane == 0)
        release_rows(p.counters + 2 + 2 * source, window_tokens(), first, num_rows, source_tokens,
                     [&](int window) { signal_window(waiter, p.signals[source], window); });
    }
    return true;
  }

  // By expert: one selection, placed by what came with it; in a cached dispatch only its weight.
  __device__ void pull_choice(int source, int token, int k, int64_t row) const {
    const uint32_t* const items =
        reinterpret_cast<const uint32_t*>(slot(p.rank, source, token) + kCfg.hidden_bytes);
    float weight = 0.0f;
    if constexpr (kCfg.has_weights) weight = reinterpret_cast<const float*>(items)[kWeightsAt + k];
    if constexpr (kPlaces)
      experts.place(row, k, source, static_cast<int32_t>(items[kScales + k]),
                    static_cast<int32_t>(items[kScales + kTopk + k]), weight);
    else
      experts.store_weight(row, k, weight);
  }

  __device__ void pull_item(int source, int token, int item, int64_t row) const {
    const uint32_t* const items =
        reinterpret_cast<const uint32_t*>(slot(p.rank, source, token) + kCfg.hidden_bytes);
    if (kByExpert || item < kScales) {
      store_scale(row, item, items[item]);
    } else {
      const int k = item - kScales;
      payload.store_selection(row, k, static_cast<int32_t>(items[kScales + k]),
                              reinterpret_cast<const float*>(items)[kScales + kTopk + k]);
    }
  }

  const DispatchParams& p;
  const int warp, lane;
  const Waiter waiter;
  const PayloadOf<DispatchParams> payload;
  const Experts experts;
  Copier copier;
  Caster caster;
  uint32_t* const cast_scales;  // [kCastRows, kScales] of this warp, in shared memory
  uint32_t with_room = 0;       // bit r: peer r takes its rows at their final place
};

template <DispatchConfig kCfg>
__device__ void dispatch(const DispatchParams& p) {
  ptx::griddepcontrol_wait();
  constexpr int kRanks = kCfg.num_ranks;
  if (is_wrong_guess(p, p.rank_prefix[(kRanks - 1) * kRanks + p.rank])) return;
  Dispatch<kCfg>(p).run();
}

}  // namespace epjit

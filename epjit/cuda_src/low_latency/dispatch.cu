// Low-latency dispatch: a token goes once to every rank that owns any of its experts, and is fanned
// out there to a slab for each expert.
//
//   recv_x[e, begin[e, s] + position_s[t, k]] = cast(x_s[t])
//                      on the rank of expert e, for every rank s and selection topk_idx_s[t, k] == e
//   position_s[t, k] = number of selections (t', k') of s before (t, k) that are e as well
//   begin[e, s]      = number of selections of e by the ranks before s
//
// So the order of rows is always the same: source rank, token, selection. layout_range[e, s] holds
// begin << 32 | count, src_info the token of each row. For the combine, source_rows[s, t, k] is the
// row that selection k of token t of rank s has become, counted over all slabs; -1 = none here, -2 =
// beyond its slab.
//
//   slots[d]   two halves of half_bytes: operations of even and of odd epoch
//              [num_ranks, max_tokens, slot_bytes]; (s, t) on rank d is written by s:
//              { row, scales, selections [num_topk] of { expert, position } i32 }
//   words[d]   two halves [num_ranks, max_tokens] u64; (s, t) by s, after the slot: stamp(epoch, 1),
//              or stamp(epoch, 0) for a token that does not go to d
//   counts[d]  two halves [num_ranks, counts_stride] u64; row s by s, as early as it can: stamp(epoch,
//              selections of each of d's experts), then stamp(epoch, tokens that s holds)
//
// Between NVLink domains (peers.cuh) a rank d of another domain gets
//   slots      from the slot of the same token in the memory of s, where it is written as if s were
//              one of its readers: a token's slot is the same for all of them
//   words      only for tokens that go to d. Which these are, the counts say: a word less for each
//              token and rank, of which with many ranks most would only say no.
//   counts     in one put, from staged_counts: tokens first, then selections, then a bit for each
//              token, set when it goes to d. The word of the tokens comes last, as the put's signal.
//
// Units of a block, drawn in this order: the counts; chunks of tokens, cast and written to each rank
// (through registers: a token a block at a time). When none is left, every block waits for the
// counts of all ranks and adds them up, one of them for the outputs. Then the warps draw (token,
// source, part) and copy it from its slot to its experts.
//
// Progress: what is sent waits for nothing, and whoever waits has found all sending drawn by a block
// that runs. So the grid need not be resident as a whole, and nothing is asked of what else runs on
// the GPU. Nor is it held up: while a peer is late, few blocks wait for its counts (sync.cuh, "blocks
// that leave"), and who has counts waits for rows that are being sent. With a hook the two phases are
// two launches and hold nothing in between.
//
// Halves: a rank ends operation n only after all peers have begun it (their counts are here), so
// after these have ended n - 1. Operation n + 1 may thus write where n - 1 was, without a wait.
//
// Order: rows by any thread -> __syncthreads -> st.release.sys of a word -> ld.acquire.sys by the
// warp that copies. Counts are words that hold their own epoch: no order is needed. To other domains:
// rows, counts -> __syncthreads -> fence.acq_rel.sys, put, its signal -> ld.acquire.sys of the word;
// counts are then handed on by a __syncthreads.
//
// Tokens that name an expert several times can fill its slab; rows beyond it are not received, and
// the combine that waits for them says so.
//
// A masked peer is neither sent to nor waited for; `decisions` makes all blocks agree on who is one.
// One that stops between its counts and its rows leaves rows undefined that recv_count includes;
// layout_range then counts none of them.
//
// Launch: any grid, low_latency_dispatch_threads() threads. Graph-safe.
#include "epjit/cast.cuh"
#include "epjit/topk.cuh"
#include "epjit/work.cuh"
#include "low_latency/memory.cuh"
#include "low_latency/peers.cuh"

namespace epjit {

struct LowLatencyDispatchConfig {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t hidden;
  int32_t format;  // RowFormat
  int32_t num_topk;
  bool topk_is_int64;
  int32_t num_warps;
  bool remote;  // the group spans several NVLink domains
};

struct LowLatencyDispatchParams : Operation, PeerParams, LowLatencyParams {
  const char* x;              // [num_tokens, hidden] bf16
  const void* topk_idx;       // [num_tokens, num_topk] int32 or int64, global experts
  const float* global_scale;  // [1]; kNvfp4 alone
  char* recv_x;               // [experts_per_rank, num_ranks * max_tokens, row_bytes]
  // 4-byte units (one scale, or four exponents): [experts_per_rank, units, num_ranks * max_tokens];
  // kMxfp8, kNvfp4: bytes [experts_per_rank, num_ranks * max_tokens, scales]
  char* recv_scales;
  int32_t* recv_count;         // [experts_per_rank]
  int32_t* src_info;           // [experts_per_rank, num_ranks * max_tokens]
  int64_t* layout_range;       // [experts_per_rank, num_ranks]
  int32_t* source_tokens;      // [num_ranks]: tokens of each source, 0 when it is masked
  int32_t* source_rows;        // [num_ranks, max_tokens, num_topk]; undefined beyond source_tokens
  int32_t* recv_stats;         // [experts_per_rank], += rows; or null
  int64_t* wait_cost;          // [num_ranks], += cycles until its counts were here; or null
  uint64_t counts[kMaxRanks];  // symmetric, of each rank of the domain
  uint64_t* staged_counts;     // symmetric, own, as counts; null in one domain
  uint32_t* decisions;    // local [num_ranks]: epoch << 2 | whether it was dropped after all << 1 |
                          // whether the source is received
  uint32_t* counters;     // local [3]: ticket, next unit, next row; zero on entry and on exit
  int32_t words_stride;   // words of a half
  int32_t counts_stride;  // words of a row
  int32_t num_tokens;
  int32_t max_tokens;   // of any rank
  int32_t num_parts;    // warps that share the copies of one token
  int32_t num_staying;  // blocks that wait for a late peer
  int32_t rank;
  int32_t local;  // index of this rank in slots, words, counts and signals
  bool sends;     // this launch has the send phase
  bool receives;  // this launch has the receive phase
};

constexpr int low_latency_dispatch_threads(LowLatencyDispatchConfig cfg) {
  return cfg.num_warps * kWarpSize;
}

constexpr int dispatch_rank_words(LowLatencyDispatchConfig cfg) {
  return cfg.remote ? cfg.num_ranks : kMaxRanks;
}

// Selections of each expert before a chunk, or the table of make_plan(); what threads tell each
// other.
constexpr int low_latency_dispatch_shared_bytes(LowLatencyDispatchConfig cfg) {
  return 4 * (cfg.num_experts + 2 + 2 * dispatch_rank_words(cfg));
}

constexpr int low_latency_dispatch_slot_bytes(LowLatencyDispatchConfig cfg) {
  return align_up(format_row_bytes(cfg.format, cfg.hidden) +
                      align_up(format_row_scale_bytes(cfg.format, cfg.hidden), 8) +
                      8 * cfg.num_topk,
                  128);
}

template <bool kWords>
struct ScaleUnitOf {
  using Type = uint32_t;
};

template <>
struct ScaleUnitOf<false> {
  using Type = unsigned char;
};

template <LowLatencyDispatchConfig kCfg>
class LowLatencyDispatch {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kExperts = kCfg.num_experts;
  static constexpr int kExpertsARank = kExperts / kRanks;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kFormat = kCfg.format;
  static constexpr int kRowBytes = format_row_bytes(kFormat, kCfg.hidden);
  static constexpr int kScaleBytes = format_row_scale_bytes(kFormat, kCfg.hidden);
  static constexpr int kSelections = kRowBytes + align_up(kScaleBytes, 8);  // offset in a slot
  static constexpr int kSlotBytes = low_latency_dispatch_slot_bytes(kCfg);
  static constexpr bool kScalesByColumn = kFormat >= kFp8 && kFormat <= kFp8Ue8m0;
  static constexpr int kThreads = low_latency_dispatch_threads(kCfg);
  static constexpr bool kRemote = kCfg.remote;
  static constexpr int kRankWords = dispatch_rank_words(kCfg);
  // In a row of counts; what is put begins at a multiple of 16 bytes.
  static constexpr int kTokensWord = kRemote ? 0 : kExpertsARank;
  static constexpr int kSelectionsWord = kRemote ? 2 : 0;
  static constexpr int kBitsWord = kSelectionsWord + kExpertsARank;  // between domains alone
  // A thread's part of a row: 16 bytes of bf16, or the elements of a cast.
  static constexpr int kElements = kFormat == kBf16 ? 8 : kCastElements;
  static constexpr int kPieces = kElements / 8;  // of 16 bytes
  static constexpr int kItems = kCfg.hidden / kElements;
  static constexpr int kItemsAThread = ceil_div(kItems, kThreads);
  // Scales are moved in words where they can be.
  using ScaleUnit = typename ScaleUnitOf<kScaleBytes % 4 == 0>::Type;
  static constexpr int kScaleUnits = kScaleBytes / static_cast<int>(sizeof(ScaleUnit));
  static constexpr int kScaleUnitsALane = ceil_div(kScaleUnits, kWarpSize);
  static_assert(kRanks >= 1 && kRanks <= (kRemote ? kThreads : kMaxRanks));
  static_assert(kExperts % kRanks == 0);
  static_assert(kTopk >= 1 && kTopk <= kMaxTopk);
  static_assert(kRowBytes % 16 == 0, "a row is moved in pieces of 16 bytes");
  static_assert(kFormat == kBf16 || kCfg.hidden % format_block(kFormat) == 0);
  static_assert(!kScalesByColumn || kScaleBytes % 4 == 0);

 public:
  __device__ explicit LowLatencyDispatch(const LowLatencyDispatchParams& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        waiter(start_low_latency<kRanks, kRemote, false>(p, kWaitLowLatencyDispatchStart)),
        shared(reinterpret_cast<uint32_t*>(ptx::dynamic_shared())) {}

  __device__ void run() {
    const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);
    if (threadIdx.x == 0) shared_unit() = draw();
    if (__syncthreads_and(aborted == 0)) {
      if (!p.receives) ptx::griddepcontrol_launch_dependents();
      const bool tells = send();
      if (p.receives && wait_for_counts(tells)) {
        ptx::griddepcontrol_launch_dependents();
        uint32_t unit = 0;  // drawn early: its latency hides behind the plan
        if (lane == 0) unit = atomicAdd(p.counters + 2, 1u);
        make_plan(tells);
        receive(__shfl_sync(kFullMask, unit, 0));
      }
    }
    if (!is_last_block(p.counters, 3) || !p.receives) return;
    if (p.mask != nullptr) drop_masked();
    if (lane == 0) *p.epoch = waiter.epoch;
  }

 private:
  // ---- where things lie -------------------------------------------------------------------------

  __device__ int half() const { return waiter.epoch & 1; }

  __device__ uint32_t rows_a_slab() const { return kRanks * p.max_tokens; }

  __device__ int own() const { return own_index<kRemote>(p); }

  // Of a reader of this domain, by its index in `slots`.
  __device__ char* slot(int reader, int source, int token) const {
    return half_of_slots(p, reader, waiter.epoch) +
           (static_cast<int64_t>(source) * p.max_tokens + token) * kSlotBytes;
  }

  __device__ uint64_t* word(int reader, int source, int token) const {
    return half_of_words(p, reader, waiter.epoch) + source * p.max_tokens + token;
  }

  __device__ uint64_t* counts(int reader, int source) const {
    return reinterpret_cast<uint64_t*>(p.counts[reader]) +
           static_cast<int64_t>(half() * kRanks + source) * p.counts_stride;
  }

  // In such a row: selections of local expert e; e = kExpertsARank: tokens.
  static __device__ int count_word(int e) {
    return e < kExpertsARank ? kSelectionsWord + e : kTokensWord;
  }

  __device__ uint64_t* staged_counts(int reader) const {
    return p.staged_counts + static_cast<int64_t>(half() * kRanks + reader) * p.counts_stride;
  }

  // In shared memory: selections of an expert, or the table of make_plan() [kRanks, kExpertsARank + 1]; then
  // the next unit, the ranks of the token, whether the counts of a source have come. Between domains
  // the ranks are a bit for each index, and one more for those that are remote.
  __device__ uint32_t* histogram() const { return shared; }
  __device__ uint32_t& planned(int source, int e) const {
    return shared[source * (kExpertsARank + 1) + e];
  }
  __device__ uint32_t& shared_unit() const { return shared[kExperts + kRankWords]; }
  __device__ uint32_t& shared_readers() const { return shared[kExperts + kRankWords + 1]; }
  __device__ uint32_t& shared_arrived(int source) const {
    return shared[kExperts + kRankWords + 2 + source];
  }
  // Global expert of a selection, -1 for none.
  __device__ int expert(int token, int k) const {
    const int64_t i = static_cast<int64_t>(token) * kTopk + k;
    return load_choice<kCfg.topk_is_int64>(p.topk_idx, i, kExperts);
  }

  // ---- send -------------------------------------------------------------------------------------

  // True for one block, the first that finds nothing left.
  __device__ bool send() {
    const int chunk = max(1, ceil_div(p.num_tokens, max(static_cast<int>(gridDim.x) - 1, 1)));
    const uint32_t num_units = p.sends ? 1 + ceil_div(p.num_tokens, chunk) : 0;
    for (;;) {
      const uint32_t unit = shared_unit();  // the first one is drawn
      if (unit >= num_units) return unit == num_units;
      if (unit == 0)
        send_counts();
      else
        send_chunk((unit - 1) * chunk, min(static_cast<int>(unit) * chunk, p.num_tokens));
      __syncthreads();
      if (threadIdx.x == 0) shared_unit() = draw();
      __syncthreads();
    }
  }

  __device__ uint32_t draw() const { return atomicAdd(p.counters + 1, 1u); }

  // Counts the selections of the first `num_tokens` tokens.
  __device__ void count_selections(int num_tokens) {
    for (int e = threadIdx.x; e < kExperts; e += kThreads) histogram()[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * kTopk; i += kThreads) {
      const int e = expert(i / kTopk, i % kTopk);
      if (e >= 0) atomicAdd(histogram() + e, 1u);
    }
    __syncthreads();
  }

  __device__ void send_counts() {
    count_selections(p.num_tokens);
    for (int i = threadIdx.x; i < kRanks * (kExpertsARank + 1); i += kThreads) {
      const int r = i / (kExpertsARank + 1), e = i % (kExpertsARank + 1);
      if (!may_send(waiter, r)) continue;
      const uint32_t value = e < kExpertsARank ? histogram()[r * kExpertsARank + e] : p.num_tokens;
      const int index = index_of<kRemote>(p, r);
      if (!kRemote || index >= 0)
        ptx::st_relaxed_sys(counts(index, p.rank) + count_word(e), stamp(waiter.epoch, value));
      else
        staged_counts(r)[count_word(e)] = stamp(waiter.epoch, value);
    }
    if constexpr (kRemote) send_staged_counts();
  }

  __device__ void send_staged_counts() const {
    const int num_bit_words = ceil_div(p.num_tokens, 64);
    for (int i = threadIdx.x; i < kRanks * num_bit_words; i += kThreads)
      staged_counts(i / num_bit_words)[kBitsWord + i % num_bit_words] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_tokens * kTopk; i += kThreads) {
      const int token = i / kTopk, e = expert(token, i % kTopk);
      if (e >= 0)
        atomicOr(token_bits(staged_counts(e / kExpertsARank)) + token / 32, 1u << token % 32);
    }
    __syncthreads();
    const int num_words = align_up(kExpertsARank + num_bit_words, 2);
    uint64_t* const theirs = counts(own(), p.rank);
    for (int r = warp; r < kRanks; r += kCfg.num_warps) {
      const int index = p.peers[r];
      if (index >= 0 || __any_sync(kFullMask, is_masked(waiter, r))) continue;
      put_with_word(p.transport, theirs + kSelectionsWord, staged_counts(r) + kSelectionsWord,
                    num_words * sizeof(uint64_t), theirs + kTokensWord,
                    stamp(waiter.epoch, p.num_tokens), index);
    }
  }

  static __device__ uint32_t* token_bits(uint64_t* row) {
    return reinterpret_cast<uint32_t*>(row + kBitsWord);
  }

  // A thread's part of a row, in registers.
  struct RowPart {
    Vec16 pieces[kItemsAThread][kPieces];
  };

  __device__ void load(int token, RowPart& part) const {
    const char* const row = p.x + static_cast<int64_t>(token) * (2 * kCfg.hidden);
#pragma unroll
    for (int i = 0; i < kItemsAThread; ++i) {
      const int item = i * kThreads + threadIdx.x;
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
        part.pieces[i][j] = item < kItems ? ptx::ld_v4(row + (item * kPieces + j) * 16) : Vec16{};
    }
  }

  __device__ void send_chunk(int first, int last) {
    RowPart part;
    load(first, part);  // on its way while the block counts
    int selected = lane < kTopk ? expert(first, lane) : -1;
    count_selections(first);
    for (int token = first; token < last; ++token) {
      if (token != first) {
        load(token, part);
        selected = lane < kTopk ? expert(token, lane) : -1;
      }
      if (warp == 0) send_selections(token, selected);
      __syncthreads();
      const uint32_t readers = shared_readers();
      store(token, kRemote ? slots_of(readers) : readers, part);
      __syncthreads();
      if (threadIdx.x < kRanks && may_send(waiter, threadIdx.x)) {
        const int index = index_of<kRemote>(p, threadIdx.x);
        if (!kRemote || index >= 0)
          ptx::st_release_sys(word(index, p.rank, token),
                              stamp(waiter.epoch, readers >> index & 1));
      }
    }
    if constexpr (kRemote) put_chunk(first, last);
  }

  // Bit for each index in `slots` that a token is written to.
  __device__ uint32_t slots_of(uint32_t readers) const {
    return readers >> kMaxRanks != 0 ? (readers & 0xff) | 1u << own() : readers;
  }

  // Sends tokens that are written to their remote ranks.
  __device__ void put_chunk(int first, int last) const {
    for (int token = first; token < last; ++token) {
      // Lane k has the index of the remote rank that selection k is the first to name, else 0.
      const int rank = selected_rank(lane < kTopk ? expert(token, lane) : -1);
      const bool is_first = (__match_any_sync(kFullMask, rank) & ((1u << lane) - 1)) == 0;
      const int index = rank >= 0 && is_first ? p.peers[rank] : 0;
      char* const src = slot(own(), p.rank, token);
      for (int k = warp; k < kTopk; k += kCfg.num_warps) {
        const int to = __shfl_sync(kFullMask, index, k);
        if (to < 0)
          put_with_word(p.transport, src, src, kSlotBytes, word(own(), p.rank, token),
                        stamp(waiter.epoch, 1), to);
      }
    }
  }

  // Of an expert, or of none (-1): its rank, if that may be sent to.
  __device__ int selected_rank(int e) const {
    return e >= 0 && may_send(waiter, e / kExpertsARank) ? e / kExpertsARank : -1;
  }

  // Where each selection comes among those of its expert, to all ranks of the token; lane k has the
  // expert of selection k.
  __device__ void send_selections(int token, int e) {
    const uint32_t same = __match_any_sync(kFullMask, e);
    const uint32_t before = __popc(same & ((1u << lane) - 1));
    const uint32_t position = e >= 0 ? histogram()[e] + before : 0;
    __syncwarp();
    if (e >= 0 && before == 0) histogram()[e] += __popc(same);
    uint32_t readers;
    if constexpr (kRemote) {
      const int rank = selected_rank(e);
      const int index = rank >= 0 ? p.peers[rank] : 0;
      readers = __reduce_or_sync(kFullMask, rank < 0    ? 0
                                            : index < 0 ? 1u << kMaxRanks
                                                        : 1u << index);
      for (uint32_t left = slots_of(readers); left != 0; left &= left - 1)
        if (lane < kTopk) write_selection(__ffs(left) - 1, token, e, position);
    } else {
      // Lane r looks whether rank r may be sent to.
      readers = __reduce_or_sync(kFullMask, e >= 0 ? 1u << e / kExpertsARank : 0) &
                __ballot_sync(kFullMask, lane < kRanks && may_send(waiter, lane));
      for (uint32_t left = readers; left != 0; left &= left - 1)
        if (lane < kTopk) write_selection(__ffs(left) - 1, token, e, position);
    }
    if (lane == 0) shared_readers() = readers;
  }

  __device__ void write_selection(int reader, int token, int e, uint32_t position) const {
    uint32_t* const selection =
        reinterpret_cast<uint32_t*>(slot(reader, p.rank, token) + kSelections) + 2 * lane;
    selection[0] = static_cast<uint32_t>(e);
    selection[1] = position;
  }

  __device__ void store(int token, uint32_t readers, const RowPart& part) const {
    [[maybe_unused]] const float global_scale = kFormat == kNvfp4 ? *p.global_scale : 1.0f;
#pragma unroll
    for (int i = 0; i < kItemsAThread; ++i) {
      const int item = i * kThreads + threadIdx.x;
      if constexpr (kFormat == kBf16) {
        for (uint32_t left = readers; left != 0 && item < kItems; left &= left - 1)
          ptx::st_v4(slot(__ffs(left) - 1, p.rank, token) + item * 16, part.pieces[i][0]);
      } else {
        // All lanes take part: neighbours share a scale.
        const CastItem cast = cast_item<kFormat>(part.pieces[i], global_scale);
        constexpr int kLanes = format_block(kFormat) / kCastElements;
        const bool has_scale = threadIdx.x % kLanes == 0;
        for (uint32_t left = readers; left != 0 && item < kItems; left &= left - 1) {
          char* const row = slot(__ffs(left) - 1, p.rank, token);
          if constexpr (kFormat == kNvfp4)
            *reinterpret_cast<uint64_t*>(row + item * 8) =
                static_cast<uint64_t>(cast.words[1]) << 32 | cast.words[0];
          else
            ptx::st_v4(row + item * 16,
                       {cast.words[0], cast.words[1], cast.words[2], cast.words[3]});
          if (!has_scale) continue;
          if constexpr (format_scale_bytes(kFormat) == 4)
            reinterpret_cast<uint32_t*>(row + kRowBytes)[item / kLanes] = cast.scale;
          else
            row[kRowBytes + item / kLanes] = static_cast<char>(cast.scale);
        }
      }
    }
  }

  // ---- plan -------------------------------------------------------------------------------------

  // planned(s, e) = selections of e by s, planned(s, kExpertsARank) = tokens of s, of all that are not masked.
  // `tells`: this block writes the outputs that follow from them. False: leave.
  __device__ bool wait_for_counts(bool tells) {
    const Waiter patient = tells || is_staying(p) ? waiter : leaving(waiter);
    if (threadIdx.x < kRanks) shared_arrived(threadIdx.x) = !is_masked(waiter, threadIdx.x);
    __syncthreads();
    const uint64_t start = ptx::clock64();
    constexpr int kWords = kRanks * (kExpertsARank + 1);
    for (int first = 0; first < kWords; first += kThreads) {
      const int i = first + threadIdx.x, source = i / (kExpertsARank + 1),
                e = i % (kExpertsARank + 1);
      bool is_late = false;
      if (i < kWords && shared_arrived(source) != 0) {
        // Between domains all of a row has come when the word of the tokens has.
        const uint64_t* const row = counts(own(), source);
        const bool is_remote = kRemote && index_of<kRemote>(p, source) < 0;
        const int word = is_remote ? kTokensWord : count_word(e);
        uint64_t seen;
        is_late = !wait_stamp(patient, kWaitLowLatencyDispatchCounts, source, e, row + word, seen);
        if (is_remote && !is_late) {
          seen = row[count_word(e)];
          if (e == kExpertsARank)
            ptx::st_relaxed_sys(entered_signal(waiter.signals, source), stamp(waiter.epoch, 0));
        }
        planned(source, e) = static_cast<uint32_t>(seen);
        if (tells && e == kExpertsARank && p.wait_cost != nullptr && source != p.rank)
          p.wait_cost[source] += static_cast<int64_t>(ptx::clock64() - start);
      }
      if (!__syncthreads_and(!is_late || is_masked(waiter, source))) return false;
      if (p.mask == nullptr) continue;
      if (is_late) shared_arrived(source) = 0;
      __syncthreads();
    }
    if (p.mask != nullptr) {
      if (threadIdx.x < kRanks) {
        const bool mine = shared_arrived(threadIdx.x) != 0;
        shared_arrived(threadIdx.x) = !decide(threadIdx.x) ? 0 : mine ? 1 : 2;
      }
      __syncthreads();
      // Of 2 another block has all counts, so they are here, and this block gave up too early.
      for (int i = threadIdx.x; i < kRanks * (kExpertsARank + 1); i += kThreads) {
        const int source = i / (kExpertsARank + 1), e = i % (kExpertsARank + 1);
        if (shared_arrived(source) == 2)
          planned(source, e) =
              static_cast<uint32_t>(ptx::ld_acquire_sys(counts(own(), source) + count_word(e)));
      }
      __syncthreads();
    }
    return true;
  }

  // Where rows go: planned(s, e) = begin[e, s], planned(s, kExpertsARank) = tokens of s, 0 when it is masked.
  __device__ void make_plan(bool tells) {
    for (int e = threadIdx.x; e < kExpertsARank; e += kThreads) {
      uint32_t begin = 0;
      for (int source = 0; source < kRanks; ++source) {
        const uint32_t sent = shared_arrived(source) != 0 ? planned(source, e) : 0;
        const uint32_t count = min(sent, rows_a_slab() - begin);
        planned(source, e) = begin;
        if (tells)
          p.layout_range[e * kRanks + source] =
              static_cast<int64_t>(static_cast<uint64_t>(begin) << 32 | count);
        begin += count;
      }
      if (!tells) continue;
      p.recv_count[e] = static_cast<int32_t>(begin);
      if (p.recv_stats != nullptr) p.recv_stats[e] += static_cast<int32_t>(begin);
    }
    if (threadIdx.x < kRanks) {
      uint32_t& tokens = planned(threadIdx.x, kExpertsARank);
      // A peer that was called with another maximum has no places for more.
      tokens =
          shared_arrived(threadIdx.x) == 0 ? 0 : min(tokens, static_cast<uint32_t>(p.max_tokens));
      if (tells) p.source_tokens[threadIdx.x] = static_cast<int32_t>(tokens);
    }
    __syncthreads();
  }

  // Whether a source is received: what the first block has found.
  __device__ bool decide(int source) const {
    const uint32_t mine = waiter.epoch << 2 | shared_arrived(source);
    const uint32_t before = ptx::ld_relaxed_gpu(p.decisions + source);
    if (before >> 2 == mine >> 2) return before & 1;
    const uint32_t now = atomicCAS(p.decisions + source, before, mine);
    return (now == before ? mine : now) & 1;
  }

  // A source that was masked after its counts came has sent nothing.
  __device__ void drop_masked() const {
    for (int source = 0; source < kRanks; ++source) {
      if (ptx::ld_relaxed_gpu(p.decisions + source) == (waiter.epoch << 2 | 1)) continue;
      p.source_tokens[source] = 0;
      for (int e = lane; e < kExpertsARank; e += kWarpSize)
        reinterpret_cast<uint32_t*>(p.layout_range)[2 * (e * kRanks + source)] = 0;
    }
  }

  // Waits for a word of this epoch from `peer`.
  __device__ static bool wait_stamp(const Waiter& who, WaitTag tag, int peer, int index,
                                    const uint64_t* word, uint64_t& seen) {
    return wait_until(who, tag, peer, index, stamp(who.epoch, 0), word, seen,
                      [&](uint64_t value) { return value >> 32 == who.epoch; });
  }

  // ---- receive ----------------------------------------------------------------------------------

  __device__ void receive(uint32_t unit) {
    // Lane s has the number of tokens of source s; with more ranks than lanes only the most matter.
    uint32_t tokens = lane < kRanks ? planned(lane, kExpertsARank) : 0;
    for (int source = lane + kWarpSize; source < kRanks; source += kWarpSize)
      tokens = max(tokens, planned(source, kExpertsARank));
    const uint32_t num_units = __reduce_max_sync(kFullMask, tokens) * kRanks * p.num_parts;
    while (unit < num_units) {
      const uint32_t next = next_unit(p.counters + 2, lane);
      const uint32_t row = unit / p.num_parts;
      // Each rank starts with itself, so that no source is looked at by all at once.
      const int source = (p.rank + row % kRanks) % kRanks;
      const uint32_t token = row / kRanks;
      const uint32_t num_tokens = kRanks <= kWarpSize ? __shfl_sync(kFullMask, tokens, source)
                                                      : planned(source, kExpertsARank);
      if (token < num_tokens && !receive_token(source, static_cast<int>(token), unit % p.num_parts))
        return;
      unit = next;
    }
  }

  __device__ bool receive_token(int source, int token, int part) const {
    int32_t* const source_rows =
        p.source_rows + (static_cast<int64_t>(source) * p.max_tokens + token) * kTopk;
    uint64_t seen = 0;
    // All lanes look, so that each has acquired what the word publishes.
    if (comes(source, token) && !all_lanes(wait_stamp(waiter, kWaitLowLatencyDispatchToken, source,
                                                      token, word(own(), source, token), seen))) {
      const bool masked = __all_sync(kFullMask, is_masked(waiter, source));
      // Blocks that plan later still count its rows, as those before did.
      if (masked && lane == 0) atomicExch(p.decisions + source, waiter.epoch << 2 | 3);
      return masked;
    }
    if (static_cast<uint32_t>(seen) == 0) {
      if (part == 0 && lane < kTopk) source_rows[lane] = -1;
      return true;
    }

    // All of it is on its way at once.
    const char* const src = slot(own(), source, token);
    const int part_vecs = align_up(ceil_div(kVecs, p.num_parts), kWarpSize);
    const int last = min(kVecs, (part + 1) * part_vecs);
    int first = part * part_vecs;
    Vec16 v[kBatch];
    load_batch(src, first, last, v);
    [[maybe_unused]] ScaleUnit scales[kScaleUnitsALane + 1];  // there may be none
    if (part == 0) load_scales(src + kRowBytes, scales);

    // Lane k has where selection k goes, -1 = to another rank.
    int row = -1;
    if (lane < kTopk) {
      const int32_t* const selection =
          reinterpret_cast<const int32_t*>(src + kSelections) + 2 * lane;
      const int e = selection[0] - p.rank * kExpertsARank;
      if (selection[0] >= 0 && e >= 0 && e < kExpertsARank) {
        const uint32_t position = planned(source, e) + selection[1];
        row = position < rows_a_slab() ? static_cast<int>(e * rows_a_slab() + position) : -2;
      }
    }
    const uint32_t here = __ballot_sync(kFullMask, row >= 0);
    if (part == 0) {
      if (lane < kTopk) source_rows[lane] = row;
      if (row >= 0) p.src_info[row] = token;
      for (uint32_t left = here; left != 0; left &= left - 1)
        store_scales(__shfl_sync(kFullMask, row, __ffs(left) - 1), scales);
    }
    for (;;) {
      for (uint32_t left = here; left != 0; left &= left - 1) {
        const int64_t dst_row = __shfl_sync(kFullMask, row, __ffs(left) - 1);
        store_batch(p.recv_x + dst_row * kRowBytes, first, last, v);
      }
      first += kBatch * kWarpSize;
      if (first >= last) return true;
      load_batch(src, first, last, v);
    }
  }

  // Whether a token has a word here: of remote sources those alone that go to this rank.
  __device__ bool comes(int source, int token) const {
    if constexpr (kRemote)
      if (p.peers[source] < 0)
        return (token_bits(counts(own(), source))[token / 32] >> token % 32 & 1) != 0;
    return true;
  }

  static constexpr int kVecs = kRowBytes / 16;
  // Pieces of 16 bytes in flight a thread; a body of transport.cuh wants registers, too.
  static constexpr int kBatch = kRemote ? 4 : 8;

  __device__ void load_batch(const char* src, int first, int last, Vec16 (&v)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int vec = first + i * kWarpSize + lane;
      if (vec < last) v[i] = ptx::ld_v4(src + vec * 16);
    }
  }

  __device__ void store_batch(char* dst, int first, int last, const Vec16 (&v)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int vec = first + i * kWarpSize + lane;
      if (vec < last) ptx::st_v4(dst + vec * 16, v[i]);
    }
  }

  __device__ void load_scales(const char* src, ScaleUnit* scales) const {
#pragma unroll
    for (int i = 0; i < kScaleUnitsALane; ++i)
      if (i * kWarpSize + lane < kScaleUnits)
        scales[i] = reinterpret_cast<const ScaleUnit*>(src)[i * kWarpSize + lane];
  }

  __device__ void store_scales(int row, const ScaleUnit* scales) const {
    ScaleUnit* const dst = reinterpret_cast<ScaleUnit*>(p.recv_scales);
    const int64_t slab = row / rows_a_slab(), position = row % rows_a_slab();
#pragma unroll
    for (int i = 0; i < kScaleUnitsALane; ++i) {
      const int unit = i * kWarpSize + lane;
      if (unit >= kScaleUnits) continue;
      if constexpr (kScalesByColumn)
        dst[(slab * kScaleUnits + unit) * rows_a_slab() + position] = scales[i];
      else
        dst[static_cast<int64_t>(row) * kScaleUnits + unit] = scales[i];
    }
  }

  const LowLatencyDispatchParams& p;
  const int warp, lane;
  const Waiter waiter;
  uint32_t* const shared;
};

template <LowLatencyDispatchConfig kCfg>
__device__ void low_latency_dispatch(const LowLatencyDispatchParams& p) {
  LowLatencyDispatch<kCfg>(p).run();
}

}  // namespace epjit

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
// beyond its slab; source_weights[s, t, k] is the weight of such a selection, 0 if s gives none, and between
// domains.
//
//   slots[d]   two halves of half_bytes: operations of even and of odd epoch
//              [num_ranks, max_tokens, slot_bytes]; (s, t) on rank d is written by s:
//              { row, scales, selections [num_topk] of { expert << 17 | position, weight } u32 }
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
// With `lines` a slot is the same in lines (lines.cuh), selections first, and there are no words: whoever
// copies looks at the slot itself, at its first unit for the selections. Of a token that does not go to d
// there is that unit alone, with no selections of d's experts.
//
// Progress: what is sent waits for nothing, and a block waits only after every unit of sending has
// been drawn by a block that runs. So the grid need not be resident as a whole, and nothing is asked of what else runs on
// the GPU. Nor is it held up: while a peer is late, few blocks wait for its counts (sync.cuh, "blocks
// that leave"), and who has counts waits for rows that are being sent. With a hook the two phases are
// two launches and hold nothing in between.
//
// Halves: a rank ends operation n only after all peers have begun it (their counts are here), so
// after these have ended n - 1. Operation n + 1 may thus write where n - 1 was, without a wait.
//
// Order: rows by any thread -> __syncthreads -> st.release.sys of a word -> ld.acquire.sys by the
// warp that copies. Counts are words that hold their own epoch: no order is needed. To other domains:
// rows, counts -> __syncthreads -> fence.acq_rel.sys, put, its signal -> ld.acquire.sys of the word ->
// received; counts are then handed on by a __syncthreads.
//
// Tokens that name an expert several times can fill its slab; rows beyond it are not received, and
// the combine that waits for them says so.
//
// A masked peer is neither sent to nor waited for; `decisions` makes all blocks agree on who is one.
// One that stops between its counts and its rows leaves rows undefined that recv_count includes;
// layout_range then counts none of them.
//
// Launch: any grid, low_latency_dispatch_threads() threads. Graph-safe.
#include "epjit/topk.cuh"
#include "epjit/work.cuh"
#include "low_latency/lines.cuh"
#include "low_latency/plan.cuh"
#include "low_latency/rows.cuh"

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
  bool shrink;  // ranks may be masked
  bool lines;   // rows travel in lines
};

struct LowLatencyDispatchParams : Operation, PeerParams, LowLatencyParams {
  const char* x;              // [num_tokens, hidden] bf16
  const void* topk_idx;       // [num_tokens, num_topk] int32 or int64, global experts
  const float* topk_weights;  // [num_tokens, num_topk], or null; not read between domains
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
  float* source_weights;       // as source_rows; undefined for what is no row
  int32_t* recv_stats;         // [experts_per_rank], += rows; or null
  int64_t* wait_cost;          // [num_ranks], += cycles until its counts were here; or null
  uint64_t counts[kMaxRanks];  // symmetric, of each rank of the domain
  uint64_t* staged_counts;     // symmetric, this rank's, as counts; null in one domain
  uint32_t* decisions;    // own [num_ranks]: epoch << 2 | whether it was dropped after all << 1 |
                          // whether the source is received
  uint32_t* counters;     // own [3]: ticket, next unit, next row; zero on entry and on exit
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

// Of what travels in lines: selections, row, scales.
constexpr int dispatch_line_header_bytes(LowLatencyDispatchConfig cfg) {
  return align_up(8 * cfg.num_topk, 16);
}

constexpr int dispatch_line_bytes(LowLatencyDispatchConfig cfg) {
  return dispatch_line_header_bytes(cfg) + format_row_bytes(cfg.format, cfg.hidden) +
         align_up(format_row_scale_bytes(cfg.format, cfg.hidden), 16);
}

// Selections of each expert before a chunk, or the table of the plan; what threads tell each
// other; a token before it is put into lines.
constexpr int dispatch_shared_words_bytes(LowLatencyDispatchConfig cfg) {
  return 4 * (cfg.num_experts + 4 + 2 * dispatch_rank_words(cfg));
}

constexpr int low_latency_dispatch_shared_bytes(LowLatencyDispatchConfig cfg) {
  const int words = dispatch_shared_words_bytes(cfg);
  return cfg.lines ? align_up(words, 16) + dispatch_line_bytes(cfg) : words;
}

constexpr int low_latency_dispatch_slot_bytes(LowLatencyDispatchConfig cfg) {
  if (cfg.lines) return line_slot_bytes(dispatch_line_bytes(cfg));
  return align_up(format_row_bytes(cfg.format, cfg.hidden) +
                      align_up(format_row_scale_bytes(cfg.format, cfg.hidden), 8) +
                      8 * cfg.num_topk,
                  128);
}

// A selection on its way: its expert and its position among those of this expert, of which a rank has
// at most 2^17; as many bits remain for experts as there are, and one value for none.
constexpr int kPositionBits = 17;
constexpr int kMaxExperts = (1 << (32 - kPositionBits)) - 1;
constexpr uint32_t kNoSelection = ~0u;

template <LowLatencyDispatchConfig kCfg>
class LowLatencyDispatch {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kExperts = kCfg.num_experts;
  static constexpr int kExpertsARank = kExperts / kRanks;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kFormat = kCfg.format;
  using Row = RowOf<kFormat, kCfg.hidden>;
  static constexpr int kSelections = Row::kBytes + align_up(Row::kScaleBytes, 8);  // in a slot
  static constexpr int kSlotBytes = low_latency_dispatch_slot_bytes(kCfg);
  static constexpr int kThreads = low_latency_dispatch_threads(kCfg);
  static constexpr bool kRemote = kCfg.remote;
  static constexpr bool kLines = kCfg.lines;
  static constexpr int kHeader = dispatch_line_header_bytes(kCfg);
  static constexpr int kUnits = line_units(dispatch_line_bytes(kCfg));
  static constexpr int kScaleUnit =
      (kHeader + Row::kBytes) / kLineUnitData;  // with the first scale
  using Unit = LineUnit<dispatch_line_bytes(kCfg)>;
  static_assert(!kLines || (!kRemote && !kCfg.shrink));
  static constexpr int kRankWords = dispatch_rank_words(kCfg);
  static constexpr int kFewTokens =
      128;  // of which every warp that copies looks at its lines at once
  // Pieces of 16 bytes in flight a thread; a body of transport.cuh wants registers, too.
  static constexpr int kBatch = kRemote ? 4 : 8;
  using Outgoing = OutgoingRow<kFormat, kCfg.hidden, kThreads>;
  using Incoming = IncomingRow<kFormat, kCfg.hidden, kBatch>;
  using Plan = epjit::Plan<kRanks, kExpertsARank, kThreads, kRemote, LowLatencyDispatchParams>;
  static_assert(kRanks >= 1 && kRanks <= (kRemote ? kThreads : kMaxRanks));
  static_assert(kExperts % kRanks == 0 && kExperts <= kMaxExperts);
  static_assert(kTopk >= 1 && kTopk <= kMaxTopk);

 public:
  __device__ explicit LowLatencyDispatch(const LowLatencyDispatchParams& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        waiter(start_low_latency<kRanks, kRemote, false>(p, kWaitLowLatencyDispatchStart,
                                                         kCfg.shrink ? p.mask : nullptr)),
        shared(reinterpret_cast<uint32_t*>(ptx::dynamic_shared())),
        plan(p, waiter, shared, shared + kExperts + kRankWords + 4),
        ticket(ticket_word(shared), p.counters, kCfg.num_warps) {}

  // Before the kernel ahead has ended: touches nothing but shared memory.
  static __device__ void prepare() {
    uint32_t* const shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
    for (int e = threadIdx.x; e < kExperts; e += kThreads) shared[e] = 0;
    if (threadIdx.x == 0) *ticket_word(shared) = 0;
  }

  __device__ void run() {
    const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);
    if (warp == 0) publish(0, Draw(p.counters + 1));
    if (__syncthreads_and(aborted == 0)) {
      if (!p.receives) ptx::griddepcontrol_launch_dependents();
      const bool tells = send();
      if (p.receives && plan.wait_for_counts(tells)) {
        ptx::griddepcontrol_launch_dependents();
        const Draw first(p.counters + 2);  // its latency hides behind the plan
        plan.make(tells);
        receive(first.unit());
      }
    }
    if constexpr (kCfg.shrink) {
      // Sources may be dropped until the end: a late ticket, which orders that.
      if (!is_last_block(p.counters, 3)) return;
      if (p.receives) plan.forget_dropped(lane);
    } else {
      ticket.take(waiter.epoch);
      if (!ticket.is_last()) return;
    }
    end_operation(p, waiter.epoch, lane);
  }

 private:
  // ---- where things lie -------------------------------------------------------------------------

  __device__ int own() const { return own_index<kRemote>(p); }

  // Of a reader of this domain, by its index in `slots`.
  __device__ char* slot(int reader, int source, int token) const {
    char* const half = half_of_slots(p, reader, waiter.epoch);
    return (kLines ? whole_lines(half) : half) +
           (static_cast<int64_t>(source) * p.max_tokens + token) * kSlotBytes;
  }

  __device__ uint64_t* word(int reader, int source, int token) const {
    return half_of_words(p, reader, waiter.epoch) + source * p.max_tokens + token;
  }

  // In shared memory: selections of an expert, or the table of the plan; then the present unit and
  // the next one, the ranks of the token, the word of the ticket, which sources have come (the
  // plan's). Between domains the ranks are a bit for each index, and one more for those that are
  // remote.
  __device__ uint32_t* histogram() const { return shared; }
  __device__ uint32_t& shared_unit(int i) const { return shared[kExperts + kRankWords + i % 2]; }
  __device__ uint32_t& shared_readers() const { return shared[kExperts + kRankWords + 2]; }
  static __device__ uint32_t* ticket_word(uint32_t* shared) {
    return shared + kExperts + kRankWords + 3;
  }

  // In shared memory, too: a token as it goes into lines.
  static __device__ char* staged() {
    return ptx::dynamic_shared() + align_up(dispatch_shared_words_bytes(kCfg), 16);
  }

  // Global expert of a selection, -1 for none.
  __device__ int expert(int token, int k) const {
    const int64_t i = static_cast<int64_t>(token) * kTopk + k;
    return load_choice<kCfg.topk_is_int64>(p.topk_idx, i, kExperts);
  }

  // Lane k of warp 0 gets the weight of selection k, if there are weights. Between domains no combine
  // asks for them, and registers are few.
  __device__ float weight_of(int token) const {
    if (kRemote || warp != 0 || lane >= kTopk || p.topk_weights == nullptr) return 0.0f;
    return p.topk_weights[static_cast<int64_t>(token) * kTopk + lane];
  }

  // ---- send -------------------------------------------------------------------------------------

  // True for one block, the first that finds nothing left.
  __device__ bool send() {
    const int chunk = max(1, ceil_div(p.num_tokens, max(static_cast<int>(gridDim.x) - 1, 1)));
    const uint32_t num_units = p.sends ? 1 + ceil_div(p.num_tokens, chunk) : 0;
    for (int i = 0;; ++i) {
      const uint32_t unit = shared_unit(i);  // the first one is drawn
      if (unit >= num_units) return unit == num_units;
      if (i > 0) clear_histogram();
      const Draw next = unit == 0 ? send_counts()
                                  : send_chunk((unit - 1) * chunk,
                                               min(static_cast<int>(unit) * chunk, p.num_tokens));
      if (warp == 0) publish(i + 1, next);
      __syncthreads();
    }
  }

  // By one warp; followed by a barrier of the block.
  __device__ void publish(int i, Draw drawn) const {
    const uint32_t unit = drawn.unit();
    if (lane == 0) shared_unit(i) = unit;
  }

  __device__ void clear_histogram() {
    for (int e = threadIdx.x; e < kExperts; e += kThreads) histogram()[e] = 0;
    __syncthreads();
  }

  // Counts the selections of the first `num_tokens` tokens.
  __device__ void count_selections(int num_tokens) {
    for (int i = threadIdx.x; i < num_tokens * kTopk; i += kThreads) {
      const int e = expert(i / kTopk, i % kTopk);
      if (e >= 0) atomicAdd(histogram() + e, 1u);
    }
    __syncthreads();
  }

  // Warp 0 draws the next unit as soon as its latency is hidden, by the words of this one, and not
  // before: else early blocks would have two units where others have none.
  __device__ Draw draw_next() const { return warp == 0 ? Draw(p.counters + 1) : Draw(); }

  __device__ Draw send_counts() {
    count_selections(p.num_tokens);
    const Draw next = draw_next();
    for (int i = threadIdx.x; i < kRanks * (kExpertsARank + 1); i += kThreads) {
      const int r = i / (kExpertsARank + 1), e = i % (kExpertsARank + 1);
      if (!may_send(waiter, r)) continue;
      const uint32_t value = e < kExpertsARank ? histogram()[r * kExpertsARank + e] : p.num_tokens;
      const int index = index_of<kRemote>(p, r);
      if (!kRemote || index >= 0)
        ptx::st_relaxed_sys(plan.counts(index, p.rank) + Plan::count_word(e),
                            stamp(waiter.epoch, value));
      else
        plan.staged_counts(r)[Plan::count_word(e)] = stamp(waiter.epoch, value);
    }
    if constexpr (kRemote) send_staged_counts();
    return next;
  }

  __device__ void send_staged_counts() const {
    const int num_bit_words = ceil_div(p.num_tokens, 64);
    for (int i = threadIdx.x; i < kRanks * num_bit_words; i += kThreads)
      plan.staged_counts(i / num_bit_words)[Plan::kBitsWord + i % num_bit_words] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_tokens * kTopk; i += kThreads) {
      const int token = i / kTopk, e = expert(token, i % kTopk);
      if (e >= 0)
        atomicOr(Plan::token_bits(plan.staged_counts(e / kExpertsARank)) + token / 32,
                 1u << token % 32);
    }
    __syncthreads();
    const int num_words = align_up(kExpertsARank + num_bit_words, 2);
    uint64_t* const theirs = plan.counts(own(), p.rank);
    for (int r = warp; r < kRanks; r += kCfg.num_warps) {
      const int index = p.peers[r];
      if (index >= 0 || __any_sync(kFullMask, is_masked(waiter, r))) continue;
      put_with_word(p.transport, theirs + Plan::kSelectionsWord,
                    plan.staged_counts(r) + Plan::kSelectionsWord, num_words * sizeof(uint64_t),
                    theirs + Plan::kTokensWord, stamp(waiter.epoch, p.num_tokens), index);
    }
  }

  __device__ Draw send_chunk(int first, int last) {
    Draw next;
    Outgoing row;
    row.load(token_row(first));  // on its way while the block counts
    int selected = lane < kTopk ? expert(first, lane) : -1;
    float weight = weight_of(first);
    count_selections(first);
    for (int token = first; token < last; ++token) {
      if (token != first) {
        row.load(token_row(token));
        selected = lane < kTopk ? expert(token, lane) : -1;
        weight = weight_of(token);
      }
      if (warp == 0) send_selections(token, selected, weight);
      __syncthreads();
      const uint32_t readers = shared_readers();
      if constexpr (kLines) {
        row.template store<true>(1, kFormat == kNvfp4 ? *p.global_scale : 1.0f,
                                 [&](int) { return staged() + kHeader; });
        __syncthreads();
        if (token + 1 == last) next = draw_next();
        send_lines(token, readers);
        __syncthreads();
        continue;
      }
      row.store(kRemote ? slots_of(readers) : readers, kFormat == kNvfp4 ? *p.global_scale : 1.0f,
                [&](int reader) { return slot(reader, p.rank, token); });
      __syncthreads();
      if (token + 1 == last) next = draw_next();
      if (threadIdx.x < kRanks && may_send(waiter, threadIdx.x)) {
        const int index = index_of<kRemote>(p, threadIdx.x);
        if (!kRemote || index >= 0)
          ptx::st_release_sys(word(index, p.rank, token),
                              stamp(waiter.epoch, readers >> index & 1));
      }
    }
    if constexpr (kRemote) put_chunk(first, last);
    return next;
  }

  // What is staged; to ranks that get nothing of it a unit that says so.
  __device__ void send_lines(int token, uint32_t readers) const {
    for (int unit = warp; unit < kUnits; unit += kCfg.num_warps) {
      Unit each;
      each.load_shared(staged(), unit, lane);
      for (uint32_t left = readers; left != 0; left &= left - 1)
        each.send(slot(__ffs(left) - 1, p.rank, token), unit, waiter.epoch, lane);
    }
    const Unit none{{kNoSelection, 0, kNoSelection, 0}};
    if (warp == kCfg.num_warps - 1)
      for (uint32_t left = ~readers & ((1u << kRanks) - 1); left != 0; left &= left - 1)
        none.send(slot(__ffs(left) - 1, p.rank, token), 0, waiter.epoch, lane);
  }

  __device__ const char* token_row(int token) const {
    return p.x + static_cast<int64_t>(token) * (2 * kCfg.hidden);
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

  // Tells all ranks of the token the position of each selection among those of its expert; lane k has
  // the expert of selection k, and its weight.
  __device__ void send_selections(int token, int e, float weight) {
    const uint32_t same = __match_any_sync(kFullMask, e);
    const uint32_t before = __popc(same & ((1u << lane) - 1));
    const uint32_t selection =
        e >= 0 ? static_cast<uint32_t>(e) << kPositionBits | (histogram()[e] + before)
               : kNoSelection;
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
        if (lane < kTopk) write_selection(__ffs(left) - 1, token, selection, weight);
    } else {
      // Lane r looks whether rank r may be sent to.
      readers = __reduce_or_sync(kFullMask, e >= 0 ? 1u << e / kExpertsARank : 0) &
                __ballot_sync(kFullMask, lane < kRanks && may_send(waiter, lane));
      for (uint32_t left = readers; left != 0; left &= left - 1)
        if (lane < kTopk) write_selection(__ffs(left) - 1, token, selection, weight);
    }
    if (lane == 0) shared_readers() = readers;
  }

  __device__ void write_selection(int reader, int token, uint32_t selection, float weight) const {
    char* const place = kLines ? staged() : slot(reader, p.rank, token) + kSelections;
    uint32_t* const words = reinterpret_cast<uint32_t*>(place) + 2 * lane;
    words[0] = selection;
    words[1] = __float_as_uint(weight);
  }

  // ---- receive ----------------------------------------------------------------------------------

  // A selection that has come: its row of recv_x, counted over all slabs, -1 = on another rank, -2 =
  // beyond its slab; and its weight.
  struct Placed {
    int row;
    float weight;
  };

  __device__ void receive(uint32_t unit) {
    // Lane s has the number of tokens of source s; with more ranks than lanes only the most matter.
    uint32_t tokens = lane < kRanks ? plan.at(lane, kExpertsARank) : 0;
    for (int source = lane + kWarpSize; source < kRanks; source += kWarpSize)
      tokens = max(tokens, plan.at(source, kExpertsARank));
    const uint32_t num_units = __reduce_max_sync(kFullMask, tokens) * kRanks * p.num_parts;
    while (unit < num_units) {
      Draw next;
      const auto draw_on = [&] {
        unit = next.unit();
        if (!kCfg.shrink && unit >= num_units) ticket.take(waiter.epoch);
      };
      const uint32_t row = unit / p.num_parts;
      // Each rank starts with itself, so that no source is looked at by all at once.
      const int source = (p.rank + row % kRanks) % kRanks;
      const uint32_t token = row / kRanks;
      const uint32_t num_tokens = kRanks <= kWarpSize ? __shfl_sync(kFullMask, tokens, source)
                                                      : plan.at(source, kExpertsARank);
      const int part = unit % p.num_parts;
      if constexpr (kLines) {
        next = Draw(p.counters + 2);
        if (token >= num_tokens)
          draw_on();
        else if (!receive_lines(source, static_cast<int>(token), part, draw_on))
          return;
        continue;
      }
      uint64_t word = 0;
      bool has_token = token < num_tokens;
      if (has_token && !wait_for_token(source, static_cast<int>(token), word, has_token)) return;
      // Drawn before the wait, blocks that come to it early would have two units a warp, and others
      // none. The load of the row hides it.
      next = Draw(p.counters + 2);
      if (has_token)
        receive_token(source, static_cast<int>(token), part, word, draw_on);
      else
        draw_on();
    }
  }

  // A part of a token's units, from the lines to the rows of its experts. draw_on() is called when the
  // first of them are here. False: leave.
  template <typename DrawOn>
  __device__ bool receive_lines(int source, int token, int part, DrawOn draw_on) const {
    constexpr int kBatch = 4;
    const char* const src = slot(own(), source, token);
    const int units = ceil_div(kUnits, p.num_parts), last = min(kUnits, (part + 1) * units);
    int first = part * units;
    if (kRanks * p.max_tokens > kFewTokens) {
      // Or else every warp would read all of its lines again and again while they come.
      const uint64_t flag = line_flag(waiter.epoch);
      uint64_t seen;
      if (!all_lanes(wait_until(waiter, kWaitLowLatencyDispatchToken, source, token, flag,
                                last_flag(src, 0), seen,
                                [&](uint64_t value) { return value == flag; })))
        return false;
    }
    Unit batch[kBatch];
    Placed placed{-1, 0.0f};
    uint32_t here = 0;
    const auto look_at_batch = [&] {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        batch[i].look(Unit::in_lines(src, min(first + i, last - 1), lane));
      bool all_here = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) all_here &= batch[i].is_here(waiter.epoch, lane);
      return all_here ? 0u : 1u;
    };
    const auto look_at = [&] {
      Unit head;
      head.look(Unit::in_lines(src, 0, lane));
      const uint32_t missing = look_at_batch();
      if (!__all_sync(kFullMask, head.is_here(waiter.epoch, lane))) return 1u;
      placed = selection_of(head, source);
      here = __ballot_sync(kFullMask, placed.row >= 0);
      return here == 0 ? 0 : missing;
    };
    if (!warp_wait(waiter, kWaitLowLatencyDispatchToken, source, token, look_at)) return false;
    draw_on();
    if (part == 0) store_routes(source, token, placed);
    const auto scales = Row::first_scale(p.recv_scales, placed.row, plan.rows_a_slab());
    while (here != 0) {
      for (uint32_t left = here; left != 0; left &= left - 1) {
        const int dst = __shfl_sync(kFullMask, placed.row, __ffs(left) - 1);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (first + i < last) store_bytes(batch[i], first + i, dst);
      }
      for (int index = max(first, kScaleUnit); index < min(last, first + kBatch); ++index) {
        Unit unit = batch[0];
#pragma unroll
        for (int i = 1; i < kBatch; ++i)
          if (first + i == index) unit = batch[i];
        for (uint32_t left = here; left != 0; left &= left - 1)
          store_scales(unit, index, of_lane(scales, __ffs(left) - 1));
      }
      first += kBatch;
      if (first >= last) break;
      if (!warp_wait(waiter, kWaitLowLatencyDispatchToken, source, token, look_at_batch))
        return false;
    }
    return true;
  }

  // Lane k gets selection k, of the first unit of a token.
  __device__ Placed selection_of(const Unit& head, int source) const {
    const int piece = lane / 2, holder = piece + piece / 7;  // of two selections
    const uint32_t x = __shfl_sync(kFullMask, head.v.x, holder),
                   y = __shfl_sync(kFullMask, head.v.y, holder),
                   z = __shfl_sync(kFullMask, head.v.z, holder),
                   w = __shfl_sync(kFullMask, head.v.w, holder);
    if (lane >= kTopk) return {-1, 0.0f};
    return lane % 2 == 0 ? place(source, x, y) : place(source, z, w);
  }

  // From the two words of a selection.
  __device__ Placed place(int source, uint32_t selection, uint32_t weight) const {
    const int e = static_cast<int>(selection >> kPositionBits) - p.rank * kExpertsARank;
    if (e < 0 || e >= kExpertsARank) return {-1, 0.0f};
    const uint32_t position = plan.at(source, e) + (selection & ((1u << kPositionBits) - 1));
    const bool fits = position < plan.rows_a_slab();
    return {fits ? static_cast<int>(e * plan.rows_a_slab() + position) : -2,
            __uint_as_float(weight)};
  }

  // What the combine follows. Lane k has selection k.
  __device__ void store_routes(int source, int token, Placed placed) const {
    const int64_t i = (static_cast<int64_t>(source) * p.max_tokens + token) * kTopk + lane;
    if (lane < kTopk) p.source_rows[i] = placed.row;
    if (placed.row < 0) return;
    p.source_weights[i] = placed.weight;
    p.src_info[placed.row] = token;
  }

  // The lane's bytes of a unit to a row, if they are of one.
  __device__ void store_bytes(const Unit& unit, int index, int row) const {
    const int at = Unit::offset(index, lane) - kHeader;
    if (at < 0 || at >= Row::kBytes) return;
    char* const dst = p.recv_x + static_cast<int64_t>(row) * Row::kBytes + at;
    if (Unit::has_flag(lane))
      *reinterpret_cast<uint64_t*>(dst) = static_cast<uint64_t>(unit.v.y) << 32 | unit.v.x;
    else
      ptx::st_v4(dst, unit.v);
  }

  // The same, if they are scales; `first` of the row.
  __device__ void store_scales(const Unit& unit, int index, typename Row::ScaleUnit* first) const {
    const int at = Unit::offset(index, lane) - kHeader - Row::kBytes;
    if (Row::kScaleUnits == 0 || at < 0) return;
    constexpr int kInAWord = 4 / static_cast<int>(sizeof(typename Row::ScaleUnit));
    const uint32_t words[4] = {unit.v.x, unit.v.y, unit.v.z, unit.v.w};
    const int64_t step = Row::scale_step(plan.rows_a_slab());
#pragma unroll
    for (int i = 0; i < 4 * kInAWord; ++i) {
      const int scale = at / 4 * kInAWord + i;
      if (scale < Row::kScaleUnits && (i < 2 * kInAWord || !Unit::has_flag(lane)))
        first[scale * step] =
            static_cast<typename Row::ScaleUnit>(words[i / kInAWord] >> i % kInAWord * 8);
    }
  }

  // False: leave. `word` is that of the token; not `has_token`: its source is masked.
  __device__ bool wait_for_token(int source, int token, uint64_t& word, bool& has_token) const {
    // All lanes look, so that each has acquired what the word publishes.
    if (!comes(source, token) ||
        all_lanes(wait_stamp(waiter, kWaitLowLatencyDispatchToken, source, token,
                             this->word(own(), source, token), word)))
      return true;
    if constexpr (!kCfg.shrink) return false;
    has_token = false;
    const bool masked = __all_sync(kFullMask, is_masked(waiter, source));
    if (masked && lane == 0) plan.drop(source);
    return masked;
  }

  // draw_on() is called when what is to be copied is on its way.
  template <typename DrawOn>
  __device__ void receive_token(int source, int token, int part, uint64_t word,
                                DrawOn draw_on) const {
    if (static_cast<uint32_t>(word) == 0) {
      draw_on();
      if (part == 0) store_routes(source, token, {-1, 0.0f});
      return;
    }

    if constexpr (kRemote)
      if (p.peers[source] < 0) warp_received(p.transport, lane);
    // All of it is on its way at once.
    const char* const src = slot(own(), source, token);
    const int part_vecs = align_up(ceil_div(Incoming::kVecs, p.num_parts), kWarpSize);
    const int last = min(Incoming::kVecs, (part + 1) * part_vecs);
    int first = part * part_vecs;
    Incoming batch;
    batch.load(src, first, last, lane);
    if (part == 0) batch.load_scales(src, lane);
    draw_on();

    // Lane k has selection k.
    Placed placed{-1, 0.0f};
    if (lane < kTopk) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(src + kSelections) + 2 * lane;
      placed = place(source, words[0], words[1]);
    }
    const uint32_t here = __ballot_sync(kFullMask, placed.row >= 0);
    if (part == 0) {
      store_routes(source, token, placed);
      const auto scales = Row::first_scale(p.recv_scales, placed.row, plan.rows_a_slab());
      for (uint32_t left = here; left != 0; left &= left - 1)
        batch.store_scales(of_lane(scales, __ffs(left) - 1), Row::scale_step(plan.rows_a_slab()),
                           lane);
    }
    for (;;) {
      for (uint32_t left = here; left != 0; left &= left - 1) {
        const int64_t dst_row = __shfl_sync(kFullMask, placed.row, __ffs(left) - 1);
        batch.store(p.recv_x + dst_row * Row::kBytes, first, last, lane);
      }
      first += kBatch * kWarpSize;
      if (first >= last) return;
      batch.load(src, first, last, lane);
    }
  }

  // Whether a token has a word here: of remote sources those alone that go to this rank.
  __device__ bool comes(int source, int token) const {
    if constexpr (kRemote)
      if (p.peers[source] < 0)
        return (Plan::token_bits(plan.counts(own(), source))[token / 32] >> token % 32 & 1) != 0;
    return true;
  }

  const LowLatencyDispatchParams& p;
  const int warp, lane;
  const Waiter waiter;
  uint32_t* const shared;
  const Plan plan;
  Ticket ticket;
};

template <LowLatencyDispatchConfig kCfg>
__device__ void low_latency_dispatch(const LowLatencyDispatchParams& p) {
  LowLatencyDispatch<kCfg>::prepare();
  ptx::griddepcontrol_wait();
  LowLatencyDispatch<kCfg>(p).run();
}

}  // namespace epjit

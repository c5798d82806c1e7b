// Low-latency combine that adds up a rank's rows before they cross the links: one row a token and
// rank crosses, instead of one an expert.
//
//   part[t, r] = bf16(sum over k with expert topk_idx[t, k] on rank r of weights[t, k] * y[t, k])
//   out[t]     = bf16(sum over r ascending of part[t, r])
//
// k ascending, from +0.0, products and sums rounded to fp32. Against the combine that sums all in fp32
// each part has one more rounding to bf16: a relative error of up to 2^-8 of a part, where the result
// has 2^-8 of its own. Entries that are no expert, and masked ranks, are left out.
//
//   slots[s]    two halves of half_bytes: operations of even and of odd epoch
//               [max_tokens, num_ranks, hidden] bf16; (t, r) of owner s is written by r
//   words[s]    two halves of [max_tokens, num_ranks, num_parts] u64, by r, after its piece of the
//               row: stamp(epoch, 0)
//
// Units of a warp, drawn from one counter: (token, owner, piece of the row): add, write. When none is
// left, (token, piece): add the rows of this rank, into the result for the time being; wait for the other
// ranks of the token; add what they and this one have made. So what this rank makes of its own rows
// needs no slot; with a hook it has one, for x is the caller's after the send.
//
// Weights have come with the rows of the dispatch (`weights_sent`), and sending waits for nothing. Or
// else the owners send them now: behind the words above lie [num_ranks, max_tokens * num_topk] u64 on
// rank r: row s by s, for the experts of r: stamp(epoch, the weight's bits). A weight is the word that
// says that it is here, so it needs no release. The first units are then 32 of this rank's weights, each
// to the rank of its expert, and all others wait for the owner's weights.
//
// Progress: what is drawn first, rows or weights, waits for nothing, so whoever waits for it waits for a
// peer that has it on its way once it runs. Rows that wait for weights wait for that alone: the send
// phase of a hook then waits for its peers to have started theirs, and blocks draw no unit before. While
// a peer is late, few blocks wait for it (sync.cuh, "blocks that leave"). Halves are free for the reason
// that dispatch.cu gives.
//
// Launch: any grid, low_latency_combine_threads() threads. Graph-safe.
#include "epjit/sum.cuh"
#include "epjit/topk.cuh"
#include "low_latency/memory.cuh"

namespace epjit {

struct LowLatencyReducedCombineConfig {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t hidden;
  int32_t num_topk;
  bool topk_is_int64;
  bool weights_sent;  // by the dispatch
  int32_t num_warps;
  bool shrink;  // ranks may be masked
};

struct LowLatencyReducedCombineParams : Operation, LowLatencyParams {
  const char* x;                 // [experts_per_rank, num_ranks * max_tokens, hidden] bf16
  const void* topk_idx;          // [num_tokens, num_topk] int32 or int64, global experts
  const float* topk_weights;     // [num_tokens, num_topk]; sent ones: of source_rows
  const int32_t* source_tokens;  // [num_ranks]: tokens of each owner
  const int32_t* source_rows;    // [num_ranks, max_tokens, num_topk]: row of x of each selection of
                                 // each owner, -1 = none here, -2 = beyond the slab
  char* out;                     // [num_tokens, hidden] bf16
  int64_t* wait_cost;            // [num_ranks], += cycles until it had begun; or null
  uint32_t* counters;            // own [3]: ticket, next unit to send, next unit to add; zero on
                                 // entry and on exit
  int32_t words_stride;          // words of a half
  int32_t num_tokens;
  int32_t max_tokens;   // of any rank
  int32_t num_parts;    // pieces of a row, the same on all ranks
  int32_t num_staying;  // blocks that wait for a late peer
  int32_t rank;
  bool sends;     // this launch has the send phase
  bool receives;  // this launch has the receive phase
};

constexpr int low_latency_combine_threads(LowLatencyReducedCombineConfig cfg) {
  return cfg.num_warps * kWarpSize;
}

// The block's word of the ticket.
constexpr int low_latency_combine_shared_bytes(LowLatencyReducedCombineConfig) { return 4; }

template <LowLatencyReducedCombineConfig kCfg>
class LowLatencyReducedCombine {
  static constexpr int kRanks = kCfg.num_ranks;
  static constexpr int kExperts = kCfg.num_experts;
  static constexpr int kExpertsARank = kExperts / kRanks;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kRowBytes = 2 * kCfg.hidden;
  static constexpr int kVecs = kRowBytes / 16;
  static constexpr bool kWeightsSent = kCfg.weights_sent;
  // Rows in flight, of which a token seldom has more on one rank, and pieces of each.
  static constexpr int kBatch = 4, kUnroll = 2;
  static_assert(kRanks >= 1 && kRanks <= kMaxRanks && kExperts % kRanks == 0);
  static_assert(kTopk >= 1 && kTopk <= kMaxTopk);
  static_assert(kRowBytes % 16 == 0, "a row is moved in pieces of 16 bytes");

 public:
  __device__ explicit LowLatencyReducedCombine(const LowLatencyReducedCombineParams& params)
      : p(params),
        lane(threadIdx.x % kWarpSize),
        waiter(start_operation<kRanks>(p, kWaitLowLatencyCombineStart,
                                       kCfg.shrink ? p.mask : nullptr)),
        ticket(ticket_word(), p.counters, kCfg.num_warps) {}

  // Before the kernel ahead has ended: touches nothing but shared memory.
  static __device__ void prepare() {
    if (threadIdx.x == 0) *ticket_word() = 0;
  }

  __device__ void run() {
    const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);
    const bool sends = p.sends && num_owners() > 0;
    // Loaded and drawn early: all of it is on its way at once.
    const bool has_part = lane < kRanks && (lane != p.rank || !is_whole());
    const int tokens = sends && has_part ? p.source_tokens[lane] : 0;
    const bool stays = is_staying(p);
    Draw first;
    if (sends && (kWeightsSent || stays)) first = Draw(p.counters + 1);
    if (kWeightsSent ? !p.receives || blockIdx.x != 0 : p.receives && blockIdx.x != 0)
      ptx::griddepcontrol_launch_dependents();
    // Who does not stay meets the peers before it waits for one.
    const auto has_met = [&] {
      return stays || meet_peers<kRanks>(leaving(waiter), nullptr, lane);
    };
    if (__syncthreads_and(aborted == 0) && (kWeightsSent || has_met())) {
      if (!kWeightsSent && sends && !stays) first = Draw(p.counters + 1);
      const bool ok = !sends || send(first.unit(), tokens);
      if (ok && p.receives && (!kWeightsSent || has_met()) &&
          (!is_herald() || meet_peers<kRanks>(waiter, p.wait_cost, lane)))
        receive();
    }
    ticket.take(waiter.epoch);
    if (ticket.is_last()) end_operation(p, waiter.epoch, lane);
  }

 private:
  static __device__ uint32_t* ticket_word() {
    return reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  }

  __device__ bool is_whole() const { return p.sends && p.receives; }
  __device__ int num_owners() const { return kRanks - is_whole(); }

  // The row that `writer` makes of the owner's token.
  __device__ char* slot(int owner, int writer, int token) const {
    return half_of_slots(p, owner, waiter.epoch) +
           (static_cast<int64_t>(token) * kRanks + writer) * kRowBytes;
  }

  __device__ uint64_t* words(int rank) const { return half_of_words(p, rank, waiter.epoch); }

  __device__ uint64_t* word(int owner, int writer, int token, int part) const {
    return words(owner) + (token * kRanks + writer) * p.num_parts + part;
  }

  // Word in which `reader` finds the weight of a selection, token * kTopk + k, of `owner`.
  __device__ uint64_t* weight_word(int reader, int owner, int selection) const {
    return words(reader) + p.max_tokens * (kRanks * p.num_parts + owner * kTopk) + selection;
  }

  // Of a selection: its row of x, -1 = none here, and its weight, if they were sent.
  __device__ void load_route(int owner, int token, int k, int& row, float& weight) const {
    const int64_t i = (static_cast<int64_t>(owner) * p.max_tokens + token) * kTopk + k;
    row = p.source_rows[i];
    if constexpr (kWeightsSent) weight = p.topk_weights[i];
  }

  // Waits for a word of this operation, `patience` times as long as others do; `seen` is what it says.
  __device__ bool wait_stamp(int peer, int index, const uint64_t* word, uint64_t& seen,
                             int patience) const {
    Waiter patient = waiter;
    patient.timeout_ns *= patience;
    return epjit::wait_stamp(patient, kWaitLowLatencyCombineRow, peer, index, word, seen);
  }

  // ---- send -------------------------------------------------------------------------------------

  // Lane s has the number of tokens of owner s.
  __device__ bool send(uint32_t unit, int tokens) const {
    const uint32_t weight_units = kWeightsSent ? 0 : ceil_div(p.num_tokens * kTopk, kWarpSize);
    const uint32_t owners = num_owners();
    const uint32_t num_units =
        weight_units + __reduce_max_sync(kFullMask, tokens) * owners * p.num_parts;
    while (unit < num_units) {
      const Draw next(p.counters + 1);
      if (unit < weight_units) {
        send_weight(unit * kWarpSize + lane);
      } else {
        const uint32_t row = (unit - weight_units) / p.num_parts;
        const int part = (unit - weight_units) % p.num_parts, token = row / owners;
        const int owner = (p.rank + 1 + row % owners) % kRanks;
        if (token < __shfl_sync(kFullMask, tokens, owner) && !send_part(owner, token, part))
          return false;
      }
      unit = next.unit();
    }
    return true;
  }

  __device__ void send_weight(int selection) const {
    if (selection >= p.num_tokens * kTopk) return;
    const float weight = p.topk_weights[selection];
    const int e = load_choice<kCfg.topk_is_int64>(p.topk_idx, selection, kExperts);
    const int reader = e / kExpertsARank;
    if (e >= 0 && reader != p.rank && may_send(waiter, reader))
      ptx::st_relaxed_sys(weight_word(reader, p.rank, selection),
                          stamp(waiter.epoch, __float_as_uint(weight)));
  }

  __device__ bool send_part(int owner, int token, int part) const {
    int row = -1;
    float weight = 0.0f;
    if (lane < kTopk) load_route(owner, token, lane, row, weight);
    const uint32_t rows = __ballot_sync(kFullMask, row >= 0);
    // A sum without the rows beyond a slab is none: it does not come, and its owner says so.
    if (rows == 0 || __any_sync(kFullMask, row == -2) || !warp_may_send(waiter, owner)) return true;
    if (!kWeightsSent && !wait_for_weight(owner, token * kTopk + lane, row >= 0, weight))
      return __all_sync(kFullMask, is_masked(waiter, owner));
    add_up<kBatch, true>(row_of_x(row), weight, rows, part, slot(owner, p.rank, token));
    // Pieces of all lanes -> __syncwarp -> release: cumulative.
    __syncwarp();
    if (lane == 0) ptx::st_release_sys(word(owner, p.rank, token, part), stamp(waiter.epoch, 0));
    return true;
  }

  // Each lane waits for the weight of a selection, if it has one.
  __device__ bool wait_for_weight(int owner, int selection, bool has_one, float& weight) const {
    bool ok = true;
    uint64_t seen = 0;
    if (has_one && owner == p.rank)
      weight = p.topk_weights[selection];
    else if (has_one)
      ok = wait_stamp(owner, selection, weight_word(p.rank, owner, selection), seen, 1);
    if (has_one && owner != p.rank) weight = __uint_as_float(static_cast<uint32_t>(seen));
    return all_lanes(ok);
  }

  // Row of x, by its number.
  __device__ const char* row_of_x(int row) const {
    return row >= 0 ? p.x + static_cast<int64_t>(row) * kRowBytes : nullptr;
  }

  // A piece of the sum of rows, rounded once, to dst. Lane k has row and weight k, of those whose bit in
  // `rows` is set, which are added in this order from +0.0. A lane reads and writes the same bytes of each.
  template <int kBatch, bool kWeighted>
  __device__ void add_up(const char* row, float weight, uint32_t rows, int part, char* dst) const {
    const int vecs = align_up(ceil_div(kVecs, p.num_parts), kWarpSize);
    const int last = min(kVecs, (part + 1) * vecs);
    for (int first = part * vecs; first < last; first += kUnroll * kWarpSize) {
      Sum8<false> sums[kUnroll];
      add_rows<kBatch, kWeighted>(sums, row, weight, rows, first + lane, last);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int vec = first + i * kWarpSize + lane;
        if (vec < last) ptx::st_v4(dst + vec * 16, sums[i].rounded());
      }
    }
  }

  // ---- receive ----------------------------------------------------------------------------------

  // The warp that meets the peers.
  __device__ bool is_herald() const {
    return blockIdx.x == 0 && threadIdx.x / kWarpSize == kCfg.num_warps - 1;
  }

  __device__ void receive() {
    const uint32_t num_units = static_cast<uint32_t>(p.num_tokens) * p.num_parts;
    uint32_t unit = Draw(p.counters + 2).unit();
    while (unit < num_units) {
      const Draw next(p.counters + 2);
      const int token = unit / p.num_parts, part = unit % p.num_parts;
      const auto draw_on = [&] {
        unit = next.unit();
        if (unit >= num_units) ticket.take(waiter.epoch);
      };
      if (!receive_part(token, part, draw_on)) return;
    }
  }

  // draw_on() is called when the warp has nothing to do but to wait.
  template <typename DrawOn>
  __device__ bool receive_part(int token, int part, DrawOn draw_on) const {
    // Lane k has selection k: of this rank its row, of others the rank.
    const int64_t selection = static_cast<int64_t>(token) * kTopk + lane;
    const int e =
        lane < kTopk ? load_choice<kCfg.topk_is_int64>(p.topk_idx, selection, kExperts) : -1;
    const int peer = e >= 0 ? e / kExpertsARank : -1;
    const uint32_t ranks = __reduce_or_sync(kFullMask, peer >= 0 ? 1u << peer : 0);
    // What this rank makes of its own rows.
    char* const out = p.out + static_cast<int64_t>(token) * kRowBytes;
    int stays = -1;
    float weight = 0.0f;
    if (peer == p.rank && has_own_token<kCfg.shrink>(p, waiter, token)) {
      load_route(p.rank, token, lane, stays, weight);
      if constexpr (!kWeightsSent) weight = p.topk_weights[selection];
    }
    const uint32_t own_rows = is_whole() ? __ballot_sync(kFullMask, stays >= 0) : 0;
    if (own_rows != 0) add_up<kBatch, true>(row_of_x(stays), weight, own_rows, part, out);
    draw_on();
    const bool own_comes =
        !is_whole() && __any_sync(kFullMask, stays >= 0) && !__any_sync(kFullMask, stays == -2);
    // Lane r has what rank r has made of it. A peer that waits for the weights of a lost rank before
    // it sends shall not be masked for that: it gives up on the lost rank first.
    const int patience = kWeightsSent || waiter.mask == nullptr ? 1 : 2;
    const bool has_part = lane == p.rank ? own_comes : lane < kRanks && (ranks >> lane & 1) != 0;
    const char* row = lane == p.rank && own_rows != 0 ? out : nullptr;
    bool ok = true;
    if (has_part && !is_masked(waiter, lane)) {
      uint64_t seen;
      if (wait_stamp(lane, token, word(p.rank, lane, token, part), seen, patience))
        row = slot(p.rank, lane, token);
      else
        ok = is_masked(waiter, lane);
    }
    if (stays == -2) {  // of other ranks such a sum does not come
      report_at_once(waiter, kRoomLowLatencyCombineSlab, selection);
      ok = false;
    }
    if (!all_lanes(ok)) return false;

    add_up<kBatch, false>(row, 0.0f, __ballot_sync(kFullMask, row != nullptr), part, out);
    return true;
  }

  const LowLatencyReducedCombineParams& p;
  const int lane;
  const Waiter waiter;
  Ticket ticket;
};

template <LowLatencyReducedCombineConfig kCfg>
__device__ void low_latency_combine(const LowLatencyReducedCombineParams& p) {
  LowLatencyReducedCombine<kCfg>::prepare();
  ptx::griddepcontrol_wait();
  LowLatencyReducedCombine<kCfg>(p).run();
}

}  // namespace epjit

// Combine between NVLink domains: the rows that a dispatch spread come back and are summed, first
// inside each domain, then over the domains.
//
//   P_n[t]        = round(sum over local ranks j of x_(n, j)[row of t on (n, j)])     j ascending
//   combined_x[t] = round(bias_0[t] + bias_1[t] + sum over domains n of P_n[t])       n ascending
//   combined_topk_weights[t, k] = the same sums, not rounded
//
// in fp32; sums start from +0.0, the outer one from bias_0 if there is one. Domains where t has no
// row are left out, and rows that a rank had no room for: `passing` has neither. No weight is
// applied to x. Channels, rings and rail peers are explained in rail.cuh; index i of a channel is
// that of its dispatch.
//
//   slots[o]  [num_domains, num_local, num_slots, slot_bytes]  of local rank o; (n, j) is written by
//             local rank j: rows of the channel (n, o), index i in slot i % num_slots:
//             { row [hidden_bytes], topk_weights [num_topk] f32 }
//   words[o]  [num_domains, num_local, num_slots]  row (n, j) by j, after the row
//   stage     [num_domains, ring_bytes]  symmetric; sums for domain n until they are put
//   inbox     [num_domains, ring_bytes]  symmetric; ring n by the rail peer in domain n: P_n of
//             this rank's tokens, by index in the channel to n
//
// Push    the first warps of a block: x -> slots of the local rank that the row goes back through,
//         then the words. Rows that go back through this rank are read where they lie.
// Sum     the next warps: wait for the rows of a token of a channel (n, local), n another domain;
//         their sum -> stage
// Put     the next warps: stage -> the inbox of the rail peer, a chunk at a time
// Reduce  the other warps, and all when they have nothing else to do: wait for a token's rows of the
//         own domain and for its sums of the others; add them
//
// Progress: a token of rank s is reduced when all its domains have sent it, so channels depend on
// each other, and a warp that pushes, sums or puts keeps to one channel until nothing of it is left;
// each channel has such warps from the start. Take the first token of s that is not reduced: all lower
// indices of all its channels are, so each of these may write the window of its index (it waits for
// the one before the last), in every ring on the way. The rank that sums it waits for pushes of its
// own channel only, and so on. So it moves, whatever the size of the rings.
//
// Launch: any grid that is resident as a whole, has two blocks or more, a pushing warp for each
// channel that is pushed (num_domains * (num_local - 1)), a summing and a putting one for each other
// domain;
// combine_threads() threads. Graph-safe.
#include "epjit/sum.cuh"
#include "epjit/windows.cuh"
#include "internode/rail.cuh"

namespace epjit {

struct InternodeCombineConfig {
  int32_t num_domains;
  int32_t num_local;     // ranks of a domain
  int32_t hidden_bytes;  // of a row
  int32_t num_topk;      // 0 = no weights
  bool is_f16;           // else bf16
  bool tma;              // rows are pushed by bulk copies, else through registers
  int32_t num_warps;
  int32_t num_push_warps;    // of num_warps
  int32_t num_sum_warps;     // of num_warps
  int32_t num_put_warps;     // of num_warps
  int32_t rows_per_warp;     // rows of a pushing warp in shared memory
  int32_t tokens_per_chunk;  // of one put; ring_slots is a multiple of twice this
};

struct InternodeCombineParams : Operation, RailParams, RingParams {
  const char* x;                    // [num_rows, hidden], num_rows >= rank_prefix[ranks - 1]
  const float* topk_weights;        // [as x, num_topk]
  const char* bias_0;               // [num_tokens, hidden] or null
  const char* bias_1;               // [num_tokens, hidden] or null
  const int32_t* recv_src_meta;     // [as x, 2]: index in its channel, token
  const int32_t* send_domain_head;  // [num_tokens, num_domains]: index in the channel, -1 = none
  const int32_t* send_tokens;       // [num_domains, num_tokens + 1]: of interest is the last column
  const int32_t* channel_tokens;    // [num_domains, num_local]: length of each incoming channel
  const int32_t* passing_prefix;    // [num_domains]: inclusive, of the channels (n, local)
  const int32_t* passing;        // [num_passing]: local ranks that have a row of the token (8 bits)
                                 // | its position here << 8
  const int32_t* rank_prefix;    // [ranks]: inclusive over sources (rows of this rank)
  char* combined_x;              // [num_tokens, hidden]
  float* combined_topk_weights;  // [num_tokens, num_topk]
  uint64_t slots[kMaxRanks];     // symmetric, of each local rank
  uint64_t words[kMaxRanks];     // symmetric, of each local rank
  char* inbox;                   // this rank's
  // own [2 + ranks + 5 * num_domains]: ticket, next token to reduce, next unit to push of each
  // channel, next chunk to sum of each domain, what is used of (slots, window & 1) and of (inbox,
  // window & 1) of each domain; zero on entry and on exit
  uint32_t* counters;
  int32_t num_slots;  // even, at least 2
  int32_t ring_slots;
  int32_t num_rows;     // nothing beyond is read, whatever rank_prefix and passing say
  int32_t num_passing;  // rows of tokens beyond are lost
  int32_t num_tokens;
  int32_t num_parts;  // warps that share the reduction of one token
  int32_t rank;
  int32_t domain;
  int32_t local;
};

constexpr int combine_threads(InternodeCombineConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int combine_shared_bytes(InternodeCombineConfig cfg) {
  return copier_shared_bytes(cfg.tma, cfg.num_push_warps, cfg.rows_per_warp, cfg.hidden_bytes);
}

constexpr int combine_slot_bytes(InternodeCombineConfig cfg) {
  return align_up(cfg.hidden_bytes + 4 * cfg.num_topk, 128);
}

template <InternodeCombineConfig kCfg>
class InternodeCombine {
  static constexpr int kDomains = kCfg.num_domains, kLocal = kCfg.num_local;
  static constexpr int kRanks = kDomains * kLocal;
  static constexpr int kChunk = kCfg.tokens_per_chunk;
  static constexpr int kRows = kCfg.rows_per_warp;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kSlotBytes = combine_slot_bytes(kCfg);
  static constexpr int kVecs = kCfg.hidden_bytes / 16;
  static constexpr int kPushed = kDomains * (kLocal - 1);  // channels
  // Pieces of 16 bytes of each row whose loads a thread has in flight, and domains of which it has:
  // with one piece of one row, 4096 tokens took 683 us instead of 484 (two H100s, 24 SMs).
  static constexpr int kSumUnroll = 8 / kLocal;
  static constexpr int kUnroll = kLocal <= 2 ? 2 : 1, kBatch = 2;
  static constexpr int kCounters = 2 + kRanks + 5 * kDomains;
  static_assert(kTopk >= 0 && kTopk <= kMaxTopk);
  static constexpr int kSummers = kCfg.num_push_warps, kPutters = kSummers + kCfg.num_sum_warps;
  static constexpr int kReducers = kPutters + kCfg.num_put_warps;
  static_assert(kCfg.num_push_warps >= 1 && kCfg.num_sum_warps >= 1 && kCfg.num_put_warps >= 1);
  static_assert(kReducers + 2 <= kCfg.num_warps,
                "someone must reduce from the start, beside the herald");
  using Copier = RowCopier<kCfg.tma, kCfg.num_push_warps, kRows, kCfg.hidden_bytes>;
  using Params = InternodeCombineParams;
  using Sum = Sum8<kCfg.is_f16>;

 public:
  __device__ explicit InternodeCombine(const Params& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        rail(p, {kWaitCombineStart, kWaitCombineEntry, kWaitCombineReady}) {}

  __device__ void run() {
    // What an operation that failed was to write (rank_prefix, send_head) is garbage.
    bool ok = __all_sync(kFullMask, ptx::ld_relaxed_gpu(p.abort) == 0);
    if (ok && blockIdx.x == 0 && warp == kCfg.num_warps - 1)
      ok = rail.announce() && rail.all_announced();
    else if (ok && warp < kSummers)
      ok = push();
    else if (ok && warp < kPutters)
      ok = sum();
    else if (ok && warp < kReducers)
      ok = rail.put_staged(kWaitCombineCredit, (warp - kPutters) * gridDim.x + blockIdx.x,
                           kCfg.num_put_warps * gridDim.x, passing_tokens(), p.inbox, kSlotBytes);
    if (ok && blockIdx.x == 0 && threadIdx.x == blockDim.x - kWarpSize - 1)
      report_overflow(p, rail.waiter.epoch, kRoomCombineRows, p.num_rows, segment_start(kRanks));
    if (ok) reduce();
    finish_operation<kLocal>(p, rail.waiter, kCounters);
  }

 private:
  // ---- where things lie -------------------------------------------------------------------------

  // The row of local rank `writer`, of index `index` of the channel (n, owner).
  __device__ char* slot(int owner, int n, int writer, int index) const {
    const int64_t i = static_cast<int64_t>(n * kLocal + writer) * p.num_slots + index % p.num_slots;
    return reinterpret_cast<char*>(p.slots[owner]) + i * kSlotBytes;
  }

  __device__ uint64_t* word(int owner, int n, int writer, int index) const {
    return word_address(p.words[owner], n * kLocal + writer, p.num_slots, index);
  }

  __device__ int window_of(int index) const { return index / (p.num_slots / 2); }

  // Lane n: length of the channel (n, local), whose sums go back to domain n.
  __device__ int passing_tokens() const {
    return lane < kDomains ? p.channel_tokens[lane * kLocal + p.local] : 0;
  }

  __device__ static float* weights_of(char* row) {
    return reinterpret_cast<float*>(row + kCfg.hidden_bytes);
  }

  // First row here of the tokens of a source.
  __device__ int segment_start(int source) const {
    return source == 0 ? 0 : p.rank_prefix[source - 1];
  }

  // The same among the rows that there are.
  __device__ int row_start(int source) const {
    return min(max(segment_start(source), 0), p.num_rows);
  }

  // Index in `passing` of the first token of the channel (n, local).
  __device__ int passing_start(int n) const { return n == 0 ? 0 : p.passing_prefix[n - 1]; }

  __device__ uint32_t passing(int place) const {
    return static_cast<uint32_t>(place) < static_cast<uint32_t>(p.num_passing)
               ? static_cast<uint32_t>(p.passing[place])
               : 0;
  }

  __device__ uint32_t* push_counter(int channel) const { return p.counters + 2 + channel; }
  __device__ uint32_t* sum_counter(int n) const { return p.counters + 2 + kRanks + n; }
  __device__ uint32_t* slots_counter(int n, int window) const {
    return p.counters + 2 + kRanks + kDomains + 2 * n + (window & 1);
  }
  __device__ uint32_t* inbox_counter(int n, int window) const {
    return slots_counter(kDomains + n, window);
  }

  // ---- push -------------------------------------------------------------------------------------

  __device__ bool push() {
    if constexpr (kPushed > 0) {
      if (!rail.enter()) return false;
      Copier copier(ptx::dynamic_shared(), warp, lane);
      copier.acquired();
      const int num_warps = gridDim.x * kCfg.num_push_warps;
      const int unit_rows = rows_at_a_time<kRows>(segment_start(kRanks), num_warps, kRows);
      const int first = (blockIdx.x * kCfg.num_push_warps + warp) % kPushed;
#pragma unroll 1
      for (int i = 0; i < kPushed; ++i)
        if (!push_channel(copier, (first + i) % kPushed, unit_rows)) return false;
    }
    return true;
  }

  __device__ bool push_channel(Copier& copier, int channel, int unit_rows) {
    const int n = channel % kDomains, owner = (p.local + 1 + channel / kDomains) % kLocal;
    const int source = rail.rank_of(n, owner);
    const int begin = row_start(source), end = row_start(source + 1);
    const uint32_t num_units = ceil_div(max(end - begin, 0), unit_rows);
    uint32_t unit = Draw(push_counter(channel)).unit();
    while (unit < num_units) {
      // Drawn early: its latency hides behind the copy.
      const Draw next(push_counter(channel));
      const int first = begin + static_cast<int>(unit) * unit_rows;
      if (!push_rows(copier, n, owner, first, min(unit_rows, end - first))) return false;
      unit = next.unit();
    }
    return true;
  }

  __device__ bool push_rows(Copier& copier, int n, int owner, int first, int num_rows) {
    const int64_t row = first + lane;
    const int index = lane < num_rows ? max(p.recv_src_meta[2 * row], 0) : 0;
    return epjit::push_rows<kCfg.hidden_bytes, kTopk>(
        p, rail.waiter.epoch, copier, first, num_rows, index,
        [&](int window) { return rail.wait_done(kWaitCombineWindow, n, owner, window); },
        [&](int index) { return slot(owner, n, p.local, index); },
        [&](int index) { return word(owner, n, p.local, index); });
  }

  // ---- rows of one domain -----------------------------------------------------------------------

  // Address of a row of a token, and of its weights: lane j has that of local rank j, or null.
  struct Rows {
    const char* row;
    const float* weights;
  };

  // Waits for the rows of index `index` of the channel (n, local); `where` is what `passing` says.
  __device__ bool find_rows(int n, int index, uint32_t where, Rows& rows) const {
    bool ok = true;
    rows = {nullptr, nullptr};
    if (lane < kLocal && (where >> lane & 1) != 0) {
      if (lane == p.local) {
        const int64_t row = row_start(rail.rail_peer(n)) + static_cast<int64_t>(where >> 8);
        if (row < p.num_rows) {
          rows.row = p.x + row * kCfg.hidden_bytes;
          if constexpr (kTopk > 0) rows.weights = p.topk_weights + row * kTopk;
        }
      } else {
        uint64_t found;
        ok = wait_word(rail.waiter, kWaitCombineToken, rail.rank_of(p.domain, lane), index,
                       window_of(index), word(p.local, n, lane, index), found);
        char* const row = slot(p.local, n, lane, index);
        rows.row = row;
        rows.weights = weights_of(row);
      }
    }
    return all_lanes(ok);
  }

  // Sum over local ranks of a weight: lane k < num_topk has that of selection k.
  __device__ float sum_weights(const Rows& rows) const {
    float sum = 0.0f;
#pragma unroll 1
    for (int j = 0; j < kLocal; ++j) {
      const float* const weights = of_lane(rows.weights, j);
      if (weights != nullptr && lane < kTopk) sum += weights[lane];
    }
    return sum;
  }

  // This warp has used the slots of an index of ring n here, one of `units` for each index.
  __device__ bool release_slots(int n, int index, int num_tokens, int units) const {
    if (num_tokens <= p.num_slots) return true;
    __syncwarp();
    const int window = window_of(index), window_tokens = p.num_slots / 2;
    // Not before window - 2: a token that has only a row of this rank needs no slot.
    if (!all_lanes(lane != 0 || rail.wait_done(kWaitCombineWindow, n, p.local, window)))
      return false;
    const uint32_t all = min(window_tokens, num_tokens - window * window_tokens) * units;
    release_unit<kLocal>(slots_counter(n, window), all, p.local,
                         [&](int local) { rail.signal_done(local, n, window); });
    return true;
  }

  // ---- sum --------------------------------------------------------------------------------------

  __device__ bool sum() {
    const int first = (warp - kSummers) * gridDim.x + blockIdx.x;
#pragma unroll 1
    for (int i = 0; i < kDomains - 1; ++i) {
      const int n = (p.domain + 1 + (first + i) % (kDomains - 1)) % kDomains;
      const int num_tokens = p.channel_tokens[n * kLocal + p.local];
      const uint32_t num_chunks = ceil_div(num_tokens, kChunk);
      uint32_t chunk = Draw(sum_counter(n)).unit();
      while (chunk < num_chunks) {
        const Draw next(sum_counter(n));
        if (!sum_chunk(n, static_cast<int>(chunk) * kChunk, num_tokens)) return false;
        chunk = next.unit();
      }
    }
    return true;
  }

  __device__ bool sum_chunk(int n, int first, int num_tokens) const {
    const int num_rows = min(kChunk, num_tokens - first);
    if (!all_lanes(lane != 0 || (rail.is_ready(n) &&
                                 rail.wait_credit(kWaitCombineCredit, n, rail.ring_window(first)))))
      return false;
    const int place = passing_start(n) + first;
    for (int i = 0; i < num_rows; ++i) {
      Rows rows;
      if (!find_rows(n, first + i, passing(place + i), rows)) return false;
      sum_rows(rows, p.stage + rail.ring_offset(n, first + i, kSlotBytes));
      if (!release_slots(n, first + i, num_tokens, 1)) return false;
    }
    rail.publish_staged(n, first);
    return true;
  }

  __device__ void sum_rows(const Rows& rows, char* out) const {
    const char* row[kLocal];
#pragma unroll
    for (int j = 0; j < kLocal; ++j) row[j] = of_lane(rows.row, j);
#pragma unroll 1
    for (int first = lane; first < kVecs; first += kSumUnroll * kWarpSize) {
      Vec16 v[kSumUnroll][kLocal];
      load_rows(row, first, kVecs, v);
#pragma unroll
      for (int i = 0; i < kSumUnroll; ++i)
        if (first + i * kWarpSize < kVecs)
          ptx::st_v4(out + (first + i * kWarpSize) * 16, sum_loaded(row, v[i]));
    }
    if constexpr (kTopk > 0) {
      const float weight = sum_weights(rows);
      if (lane < kTopk) weights_of(out)[lane] = weight;
    }
  }

  template <int kUnroll>
  __device__ static void load_rows(const char* const (&row)[kLocal], int first, int last,
                                   Vec16 (&v)[kUnroll][kLocal]) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
#pragma unroll
      for (int j = 0; j < kLocal; ++j)
        if (row[j] != nullptr && first + i * kWarpSize < last)
          v[i][j] = ptx::ld_v4(row[j] + (first + i * kWarpSize) * 16);
  }

  // P of eight elements.
  __device__ static Vec16 sum_loaded(const char* const (&row)[kLocal], const Vec16 (&v)[kLocal]) {
    Sum sum;
#pragma unroll
    for (int j = 0; j < kLocal; ++j)
      if (row[j] != nullptr) sum.add(v[j]);
    return sum.rounded();
  }

  // ---- reduce -----------------------------------------------------------------------------------

  __device__ void reduce() {
    const uint32_t num_units = static_cast<uint32_t>(p.num_tokens) * p.num_parts;
    uint32_t unit = Draw(p.counters + 1).unit();
    while (unit < num_units) {
      const Draw next(p.counters + 1);
      if (!reduce_token(unit / p.num_parts, unit % p.num_parts)) return;
      unit = next.unit();
    }
  }

  __device__ bool reduce_token(int token, int part) const {
    // Lane n has the index in the channel to domain n, and the sum that comes from there.
    const int index =
        lane < kDomains ? p.send_domain_head[static_cast<int64_t>(token) * kDomains + lane] : -1;
    const int own_index = __shfl_sync(kFullMask, index, p.domain);
    Rows rows{nullptr, nullptr};
    if (own_index >= 0 &&
        !find_rows(p.domain, own_index, passing(passing_start(p.domain) + own_index), rows))
      return false;
    bool ok = true;
    char* sums = nullptr;
    if (index >= 0 && lane != p.domain) {
      ok = rail.wait_arrival(kWaitCombineArrival, lane, index);
      sums = p.inbox + rail.ring_offset(lane, index, kSlotBytes);
    }
    if (!all_lanes(ok)) return false;
    if (__any_sync(kFullMask, sums != nullptr)) warp_received(p.transport, lane);
    add_domains(token, part, rows, sums, own_index >= 0);
    if (kTopk > 0 && part == 0) add_weights(token, rows, sums, own_index >= 0);
    return release_token(index, own_index);
  }

  __device__ void add_domains(int token, int part, const Rows& rows, const char* sums,
                              bool has_own) const {
    const char* row[kLocal];
#pragma unroll
    for (int j = 0; j < kLocal; ++j) row[j] = of_lane(rows.row, j);
    const int64_t out = static_cast<int64_t>(token) * kCfg.hidden_bytes;
    const int part_vecs = align_up(ceil_div(kVecs, p.num_parts), kWarpSize);
    const int last = min(kVecs, (part + 1) * part_vecs);
#pragma unroll 1
    for (int base = part * part_vecs; base < last; base += kUnroll * kWarpSize) {
      const int first = base + lane;
      // All loads of the rows and of the first domains are on their way before one is used, unless
      // the rows are so many that their registers are needed again.
      Vec16 v[kUnroll][kLocal], own[kUnroll], sum[kUnroll][kBatch];
      const char* src[kBatch];
      load_rows(row, first, last, v);
      if constexpr (kLocal <= 2) load_sums(sums, 0, first, last, src, sum);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) own[i] = sum_loaded(row, v[i]);
      if constexpr (kLocal > 2) load_sums(sums, 0, first, last, src, sum);
      Sum total[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t offset = out + (first + i * kWarpSize) * 16;
        if (first + i * kWarpSize >= last) continue;
        if (p.bias_0 != nullptr) total[i].start(ptx::ld_v4(p.bias_0 + offset));
        if (p.bias_1 != nullptr) total[i].add(ptx::ld_v4(p.bias_1 + offset));
      }
#pragma unroll 1
      for (int batch = 0; batch < kDomains; batch += kBatch) {
        if (batch > 0) load_sums(sums, batch, first, last, src, sum);
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            if (batch + b == p.domain && has_own) total[i].add(own[i]);
            if (src[b] != nullptr) total[i].add(sum[i][b]);
          }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
        if (first + i * kWarpSize < last)
          ptx::st_v4(p.combined_x + out + (first + i * kWarpSize) * 16, total[i].rounded());
    }
  }

  // Of the domains batch .. batch + kBatch - 1: where their sums lie, null beyond the last, and 16
  // bytes of each.
  __device__ static void load_sums(const char* sums, int batch, int first, int last,
                                   const char* (&src)[kBatch], Vec16 (&sum)[kUnroll][kBatch]) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      src[b] = of_lane(sums, batch + b);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
        if (src[b] != nullptr && first + i * kWarpSize < last)
          sum[i][b] = ptx::ld_v4(src[b] + (first + i * kWarpSize) * 16);
    }
  }

  __device__ void add_weights(int token, const Rows& rows, char* sums, bool has_own) const {
    const float own = sum_weights(rows);
    float total = 0.0f;
#pragma unroll 1
    for (int n = 0; n < kDomains; ++n) {
      char* const src = of_lane(sums, n);
      if (n == p.domain && has_own) total += own;
      if (src != nullptr && lane < kTopk) total += weights_of(src)[lane];
    }
    if (lane < kTopk) p.combined_topk_weights[static_cast<int64_t>(token) * kTopk + lane] = total;
  }

  __device__ int sent_tokens(int n) const {
    return p.send_tokens[static_cast<int64_t>(n) * (p.num_tokens + 1) + p.num_tokens];
  }

  // Lane n: this warp has used the sum of index `index` of ring n. Whoever completes a window tells
  // the rail peer, which cannot send the window after the next before.
  __device__ bool release_token(int index, int own_index) const {
    __syncwarp();
    if (index >= 0 && lane != p.domain && sent_tokens(lane) > p.ring_slots) {
      const int num_tokens = sent_tokens(lane), window_tokens = p.ring_slots / 2;
      const int window = rail.ring_window(index);
      const uint32_t all = min(window_tokens, num_tokens - window * window_tokens) * p.num_parts;
      if (ptx::atom_add_acq_rel_gpu(inbox_counter(lane, window), 1) + 1 == all) {
        *inbox_counter(lane, window) = 0;
        rail.signal_credit(lane, window, num_tokens);
      }
    }
    return own_index < 0 || release_slots(p.domain, own_index, sent_tokens(p.domain), p.num_parts);
  }

  const Params& p;
  const int warp, lane;
  const Rail<kDomains, kLocal, kChunk, Params> rail;
};

template <InternodeCombineConfig kCfg>
__device__ void combine(const InternodeCombineParams& p) {
  ptx::griddepcontrol_wait();
  InternodeCombine<kCfg>(p).run();
}

}  // namespace epjit

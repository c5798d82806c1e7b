// Dispatch between NVLink domains: each token goes once to every rank that owns one of its experts,
// and crosses RDMA at most once a domain.
//
//   recv_x[rank_prefix[s - 1] + send_head_s[t, d]] = x_s[t]
//                              on rank d, for every rank s and token t with send_head_s[t, d] >= 0
//
// and the same for what travels with a token: scales, top-k (as local expert indices, -1
// elsewhere), its index in the channel and in the source. Rows are bytes: one kernel serves every
// dtype. A row that does not lie below num_recv_rows of d is written nowhere. Channels, rings and rail
// peers are explained in rail.cuh.
//
//   inbox[m, l] [num_domains, ring_bytes]  symmetric; ring n is written by the rail peer in domain n
//               (its own rank for its own domain), read by all ranks of domain m. Of a slot: { row
//               [hidden_bytes], scales [num_scales] u32, topk_idx [num_topk] i32, topk_weights
//               [num_topk] f32, positions [num_local] i32, token i32 }; positions[j] is that among
//               the tokens of the source that go to (m, j), or -1
//   stage       [num_domains, ring_bytes]  symmetric; where tokens for domain n lie until they are
//               put into the inbox there
//   words[d]    [num_domains, num_local, ring_slots]   on rank d of domain m; row (n, l) is written
//               by (m, l): which token of the channel lies in the slot, and its position for d
//
// Send     the first warps of a block: x -> stage; tokens for the own domain go straight to the own
//          inbox, own tokens to recv_x; then the words of those
// Put      warps of their own: stage -> the inbox of the rail peer, a chunk at a time
// Forward  warps of their own: wait for a chunk from a rail peer, write its words to the local ranks
// Pull     all warps that copy, when they have nothing to send: wait for the words of a run of
//          tokens; inbox of a local rank -> recv_x. A row is not copied between the RDMA and its
//          final place.
// Clerk    one warp: tells the rail peers that this domain is ready, and which windows of the inbox
//          all local ranks have pulled; and the host what there was no room for
//
// Progress: all these warps exist from the start, and each channel to another domain has putting
// warps of its own. All take chunks in ascending order of their index in the channel, the same for
// all channels, and a chunk lies in one window. Whoever waits for a slot of window w waits for pulls
// of w - 2, and has every chunk of a lower index taken by a warp that waits for windows before w - 2
// at most, at every rank. By induction over the index everything moves, whatever the size of the
// rings.
//
// Guessed room: as in intranode/dispatch.cu, for the rows and for the tokens that pass through. Rail
// peers have heard nothing of a launch that has left, neither `entered` nor `ready`, so what they wait
// for is what they wait for of any late rank, and what notify has left in `fits` stays.
//
// Launch: any grid of two blocks or more that is resident as a whole and has a putting warp for each
// other domain; dispatch_threads() threads. Graph-safe.
#include "epjit/payload.cuh"
#include "epjit/windows.cuh"
#include "internode/rail.cuh"

namespace epjit {

struct InternodeDispatchConfig {
  int32_t num_domains;
  int32_t num_local;     // ranks of a domain
  int32_t hidden_bytes;  // of a row of x
  int32_t num_scales;    // 4-byte scales a token; 0 = none
  int32_t num_topk;      // 0 = none
  bool topk_is_int64;
  bool tma;                  // rows move by bulk copies, else through registers
  int32_t num_copy_warps;    // of a block: they send and pull
  int32_t num_put_warps;     // of a block
  int32_t rows_per_warp;     // rows of such a warp in shared memory
  int32_t tokens_per_chunk;  // of one put; ring_slots is a multiple of twice this
};

struct InternodeDispatchParams : Operation, RailParams, RingParams {
  const char* x;           // [num_tokens, hidden_bytes]
  const uint32_t* scales;  // [num_tokens, num_scales], strides below, in elements
  int64_t scale_token_stride;
  int64_t scale_stride;
  const void* topk_idx;           // [num_tokens, num_topk] int32 or int64, global experts
  const float* topk_weights;      // [num_tokens, num_topk]
  const int32_t* send_head;       // [num_tokens, ranks]: position in its segment, -1 = not sent
  const int32_t* send_tokens;     // [num_domains, num_tokens + 1]: tokens of each outgoing channel;
                                  // the last column is how many there are
  const int32_t* channel_tokens;  // [num_domains, num_local]: length of each incoming channel
  const int32_t* passing_prefix;  // [num_domains]: inclusive, of the channels (n, local)
  const int32_t* rank_prefix;     // [ranks]: inclusive over sources (rows of this rank)
  char* recv_x;                   // [num_recv_rows, hidden_bytes]
  uint32_t* recv_scales;          // [num_recv_rows, num_scales]
  void* recv_topk_idx;            // [num_recv_rows, num_topk], dtype of topk_idx, local experts
  float* recv_topk_weights;       // [num_recv_rows, num_topk]
  int32_t* recv_src_meta;         // [num_recv_rows, 2]: index in the channel, token; null when the
                                  // handle has it already
  int32_t* passing;     // [num_passing], of the channels (n, local): local ranks that get the token
                        // (8 bits) | its position here << 8; null when the handle has it already
  const int32_t* fits;  // [num_domains, num_local], from notify: how many tokens of ranks[n, local]
                        // local rank j has room for; not read where passing is null
  uint64_t inbox[kMaxRanks];  // symmetric, of each local rank, as mapped here
  uint64_t words[kMaxRanks];  // symmetric, of each local rank
  // own [2 + 2 * ranks]: ticket, next chunk, tokens pulled of (channel, window & 1); zero on entry
  // and on exit
  uint32_t* counters;
  int32_t ring_slots;
  int32_t num_send_warps;  // of num_copy_warps, at least 1, fewer than all
  int32_t num_tokens;
  int32_t num_recv_rows;  // rows of the outputs; those beyond what arrives get topk_idx -1
  int32_t least_rows;     // of a guess: fewer do not fit either; -1 = the rows are known or bounded
  int32_t num_passing;    // of passing; tokens beyond are not combined
  int32_t experts_per_rank;
  int32_t rank;
  int32_t domain;
  int32_t local;
};

constexpr int kForwardWarps = 2;  // of a block

constexpr int dispatch_threads(InternodeDispatchConfig cfg) {
  return (cfg.num_copy_warps + cfg.num_put_warps + kForwardWarps + 1) * kWarpSize;
}

constexpr int dispatch_shared_bytes(InternodeDispatchConfig cfg) {
  return copier_shared_bytes(cfg.tma, cfg.num_copy_warps, cfg.rows_per_warp, cfg.hidden_bytes);
}

constexpr int dispatch_slot_bytes(InternodeDispatchConfig cfg) {
  return align_up(cfg.hidden_bytes + 4 * (cfg.num_scales + 2 * cfg.num_topk + cfg.num_local + 1),
                  128);
}

template <InternodeDispatchConfig kCfg>
class InternodeDispatch {
  static constexpr int kDomains = kCfg.num_domains, kLocal = kCfg.num_local;
  static constexpr int kRanks = kDomains * kLocal;
  static constexpr int kChunk = kCfg.tokens_per_chunk;
  static constexpr int kRows = kCfg.rows_per_warp;
  static constexpr int kCopyWarps = kCfg.num_copy_warps;
  static constexpr int kPutters = kCopyWarps, kForwarders = kPutters + kCfg.num_put_warps;
  static constexpr int kScales = kCfg.num_scales;
  static constexpr int kTopk = kCfg.num_topk;
  static constexpr int kSlotBytes = dispatch_slot_bytes(kCfg);
  // Offsets in 4 bytes of what lies behind the row of a slot.
  static constexpr int kExpertsAt = kScales, kWeightsAt = kExpertsAt + kTopk;
  static constexpr int kPositionsAt = kWeightsAt + kTopk, kTokenAt = kPositionsAt + kLocal;
  static_assert(kTopk >= 0 && kTopk <= kMaxTopk);
  static_assert(kCopyWarps >= 2, "someone must pull from the start");
  static_assert(kCfg.num_put_warps >= 1);
  using Copier = RowCopier<kCfg.tma, kCopyWarps, kRows, kCfg.hidden_bytes>;
  using Params = InternodeDispatchParams;

 public:
  __device__ explicit InternodeDispatch(const Params& params)
      : p(params),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        rail(p, {kWaitDispatchStart, kWaitDispatchEntry, kWaitDispatchReady}),
        payload(p) {}

  __device__ void run() {
    // What an operation that failed was to write (rank_prefix, send_head) is garbage.
    if (__all_sync(kFullMask, ptx::ld_relaxed_gpu(p.abort) == 0)) {
      payload.fill_unused_rows(segment_start(kRanks));
      if (warp < kCopyWarps) {
        Copier copier(ptx::dynamic_shared(), warp, lane);
        if (warp >= p.num_send_warps || send(copier)) pull(copier);
        copier.drain();
      } else if (warp < kForwarders) {
        rail.put_staged(kWaitDispatchCredit, (warp - kPutters) * gridDim.x + blockIdx.x,
                        kCfg.num_put_warps * gridDim.x, sent_tokens(), inbox(p.local, 0, 0),
                        kSlotBytes);
      } else if (warp < kForwarders + kForwardWarps) {
        forward();
      } else if (blockIdx.x == 0) {
        if (rail.announce() && return_credits()) rail.all_announced();
        if (lane == 0)
          report_overflow(p, rail.waiter.epoch, kRoomDispatchRows, p.num_recv_rows,
                          segment_start(kRanks));
      }
    }
    finish_operation<kLocal>(p, rail.waiter, 2 + 2 * kRanks);
  }

 private:
  __device__ int window_tokens() const { return p.ring_slots / 2; }

  // Slot of a token of the channel (n, l) to this domain.
  __device__ char* inbox(int l, int n, int index) const {
    return reinterpret_cast<char*>(p.inbox[l]) + rail.ring_offset(n, index, kSlotBytes);
  }

  // Slot that a token for domain n is written to.
  __device__ char* send_slot(int n, int index) const {
    return n == p.domain ? inbox(p.local, n, index)
                         : p.stage + rail.ring_offset(n, index, kSlotBytes);
  }

  __device__ static int32_t* items(char* slot) {
    return reinterpret_cast<int32_t*>(slot + kCfg.hidden_bytes);
  }

  // In the words of local rank `reader`.
  __device__ uint64_t* word(int reader, int n, int l, int index) const {
    return word_address(p.words[reader], n * kLocal + l, p.ring_slots, index);
  }

  __device__ void publish_word(int reader, int n, int index, int position) const {
    const uint32_t value = position >= 0 ? static_cast<uint32_t>(position) : kNoRow;
    ptx::st_release_sys(word(reader, n, p.local, index),
                        make_word(rail.waiter.epoch, rail.ring_window(index), value));
  }

  // Rows of this rank before those of `source`.
  __device__ int segment_start(int source) const {
    return source == 0 ? 0 : p.rank_prefix[source - 1];
  }

  // A row of this rank, -1 where its outputs have none.
  __device__ int row_or_none(int row) const {
    return static_cast<uint32_t>(row) < static_cast<uint32_t>(p.num_recv_rows) ? row : -1;
  }

  __device__ void store_meta(int64_t row, int index, int token) const {
    if (p.recv_src_meta == nullptr) return;
    p.recv_src_meta[2 * row] = index;
    p.recv_src_meta[2 * row + 1] = token;
  }

  // ---- send -------------------------------------------------------------------------------------

  // Lane n: length of the channel to domain n.
  __device__ int sent_tokens() const {
    if (lane >= kDomains) return 0;
    return p.send_tokens[static_cast<int64_t>(lane) * (p.num_tokens + 1) + p.num_tokens];
  }

  // A chunk of the channel to a domain: lane i has the token of index first + i.
  struct Chunk {
    int domain, first, num_rows;
    int token;      // of this lane
    int own_row;    // of this lane's token in recv_x, -1 = not for this rank
    bool has_slot;  // this lane's token goes to other ranks
  };

  // The first chunk that is not empty of the units unit, unit + num_warps, ...; lane n has the
  // length of the channel to domain n.
  __device__ Chunk next_chunk(int& unit, int num_warps, int sent) const {
    Chunk chunk{0, 0, 0, 0, -1, false};
    const int num_units = ceil_div(p.num_tokens, kChunk) * kDomains;
    for (; unit < num_units && chunk.num_rows <= 0; unit += num_warps) {
      chunk.domain = (p.domain + 1 + unit % kDomains) % kDomains;
      chunk.first = unit / kDomains * kChunk;
      chunk.num_rows = min(kChunk, __shfl_sync(kFullMask, sent, chunk.domain) - chunk.first);
    }
    if (lane < chunk.num_rows) {
      chunk.token = p.send_tokens[static_cast<int64_t>(chunk.domain) * (p.num_tokens + 1) +
                                  chunk.first + lane];
      chunk.has_slot = chunk.domain != p.domain;
#pragma unroll 1
      for (int j = 0; j < kLocal && chunk.domain == p.domain; ++j) {
        const int position = send_position(chunk.token, rail.rank_of(p.domain, j));
        if (j != p.local)
          chunk.has_slot |= position >= 0;
        else if (position >= 0)
          chunk.own_row = row_or_none(segment_start(p.rank) + position);
      }
    }
    return chunk;
  }

  __device__ int send_position(int token, int rank) const {
    return p.send_head[static_cast<int64_t>(token) * kRanks + rank];
  }

  __device__ void load_rows(Copier& copier, const Chunk& chunk, int first) const {
    copier.load(first, lane < chunk.num_rows
                           ? p.x + static_cast<int64_t>(chunk.token) * kCfg.hidden_bytes
                           : nullptr);
  }

  __device__ bool wait_for_slots(const Chunk& chunk) const {
    const int window = rail.ring_window(chunk.first);
    bool ok = true;
    if (chunk.domain != p.domain)
      ok = lane != 0 || (rail.is_ready(chunk.domain) &&
                         rail.wait_credit(kWaitDispatchCredit, chunk.domain, window));
    else if (lane < kLocal && lane != p.local)
      ok = rail.wait_done(kWaitDispatchWindow, p.domain, lane, window);
    return all_lanes(ok);
  }

  __device__ bool send(Copier& copier) {
    if (!rail.enter()) return false;
    const int num_warps = gridDim.x * p.num_send_warps;
    const int sent = sent_tokens();
    // Neighbouring chunks lie on different SMs, so that the first tokens are ready first.
    int unit = warp * gridDim.x + blockIdx.x;
    Chunk chunk = next_chunk(unit, num_warps, sent);
    if (chunk.num_rows > 0) load_rows(copier, chunk, 0);
    while (chunk.num_rows > 0) {
      if (!wait_for_slots(chunk)) return false;
      copier.acquired();
      char* const own = chunk.own_row >= 0
                            ? p.recv_x + static_cast<int64_t>(chunk.own_row) * kCfg.hidden_bytes
                            : nullptr;
      char* const slot = chunk.has_slot ? send_slot(chunk.domain, chunk.first + lane) : nullptr;
      for (int first = 0; first < chunk.num_rows; first += kRows) {
        copier.store(first, own);
        copier.store(first, slot);
        if (first + kRows < chunk.num_rows) load_rows(copier, chunk, first + kRows);
      }
      for_each_item<kTokenAt + 1>(chunk.num_rows, lane, [&](int row, int item, bool valid) {
        const int token = __shfl_sync(kFullMask, chunk.token, row % kWarpSize);
        const int own_row = __shfl_sync(kFullMask, chunk.own_row, row % kWarpSize);
        const bool has_slot = __shfl_sync(kFullMask, chunk.has_slot, row % kWarpSize);
        if (!valid) return;
        if (own_row >= 0) store_own_item(token, own_row, item);
        if (has_slot)
          items(send_slot(chunk.domain, chunk.first + row))[item] =
              load_item(token, item, chunk.domain);
      });
      if (chunk.own_row >= 0) store_meta(chunk.own_row, chunk.first + lane, chunk.token);

      // The next rows are on their way while these are written and published. (Loading needs no
      // free slot, so nothing is waited for with tokens in hand that a peer may wait for.)
      const Chunk next = next_chunk(unit, num_warps, sent);
      if (next.num_rows > 0) load_rows(copier, next, 0);
      copier.flush();
      if (chunk.domain != p.domain)
        rail.publish_staged(chunk.domain, chunk.first);
      else
        publish_own(chunk);
      chunk = next;
    }
    return true;
  }

  // Item of a slot.
  __device__ int32_t load_item(int token, int item, int domain) const {
    if (item < kExpertsAt) return static_cast<int32_t>(payload.load_scale(token, item));
    if (item < kWeightsAt) return payload.load_expert(token, item - kExpertsAt);
    if (item < kPositionsAt)
      return static_cast<int32_t>(__float_as_uint(payload.load_weight(token, item - kWeightsAt)));
    if (item < kTokenAt) return send_position(token, rail.rank_of(domain, item - kPositionsAt));
    return token;
  }

  // The same of a token of this rank's own, which needs no slot.
  __device__ void store_own_item(int token, int row, int item) const {
    if (item < kExpertsAt)
      payload.store_scale(row, item, payload.load_scale(token, item));
    else if (item < kWeightsAt)
      payload.store_selection(row, item - kExpertsAt, payload.load_expert(token, item - kExpertsAt),
                              payload.load_weight(token, item - kExpertsAt));
  }

  // Tokens that stay in the domain: the words of the local peers. Rows and items are written ->
  // flush (each lane its own, then __syncwarp) -> release of any lane: cumulative.
  __device__ void publish_own(const Chunk& chunk) const {
    if (p.passing != nullptr && lane < chunk.num_rows)
      store_passing(p.domain, chunk.first + lane,
                    [&](int j) { return send_position(chunk.token, rail.rank_of(p.domain, j)); });
    for (int first = 0; first < chunk.num_rows * kLocal; first += kWarpSize) {
      const int i = first + lane, row = i / kLocal, reader = i % kLocal;
      const int token = __shfl_sync(kFullMask, chunk.token, row % kWarpSize);
      if (row < chunk.num_rows && reader != p.local)
        publish_word(reader, p.domain, chunk.first + row,
                     send_position(token, rail.rank_of(p.domain, reader)));
    }
  }

  // ---- forward ----------------------------------------------------------------------------------

  __device__ int passing_tokens(int n) const { return p.channel_tokens[n * kLocal + p.local]; }

  __device__ void forward() {
    const int num_warps = gridDim.x * kForwardWarps;
    int most_tokens = 0;
#pragma unroll 1
    for (int n = 0; n < kDomains; ++n)
      if (n != p.domain) most_tokens = max(most_tokens, passing_tokens(n));
    const int num_units = ceil_div(most_tokens, kChunk) * (kDomains - 1);
    for (int unit = (warp - kForwarders) * gridDim.x + blockIdx.x; unit < num_units;
         unit += num_warps) {
      const int n = (p.domain + 1 + unit % (kDomains - 1)) % kDomains;
      const int first = unit / (kDomains - 1) * kChunk;
      const int num_rows = min(kChunk, passing_tokens(n) - first);
      if (num_rows > 0 && !forward_chunk(n, first, num_rows)) return;
    }
  }

  // The put -> (signal) acquire by all lanes -> received -> release of a word: whoever acquires that
  // may read the slot.
  __device__ bool forward_chunk(int n, int first, int num_rows) const {
    if (!all_lanes(rail.wait_arrival(kWaitDispatchArrival, n, first))) return false;
    warp_received(p.transport, lane);
    for (int i = lane; i < num_rows * kLocal; i += kWarpSize) {
      const int index = first + i / kLocal, reader = i % kLocal;
      const int position = items(inbox(p.local, n, index))[kPositionsAt + reader];
      publish_word(reader, n, index, position);
    }
    if (p.passing != nullptr && lane < num_rows) {
      const int32_t* const positions = items(inbox(p.local, n, first + lane)) + kPositionsAt;
      store_passing(n, first + lane, [&](int j) { return positions[j]; });
    }
    return true;
  }

  // position(j): of the token among those that go to local rank j, or -1.
  template <typename Position>
  __device__ void store_passing(int n, int index, Position position) const {
    uint32_t value = 0;
#pragma unroll 1
    for (int j = 0; j < kLocal; ++j) {
      const int at = position(j);
      if (at < 0 || at >= p.fits[n * kLocal + j]) continue;
      value |= 1u << j;
      if (j == p.local) value |= static_cast<uint32_t>(at) << 8;
    }
    const int place = (n == 0 ? 0 : p.passing_prefix[n - 1]) + index;
    if (place < p.num_passing) p.passing[place] = static_cast<int32_t>(value);
  }

  // Lane n tells the rail peer in domain n which windows of its ring all local ranks have pulled.
  __device__ bool return_credits() const {
    bool ok = true;
    if (lane < kDomains && lane != p.domain) {
      const int num_tokens = passing_tokens(lane);
      for (int window = 0; ok && (window + 2) * window_tokens() < num_tokens; ++window) {
#pragma unroll 1
        for (int reader = 0; ok && reader < kLocal; ++reader)
          ok = rail.wait_done(kWaitDispatchWindow, lane, reader, window + 2);
        if (ok) rail.signal_credit(lane, window, num_tokens);
      }
    }
    return all_lanes(ok);
  }

  // ---- pull -------------------------------------------------------------------------------------

  // All channels into this domain but the own one, whose rows send() has copied.
  __device__ void pull(Copier& copier) {
    int most_tokens = 0;
#pragma unroll 1
    for (int i = 0; i < kRanks; ++i) most_tokens = max(most_tokens, p.channel_tokens[i]);
    const int num_warps = gridDim.x * kCopyWarps;
    const int rows =
        min(rows_at_a_time<kRows>(most_tokens * (kRanks - 1), num_warps, align_up(4, kRows)),
            min(window_tokens(), kWarpSize));
    const uint32_t num_chunks = static_cast<uint32_t>(ceil_div(most_tokens, rows)) * (kRanks - 1);
    const int own = p.domain * kLocal + p.local;
    uint32_t chunk = Draw(p.counters + 1).unit();
    while (chunk < num_chunks) {
      // Drawn early: its latency hides behind the copy.
      const Draw next(p.counters + 1);
      // Each rank starts with another channel, so that no rank is asked by all at once.
      const int channel = (own + 1 + chunk % (kRanks - 1)) % kRanks;
      if (!pull_chunk(copier, channel, chunk / (kRanks - 1) * rows, rows)) return;
      chunk = next.unit();
    }
  }

  __device__ bool pull_chunk(Copier& copier, int channel, int first, int rows) {
    const int n = channel / kLocal, l = channel % kLocal;
    const int num_tokens = p.channel_tokens[channel];
    const int num_rows = min(rows, num_tokens - first);
    if (num_rows <= 0) return true;

    // Lane i has the token of index first + i.
    const int index = first + lane, source = rail.rank_of(n, l);
    bool ok = true;
    int row = -1;
    if (lane < num_rows) {
      uint64_t found;
      ok = wait_word(rail.waiter, kWaitDispatchToken, source, index, rail.ring_window(index),
                     word(p.local, n, l, index), found);
      if (word_value(found) != kNoRow)
        row = row_or_none(segment_start(source) + static_cast<int>(word_value(found)));
    }
    if (!all_lanes(ok)) return false;
    copier.acquired();

    const char* const src = row >= 0 ? inbox(l, n, index) : nullptr;
    char* const out = row >= 0 ? p.recv_x + static_cast<int64_t>(row) * kCfg.hidden_bytes : nullptr;
    copier.load(0, src);
    for_each_item<kScales + kTopk>(num_rows, lane, [&](int row_lane, int item, bool valid) {
      const int64_t dst = __shfl_sync(kFullMask, row, row_lane % kWarpSize);
      if (!valid || dst < 0) return;
      const int32_t* const slot = items(inbox(l, n, first + row_lane));
      if (item < kExpertsAt)
        payload.store_scale(dst, item, static_cast<uint32_t>(slot[item]));
      else
        payload.store_selection(dst, item - kExpertsAt, slot[item],
                                reinterpret_cast<const float*>(slot)[item + kTopk]);
    });
    if (row >= 0) store_meta(row, index, items(inbox(l, n, index))[kTokenAt]);
    for (int first_row = 0; first_row < num_rows; first_row += kRows) {
      copier.store(first_row, out);
      if (first_row + kRows < num_rows) copier.load(first_row + kRows, src);
    }

    if (num_tokens > p.ring_slots) {
      __syncwarp();
      if (lane == 0)
        release_rows(p.counters + 2 + 2 * channel, window_tokens(), first, num_rows, num_tokens,
                     [&](int window) { rail.signal_done(l, n, window); });
    }
    return true;
  }

  const Params& p;
  const int warp, lane;
  const Rail<kDomains, kLocal, kChunk, Params> rail;
  const Payload<kScales, kTopk, kCfg.topk_is_int64, Params> payload;
};

template <InternodeDispatchConfig kCfg>
__device__ void dispatch(const InternodeDispatchParams& p) {
  ptx::griddepcontrol_wait();
  constexpr int kDomains = kCfg.num_domains, kRanks = kDomains * kCfg.num_local;
  if (is_wrong_guess(p, p.rank_prefix[kRanks - 1]) ||
      (p.least_rows >= 0 && p.passing_prefix[kDomains - 1] > p.num_passing))
    return;
  InternodeDispatch<kCfg>(p).run();
}

}  // namespace epjit

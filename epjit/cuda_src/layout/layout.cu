// Layout: which ranks a token goes to, and how many tokens each rank, domain and expert gets.
//
//   is_token_in_rank[t, r]       = any k: topk_idx[t, k] / (num_experts / num_ranks) == r
//   num_tokens_per_rank[r]       = sum over t of is_token_in_rank[t, r]
//   num_tokens_per_rdma_rank[n]  = sum over t of (any r: is_token_in_rank[t, r] and
//                                                        domain_of[r] == n)
//   num_tokens_per_expert[e]     = sum over t, k of (topk_idx[t, k] == e)
//
// With by_expert each selection is numbered as well, among those of its expert in the same block,
// whose counts are kept, so that notify only has to add up the blocks:
//
//   local_position[t, k] = selections (t', k') before (t, k) in its block, topk_idx[t', k'] == e
//   block_counts[b, e]   = selections of e in block b
//
// A bit a token and expert says who selects what; a position counts bits. Only where a token selects
// an expert twice, all choices of the block before it are looked at instead.
//
// An index outside [0, num_experts) is no selection. Everything is local: no peer is waited for.
// The shape is a run-time argument, so that the kernel is loaded with the Buffer: ranks need not
// meet for a compile that only some of them reach.
//
// A thread owns a token. Each block counts in shared memory and adds its counts to `counters` in
// global memory; the last block moves the sums to the outputs and leaves the counters zero, as it
// found them, so that no memset is launched.
//   counters  ticket, then [num_ranks], [num_domains] (none for one domain), [num_experts]; zero on
//             entry and on exit
//
// Launch: any grid, layout_threads() threads; with by_expert a block for each 64 tokens.
#include "epjit/topk.cuh"

namespace epjit {

struct LayoutConfig {
  int32_t num_ranks;
  bool topk_is_int64;
  int32_t num_domains;  // 1: they are not counted
  bool by_expert;
};

struct LayoutParams {
  const void* topk_idx;               // [num_tokens, num_topk] int32 or int64
  const int32_t* domain_of;           // [num_ranks], or null: one domain
  int32_t* num_tokens_per_rank;       // [num_ranks]
  int32_t* num_tokens_per_rdma_rank;  // [num_domains], or null
  int32_t* num_tokens_per_expert;     // [num_experts]
  bool* is_token_in_rank;             // [num_tokens, num_ranks]
  uint32_t* counters;                 // own, see above
  uint16_t* local_position;           // [num_tokens, num_topk]; by_expert
  int32_t* block_counts;              // [blocks, num_experts]; by_expert
  int32_t num_tokens;
  int32_t num_topk;
  int32_t num_experts;
};

// A token a thread; 64 a block, so that 4096 tokens spread over 64 SMs.
constexpr int layout_threads(LayoutConfig) { return 64; }

// Beyond this many counts they go straight to global memory.
constexpr int kMaxSharedCounts = 8192;

constexpr int layout_shared_bytes(LayoutConfig) { return kMaxSharedCounts * 4; }

constexpr int kMaxGroup = 256;  // ranks of all domains

// The ranks of a token, a bit each.
template <int kNumRanks>
struct RankSet {
  static constexpr int kWords = ceil_div(kNumRanks, 32);

  // No index into `words` is variable, so that they stay in registers.
  __device__ void add(uint32_t rank) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      words[w] |= static_cast<uint32_t>(kWords == 1 || rank / 32 == w) << rank % 32;
  }

  // Writes a flag for each rank.
  __device__ void store(bool* row) const {
    if constexpr (kNumRanks % 4 == 0 && kNumRanks > kMaxRanks) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t rest = words[w];
#pragma unroll 1
        for (int r = 32 * w; r < min(32 * w + 32, kNumRanks); r += 4, rest >>= 4)
          // Bit i of four goes to bit 0 of byte i.
          *reinterpret_cast<uint32_t*>(row + r) = (rest & 15) * 0x00204081u & 0x01010101u;
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll(kNumRanks <= kMaxRanks ? kMaxRanks : 1)
        for (int r = 32 * w; r < min(32 * w + 32, kNumRanks); ++r) row[r] = words[w] >> r % 32 & 1;
    }
  }

  template <typename Function>
  __device__ void for_each(Function function) const {
    if constexpr (kNumRanks <= kMaxRanks) {
#pragma unroll
      for (int r = 0; r < kNumRanks; ++r)
        if (words[0] >> r & 1) function(r);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        for (uint32_t rest = words[w]; rest != 0; rest &= rest - 1)
          function(32 * w + __ffs(static_cast<int>(rest)) - 1);
    }
  }

  uint32_t words[kWords] = {};
};

// The selections of this thread's token, among those of the block.
template <LayoutConfig kCfg>
__device__ void number_selections(const LayoutParams& p, const uint32_t* masks, bool repeats) {
  constexpr int kWords = layout_threads(kCfg) / 32;
  const int first = blockIdx.x * blockDim.x, token = first + threadIdx.x;
  if (token >= p.num_tokens) return;
  const auto choice = [&](int64_t i) {
    return load_choice<kCfg.topk_is_int64>(p.topk_idx, i, p.num_experts);
  };
  const int64_t own = static_cast<int64_t>(token) * p.num_topk;
  for (int k = 0; k < p.num_topk; ++k) {
    const int expert = choice(own + k);
    int position = 0;
    if (expert >= 0 && !repeats) {
      const uint32_t* const mask = masks + kWords * expert;
      const int word = threadIdx.x / 32;
      for (int w = 0; w < word; ++w) position += __popc(mask[w]);
      position += __popc(mask[word] & ((1u << threadIdx.x % 32) - 1));
    } else if (expert >= 0) {
      for (int64_t i = static_cast<int64_t>(first) * p.num_topk; i < own + k; ++i)
        position += choice(i) == expert;
    }
    p.local_position[own + k] = static_cast<uint16_t>(position);
  }
}

template <LayoutConfig kCfg>
__device__ void layout(const LayoutParams& p) {
  ptx::griddepcontrol_wait();
  static_assert(kCfg.num_ranks >= 1 && kCfg.num_ranks <= kMaxGroup);
  static_assert(!kCfg.by_expert || kCfg.num_domains == 1,
                "notify of one domain adds up the blocks");
  static_assert(kCfg.num_domains >= 1 && kCfg.num_domains <= 32, "a bit a domain");
  constexpr int kBatch = 8;  // selections in flight a thread
  constexpr int kDomains = kCfg.num_domains > 1 ? kCfg.num_domains : 0;
  constexpr int kFirstExpert = kCfg.num_ranks + kDomains;
  const uint32_t experts_per_rank = p.num_experts / kCfg.num_ranks;
  const int num_counts = kFirstExpert + p.num_experts;
  const bool counts_in_shared = num_counts <= kMaxSharedCounts;
  constexpr int kMaskWords = layout_threads(kCfg) / 32;  // of an expert, behind the counts

  // This kernel waits for no peer, so the next one holds its places for a short time only.
  ptx::griddepcontrol_launch_dependents();

  uint32_t* const sums = p.counters + 1;
  uint32_t* const shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  uint32_t* const counts = counts_in_shared ? shared : sums;
  if (counts_in_shared) {
    const int num_masks = kCfg.by_expert ? kMaskWords * p.num_experts : 0;
    for (int i = threadIdx.x; i < num_counts + num_masks; i += blockDim.x) shared[i] = 0;
    __syncthreads();
  }
  uint32_t* const masks = shared + num_counts;
  bool repeats = false;  // this thread's token selects an expert twice

  const int num_threads = gridDim.x * blockDim.x;
  for (int t = blockIdx.x * blockDim.x + threadIdx.x; t < p.num_tokens; t += num_threads) {
    RankSet<kCfg.num_ranks> in_rank;
    for (int first = 0; first < p.num_topk; first += kBatch) {
      int expert[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t i = static_cast<int64_t>(t) * p.num_topk + first + k;
        expert[k] = first + k < p.num_topk
                        ? load_choice<kCfg.topk_is_int64>(p.topk_idx, i, p.num_experts)
                        : -1;
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (expert[k] < 0) continue;
        const uint32_t e = expert[k];
        atomicAdd(counts + kFirstExpert + e, 1u);
        if constexpr (kCfg.by_expert) {
          const uint32_t bit = 1u << threadIdx.x % 32;
          repeats |= (atomicOr(masks + kMaskWords * e + threadIdx.x / 32, bit) & bit) != 0;
        }
        in_rank.add(e / experts_per_rank);
      }
    }
    in_rank.store(p.is_token_in_rank + static_cast<int64_t>(t) * kCfg.num_ranks);
    uint32_t in_domain = 0;
    in_rank.for_each([&](int r) {
      atomicAdd(counts + r, 1u);
      if constexpr (kDomains > 0) in_domain |= 1u << p.domain_of[r];
    });
    for (; in_domain != 0; in_domain &= in_domain - 1)
      atomicAdd(counts + kCfg.num_ranks + __ffs(static_cast<int>(in_domain)) - 1, 1u);
  }

  if constexpr (kCfg.by_expert) {
    repeats = __syncthreads_or(repeats) != 0;
    number_selections<kCfg>(p, masks, repeats);
    for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x)
      p.block_counts[static_cast<int64_t>(blockIdx.x) * p.num_experts + e] =
          static_cast<int>(counts[kFirstExpert + e]);
  } else {
    __syncthreads();
  }
  if (counts_in_shared) {
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x)
      if (shared[i] != 0) atomicAdd(sums + i, shared[i]);
    __syncthreads();
  }

  // The ticket's acq_rel makes the sums of all blocks visible to the last one.
  if (threadIdx.x == 0) shared[0] = ptx::atom_add_acq_rel_gpu(p.counters, 1);
  __syncthreads();
  if (shared[0] != gridDim.x - 1) return;
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
    const int sum = static_cast<int>(ptx::ld_relaxed_gpu(sums + i));
    if (i < kCfg.num_ranks)
      p.num_tokens_per_rank[i] = sum;
    else if (i < kFirstExpert)
      p.num_tokens_per_rdma_rank[i - kCfg.num_ranks] = sum;
    else
      p.num_tokens_per_expert[i - kFirstExpert] = sum;
    sums[i] = 0;
  }
  if (threadIdx.x == 0) p.counters[0] = 0;
}

}  // namespace epjit

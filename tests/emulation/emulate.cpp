// The scheduler of emulated kernels: fibers, collectives, bulk copies, messages between ranks, and
// what is said when a kernel is wrong.
//
// A pass lets the runnable lanes of one warp run once each, up to their next yield; which warp and
// which lanes first is drawn from the seed. A pass is also the unit of emulated time. Launches of
// one rank run one after the other, as on a stream; those of different ranks at the same time. All
// blocks are resident, unless ranks share GPUs that have room for so many.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <queue>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

// After the headers of the system, which must not see its macros.
#include "emulate.h"

namespace emulate {

Thread* current = nullptr;
bool is_preemptible = true;

// meet(), called at `place`.
const uint64_t* meet_at(int kind, unsigned mask, uint64_t value, int line, void* place);

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kPage = 4096;
// A guard page costs two mappings; Linux allows 65530 a process.
constexpr int kMaxGuardedStacks = 16000;
constexpr uint64_t kNever = ~uint64_t{0};
constexpr uint64_t kStart = 1'000'000'000;  // emulated nanoseconds at the first pass
constexpr uint64_t kCanary = 0x5afe57ac5afe57ac;

// ---- random numbers (splitmix64) ----------------------------------------------------------------

uint64_t random_state;

uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
uint64_t random_bits() { return mix(random_state += 0x9e3779b97f4a7c15ull); }
uint64_t random_below(uint64_t n) { return (random_bits() >> 32) * n >> 32; }

// ---- switching stacks ---------------------------------------------------------------------------

#if defined(__x86_64__)
using Context = void*;
extern "C" void emulate_switch(Context* save, Context* load);
asm(R"(
.text
.globl emulate_switch
.type emulate_switch,@function
emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulate_switch,.-emulate_switch
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  // Stacks lie whole pages apart: without this all have their tops in the same sets of the caches,
  // and a switch, which is most of what a run does, misses (a third of the time).
  const size_t color = reinterpret_cast<uintptr_t>(stack) / kPage % 64 * 64;
  void** top = reinterpret_cast<void**>(stack + kStackBytes - color);
  *--top = nullptr;  // at the entry of a function the stack pointer is 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void emulate_switch(Context* save, Context* load) { swapcontext(save, load); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---- what exists --------------------------------------------------------------------------------

using Entry = void (*)(const void* params);

struct Block;

enum class State { kRunnable, kAtWarp, kAtBlock, kAtNamed, kDone };

struct Fiber : Thread {
  Context context;
  char* stack;
  Block* block;
  int warp, lane;
  State state = State::kRunnable;
  void* place = nullptr;  // where it last yielded
  // collectives
  int kind = 0, line = 0;
  unsigned mask = 0;
  uint64_t value = 0;
  uint64_t values[32];
  unsigned count = 0;
  int barrier_id = 0;
  // bulk stores of this thread
  std::vector<int> stores;  // copies that have not landed
  unsigned committed = 0;   // groups
  unsigned fences = 0;      // of this thread
  unsigned puts = 0;        // that its warp has made with it
};

struct Warp {
  Block* block;
  std::vector<Fiber*> lanes;
  unsigned runnable = 0, done = 0;
  // Lanes that are in a collective, and those known to be in one of this kind, line and mask: the
  // next that comes need not be compared with them.
  unsigned waiting = 0, alike = 0;
  int kind = 0, line = 0;
  unsigned mask = 0;
  unsigned meetings = 0;  // collectives of all lanes
  int ready = -1;         // place in the list of warps that can run
  uint64_t id;
  uint64_t number;                // no other warp of the run has it
  unsigned puts = 0;              // that are sent
  std::vector<const char*> seen;  // `landed`, by the signals that its lanes have acquired
};

// A plain access to shared memory: by a lane, kNobody or kSeveral of them, between two meetings of
// its warp and two barriers of its block.
constexpr int kNobody = -1, kSeveral = -2;
struct Access {
  int warp = 0, lane = kNobody;
  unsigned meeting = 0, phase = 0;
};

// The last accesses to a byte: reads of two warps.
struct Byte {
  Access write, read, other_read;
};

struct Kernel;

struct Block {
  Kernel* kernel;
  unsigned index;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  char* shared = nullptr;
  char* shared_map = nullptr;
  size_t shared_map_bytes = 0;
  unsigned arrived = 0, arrived_true = 0, done = 0, runnable = 0;
  int loads = 0;            // bulk loads into shared memory under way
  unsigned phase = 1;       // barriers so far, and one
  std::vector<Byte> bytes;  // of shared memory, from the first plain access on
};

struct Kernel {
  std::string name;
  int rank;
  unsigned grid, threads, shared_bytes;
  Entry entry;
  std::vector<uint64_t> params;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned done = 0;
};

struct Stream {
  std::deque<std::unique_ptr<Kernel>> queue;  // the first one runs once `active`
  bool active = false;
  uint64_t delay = 0;
};

// A bulk copy, or one piece of it.
struct Copy {
  bool is_store, is_read = false, is_landed = false, is_early = false;
  char* dst;
  const char* src;
  unsigned bytes;
  uint64_t* barrier;
  Fiber* owner;
  unsigned group;
  uint64_t due;
  std::vector<char> data;
};

// A message of a warp or a thread to another rank; order is kept between messages of one thread.
struct Message {
  std::string sender;   // to be named if this fails
  uint64_t warp;        // that sent it, a number of its own
  unsigned lanes;       // that sent it
  unsigned fences[32];  // of each lane, before
  int from, pe;
  char* dst;
  const char* src;
  unsigned bytes;
  uint64_t* signal;  // or null
  uint64_t value;
  int pieces_left = 0;
  bool has_landed = false;  // in part
  bool is_urgent = false;   // a quiet() waits for it
};

// One step of a message: bytes, or its signal.
struct Step {
  std::shared_ptr<Message> message;
  unsigned begin, bytes;   // 0 bytes: the signal
  std::vector<char> data;  // of the source when it was sent: it must be there still
  uint64_t due;
};

// Bytes of a put that have come, or some of them, and that nobody may read before a warp that has
// seen the signal has called epjit_received.
struct Landed {
  const char* end;
  const uint64_t* signal;
  bool has_signal;  // it has come
};

enum class EventType { kStart, kBlock, kCopy, kMessage, kFinish };
struct Event {
  uint64_t due, order;
  EventType type;
  int rank, index;
  bool operator>(const Event& other) const {
    return due != other.due ? due > other.due : order > other.order;
  }
};

struct Options {
  uint64_t seed;
  int32_t order;  // 0 uniform, 1 in turn, 2 ranks and warps stall for a while
  int32_t yield_percent;
  uint64_t basic_blocks;  // mean number between two preemptions; 0 = none
  uint64_t max_passes;
  uint64_t nanoseconds_per_pass;
  uint64_t latest_message;  // passes that a message takes at most
  int32_t is_lossy;   // a rank is given up: what is on its way to it may change, or be overtaken
  int32_t num_gpus;   // rank r is a stream of GPU r % num_gpus
  int32_t places;     // blocks that a GPU has room for; 0 = any number
  int32_t slow_from;  // pe whose messages to slow_to alone are slow; -1 = any piece may be
  int32_t slow_to;
};

struct Report {
  uint64_t passes, switches, nanoseconds;
  uint64_t puts, put_bytes, signals, fences, quiets, received;  // calls of transport.cuh
};

// A GPU: places that are taken, and blocks that have none yet, in the order in which they came.
struct Gpu {
  int taken = 0;
  std::deque<Block*> waiting;
};

std::map<int, Stream> streams;
std::map<int, Gpu> gpus;
std::vector<Warp*> ready;
std::vector<Copy> copies;
std::vector<int> free_copies;
std::vector<Step> steps;
std::vector<int> free_steps;
std::vector<std::shared_ptr<Message>> messages;  // that are not over
std::map<const char*, Landed> landed;            // by the first byte; they do not overlap
std::unordered_map<const uint64_t*, const char*> landed_by_signal;  // and some that are no more
std::unordered_set<const uint64_t*> words_under_way;                // signals that have not come
uint64_t num_warps;
Report counted;                 // of this run, as far as it has come
const char* landing = nullptr;  // sender of the message that is being moved
std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events;
uint64_t pass, switches, event_order;
uint64_t blocks_left;  // basic blocks until the next preemption
Options options;
Context scheduler;
Fiber* running = nullptr;
std::vector<char*> stack_pool;
int num_stacks = 0;

jmp_buf failure;
bool is_inside = false;
char message[32768];
size_t message_size;

// ---- what is said about a failure ---------------------------------------------------------------

void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int written =
      vsnprintf(message + message_size, sizeof(message) - message_size, format, arguments);
  va_end(arguments);
  message_size =
      std::min(sizeof(message) - 1, message_size + static_cast<size_t>(std::max(written, 0)));
}

// "<file+0x12>", which build.py turns into source lines.
void say_place(const void* place) {
  Dl_info info;
  if (place && dladdr(place, &info) && info.dli_fname)
    say(" <%s+0x%zx>", info.dli_fname,
        static_cast<size_t>(static_cast<const char*>(place) -
                            static_cast<const char*>(info.dli_fbase)));
}

void say_fiber(const Fiber& fiber) {
  say("rank %d, %s, block %u, thread %u (warp %d, lane %d)", fiber.rank,
      fiber.block->kernel->name.c_str(), fiber.block_index.x, fiber.thread_index.x, fiber.warp,
      fiber.lane);
}

const char* kind_name(int kind) {
  static const char* const names[] = {"__syncwarp", "a shuffle", "__ballot_sync", "__any_sync",
                                      "__all_sync", "__reduce",  "__match",       "epjit_put"};
  return names[kind];
}

std::string state_name(const Fiber& fiber) {
  char text[96];
  switch (fiber.state) {
    case State::kRunnable:
      return "can run; last yield at";
    case State::kDone:
      return "has ended";
    case State::kAtBlock:
      return "waits in __syncthreads at";
    case State::kAtNamed:
      snprintf(text, sizeof(text), "waits in barrier %d of %u threads at", fiber.barrier_id,
               fiber.count);
      return text;
    case State::kAtWarp:
      snprintf(text, sizeof(text), "waits in %s, mask %#x, at", kind_name(fiber.kind), fiber.mask);
      return text;
  }
  return "";
}

// Lanes of a warp in the same state at the same place make one line.
void say_warp(const Warp& warp) {
  unsigned said = 0;
  for (size_t i = 0; i < warp.lanes.size(); ++i) {
    if (said >> i & 1) continue;
    const Fiber& fiber = *warp.lanes[i];
    unsigned same = 0;
    for (size_t j = i; j < warp.lanes.size(); ++j) {
      const Fiber& other = *warp.lanes[j];
      if (other.state == fiber.state && (fiber.state == State::kDone || other.place == fiber.place))
        same |= 1u << j;
    }
    said |= same;
    say("\n  rank %d, %s, block %u, warp %d, lanes %#010x: %s", fiber.rank,
        fiber.block->kernel->name.c_str(), fiber.block_index.x, fiber.warp, same,
        state_name(fiber).c_str());
    if (fiber.state != State::kDone) say_place(fiber.place);
  }
}

void say_all() {
  for (auto& [rank, stream] : streams) {
    if (stream.queue.empty()) continue;
    if (!stream.active) {
      say("\n  rank %d, %s: not started", rank, stream.queue.front()->name.c_str());
      continue;
    }
    for (auto& block : stream.queue.front()->blocks)
      for (auto& warp : block->warps)
        if (warp->done != warp->lanes.size() && message_size < sizeof(message) / 2) say_warp(*warp);
  }
}

[[noreturn]] void leave() { longjmp(failure, 1); }

// ---- signals: a wild pointer or a trap of the sanitizer -----------------------------------------

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
struct sigaction old_actions[5];
stack_t old_stack;
char* signal_stack;   // for the handler
char* landing_stack;  // for leave(), which must not run on a stack that has overflowed

void on_signal(int number, siginfo_t* info, void* data) {
  auto* context = static_cast<ucontext_t*>(data);
#if defined(__x86_64__)
  const void* place = reinterpret_cast<void*>(context->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
  const void* place = reinterpret_cast<void*>(context->uc_mcontext.pc + 1);
#else
  const void* place = nullptr;
#endif
  message_size = 0;
  if (running) {
    say_fiber(*running);
  } else {
    say("%s", landing ? landing : "a bulk copy");
  }
  const char* address = static_cast<const char*>(info->si_addr);
  if (number == SIGILL || number == SIGTRAP) {
    say(": undefined behaviour (alignment, shift, overflow, bounds) at");
  } else if (number == SIGFPE) {
    say(": division by zero at");
  } else {
    if (running && address >= running->stack - kPage && address < running->stack)
      say(": stack overflow,");
    say(": access to %p, which is not mapped, at", static_cast<const void*>(address));
  }
  say_place(place);
#if defined(__x86_64__)
  // Go on in leave(), outside the handler.
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&leave);
  context->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(landing_stack + kStackBytes - 8);
#else
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, number);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  leave();
#endif
}

char* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("mmap of %zu bytes failed", bytes);
  return static_cast<char*>(memory);
}

void install_signals() {
  if (!signal_stack) {
    signal_stack = map_memory(kStackBytes);
    landing_stack = map_memory(kStackBytes);
  }
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = kStackBytes;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &action, &old_actions[i]);
}

void restore_signals() {
  for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

// ---- fibers -------------------------------------------------------------------------------------

char* take_stack() {
  if (!stack_pool.empty()) {
    char* stack = stack_pool.back();
    stack_pool.pop_back();
    return stack;
  }
  char* memory = map_memory(kStackBytes + kPage);
  if (++num_stacks <= kMaxGuardedStacks) mprotect(memory, kPage, PROT_NONE);
  *reinterpret_cast<uint64_t*>(memory + kPage) = kCanary;
  return memory + kPage;
}

void give_stack(char* stack) { stack_pool.push_back(stack); }

void set_runnable(Fiber& fiber) {
  Warp& warp = *fiber.block->warps[static_cast<size_t>(fiber.warp)];
  fiber.state = State::kRunnable;
  fiber.block->runnable += !(warp.runnable >> fiber.lane & 1);
  warp.runnable |= 1u << fiber.lane;
  warp.waiting &= ~(1u << fiber.lane);
  warp.alike &= warp.waiting;
  if (warp.ready < 0) {
    warp.ready = static_cast<int>(ready.size());
    ready.push_back(&warp);
  }
}

void set_blocked(Fiber& fiber, State state) {
  Warp& warp = *fiber.block->warps[static_cast<size_t>(fiber.warp)];
  fiber.state = state;
  fiber.block->runnable -= warp.runnable >> fiber.lane & 1;
  warp.runnable &= ~(1u << fiber.lane);
  if (warp.runnable == 0 && warp.ready >= 0) {
    ready[static_cast<size_t>(warp.ready)] = ready.back();
    ready[static_cast<size_t>(warp.ready)]->ready = warp.ready;
    ready.pop_back();
    warp.ready = -1;
  }
}

void yield() { emulate_switch(&running->context, &scheduler); }

void check_stuck(const Warp& warp);

// Blocks the running fiber until someone makes it runnable.
void block_here(State state, void* place) {
  Fiber& fiber = *running;
  fiber.place = place;
  set_blocked(fiber, state);
  check_stuck(*fiber.block->warps[static_cast<size_t>(fiber.warp)]);
  yield();
}

bool release_block(Block& block);
bool release_warp(Warp& warp, unsigned mask, int kind);

[[noreturn]] void fiber_main() {
  Fiber& fiber = *running;
  Block& block = *fiber.block;
  block.kernel->entry(block.kernel->params.data());
  for (int index : fiber.stores)
    if (!copies[static_cast<size_t>(index)].is_read)
      fail(
          "the thread ends while a bulk store still reads shared memory (commit and wait are "
          "missing)");
  if (*reinterpret_cast<uint64_t*>(fiber.stack) != kCanary) fail("stack overflow");
  set_blocked(fiber, State::kDone);
  Warp& warp = *block.warps[static_cast<size_t>(fiber.warp)];
  ++warp.done;
  ++block.done;
  // Those that wait may wait for threads that have not ended only.
  release_block(block);
  for (Fiber* other : warp.lanes)
    if (other->state == State::kAtWarp) release_warp(warp, other->mask, other->kind);
  check_stuck(warp);
  yield();
  __builtin_unreachable();
}

// Lanes that wait for lanes of their warp, all of which wait for something else that takes the
// whole block.
bool is_stuck(const Warp& warp) {
  if (warp.runnable != 0) return false;
  bool is_at_warp = false;
  for (const Fiber* fiber : warp.lanes) {
    if (fiber->state == State::kAtNamed) return false;
    is_at_warp |= fiber->state == State::kAtWarp;
  }
  return is_at_warp;
}

void check_stuck(const Warp& warp) {
  Block& block = *warp.block;
  if (block.done == block.fibers.size() || (block.runnable != 0 && !is_stuck(warp))) return;
  message_size = 0;
  say("deadlock: threads of rank %d, %s, block %u can never go on", block.kernel->rank,
      block.kernel->name.c_str(), block.index);
  for (auto& each : block.warps)
    if (message_size < sizeof(message) / 2) say_warp(*each);
  leave();
}

// ---- collectives --------------------------------------------------------------------------------

bool release_warp(Warp& warp, unsigned mask, int kind) {
  for (unsigned left = mask & ~warp.waiting; left != 0; left &= left - 1)
    if (warp.lanes[static_cast<size_t>(__builtin_ctz(left))]->state != State::kDone) return false;
  uint64_t values[32] = {};
  for (size_t i = 0; i < warp.lanes.size(); ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = *warp.lanes[i];
    if (other.state == State::kDone) continue;
    if (other.state != State::kAtWarp || other.mask != mask || other.kind != kind) return false;
    values[i] = other.value;
  }
  for (size_t i = 0; i < warp.lanes.size(); ++i) {
    Fiber& other = *warp.lanes[i];
    if (!(mask >> i & 1) || other.state == State::kDone) continue;
    if (kind != kSync) memcpy(other.values, values, sizeof(values));
    set_runnable(other);
  }
  if (mask == ~0u >> (32 - warp.lanes.size())) ++warp.meetings;
  return true;
}

bool release_block(Block& block) {
  if (block.arrived == 0 || block.arrived + block.done != block.fibers.size()) return false;
  const unsigned count = block.arrived_true;
  block.arrived = block.arrived_true = 0;
  ++block.phase;
  for (auto& fiber : block.fibers) {
    if (fiber->state != State::kAtBlock) continue;
    fiber->count = count;
    set_runnable(*fiber);
  }
  return true;
}

// ---- bytes from other ranks ---------------------------------------------------------------------

// The first of `landed` that has a byte of these; with none, its end.
std::map<const char*, Landed>::iterator find_landed(const void* address, size_t size) {
  const char* const begin = static_cast<const char*>(address);
  auto found = landed.upper_bound(begin);
  if (found != landed.begin() && std::prev(found)->second.end > begin) --found;
  return found != landed.end() && found->first < begin + size ? found : landed.end();
}

// Written again, so that nobody reads what came.
void forget_landed(const void* address, size_t size) {
  if (landed.empty()) return;
  for (auto each = find_landed(address, size); each != landed.end();
       each = find_landed(address, size))
    landed.erase(each);
}

void check_received(const void* address, size_t size, void* place) {
  if (landed.empty()) return;
  const auto found = find_landed(address, size);
  if (found == landed.end()) return;
  running->place = place;
  fail("reads %p, which %s, before epjit_received", address,
       found->second.has_signal ? "another rank has put" : "another rank still puts");
}

// ---- races in shared memory ---------------------------------------------------------------------
//
// As racecheck of compute-sanitizer sees them: a read and a write of one byte by two threads with no
// barrier of the block between them, nor a collective of the warp when it is one warp's. Atomics
// count as writes. Two writes are let pass, for they may write the same. A barrier of some threads
// counts as one of the whole block, which can hide a race.

bool is_race(const Access& before, const Access& now) {
  if (before.phase != now.phase || before.lane == kNobody) return false;
  if (before.warp != now.warp) return true;
  return before.meeting == now.meeting && before.lane != now.lane;
}

void note_read(Byte& byte, const Access& now) {
  if (byte.read.phase == now.phase && byte.read.warp != now.warp) byte.other_read = byte.read;
  const bool is_joined = byte.read.phase == now.phase && byte.read.warp == now.warp &&
                         byte.read.meeting == now.meeting && byte.read.lane != now.lane;
  byte.read = now;
  if (is_joined) byte.read.lane = kSeveral;
}

// Notes an access to shared memory that the running thread is about to make.
void access(const void* address, size_t size, bool is_write, void* place) {
  if (!running) return;
  if (is_write)
    forget_landed(address, size);
  else
    check_received(address, size, place);
  const size_t begin =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(running->shared);
  if (begin >= running->shared_bytes) return;
  const bool is_atomic = !is_preemptible;
  if (is_atomic && !is_write) return;  // its other half follows
  Block& block = *running->block;
  if (block.bytes.empty()) block.bytes.resize(running->shared_bytes);
  const Warp& warp = *block.warps[static_cast<size_t>(running->warp)];
  const Access now{running->warp, running->lane, warp.meetings, block.phase};
  const size_t end = std::min<size_t>(begin + size, running->shared_bytes);
  for (size_t i = begin; i < end; ++i) {
    Byte& byte = block.bytes[i];
    const Access* before = nullptr;
    if (!is_write) {
      if (is_race(byte.write, now)) before = &byte.write;
    } else if (is_race(byte.read, now)) {
      before = &byte.read;
    } else if (is_race(byte.other_read, now)) {
      before = &byte.other_read;
    }
    if (before) {
      running->place = place;
      fail("race: %s byte %zu of shared memory, which warp %d has %s since the last barrier",
           is_write ? "writes" : "reads", i, before->warp, is_write ? "read" : "written");
    }
    if (is_write)
      byte.write = now;
    else
      note_read(byte, now);
  }
}

// ---- bulk copies --------------------------------------------------------------------------------

void schedule(uint64_t due, EventType type, int rank, int index) {
  events.push({due, event_order++, type, rank, index});
}

// The state of an mbarrier lies in its 8 bytes of shared memory, as on the device, so that a kernel
// that overwrites it is found out.
struct Barrier {
  uint64_t phase : 1, count : 10, pending : 10, magic : 19;
  int64_t bytes : 24;
};
static_assert(sizeof(Barrier) == 8);
constexpr uint64_t kMagic = 0x5ba77;

Barrier read_barrier(const uint64_t* address) {
  Barrier barrier;
  memcpy(&barrier, address, 8);
  if (barrier.magic != kMagic)
    fail("mbarrier at %p is not initialised, or was overwritten",
         static_cast<const void*>(address));
  return barrier;
}

void write_barrier(uint64_t* address, Barrier barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
  }
  memcpy(address, &barrier, 8);
}

void check_shared(const void* pointer, size_t bytes, size_t alignment, const char* what) {
  const char* begin = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment)
    fail("%s: shared address %p is not %zu-byte aligned", what, pointer, alignment);
  if (begin < running->shared || begin + bytes > running->shared + running->shared_bytes)
    fail("%s: [%p, +%zu) is not within the block's shared memory [%p, +%u)", what, pointer, bytes,
         static_cast<void*>(running->shared), running->shared_bytes);
}

void check_global(const void* pointer, unsigned bytes, const char* what) {
  const char* address = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(pointer) % 16)
    fail("%s: global address %p is not 16-byte aligned", what, pointer);
  if (bytes % 16) fail("%s: %u bytes is not a multiple of 16", what, bytes);
  if (address + bytes > running->shared && address < running->shared + running->shared_bytes)
    fail("%s: global address %p lies in shared memory", what, pointer);
}

int new_copy(Copy copy) {
  int index = static_cast<int>(copies.size());
  if (free_copies.empty()) {
    copies.emplace_back();
  } else {
    index = free_copies.back();
    free_copies.pop_back();
  }
  copies[static_cast<size_t>(index)] = std::move(copy);
  return index;
}

// 1 to 3 pieces of a copy, each a multiple of 16 bytes.
template <typename Make>
void in_pieces(unsigned bytes, Make make) {
  unsigned begin = 0;
  for (int piece = 0; piece < 3 && begin < bytes; ++piece) {
    unsigned size = bytes - begin;
    if (piece < 2 && random_below(2))
      size = 16 * (1 + static_cast<unsigned>(random_below(size / 16)));
    make(begin, size);
    begin += size;
  }
}

void finish_load(Copy& copy) {
  memcpy(copy.dst, copy.is_early ? copy.data.data() : copy.src, copy.bytes);
  Barrier barrier = read_barrier(copy.barrier);
  barrier.bytes -= copy.bytes;
  write_barrier(copy.barrier, barrier);
  --copy.owner->block->loads;
}

void read_store(Copy& copy) {
  copy.data.assign(copy.src, copy.src + copy.bytes);
  copy.is_read = true;
}

void land_store(int index) {
  Copy& copy = copies[static_cast<size_t>(index)];
  if (!copy.is_read) read_store(copy);
  memcpy(copy.dst, copy.data.data(), copy.bytes);
  forget_landed(copy.dst, copy.bytes);
  copy.is_landed = true;
  copy.due = kNever;
  std::vector<int>& stores = copy.owner->stores;
  stores.erase(std::find(stores.begin(), stores.end(), index));
  free_copies.push_back(index);
}

void advance_copy(int index) {
  Copy& copy = copies[static_cast<size_t>(index)];
  if (copy.due > pass) return;  // was given another time, or is over
  running = copy.owner;         // to be named if this fails
  if (!copy.is_store) {
    finish_load(copy);
    copy.due = kNever;
    free_copies.push_back(index);
  } else if (!copy.is_read) {
    read_store(copy);
    copy.due = pass + 1 + (random_below(2) ? random_below(100) : 20'000 + random_below(20'000));
    schedule(copy.due, EventType::kCopy, 0, index);
  } else {
    land_store(index);
  }
  running = nullptr;
}

// ---- messages between ranks ---------------------------------------------------------------------

// Whether a fence of a thread that sent both lies between them.
bool must_wait(const Message& message) {
  for (auto& other : messages) {
    if (other.get() == &message) return false;  // those that follow were sent later
    if (other->warp != message.warp || other->pe != message.pe) continue;
    const unsigned common = other->lanes & message.lanes;
    for (int lane = 0; lane < 32; ++lane)
      if (common >> lane & 1 && other->fences[lane] < message.fences[lane]) return true;
  }
  return false;
}

uint64_t draw_delay(const Message& message) {
  if (message.is_urgent) return random_below(40);
  const bool is_slow = message.from == options.slow_from && message.pe == options.slow_to;
  const uint64_t dice = options.slow_from < 0 ? random_below(8) : is_slow ? 7 : 0;
  const uint64_t latest = std::max<uint64_t>(options.latest_message, 1);
  if (dice < 4) return random_below(std::min<uint64_t>(latest, 100));
  return random_below(dice < 7 ? (latest + 9) / 10 : latest);
}

void schedule_step(Step step) {
  int index = static_cast<int>(steps.size());
  if (free_steps.empty()) {
    steps.emplace_back();
  } else {
    index = free_steps.back();
    free_steps.pop_back();
  }
  step.due = pass + 1 + draw_delay(*step.message);
  schedule(step.due, EventType::kMessage, 0, index);
  steps[static_cast<size_t>(index)] = std::move(step);
}

void advance_step(int index) {
  Step& step = steps[static_cast<size_t>(index)];
  if (step.due > pass) return;  // was given another time, or is over
  const std::shared_ptr<Message> message = step.message;
  if (must_wait(*message)) {
    step.due = pass + 1 + random_below(40);
    schedule(step.due, EventType::kMessage, 0, index);
    return;
  }
  landing = message->sender.c_str();
  if (step.bytes != 0) {
    const char* const src = message->src + step.begin;
    if (memcmp(src, step.data.data(), step.bytes) != 0 && !options.is_lossy)
      fail("%s: its source, %zu bytes at %p, was written before it was read", landing,
           static_cast<size_t>(step.bytes), static_cast<const void*>(src));
    memcpy(message->dst + step.begin, src, step.bytes);
    if (message->signal && !message->has_landed) {
      message->has_landed = true;
      forget_landed(message->dst, message->bytes);
      landed[message->dst] = {message->dst + message->bytes, message->signal, false};
      landed_by_signal[message->signal] = message->dst;
    }
  } else {
    *message->signal = message->value;
    words_under_way.erase(message->signal);
    if (const auto own = landed.find(message->dst);
        own != landed.end() && own->second.signal == message->signal)
      own->second.has_signal = true;
  }
  landing = nullptr;
  if (step.bytes != 0) --message->pieces_left;
  const bool is_over = step.bytes == 0 || (message->pieces_left == 0 && !message->signal);
  step = {};
  step.due = kNever;
  free_steps.push_back(index);
  if (is_over)
    messages.erase(std::find(messages.begin(), messages.end(), message));
  else if (message->pieces_left == 0)
    schedule_step({message, 0, 0, {}, 0});
}

// Address of the same place in the memory of another pe.
char* translate(uint64_t transport, const void* pointer, uint64_t bytes, int pe, const char* what) {
  const auto* record = reinterpret_cast<const uint64_t*>(transport);
  const uint64_t num_ranks = record[0], own = record[1], num_regions = record[2];
  if (pe < 0 || static_cast<uint64_t>(pe) >= num_ranks)
    fail("%s: pe %d of %d", what, pe, static_cast<int>(num_ranks));
  const auto address = reinterpret_cast<uint64_t>(pointer);
  for (uint64_t i = 0; i < num_regions; ++i) {
    const uint64_t* region = record + 3 + i * (1 + num_ranks);
    const uint64_t offset = address - region[1 + own];
    if (offset < region[0] && bytes <= region[0] - offset)
      return reinterpret_cast<char*>(region[1 + pe] + offset);
  }
  fail("%s: [%p, +%zu) does not lie in symmetric memory of this rank", what, pointer,
       static_cast<size_t>(bytes));
}

// By one thread or, with bytes, by a warp.
void send(uint64_t transport, void* dst, const void* src, uint64_t bytes, uint64_t* signal,
          uint64_t value, int pe, const char* what) {
  Fiber& fiber = *running;
  const Warp& warp = *fiber.block->warps[static_cast<size_t>(fiber.warp)];
  auto message = std::make_shared<Message>();
  message->warp = warp.number;
  message->lanes = bytes != 0 ? ~0u : 1u << fiber.lane;
  for (const Fiber* lane : warp.lanes) message->fences[lane->lane] = lane->fences;
  message->from = static_cast<int>(reinterpret_cast<const uint64_t*>(transport)[1]);
  message->pe = pe;
  message->sender = std::string(what) + " of rank " + std::to_string(fiber.rank) + ", " +
                    fiber.block->kernel->name;
  if (signal) {
    if (reinterpret_cast<uintptr_t>(signal) % 8)
      fail("%s: signal %p is not 8-byte aligned", what, static_cast<void*>(signal));
    message->signal = reinterpret_cast<uint64_t*>(translate(transport, signal, 8, pe, what));
    if (!words_under_way.insert(message->signal).second && !options.is_lossy)
      fail("%s: what was sent before to signal %p of pe %d has not come, and may come later", what,
           static_cast<void*>(signal), pe);
  }
  message->value = value;
  if (bytes != 0) {
    message->dst = translate(transport, dst, bytes, pe, what);
    message->src = static_cast<const char*>(src);
    message->bytes = static_cast<unsigned>(bytes);
    translate(transport, src, bytes, message->from, what);  // where RDMA can read
  }
  messages.push_back(message);
  counted.put_bytes += bytes;
  if (bytes == 0) {
    schedule_step({message, 0, 0, {}, 0});
    return;
  }
  std::vector<Step> pieces;
  in_pieces(static_cast<unsigned>(bytes), [&](unsigned begin, unsigned size) {
    const char* const from = message->src + begin;
    pieces.push_back({message, begin, size, {from, from + size}, 0});
  });
  message->pieces_left = static_cast<int>(pieces.size());
  for (Step& piece : pieces) schedule_step(std::move(piece));
}

void put(uint64_t transport, void* dst, const void* src, uint64_t bytes, uint64_t* signal,
         uint64_t value, int pe, const char* what, void* place) {
  running->place = place;
  if (bytes == 0 || bytes % 16 || bytes >> 32 || reinterpret_cast<uintptr_t>(dst) % 16 ||
      reinterpret_cast<uintptr_t>(src) % 16)
    fail("%s: %zu bytes from %p to %p; all must be multiples of 16", what,
         static_cast<size_t>(bytes), src, dst);
  uint64_t hash = 1;
  for (uint64_t argument :
       {transport, reinterpret_cast<uint64_t>(dst), reinterpret_cast<uint64_t>(src), bytes,
        reinterpret_cast<uint64_t>(signal), value, static_cast<uint64_t>(pe)})
    hash = mix(hash + argument);
  const uint64_t* values = meet_at(kPut, ~0u, hash, 0, place);
  for (int lane = 0; lane < 32; ++lane)
    if (values[lane] != hash)
      fail("%s: lane %d does not call it with the arguments of lane %d", what, lane, running->lane);
  // Whichever lane goes on first sends it.
  Warp& warp = *running->block->warps[static_cast<size_t>(running->warp)];
  if (running->puts++ != warp.puts) return;
  ++warp.puts;
  ++counted.puts;
  send(transport, dst, src, bytes, signal, value, pe, what);
}

// ---- launches -----------------------------------------------------------------------------------

void free_block(Block& block) {
  for (auto& fiber : block.fibers) give_stack(fiber->stack);
  if (block.shared_map) munmap(block.shared_map, block.shared_map_bytes);
  block.fibers.clear();
  block.warps.clear();
}

void start_kernel(int rank, Stream& stream) {
  Kernel& kernel = *stream.queue.front();
  stream.active = true;
  for (unsigned b = 0; b < kernel.grid; ++b) {
    auto block = std::make_unique<Block>();
    block->kernel = &kernel;
    block->index = b;
    // The end of shared memory is the end of a page, so that an overrun is seen; what it holds at
    // first is garbage.
    const size_t bytes = (kernel.shared_bytes + 127) / 128 * 128;
    const size_t pages = (bytes + kPage - 1) / kPage * kPage;
    block->shared_map_bytes = pages + kPage;
    block->shared_map = map_memory(block->shared_map_bytes);
    mprotect(block->shared_map + pages, kPage, PROT_NONE);
    block->shared = block->shared_map + pages - bytes;
    memset(block->shared_map, 0xcd, pages);
    for (unsigned t = 0; t < kernel.threads; ++t) {
      if (t % 32 == 0) {
        block->warps.push_back(std::make_unique<Warp>());
        block->warps.back()->block = block.get();
        block->warps.back()->id = (static_cast<uint64_t>(rank) << 40) + (b << 8) + t / 32;
        block->warps.back()->number = num_warps++;
      }
      auto fiber = std::make_unique<Fiber>();
      fiber->thread_index = {t, 0, 0};
      fiber->block_index = {b, 0, 0};
      fiber->block_dim = {kernel.threads, 1, 1};
      fiber->grid_dim = {kernel.grid, 1, 1};
      fiber->shared = block->shared;
      fiber->shared_bytes = kernel.shared_bytes;
      fiber->rank = rank;
      fiber->stack = take_stack();
      fiber->block = block.get();
      fiber->warp = static_cast<int>(t / 32);
      fiber->lane = static_cast<int>(t % 32);
      prepare(fiber->context, fiber->stack, fiber_main);
      block->warps.back()->lanes.push_back(fiber.get());
      block->fibers.push_back(std::move(fiber));
    }
    kernel.blocks.push_back(std::move(block));
    schedule(pass + random_below(random_below(4) ? 30 : 3000), EventType::kBlock, rank,
             static_cast<int>(b));
  }
}

Gpu& gpu_of(const Block& block) { return gpus[block.kernel->rank % options.num_gpus]; }

void start_block(Block& block) {
  Gpu& gpu = gpu_of(block);
  if (options.places != 0 && gpu.taken == options.places) {
    gpu.waiting.push_back(&block);
    return;
  }
  ++gpu.taken;
  for (auto& fiber : block.fibers) set_runnable(*fiber);
}

void finish_block(Block& block) {
  Gpu& gpu = gpu_of(block);
  --gpu.taken;
  if (gpu.waiting.empty()) return;
  Block& next = *gpu.waiting.front();
  gpu.waiting.pop_front();
  start_block(next);
}

void finish_kernel(int rank, Stream& stream) {
  // The end of a kernel completes its bulk stores.
  for (auto& block : stream.queue.front()->blocks) {
    for (auto& fiber : block->fibers)
      while (!fiber->stores.empty()) land_store(fiber->stores.back());
    free_block(*block);
  }
  stream.queue.pop_front();
  stream.active = false;
  if (!stream.queue.empty()) schedule(pass + 1 + random_below(200), EventType::kStart, rank, 0);
}

void handle_events() {
  while (!events.empty() && events.top().due <= pass) {
    const Event event = events.top();
    events.pop();
    if (event.type == EventType::kCopy) {
      advance_copy(event.index);
      continue;
    }
    if (event.type == EventType::kMessage) {
      advance_step(event.index);
      continue;
    }
    Stream& stream = streams[event.rank];
    if (event.type == EventType::kStart) {
      start_kernel(event.rank, stream);
    } else if (event.type == EventType::kFinish) {
      finish_kernel(event.rank, stream);
    } else {
      start_block(*stream.queue.front()->blocks[static_cast<size_t>(event.index)]);
    }
  }
}

// Order 2: for some hundred passes a quarter of the ranks and of the warps stand still.
bool is_stalled(const Warp& warp) {
  const uint64_t period = pass >> 9;
  const uint64_t rank = static_cast<uint64_t>(warp.lanes[0]->rank);
  return mix(options.seed + period * 0x9e37 + (rank << 50)) % 4 == 0 ||
         mix(options.seed + (pass >> 7) * 0x79b9 + warp.id) % 4 == 0;
}

Warp& pick_warp() {
  if (options.order == 1) return *ready[pass % ready.size()];
  Warp* warp = ready[random_below(ready.size())];
  if (options.order == 2)
    for (int tries = 0; tries < 8 && is_stalled(*warp); ++tries)
      warp = ready[random_below(ready.size())];
  return *warp;
}

void run_lane(Fiber& fiber) {
  running = &fiber;
  current = &fiber;
  ++switches;
  emulate_switch(&scheduler, &fiber.context);
  running = nullptr;
}

void run_warp(Warp& warp) {
  unsigned lanes = warp.runnable;
  uint64_t dice = random_bits();
  if (options.order != 1 && dice % 8 == 0) lanes &= static_cast<unsigned>(dice >> 32);
  const unsigned size = static_cast<unsigned>(warp.lanes.size());
  const unsigned first = dice >> 3 & 1 ? static_cast<unsigned>(dice >> 8) % size : 0;
  const bool is_descending = (dice >> 4 & 3) == 0;
#if defined(__x86_64__)
  for (unsigned left = lanes; left != 0; left &= left - 1)
    __builtin_prefetch(warp.lanes[static_cast<size_t>(__builtin_ctz(left))]->context);
#endif
  for (unsigned i = 0; i < size; ++i) {
    unsigned lane = i + first < size ? i + first : i + first - size;
    if (is_descending) lane = size - 1 - lane;
    if (lanes >> lane & 1) run_lane(*warp.lanes[lane]);
  }
  Block& block = *warp.block;
  if (block.done == block.fibers.size() && warp.done == warp.lanes.size()) {
    if (block.loads != 0)
      fail("rank %d, %s, block %u ended while a bulk load still writes its shared memory",
           block.kernel->rank, block.kernel->name.c_str(), block.index);
    finish_block(block);
    Kernel& kernel = *block.kernel;
    if (++kernel.done != kernel.grid) return;
    bool has_stores = false;
    for (auto& each : kernel.blocks)
      for (auto& fiber : each->fibers) has_stores |= !fiber->stores.empty();
    // Stores that nobody waits for may take their time, but not beyond the end of the kernel.
    schedule(pass + 1 + (has_stores ? random_below(10'000) : 0), EventType::kFinish, kernel.rank,
             0);
  }
}

void run_all() {
  for (auto& [rank, stream] : streams)
    if (!stream.queue.empty()) schedule(stream.delay, EventType::kStart, rank, 0);
  for (;; ++pass) {
    if (ready.empty()) {
      if (messages.empty() && std::all_of(streams.begin(), streams.end(),
                                          [](auto& each) { return each.second.queue.empty(); }))
        return;
      if (events.empty()) {
        message_size = 0;
        say("deadlock: nothing can run");
        say_all();
        leave();
      }
      pass = std::max(pass, events.top().due);
    }
    handle_events();
    if (ready.empty()) continue;
    if (pass > options.max_passes) {
      message_size = 0;
      say("not finished after %llu passes", static_cast<unsigned long long>(options.max_passes));
      say_all();
      leave();
    }
    run_warp(pick_warp());
  }
}

void forget_everything() {
  for (auto& [rank, stream] : streams)
    for (auto& kernel : stream.queue)
      for (auto& block : kernel->blocks) free_block(*block);
  streams.clear();
  gpus.clear();
  ready.clear();
  copies.clear();
  free_copies.clear();
  steps.clear();
  free_steps.clear();
  messages.clear();
  landed.clear();
  landed_by_signal.clear();
  words_under_way.clear();
  landing = nullptr;
  events = {};
  running = nullptr;
  current = nullptr;
}

}  // namespace

// ---- what kernels call --------------------------------------------------------------------------

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  message_size = 0;
  if (running) {
    say_fiber(*running);
    say(": %s; at", text);
    // Functions of this file that check something have noted where they were called.
    const void* place = __builtin_return_address(0);
    Dl_info caller, own;
    if (dladdr(place, &caller) && dladdr(reinterpret_cast<void*>(&mix), &own) &&
        caller.dli_fbase == own.dli_fbase)
      place = running->place;
    say_place(place);
  } else {
    say("%s", text);
  }
  if (!is_inside) {
    fprintf(stderr, "emulate: %s\n", message);
    abort();
  }
  leave();
}

void poll() {
  running->place = __builtin_return_address(0);
  yield();
}

// Whoever sees a signal may say that it has received what came with it.
void acquired(const uint64_t* word) {
  if (!running) return;
  std::vector<const char*>& seen = running->block->warps[static_cast<size_t>(running->warp)]->seen;
  const auto begin = landed_by_signal.find(word);
  if (begin == landed_by_signal.end()) return;
  const auto found = landed.find(begin->second);
  if (found != landed.end() && found->second.signal == word && found->second.has_signal)
    seen.push_back(found->first);
}

void perhaps_yield() {
  if (static_cast<int>(random_below(100)) >= options.yield_percent) return;
  running->place = __builtin_return_address(0);
  yield();
}

uint64_t nanoseconds() { return kStart + pass * options.nanoseconds_per_pass; }

const uint64_t* meet(int kind, unsigned mask, uint64_t value, int line) {
  return meet_at(kind, mask, value, line, __builtin_return_address(0));
}

const uint64_t* meet_at(int kind, unsigned mask, uint64_t value, int line, void* place) {
  Fiber& fiber = *running;
  Warp& warp = *fiber.block->warps[static_cast<size_t>(fiber.warp)];
  if (warp.lanes.size() < 32) mask &= (1u << warp.lanes.size()) - 1;
  fiber.place = place;
  if (!(mask >> fiber.lane & 1))
    fail("%s with mask %#x, which does not name the own lane", kind_name(kind), mask);
  const unsigned own = 1u << fiber.lane;
  if (warp.alike == 0) warp.mask = mask, warp.kind = kind, warp.line = line;
  const bool is_alike = warp.mask == mask && warp.kind == kind && warp.line == line;
  for (unsigned left = warp.waiting & mask & ~own & ~(is_alike ? warp.alike : 0u); left != 0;
       left &= left - 1) {
    const Fiber* other = warp.lanes[static_cast<size_t>(__builtin_ctz(left))];
    if (!(other->mask & own)) continue;
    if (other->mask == mask && other->kind == kind && other->line == line) continue;
    fiber.place = place;
    message_size = 0;
    say_fiber(fiber);
    say(": %s with mask %#x meets lane %d in %s with mask %#x%s; here", kind_name(kind), mask,
        other->lane, kind_name(other->kind), other->mask, other->kind == kind ? " elsewhere" : "");
    say_place(place);
    say("\n  there");
    say_place(other->place);
    leave();
  }
  fiber.kind = kind;
  fiber.mask = mask;
  fiber.value = value;
  fiber.line = line;
  fiber.place = place;
  fiber.state = State::kAtWarp;
  warp.waiting |= own;
  if (is_alike) warp.alike |= own;
  if (release_warp(warp, mask, kind)) {
    if (random_below(2)) yield();
  } else {
    block_here(State::kAtWarp, place);
  }
  return fiber.values;
}

unsigned block_barrier(bool value) {
  Fiber& fiber = *running;
  Block& block = *fiber.block;
  ++block.arrived;
  block.arrived_true += value;
  fiber.state = State::kAtBlock;
  if (release_block(block)) {
    fiber.place = __builtin_return_address(0);
    yield();
  } else {
    block_here(State::kAtBlock, __builtin_return_address(0));
  }
  return fiber.count;
}

void named_barrier(int id, unsigned count) {
  Fiber& fiber = *running;
  Block& block = *fiber.block;
  if (count == 0 || count % 32 != 0)
    fail("named barrier %d of %u threads: not a multiple of 32", id, count);
  fiber.state = State::kAtNamed;
  fiber.barrier_id = id;
  fiber.count = count;
  unsigned arrived = 0;
  for (auto& other : block.fibers) {
    if (other->state != State::kAtNamed || other->barrier_id != id) continue;
    if (other->count != count)
      fail("named barrier %d of %u threads meets one of %u", id, count, other->count);
    ++arrived;
  }
  if (arrived < count) {
    block_here(State::kAtNamed, __builtin_return_address(0));
    return;
  }
  ++block.phase;
  for (auto& other : block.fibers)
    if (other->state == State::kAtNamed && other->barrier_id == id) set_runnable(*other);
  fiber.place = __builtin_return_address(0);
  yield();
}

void mbarrier_init(uint64_t* address, unsigned count) {
  running->place = __builtin_return_address(0);
  check_shared(address, 8, 8, "mbarrier_init");
  if (count == 0 || count > 1023) fail("mbarrier_init: count %u", count);
  Barrier barrier{};
  barrier.count = barrier.pending = count;
  barrier.magic = kMagic;
  memcpy(address, &barrier, 8);
}

void mbarrier_arrive(uint64_t* address, unsigned count, int64_t expect_bytes) {
  running->place = __builtin_return_address(0);
  check_shared(address, 8, 8, "mbarrier_arrive");
  perhaps_yield();
  Barrier barrier = read_barrier(address);
  if (barrier.pending < count)
    fail("mbarrier: more arrivals than the %u of a phase", static_cast<unsigned>(barrier.count));
  if (expect_bytes + barrier.bytes >= 1 << 20) fail("mbarrier: expects more than 2^20 - 1 bytes");
  barrier.pending -= count;
  barrier.bytes += expect_bytes;
  write_barrier(address, barrier);
}

bool mbarrier_try_wait(uint64_t* address, unsigned parity) {
  running->place = __builtin_return_address(0);
  check_shared(address, 8, 8, "mbarrier_try_wait");
  yield();
  return read_barrier(address).phase != (parity & 1);
}

void bulk_load(void* shared_dst, const void* global_src, unsigned bytes, uint64_t* barrier) {
  running->place = __builtin_return_address(0);
  check_global(global_src, bytes, "bulk_load");
  check_shared(shared_dst, bytes, 16, "bulk_load");
  check_shared(barrier, 8, 8, "bulk_load");
  check_received(global_src, bytes, running->place);
  read_barrier(barrier);
  memset(shared_dst, 0xa5, bytes);  // whoever reads before the mbarrier's phase is over reads this
  in_pieces(bytes, [&](unsigned begin, unsigned size) {
    Copy copy{};
    copy.dst = static_cast<char*>(shared_dst) + begin;
    copy.src = static_cast<const char*>(global_src) + begin;
    copy.bytes = size;
    copy.barrier = barrier;
    copy.owner = running;
    copy.is_early = random_below(4) == 0;
    if (copy.is_early) copy.data.assign(copy.src, copy.src + size);
    copy.due = pass + random_below(random_below(8) ? 40 : 600);
    const uint64_t due = copy.due;
    schedule(due, EventType::kCopy, 0, new_copy(std::move(copy)));
    ++running->block->loads;
  });
  perhaps_yield();
}

void bulk_store(void* global_dst, const void* shared_src, unsigned bytes) {
  running->place = __builtin_return_address(0);
  check_global(global_dst, bytes, "bulk_store");
  check_shared(shared_src, bytes, 16, "bulk_store");
  in_pieces(bytes, [&](unsigned begin, unsigned size) {
    Copy copy{};
    copy.is_store = true;
    copy.dst = static_cast<char*>(global_dst) + begin;
    copy.src = static_cast<const char*>(shared_src) + begin;
    copy.bytes = size;
    copy.owner = running;
    copy.group = running->committed;
    // Half of them wait until someone waits for them.
    copy.due = pass + (random_below(2) ? random_below(100) : 20'000 + random_below(20'000));
    const uint64_t due = copy.due;
    const int index = new_copy(std::move(copy));
    running->stores.push_back(index);
    schedule(due, EventType::kCopy, 0, index);
  });
  perhaps_yield();
}

void bulk_commit() { ++running->committed; }

void bulk_wait(int pending_groups, bool read_only) {
  Fiber& fiber = *running;
  fiber.place = __builtin_return_address(0);
  for (;;) {
    bool is_over = true;
    for (int index : fiber.stores) {
      Copy& copy = copies[static_cast<size_t>(index)];
      if (static_cast<int>(copy.group) >= static_cast<int>(fiber.committed) - pending_groups)
        continue;
      if (read_only && copy.is_read) continue;
      is_over = false;
      if (copy.due > pass + 50) {
        copy.due = pass + 1 + random_below(40);
        schedule(copy.due, EventType::kCopy, 0, index);
      }
    }
    if (is_over) return;
    yield();
  }
}

}  // namespace emulate

// ---- epjit/transport.cuh ------------------------------------------------------------------------

extern "C" {

void epjit_put(uint64_t transport, void* dst, const void* src, uint64_t bytes, int32_t pe) {
  using namespace emulate;
  put(transport, dst, src, bytes, nullptr, 0, pe, "epjit_put", __builtin_return_address(0));
}

void epjit_put_signal(uint64_t transport, void* dst, const void* src, uint64_t bytes,
                      uint64_t* signal, uint64_t value, int32_t pe) {
  using namespace emulate;
  put(transport, dst, src, bytes, signal, value, pe, "epjit_put_signal",
      __builtin_return_address(0));
}

void epjit_signal(uint64_t transport, uint64_t* signal, uint64_t value, int32_t pe) {
  using namespace emulate;
  perhaps_yield();
  ++counted.signals;
  running->place = __builtin_return_address(0);
  send(transport, nullptr, nullptr, 0, signal, value, pe, "epjit_signal");
  perhaps_yield();
}

void epjit_received(uint64_t) {
  using namespace emulate;
  perhaps_yield();
  ++counted.received;
  std::vector<const char*>& seen = running->block->warps[static_cast<size_t>(running->warp)]->seen;
  for (const char* begin : seen) landed.erase(begin);
  seen.clear();
}

void epjit_fence(uint64_t) {
  ++emulate::counted.fences;
  ++emulate::running->fences;
}

void epjit_quiet(uint64_t) {
  using namespace emulate;
  ++counted.quiets;
  Fiber& fiber = *running;
  fiber.place = __builtin_return_address(0);
  const uint64_t warp = fiber.block->warps[static_cast<size_t>(fiber.warp)]->number;
  for (;;) {
    bool is_over = true;
    for (auto& message : messages) {
      if (message->warp != warp || !(message->lanes >> fiber.lane & 1)) continue;
      message->is_urgent = true;
      is_over = false;
    }
    if (is_over) return;
    for (size_t i = 0; i < steps.size(); ++i) {
      Step& step = steps[i];
      if (!step.message || !step.message->is_urgent || step.due <= pass + 50) continue;
      step.due = pass + 1 + random_below(40);
      schedule(step.due, EventType::kMessage, 0, static_cast<int>(i));
    }
    yield();
  }
}

}  // extern "C"

// ---- what build.py calls ------------------------------------------------------------------------

extern "C" {

// Called at each basic block of a kernel (g++ -fsanitize-coverage=trace-pc).
void __sanitizer_cov_trace_pc() {
  using namespace emulate;
  if (blocks_left == 0 || --blocks_left != 0 || !is_preemptible || !running) {
    if (blocks_left == 0) blocks_left = options.basic_blocks;
    return;
  }
  blocks_left = 1 + random_below(2 * options.basic_blocks);
  running->place = __builtin_return_address(0);
  yield();
}

// Called before each plain access of a kernel (g++ -fsanitize=thread, without its library).
#define EMULATE_ACCESS(size)                                            \
  void __tsan_read##size(void* address) {                               \
    emulate::access(address, size, false, __builtin_return_address(0)); \
  }                                                                     \
  void __tsan_write##size(void* address) {                              \
    emulate::access(address, size, true, __builtin_return_address(0));  \
  }                                                                     \
  void __tsan_unaligned_read##size(void* address) {                     \
    emulate::access(address, size, false, __builtin_return_address(0)); \
  }                                                                     \
  void __tsan_unaligned_write##size(void* address) {                    \
    emulate::access(address, size, true, __builtin_return_address(0));  \
  }
EMULATE_ACCESS(1)
EMULATE_ACCESS(2)
EMULATE_ACCESS(4)
EMULATE_ACCESS(8)
EMULATE_ACCESS(16)
void __tsan_read_range(void* address, size_t size) {
  emulate::access(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  emulate::access(address, size, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void emulate_launch(const char* name, int rank, unsigned grid, unsigned threads,
                    unsigned shared_bytes, emulate::Entry entry, const void* params,
                    size_t params_bytes) {
  using namespace emulate;
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name;
  kernel->rank = rank;
  kernel->grid = grid;
  kernel->threads = threads;
  kernel->shared_bytes = shared_bytes;
  kernel->entry = entry;
  kernel->params.resize((params_bytes + 7) / 8);
  memcpy(kernel->params.data(), params, params_bytes);
  streams[rank].queue.push_back(std::move(kernel));
}

void emulate_delay(int rank, uint64_t passes) { emulate::streams[rank].delay = passes; }

// Runs all that was launched. 0, or 1 with emulate_message().
int emulate_run(const emulate::Options* options, emulate::Report* report) {
  using namespace emulate;
  emulate::options = *options;
  random_state = mix(options->seed + 1);
  pass = switches = event_order = num_warps = 0;
  counted = {};
  blocks_left = options->basic_blocks;
  is_preemptible = true;
  message_size = 0;
  message[0] = 0;
  install_signals();
  is_inside = true;
  const int result = setjmp(failure);
  if (result == 0) run_all();
  is_inside = false;
  restore_signals();
  *report = counted;
  report->passes = pass;
  report->switches = switches;
  report->nanoseconds = pass * options->nanoseconds_per_pass;
  forget_everything();
  return result;
}

const char* emulate_message() { return emulate::message; }

// Memory whose end is the end of the mapping: reading or writing beyond it is a fault that is
// reported.
void* emulate_allocate(size_t bytes) {
  using namespace emulate;
  const size_t size = (bytes + 15) / 16 * 16;
  const size_t pages = (size + kPage - 1) / kPage * kPage;
  void* memory =
      mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  mprotect(static_cast<char*>(memory) + pages, kPage, PROT_NONE);
  return static_cast<char*>(memory) + pages - size;
}

void emulate_free(void* memory, size_t bytes) {
  using namespace emulate;
  const size_t size = (bytes + 15) / 16 * 16;
  const size_t pages = (size + kPage - 1) / kPage * kPage;
  munmap(static_cast<char*>(memory) + size - pages, pages + kPage);
}
}

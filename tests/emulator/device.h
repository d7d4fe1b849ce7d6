// A device of the CPU that runs CUDA kernels: enough of one for kernels that reach the hardware through
// rowwise_ptx.cuh, of which this folder has its own.
//
// Emulated: blocks of threads in clusters, their shared memory, barriers of warps, blocks and clusters,
// shuffles, barriers that count bytes, bulk copies, stores into other blocks; asynchronous copies and
// matrix products of a warp (warp_tile_ptx.cuh). Each thread is a coroutine that may lose its turn at a
// barrier or what works like one; which of the ready ones is next, and when a bulk copy or a remote
// store lands, is random but follows from a seed. Memory that nobody has written, and the target of a
// copy under way, are NaN. What hardware answers with silence or a hang is an error that says what
// happened: a deadlock, a barrier used before it was made or armed twice, a misplaced copy, a store into
// a block that has ended.
//
// Not emulated: time; other memory orders than the one in which threads run (a missing fence goes
// unseen); threads that interleave between two calls of the hardware; clusters side by side (they come
// one after another); registers, bank conflicts, occupancy.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

constexpr int WARP = 32;
constexpr size_t SHARED_LIMIT = 227 << 10;     // bytes of a block, as on sm_90
constexpr uint32_t BYTES_LIMIT = (1 << 20) - 1;  // that a barrier can count

// Barriers that everybody passes, to see what notices. A block's first one holds: kernels find addresses
// before it, and a wrong one would end the test.
enum class Broken : int { nothing, block_sync, cluster_sync, bytes_wait, remote_bytes_wait, copies_wait };

struct Block;

struct Fiber {
  Block* block;
  int thread;
  char* stack;
  jmp_buf here;
  bool started = false, done = false;
  int block_barriers = 0;  // that it has come to
  // Groups of asynchronous copies under way; the last is not committed.
  std::deque<std::vector<std::function<void()>>> copies{1};
};

struct Waiting {
  std::vector<Fiber*> fibers;
  void wait();
  void wake();
};

// A barrier of a fixed number of threads. `action` tells shuffles from plain barriers.
struct Meeting {
  int arrived = 0, action = 0;
  Waiting others;
  void meet(int members, int action_ = 0);
};

// Words that the lanes of a warp show each other. Two sets: who writes the next but one has seen that
// all read this one.
struct Warp {
  Meeting meeting;
  int turn = 0;
  char words[2][WARP][40];
};

// A barrier that counts bytes. A phase ends when it is armed and as many bytes came as it was armed for;
// those that came first have made `missing` negative.
struct ByteBarrier {
  int64_t missing = 0;
  bool armed = false;
  uint32_t parity = 0;
  Waiting waiting;

  void count(int64_t bytes) {
    missing -= bytes;
    if (!armed || missing != 0) return;
    armed = false;
    parity ^= 1;
    waiting.wake();
  }
};

struct Block {
  int index, rank, ended = 0;
  char* shared;
  Meeting meeting;
  std::vector<Warp> warps;
  std::map<size_t, ByteBarrier> barriers;  // by offset in shared memory
};

struct Device {
  unsigned grid = 0, threads = 0;  // blocks; threads of each
  size_t bytes = 0;                // of shared memory of a block
  std::vector<Block> cluster;
  Meeting cluster_meeting;
  std::vector<Fiber*> ready;
  std::vector<std::function<void()>> under_way;  // copies and stores that will land
  std::function<void()> kernel;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  std::string error;
  Broken broken = Broken::nothing;
  uint64_t seed = 0, state = 1;

  uint32_t random() {  // xorshift64
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
};

inline Device device;

inline bool is_broken(Broken what) { return device.broken == what; }

// Coroutines. The first entry goes through makecontext, the others through longjmp, which costs no
// system call.

inline __attribute__((noinline)) void give_up_turn() {
  if (!_setjmp(device.running->here)) _longjmp(device.scheduler, 1);
}

void fail(const std::string& what);

inline void enter_fiber() {
  device.kernel();
  for (const auto& group : device.running->copies)
    if (!group.empty()) fail("a thread ends while its copies are under way");
  device.running->done = true;
  ++device.running->block->ended;
  _longjmp(device.scheduler, 1);
}

inline __attribute__((noinline)) void resume(Fiber* fiber, size_t stack_bytes) {
  device.running = fiber;
  if (_setjmp(device.scheduler)) return;
  if (fiber->started) _longjmp(fiber->here, 1);
  fiber->started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter_fiber, 0);
  setcontext(&context);
}

// The first error ends the launch. In a thread this does not return.
inline void fail(const std::string& what) {
  if (device.error.empty()) device.error = what;
  if (device.running) give_up_turn();
}

inline void maybe_lose_turn() {
  if (device.random() % 4) return;
  device.ready.push_back(device.running);
  give_up_turn();
}

inline void Waiting::wait() {
  fibers.push_back(device.running);
  give_up_turn();
}

inline void Waiting::wake() {
  device.ready.insert(device.ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

inline void Meeting::meet(int members, int action_) {
  if (arrived == 0) action = action_;
  if (action != action_) return fail("threads of a warp are at different shuffles");
  if (++arrived < members) return others.wait();
  arrived = 0;
  others.wake();
  maybe_lose_turn();
}

inline void run_cluster(int first, int ranks) {
  constexpr size_t STACK = 64 << 10;
  static char* stacks = nullptr;
  static size_t stacks_count = 0;
  const size_t count = ranks * device.threads;
  if (count > stacks_count) {
    if (stacks) munmap(stacks, stacks_count * STACK);
    void* const found = mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = found == MAP_FAILED ? nullptr : static_cast<char*>(found);
    stacks_count = stacks ? count : 0;
    if (!stacks) return fail("no memory for the stacks of " + std::to_string(count) + " threads");
  }

  std::vector<std::vector<char>> shared(ranks);
  std::vector<Fiber> fibers(count);
  device.cluster = std::vector<Block>(ranks);
  device.cluster_meeting = Meeting();
  device.ready.clear();
  device.under_way.clear();
  for (int rank = 0; rank < ranks; ++rank) {
    Block& block = device.cluster[rank];
    block.index = first + rank;
    block.rank = rank;
    block.warps.resize((device.threads + WARP - 1) / WARP);
    shared[rank].assign(device.bytes + 1024, '\xff');  // NaN
    block.shared = shared[rank].data() + (-reinterpret_cast<uintptr_t>(shared[rank].data()) & 1023);
    for (unsigned thread = 0; thread < device.threads; ++thread) {
      const size_t i = rank * device.threads + thread;
      fibers[i].block = &block;
      fibers[i].thread = static_cast<int>(thread);
      fibers[i].stack = stacks + i * STACK;
      device.ready.push_back(&fibers[i]);
    }
  }

  // By seed: what is under way lands soon, now and then, or when nobody can go on without it.
  const uint32_t patience = device.seed % 3 == 0 ? 4 : device.seed % 3 == 1 ? 64 : 0;
  const auto take = [](auto& from) {
    const size_t k = device.random() % from.size();
    std::swap(from[k], from.back());
    auto taken = std::move(from.back());
    from.pop_back();
    return taken;
  };
  for (size_t left = count; device.error.empty() && (left > 0 || !device.under_way.empty());) {
    const bool lands = !device.under_way.empty() &&
        (device.ready.empty() || (patience && device.random() % patience == 0));
    if (lands) {
      take(device.under_way)();
    } else if (device.ready.empty()) {
      fail("deadlock: " + std::to_string(left) + " threads wait");
    } else {
      Fiber* const fiber = take(device.ready);
      resume(fiber, STACK);
      device.running = nullptr;
      if (fiber->done) --left;
    }
  }
}

// Runs `kernel` in `blocks` blocks, `ranks` to a cluster. What went wrong is in device.error.
inline void launch(int blocks, int ranks, int threads, size_t bytes, std::function<void()> kernel) {
  if (bytes > SHARED_LIMIT) return fail("too much shared memory: " + std::to_string(bytes));
  device.grid = blocks;
  device.threads = threads;
  device.bytes = bytes;
  device.kernel = std::move(kernel);
  for (int first = 0; first < blocks && device.error.empty(); first += ranks) run_cluster(first, ranks);
}

}  // namespace emulator

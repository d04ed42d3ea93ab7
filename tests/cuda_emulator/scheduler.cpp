// The fibers behind cuda_emulator.h, and the rules by which they wait for each other.
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(__x86_64__)
// void d23_switch_stack(void** save, void* load): keep this stack's registers on it and continue on another one.
extern "C" void d23_switch_stack(void** save, void* load);
asm(R"(
.text
.type d23_switch_stack, @function
d23_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size d23_switch_stack, .-d23_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace d23_emulator {
namespace {

// ---- fibers ----

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

void fiber_main();

struct Stack {
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake = nullptr;  // AddressSanitizer's own stack for this one
  const void* bottom = nullptr;
  size_t size = 0;
};

void switch_stack(Stack& from, Stack& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  d23_switch_stack(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// Memory for one stack, with a page below it that must not be touched.
void new_stack(Stack& stack) {
  if (stack.bottom == nullptr) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      std::perror("cuda emulator: stack");
      std::abort();
    }
    stack.bottom = static_cast<char*>(memory) + page;
    stack.size = kStackBytes;
  }
  char* bottom = static_cast<char*>(const_cast<void*>(stack.bottom));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
  stack.fake = nullptr;
#if defined(__x86_64__)
  // What d23_switch_stack pops: six registers and the address to continue at; above it a return address that is never
  // used, which leaves the stack aligned as at the start of a function.
  void** top = reinterpret_cast<void**>(bottom + kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  stack.pointer = top;
#else
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = bottom;
  stack.context.uc_stack.ss_size = kStackBytes;
  makecontext(&stack.context, fiber_main, 0);
#endif
}

// ---- one block ----

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  Stack stack;
  uint3 index;
  int number;  // in the block
  State state;
  // What the thread waits with, and what it gets.
  BlockOp block_op;
  WarpOp warp_op;
  unsigned mask;
  int source, predicate, line;
  const char* file;
  uint64_t value, result;

  int lane() const { return number % kWarp; }
};

struct Block {
  std::vector<Thread*> threads;
  std::vector<unsigned char> shared;
  int alive = 0, at_barrier = 0;
  Body body;
};

std::vector<Thread*> all_threads;
Stack scheduler_stack;
Block block;
Thread* current = nullptr;
std::string failure;  // of the kernel that runs
std::string last_message;
std::map<const void*, size_t> allowed_shared;
std::mt19937_64 random_order;
bool shuffled = false;
std::mutex one_launch;

[[noreturn]] void fail_current(const std::string& message) {
  failure = message;
  switch_stack(current->stack, scheduler_stack);
  std::abort();  // an abandoned fiber is never continued
}

void wait() { switch_stack(current->stack, scheduler_stack); }

void release_barrier() {
  int count = 0;
  const Thread* first = nullptr;
  for (const Thread* t : block.threads) {
    if (t->state != State::kAtBarrier) continue;
    if (first == nullptr) first = t;
    if (t->line != first->line || t->file != first->file || t->block_op != first->block_op) {
      failure = "threads of one block wait at different barriers: line " + std::to_string(first->line) + " and line " +
                std::to_string(t->line);
      return;
    }
    count += t->predicate;
  }
  for (Thread* t : block.threads) {
    if (t->state != State::kAtBarrier) continue;
    t->result = t->block_op == BlockOp::kAnd  ? static_cast<uint64_t>(count == block.at_barrier)
                : t->block_op == BlockOp::kOr ? static_cast<uint64_t>(count > 0)
                                              : static_cast<uint64_t>(count);
    t->state = State::kReady;
  }
  block.at_barrier = 0;
}

Thread* lane_of(const Thread& t, int lane) {
  const size_t number = static_cast<size_t>(t.number / kWarp * kWarp + lane);
  return number < block.threads.size() ? block.threads[number] : nullptr;
}

uint64_t combine(const Thread& t) {
  uint64_t result = 0;
  bool first = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread* other = t.mask >> lane & 1 ? lane_of(t, lane) : nullptr;
    if (other == nullptr || other->state != State::kAtWarp) continue;
    const uint64_t v = other->value;
    switch (t.warp_op) {
      case WarpOp::kBallot: result |= (v & 1) << lane; break;
      case WarpOp::kMatch: result |= static_cast<uint64_t>(v == t.value) << lane; break;
      case WarpOp::kAdd: result += v; break;
      case WarpOp::kMin: result = first ? v : std::min(result, v); break;
      case WarpOp::kMax: result = first ? v : std::max(result, v); break;
      case WarpOp::kAnd: result = first ? v : result & v; break;
      case WarpOp::kOr: result |= v; break;
      case WarpOp::kXor: result ^= v; break;
      default: break;
    }
    first = false;
  }
  return result;
}

// If all lanes of t's mask that still run wait with t's operation, give each its result and let them go.
bool complete_warp(const Thread& t) {
  const unsigned mask = t.mask;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread* other = mask >> lane & 1 ? lane_of(t, lane) : nullptr;
    if (other == nullptr || other->state == State::kDone) continue;
    if (other->state != State::kAtWarp || other->mask != mask || other->warp_op != t.warp_op) return false;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread* other = mask >> lane & 1 ? lane_of(t, lane) : nullptr;
    if (other == nullptr || other->state != State::kAtWarp) continue;
    if (other->warp_op != WarpOp::kShuffle) {
      other->result = combine(*other);
      continue;
    }
    const Thread* source = mask >> other->source & 1 ? lane_of(*other, other->source) : nullptr;
    other->result = source && source->state == State::kAtWarp ? source->value : 0xdeadbeefdeadbeef;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread* other = mask >> lane & 1 ? lane_of(t, lane) : nullptr;
    if (other && other->state == State::kAtWarp) other->state = State::kReady;
  }
  return true;
}

// A thread has returned: those that waited for it may go on without it.
void leave(Thread& t) {
  t.state = State::kDone;
  --block.alive;
  if (block.alive > 0 && block.at_barrier == block.alive) release_barrier();
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread* other = lane_of(t, lane);
    if (other && other->state == State::kAtWarp && (other->mask >> t.lane() & 1)) complete_warp(*other);
  }
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  // The first switch to a fiber tells where the stack that it came from lies.
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack.bottom, &scheduler_stack.size);
#endif
  for (;;) {
    block.body.call(block.body.data);
    leave(*current);
    wait();
  }
}

std::string describe_waiting() {
  int barrier = 0, warp = 0, line = 0;
  for (const Thread* t : block.threads) {
    if (t->state == State::kAtBarrier) ++barrier, line = t->line;
    if (t->state == State::kAtWarp) ++warp;
  }
  std::string text = "deadlock: ";
  if (barrier) text += std::to_string(barrier) + " threads wait at the barrier in line " + std::to_string(line);
  if (warp) text += (barrier ? ", " : "") + std::to_string(warp) + " in warp intrinsics whose mask names others";
  return text;
}

// This library's thread-local variables have an address only after one of them has been used.
thread_local volatile char any_thread_local;

// Static shared memory lies in the thread-local variables of this library (see __shared__ in cuda_runtime.h).
int find_thread_locals(dl_phdr_info* info, size_t, void* data) {
#if !defined(__SANITIZE_ADDRESS__)
  const ElfW(Addr) mine = reinterpret_cast<ElfW(Addr)>(&find_thread_locals);
  bool here = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const ElfW(Addr) start = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && mine >= start && mine < start + part.p_memsz) here = true;
    if (part.p_type == PT_TLS) bytes = part.p_memsz;
  }
  if (!here) return 0;
  if (info->dlpi_tls_data) *static_cast<std::pair<void*, size_t>*>(data) = {info->dlpi_tls_data, bytes};
  return 1;
#else
  return (void)info, (void)data, 1;
#endif
}

void run_block(size_t shared_bytes) {
  block.shared.assign(shared_bytes + 16, 0xff);
  block.shared.resize(shared_bytes);
  block.alive = static_cast<int>(block.threads.size());
  block.at_barrier = 0;
  for (Thread* t : block.threads) t->state = State::kReady;
  std::vector<Thread*> order = block.threads;
  while (block.alive > 0) {
    bool moved = false;
    if (shuffled) std::shuffle(order.begin(), order.end(), random_order);
    for (Thread* t : order) {
      if (t->state != State::kReady) continue;
      moved = true;
      current = t;
      threadIdx = t->index;
      switch_stack(scheduler_stack, t->stack);
      if (!failure.empty()) return;
    }
    if (!moved) {
      failure = describe_waiting();
      return;
    }
  }
}

cudaError_t refuse(cudaError_t error, const std::string& message) {
  last_message = message;
  return error;
}

void prepare_threads(dim3 size) {
  const size_t count = static_cast<size_t>(size.x) * size.y * size.z;
  while (all_threads.size() < count) {
    all_threads.push_back(new Thread());
    new_stack(all_threads.back()->stack);
  }
  block.threads.assign(all_threads.begin(), all_threads.begin() + static_cast<std::ptrdiff_t>(count));
  for (size_t n = 0; n < count; ++n) {
    const unsigned i = static_cast<unsigned>(n);
    block.threads[n]->number = static_cast<int>(n);
    block.threads[n]->index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
  }
}

}  // namespace

// ---- what kernels call ----

int block_barrier(BlockOp op, int predicate, const char* file, int line) {
  Thread& t = *current;
  t.block_op = op, t.predicate = predicate, t.file = file, t.line = line;
  t.state = State::kAtBarrier;
  if (++block.at_barrier == block.alive) {
    release_barrier();
    if (!failure.empty()) fail_current(failure);
  }
  // Also the last one to arrive gives way, so that it is not always the first to go on.
  wait();
  return static_cast<int>(t.result);
}

uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t value, int source) {
  Thread& t = *current;
  if (!(mask >> t.lane() & 1)) fail_current("a thread calls a warp intrinsic with a mask that does not name its lane");
  t.warp_op = op, t.mask = mask, t.value = value, t.source = source;
  t.state = State::kAtWarp;
  complete_warp(t);
  wait();
  return t.result;
}

unsigned active_lanes() {
  unsigned mask = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread* other = lane_of(*current, lane);
    if (other && other->state != State::kDone) mask |= 1u << lane;
  }
  return mask;
}

int lane() { return current->lane(); }

void maybe_yield() {
  if (shuffled && random_order() % 4 == 0) wait();
}

void* dynamic_shared() { return block.shared.data(); }

cudaError_t allow_shared(const void* function, size_t bytes) {
  if (bytes > kMaxShared) return refuse(cudaErrorInvalidValue, "more shared memory than a block can have");
  allowed_shared[function] = bytes;
  return cudaSuccess;
}

const char* error_text(cudaError_t) { return last_message.c_str(); }

cudaError_t run_grid(const char* kernel, const void* function, dim3 grid, dim3 size, size_t shared_bytes, Body body) {
  std::lock_guard<std::mutex> lock(one_launch);
  const std::string name = std::string(kernel) + ": ";
  const uint64_t threads = static_cast<uint64_t>(size.x) * size.y * size.z;
  if (threads > kMaxThreads || size.z > 64) return refuse(cudaErrorInvalidConfiguration, name + "block too large");
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    return refuse(cudaErrorInvalidConfiguration, name + "grid too large");
  }
  const auto allowed = allowed_shared.find(function);
  if (shared_bytes > (allowed == allowed_shared.end() ? kDefaultShared : allowed->second)) {
    return refuse(cudaErrorInvalidValue, name + "more shared memory than allowed");
  }
  prepare_threads(size);
  block.body = body;
  blockDim = size, gridDim = grid;
  std::pair<void*, size_t> shared_statics{nullptr, 0};
  any_thread_local = 1;
  dl_iterate_phdr(find_thread_locals, &shared_statics);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t n = shuffled ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                static_cast<unsigned>(n / grid.x / grid.y)};
    if (shared_statics.first) std::memset(shared_statics.first, 0xff, shared_statics.second);
    run_block(shared_bytes);
    if (!failure.empty()) {
      const std::string where = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                                std::to_string(blockIdx.z) + "): ";
      refuse(cudaErrorLaunchFailure, name + where + failure);
      failure.clear();
      for (Thread* t : all_threads) new_stack(t->stack);  // those that wait are given up
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace d23_emulator

// Order of threads and blocks: 0 ascending, anything else random.
extern "C" __attribute__((visibility("default"))) int64_t d23_emulator_seed(int64_t seed, void*) {
  d23_emulator::shuffled = seed != 0;
  d23_emulator::random_order.seed(static_cast<uint64_t>(seed));
  return 0;
}

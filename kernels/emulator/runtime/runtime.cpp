// Runs a compiled kernel over a grid on the CPU. Each thread of a threadgroup is a fiber. Fibers
// switch only where threads wait for one another, and every wait is checked.

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

#include "fiber.h"
#include "simd.h"

namespace emu {

// In the order of emulator/signature.py.
enum Attribute {
  thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid,
  threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid,
  threadgroups_per_grid, thread_index_in_threadgroup, thread_index_in_simdgroup,
  simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup,
  thread_index_in_quadgroup, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup,
  dispatch_quadgroups_per_threadgroup, threads_per_simdgroup, grid_origin, attributes
};
struct Thread {
  uint32_t a[attributes][3];
};

// Mirrored by Job and Fault in emulator/runtime.py.
struct Job {
  void (*entry)(const Thread*);
  uint32_t grid[3], group[3];
  uint32_t second;    // the second order: from last to first, and all reads before any write
  uint32_t fibers;    // 0 when no thread ever waits
  uint32_t blocks;    // basic blocks counted; 0 for none
  uint32_t arrays;    // threadgroup arrays
  uint64_t* issued;   // per block: executions by a simdgroup (its busiest lane)
  uint64_t* executed; // per block: executions by threads
  char** array_base;
  uint64_t* array_bytes;
};
enum Code : uint32_t {
  ok, memory, misaligned, diverged, barrier, arithmetic, no_lane, spinning, stack,
  far_away, no_memory
};
enum State : uint32_t { ready, at_simd, at_barrier, done };
struct Fault {
  uint32_t code, write, place, lane, thread[3], threadgroup[3], lanes;
  uint64_t address;
  uint32_t state[max_threads], where[max_threads];
};

struct Fiber {
  Context context;
  Thread thread;
  uint32_t state, place, op, type, spins;
};

static Stacks stacks;
static Fiber fibers[max_threads];
static Slot slots[max_threads];
static Context scheduler;
static Fiber* current;
static Thread lone;
static Job* job;
static Fault* fault;
static sigjmp_buf escape;
static volatile sig_atomic_t running;
static uint32_t* lane_counters;
static size_t lane_counter_bytes;
static struct sigaction old_segv, old_bus, old_fpe;

extern "C" {
uint32_t* emu_counters;           // of the thread that runs
uint64_t emu_alignment_mask;      // 0 while buffers are placed at their ends
uint32_t emu_interleave;          // whether threads wait for one another before each write
uint64_t emu_arena, emu_arena_bytes;  // where all buffers and the pages around them are
int64_t emu_read_shadow, emu_write_shadow;
char* emu_buffers[64];
}

[[noreturn]] static void fail(uint32_t code) {
  fault->code = code;
  const Thread& t = current ? current->thread : lone;
  memcpy(fault->thread, t.a[thread_position_in_grid], 12);
  memcpy(fault->threadgroup, t.a[threadgroup_position_in_grid], 12);
  siglongjmp(escape, 1);
}

static void on_signal(int signal, siginfo_t* info, void* context) {
  if (!running) {
    struct sigaction* old = signal == SIGSEGV ? &old_segv : signal == SIGBUS ? &old_bus : &old_fpe;
    sigaction(signal, old, nullptr);
    return;
  }
  fault->address = (uint64_t)info->si_addr;
#if defined(__x86_64__) && defined(__linux__)
  ucontext_t* u = (ucontext_t*)context;
  fault->write = (u->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#else
  (void)context;
  fault->write = 2;
#endif
  if (signal == SIGFPE) fail(arithmetic);
  fail(stacks.overflowed((const char*)info->si_addr) ? stack : memory);
}

static void wait(uint32_t state, uint32_t place) {
  Fiber* self = current;
  self->state = state;
  self->place = place;
  change(&self->context, &scheduler);
}

static void fiber_main() {
  Fiber* self = current;
  job->entry(&self->thread);
  self->state = done;
  change(&self->context, &scheduler);
  __builtin_trap();
}

extern "C" {
uint64_t emu_simd(uint32_t op, uint32_t type, uint64_t value, uint64_t argument, uint32_t place) {
  Fiber* self = current;
  Slot* slot = &slots[self - fibers];
  self->op = op;
  self->type = type;
  slot->value = value;
  slot->argument = argument;
  wait(at_simd, place);
  return slot->result;
}
uint64_t emu_matrix_multiply(uint64_t a, uint64_t b, uint64_t c, uint32_t place) {
  Fiber* self = current;
  Slot* slot = &slots[self - fibers];
  self->op = op_matrix_multiply;
  slot->value = a;
  slot->argument = b;
  slot->third = c;
  wait(at_simd, place);
  return slot->result;
}
void emu_simdgroup_barrier(uint32_t, uint32_t place) {
  current->op = op_barrier;
  wait(at_simd, place);
}
void emu_threadgroup_barrier(uint32_t, uint32_t place) { wait(at_barrier, place); }
uint32_t emu_lane() {
  return (current ? current->thread : lone).a[thread_index_in_simdgroup][0];
}
// A thread that reads an atomic many times may be waiting for another thread. So let the others of
// its threadgroup run from time to time, and report an error if that does not help.
void emu_atomic_load(uint32_t place) {
  if (!current) return;
  if (++current->spins % 256 == 0) {
    if (current->spins > (1u << 20)) {
      fault->place = place;
      fail(spinning);
    }
    wait(ready, place);
  }
}
void emu_yield() { wait(ready, 0); }
void* emu_threadgroup(uint32_t id, uint64_t) { return job->array_base[id]; }
void* emu_device_buffer(uint32_t i) { return emu_buffers[i]; }
void* emu_constant_buffer(uint32_t i) { return emu_buffers[i]; }
[[noreturn]] void emu_misaligned(uint64_t address, uint32_t place) {
  fault->address = address;
  fault->place = place;
  fail(misaligned);
}
[[noreturn]] void emu_far_away(uint64_t address, uint32_t place) {
  fault->address = address;
  fault->place = place;
  fail(far_away);
}

float emu_rsqrt(float x) { return (float)(1.0 / __builtin_sqrt((double)x)); }
_Float16 emu_fma_half(_Float16 a, _Float16 b, _Float16 c) {
  return __truncdfhf2(fma((double)(float)a, (double)(float)b, (double)(float)c));
}
float emu_exp10(float x) { return (float)pow(10.0, (double)x); }
int emu_exponent(float x) {
  int e = 0;
  frexpf(x, &e);
  return e;
}
float emu_sinpi(float x) { return (float)sin(3.14159265358979323846 * fmod((double)x, 2.0)); }
float emu_cospi(float x) { return (float)cos(3.14159265358979323846 * fmod((double)x, 2.0)); }
float emu_tanpi(float x) { return (float)tan(3.14159265358979323846 * fmod((double)x, 2.0)); }
}

static void report_group(uint32_t code, int first, int count) {
  fault->lanes = (uint32_t)count;
  fault->lane = (uint32_t)first;
  for (int i = 0; i < count; i++) {
    fault->state[i] = fibers[first + i].state;
    fault->where[i] = fibers[first + i].place;
  }
  current = &fibers[first];
  fail(code);
}

static void resume(int i, uint32_t blocks) {
  current = &fibers[i];
  if (blocks) emu_counters = lane_counters + (size_t)i * blocks;
  change(&scheduler, &current->context);
}

// Runs the lanes of a simdgroup until each has returned, waits at a threadgroup barrier, or wants
// other simdgroups to go on.
static void run_simdgroup(int first, int lanes) {
  for (;;) {
    for (int k = 0; k < lanes; k++) {
      int i = first + (job->second ? lanes - 1 - k : k);
      if (fibers[i].state == ready) resume(i, job->blocks);
    }
    int simd = 0, yielding = 0;
    for (int i = first; i < first + lanes; i++) {
      simd += fibers[i].state == at_simd;
      yielding += fibers[i].state == ready;
    }
    if (yielding || simd == 0) return;  // the other simdgroups come first
    Fiber& head = fibers[first];
    for (int i = first; i < first + lanes; i++) {
      if (fibers[i].state != at_simd || fibers[i].place != head.place) {
        report_group(diverged, first, lanes);
      }
    }
    if (head.op == op_matrix_multiply) {
      if (lanes != 32) report_group(diverged, first, lanes);
      matrix_multiply(&slots[first]);
    } else if (head.op != op_barrier) {
      int bad = across(head.op, head.type, &slots[first], lanes);
      if (bad >= 0) {
        current = &fibers[first + bad];
        fault->lane = (uint32_t)bad;
        fault->lanes = (uint32_t)lanes;
        fault->place = head.place;
        fail(no_lane);
      }
    }
    for (int i = first; i < first + lanes; i++) fibers[i].state = ready;
  }
}

static void run_with_fibers(int n) {
  int groups = (n + 31) / 32;
  for (int i = 0; i < n; i++) {
    fibers[i].state = ready;
    fibers[i].spins = 0;
    prepare(&fibers[i].context, stacks.low(i), fiber_main);
  }
  for (;;) {
    for (int k = 0; k < groups; k++) {
      int g = job->second ? groups - 1 - k : k;
      run_simdgroup(g * 32, n - g * 32 < 32 ? n - g * 32 : 32);
    }
    int waiting = 0, finished = 0, yielding = 0;
    bool same = true;
    for (int i = 0; i < n; i++) {
      waiting += fibers[i].state == at_barrier;
      finished += fibers[i].state == done;
      yielding += fibers[i].state == ready;
      same = same && fibers[i].place == fibers[0].place;
    }
    if (finished == n) return;
    if (yielding) continue;
    if (waiting != n || !same) report_group(barrier, 0, n);
    for (int i = 0; i < n; i++) fibers[i].state = ready;
  }
}

static void count_group(int n) {
  uint32_t blocks = job->blocks;
  for (int first = 0; first < n; first += 32) {
    int last = first + 32 < n ? first + 32 : n;
    for (uint32_t b = 0; b < blocks; b++) {
      uint32_t most = 0;
      for (int i = first; i < last; i++) {
        uint32_t c = lane_counters[(size_t)i * blocks + b];
        job->executed[b] += c;
        most = c > most ? c : most;
      }
      job->issued[b] += most;
    }
  }
  memset(lane_counters, 0, (size_t)n * blocks * 4);
}

static void describe(Thread& t, const uint32_t* origin, const uint32_t* size, const uint32_t* groups,
                     const uint32_t* at, int index, int n) {
  uint32_t x = (uint32_t)index % size[0], y = (uint32_t)index / size[0] % size[1],
           z = (uint32_t)index / (size[0] * size[1]);
  uint32_t in[3] = {x, y, z};
  uint32_t full = job->group[0] * job->group[1] * job->group[2];
  memset(&t, 0, sizeof t);
  for (int d = 0; d < 3; d++) {
    t.a[thread_position_in_grid][d] = origin[d] + in[d];
    t.a[thread_position_in_threadgroup][d] = in[d];
    t.a[threadgroup_position_in_grid][d] = at[d];
    t.a[threads_per_threadgroup][d] = size[d];
    t.a[dispatch_threads_per_threadgroup][d] = job->group[d];
    t.a[threads_per_grid][d] = job->grid[d];
    t.a[threadgroups_per_grid][d] = groups[d];
  }
  t.a[thread_index_in_threadgroup][0] = (uint32_t)index;
  t.a[thread_index_in_simdgroup][0] = (uint32_t)index % 32;
  t.a[simdgroup_index_in_threadgroup][0] = (uint32_t)index / 32;
  t.a[simdgroups_per_threadgroup][0] = ((uint32_t)n + 31) / 32;
  t.a[dispatch_simdgroups_per_threadgroup][0] = (full + 31) / 32;
  t.a[thread_index_in_quadgroup][0] = (uint32_t)index % 4;
  t.a[quadgroup_index_in_threadgroup][0] = (uint32_t)index / 4;
  t.a[quadgroups_per_threadgroup][0] = ((uint32_t)n + 3) / 4;
  t.a[dispatch_quadgroups_per_threadgroup][0] = (full + 3) / 4;
  t.a[threads_per_simdgroup][0] = 32;
}

static void run_threadgroup(const uint32_t* groups, const uint32_t* at) {
  uint32_t origin[3], size[3];
  for (int d = 0; d < 3; d++) {
    origin[d] = at[d] * job->group[d];
    uint32_t left = job->grid[d] - origin[d];
    size[d] = left < job->group[d] ? left : job->group[d];
  }
  int n = (int)(size[0] * size[1] * size[2]);
  for (uint32_t i = 0; i < job->arrays; i++) memset(job->array_base[i], 0xFF, job->array_bytes[i]);
  if (job->fibers || emu_interleave) {
    for (int i = 0; i < n; i++) describe(fibers[i].thread, origin, size, groups, at, i, n);
    run_with_fibers(n);
  } else {
    current = nullptr;
    for (int k = 0; k < n; k++) {
      int i = job->second ? n - 1 - k : k;
      describe(lone, origin, size, groups, at, i, n);
      if (job->blocks) emu_counters = lane_counters + (size_t)i * job->blocks;
      job->entry(&lone);
    }
  }
  if (job->blocks) count_group(n);
}

static void run_grid() {
  uint32_t groups[3];
  for (int d = 0; d < 3; d++) groups[d] = (job->grid[d] + job->group[d] - 1) / job->group[d];
  uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2];
  for (uint64_t k = 0; k < total; k++) {
    uint64_t g = job->second ? total - 1 - k : k;
    uint32_t at[3] = {(uint32_t)(g % groups[0]), (uint32_t)(g / groups[0] % groups[1]),
                      (uint32_t)(g / groups[0] / groups[1])};
    run_threadgroup(groups, at);
  }
}

extern "C" uint32_t emu_run(Job* the_job, Fault* the_fault) {
  job = the_job;
  fault = the_fault;
  memset(fault, 0, sizeof *fault);
  current = nullptr;
  if (!stacks.reserve()) return fault->code = no_memory;
  size_t need = (size_t)job->blocks * max_threads * 4;
  if (need > lane_counter_bytes) {
    if (lane_counters) munmap(lane_counters, lane_counter_bytes);
    void* p = mmap(nullptr, need, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    lane_counters = p == MAP_FAILED ? nullptr : (uint32_t*)p;
    lane_counter_bytes = lane_counters ? need : 0;
    if (!lane_counters) return fault->code = no_memory;
  }
  if (need) memset(lane_counters, 0, need);

  static char signal_stack[64 * 1024];
  stack_t alternate = {}, old_stack;
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  sigaction(SIGFPE, &action, &old_fpe);
  emu_interleave = job->second;
  running = 1;
  if (sigsetjmp(escape, 1) == 0) run_grid();
  running = 0;
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaction(SIGFPE, &old_fpe, nullptr);
  sigaltstack(&old_stack, nullptr);
  current = nullptr;
  return fault->code;
}

}  // namespace emu

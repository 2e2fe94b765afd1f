// A stack of its own for each thread of a threadgroup, and the switch between them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(__aarch64__) || defined(EMU_UCONTEXT)
#define EMU_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t stack_bytes = 256 * 1024;
constexpr int max_threads = 1024;

struct Stacks {
  char* base = nullptr;
  size_t page = 0;
  size_t stride = 0;

  // Reserves every stack once, with a page below each that faults on overflow.
  bool reserve() {
    if (base) return true;
    page = (size_t)sysconf(_SC_PAGESIZE);
    stride = stack_bytes + page;
    void* p = mmap(nullptr, stride * max_threads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return false;
    base = (char*)p;
    for (int i = 0; i < max_threads; i++) mprotect(base + stride * i, page, PROT_NONE);
    return true;
  }
  char* low(int i) const { return base + stride * i + page; }
  bool overflowed(const char* address) const {
    return base && address >= base && address < base + stride * max_threads;
  }
};

#ifdef EMU_USE_UCONTEXT

struct Context {
  ucontext_t c;
};
inline void prepare(Context* to, char* low, void (*start)()) {
  getcontext(&to->c);
  to->c.uc_stack.ss_sp = low;
  to->c.uc_stack.ss_size = stack_bytes;
  to->c.uc_link = nullptr;
  makecontext(&to->c, start, 0);
}
inline void change(Context* from, Context* to) { swapcontext(&from->c, &to->c); }

#else

struct Context {
  void* sp;
};

// Keeps what the calling convention says a callee keeps, then continues on the other stack.
extern "C" void emu_change(void** from, void* to);
#if defined(__APPLE__)
#define EMU_SYMBOL "_emu_change"
#else
#define EMU_SYMBOL "emu_change"
#endif
#if defined(__x86_64__)
__asm__(".text\n.globl " EMU_SYMBOL "\n" EMU_SYMBOL ":\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
constexpr int saved_words = 6;
#else
__asm__(".text\n.globl " EMU_SYMBOL "\n.p2align 2\n" EMU_SYMBOL ":\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
        "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
        "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
        "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
        "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n");
#endif

inline void prepare(Context* to, char* low, void (*start)()) {
  uintptr_t top = ((uintptr_t)low + stack_bytes) & ~(uintptr_t)15;
#if defined(__x86_64__)
  void** sp = (void**)top;
  *--sp = nullptr;  // where a return address would be: keeps the alignment of a call
  *--sp = (void*)start;
  for (int i = 0; i < saved_words; i++) *--sp = nullptr;
  to->sp = sp;
#else
  void** sp = (void**)(top - 160);
  for (int i = 0; i < 20; i++) sp[i] = nullptr;
  sp[11] = (void*)start;  // x30: where ret goes
  to->sp = sp;
#endif
}
inline void change(Context* from, Context* to) { emu_change(&from->sp, to->sp); }

#endif

}  // namespace emu

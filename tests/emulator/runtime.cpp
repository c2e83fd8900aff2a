// Runs one launch: fibers for the threads of a block, one block after another.
#include "emu.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef EMU_SANITIZE
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_WATCH
#include "watch.h"
#endif

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

// ---------------------------------------------------------------- switching between fibers

#if defined(__x86_64__)
using Context = void*;
extern "C" void emu_switch(Context* save, Context load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
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
.size emu_switch, .-emu_switch
)");
static void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // entry finds its stack as after a call: 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context = top;
}
static void jump(Context& save, Context& load) { emu_switch(&save, load); }
#else
using Context = ucontext_t;
static void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
static void jump(Context& save, Context& load) { swapcontext(&save, &load); }
#endif

// ---------------------------------------------------------------- state

namespace {

constexpr unsigned max_threads = 1024;
constexpr std::size_t arena_bytes = 256 << 10;    // dynamic shared memory, at most
constexpr std::size_t static_shared_limit = 48 << 10;
constexpr std::size_t parameter_limit = 4096;
#ifdef EMU_SANITIZE
constexpr std::size_t stack_bytes = 512 << 10;
#else
constexpr std::size_t stack_bytes = 256 << 10;
#endif

enum class State : unsigned char { ready, at_barrier, in_collective, done };

struct Copy {
    char* to;
    const char* from;
    unsigned bytes, source_bytes;
    std::uint32_t pc;
};

struct Thread {
    Context context;
    uint3 index;
    unsigned number;
    State state;
    unsigned mask;  // of the collective it waits for
    const char *what, *file;
    int line;
    unsigned rank;  // its place in the order in which threads run
    std::vector<Copy> copies;
    std::vector<std::size_t> groups;  // per committed cp.async group, where it ends in `copies`
    void* fake_stack;
};

struct Collective {
    unsigned mask, arrived;
    emu::Complete complete;
    bool aligned, orders_memory;
    const char* what;
    void* lanes[32];
};

struct Warp {
    unsigned present, exited;
    std::vector<Collective> pending;
};

// Dynamic shared memory, between two stretches that nobody may touch.
alignas(1024) char arena_space[arena_bytes + 2048];
char* const arena = arena_space + 1024;
alignas(16) char parameter_space[parameter_limit + 64 * 16];

const EmuLaunch* launch;
const emu::Entry* entry;
EmuResult* result;
Thread* threads;
Warp* warps;
unsigned thread_count, warp_count, live;
Thread* current;
uint3 block;
std::uint64_t block_serial;  // never repeats, across launches too
std::uint64_t tick;
emu::SharedVariable* shared_variables;  // those the current block has seen
std::size_t static_shared;
char* stacks;
Context main_context;
sigjmp_buf main_jump;
bool in_launch;
pthread_t launch_thread;
std::uint64_t random_state;

unsigned* queue;  // ring of threads that can run
unsigned queue_head, queue_size;
std::vector<unsigned> order;  // threads by rank

struct Barrier {
    unsigned waiting;
    int count, all, any;
    emu::BarrierResult result;
} block_barrier;

std::uint64_t random_below(std::uint64_t bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % bound;
}

void push(unsigned thread) {
    unsigned place = queue_head + queue_size++;
    queue[place >= max_threads ? place - max_threads : place] = thread;
}

unsigned pop() {
    unsigned thread = queue[queue_head++];
    if (queue_head == max_threads) queue_head = 0;
    --queue_size;
    return thread;
}

void order_threads() {
    order.resize(thread_count);
    for (unsigned i = 0; i < thread_count; ++i) order[i] = i;
    switch (launch->thread_order) {
        case 1: std::reverse(order.begin(), order.end()); break;
        case 2:
            for (unsigned i = thread_count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
            break;
        case 3: {
            unsigned next = 0;
            for (unsigned lane = 0; lane < 32; ++lane)
                for (unsigned thread = lane; thread < thread_count; thread += 32) order[next++] = thread;
            break;
        }
        default: break;
    }
    for (unsigned i = 0; i < thread_count; ++i) threads[order[i]].rank = i;
}

// ---------------------------------------------------------------- diagnosis

std::string thread_list(const std::vector<unsigned>& numbers) {
    std::string text;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t j = i;
        while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
        if (!text.empty()) text += ", ";
        text += std::to_string(numbers[i]);
        if (j > i) text += (j > i + 1 ? "-" : ", ") + std::to_string(numbers[j]);
        i = j + 1;
    }
    return (numbers.size() == 1 ? "thread " : "threads ") + text;
}

std::string where_threads_are() {
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    for (unsigned i = 0; i < thread_count; ++i) {
        const Thread& t = threads[i];
        std::string text;
        char mask[32] = "";
        switch (t.state) {
            case State::done: text = "exited"; break;
            case State::ready: text = "can run"; break;
            case State::in_collective: std::snprintf(mask, sizeof mask, "(mask 0x%08x)", t.mask); [[fallthrough]];
            case State::at_barrier:
                text = std::string("at ") + t.what + mask + " (" + t.file + ":" + std::to_string(t.line) + ")";
        }
        auto found = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first == text; });
        if (found == groups.end()) groups.push_back({text, {i}});
        else found->second.push_back(i);
    }
    std::string text;
    for (auto& [what, numbers] : groups) text += "\n  " + thread_list(numbers) + ": " + what;
    return text;
}

void set_message(const char* text) {
    if (result->message[0]) return;
    if (current)
        std::snprintf(result->message, sizeof result->message,
                      "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s", entry->name, block.x,
                      block.y, block.z, current->index.x, current->index.y, current->index.z, text);
    else
        std::snprintf(result->message, sizeof result->message, "kernel %s, block (%u, %u, %u): %s",
                      entry->name, block.x, block.y, block.z, text);
}

void enter_fiber([[maybe_unused]] Thread* thread) {
#ifdef EMU_WATCH
    emu::watch::begin_thread(thread->number);
#endif
}

[[noreturn]] void abandon_launch() {
#ifdef EMU_SANITIZE
    __asan_unpoison_memory_region(stacks, max_threads * stack_bytes);
#endif
    siglongjmp(main_jump, 1);
}

// A crash of the kernel is the kernel's error, not the end of the process.
void on_signal(int signal, siginfo_t* info, void* context) {
    if (!in_launch) return;
    if (!pthread_equal(pthread_self(), launch_thread)) {
        pthread_kill(launch_thread, signal);
        return;
    }
    char text[256];
    if (signal == SIGVTALRM) {
        std::snprintf(text, sizeof text,
                      "ran longer than %.0f s: an endless loop, or a wait for a thread that only runs later",
                      launch->time_limit);
    } else {
        std::uintptr_t pc = 0;
#if defined(__x86_64__)
        pc = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
#endif
        (void)context;
        auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
        const auto in_stacks = address - reinterpret_cast<std::uintptr_t>(stacks);
        const char* what = in_stacks < max_threads * stack_bytes ? "a thread's stack is full"
                           : signal == SIGFPE ? "integer division by zero or overflow"
                           : signal == SIGILL || signal == SIGTRAP ? "an illegal instruction"
                                                                   : "access to unmapped memory";
        std::snprintf(text, sizeof text, "%s at address %p @pc=0x%lx", what, reinterpret_cast<void*>(address),
                      static_cast<unsigned long>(pc - reinterpret_cast<std::uintptr_t>(__ehdr_start)));
    }
    set_message(text);
    siglongjmp(main_jump, 1);
}

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};
constexpr int signal_count = sizeof signals / sizeof *signals;

struct SignalGuard {
    struct sigaction old_actions[signal_count];
    stack_t old_stack;
    itimerval old_timer;
    static constexpr std::size_t bytes = 64 << 10;
    static char alternate[bytes];

    SignalGuard() {
        stack_t mine{};
        mine.ss_sp = alternate;
        mine.ss_size = bytes;
        sigaltstack(&mine, &old_stack);
        struct sigaction action {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        for (int i = 0; i < signal_count; ++i) {
#ifdef EMU_SANITIZE
            if (signals[i] != SIGVTALRM) continue;  // the sanitizer's own report says more
#endif
            sigaction(signals[i], &action, &old_actions[i]);
        }
        itimerval timer{};
        timer.it_value.tv_sec = static_cast<time_t>(launch->time_limit);
        timer.it_value.tv_usec = static_cast<suseconds_t>((launch->time_limit - timer.it_value.tv_sec) * 1e6);
        setitimer(ITIMER_VIRTUAL, &timer, &old_timer);
    }
    ~SignalGuard() {
        setitimer(ITIMER_VIRTUAL, &old_timer, nullptr);
        for (int i = 0; i < signal_count; ++i) {
#ifdef EMU_SANITIZE
            if (signals[i] != SIGVTALRM) continue;
#endif
            sigaction(signals[i], &old_actions[i], nullptr);
        }
        sigaltstack(&old_stack, nullptr);
    }
};
char SignalGuard::alternate[SignalGuard::bytes];

// ---------------------------------------------------------------- scheduling

#ifdef EMU_SANITIZE
const void* main_bottom;
std::size_t main_bytes;
#endif

void leave_for(Thread* from, Thread* to, bool from_ends) {
    current = to;
#ifdef EMU_SANITIZE
    char* stack = to ? stacks + to->number * stack_bytes : nullptr;
    static void* main_fake;
    void** fake = from_ends ? nullptr : from ? &from->fake_stack : &main_fake;
    __sanitizer_start_switch_fiber(fake, to ? stack : main_bottom, to ? stack_bytes : main_bytes);
#endif
    (void)from_ends;
    jump(from ? from->context : main_context, to ? to->context : main_context);
#ifdef EMU_SANITIZE
    const void* bottom;
    std::size_t bytes;
    __sanitizer_finish_switch_fiber(from ? from->fake_stack : main_fake, &bottom, &bytes);
    if (!from) return;
#endif
    if (from) enter_fiber(from);
}

// The current thread cannot go on; whoever can, does.
void run_next(Thread* from, bool from_ends = false) {
    Thread* to = queue_size ? &threads[pop()] : nullptr;
    if (to == from) {
        current = to;
        return;
    }
    leave_for(from, to, from_ends);
}

void check_barrier() {
    if (!block_barrier.waiting || block_barrier.waiting < live) return;
    const Thread* first = nullptr;
    for (unsigned i = 0; i < thread_count; ++i) {
        const Thread& t = threads[i];
        if (t.state != State::at_barrier) continue;
        if (!first) first = &t;
        if (t.line != first->line || t.what != first->what || std::strcmp(t.file, first->file))
            emu::fail("barrier in divergent code: the block's threads meet at different barriers:%s",
                      where_threads_are().c_str());
    }
    block_barrier.result = {block_barrier.count, block_barrier.all, block_barrier.any};
    block_barrier.waiting = 0;
    block_barrier.count = block_barrier.any = 0;
    block_barrier.all = 1;
#ifdef EMU_WATCH
    emu::watch::begin_epoch();
#endif
    if (launch->thread_order == 2) order_threads();
    for (unsigned thread : order) {
        Thread& t = threads[thread];
        if (t.state != State::at_barrier) continue;
        t.state = State::ready;
        push(thread);
    }
}

void check_collectives(unsigned warp_number) {
    Warp& warp = warps[warp_number];
    for (std::size_t i = 0; i < warp.pending.size(); ++i) {
        const Collective c = warp.pending[i];
        const unsigned needed = c.mask & warp.present & ~warp.exited;
        if (c.arrived != needed) continue;
        if (c.aligned && c.arrived != 0xffffffffu)
            emu::fail("%s needs all 32 lanes of a warp, here some do not exist or have exited:%s", c.what,
                      where_threads_are().c_str());
        warp.pending.erase(warp.pending.begin() + static_cast<std::ptrdiff_t>(i));
        c.complete(c.lanes, c.arrived);
#ifdef EMU_WATCH
        if (c.orders_memory) emu::watch::sync_warp(warp_number, c.arrived);
#endif
        unsigned lanes[32], count = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (c.arrived >> lane & 1) lanes[count++] = warp_number * 32 + lane;
        std::sort(lanes, lanes + count, [](unsigned a, unsigned b) { return threads[a].rank < threads[b].rank; });
        for (unsigned k = 0; k < count; ++k) {
            threads[lanes[k]].state = State::ready;
            push(lanes[k]);
        }
        return;  // a lane waits in one collective at a time, so at most one can complete
    }
}

void run_thread() {
#ifdef EMU_SANITIZE
    const void* bottom;
    std::size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!main_bottom) {  // the first fiber of all comes from the main stack
        main_bottom = bottom;
        main_bytes = bytes;
    }
#endif
    enter_fiber(current);
    void* arguments[256];
    std::size_t at = 0;
    for (int i = 0; i < entry->parameter_count; ++i) {
        arguments[i] = parameter_space + at;
        at += (static_cast<std::size_t>(entry->parameters[i].bytes) + 15) / 16 * 16;
    }
    entry->call(arguments);
    Thread* self = current;
    self->state = State::done;
    ++result->threads_run;
    --live;
    warps[self->number / 32].exited |= 1u << self->number % 32;
    check_barrier();
    check_collectives(self->number / 32);
    run_next(self, true);
    std::abort();
}

void run_block(std::uint64_t number) {
    const std::uint64_t gx = launch->grid[0], gy = launch->grid[1];
    block = {static_cast<unsigned>(number % gx), static_cast<unsigned>(number / gx % gy),
             static_cast<unsigned>(number / gx / gy)};
    ++block_serial;
    shared_variables = nullptr;
    static_shared = 0;
    std::memset(arena, 0xff, launch->shared_bytes);
    block_barrier = {0, 0, 1, 0, {}};
    queue_head = queue_size = 0;
    live = thread_count;
#ifdef EMU_WATCH
    emu::watch::begin_block(static_cast<std::uint32_t>(number), thread_count);
#endif
    for (unsigned w = 0; w < warp_count; ++w) {
        const unsigned lanes = std::min(32u, thread_count - w * 32);
        warps[w].present = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warps[w].exited = 0;
        warps[w].pending.clear();
    }
    if (launch->thread_order == 2) order_threads();
    const unsigned bx = launch->block[0], by = launch->block[1];
    for (unsigned thread : order) {
        Thread& t = threads[thread];
        t.number = thread;
        t.index = {thread % bx, thread / bx % by, thread / bx / by};
        t.state = State::ready;
        t.copies.clear();
        t.groups.clear();
        t.fake_stack = nullptr;
        prepare(t.context, stacks + thread * stack_bytes, stack_bytes, run_thread);
        push(thread);
    }
    run_next(nullptr);
    current = nullptr;
    if (live) emu::fail("deadlock: no thread can go on:%s", where_threads_are().c_str());
    result->static_shared_bytes = std::max<std::uint64_t>(result->static_shared_bytes, static_shared);
#ifdef EMU_WATCH
    emu::watch::end_block();
#endif
    ++result->blocks_run;
}

}  // namespace

// ---------------------------------------------------------------- what the shim calls

namespace emu {

uint3 thread_idx() noexcept { return current->index; }
uint3 block_idx() noexcept { return block; }
dim3 block_dim() noexcept { return {launch->block[0], launch->block[1], launch->block[2]}; }
dim3 grid_dim() noexcept { return {launch->grid[0], launch->grid[1], launch->grid[2]}; }

void fail(const char* format, ...) {
    static char text[sizeof result->message - 256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    set_message(text);
    abandon_launch();
}

static void check_shared_limits(const char* name) {
    if (static_shared > static_shared_limit)
        fail("%zu bytes of static shared memory (with `%s`), 48 KiB is the limit", static_shared, name);
    if (static_shared + launch->shared_bytes > launch->max_shared_bytes)
        fail("%zu bytes of static and %llu of dynamic shared memory, a block can have %llu", static_shared,
             static_cast<unsigned long long>(launch->shared_bytes),
             static_cast<unsigned long long>(launch->max_shared_bytes));
}

void touch_shared(SharedVariable* variable) {
    if (variable->block == block_serial) return;
    variable->block = block_serial;
    variable->next = shared_variables;
    shared_variables = variable;
    std::memset(variable->address, 0xff, variable->bytes);
    static_shared += variable->bytes;
    check_shared_limits(variable->name);
#ifdef EMU_WATCH
    watch::add_shared(reinterpret_cast<std::uintptr_t>(variable->address), variable->bytes, variable->granule,
                      variable->name);
#endif
}

void* dynamic_shared([[maybe_unused]] unsigned granule, [[maybe_unused]] const char* name) {
#ifdef EMU_WATCH
    watch::add_shared(reinterpret_cast<std::uintptr_t>(arena), launch->shared_bytes, granule, name);
#endif
    return arena;
}

BarrierResult barrier(int predicate, const char* name, const char* file, int line) {
    Thread* self = current;
    self->state = State::at_barrier;
    self->what = name;
    self->file = file;
    self->line = line;
    ++block_barrier.waiting;
    block_barrier.count += predicate != 0;
    block_barrier.all &= predicate != 0;
    block_barrier.any |= predicate != 0;
    check_barrier();
    run_next(self);
    return block_barrier.result;
}

void collective(unsigned mask, Complete complete, void* data, bool aligned, bool orders_memory,
                const char* name, const char* file, int line) {
    Thread* self = current;
    const unsigned warp_number = self->number / 32, lane = self->number % 32;
    if (!(mask >> lane & 1))
        fail("%s with mask 0x%08x by lane %u, which is not in the mask (%s:%d)", name, mask, lane, file, line);
    self->state = State::in_collective;
    self->mask = mask;
    self->what = name;
    self->file = file;
    self->line = line;
    Warp& warp = warps[warp_number];
    auto found = std::find_if(warp.pending.begin(), warp.pending.end(),
                              [&](const Collective& c) { return c.mask == mask; });
    if (found == warp.pending.end()) {
        warp.pending.push_back({mask, 0, complete, aligned, orders_memory, name, {}});
        found = warp.pending.end() - 1;
    } else if (found->complete != complete || found->what != name) {
        fail("the lanes of a warp meet in different collectives:%s", where_threads_are().c_str());
    }
    found->arrived |= 1u << lane;
    found->lanes[lane] = data;
    check_collectives(warp_number);
    run_next(self);
}

unsigned active_mask() {
    // Fibers run one at a time: only the caller is certainly there. Code that relies on more
    // is wrong on the hardware as well.
    return 1u << current->number % 32;
}

unsigned lane_id() { return current->number % 32; }

void yield() {
    push(current->number);
    run_next(current);
}

void fence() {
#ifdef EMU_WATCH
    watch::fence();
#endif
}

std::uint64_t clock() { return ++tick; }

void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
    std::uint32_t pc = 0;
#ifdef EMU_WATCH
    pc = watch::offset_of(__builtin_return_address(0));
#endif
    current->copies.push_back(
        {static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes, pc});
}

void async_commit() { current->groups.push_back(current->copies.size()); }

void async_wait(unsigned groups_in_flight) {
    Thread& t = *current;
    if (t.groups.size() <= groups_in_flight) return;
    const std::size_t finished = t.groups.size() - groups_in_flight, end = t.groups[finished - 1];
    for (std::size_t i = 0; i < end; ++i) {
        const Copy& c = t.copies[i];
        std::memcpy(c.to, c.from, c.source_bytes);
        std::memset(c.to + c.source_bytes, 0, c.bytes - c.source_bytes);
#ifdef EMU_WATCH
        watch::deliver(reinterpret_cast<std::uintptr_t>(c.to), c.bytes, c.pc);
#endif
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(end));
    t.groups.erase(t.groups.begin(), t.groups.begin() + static_cast<std::ptrdiff_t>(finished));
    for (auto& group : t.groups) group -= end;
}

}  // namespace emu

// ---------------------------------------------------------------- what Python calls

extern "C" {

__attribute__((visibility("default"))) const emu::Entry* emu_entry(int index) {
    return index < emu_entry_count ? &emu_entries[index] : nullptr;
}

// For the sanitizers' death callback.
__attribute__((visibility("default"))) void emu_describe_position(char* text, std::size_t bytes) {
    if (in_launch && current)
        std::snprintf(text, bytes, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", entry->name, block.x,
                      block.y, block.z, current->index.x, current->index.y, current->index.z);
    else
        std::snprintf(text, bytes, "outside of a kernel");
}

__attribute__((visibility("default"))) void* emu_make_stacks() {
    void* memory = mmap(nullptr, max_threads * stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    for (unsigned i = 0; i < max_threads; ++i)  // an overflow must not run into the next stack
        mprotect(static_cast<char*>(memory) + i * stack_bytes, 4096, PROT_NONE);
    return memory;
}

__attribute__((visibility("default"))) int emu_launch(const EmuLaunch* given, EmuResult* answer) {
    launch = given;
    entry = &emu_entries[launch->entry];
    result = answer;
    *result = {};
    current = nullptr;
    block = {};
    if (launch->argument_bytes > sizeof parameter_space || launch->shared_bytes > arena_bytes) {
        set_message("too many arguments or too much shared memory");
        return 1;
    }
    stacks = static_cast<char*>(launch->stacks);
    if (!threads) {
        threads = new Thread[max_threads]();
        warps = new Warp[max_threads / 32]();
        queue = new unsigned[max_threads];
    }
    std::memcpy(parameter_space, launch->arguments, launch->argument_bytes);
    thread_count = launch->block[0] * launch->block[1] * launch->block[2];
    warp_count = (thread_count + 31) / 32;
    random_state = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    if (!random_state) random_state = 1;
    order_threads();
    const std::uint64_t blocks = std::uint64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    std::vector<std::uint64_t> shuffled;
    if (launch->block_order == 1) {
        shuffled.resize(blocks);
        for (std::uint64_t i = 0; i < blocks; ++i) shuffled[i] = i;
        for (std::uint64_t i = blocks; i > 1; --i) std::swap(shuffled[i - 1], shuffled[random_below(i)]);
    }
#ifdef EMU_SANITIZE
    __asan_poison_memory_region(arena_space, sizeof arena_space);
    __asan_unpoison_memory_region(arena, launch->shared_bytes);
#endif
#ifdef EMU_WATCH
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    emu::watch::begin_launch(*launch, {address(stacks), address(stacks) + max_threads * stack_bytes},
                             {address(__ehdr_start), address(_end)},
                             {address(arena_space), address(arena_space) + sizeof arena_space});
#endif
    launch_thread = pthread_self();
    {
        SignalGuard guard;
        in_launch = true;
        if (!sigsetjmp(main_jump, 1))
            for (std::uint64_t i = 0; i < blocks; ++i) run_block(shuffled.empty() ? i : shuffled[i]);
        in_launch = false;
    }
    current = nullptr;
#ifdef EMU_WATCH
    emu::watch::end_launch();
#endif
    return result->message[0] != 0;
}

}  // extern "C"

// What the shim (compiled with every kernel) and the runtime (compiled once) say to each other.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

// One thread's index never changes while its fiber lives, barriers included: hence const.
__attribute__((const)) uint3 thread_idx() noexcept;
__attribute__((const)) uint3 block_idx() noexcept;
__attribute__((const)) dim3 block_dim() noexcept;
__attribute__((const)) dim3 grid_dim() noexcept;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- shared memory ----
struct SharedVariable {
    void* address;
    std::size_t bytes;
    unsigned granule;  // smallest unit that two threads may own separately
    const char* name;
    std::uint64_t block;  // serial number of the block that last saw it
    SharedVariable* next;
};
// Poisons the variable when a block reaches its declaration for the first time.
void touch_shared(SharedVariable* variable);
void* dynamic_shared(unsigned granule, const char* name);

// ---- barriers and warp collectives ----
struct BarrierResult {
    int count, all, any;
};
BarrierResult barrier(int predicate, const char* name, const char* file, int line);

// `complete` runs once, in the last lane to arrive: lanes[i] is lane i's `data`, null for a lane
// that has exited. `aligned`: every lane of the warp has to be there (the .aligned of PTX).
using Complete = void (*)(void* const lanes[32], unsigned arrived);
void collective(unsigned mask, Complete complete, void* data, bool aligned, bool orders_memory,
                const char* name, const char* file, int line);
unsigned active_mask();
unsigned lane_id();
void yield();
void fence();
std::uint64_t clock();

// ---- cp.async: the bytes arrive at the wait, not before ----
void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes);
void async_commit();
void async_wait(unsigned groups_in_flight);

// ---- watch mode ----
void atomic_access(const void* address, unsigned bytes, void* pc);

// ---- the kernel as seen by the runtime ----
enum class ParameterKind : int { pointer = 0, integer = 1, floating = 2, object = 3, boolean = 4 };
struct Parameter {
    int bytes;
    ParameterKind kind;
};
struct Entry {
    const char* name;
    void (*call)(void* const* arguments);
    const Parameter* parameters;
    int parameter_count;
    int launch_bound;  // __launch_bounds__, 0 where there is none
};

}  // namespace emu

// Defined behind the kernels' source, by what build.py appends to it.
extern "C" const emu::Entry emu_entries[];
extern "C" const int emu_entry_count;

// ---- what Python passes in and gets back; mirrored in device.py ----
extern "C" {

struct EmuExtent {
    std::uint64_t begin, end;  // bytes an argument may touch
    std::uint64_t origin;      // where a GPU's allocation would begin, for the sectors
    std::int32_t granule;
    std::int32_t writable;
    std::int32_t argument;  // position of the (first) argument it belongs to
    std::int32_t reserved;
};

struct EmuLaunch {
    std::uint32_t grid[3], block[3];
    std::uint64_t shared_bytes;
    std::uint64_t max_shared_bytes;
    std::uint64_t seed;
    std::int32_t thread_order;  // 0 ascending, 1 descending, 2 random, 3 warps interleaved
    std::int32_t block_order;   // 0 ascending, 1 shuffled
    std::int32_t entry;         // which of emu_entries
    std::int32_t reserved;
    double time_limit;          // seconds of processor time, 0: none
    const void* arguments;      // the values, one after another, each at a multiple of 16 bytes
    std::uint64_t argument_bytes;
    const EmuExtent* extents;  // sorted by begin, disjoint
    std::int64_t extent_count;
    void* stacks;  // from emu_make_stacks, of any library: each would be too many mappings
};

struct EmuResult {
    std::uint64_t blocks_run, threads_run;
    std::uint64_t static_shared_bytes;
    char message[8192];  // empty: all went well
};

// One row per (instruction, kind of access).
struct EmuSite {
    std::uint64_t pc;
    std::int32_t shared, write, bytes, atomic;
    std::uint64_t requests, lanes;  // requests: per warp
    std::uint64_t wavefronts, ideal_wavefronts;
    std::uint64_t sectors, ideal_sectors;
    std::uint64_t uninitialised;  // reads of shared memory that nobody wrote
};

struct EmuRace {
    std::uint64_t first_pc, second_pc;
    std::uint32_t first_thread, second_thread;
    std::uint32_t first_block, second_block;
    std::int32_t first_write, second_write;
    std::int32_t shared, argument;
    std::uint64_t offset;
    char variable[64];
    std::uint64_t count;
};
}

// Sees every load and store of a kernel: races, accesses outside of every array, bank conflicts
// and sectors. g++ -fsanitize=thread emits the calls; this file stands in for its runtime.
#include "watch.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));

namespace emu::watch {
namespace {

constexpr unsigned max_warps = 32;
constexpr std::size_t max_events = std::size_t(1) << 22;  // of one block between two barriers

// Who touched a granule. Epochs count barriers and blocks and never repeat within a launch.
struct Record {
    std::uint32_t epoch, pc, clock;
    std::uint16_t thread, atomic;
};

struct Cell {
    Record write, read, other_read;  // other_read: by another warp if there is one
    Record far_read;                 // a read by an earlier block
};

struct Region {
    std::uintptr_t begin, end, origin;
    unsigned granule;
    bool writable, shared;
    int argument;
    std::size_t extent_index;
    char name[64];
    Cell* cells;
    std::size_t cell_bytes;
};

struct Event {
    std::uint64_t address;
    std::uint32_t pc;
    std::uint8_t bytes, write, shared, atomic;
};

struct WarpClock {
    std::uint32_t own[32];       // advances at each __syncwarp of the lane
    std::uint32_t seen[32][32];  // seen[i][j]: how far lane i knows lane j
};

const EmuLaunch* launch;
Image stacks, library, dynamic_shared;
std::vector<Region> arrays, shared;
Region* last_array;
std::uint32_t epoch, block_first_epoch;
std::vector<std::uint32_t> epoch_block;
std::uint32_t block;
unsigned thread_count, thread;
bool running;
std::vector<std::vector<Event>> events;  // per thread, since the last barrier
std::size_t events_left;
WarpClock clocks[max_warps];

struct SiteKey {
    std::uint32_t pc;
    std::uint8_t bytes, write, shared, atomic;
    bool operator==(const SiteKey& o) const { return !std::memcmp(this, &o, sizeof o); }
};
struct SiteHash {
    std::size_t operator()(const SiteKey& k) const {
        std::uint64_t v;
        std::memcpy(&v, &k, sizeof v);
        return v * 0x9e3779b97f4a7c15ull >> 17;
    }
};
std::unordered_map<SiteKey, EmuSite, SiteHash> sites;
std::vector<EmuSite> site_list;
std::uint64_t uncounted;
std::vector<EmuRace> races;

// A block that fences and then does an atomic on an address hands what it wrote to the blocks
// that do an atomic on that address later.
struct Release {
    std::uint32_t block, epoch;
};
std::unordered_map<std::uintptr_t, std::vector<Release>> released;
std::unordered_map<std::uint32_t, std::uint32_t> acquired;  // block -> its last epoch we may see
std::vector<char> fenced;                                   // per thread, in this block

EmuSite& site_of(const Event& e) {
    const SiteKey key{e.pc, e.bytes, e.write, e.shared, e.atomic};
    auto [found, fresh] = sites.try_emplace(key);
    if (fresh) {
        EmuSite& s = found->second;
        s = {};
        s.pc = e.pc;
        s.shared = e.shared;
        s.write = e.write;
        s.bytes = e.bytes;
        s.atomic = e.atomic;
    }
    return found->second;
}

// ---- one warp's instruction: what it costs

void count_request(const Event& like, const std::uint64_t* addresses, unsigned lane_mask) {
    EmuSite& site = site_of(like);
    ++site.requests;
    const unsigned lanes = static_cast<unsigned>(__builtin_popcount(lane_mask));
    site.lanes += lanes;
    const unsigned bytes = like.bytes;
    if (like.shared) {
        // 8-byte accesses go half a warp at a time, 16-byte ones a quarter: 128 bytes a wavefront.
        const unsigned per_phase = bytes <= 4 ? 32 : 128 / bytes;
        for (unsigned first = 0; first < 32; first += per_phase) {
            unsigned used[32] = {}, worst = 0;
            // Distinct words per bank.
            std::uint64_t all[32 * 4 + 32];
            unsigned count = 0;
            for (unsigned lane = first; lane < first + per_phase; ++lane) {
                if (!(lane_mask >> lane & 1)) continue;
                for (std::uint64_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word)
                    all[count++] = word;
            }
            if (!count) continue;
            std::sort(all, all + count);
            count = static_cast<unsigned>(std::unique(all, all + count) - all);
            for (unsigned i = 0; i < count; ++i) worst = std::max(worst, ++used[all[i] % 32]);
            site.wavefronts += worst;
            ++site.ideal_wavefronts;
        }
    } else {
        std::uint64_t sorted[32], sectors[64];
        unsigned count = 0, sector_count = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (lane_mask >> lane & 1) sorted[count++] = addresses[lane];
        std::sort(sorted, sorted + count);
        std::uint64_t distinct = 0, end = 0;
        for (unsigned i = 0; i < count; ++i) {
            const std::uint64_t from = std::max(sorted[i], end), to = sorted[i] + bytes;
            if (to > from) distinct += to - from;
            end = std::max(end, to);
            for (std::uint64_t s = sorted[i] / 32; s <= (to - 1) / 32; ++s)
                if (!sector_count || sectors[sector_count - 1] != s) sectors[sector_count++] = s;
        }
        site.sectors += sector_count;
        site.ideal_sectors += (distinct + 31) / 32;
    }
}

void count_warp(unsigned warp) {
    const unsigned first = warp * 32, lanes = std::min(32u, thread_count - first);
    const std::vector<Event>* logs = &events[first];
    bool lockstep = true;
    for (unsigned lane = 1; lane < lanes && lockstep; ++lane) {
        lockstep = logs[lane].size() == logs[0].size();
        for (std::size_t i = 0; lockstep && i < logs[0].size(); ++i)
            lockstep = logs[lane][i].pc == logs[0][i].pc && logs[lane][i].bytes == logs[0][i].bytes;
    }
    std::uint64_t addresses[32];
    if (lockstep) {
        const unsigned mask = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        for (std::size_t i = 0; i < logs[0].size(); ++i) {
            for (unsigned lane = 0; lane < lanes; ++lane) addresses[lane] = logs[lane][i].address;
            count_request(logs[0][i], addresses, mask);
        }
        return;
    }
    // Lanes went different ways: the k-th execution of an instruction in each lane belongs together.
    struct Group {
        Event like;
        unsigned mask;
        std::uint64_t addresses[32];
    };
    std::unordered_map<std::uint64_t, std::size_t> index;
    std::vector<Group> groups;
    std::unordered_map<std::uint32_t, std::uint32_t> executions;
    for (unsigned lane = 0; lane < lanes; ++lane) {
        executions.clear();
        for (const Event& e : logs[lane]) {
            const std::uint64_t key = std::uint64_t(e.pc) << 32 | executions[e.pc]++;
            auto [found, fresh] = index.try_emplace(key, groups.size());
            if (fresh) groups.push_back({e, 0, {}});
            Group& group = groups[found->second];
            group.mask |= 1u << lane;
            group.addresses[lane] = e.address;
        }
    }
    for (const Group& group : groups) count_request(group.like, group.addresses, group.mask);
}

void count_epoch() {
    for (unsigned warp = 0; warp * 32 < thread_count; ++warp) count_warp(warp);
    for (unsigned i = 0; i < thread_count; ++i) events[i].clear();
    events_left = max_events;
}

// ---- races

bool ordered(const Record& r) {
    if (r.thread == thread) return true;
    if (r.thread / 32 != thread / 32) return false;
    return clocks[thread / 32].seen[thread % 32][r.thread % 32] >= r.clock;
}

void report_race(const Region& region, std::uintptr_t address, const Record& r, bool r_writes,
                 std::uint32_t pc, bool write) {
    for (EmuRace& known : races)
        if (known.first_pc == r.pc && known.second_pc == pc && known.second_write == write) {
            ++known.count;
            return;
        }
    if (races.size() >= 16) return;
    EmuRace race{};
    race.first_pc = r.pc;
    race.second_pc = pc;
    race.first_thread = r.thread;
    race.second_thread = thread;
    race.first_block = epoch_block[r.epoch];
    race.second_block = block;
    race.first_write = r_writes;
    race.second_write = write;
    race.shared = region.shared;
    race.argument = region.argument;
    race.offset = address - region.begin;
    std::memcpy(race.variable, region.name, sizeof race.variable);
    race.count = 1;
    races.push_back(race);
}

bool may_see(const Record& r) {  // of an earlier block
    auto found = acquired.find(epoch_block[r.epoch]);
    return found != acquired.end() && r.epoch <= found->second;
}

bool conflict(const Region& region, const Record& r) {
    if (!r.epoch) return false;
    if (r.epoch == epoch) return !ordered(r);
    if (region.shared || r.epoch >= block_first_epoch) return false;
    return !may_see(r);
}

void check_cells(Region& region, std::uintptr_t address, std::size_t bytes, bool write, bool atomic,
                 std::uint32_t pc, bool& uninitialised) {
    const Record mine{epoch, pc, clocks[thread / 32].own[thread % 32], static_cast<std::uint16_t>(thread), atomic};
    std::size_t first = (address - region.begin) / region.granule;
    std::size_t last = (address + bytes - 1 - region.begin) / region.granule;
    for (std::size_t i = first; i <= last; ++i) {
        Cell& cell = region.cells[i];
        if (!(atomic && cell.write.atomic) && conflict(region, cell.write))
            report_race(region, address, cell.write, true, pc, write);
        if (write) {
            for (const Record* r : {&cell.read, &cell.other_read, &cell.far_read})
                if (conflict(region, *r)) report_race(region, address, *r, false, pc, true);
            cell.write = mine;
            continue;
        }
        if (region.shared && cell.write.epoch < block_first_epoch) uninitialised = true;
        if (cell.read.epoch == epoch) {
            if (cell.read.thread == thread) {
                cell.read = mine;
            } else if (cell.other_read.epoch != epoch || cell.other_read.thread == thread ||
                       cell.other_read.thread / 32 == cell.read.thread / 32) {
                cell.other_read = mine;
            }
        } else {
            if (cell.read.epoch && cell.read.epoch < block_first_epoch) cell.far_read = cell.read;
            cell.read = mine;
        }
    }
}

Region* find(std::uintptr_t address) {
    for (Region& region : shared)
        if (address >= region.begin && address < region.end) return &region;
    if (last_array && address >= last_array->begin && address < last_array->end) return last_array;
    auto after = std::upper_bound(arrays.begin(), arrays.end(), address,
                                  [](std::uintptr_t a, const Region& r) { return a < r.begin; });
    if (after == arrays.begin()) return nullptr;
    Region* region = &*(after - 1);
    if (address >= region->end) return nullptr;
    return last_array = region;
}

const char* kind_of(bool write, bool atomic) {
    return atomic ? "atomic access" : write ? "write" : "read";
}

[[noreturn]] void outside(std::uintptr_t address, std::size_t bytes, bool write, bool atomic, std::uint32_t pc) {
    const Region* nearest = nullptr;
    std::uintptr_t distance = ~std::uintptr_t(0);
    bool past = false;
    auto consider = [&](const Region& r) {
        const bool after = address + bytes > r.end;
        const std::uintptr_t d = after ? (address >= r.end ? address - r.end : 0) : r.begin - address;
        if (d < distance) {
            distance = d;
            nearest = &r;
            past = after;
        }
    };
    for (const Region& r : arrays) consider(r);
    for (const Region& r : shared) consider(r);
    char where[160] = "";
    if (nearest) {
        char name[96];
        if (nearest->shared) std::snprintf(name, sizeof name, "shared `%s`", nearest->name);
        else std::snprintf(name, sizeof name, "argument %d", nearest->argument);
        std::snprintf(where, sizeof where, "; the nearest is %s (%zu bytes): %zu bytes %s", name,
                      static_cast<std::size_t>(nearest->end - nearest->begin), static_cast<std::size_t>(distance),
                      past ? "past its end" : "before its start");
    }
    fail("out-of-bounds %s of %zu bytes%s @pc=0x%x", kind_of(write, atomic), bytes, where, pc);
}

void access(std::uintptr_t address, std::size_t bytes, bool write, bool atomic, const void* return_address,
            bool counts = true) {
    if (!running) return;
    if (address >= stacks.begin && address < stacks.end) return;
    const std::uint32_t pc = offset_of(return_address);
    Region* region = find(address);
    if (!region) {
        const bool in_arena = address >= dynamic_shared.begin && address < dynamic_shared.end;
        if (!in_arena && address >= library.begin && address < library.end) return;
        outside(address, bytes, write, atomic, pc);
    }
    if (address + bytes > region->end) outside(address, bytes, write, atomic, pc);
    if (write && !region->writable)
        fail("write to argument %d, a read-only array @pc=0x%x", region->argument, pc);
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes)
        fail("misaligned %s of %zu bytes (%s at byte %zu) @pc=0x%x", kind_of(write, atomic), bytes,
             region->shared ? region->name : "argument", static_cast<std::size_t>(address - region->begin), pc);
    bool uninitialised = false;
    check_cells(*region, address, bytes, write, atomic, pc, uninitialised);
    const std::uint64_t place = region->shared ? (std::uint64_t(region->extent_index) << 32) + (address - region->begin)
                                               : address - region->origin % 256;
    Event event{place, pc, static_cast<std::uint8_t>(bytes), write, region->shared, atomic};
    if (uninitialised) ++site_of(event).uninitialised;
    if (!counts || bytes > 16) return;
    if (!events_left) {
        ++uncounted;
        return;
    }
    --events_left;
    events[thread].push_back(event);
}

void map_cells(Region& region) {
    const std::size_t count = (region.end - region.begin + region.granule - 1) / region.granule;
    region.cell_bytes = count * sizeof(Cell);
    void* memory = mmap(nullptr, region.cell_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory to watch an array of %zu bytes", region.end - region.begin);
    region.cells = static_cast<Cell*>(memory);
}

}  // namespace

std::uint32_t offset_of(const void* pc) {
    // One back: inside of the call, so that its line is the call's and not the next one's.
    return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(pc) - 1 -
                                      reinterpret_cast<std::uintptr_t>(__ehdr_start));
}

void begin_launch(const EmuLaunch& given, Image fiber_stacks, Image own_library, Image arena) {
    launch = &given;
    stacks = fiber_stacks;
    library = own_library;
    dynamic_shared = arena;
    arrays.clear();
    shared.clear();
    last_array = nullptr;
    epoch = 0;
    epoch_block.assign(1, ~0u);
    sites.clear();
    races.clear();
    released.clear();
    uncounted = 0;
    for (std::int64_t i = 0; i < given.extent_count; ++i) {
        const EmuExtent& e = given.extents[i];
        Region region{e.begin, e.end, e.origin, static_cast<unsigned>(e.granule), e.writable != 0, false,
                      e.argument, static_cast<std::size_t>(i), "", nullptr, 0};
        map_cells(region);
        arrays.push_back(region);
    }
}

void begin_block(std::uint32_t number, unsigned count) {
    block = number;
    thread_count = count;
    events.resize(std::max<std::size_t>(events.size(), count));
    fenced.assign(count, 0);
    acquired.clear();
    events_left = max_events;
    for (WarpClock& c : clocks) {
        std::fill(std::begin(c.own), std::end(c.own), 1u);
        std::memset(c.seen, 0, sizeof c.seen);
    }
    block_first_epoch = epoch + 1;
    ++epoch;
    epoch_block.push_back(block);
    running = true;
}

void begin_epoch() {
    count_epoch();
    ++epoch;
    epoch_block.push_back(block);
}

void end_block() {
    running = false;
    count_epoch();
}

void end_launch() {
    running = false;
    for (auto& log : events) log.clear();
    for (auto* regions : {&arrays, &shared})
        for (Region& region : *regions) munmap(region.cells, region.cell_bytes);
    arrays.clear();
    shared.clear();
    site_list.clear();
    for (auto& [key, site] : sites) site_list.push_back(site);
}

void begin_thread(unsigned number) { thread = number; }

void add_shared(std::uintptr_t begin, std::size_t bytes, unsigned granule, const char* name) {
    for (Region& region : shared)
        if (region.begin == begin) {
            if (region.granule <= granule) return;
            fail("dynamic shared memory is declared with several types: give the smallest one first");
        }
    if (!bytes) return;
    Region region{begin, begin + bytes, begin, granule, true, true, -1, shared.size() + 1, "", nullptr, 0};
    std::snprintf(region.name, sizeof region.name, "%s", name);
    map_cells(region);
    shared.push_back(region);
}

void sync_warp(unsigned warp, unsigned mask) {
    WarpClock& c = clocks[warp];
    std::uint32_t known[32] = {};
    for (unsigned i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        for (unsigned j = 0; j < 32; ++j) known[j] = std::max(known[j], c.seen[i][j]);
        known[i] = std::max(known[i], c.own[i]);
    }
    for (unsigned i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        std::memcpy(c.seen[i], known, sizeof known);
        ++c.own[i];
    }
}

void fence() { fenced[thread] = 1; }

void deliver(std::uintptr_t address, std::size_t bytes, std::uint32_t pc) {
    Region* region = find(address);
    bool uninitialised = false;
    if (running && region) check_cells(*region, address, bytes, true, false, pc, uninitialised);
}

}  // namespace emu::watch

namespace emu {

void atomic_access(const void* address, unsigned bytes, void* pc) {
    using namespace watch;
    const auto a = reinterpret_cast<std::uintptr_t>(address);
    access(a, bytes, true, true, pc);
    for (const Release& r : released[a]) {
        auto& last = acquired[r.block];
        last = std::max(last, r.epoch);
    }
    if (!fenced[thread]) return;
    auto& list = released[a];
    for (const auto& [other, last] : acquired) list.push_back({other, last});
    list.push_back({block, epoch});
    std::sort(list.begin(), list.end(), [](const Release& x, const Release& y) {
        return x.block != y.block ? x.block < y.block : x.epoch > y.epoch;
    });
    list.erase(std::unique(list.begin(), list.end(),
                           [](const Release& x, const Release& y) { return x.block == y.block; }),
               list.end());
}

}  // namespace emu

// ---------------------------------------------------------------- the compiler's callbacks

#define EMU_CALLBACK extern "C" __attribute__((visibility("hidden"))) void
#define EMU_ACCESSES(bytes)                                                                        \
    EMU_CALLBACK __tsan_read##bytes(void* a) {                                                     \
        emu::watch::access((std::uintptr_t)a, bytes, false, false, __builtin_return_address(0));   \
    }                                                                                              \
    EMU_CALLBACK __tsan_write##bytes(void* a) {                                                    \
        emu::watch::access((std::uintptr_t)a, bytes, true, false, __builtin_return_address(0));    \
    }                                                                                              \
    EMU_CALLBACK __tsan_volatile_read##bytes(void* a) {                                            \
        emu::watch::access((std::uintptr_t)a, bytes, false, false, __builtin_return_address(0));   \
    }                                                                                              \
    EMU_CALLBACK __tsan_volatile_write##bytes(void* a) {                                           \
        emu::watch::access((std::uintptr_t)a, bytes, true, false, __builtin_return_address(0));    \
    }
EMU_ACCESSES(1)
EMU_ACCESSES(2)
EMU_ACCESSES(4)
EMU_ACCESSES(8)
EMU_ACCESSES(16)
EMU_CALLBACK __tsan_read_range(void* a, std::size_t bytes) {
    emu::watch::access((std::uintptr_t)a, bytes, false, false, __builtin_return_address(0));
}
EMU_CALLBACK __tsan_write_range(void* a, std::size_t bytes) {
    emu::watch::access((std::uintptr_t)a, bytes, true, false, __builtin_return_address(0));
}
EMU_CALLBACK __tsan_vptr_update(void**, void*) {}
EMU_CALLBACK __tsan_func_entry(void*) {}
EMU_CALLBACK __tsan_func_exit() {}
EMU_CALLBACK __tsan_init() {}

// ---------------------------------------------------------------- what Python reads

extern "C" {
__attribute__((visibility("default"))) std::int64_t emu_sites(const EmuSite** list) {
    *list = emu::watch::site_list.data();
    return static_cast<std::int64_t>(emu::watch::site_list.size());
}
__attribute__((visibility("default"))) std::int64_t emu_races(const EmuRace** list) {
    *list = emu::watch::races.data();
    return static_cast<std::int64_t>(emu::watch::races.size());
}
__attribute__((visibility("default"))) std::uint64_t emu_uncounted() { return emu::watch::uncounted; }
}

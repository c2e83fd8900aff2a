// The process in which sanitized kernels run: reads launches from stdin, answers on stdout.
// Each array lies between poisoned bytes, at the alignment that it has in the caller.
#include "emu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

namespace {

constexpr std::size_t alignment = 256, margin = 4096;

struct Library {
    int (*launch)(const EmuLaunch*, EmuResult*);
    const emu::Entry* (*entry)(int);
    void* (*make_stacks)();
    void (*describe)(char*, std::size_t);
};

struct Array {
    EmuExtent extent;
    char *memory, *data;
    std::size_t memory_bytes, bytes;
};

struct Relocation {
    std::uint64_t at, array, offset;
};

int answers;
Library* running;
std::vector<Array> arrays;

void read_all(void* to, std::size_t bytes) {
    for (char* p = static_cast<char*>(to); bytes;) {
        const ssize_t n = read(0, p, bytes);
        if (n <= 0) _exit(0);
        p += n;
        bytes -= static_cast<std::size_t>(n);
    }
}

void write_all(const void* from, std::size_t bytes) {
    for (const char* p = static_cast<const char*>(from); bytes;) {
        const ssize_t n = write(answers, p, bytes);
        if (n <= 0) _exit(0);
        p += n;
        bytes -= static_cast<std::size_t>(n);
    }
}

template <class T>
T read_value() {
    T value;
    read_all(&value, sizeof value);
    return value;
}

void on_death() {
    if (!running) return;
    char text[512];
    running->describe(text, sizeof text);
    std::fprintf(stderr, "EMULATOR: %s\n", text);
    const auto* address = static_cast<const char*>(__asan_get_report_address());
    for (const Array& a : arrays) {
        if (!address || address < a.memory || address >= a.memory + a.memory_bytes) continue;
        const long past = address - (a.data + a.bytes), before = a.data - address;
        std::fprintf(stderr, "EMULATOR: %ld bytes %s argument %d (%zu bytes)\n", past >= 0 ? past : before,
                     past >= 0 ? "past the end of" : "before the start of", a.extent.argument, a.bytes);
    }
}

Library& library(const std::string& path) {
    static std::map<std::string, Library> known;
    auto found = known.find(path);
    if (found != known.end()) return found->second;
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        std::fprintf(stderr, "%s\n", dlerror());
        _exit(1);
    }
    Library l;
    l.launch = reinterpret_cast<decltype(l.launch)>(dlsym(handle, "emu_launch"));
    l.entry = reinterpret_cast<decltype(l.entry)>(dlsym(handle, "emu_entry"));
    l.make_stacks = reinterpret_cast<decltype(l.make_stacks)>(dlsym(handle, "emu_make_stacks"));
    l.describe = reinterpret_cast<decltype(l.describe)>(dlsym(handle, "emu_describe_position"));
    return known[path] = l;
}

void describe(Library& l) {
    for (int i = 0; const emu::Entry* entry = l.entry(i); ++i) {
        const int head[3] = {static_cast<int>(std::strlen(entry->name)), entry->parameter_count, entry->launch_bound};
        write_all(head, sizeof head);
        write_all(entry->name, std::strlen(entry->name));
        write_all(entry->parameters, static_cast<std::size_t>(entry->parameter_count) * sizeof(emu::Parameter));
    }
    const int end[3] = {-1, 0, 0};
    write_all(end, sizeof end);
}

void run(Library& l) {
    auto launch = read_value<EmuLaunch>();
    std::vector<char> arguments(launch.argument_bytes);
    read_all(arguments.data(), arguments.size());
    arrays.clear();
    for (std::int64_t i = 0; i < launch.extent_count; ++i) {
        Array a;
        a.extent = read_value<EmuExtent>();
        a.bytes = a.extent.end - a.extent.begin;
        a.memory_bytes = a.bytes + 2 * (alignment + margin);
        a.memory = static_cast<char*>(std::malloc(a.memory_bytes));
        const auto base = (reinterpret_cast<std::uintptr_t>(a.memory) + margin + alignment - 1) / alignment * alignment;
        a.data = reinterpret_cast<char*>(base + a.extent.begin % alignment);
        read_all(a.data, a.bytes);
        __asan_poison_memory_region(a.memory, static_cast<std::size_t>(a.data - a.memory));
        __asan_poison_memory_region(a.data + a.bytes,
                                    static_cast<std::size_t>(a.memory + a.memory_bytes - (a.data + a.bytes)));
        arrays.push_back(a);
    }
    const auto relocations = read_value<std::uint64_t>();
    for (std::uint64_t i = 0; i < relocations; ++i) {
        const auto r = read_value<Relocation>();
        const char* pointer = arrays[r.array].data + r.offset;
        std::memcpy(arguments.data() + r.at, &pointer, sizeof pointer);
    }
    launch.arguments = arguments.data();
    launch.extents = nullptr;
    static void* stacks = l.make_stacks();
    launch.stacks = stacks;
    static EmuResult result;
    running = &l;
    l.launch(&launch, &result);
    running = nullptr;
    write_all(&result, sizeof result);
    for (const Array& a : arrays) {
        write_all(a.data, a.bytes);
        __asan_unpoison_memory_region(a.memory, a.memory_bytes);
        std::free(a.memory);
    }
    arrays.clear();
}

}  // namespace

int main() {
    answers = dup(1);
    dup2(2, 1);  // a kernel's printf must not end up among the answers
    __sanitizer_set_death_callback(on_death);
    for (;;) {
        const auto launches = read_value<std::uint32_t>();
        std::string path(read_value<std::uint32_t>(), '\0');
        read_all(path.data(), path.size());
        Library& l = library(path);
        if (launches) run(l);
        else describe(l);
    }
}

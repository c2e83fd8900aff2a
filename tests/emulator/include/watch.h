// What the runtime tells the watcher (watch mode only).
#pragma once

#include "emu.h"

namespace emu::watch {

struct Image {  // addresses that are no array of the launch, and fine
    std::uintptr_t begin, end;
};

void begin_launch(const EmuLaunch& launch, Image stacks, Image library, Image arena);
void begin_block(std::uint32_t block, unsigned threads);
void begin_epoch();  // a block barrier was passed
void end_block();
void end_launch();
void begin_thread(unsigned thread);  // the thread runs from here on
void add_shared(std::uintptr_t begin, std::size_t bytes, unsigned granule, const char* name);
void sync_warp(unsigned warp, unsigned mask);
void fence();
// Bytes that cp.async delivers: ordered like a store, not counted as one.
void deliver(std::uintptr_t address, std::size_t bytes, std::uint32_t pc);
std::uint32_t offset_of(const void* pc);

}  // namespace emu::watch

// Winograd's method in passes, the first: the transform of the input's tiles.
//
//   inputs[g][i*6 + j][c][t] = (B' d B)[i][j],   d = x[n, g*C/G + c, h : h+6, w : w+6]
//       t  tile of this pass, first + t of all; (n, h, w) where its inputs begin
//
// x is read beyond its edges as the boundary mode says. Rows of t are `pitch` long; what lies past
// the last tile is not written, and nobody reads what becomes of it.
//
// Mapping: a thread transforms one tile of one channel. The lanes of a warp are 32 tiles of one
// channel where x's memory runs along W, and 8 tiles of 4 channels where it runs along channels:
//   lanes = channels_inner ? 8 : 32
//   tile    = tile block*lanes + thread % lanes           blockIdx.x = tile block*channel_blocks
//   channel = channel block*BLOCK/lanes + thread / lanes               + channel block
// Either way a warp writes whole sectors, and the sectors that it reads it shares with the block.
//
// Shared memory: none. Limit: the memory, 9 floats written for each 4 read.
//
// Macros:
//   X_T    float16, bfloat16 or float32
//   BLOCK  threads per block, a multiple of 32 up to 1024
//
// Launched by gpuconv/cuda_backend/winograd.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 winograd_input.cu

#ifndef X_T
#define X_T float32
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "winograd.cuh"

static_assert(is_one_of<X_T, float16, bfloat16, float32>, "X_T: float16, bfloat16 or float32");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && BLOCK % 32 == 0, "BLOCK: whole warps, up to 1024");

constexpr int OUT = 4, IN = 6;

extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK)
winograd_input(const X_T* __restrict__ x, float32* __restrict__ inputs, const Problem p,
               const Tiles tiles) {
    const int lanes = tiles.x_channels_inner ? 8 : 32;
    int tile_block = blockIdx.x;
    const int channel_block = split_off(tile_block, tiles.channel_blocks);
    const int tile = tile_block * lanes + threadIdx.x % lanes;
    int group = channel_block * (BLOCK / lanes) + threadIdx.x / lanes;
    if (tile >= tiles.count || group >= p.in_channels) return;
    // Offsets into x are of 64 bits: the memory is what this kernel waits for.
    const Place<int64> at = place_of<OUT, int64>(tiles.first + tile, tiles);
    const Patch<IN, int64> patch(at, p);
    const int64 first = at.n * p.x_strides[0] + group * p.x_strides[1];
    X_T loaded[IN][IN];
#pragma unroll
    for (int r = 0; r < IN; ++r) {
#pragma unroll
        for (int s = 0; s < IN; ++s) loaded[r][s] = patch.read(x, first, r, s);
    }
    patch.clear(loaded);
    const int c = split_off(group, p.group_in_divisor);
    const int64 step = p.group_in * tiles.pitch;
    float32* to = inputs + (int64)group * IN * IN * step + (int64)c * tiles.pitch + tile;
    store_transformed(loaded, to, step);
}

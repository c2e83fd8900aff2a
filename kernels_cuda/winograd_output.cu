// Winograd's method in passes, the last: from the products to y.
//
//   y[n, k, h : h+4, w : w+4] = A' m A + bias[k],   m[i][j] = products[g][i*6 + j][k'][t]
//       or products[g][i*6 + j][t][k'] where y's memory runs along channels
//       t  tile of this pass, first + t of all; (n, h, w) where it lies; k = g*K/G + k'
//
// Mapping: a thread computes one tile of one output channel; neighbouring threads are neighbouring
// tiles or, where y's memory runs along channels, channels.
//   lanes   = 32 of what is inner, BLOCK/32 of the other
//   blockIdx.x = tile block*channel_blocks + channel block
//
// Shared memory: none. Limit: the memory, 9 floats read for each 4 written.
//
// Macros:
//   X_T            float16, bfloat16 or float32
//   W_T, B_T, Y_T  as X_T
//   BLOCK          threads per block, a multiple of 32 up to 1024
//
// Launched by gpuconv/cuda_backend/winograd.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 winograd_output.cu

#ifndef X_T
#define X_T float32
#endif
#ifndef W_T
#define W_T X_T
#endif
#ifndef B_T
#define B_T X_T
#endif
#ifndef Y_T
#define Y_T X_T
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "winograd.cuh"

static_assert(is_one_of<X_T, float16, bfloat16, float32>, "X_T: float16, bfloat16 or float32");
static_assert(Same<X_T, W_T>::value && Same<X_T, B_T>::value && Same<X_T, Y_T>::value,
              "W_T, B_T, Y_T: as X_T");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && BLOCK % 32 == 0, "BLOCK: whole warps, up to 1024");

constexpr int OUT = 4, IN = 6;

extern "C" __global__ void __launch_bounds__(BLOCK, 768 / BLOCK)
winograd_output(const X_T* __restrict__ x, const W_T* __restrict__ w,
                const float32* __restrict__ products, const B_T* __restrict__ bias,
                Y_T* __restrict__ y, const Problem p, const Tiles tiles) {
    int tile_block = blockIdx.x;
    const int channel_block = split_off(tile_block, tiles.channel_blocks);
    const int inner = threadIdx.x % 32, outer = threadIdx.x / 32;
    const bool channels_inner = tiles.y_channels_inner;
    const int tile = channels_inner ? tile_block * (BLOCK / 32) + outer : tile_block * 32 + inner;
    const int k = channels_inner ? channel_block * 32 + inner
                                 : channel_block * (BLOCK / 32) + outer;
    if (tile >= tiles.count || k >= p.out_channels) return;
    int group = k;
    const int row = split_off(group, p.group_out_divisor);
    const int rows = (int)tiles.filter_blocks.value * FILTERS;
    const int64 step = (int64)rows * tiles.pitch;
    const float32* from = products + (int64)group * IN * IN * step +
                          (channels_inner ? (int64)tile * rows + row
                                          : (int64)row * tiles.pitch + tile);
    float32 columns[IN][OUT];  // [j][i]
#pragma unroll
    for (int j = 0; j < IN; ++j) {
        float32 m[IN];
#pragma unroll
        for (int i = 0; i < IN; ++i) m[i] = from[(i * IN + j) * step];
        transform_output(m, columns[j]);
    }
    float32 out[OUT][OUT];
#pragma unroll
    for (int i = 0; i < OUT; ++i) {
        float32 m[IN];
#pragma unroll
        for (int j = 0; j < IN; ++j) m[j] = columns[j][i];
        transform_output(m, out[i]);
    }
    const Place<int64> at = place_of<OUT, int64>(tiles.first + tile, tiles);
    store_tile(out, at, k, x, w, bias, y, p, tiles);
}

// Winograd's method in passes, the middle: a matrix product for each of a tile's 36 positions.
//
//   products[g][q][k][t] = sum over c of  filters[g][k/64][c][q][k%64] * inputs[g][q][c][t]
//       or products[g][q][t][k], where the next pass reads neighbouring channels
//       g  group, q  position, k  output channel of the group, c  input channel, t  tile
//
// The sum is made in two levels: CHUNK products in a row, from zero, and then those sums in a row.
// A running sum of C products rounds up to C times, this one CHUNK + C/CHUNK times; what that is
// worth is in gpuconv/toom_cook.py. No bit of it depends on where a tile lies.
//
// Mapping: a block of 128 threads computes 64 channels x 128 tiles of one position.
//   blockIdx.x = ((g*36 + q)*tile_blocks + tile block)*filter_blocks + filter block
// so that blocks which run together read the same inputs. A thread computes 8 x 8, in fragments of
// 16 bytes; a warp is 8 x 4 threads, of which 8 neighbours (a quarter warp, which shared memory
// serves at once) read 4 different fragments of the filters and 2 of the inputs: no conflict.
//
// Shared memory, STAGES chunks of each, 36 KiB: while one is multiplied the next are on their way.
//
//   filter_tile [STAGES][CHUNK][64]      row c: 256 bytes   | copied 16 bytes at a time, in the
//   input_tile  [STAGES][CHUNK][128]     row c: 512 bytes   | order in which they lie in memory
//
// Limit: the multiply-adds of the plain cores. Per c a thread issues 64 of them and 4 loads of
// shared memory; 64 additions per CHUNK join the levels.
//
// Macros:
//   STAGES  2 or 3: four are more than the 48 KiB of static shared memory
//
// Launched by gpuconv/cuda_backend/winograd.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin winograd_multiply.cu

#ifndef STAGES
#define STAGES 3
#endif

#include "ptx.cuh"
#include "winograd.cuh"

static_assert(STAGES >= 2 && STAGES <= 3, "STAGES: 2 or 3");

constexpr int CHUNK = 16, TILES = 128, BLOCK = 128, POSITIONS = 36;
constexpr int THREADS_M = FILTERS / THREAD, THREADS_N = TILES / THREAD;
static_assert(THREADS_M == 8 && THREADS_M * THREADS_N == BLOCK, "a warp is 8 x 4 threads");

struct Block {
    int filters, tiles, plane;
};

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
winograd_multiply(const float32* __restrict__ filters, const float32* __restrict__ inputs,
                  float32* __restrict__ products, const int32 channels, const Tiles tiles) {
    __shared__ __align__(16) float32 filter_tile[STAGES][CHUNK * FILTERS];
    __shared__ __align__(16) float32 input_tile[STAGES][CHUNK * TILES];
    const int thread = threadIdx.x, lane = thread % 32;

    int plane = blockIdx.x;  // g*36 + q
    const int filter_block = split_off(plane, tiles.filter_blocks);
    const int tile_block = split_off(plane, tiles.tile_blocks);
    // For the end, when these have made room for sums.
    __shared__ Block block;
    if (thread == 0) block = Block{filter_block, tile_block, plane};
    const int filter_blocks = (int)tiles.filter_blocks.value;
    const int group = plane / POSITIONS, position = plane % POSITIONS;

    // ---- global memory -> shared memory
    constexpr int FILTER_PIECES = FILTERS / 4, INPUT_PIECES = TILES / 4;  // of 16 bytes, per c
    const int filter_c = thread / FILTER_PIECES, input_c = thread / INPUT_PIECES;
    const int filter_from =
        ((group * filter_blocks + filter_block) * channels * POSITIONS + position) * FILTERS +
        filter_c * (POSITIONS * FILTERS) + thread % FILTER_PIECES * 4;
    const int input_from = (plane * channels + input_c) * tiles.pitch + tile_block * TILES +
                           thread % INPUT_PIECES * 4;
    const auto load_chunk = [&](int chunk) {
        const int stage = chunk % STAGES, c0 = chunk * CHUNK;
#pragma unroll
        for (int c = 0; c < CHUNK; c += BLOCK / FILTER_PIECES) {
            cp_async_16(&filter_tile[stage][c * FILTERS + thread * 4],
                        filters + filter_from + (c0 + c) * (POSITIONS * FILTERS),
                        c0 + c + filter_c < channels);
        }
#pragma unroll
        for (int c = 0; c < CHUNK; c += BLOCK / INPUT_PIECES) {
            cp_async_16(&input_tile[stage][c * TILES + thread * 4],
                        inputs + input_from + (c0 + c) * tiles.pitch,
                        c0 + c + input_c < channels);
        }
    };

    // ---- the sums of this thread: fragment f of rows begins at f*THREADS_M*FRAGMENT + thread_m
    const int thread_m = lane / 2 % 8 * FRAGMENT;
    const int thread_n = (thread / 32 * 4 + lane / 16 * 2 + lane % 2) * FRAGMENT;
    float32 sum[THREAD][THREAD];
#pragma unroll
    for (int i = 0; i < THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < THREAD; ++j) sum[i][j] = 0;
    }
    const int chunks = (channels + CHUNK - 1) / CHUNK;
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; ++chunk) {
        if (chunk < chunks) load_chunk(chunk);
        cp_async_commit();
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this chunk is there for all, and the one before has been read
        if (chunk + STAGES - 1 < chunks) load_chunk(chunk + STAGES - 1);
        cp_async_commit();
        const int stage = chunk % STAGES;
        float32 part[THREAD][THREAD];
        const auto multiply = [&](int c, bool first) {
            multiply_fragments(part, &filter_tile[stage][c * FILTERS + thread_m],
                               THREADS_M * FRAGMENT, &input_tile[stage][c * TILES + thread_n],
                               THREADS_N * FRAGMENT, first);
        };
        multiply(0, true);
#pragma unroll
        for (int c = 1; c < CHUNK; ++c) multiply(c, false);
#pragma unroll
        for (int i = 0; i < THREAD; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD; ++j) sum[i][j] += part[i][j];
        }
    }

    // ---- registers -> products
    const int rows = (int)tiles.filter_blocks.value * FILTERS;
    const int row0 = block.filters * FILTERS + thread_m;
    const int tile0 = block.tiles * TILES + thread_n;
    float32* const to = products + (int64)block.plane * rows * tiles.pitch;
    const auto row_of = [](int i) { return i / FRAGMENT * THREADS_M * FRAGMENT + i % FRAGMENT; };
    const auto tile_of = [](int j) { return j / FRAGMENT * THREADS_N * FRAGMENT + j % FRAGMENT; };
#pragma unroll
    for (int i = 0; i < THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < THREAD; j += FRAGMENT) {
            if (tiles.y_channels_inner) {  // the transpose of the fragment: i counts tiles
                *reinterpret_cast<float4*>(to + (int64)(tile0 + tile_of(i)) * rows + row0 +
                                           row_of(j)) =
                    make_float4(sum[j][i], sum[j + 1][i], sum[j + 2][i], sum[j + 3][i]);
            } else {
                *reinterpret_cast<float4*>(to + (int64)(row0 + row_of(i)) * tiles.pitch + tile0 +
                                           tile_of(j)) =
                    make_float4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
            }
        }
    }
}

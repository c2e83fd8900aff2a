// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3), in one kernel: 16 products where the sum
// has 36.
//
//   y[n, k, h:h+2, w:w+2] = A' [ sum over c of  filters[g][k/64][c][.][k%64] * (B' d B) ] A
//                           + bias[k]
//       d = x[n, c, h : h+4, w : w+4], beyond the edges as the boundary mode says
//       filters, transformed, by winograd_filter.cu; the transforms are in winograd.cuh
//
// Mapping: a block of 256 threads computes 64 output channels of one group x 32 tiles of 2x2.
//   blockIdx.x = (tile block*groups + g)*filter_blocks + filter block
// so that blocks which run together read the same inputs. Warp v multiplies the positions 2v and
// 2v + 1 of the 16: products of 64 channels x 32 tiles, 8 x 8 of each per thread, in fragments of
// 16 bytes, lanes as in implicit_gemm.cu (no bank conflict). And each thread transforms one tile
// of one channel of every chunk of 8:
//   x's memory along W          lane: tile                    warp: channel
//   x's memory along channels   lane: 8 channels x 4 tiles    warp: the next 4 tiles
//
// Shared memory, dynamic, 96.25 KiB, all of it twice: chunk i+1 is on its way (the filters
// asynchronously, the inputs in registers) while chunk i is multiplied; one barrier per chunk.
//
//   filter_tile [2][8][16][64]           element (c, q, k), as it lies in global memory
//   input_tile  [2][8][16*32 + 4]        element (c, q, t); the 4 send the 8 channels of a lane's
//                                        neighbours to different banks
// and at the end, in their place, 32 of the 64 output channels at a time, from warps that hold all
// of a position to threads that hold all positions:
//   exchange    [16][32][36]             element (q, k, t) in column (t/4 + k/8*2) % 8 * 4 + t%4:
//                                        16-byte writes, and reads along t or along k and t,
//                                        without a bank conflict
//
// Limit: instructions. Of a chunk a thread issues 1024 multiply-adds, 64 loads of shared memory,
// and some 240 to load, transform and store the inputs: three quarters of what sm_90a issues are
// multiply-adds. With 128 sums in registers only one block fits a multiprocessor. A chunk reads
// 32 KiB of filters, up to 16 bytes a cycle of what the second-level cache can give.
//
// Macros:
//   X_T, W_T, B_T, Y_T  float16, bfloat16 or float32, all the same
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
//
// Launched by gpuconv/cuda_backend/winograd.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin winograd.cu

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

#include "ptx.cuh"
#include "winograd.cuh"

static_assert(is_one_of<X_T, float16, bfloat16, float32>, "X_T: float16, bfloat16 or float32");
static_assert(Same<X_T, W_T>::value && Same<X_T, B_T>::value && Same<X_T, Y_T>::value,
              "W_T, B_T, Y_T: as X_T");

constexpr int OUT = 2, IN = 4, POSITIONS = 16;
constexpr int BLOCK = 256, TILES = 32, CHUNK = 8;
constexpr int FILTER_ROW = POSITIONS * FILTERS, INPUT_ROW = POSITIONS * TILES + 4;  // of one c
constexpr int HALF = FILTERS / 2, EXCHANGE_ROW = TILES + 4;

struct Block {
    int filters, group, tiles;
};

// Where element (q, k, t) of half the output channels lies in the exchange.
__device__ __forceinline__ int exchanged(int q, int k, int t) {
    return (q * HALF + k) * EXCHANGE_ROW + (t / 4 + k / 8 * 2) % 8 * 4 + t % 4;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1)
winograd(const X_T* __restrict__ x, const W_T* __restrict__ w,
         const float32* __restrict__ filters, const B_T* __restrict__ bias, Y_T* __restrict__ y,
         const Problem p, const Tiles tiles) {
    typedef INDEX_T Index;
    extern __shared__ __align__(16) float32 shared[];
    float32* const filter_tile = shared;
    float32* const input_tile = shared + 2 * CHUNK * FILTER_ROW;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int channels = (int)p.group_in;

    int tile_block = blockIdx.x;
    const int filter_block = split_off(tile_block, tiles.filter_blocks);
    const int group = split_off(tile_block, tiles.groups);
    // For the end, when these have made room for sums: registers are what this kernel lacks.
    __shared__ Block block;
    if (thread == 0) block = Block{filter_block, group, tile_block};

    // ---- what this thread loads and transforms: one tile of the channels load_c, load_c + 8, ...
    const int load_tile = tiles.x_channels_inner ? warp * 4 + lane / 8 : lane;
    const int load_c = tiles.x_channels_inner ? lane % 8 : warp;
    // Tiles past the end repeat the last: nobody stores their results.
    const Place<Index> load_at =
        place_of<OUT, Index>(min(tile_block * TILES + load_tile, tiles.count - 1), tiles);
    const Patch<IN, Index> patch(load_at, p);
    const Index load_image = load_at.n * (Index)p.x_strides[0];
    const int filter_from =
        (group * (int)tiles.filter_blocks.value + filter_block) * channels * FILTER_ROW +
        thread * 4;
    X_T loaded[IN][IN];
    const auto load_chunk = [&](int chunk) {
        float32* const to = filter_tile + (chunk & 1) * CHUNK * FILTER_ROW + thread * 4;
        const float32* const from = filters + filter_from + chunk * CHUNK * FILTER_ROW;
        const int live = channels - chunk * CHUNK;
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) {  // BLOCK pieces of 16 bytes are a row
            cp_async_16(to + c * FILTER_ROW, from + c * FILTER_ROW, c < live);
        }
        cp_async_commit();
        // Past the last channel the filters are zeros, and any channel of the tile will do.
        const int c = group * channels + min(chunk * CHUNK + load_c, channels - 1);
        const Index first = load_image + c * (Index)p.x_strides[1];
#pragma unroll
        for (int r = 0; r < IN; ++r) {
#pragma unroll
            for (int s = 0; s < IN; ++s) loaded[r][s] = patch.read(x, first, r, s);
        }
    };
    const auto store_inputs = [&](int chunk) {
        float32* const to =
            input_tile + ((chunk & 1) * CHUNK + load_c) * INPUT_ROW + load_tile;
        patch.clear(loaded);
        store_transformed(loaded, to, TILES);
    };

    // ---- the sums of this thread: fragments of rows begin at thread_m and HALF + thread_m
    const int thread_m = lane / 2 % 8 * FRAGMENT;
    const int thread_n = (lane / 16 * 2 + lane % 2) * FRAGMENT;
    float32 sum[2][THREAD][THREAD];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int i = 0; i < THREAD; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD; ++j) sum[q][i][j] = 0;
        }
    }
    const int chunks = (channels + CHUNK - 1) / CHUNK;
    // Once around before the first chunk, only to load it.
#pragma unroll 1
    for (int chunk = -1; chunk < chunks; ++chunk) {
        const bool more = chunk + 1 < chunks;
        if (more) load_chunk(chunk + 1);
        if (chunk >= 0) {
            const float32* const filter_row =
                filter_tile + (chunk & 1) * CHUNK * FILTER_ROW + 2 * warp * FILTERS + thread_m;
            const float32* const input_row =
                input_tile + (chunk & 1) * CHUNK * INPUT_ROW + 2 * warp * TILES + thread_n;
#pragma unroll 4
            for (int c = 0; c < CHUNK; ++c) {
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    multiply_fragments(sum[q], filter_row + c * FILTER_ROW + q * FILTERS, HALF,
                                       input_row + c * INPUT_ROW + q * TILES, TILES / 2, false);
                }
            }
        }
        // The other buffer was last read before the barrier that ended the previous chunk.
        if (more) {
            store_inputs(chunk + 1);
            cp_async_wait<0>();
        }
        __syncthreads();  // the next chunk is there, and this one is free
    }

    // ---- registers -> exchange -> y
    float32* const exchange = shared;
    const int out_tile = tiles.y_channels_inner ? warp * 4 + lane / 8 : lane;
    const int out_k = tiles.y_channels_inner ? lane % 8 : warp;
    const int index = block.tiles * TILES + out_tile;
    const Place<Index> at = place_of<OUT, Index>(min(index, tiles.count - 1), tiles);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half) __syncthreads();  // the first half has been read
#pragma unroll
        for (int q = 0; q < 2; ++q) {
#pragma unroll
            for (int e = 0; e < FRAGMENT; ++e) {
#pragma unroll
                for (int j = 0; j < THREAD; j += FRAGMENT) {
                    const float32(&row)[THREAD] = sum[q][half * FRAGMENT + e];
                    *reinterpret_cast<float4*>(
                        &exchange[exchanged(2 * warp + q, thread_m + e,
                                            j / FRAGMENT * (TILES / 2) + thread_n)]) =
                        make_float4(row[j], row[j + 1], row[j + 2], row[j + 3]);
                }
            }
        }
        __syncthreads();  // all positions are there
#pragma unroll 1
        for (int k0 = 0; k0 < HALF; k0 += 8) {
            const int row = k0 + out_k, k = block.filters * FILTERS + half * HALF + row;
            if (index >= tiles.count || k >= p.group_out) continue;
            float32 columns[IN][OUT];  // [j][i]
#pragma unroll
            for (int j = 0; j < IN; ++j) {
                float32 m[IN];
#pragma unroll
                for (int i = 0; i < IN; ++i) m[i] = exchange[exchanged(i * IN + j, row, out_tile)];
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
            store_tile(out, at, block.group * (int)p.group_out + k, x, w, bias, y, p, tiles);
        }
    }
}

// One filter of rank 1, w[r, s] = u[r] v[s], over a stack of images (N x 1 channel), in two passes.
//
//   mid[i, q]      = sum over s of  x[n, 0, i - pad, q + s - pad] * v[s]
//   y[n, 0, p, q]  = bias[0] + sum over r of  mid[p + r, q] * u[r]
//
// with x read beyond its edges as the boundary mode says: R + S products per output instead of R*S.
// Both passes are in one kernel, and mid is never in global memory.
//
// Mapping: a block of 32 x 8 threads computes one tile of TILE_H x TILE_W outputs of one image,
//
//     TILE_H = 8 * OUT_H       TILE_W = 32 * OUT_W
//     blockIdx.x = (n * tiles_h + tile_h) * tiles_w + tile_w
//     across:  warp ty makes rows ty, ty+8, ... of mid, lane tx its columns tx*OUT_W ... +OUT_W-1
//     down:    thread (tx, ty) makes the OUT_H rows from ty*OUT_H on of these columns
//
// Shared memory (dynamic; Tiling has pitch, w_pitch, columns):
//
//     ACC_T  u[u_pitch]   u_pitch = R up to a multiple of OUT_W
//     ACC_T  v[w_pitch]   w_pitch = S up to a multiple of OUT_W
//     ACC_T  tile[TILE_H + R - 1][pitch]
//
//         |<------- TILE_W ------->|<-- S-1 -->|
//         +------------------------+-----------+
//         | x, and after `across`  |    x      |  TILE_H
//         | mid in its place       |           |
//         |                        |           |  R - 1
//         +------------------------+-----------+
//
// mid takes the place of x, row by row: one warp reads all of a row, and then writes it.
//
// Macros:
//   X_T      a dtype's name, or any_dtype; real
//   Y_T      a dtype's name, or any_dtype
//   ACC_T    the sums', the factors' and the tile's: int64, uint64, float32, float64
//   INDEX_T  int32, or int64 where a row spans 2^31 elements or more (rows and images always may)
//   OUT_H    2 to 8 rows per thread
//   OUT_W    2 or 4 columns per thread: 16 bytes of the tile
//
// Launched by gpuconv/cuda_backend/separable.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DOUT_H=8 separable.cu

#ifndef X_T
#define X_T float32
#endif
#ifndef Y_T
#define Y_T float32
#endif
#ifndef ACC_T
#define ACC_T float32
#endif
#ifndef OUT_H
#define OUT_H 4
#endif
#ifndef OUT_W
#define OUT_W 4
#endif

#include "tile.cuh"

static_assert(is_element_or_any<X_T> && is_element_or_any<Y_T>, "X_T, Y_T: a dtype or any_dtype");
static_assert(is_one_of<ACC_T, int64, uint64, float32, float64>, "ACC_T: a real sum's type");
static_assert(OUT_H >= 2 && OUT_H <= 8, "OUT_H: 2 to 8");
static_assert(OUT_W * sizeof(ACC_T) == 16, "OUT_W: 16 bytes of sums");
static_assert(exchange_size<OUT_W, ACC_T>() <= OUT_H * 32 * OUT_W, "it is in the warp's own rows");

constexpr int BLOCK_W = 32, BLOCK_H = 8;
constexpr int TILE_H = BLOCK_H * OUT_H;
constexpr int TILE_W = BLOCK_W * OUT_W;
// Registers for this many blocks on a multiprocessor; more would make ptxas spill.
constexpr int MIN_BLOCKS = OUT_H > 4 ? 3 : 4;

template <int TAPS>
__device__ __forceinline__ void multiply_taps(ACC_T (&sum)[OUT_W], const ACC_T* window,
                                              const ACC_T* v) {
    ACC_T weights[OUT_W];
    load_vector(weights, v);
#pragma unroll
    for (int s = 0; s < TAPS; ++s) {
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) sum[j] = multiply_add(sum[j], window[j + s], weights[s]);
    }
}

// The sums of OUT_W neighbouring windows of a row.
__device__ __forceinline__ void across(ACC_T (&sum)[OUT_W], const ACC_T* row, const ACC_T* v,
                                       int filter_w) {
    ACC_T window[2 * OUT_W], more[OUT_W];
    load_vector(more, row);
#pragma unroll
    for (int j = 0; j < OUT_W; ++j) {
        sum[j] = ACC_T(0);
        window[j] = more[j];
    }
    int s = 0;
#pragma unroll 2
    for (; s + OUT_W <= filter_w; s += OUT_W) {
        load_vector(more, row + s + OUT_W);
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) window[OUT_W + j] = more[j];
        multiply_taps<OUT_W>(sum, window, v + s);
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) window[j] = window[OUT_W + j];
    }
    // A tap that the filter does not have is not a zero: it would spread a NaN or infinity.
    const int rest = filter_w - s;
    if (rest == 0) return;
    if (rest > 1) {
        load_vector(more, row + s + OUT_W);
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) window[OUT_W + j] = more[j];
    }
    if (rest == 1) {
        multiply_taps<1>(sum, window, v + s);
    } else if constexpr (OUT_W > 2) {
        if (rest == 2) {
            multiply_taps<2>(sum, window, v + s);
        } else {
            multiply_taps<3>(sum, window, v + s);
        }
    }
}

// column: the thread's first window, of rows `pitch` apart.
__device__ __forceinline__ void down(ACC_T (&sum)[OUT_H][OUT_W], const ACC_T* column,
                                     const ACC_T* u, int filter_h, int pitch) {
#pragma unroll
    for (int o = 0; o < OUT_H; ++o) {
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) sum[o][j] = ACC_T(0);
    }
    const int rows = filter_h + OUT_H - 1;
    int i = 0;
    while (i < rows) {
        if (i >= OUT_H - 1 && i + OUT_H <= filter_h) {
            // OUT_H rows of mid that all output rows see: weights u[i-OUT_H+1 ... i+OUT_H-1].
            ACC_T weights[2 * OUT_H - 1];
#pragma unroll
            for (int k = 0; k < 2 * OUT_H - 1; ++k) weights[k] = u[i - OUT_H + 1 + k];
#pragma unroll
            for (int k = 0; k < OUT_H; ++k) {
                ACC_T mid[OUT_W];
                load_vector(mid, column + (i + k) * pitch);
#pragma unroll
                for (int o = 0; o < OUT_H; ++o) {
#pragma unroll
                    for (int j = 0; j < OUT_W; ++j) {
                        sum[o][j] = multiply_add(sum[o][j], mid[j], weights[k - o + OUT_H - 1]);
                    }
                }
            }
            i += OUT_H;
        } else {
            ACC_T mid[OUT_W];
            load_vector(mid, column + i * pitch);
#pragma unroll
            for (int o = 0; o < OUT_H; ++o) {
                if (i - o >= 0 && i - o < filter_h) {
                    const ACC_T weight = u[i - o];
#pragma unroll
                    for (int j = 0; j < OUT_W; ++j) {
                        sum[o][j] = multiply_add(sum[o][j], mid[j], weight);
                    }
                }
            }
            ++i;
        }
    }
}

// u, v: the factors, R and S contiguous elements.
extern "C" __global__ void __launch_bounds__(BLOCK_W* BLOCK_H, MIN_BLOCKS)
separable(const X_T* __restrict__ x, const ACC_T* __restrict__ u_factor,
          const ACC_T* __restrict__ v_factor, const void* __restrict__ bias, Y_T* __restrict__ y,
          const Problem p, const Tiling t) {
    typedef INDEX_T Index;
    extern __shared__ __align__(16) ACC_T shared[];
    const int filter_h = (int)p.filter[AXIS_H], filter_w = (int)p.filter[AXIS_W];
    ACC_T* const v = shared;
    ACC_T* const u = v + t.w_pitch;
    ACC_T* const tile = u + (filter_h + OUT_W - 1) / OUT_W * OUT_W;

    const int tx = threadIdx.x % BLOCK_W, ty = threadIdx.x / BLOCK_W;
    Index rest = (Index)blockIdx.x;
    const Index out_w0 = split_off(rest, t.tiles_w) * TILE_W;
    const Index out_h0 = split_off(rest, t.tiles_h) * TILE_H;
    const Index n = rest;
    const int rows = TILE_H + filter_h - 1;

    copy_tile<BLOCK_W, BLOCK_H>(tile, x, n * p.x_strides[0],
                                out_h0 - (Index)p.pad_lo[AXIS_H],
                                out_w0 - (Index)p.pad_lo[AXIS_W], rows, p, t, tx, ty);
    cp_async_commit();
    for (int s = threadIdx.x; s < t.w_pitch; s += BLOCK_W * BLOCK_H) {
        v[s] = s < filter_w ? v_factor[s] : ACC_T(0);
    }
    for (int r = threadIdx.x; r < filter_h; r += BLOCK_W * BLOCK_H) u[r] = u_factor[r];
    cp_async_wait<0>();
    __syncthreads();  // the tile and the factors are there

    for (int i = ty; i < rows; i += BLOCK_H) {
        ACC_T sum[OUT_W];
        across(sum, tile + i * t.pitch + tx * OUT_W, v, filter_w);
        __syncwarp();  // the whole row has been read
        store_vector(tile + i * t.pitch + tx * OUT_W, sum);
    }
    __syncthreads();  // mid is there

    ACC_T sum[OUT_H][OUT_W];
    down(sum, tile + ty * OUT_H * t.pitch + tx * OUT_W, u, filter_h, t.pitch);

    // Each warp trades its sums in rows of the tile that were its own.
    if (!(t.flags & TILE_STORE_VECTORS)) __syncthreads();  // no thread reads mid any more
    write_rows<ACC_T>(y, sum, n, out_h0 + ty * OUT_H, out_w0, bias, p, t,
                      tile + ty * OUT_H * t.pitch);
}

// One filter over a stack of images (N x 1 channel), the whole window in shared memory.
//
//   y[n, 0, p, q] = bias[0] + sum over r, s of
//       x[n, 0, p*stride + r*dilation - pad, q*... ] * w[0, 0, r, s]
//
// with x read beyond its edges as the boundary mode says. Sums run over r, then s, in every variant:
// tiles change no bits.
//
// Mapping: a block computes one tile of TILE_H x TILE_W outputs of one image,
//
//     TILE_H = BLOCK_H * OUT_H       TILE_W = BLOCK_W * OUT_W
//     blockIdx.x = (n * tiles_h + tile_h) * tiles_w + tile_w
//     thread (tx, ty): the OUT_H rows from ty*OUT_H on, the OUT_W columns from tx*OUT_W on
//
// A thread reads each row of its window once, in loads of OUT_W elements, and uses it for all of
// its output rows that see it: input row i meets filter row i - o for output row o.
//
//     input row i   a b c d e f ...        OUT_W + S - 1 elements
//       -> sum[o=0][0..OUT_W-1] += w[i,   s] * (a b c d)[s...]
//       -> sum[o=1][0..OUT_W-1] += w[i-1, s] * ...                    ... OUT_H
//
// FILTER = 3, 5, 7: the filter is in registers, all loops are unrolled. FILTER = 0, any size: OUT_W
// taps at a time, their weights broadcast from shared memory, the window sliding along the row.
// STEPPED, any stride and dilation. A thread's columns are BLOCK_W apart, so that its neighbours'
// are its columns' neighbours, and column j of the window is at [j % stride][j / stride] of a row of
// the tile: at every tap a warp reads neighbouring words, whatever the stride. An element that is
// read serves all of the thread's output rows that see it. For that to be many under a dilation, a
// tile's output rows are `classes` = dilation / gcd(stride, dilation) apart: then all of their
// windows are in input rows `dilation` apart, `row_step` = stride / gcd from one to the next,
//
//     tile row i meets filter row i - o*row_step for output row o
//     blockIdx.x = (n * tiles_h + tile_h * classes + row_class) * tiles_w + tile_w
//     thread (tx, ty): rows (tile_h*TILE_H + ty*OUT_H + o) * classes + row_class, columns tx + 32*j
//
// Shared memory (dynamic; Tiling has slab, pitch, w_pitch, columns):
//
//     int32    offsets[w_pitch]             of the taps in a row of the tile (STEPPED)
//     SUM_T    weights[slab][w_pitch]       rows r0 ... r0+slab-1 of w; where FILTER = 0
//              weights[w_pitch/OUT_W][slab][OUT_W], so that rows are a fixed distance apart
//     SUM_T    exchange[warps][...]         a warp's sums on their way to y (not STEPPED)
//     STAGE_T  tile[(TILE_H-1)*row_step + slab][pitch]
//
//        column0 = tile_w*TILE_W*stride - pad
//         |<------------------ columns ------------------>|  pitch
//         +-----------------------------------------------+--+
//         | rows of x that outputs of the tile see through |  |  row0 + r0*dilation + i*dilation
//         | filter rows r0 ... r0 + slab - 1               |  |
//         +-----------------------------------------------+--+
//
// A filter whose window does not fit is applied in slabs of rows, one after the other.
//
// Macros:
//   X_T      float32, float64, float16, bfloat16, int8, int16, uint8; or any_dtype (then STAGE_T is
//            SUM_T)
//   STAGE_T  the tile's type: X_T, or SUM_T
//   SUM_T    what products are summed in: ACC_T, or int32 where the types prove that exact
//   ACC_T    what the bias is added in: int64, uint64, float32, float64
//   Y_T      a dtype's name, or any_dtype
//   INDEX_T  int32, or int64 where a row spans 2^31 elements or more (rows and images always may)
//   FILTER   0 for any, or 3, 5, 7: both extents
//   OUT_H    1 to 8 rows per thread
//   OUT_W    2 or 4 columns per thread
//   BLOCK_W  32 to 256, a multiple of 32: threads along W
//   BLOCK_H  1 to 8: threads along H; BLOCK_W * BLOCK_H = 256
//   STEPPED  0: strides and dilations are 1; 1: any (with FILTER = 0)
// The types of w and bias are told at run time: each weight is converted once per block.
//
// Launched by gpuconv/cuda_backend/filter2d.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DFILTER=5 filter2d.cu

#ifndef X_T
#define X_T float32
#endif
#ifndef STAGE_T
#define STAGE_T X_T
#endif
#ifndef SUM_T
#define SUM_T float32
#endif
#ifndef ACC_T
#define ACC_T SUM_T
#endif
#ifndef Y_T
#define Y_T float32
#endif
#ifndef FILTER
#define FILTER 0
#endif
#ifndef OUT_H
#define OUT_H 4
#endif
#ifndef OUT_W
#define OUT_W 4
#endif
#ifndef BLOCK_W
#define BLOCK_W 32
#endif
#ifndef BLOCK_H
#define BLOCK_H 8
#endif
#ifndef STEPPED
#define STEPPED 0
#endif

#include "tile.cuh"

static_assert(is_element_or_any<X_T> && is_element_or_any<Y_T>, "X_T, Y_T: a dtype or any_dtype");
static_assert(Same<STAGE_T, X_T>::value || Same<STAGE_T, SUM_T>::value, "STAGE_T: X_T or SUM_T");
static_assert(Same<SUM_T, ACC_T>::value || Same<SUM_T, int32>::value, "SUM_T: ACC_T or int32");
static_assert(is_one_of<ACC_T, int64, uint64, float32, float64>, "ACC_T: a real sum's type");
static_assert(FILTER == 0 || FILTER == 3 || FILTER == 5 || FILTER == 7, "FILTER: 0, 3, 5 or 7");
static_assert(OUT_H >= 1 && OUT_H <= 8, "OUT_H: 1 to 8");
static_assert(OUT_W == 2 || OUT_W == 4, "OUT_W: 2 or 4");
static_assert(OUT_W * sizeof(STAGE_T) <= 16, "OUT_W elements of the tile are one load");
static_assert(BLOCK_W % 32 == 0 && BLOCK_W * BLOCK_H == 256, "a block has 256 threads");
static_assert(STEPPED == 0 || (STEPPED == 1 && FILTER == 0), "STEPPED: 0, or 1 with FILTER = 0");

constexpr int TILE_H = BLOCK_H * OUT_H;
constexpr int TILE_W = BLOCK_W * OUT_W;
constexpr int WARPS = BLOCK_W * BLOCK_H / 32;
constexpr int EXCHANGE = STEPPED ? 0 : exchange_size<OUT_W, SUM_T>();

// Registers for this many blocks on a multiprocessor; more would make ptxas spill.
constexpr int SUM_REGISTERS = OUT_H * OUT_W * (int)sizeof(SUM_T) / 4;
constexpr int WEIGHT_REGISTERS = FILTER * FILTER * (int)sizeof(SUM_T) / 4;
// STEPPED, the taps' addresses and windows take as many again.
constexpr bool LIGHT = SUM_REGISTERS * (STEPPED ? 2 : 1) + WEIGHT_REGISTERS <= 28;
// For sm_80 ptxas fits signed bytes in 64-bit sums into two blocks, but spills if it is told to.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool UNTOLD = Same<STAGE_T, int8>::value && SUM_REGISTERS >= 64;
#else
constexpr bool UNTOLD = false;
#endif
constexpr int MIN_BLOCKS = LIGHT && sizeof(INDEX_T) == 4                         ? 4
                           : LIGHT || (SUM_REGISTERS <= 16 && WEIGHT_REGISTERS <= 32) ? 3
                           : UNTOLD                                                   ? 1
                                                                                      : 2;

template <bool Narrow>
struct Window {
    typedef int32 type;
};
template <>
struct Window<false> {
    typedef SUM_T type;
};
// An element of the window in registers: small integers stay narrow until they are multiplied.
typedef Window<is_integer<STAGE_T> && sizeof(STAGE_T) <= 2 && is_integer<SUM_T>>::type WINDOW_T;

__device__ __forceinline__ SUM_T product_added(SUM_T sum, WINDOW_T x, SUM_T w) {
    if constexpr (Same<SUM_T, int32>::value) {
        return sum + x * w;
    } else {
        return multiply_add<SUM_T>(sum, (SUM_T)x, w);
    }
}

#if !STEPPED

// OUT_W neighbours of a row of the tile.
__device__ __forceinline__ void load_window(WINDOW_T* window, const STAGE_T* tile) {
    STAGE_T values[OUT_W];
    load_vector(values, tile);
#pragma unroll
    for (int j = 0; j < OUT_W; ++j) window[j] = convert<WINDOW_T>(values[j]);
}

#endif

#if FILTER > 0

// tile: the first element of the thread's window.
__device__ __forceinline__ void accumulate(SUM_T (&sum)[OUT_H][OUT_W], const SUM_T* weights,
                                           const STAGE_T* tile, int rows, const Problem& p,
                                           const Tiling& t) {
    constexpr int W_PITCH = (FILTER + OUT_W - 1) / OUT_W * OUT_W;  // t.w_pitch
    SUM_T w[FILTER][W_PITCH];
#pragma unroll
    for (int r = 0; r < FILTER; ++r) load_vector(w[r], weights + r * W_PITCH);
    constexpr int LOADS = (OUT_W + FILTER - 1 + OUT_W - 1) / OUT_W;
#pragma unroll
    for (int i = 0; i < OUT_H + FILTER - 1; ++i) {
        WINDOW_T window[LOADS * OUT_W];
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
            load_window(window + l * OUT_W, tile + i * t.pitch + l * OUT_W);
        }
#pragma unroll
        for (int o = 0; o < OUT_H; ++o) {
            const int r = i - o;
            if (r >= 0 && r < FILTER) {
#pragma unroll
                for (int s = 0; s < FILTER; ++s) {
#pragma unroll
                    for (int j = 0; j < OUT_W; ++j) {
                        sum[o][j] = product_added(sum[o][j], window[j + s], w[r][s]);
                    }
                }
            }
        }
    }
}

#elif !STEPPED

// TAPS taps of every filter row that meets one input row: `weights` is where filter row i would be,
// output row o sees row i - o, OUT_W weights before; those from `first` to `last` see one at all.
// window: OUT_W + TAPS - 1 elements.
template <int TAPS, bool ALL>
__device__ __forceinline__ void multiply_row(SUM_T (&sum)[OUT_H][OUT_W], const WINDOW_T* window,
                                             const SUM_T* weights, int first, int last) {
#pragma unroll
    for (int o = 0; o < OUT_H; ++o) {
        if (ALL || (o >= first && o <= last)) {
            SUM_T w[OUT_W];
            load_vector(w, weights - o * OUT_W);
#pragma unroll
            for (int s = 0; s < TAPS; ++s) {
#pragma unroll
                for (int j = 0; j < OUT_W; ++j) {
                    sum[o][j] = product_added(sum[o][j], window[j + s], w[s]);
                }
            }
        }
    }
}

template <bool ALL>
__device__ __forceinline__ void slide_along(SUM_T (&sum)[OUT_H][OUT_W], const STAGE_T* row,
                                            const SUM_T* weights, int filter_w, int first,
                                            int last, int slab) {
    WINDOW_T window[2 * OUT_W];
    load_window(window, row);
    int s = 0;
#pragma unroll 1
    for (; s + OUT_W <= filter_w; s += OUT_W) {
        load_window(window + OUT_W, row + s + OUT_W);
        multiply_row<OUT_W, ALL>(sum, window, weights, first, last);
        weights += slab * OUT_W;
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) window[j] = window[OUT_W + j];
    }
    // A tap that the filter does not have is not a zero: it would spread a NaN or infinity.
    const int rest = filter_w - s;
    if (rest == 0) return;
    if (rest > 1) load_window(window + OUT_W, row + s + OUT_W);
    if (rest == 1) {
        multiply_row<1, ALL>(sum, window, weights, first, last);
    } else if constexpr (OUT_W > 2) {
        if (rest == 2) {
            multiply_row<2, ALL>(sum, window, weights, first, last);
        } else {
            multiply_row<3, ALL>(sum, window, weights, first, last);
        }
    }
}

__device__ __forceinline__ void accumulate(SUM_T (&sum)[OUT_H][OUT_W], const SUM_T* weights,
                                           const STAGE_T* tile, int rows, const Problem& p,
                                           const Tiling& t) {
    const int filter_w = (int)p.filter[AXIS_W];
#pragma unroll 1
    for (int i = 0; i < rows + OUT_H - 1; ++i) {
        const int first = max(i - rows + 1, 0), last = min(i, OUT_H - 1);
        const STAGE_T* row = tile + i * t.pitch;
        const SUM_T* filter_row = weights + i * OUT_W;
        if (first == 0 && last == OUT_H - 1) {
            slide_along<true>(sum, row, filter_row, filter_w, first, last, t.slab);
        } else {
            slide_along<false>(sum, row, filter_row, filter_w, first, last, t.slab);
        }
    }
}

#else

// OUT_W taps of one input row, of which TAPS are the filter's: tap s of the thread's windows begins
// at row[offsets[s]], its columns are BLOCK_W apart. weights: where filter row i would be; output
// row o sees row i - o*step of `rows`.
template <int TAPS, bool ALL>
__device__ __forceinline__ void multiply_taps(SUM_T (&sum)[OUT_H][OUT_W], const STAGE_T* row,
                                              const int32* offsets, const SUM_T* weights, int i,
                                              int rows, int step) {
    int32 at[OUT_W];
    load_vector(at, offsets);
    WINDOW_T window[TAPS][OUT_W];
#pragma unroll
    for (int s = 0; s < TAPS; ++s) {
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) window[s][j] = convert<WINDOW_T>(row[at[s] + j * BLOCK_W]);
    }
#pragma unroll
    for (int o = 0; o < OUT_H; ++o) {
        if (ALL || (uint32)(i - o * step) < (uint32)rows) {
            SUM_T w[OUT_W];
            load_vector(w, weights - o * step * OUT_W);
#pragma unroll
            for (int s = 0; s < TAPS; ++s) {
#pragma unroll
                for (int j = 0; j < OUT_W; ++j) {
                    sum[o][j] = product_added(sum[o][j], window[s][j], w[s]);
                }
            }
        }
    }
}

template <bool ALL>
__device__ __forceinline__ void multiply_row(SUM_T (&sum)[OUT_H][OUT_W], const STAGE_T* row,
                                             const int32* offsets, const SUM_T* weights,
                                             int filter_w, int i, int rows, const Tiling& t) {
    int s = 0;
#pragma unroll 1
    for (; s + OUT_W <= filter_w; s += OUT_W) {
        multiply_taps<OUT_W, ALL>(sum, row, offsets + s, weights, i, rows, t.row_step);
        weights += t.slab * OUT_W;
    }
    // A tap that the filter does not have is not a zero: it would spread a NaN or infinity.
    const int rest = filter_w - s;
    if (rest == 0) return;
    if (rest == 1) {
        multiply_taps<1, ALL>(sum, row, offsets + s, weights, i, rows, t.row_step);
    } else if constexpr (OUT_W > 2) {
        if (rest == 2) {
            multiply_taps<2, ALL>(sum, row, offsets + s, weights, i, rows, t.row_step);
        } else {
            multiply_taps<3, ALL>(sum, row, offsets + s, weights, i, rows, t.row_step);
        }
    }
}

__device__ __forceinline__ void accumulate(SUM_T (&sum)[OUT_H][OUT_W], const SUM_T* weights,
                                           const STAGE_T* tile, int rows, const Problem& p,
                                           const Tiling& t) {
    const int filter_w = (int)p.filter[AXIS_W];
    const int32* const offsets = reinterpret_cast<const int32*>(weights) - t.w_pitch;
    const int reach = t.row_step * (OUT_H - 1);
#pragma unroll 1
    for (int i = 0; i < rows + reach; ++i) {
        const STAGE_T* row = tile + i * t.pitch;
        const SUM_T* filter_row = weights + i * OUT_W;
        if (i >= reach && i < rows) {
            multiply_row<true>(sum, row, offsets, filter_row, filter_w, i, rows, t);
        } else {
            multiply_row<false>(sum, row, offsets, filter_row, filter_w, i, rows, t);
        }
    }
}

#endif

extern "C" __global__ void __launch_bounds__(BLOCK_W* BLOCK_H, MIN_BLOCKS)
filter2d(const X_T* __restrict__ x, const void* __restrict__ w, const void* __restrict__ bias,
         Y_T* __restrict__ y, const Problem p, const Tiling t) {
    typedef INDEX_T Index;
    extern __shared__ __align__(16) unsigned char shared[];
    int32* const offsets = reinterpret_cast<int32*>(shared);
    SUM_T* const weights = reinterpret_cast<SUM_T*>(offsets + (STEPPED ? t.w_pitch : 0));
    SUM_T* const exchange = weights + t.slab * t.w_pitch;
    // EXCHANGE is a multiple of 16 bytes: 128 or 256 elements, and one more for each 128 bytes.
    STAGE_T* const tile = reinterpret_cast<STAGE_T*>(exchange + WARPS * EXCHANGE);

    const int tx = threadIdx.x % BLOCK_W, ty = threadIdx.x / BLOCK_W;
    Index rest = (Index)blockIdx.x;
    const Index out_w0 = split_off(rest, t.tiles_w) * TILE_W;
    const Index tile_h = split_off(rest, t.tiles_h);
    const Index n = rest;
    const int classes = STEPPED ? t.classes : 1;
    const Index row_class = STEPPED ? tile_h % classes : 0;
    const Index out_h0 = (STEPPED ? tile_h / classes : tile_h) * TILE_H * classes + row_class;

    SUM_T sum[OUT_H][OUT_W];
#pragma unroll
    for (int o = 0; o < OUT_H; ++o) {
#pragma unroll
        for (int j = 0; j < OUT_W; ++j) sum[o][j] = SUM_T(0);
    }

    const int filter_h = (int)p.filter[AXIS_H], filter_w = (int)p.filter[AXIS_W];
    const int stride_h = STEPPED ? (int)p.stride[AXIS_H] : 1;
    const int stride_w = STEPPED ? (int)p.stride[AXIS_W] : 1;
    const int dilation_h = STEPPED ? (int)p.dilation[AXIS_H] : 1;
    const int row_step = STEPPED ? t.row_step : 1;
    const Index row0 = out_h0 * stride_h - (Index)p.pad_lo[AXIS_H];
    const Index column0 = out_w0 * stride_w - (Index)p.pad_lo[AXIS_W];
    for (int r0 = 0; r0 < filter_h; r0 += t.slab) {
        const int rows = min(t.slab, filter_h - r0);
        if (r0 > 0) __syncthreads();  // every thread is done with the slab before
        const Index first = row0 + (Index)r0 * dilation_h;
        const int seen = (TILE_H - 1) * row_step + rows;
        if (STEPPED && stride_w > 1) {
            copy_phases<BLOCK_W, BLOCK_H>(tile, x, n * p.x_strides[0], first, column0, seen, p, t,
                                          tx, ty, dilation_h, stride_w);
        } else {
            copy_tile<BLOCK_W, BLOCK_H>(tile, x, n * p.x_strides[0], first, column0, seen, p, t,
                                        tx, ty, dilation_h);
        }
        cp_async_commit();
        if (STEPPED) {
            for (int s = threadIdx.x; s < t.w_pitch; s += BLOCK_W * BLOCK_H) {
                const int tap = s * (int)p.dilation[AXIS_W];
                offsets[s] = tap % stride_w * t.phase_pitch + tap / stride_w;
            }
        }
        for (int r = ty; r < rows; r += BLOCK_H) {
            for (int s = tx; s < t.w_pitch; s += BLOCK_W) {
                const Index at = (Index)p.w_offset + (r0 + r) * (Index)p.w_strides[3] +
                                 s * (Index)p.w_strides[4];
                const int tap = FILTER == 0 ? (s / OUT_W * t.slab + r) * OUT_W + s % OUT_W
                                            : r * t.w_pitch + s;
                weights[tap] =
                    s < filter_w ? load<SUM_T>(w, at, p.w_dtype) : SUM_T(0);
            }
        }
        cp_async_wait<0>();
        __syncthreads();  // the tile and the weights are there
        const int column = STEPPED ? tx : tx * OUT_W;
        accumulate(sum, weights, tile + ty * OUT_H * row_step * t.pitch + column, rows, p, t);
    }

    if constexpr (STEPPED) {
        const Bias<ACC_T> added(bias, p);
        const Index height = (Index)p.output[AXIS_H], width = (Index)p.output[AXIS_W];
#pragma unroll
        for (int o = 0; o < OUT_H; ++o) {
            const Index out_h = out_h0 + (Index)(ty * OUT_H + o) * classes;
            const int64 y_row = n * p.y_strides[0] + out_h * p.y_strides[3];
#pragma unroll
            for (int j = 0; j < OUT_W; ++j) {
                const Index out_w = out_w0 + tx + j * BLOCK_W;
                if (out_h < height && out_w < width) {
                    store(y, y_row + out_w * (Index)p.y_strides[4], p.y_dtype,
                          added.add_to(sum[o][j]));
                }
            }
        }
    } else {
        write_rows<ACC_T>(y, sum, n, out_h0 + ty * OUT_H, out_w0 + (Index)(tx / 32 * 32 * OUT_W),
                          bias, p, t, exchange + threadIdx.x / 32 * EXCHANGE);
    }
}

// Convolution as a matrix product whose right factor is never written down.
//
//   y[m, n] = bias[m] + sum over k of  w[m, k] * x[k, n]
//       m  output channel of the group          0 ... K/G - 1
//       n  output pixel of the batch            ((image*Z + z)*P + p)*Q + q
//       k  input channel and tap                0 ... C/G*T*R*S - 1
//       x[k, n] = x[image, c, z*stride + t*dilation - pad, p*..., q*...], beyond the edges as the
//                 boundary mode says
//
// The order of k, and with it of every sum, follows the memory order that x is expected in (any
// strides are read):
//   CHANNELS_INNER 0 (NCHW)        k = ((c*T + t)*R + r)*S + s
//       the lanes of a warp load neighbouring pixels, one tap at a time; where each tap of a tile
//       lies is worked out once per block, by TILE_K threads, into `taps`
//   CHANNELS_INNER 1 (NHWC)        k = (((c/TILE_K*T + t)*R + r)*S + s)*TILE_K + c%TILE_K
//       a lane loads 16 bytes of neighbouring channels; a tile is one tap of TILE_K channels, so
//       that the taps of a pixel's channels are read one after the other, while they are in L1
//
// Mapping: a block computes TILE_M x TILE_N sums of one group, over one share ("split") of k.
//   blockIdx.x = ((split*G + group)*pixel_tiles + pixel tile)*row_tiles + row tile
// so that blocks which run together read the same pixels. Splits write their sums to separate
// arrays (y is then a workspace), which split_sum.cu adds up in order.
//
// A thread computes THREAD_M x THREAD_N sums, in fragments of 16 bytes; a warp is 8 x 4 threads:
//
//            THREADS_N * FRAGMENT          lane:  0  1 16 17     of 8 neighbours (a quarter warp,
//          +---------+---------+                  2  3 18 19     which shared memory serves at
//          | thread  | the same|                  4  5 20 21     once) 4 read different words of w
//          | n tn*4  | threads |  TILE_M          6  7 22 23     and 2 of x: 16-byte reads without
//          +---------+---------+                 ...             a bank conflict
//          |   ...   |   ...   |                 14 15 30 31
//          +---------+---------+
//                TILE_N
//
// Shared memory, all of it twice: tile i+1 is in registers on its way from global memory while
// tile i is multiplied, and goes to the other buffer; one barrier per tile.
//
//   w_tile [2][TILE_K*TILE_M + gaps]     element (k, m) at k*TILE_M + gap(k) + m
//   x_tile [2][TILE_K*TILE_N + gaps]     element (k, n) at k*TILE_N + gap(k) + n
//   taps, w_taps [2][TAPS]               where the elements of a tile lie in x and w
//
//   A row of a tile's source (one m, TILE_K neighbouring k) is loaded by PIECES lanes, 16 bytes
//   each, and stored as a column. The gaps send the pieces of a row to different banks. Of float32,
//   with 2 pieces:
//       lane      0  1   2  3   4  5 ...          k = 0 ... 3  | TILE_M elements | x4
//       row m     0      1      2                              | gap of 16       |
//       k         0  4   0  4   0  4              k = 4 ... 7  | TILE_M elements | x4
//       bank      0 16   1 17   2 18
//
// Macros:
//   X_T, W_T, B_T, Y_T  float16, bfloat16, float32, float64 or complex64; X_T and W_T are the same
//   ACC_T               float32, float64 or complex64
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
//   CHANNELS_INNER      0 or 1, see above
//   TILE_M, TILE_N      multiples of 8*THREAD_M and 4*THREAD_N, and of 32
//   TILE_K              a multiple of 16/sizeof(X_T); it decides the order of sums where
//                       CHANNELS_INNER is 1, and is the same for all tiles of a type
//   THREAD_M, THREAD_N  multiples of 16/sizeof(ACC_T)
//
// Launched by gpuconv/cuda_backend/implicit_gemm.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DTILE_M=64 -DTILE_N=64 -DTHREAD_N=4 implicit_gemm.cu

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
#ifndef ACC_T
#define ACC_T float32
#endif
#ifndef CHANNELS_INNER
#define CHANNELS_INNER 0
#endif
#ifndef TILE_M
#define TILE_M 128
#endif
#ifndef TILE_N
#define TILE_N 128
#endif
#ifndef TILE_K
#define TILE_K 8
#endif
#ifndef THREAD_M
#define THREAD_M 8
#endif
#ifndef THREAD_N
#define THREAD_N 8
#endif

#include "boundary.cuh"
#include "epilogue.cuh"
#include "implicit_gemm.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(is_floating<X_T> || Same<X_T, complex64>::value, "X_T: a float, or complex64");
static_assert(Same<X_T, W_T>::value, "W_T: as X_T");
static_assert(is_floating<Y_T> || Same<Y_T, complex64>::value, "Y_T: a float, or complex64");
static_assert(is_one_of<ACC_T, float32, float64, complex64>, "ACC_T: a type that sums are made in");
static_assert(CHANNELS_INNER == 0 || CHANNELS_INNER == 1, "CHANNELS_INNER: 0 or 1");

constexpr int THREADS_M = TILE_M / THREAD_M, THREADS_N = TILE_N / THREAD_N;
constexpr int BLOCK = THREADS_M * THREADS_N;
constexpr int WARPS_M = THREADS_M / 8;
constexpr int VECTOR = 16 / sizeof(X_T);      // elements of a global load
constexpr int PIECES = TILE_K / VECTOR;       // such loads along k of a tile
constexpr int FRAGMENT = 16 / sizeof(ACC_T);  // sums beside each other; elements of a shared load
constexpr int BANK_ROW = 128 / sizeof(ACC_T);  // elements across all banks
constexpr int ROWS = BLOCK / PIECES;          // rows of pieces that the block loads at once
constexpr int W_LOADS = (TILE_M + ROWS - 1) / ROWS;
constexpr int X_LOADS = CHANNELS_INNER ? TILE_N / ROWS : TILE_K * TILE_N / BLOCK;
constexpr int GAPS = (PIECES - 1) * (BANK_ROW / PIECES);
constexpr int TAPS = CHANNELS_INNER ? 1 : TILE_K;  // of one tile
constexpr int X_STEP = CHANNELS_INNER ? 1 : BLOCK / TILE_N;  // from one k of a thread to its next

static_assert(TILE_M % (8 * THREAD_M) == 0 && TILE_M % 32 == 0, "TILE_M: whole warps");
static_assert(TILE_N % (4 * THREAD_N) == 0 && TILE_N % 32 == 0, "TILE_N: whole warps");
static_assert(BLOCK >= 32 && BLOCK <= 1024, "TILE_M, TILE_N: 1 to 32 warps");
static_assert(TILE_K % VECTOR == 0 && BANK_ROW % PIECES == 0 && BANK_ROW / PIECES >= FRAGMENT,
              "TILE_K: whole vectors, few enough to lie in different banks");
static_assert(THREAD_M % FRAGMENT == 0 && THREAD_N % FRAGMENT == 0,
              "THREAD_M, THREAD_N: whole fragments");
static_assert(CHANNELS_INNER ? TILE_N % ROWS == 0 : BLOCK % TILE_N == 0 && TILE_K % X_STEP == 0,
              "TILE_N: the loads of x divide evenly among the threads");

// Blocks of a multiprocessor that the registers are shared among: enough warps to hide the barrier
// of one block behind another, few enough for no spill.
constexpr int SUM_WORDS = THREAD_M * THREAD_N * (int)sizeof(ACC_T) / 4;
constexpr int REGISTERS = sizeof(INDEX_T) == 8 ? 168
                          : SUM_WORDS < 64     ? 102
                          : sizeof(ACC_T) == 4 ? 128
                                               : 168;
constexpr int MIN_BLOCKS = 65536 / REGISTERS / BLOCK > 8 ? 8 : 65536 / REGISTERS / BLOCK;

// What the launch decides beside the problem. implicit_gemm.TILING is the same struct in NumPy.
struct Tiling {
    Divisor row_tiles, pixel_tiles, groups;
    int64 split_stride;  // elements of y from one split's sums to the next's
    int32 k_tiles;       // tiles of TILE_K that cover k
    int32 split_tiles;   // of them in one split
    int32 w_vector;      // whether 16 bytes of w along k can be loaded at once
    int32 x_vector;      // CHANNELS_INNER: whether 16 bytes of x along c can be
    int32 y_vector;      // STORE_...
};
static_assert(sizeof(Tiling) == 80, "implicit_gemm.TILING mirrors this");

enum : int { STORE_ELEMENTS, STORE_PIXELS, STORE_CHANNELS };  // what FRAGMENT neighbours in y are

// One k of a tile: how far its element of x lies from tap (0, 0, 0) of channel 0, and of which tap.
struct __align__(16) Tap {
    INDEX_T offset, d, h, w;
};

struct Place {
    INDEX_T pixel0;
    int row0, group, split;
};
struct __align__(16) Loaded {  // by one instruction
    X_T element[VECTOR];
};
struct __align__(16) Fragment {
    ACC_T element[FRAGMENT];
};
struct __align__(FRAGMENT * sizeof(Y_T)) Stored {
    Y_T element[FRAGMENT];
};

__device__ __forceinline__ constexpr int gap(int k) { return k / VECTOR * (BANK_ROW / PIECES); }

// VECTOR elements along k, of which the first `live` exist: 16 bytes at `at`, or element e at
// at + step(e), and zeros for the rest.
template <class Index, class Step>
__device__ __forceinline__ Loaded load_piece(const X_T* __restrict__ array, Index at, int live,
                                             bool vector, Step step) {
    Loaded piece;
    if (vector) {
        if (live > 0) return *reinterpret_cast<const Loaded*>(array + at);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) piece.element[e] = convert<X_T>(0.0f);
        return piece;
    }
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
        piece.element[e] = e < live ? array[at + step(e)] : convert<X_T>(0.0f);
    }
    return piece;
}

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
implicit_gemm(const X_T* __restrict__ x, const W_T* __restrict__ w, const B_T* __restrict__ bias,
              Y_T* __restrict__ y, const Problem p, const Tiling tiling) {
    typedef INDEX_T Index;
    __shared__ __align__(16) ACC_T w_tile[2][TILE_K * TILE_M + GAPS];
    __shared__ __align__(16) ACC_T x_tile[2][TILE_K * TILE_N + GAPS];
    __shared__ __align__(16) Tap taps[2][TAPS];
    __shared__ Index w_taps[2][TAPS];
    __shared__ int lives[2];  // the k of a tile that exist
    const int thread = threadIdx.x;

    // ---- which tile this block computes
    int rest = blockIdx.x;
    const int row0 = split_off(rest, tiling.row_tiles) * TILE_M;
    const Index pixel0 = (Index)split_off(rest, tiling.pixel_tiles) * TILE_N;
    const int group = split_off(rest, tiling.groups);
    const int split = rest;
    // For the end, when these have made room for sums: registers are what this kernel lacks.
    __shared__ Place place;
    if (thread == 0) place = Place{pixel0, row0, group, split};
    const int first_tile = split * tiling.split_tiles;
    const int end_tile = min(first_tile + tiling.split_tiles, tiling.k_tiles);
    const Index pixels = (Index)p.batch * (Index)p.output[AXIS_D] * (Index)p.output[AXIS_H] *
                         (Index)p.output[AXIS_W];
    const int group_in = (int)p.group_in, group_out = (int)p.group_out;
    const int filter_d = (int)p.filter[AXIS_D], filter_h = (int)p.filter[AXIS_H],
              filter_w = (int)p.filter[AXIS_W];

    // ---- what this thread loads of w: pieces of VECTOR k of the rows load_row + i*ROWS
    const int load_row = thread / PIECES, load_k = thread % PIECES * VECTOR;
    // Rows past the end repeat the last, pixels past the end the first: nobody stores their sums.
    Index w_row[W_LOADS];
#pragma unroll
    for (int i = 0; i < W_LOADS; ++i) {
        const int row = group * group_out + min(row0 + load_row + i * ROWS, group_out - 1);
        w_row[i] = (Index)p.w_offset + row * (Index)p.w_strides[0];
    }

    // ---- what it loads of x: pieces of VECTOR channels of X_LOADS pixels, or X_LOADS k of one
    constexpr int LOAD_PIXELS = CHANNELS_INNER ? X_LOADS : 1;
    Index x_pixel[LOAD_PIXELS];  // offset of tap (0, 0, 0), which may lie beyond the edge
    Index x_d[LOAD_PIXELS], x_h[LOAD_PIXELS], x_w[LOAD_PIXELS];
#pragma unroll
    for (int i = 0; i < LOAD_PIXELS; ++i) {
        Index n = pixel0 + (CHANNELS_INNER ? load_row + i * ROWS : thread % TILE_N);
        n = n < pixels ? n : 0;
        x_w[i] = split_off(n, p.output_divisor[AXIS_W]) * (Index)p.stride[AXIS_W] -
                 (Index)p.pad_lo[AXIS_W];
        x_h[i] = split_off(n, p.output_divisor[AXIS_H]) * (Index)p.stride[AXIS_H] -
                 (Index)p.pad_lo[AXIS_H];
        x_d[i] = split_off(n, p.output_divisor[AXIS_D]) * (Index)p.stride[AXIS_D] -
                 (Index)p.pad_lo[AXIS_D];
        x_pixel[i] = n * (Index)p.x_strides[0] +
                     (Index)group * group_in * (Index)p.x_strides[1] +
                     x_d[i] * (Index)p.x_strides[2] + x_h[i] * (Index)p.x_strides[3] +
                     x_w[i] * (Index)p.x_strides[4];
    }

    // ---- the taps of a tile; past the end too, where they are not read
    const int depth = CHANNELS_INNER ? group_in : group_in * filter_d * filter_h * filter_w;
    const int x_k = CHANNELS_INNER ? load_k : thread / TILE_N;  // the first of the thread's k
    const auto find_taps = [&](int tile) {
        if (thread < TAPS) {
            int c = CHANNELS_INNER ? tile : tile * TILE_K + thread;
            const Index s = split_off(c, p.filter_divisor[AXIS_W]);
            const Index r = split_off(c, p.filter_divisor[AXIS_H]);
            const Index t = split_off(c, p.filter_divisor[AXIS_D]);
            if (CHANNELS_INNER) c *= TILE_K;
            if (thread == 0) lives[tile & 1] = CHANNELS_INNER ? depth - c : depth - tile * TILE_K;
            Tap tap;
            tap.d = t * (Index)p.dilation[AXIS_D];
            tap.h = r * (Index)p.dilation[AXIS_H];
            tap.w = s * (Index)p.dilation[AXIS_W];
            tap.offset = c * (Index)p.x_strides[1] + tap.d * (Index)p.x_strides[2] +
                         tap.h * (Index)p.x_strides[3] + tap.w * (Index)p.x_strides[4];
            taps[tile & 1][thread] = tap;
            w_taps[tile & 1][thread] = c * (Index)p.w_strides[1] + t * (Index)p.w_strides[2] +
                                       r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4];
        }
    };

    // ---- global memory -> registers
    Loaded w_loaded[W_LOADS];
#if CHANNELS_INNER
    Loaded x_loaded[X_LOADS];
#else
    X_T x_loaded[X_LOADS];
#endif
    const auto load_tiles = [&](int tile) {
        const int slot = tile & 1;
#if CHANNELS_INNER
        // A tile is TILE_K channels of one tap.
        const int live = lives[slot] - load_k;
        const Index w_offset = w_taps[slot][0] + load_k * (Index)p.w_strides[1];
        const auto w_step = [&](int e) { return e * (Index)p.w_strides[1]; };
#else
        // A row of w that can be loaded in vectors runs along k.
        const int live = lives[slot] - load_k;
        const Index w_offset = tiling.w_vector ? (Index)(tile * TILE_K + load_k) : 0;
        const auto w_step = [&](int e) { return w_taps[slot][load_k + e]; };
#endif
#pragma unroll
        for (int i = 0; i < W_LOADS; ++i) {
            const bool in_tile = TILE_M % ROWS == 0 || load_row + i * ROWS < TILE_M;
            w_loaded[i] = load_piece(w, w_row[i] + w_offset, in_tile ? live : 0, tiling.w_vector,
                                     w_step);
        }
#if CHANNELS_INNER
        const Tap tap = taps[slot][0];
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i) {
            const Index d = x_d[i] + tap.d, h = x_h[i] + tap.h, column = x_w[i] + tap.w;
            Index at = x_pixel[i] + tap.offset + load_k * (Index)p.x_strides[1];
            bool read = inside(d, h, column, p);
            if (!read && p.boundary != BOUNDARY_ZEROS) {
                at += folded(d, h, column, p);
                read = true;
            }
            x_loaded[i] = load_piece(x, at, read ? live : 0, tiling.x_vector,
                                     [&](int e) { return e * (Index)p.x_strides[1]; });
        }
#else
        const int x_live = lives[slot] - x_k;
        if (p.boundary == BOUNDARY_ZEROS) {  // without a branch, so that all loads are under way
#pragma unroll
            for (int i = 0; i < X_LOADS; ++i) {
                const Tap tap = taps[slot][x_k + i * X_STEP];
                const bool read = (i * X_STEP < x_live) &
                                  inside(x_d[0] + tap.d, x_h[0] + tap.h, x_w[0] + tap.w, p);
                x_loaded[i] = read ? x[x_pixel[0] + tap.offset] : convert<X_T>(0.0f);
            }
        } else {
#pragma unroll
            for (int i = 0; i < X_LOADS; ++i) {
                const Tap tap = taps[slot][x_k + i * X_STEP];
                const Index d = x_d[0] + tap.d, h = x_h[0] + tap.h, column = x_w[0] + tap.w;
                Index at = x_pixel[0] + tap.offset;
                if (!inside(d, h, column, p)) at += folded(d, h, column, p);
                x_loaded[i] = i * X_STEP < x_live ? x[at] : convert<X_T>(0.0f);
            }
        }
#endif
    };

    // ---- registers -> shared memory
    const auto store_tiles = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < W_LOADS; ++i) {
            if (TILE_M % ROWS == 0 || load_row + i * ROWS < TILE_M) {
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) {
                    w_tile[buffer][(load_k + e) * TILE_M + gap(load_k) + load_row + i * ROWS] =
                        convert<ACC_T>(w_loaded[i].element[e]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i) {
#if CHANNELS_INNER
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                x_tile[buffer][(load_k + e) * TILE_N + gap(load_k) + load_row + i * ROWS] =
                    convert<ACC_T>(x_loaded[i].element[e]);
            }
#else
            const int k = x_k + i * X_STEP;
            x_tile[buffer][k * TILE_N + gap(k) + thread % TILE_N] = convert<ACC_T>(x_loaded[i]);
#endif
        }
    };

    // ---- the sums of this thread: fragment f of rows begins at f*THREADS_M*FRAGMENT + thread_m
    const int warp = thread / 32, lane = thread % 32;
    const int thread_m = (warp % WARPS_M * 8 + lane / 2 % 8) * FRAGMENT;
    const int thread_n = (warp / WARPS_M * 4 + lane / 16 * 2 + lane % 2) * FRAGMENT;
    ACC_T sum[THREAD_M][THREAD_N];
#pragma unroll
    for (int i = 0; i < THREAD_M; ++i) {
#pragma unroll
        for (int j = 0; j < THREAD_N; ++j) sum[i][j] = zero<ACC_T>();
    }

    find_taps(first_tile);
    __syncthreads();  // the first taps are written before any is read
    // Once around before the first tile, only to load it.
#pragma unroll 1
    for (int tile = first_tile - 1; tile < end_tile; ++tile) {
        const int buffer = tile & 1;
        const bool more = tile + 1 < end_tile;
        if (more) {
            load_tiles(tile + 1);
            find_taps(tile + 2);
        }
        if (tile >= first_tile) {
#pragma unroll
            for (int k = 0; k < TILE_K; ++k) {
                Fragment a[THREAD_M / FRAGMENT], b[THREAD_N / FRAGMENT];
#pragma unroll
                for (int f = 0; f < THREAD_M / FRAGMENT; ++f) {
                    a[f] = *reinterpret_cast<const Fragment*>(
                        &w_tile[buffer][k * TILE_M + gap(k) + f * THREADS_M * FRAGMENT + thread_m]);
                }
#pragma unroll
                for (int f = 0; f < THREAD_N / FRAGMENT; ++f) {
                    b[f] = *reinterpret_cast<const Fragment*>(
                        &x_tile[buffer][k * TILE_N + gap(k) + f * THREADS_N * FRAGMENT + thread_n]);
                }
#pragma unroll
                for (int i = 0; i < THREAD_M; ++i) {
#pragma unroll
                    for (int j = 0; j < THREAD_N; ++j) {
                        sum[i][j] = multiply_add(sum[i][j], a[i / FRAGMENT].element[i % FRAGMENT],
                                                 b[j / FRAGMENT].element[j % FRAGMENT]);
                    }
                }
            }
        }
        // The other buffer was last read before the barrier that ended the previous tile.
        if (more) store_tiles(buffer ^ 1);
        __syncthreads();  // the next tile and its taps are there, and this one is free
    }

    // ---- registers -> y
    y += place.split * (Index)tiling.split_stride;
    const int m0 = place.row0 + thread_m;
    const Index n0 = place.pixel0 + thread_n;
    const auto row_of = [](int i) { return i / FRAGMENT * THREADS_M * FRAGMENT + i % FRAGMENT; };
    const auto pixel_of = [](int j) { return j / FRAGMENT * THREADS_N * FRAGMENT + j % FRAGMENT; };
    const Index channel = (Index)place.group * group_out;
    if (bias != nullptr) {
#pragma unroll
        for (int i = 0; i < THREAD_M; ++i) {
            const int m = m0 + row_of(i);
            if (m < group_out) {
                const ACC_T b = load<ACC_T>(bias, (channel + m) * (Index)p.bias_stride, 0);
#pragma unroll
                for (int j = 0; j < THREAD_N; ++j) sum[i][j] = add(sum[i][j], b);
            }
        }
    }
    const Index stride_k = (Index)p.y_strides[1];
    if (tiling.y_vector == STORE_PIXELS) {  // y[n, k, :] is contiguous: whole fragments of it
#pragma unroll
        for (int j = 0; j < THREAD_N; j += FRAGMENT) {
            const Index n = n0 + pixel_of(j);
            if (n >= pixels) continue;
            const Index at = y_offset(n, p) + (channel + m0) * stride_k;
#pragma unroll
            for (int i = 0; i < THREAD_M; ++i) {
                if (m0 + row_of(i) >= group_out) continue;
                Stored stored;
#pragma unroll
                for (int e = 0; e < FRAGMENT; ++e) stored.element[e] = convert<Y_T>(sum[i][j + e]);
                *reinterpret_cast<Stored*>(y + at + row_of(i) * stride_k) = stored;
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < THREAD_N; ++j) {
            const Index n = n0 + pixel_of(j);
            if (n >= pixels) continue;
            const Index at = y_offset(n, p) + (channel + m0) * stride_k;
            if (tiling.y_vector == STORE_CHANNELS) {  // y[n, :, z, p, q] is
#pragma unroll
                for (int i = 0; i < THREAD_M; i += FRAGMENT) {
                    if (m0 + row_of(i) >= group_out) continue;
                    Stored stored;
#pragma unroll
                    for (int e = 0; e < FRAGMENT; ++e) {
                        stored.element[e] = convert<Y_T>(sum[i + e][j]);
                    }
                    *reinterpret_cast<Stored*>(y + at + row_of(i)) = stored;
                }
            } else {
#pragma unroll
                for (int i = 0; i < THREAD_M; ++i) {
                    if (m0 + row_of(i) >= group_out) continue;
                    y[at + row_of(i) * stride_k] = convert<Y_T>(sum[i][j]);
                }
            }
        }
    }
}

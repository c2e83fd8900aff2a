// The gradient of x under a depthwise convolution of stride 2: dy is read once, dx written once.
//
//   dx[n, c, i, j] = bias[c] + sum over the output channels k of c, taps r, s and positions p, q with
//       2*p + r - pad = i, 2*q + s - pad = j  of  dy[n, k, p, q] * w[k, 0, r, s]
//
// x beyond its edges is zero. Of the taps along an axis every second one meets a position: those of
// the parity of i + pad. A thread's rows begin where that is even, its columns where it is PARITY,
// so that which taps meet is known when this is compiled.
//
// Mapping: thread -> ROWS x COLUMNS elements of one plane of dx, in registers; dy comes through the
// L1 cache, each row of it once for all rows of dx that it meets:
//
//     dy row a  . . . .          dx rows 2a-pad, 2a-pad+1, .. 2a-pad+FILTER-1
//                                   += row * w[0], w[1], .. w[FILTER-1]
//
//   thread b*BLOCK + t -> ((n*C + c) * row groups + group) * strips + strip, or where memory runs
//                         channels last ((n * row groups + group) * strips + strip) * C + c
// Shared memory: none.
//
// Macros:
//   X_T, W_T, B_T, Y_T, ACC_T, INDEX_T  depthwise.cuh; X_T is dx's, Y_T dy's
//   FILTER  the filter's extents, 3 or 5
//   BLOCK   threads per block, whole warps up to 512
//   BLOCKS  that share a multiprocessor at least, 1 to 8: bounds the registers
//
// Launched by gpuconv/cuda_backend/dgrad_depthwise.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DFILTER=3 dgrad_depthwise.cu

#ifndef FILTER
#define FILTER 3
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#ifndef BLOCKS
#define BLOCKS 2
#endif

#include "depthwise.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(FILTER == 3 || FILTER == 5, "FILTER: 3 or 5");
static_assert(BLOCK % 32 == 0 && BLOCK <= 512, "BLOCK: whole warps, up to 512");
static_assert(BLOCKS >= 1 && BLOCKS <= 8, "BLOCKS: 1 to 8");
static_assert(sizeof(X_T) <= 4, "X_T: float16, bfloat16 or float32");

constexpr int ROWS = 8, COLUMNS = 4;

struct __align__(COLUMNS * sizeof(X_T)) Vector {
    X_T element[COLUMNS];
};

struct Tile {
    Divisor strips, groups, channels;
    int32 channels_last;  // how threads are numbered
    int32 vectors;        // rows of dx are written COLUMNS elements at a time
};
static_assert(sizeof(Tile) == 56, "dgrad_depthwise.TILE mirrors this");

typedef ACC_T Sums[ROWS][COLUMNS];

// The sums of one output channel: dy is its plane, its (0, 0) the position that the thread's first
// element meets by tap (0, PARITY).
template <int PARITY>
__device__ __forceinline__ void accumulate(Sums& sum, const Y_T* __restrict__ dy,
                                           const W_T* __restrict__ w, Index first_row,
                                           Index first_column, const Problem& p) {
    constexpr int HALF_TAPS = (FILTER - 1) / 2;
    constexpr int FIRST = -((FILTER - 1 - PARITY) / 2), LAST = (COLUMNS - 1 + PARITY) / 2;
    ACC_T tap[FILTER][FILTER];
#pragma unroll
    for (int r = 0; r < FILTER; ++r) {
#pragma unroll
        for (int s = 0; s < FILTER; ++s) {
            tap[r][s] =
                load<ACC_T>(w, r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4], 0);
        }
    }
#pragma unroll
    for (int a = -HALF_TAPS; a < ROWS / 2; ++a) {
        const Index row = first_row + a;
        const bool in_rows = row >= 0 && row < (Index)p.output[AXIS_H];
        ACC_T value[LAST - FIRST + 1];
#pragma unroll
        for (int e = FIRST; e <= LAST; ++e) {
            const Index column = first_column + e;
            const bool valid = in_rows && column >= 0 && column < (Index)p.output[AXIS_W];
            value[e - FIRST] = valid ? load<ACC_T>(dy,
                                                   row * (Index)p.y_strides[3] +
                                                       column * (Index)p.y_strides[4],
                                                   0)
                                     : zero<ACC_T>();
        }
#pragma unroll
        for (int r = 0; r < FILTER; ++r) {
            const int o = 2 * a + r;
            if (o < 0 || o >= ROWS) continue;
#pragma unroll
            for (int s = 0; s < FILTER; ++s) {
#pragma unroll
                for (int v = 0; v < COLUMNS; ++v) {
                    if ((v + PARITY - s) % 2 != 0) continue;
                    sum[o][v] =
                        multiply_add(sum[o][v], value[(v + PARITY - s) / 2 - FIRST], tap[r][s]);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
dgrad_depthwise(X_T* __restrict__ x, const W_T* __restrict__ w, const B_T* __restrict__ bias,
                const Y_T* __restrict__ y, const Problem p, const Tile tile) {
    Index item = (Index)blockIdx.x * BLOCK + threadIdx.x, c = 0;
    if (tile.channels_last) c = split_off(item, tile.channels);
    const Index strip = split_off(item, tile.strips);
    const Index group = split_off(item, tile.groups);
    if (!tile.channels_last) c = split_off(item, tile.channels);
    const Index n = item;
    if (n >= (Index)p.batch) return;

    // dx[n, c, i + o, j + v]; i + pad is even, j a multiple of COLUMNS.
    const Index pad_h = (Index)p.pad_lo[AXIS_H], pad_w = (Index)p.pad_lo[AXIS_W];
    const Index i = group * ROWS - (pad_h & 1), j = strip * COLUMNS;
    Sums sum;
#pragma unroll
    for (int o = 0; o < ROWS; ++o) {
#pragma unroll
        for (int v = 0; v < COLUMNS; ++v) sum[o][v] = zero<ACC_T>();
    }
    for (int m = 0; m < (int)p.group_out; ++m) {
        const Index k = c * (Index)p.group_out + m;
        const Y_T* const dy = y + (n * (Index)p.y_strides[0] + k * (Index)p.y_strides[1]);
        const W_T* const taps = w + ((Index)p.w_offset + k * (Index)p.w_strides[0]);
        const Index first_row = (i + pad_h) / 2, first_column = (j + pad_w) / 2;
        if (pad_w & 1) {
            accumulate<1>(sum, dy, taps, first_row, first_column, p);
        } else {
            accumulate<0>(sum, dy, taps, first_row, first_column, p);
        }
    }
    const ACC_T b =
        bias == nullptr ? zero<ACC_T>() : load<ACC_T>(bias, c * (Index)p.bias_stride, 0);
    const Index columns = (Index)p.input[AXIS_W] - j;
#pragma unroll
    for (int o = 0; o < ROWS; ++o) {
        if (i + o < 0 || i + o >= (Index)p.input[AXIS_H]) continue;
        X_T* const at = x + (n * (Index)p.x_strides[0] + c * (Index)p.x_strides[1] +
                             (i + o) * (Index)p.x_strides[3] + j * (Index)p.x_strides[4]);
        Vector values;
#pragma unroll
        for (int v = 0; v < COLUMNS; ++v) {
            values.element[v] =
                convert<X_T>(bias == nullptr ? sum[o][v] : add(sum[o][v], b));
        }
        if (tile.vectors && columns >= COLUMNS) {
            *reinterpret_cast<Vector*>(at) = values;
        } else {
#pragma unroll
            for (int v = 0; v < COLUMNS; ++v) {
                if (v < columns) at[v * (Index)p.x_strides[4]] = values.element[v];
            }
        }
    }
}

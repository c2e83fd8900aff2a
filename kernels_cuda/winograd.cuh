// What the kernels of Winograd's method share: tiles, transforms, and what becomes of a NaN.
//
// A tile of OUT x OUT outputs sees IN x IN inputs d, IN = OUT + 2. With the filter's taps g,
//
//   y = A' [ (G g G') * (B' d B) ] A       (*: element by element, summed over channels)
//
// OUT 2 has the points 0, 1, -1 and infinity, OUT 4 the points 0, +-5/8, +-3/2 and infinity
// (gpuconv/toom_cook.py makes the matrices A, B and G of them, and says what they cost in
// accuracy). Every entry of A and B is exact in float32; G is applied in float64.
//
// Tiles are numbered ((image*down) + i)*across + j; tile (i, j) begins at output (i*OUT, j*OUT).
#pragma once

#include "boundary.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

constexpr int FILTERS = 64;  // output channels of a block: transformed filters are kept by so many

// Which tiles a launch computes, and how it numbers its work. winograd.TILES is the same in NumPy.
struct Tiles {
    Divisor across, down;    // tiles of an image along W and along H
    Divisor filter_blocks;   // blocks of FILTERS output channels of a group
    Divisor tile_blocks;     // blocks of tiles of this launch
    Divisor channel_blocks;  // blocks of channels, of the kernels of one channel per thread
    Divisor groups;
    int32 first, count;      // the tiles first ... first + count
    int32 pitch;             // tiles of one row of the workspace
    int32 x_channels_inner;  // whether lanes read neighbouring channels rather than tiles,
    int32 y_channels_inner;  // and write them
    int32 y_vector;          // whether a row of a tile can be written at once
};
static_assert(sizeof(Tiles) == 120, "winograd.TILES mirrors this");

// Where tile `index` lies: its image and its first output.
template <class Index>
struct Place {
    Index n, h, w;
};
template <int OUT, class Index>
__device__ __forceinline__ Place<Index> place_of(int32 index, const Tiles& t) {
    const int32 j = split_off(index, t.across);
    const int32 i = split_off(index, t.down);
    return {index, i * OUT, j * OUT};
}

// The inputs of a tile, as offsets of its rows and columns.
template <int IN, class Index>
struct Patch {
    static constexpr uint64 WHOLE = (1ull << IN * IN) - 1;

    Index row[IN], column[IN];
    uint64 live;  // a bit for each input: the others are zeros beyond the edge

    __device__ __forceinline__ Patch(Place<Index> at, const Problem& p) : live(0) {
        uint32 columns = 0;
#pragma unroll
        for (int s = 0; s < IN; ++s) {
            const Index w = source_index(at.w + s - (Index)p.pad_lo[AXIS_W],
                                         (Index)p.input[AXIS_W], p.boundary);
            column[s] = max(w, (Index)0) * (Index)p.x_strides[4];
            columns |= (w >= 0 ? 1u : 0u) << s;
        }
#pragma unroll
        for (int r = 0; r < IN; ++r) {
            const Index h = source_index(at.h + r - (Index)p.pad_lo[AXIS_H],
                                         (Index)p.input[AXIS_H], p.boundary);
            row[r] = max(h, (Index)0) * (Index)p.x_strides[3];
            if (h >= 0) live |= (uint64)columns << r * IN;
        }
    }

    // Input (r, s) of the channel that begins at x[first]. In place of a zero some element is read,
    // so that no load waits for a test: `clear` makes the zeros.
    template <class X>
    __device__ __forceinline__ X read(const X* __restrict__ x, Index first, int r, int s) const {
        return x[first + row[r] + column[s]];
    }

    template <class T>
    __device__ __forceinline__ void clear(T (&d)[IN][IN]) const {
        if (live == WHOLE) return;
#pragma unroll
        for (int r = 0; r < IN; ++r) {
#pragma unroll
            for (int s = 0; s < IN; ++s) {
                if (!(live >> (r * IN + s) & 1)) d[r][s] = convert<T>(0.0f);
            }
        }
    }
};

// ---- along one axis --------------------------------------------------------------------------

// v = B' d
__device__ __forceinline__ void transform_input(const float32 (&d)[4], float32 (&v)[4]) {
    v[0] = d[2] - d[0];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
}

constexpr float32 POINT_A = 0.625f, POINT_B = 1.5f;
constexpr float32 SQUARE_A = POINT_A * POINT_A, SQUARE_B = POINT_B * POINT_B;

__device__ __forceinline__ void transform_input(const float32 (&d)[6], float32 (&v)[6]) {
    const float32 even_a = fmaf(-SQUARE_B, d[2], d[4]), odd_a = fmaf(-SQUARE_B, d[1], d[3]);
    const float32 even_b = fmaf(-SQUARE_A, d[2], d[4]), odd_b = fmaf(-SQUARE_A, d[1], d[3]);
    v[0] = fmaf(SQUARE_A * SQUARE_B, d[0], fmaf(-(SQUARE_A + SQUARE_B), d[2], d[4]));
    v[1] = fmaf(POINT_A, odd_a, even_a);
    v[2] = fmaf(-POINT_A, odd_a, even_a);
    v[3] = fmaf(POINT_B, odd_b, even_b);
    v[4] = fmaf(-POINT_B, odd_b, even_b);
    v[5] = fmaf(SQUARE_A * SQUARE_B, d[1], fmaf(-(SQUARE_A + SQUARE_B), d[3], d[5]));
}

// u = G g
__device__ __forceinline__ void transform_filter(const float64 (&g)[3], float64 (&u)[4]) {
    u[0] = -g[0];
    u[1] = 0.5 * (g[0] + g[1] + g[2]);
    u[2] = 0.5 * (g[0] - g[1] + g[2]);
    u[3] = g[2];
}

__device__ __forceinline__ void transform_filter(const float64 (&g)[3], float64 (&u)[6]) {
    constexpr float64 a = POINT_A, b = POINT_B, aa = a * a, bb = b * b;
    const float64 even_a = g[0] + aa * g[2], even_b = g[0] + bb * g[2];
    u[0] = g[0] * (1 / (aa * bb));
    u[1] = (even_a + a * g[1]) * (1 / (2 * aa * (aa - bb)));
    u[2] = (even_a - a * g[1]) * (1 / (2 * aa * (aa - bb)));
    u[3] = (even_b + b * g[1]) * (1 / (2 * bb * (bb - aa)));
    u[4] = (even_b - b * g[1]) * (1 / (2 * bb * (bb - aa)));
    u[5] = g[2];
}

// y = A' m
__device__ __forceinline__ void transform_output(const float32 (&m)[4], float32 (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
}

__device__ __forceinline__ void transform_output(const float32 (&m)[6], float32 (&y)[4]) {
    const float32 even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const float32 even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = fmaf(POINT_A, odd_a, POINT_B * odd_b);
    y[2] = fmaf(SQUARE_A, even_a, SQUARE_B * even_b);
    y[3] = fmaf(POINT_A * SQUARE_A, odd_a, fmaf(POINT_B * SQUARE_B, odd_b, m[5]));
}

// ---- a tile, and a step of the products -------------------------------------------------------

// to[(i*IN + j) * step] = (B' d B)[i][j]
template <int IN, class X, class Index>
__device__ __forceinline__ void store_transformed(const X (&loaded)[IN][IN], float32* to,
                                                  Index step) {
    float32 columns[IN][IN];  // [s][i]
#pragma unroll
    for (int s = 0; s < IN; ++s) {
        float32 d[IN];
#pragma unroll
        for (int r = 0; r < IN; ++r) d[r] = convert<float32>(loaded[r][s]);
        transform_input(d, columns[s]);
    }
#pragma unroll
    for (int i = 0; i < IN; ++i) {
        float32 d[IN], v[IN];
#pragma unroll
        for (int s = 0; s < IN; ++s) d[s] = columns[s][i];
        transform_input(d, v);
#pragma unroll
        for (int j = 0; j < IN; ++j) to[(i * IN + j) * step] = v[j];
    }
}

constexpr int THREAD = 8, FRAGMENT = 4;  // sums of a thread along each axis, and beside each other

// sum[i][j] = (from_zero ? 0 : sum[i][j]) + m[i] * n[j], of one channel: m and n are two fragments
// each, at filters and inputs and so many elements on.
__device__ __forceinline__ void multiply_fragments(float32 (&sum)[THREAD][THREAD],
                                                   const float32* filters, int filters_on,
                                                   const float32* inputs, int inputs_on,
                                                   bool from_zero) {
    float4 a[2], b[2];
#pragma unroll
    for (int f = 0; f < 2; ++f) {
        a[f] = *reinterpret_cast<const float4*>(filters + f * filters_on);
        b[f] = *reinterpret_cast<const float4*>(inputs + f * inputs_on);
    }
    const float32 m[THREAD] = {a[0].x, a[0].y, a[0].z, a[0].w, a[1].x, a[1].y, a[1].z, a[1].w};
    const float32 n[THREAD] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
#pragma unroll
    for (int i = 0; i < THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < THREAD; ++j) {
            sum[i][j] = multiply_add(from_zero ? 0.0f : sum[i][j], m[i], n[j]);
        }
    }
}

// ---- from a tile's results to y --------------------------------------------------------------

template <class Y, int N>
struct __align__(N * sizeof(Y)) Row {
    Y element[N];
};

// y[n, k, at.h + i, at.w + j] = out[i][j] + bias[k], of those that y has; k of all groups.
//
// The transforms mix the inputs of a tile, so a NaN or infinity among them (or one that they made,
// of numbers near the largest) may reach outputs that do not see it. Any leaves a mark: an output
// that is not finite. Such a tile's outputs are computed anew, each as the sum that it is.
template <int OUT, class X, class B, class Y, class Index>
__device__ __forceinline__ void store_tile(const float32 (&out)[OUT][OUT], Place<Index> at, int k,
                                           const X* __restrict__ x, const X* __restrict__ w,
                                           const B* __restrict__ bias, Y* __restrict__ y,
                                           const Problem& p, const Tiles& t) {
    const Index height = (Index)p.output[AXIS_H], width = (Index)p.output[AXIS_W];
    const Index step_h = (Index)p.y_strides[3], step_w = (Index)p.y_strides[4];
    const Index first = at.n * (Index)p.y_strides[0] + k * (Index)p.y_strides[1] + at.h * step_h +
                        at.w * step_w;
    const float32 added =
        bias == nullptr ? 0.0f : load<float32>(bias, k * (Index)p.bias_stride, 0);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < OUT; ++i) {
        Row<Y, OUT> row;
#pragma unroll
        for (int j = 0; j < OUT; ++j) {
            finite &= isfinite(out[i][j]);
            row.element[j] =
                convert<Y>(bias == nullptr ? out[i][j] : add(out[i][j], added));
        }
        if (at.h + i >= height) continue;
        if (t.y_vector) {  // the width is a multiple of OUT
            *reinterpret_cast<Row<Y, OUT>*>(y + first + i * step_h) = row;
            continue;
        }
#pragma unroll
        for (int j = 0; j < OUT; ++j) {
            if (at.w + j < width) y[first + i * step_h + j * step_w] = row.element[j];
        }
    }
    if (finite) return;
    int group = k;
    split_off(group, p.group_out_divisor);
    const int channels = (int)p.group_in;
    const X* image = x + at.n * (Index)p.x_strides[0] +
                     (Index)group * channels * (Index)p.x_strides[1];
    const X* taps = w + (Index)p.w_offset + k * (Index)p.w_strides[0];
#pragma unroll 1
    for (int output = 0; output < OUT * OUT; ++output) {
        const Index out_h = at.h + output / OUT, out_w = at.w + output % OUT;
        if (out_h >= height || out_w >= width) continue;
        float32 sum = 0;
#pragma unroll 1
        for (int c = 0; c < channels; ++c) {
#pragma unroll 1
            for (int tap = 0; tap < 9; ++tap) {
                const int r = tap / 3, s = tap % 3;
                const Index in_h = source_index(out_h + r - (Index)p.pad_lo[AXIS_H],
                                                (Index)p.input[AXIS_H], p.boundary);
                const Index in_w = source_index(out_w + s - (Index)p.pad_lo[AXIS_W],
                                                (Index)p.input[AXIS_W], p.boundary);
                const float32 value =
                    in_h < 0 || in_w < 0
                        ? 0.0f
                        : convert<float32>(image[c * (Index)p.x_strides[1] +
                                                 in_h * (Index)p.x_strides[3] +
                                                 in_w * (Index)p.x_strides[4]]);
                sum = multiply_add(sum, value,
                                   convert<float32>(taps[c * (Index)p.w_strides[1] +
                                                         r * (Index)p.w_strides[3] +
                                                         s * (Index)p.w_strides[4]]));
            }
        }
        const Index place = first + output / OUT * step_h + output % OUT * step_w;
        store(y, place, 0, bias == nullptr ? sum : add(sum, added));
    }
}

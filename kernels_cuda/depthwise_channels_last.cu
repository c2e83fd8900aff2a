// Depthwise convolution where memory runs channels last (N, H, W, C): every output channel sees one
// input channel.
//
//   y[n, p, q, k] = bias[k] + sum over r, s of
//       x[n, p*stride + r*dilation - pad, q*stride + s*dilation - pad, k / M] * w[k, 0, r, s]
//
// with M = K/C, the channel multiplier, and x read beyond its edges as the boundary mode says. The
// sum runs over r, then s, as in depthwise.cu: the two give the same bits.
//
// Mapping: a block brings one tile of one image, of up to 128 bytes of channels, to shared memory,
// halo and boundary included, and makes all outputs of it: M channels of each one after another.
//
//   block   -> (n, tile row, tile column, first output channel, channels), the last fastest
//   thread  -> (segment, strip, VEC channels), the channels fastest
//   thread's outputs: STRIP columns x up to SEGMENT rows x VEC channels of y, all in registers
//
//      pixels of the tile             one thread: rows of x come by once, for FILTER_R sums each
//      strip 0      strip 1
//     +----------+----------+--         x row i   |. . . . . .|  (STRIP-1)*STRIDE + FILTER_S of it
//     | thread 0 | thread 8 |  segment 0     |
//     |    ..    |    ..    |                +--> sum[i  ][0..STRIP) += row * w[0]
//     | thread 7 | thread 15|                +--> sum[i-1][0..STRIP) += row * w[1]
//     +----------+----------+--              +--> sum[i-2][0..STRIP) += row * w[2]
//
// Shared memory:
//
//   | row 0: | pixel 0 | 1 | 2 | 3 | pixel 5 | 4 | 7 | 6 | 8 | .. | row 1 .. | w[tap][channel] |
//
// Where a pixel's channels fill but half of the banks, the lanes of a warp that work on the next
// strip need the other half: in every other strip the pixels lie swapped in pairs (`place`). x
// comes by cp.async, 16 bytes at a time where its alignment allows (tile.unit), else 8, 4, or
// element by element; w as ACC_T, for a long filter in groups of taps: 16 bytes of each thread.
//
// A long filter's taps do not fit in registers. A thread holds a window of STRIP pixels instead,
// which slides along the row: a tap brings one pixel of x, and serves STRIP sums of each row.
//
// Macros:
//   X_T, W_T, B_T, Y_T, ACC_T, INDEX_T  depthwise.cuh
//   FILTER_R, FILTER_S  the filter's extents, 2 to 9; or 0, 0: those of the problem
//   STRIDE              1 or 2, with dilation 1; or 0: the problem's own, FILTER_R = FILTER_S = 0
//   STRIP               columns of y per thread, 1 to 8; 8 where FILTER_R is 0 and STRIDE is 1
//   SEGMENT             rows of y per thread, 1 to 8
//   VEC                 channels per thread, 1 or 2
//   THREADS             of a block at most: 128 or 256
//   BLOCKS              that share a multiprocessor at least, 1 to 8: bounds the registers
//
// Launched by gpuconv/cuda_backend/depthwise.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DFILTER_R=3 -DFILTER_S=3 depthwise_channels_last.cu

#ifndef FILTER_R
#define FILTER_R 3
#endif
#ifndef FILTER_S
#define FILTER_S 3
#endif
#ifndef STRIDE
#define STRIDE 1
#endif
#ifndef STRIP
#define STRIP 4
#endif
#ifndef SEGMENT
#define SEGMENT 4
#endif
#ifndef VEC
#define VEC 2
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif

#include "boundary.cuh"
#include "depthwise.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "ptx.cuh"
#include "types.cuh"

static_assert((FILTER_R == 0 && FILTER_S == 0) ||
                  (FILTER_R >= 2 && FILTER_R <= 9 && FILTER_S >= 2 && FILTER_S <= 9),
              "FILTER_R, FILTER_S: both 0, or both 2 to 9");
static_assert(STRIDE >= 0 && STRIDE <= 2 && (STRIDE == 1 || (FILTER_R > 0) == (STRIDE > 0)),
              "STRIDE: 1 or 2; 1 or 0 where FILTER_R is 0");
static_assert(STRIP >= 1 && STRIP <= 8 && SEGMENT >= 1 && SEGMENT <= 8, "STRIP, SEGMENT: 1 to 8");
static_assert(FILTER_R > 0 || STRIDE != 1 || STRIP == 8, "STRIP: 8 for a long filter");
static_assert(VEC == 1 || VEC == 2, "VEC: 1 or 2");
static_assert(THREADS == 128 || THREADS == 256, "THREADS: 128 or 256");
static_assert(BLOCKS >= 1 && BLOCKS <= 8, "BLOCKS: 1 to 8");

constexpr bool LONG = FILTER_R == 0 && STRIDE == 1;
constexpr int TAPS = LONG ? 16 / (sizeof(ACC_T) * VEC) : 1;  // of a filter's row, in one load

struct Tile {
    Divisor tile_columns, tile_rows, channel_tiles, channel_blocks;  // how many there are, in all
    Divisor strips, lanes;        // of a tile; lanes of VEC channels make a pixel
    Divisor units, columns;       // loads that make a pixel of x, pixels of x that make a row
    int32 segments, segment_rows;  // of one tile, of one segment
    int32 channels;                // input channels of a block
    int32 multiplier;              // output channels of each that a block makes
    int32 unit;                    // elements of one load
    int32 pixel_pitch, row_pitch;  // of x in shared memory, in elements
    int32 filter_pitch;            // of w there, from tap to tap, or from TAPS to TAPS of them
    int32 weights_at;              // bytes
    int32 input_rows;              // of x in one tile
    int32 vectors;                 // y is written VEC channels at a time
};
static_assert(sizeof(Tile) == 176, "depthwise.TILE_CHANNELS_LAST mirrors this");

// Where pixel `column` of a row lies: every other group of GROUP pixels has its pairs swapped.
constexpr int GROUP = STRIP * STRIDE;  // from strip to strip; 0: no pixel is moved
__device__ __forceinline__ int place(int column) {
    if constexpr (GROUP > 1) {
        return column ^ ((column / GROUP) & 1);
    } else {
        return column;
    }
}

struct __align__(sizeof(ACC_T) * VEC) Taps {
    ACC_T tap[VEC];
};

// ---- x and w, from global to shared memory ---------------------------------------------------

// tile[0 .. tile.unit) = the channels from x[at] on, the first `live` of them there, or zeros.
__device__ __forceinline__ void copy_unit(X_T* __restrict__ to, const X_T* __restrict__ x, Index at,
                                          Index channel_stride, int unit, int live, bool valid) {
    const X_T* const from = valid ? x + at : x;
    const int bytes = live < unit ? 0 : unit * (int)sizeof(X_T);
    if (bytes == 16) {
        cp_async_16(to, from, valid);
    } else if (bytes == 8) {
        cp_async_8(to, from, valid);
    } else if (bytes == 4) {
        cp_async_4(to, from, valid);
    } else {
        for (int i = 0; i < unit; ++i) {
            to[i] = valid && i < live ? from[i * channel_stride] : convert<X_T>(0.0f);
        }
    }
}

__device__ __forceinline__ void fill(X_T* __restrict__ shared_x, const X_T* __restrict__ x,
                                     const Problem& p, const Tile& tile, Index image,
                                     Index first_row, Index first_column, int rows, int columns,
                                     int live_channels) {
    // A thread stays with one piece of the channels and goes from pixel to pixel.
    int start = threadIdx.x;
    const int channel = split_off(start, tile.units) * tile.unit;
    const int step = divide((int32)blockDim.x, tile.units);
    if (start >= step) return;
    const int width = (int)tile.columns.value;
    const int row_step = divide(step, tile.columns), column_step = step - row_step * width;
    int row = divide(start, tile.columns), column = start - row * width;
    const Index channel_stride = (Index)p.x_strides[1];
    const int live = live_channels - channel;
#pragma unroll 4
    while (row < tile.input_rows) {
        const Index h = source_index(first_row + row, (Index)p.input[AXIS_H], p.boundary);
        const Index v = source_index(first_column + column, (Index)p.input[AXIS_W], p.boundary);
        // x[n, h, v, first channel of the block + channel]
        copy_unit(shared_x + row * tile.row_pitch + place(column) * tile.pixel_pitch + channel, x,
                  image + h * (Index)p.x_strides[3] + v * (Index)p.x_strides[4] +
                      channel * channel_stride,
                  channel_stride, tile.unit, live,
                  h >= 0 && v >= 0 && row < rows && column < columns);
        row += row_step;
        column += column_step;
        if (column >= width) {
            column -= width;
            ++row;
        }
    }
}

// Groups of TAPS taps that a filter makes in shared memory.
__device__ __forceinline__ int tap_groups(const Problem& p) {
    return (int)p.filter[AXIS_H] * (((int)p.filter[AXIS_W] + TAPS - 1) / TAPS);
}

// shared_w[(channel of the multiplier * groups + group) * filter_pitch + c], tap r * S + s being a
// group, and c the input channel; for a long filter the group is s / TAPS * R + r, and c, s % TAPS
// lie as (c / VEC * TAPS + s % TAPS) * VEC + c % VEC: a thread's taps are one load, with zeros
// behind a row's last.
__device__ __forceinline__ void fill_weights(ACC_T* __restrict__ shared_w,
                                             const W_T* __restrict__ w, const Problem& p,
                                             const Tile& tile, Index first_c, int live_channels,
                                             int first_channel, int multiplier) {
    const int filter_r = FILTER_R ? FILTER_R : (int)p.filter[AXIS_H];
    const int filter_s = FILTER_S ? FILTER_S : (int)p.filter[AXIS_W];
    const int pitch_s = (filter_s + TAPS - 1) / TAPS * TAPS;
    const int taps = filter_r * pitch_s, groups = taps / TAPS;
    for (int i = threadIdx.x; i < tile.channels * multiplier * taps; i += blockDim.x) {
        const int filter = i / taps, tap = i - filter * taps;
        const int r = tap / pitch_s, s = tap - r * pitch_s;
        const int c = filter / multiplier, m = filter - c * multiplier;
        const int group = LONG ? s / TAPS * filter_r + r : tap;
        const int at = LONG ? (c / VEC * TAPS + s % TAPS) * VEC + c % VEC : c;
        // w[k, 0, r, s]
        const Index k = (first_c + c) * (Index)p.group_out + first_channel + m;
        shared_w[(m * groups + group) * tile.filter_pitch + at] =
            c < live_channels && s < filter_s
                ? load<ACC_T>(w,
                              (Index)p.w_offset + k * (Index)p.w_strides[0] +
                                  r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4],
                              0)
                : zero<ACC_T>();
    }
}

// ---- sums --------------------------------------------------------------------------------------

typedef ACC_T Sums[SEGMENT][STRIP][VEC];

// The VEC channels of one pixel.
__device__ __forceinline__ Taps load_pixel(const X_T* __restrict__ at) {
    Taps pixel;
    if constexpr (VEC == 1) {
        pixel.tap[0] = convert<ACC_T>(at[0]);
    } else if constexpr (HALF) {
        const uint32 both = *reinterpret_cast<const uint32*>(at);
        pixel.tap[0] = low_of<X_T>(both);
        pixel.tap[VEC - 1] = high_of<X_T>(both);
    } else {
        pixel = *reinterpret_cast<const Taps*>(at);
    }
    return pixel;
}

__device__ __forceinline__ void accumulate(ACC_T (&sum)[VEC], const Taps& x, const Taps& w) {
#pragma unroll
    for (int c = 0; c < VEC; ++c) sum[c] = multiply_add(sum[c], x.tap[c], w.tap[c]);
}

__device__ __forceinline__ Taps load_taps(const ACC_T* __restrict__ at) {
    return *reinterpret_cast<const Taps*>(at);
}

// The first pixels of a window that begins a multiple of GROUP behind the row's first: pixel j is
// pixel place(j) behind the one of its parity, whichever way the pairs lie here.
struct Window {
    const X_T* of[2];

    __device__ __forceinline__ Window(const X_T* row, int group, int pixel_pitch) {
        const int swapped = group & 1 ? pixel_pitch : 0;
        of[0] = row + swapped;
        of[1] = row - swapped;
    }
    __device__ __forceinline__ Taps pixel(int j, int pixel_pitch) const {
        return load_pixel(of[place(j) & 1] + place(j) * pixel_pitch);
    }
};

// sum_windows: the sums of the first `rows` rows of a strip's segment, whose windows begin at x.
#if FILTER_R > 0

// All taps in registers, everything unrolled.
__device__ __forceinline__ void sum_windows(Sums& sum, const X_T* __restrict__ x,
                                            const ACC_T* __restrict__ w, const Problem& p,
                                            const Tile& tile, int strip, int rows) {
    constexpr int COUNT = (STRIP - 1) * STRIDE + FILTER_S;
    Taps tap[FILTER_R * FILTER_S];
#pragma unroll
    for (int i = 0; i < FILTER_R * FILTER_S; ++i) tap[i] = load_taps(w + i * tile.filter_pitch);
    const int input_rows = (rows - 1) * STRIDE + FILTER_R;
    const X_T* row = x;
#pragma unroll
    for (int i = 0; i < (SEGMENT - 1) * STRIDE + FILTER_R; ++i) {
        if (i >= input_rows) break;
        const Window window(row, strip, tile.pixel_pitch);
        // Pixel by pixel, so that few are in registers at a time; s still rises in every sum.
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const Taps pixel = window.pixel(j, tile.pixel_pitch);
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                const int r = i - o * STRIDE;
                if (r < 0 || r >= FILTER_R) continue;
#pragma unroll
                for (int v = 0; v < STRIP; ++v) {
                    const int s = j - v * STRIDE;
                    if (s < 0 || s >= FILTER_S) continue;
                    accumulate(sum[o][v], pixel, tap[r * FILTER_S + s]);
                }
            }
        }
        row += tile.row_pitch;
    }
}

#elif STRIDE == 1

// Whether row i of x meets the segment's row o. ALL: it meets every one. Sums of rows that a
// shorter segment lacks are made and not written: the loop has no branch for them.
template <bool ALL>
__device__ __forceinline__ bool meets(int i, int o, int filter_r) {
    return ALL || (i >= o && i - o < filter_r);
}

// STRIP taps of a row, or the `taps` that a filter's row ends with, for all rows of sums that see
// row i of x. Pixel j of the window is in ring[j % STRIP] while any tap needs it: on entry the
// first STRIP - 1 are there, and every tap brings one. Row 0 of the sums takes taps `w`, row o
// those o rows of the filter before.
template <bool ALL, bool LAST>
__device__ __forceinline__ void sum_taps(Sums& sum, Taps (&ring)[STRIP], const Window& window,
                                         const ACC_T* __restrict__ w, const Tile& tile,
                                         int filter_r, int i, int taps) {
    struct __align__(16) Group {
        Taps tap[TAPS];
    };
#pragma unroll
    for (int s = 0; s < STRIP; s += TAPS) {
        if (LAST && s >= taps) return;
        Group group[SEGMENT];
#pragma unroll
        for (int o = 0; o < SEGMENT; ++o) {
            if (!meets<ALL>(i, o, filter_r)) continue;
            group[o] = *reinterpret_cast<const Group*>(w - o * tile.filter_pitch);
        }
#pragma unroll
        for (int t = 0; t < TAPS; ++t) {
            if (LAST && s + t >= taps) return;
            const int j = s + t + STRIP - 1;
            ring[j % STRIP] = window.pixel(j, tile.pixel_pitch);
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                if (!meets<ALL>(i, o, filter_r)) continue;
#pragma unroll
                for (int v = 0; v < STRIP; ++v) {
                    accumulate(sum[o][v], ring[(s + t + v) % STRIP], group[o].tap[t]);
                }
            }
        }
        w += filter_r * tile.filter_pitch;
    }
}

// Row i of x, at `row`, for all rows of sums that see it, the window sliding along.
template <bool ALL>
__device__ __forceinline__ void sum_row(Sums& sum, const X_T* __restrict__ row,
                                        const ACC_T* __restrict__ w, const Tile& tile,
                                        int filter_r, int filter_s, int strip, int i) {
    static_assert(STRIP == GROUP && STRIP % TAPS == 0, "windows begin where pairs swap or do not");
    Taps ring[STRIP];
    {
        const Window window(row, strip, tile.pixel_pitch);
#pragma unroll
        for (int j = 0; j < STRIP - 1; ++j) ring[j] = window.pixel(j, tile.pixel_pitch);
    }
    int left = filter_s;
#pragma unroll 1
    for (; left >= STRIP; left -= STRIP) {
        const Window window(row, strip, tile.pixel_pitch);
        sum_taps<ALL, false>(sum, ring, window, w, tile, filter_r, i, STRIP);
        row += STRIP * tile.pixel_pitch;
        w += STRIP / TAPS * filter_r * tile.filter_pitch;
        ++strip;
    }
    if (left > 0) {
        const Window window(row, strip, tile.pixel_pitch);
        sum_taps<ALL, true>(sum, ring, window, w, tile, filter_r, i, left);
    }
}

// Any filter, stride 1: rows of x in a loop, each for SEGMENT rows at once.
__device__ __forceinline__ void sum_windows(Sums& sum, const X_T* __restrict__ x,
                                            const ACC_T* __restrict__ w, const Problem& p,
                                            const Tile& tile, int strip, int rows) {
    const int filter_r = (int)p.filter[AXIS_H], filter_s = (int)p.filter[AXIS_W];
#pragma unroll 1
    for (int i = 0; i < rows - 1 + filter_r; ++i) {
        if (i >= SEGMENT - 1 && i < filter_r) {
            sum_row<true>(sum, x, w, tile, filter_r, filter_s, strip, i);
        } else {
            sum_row<false>(sum, x, w, tile, filter_r, filter_s, strip, i);
        }
        x += tile.row_pitch;
        w += tile.filter_pitch;
    }
}

#else

// Any filter, stride and dilation.
__device__ __forceinline__ void sum_windows(Sums& sum, const X_T* __restrict__ x,
                                            const ACC_T* __restrict__ w, const Problem& p,
                                            const Tile& tile, int strip, int rows) {
    const int filter_r = (int)p.filter[AXIS_H], filter_s = (int)p.filter[AXIS_W];
    const int step_o = (int)p.stride[AXIS_H] * tile.row_pitch;
    const int step_v = (int)p.stride[AXIS_W] * tile.pixel_pitch;
    const int step_r = (int)p.dilation[AXIS_H] * tile.row_pitch;
    const int step_s = (int)p.dilation[AXIS_W] * tile.pixel_pitch;
    for (int r = 0; r < filter_r; ++r) {
        for (int s = 0; s < filter_s; ++s, w += tile.filter_pitch) {
            const Taps tap = load_taps(w);
            const X_T* const at = x + r * step_r + s * step_s;
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                if (o >= rows) continue;
#pragma unroll
                for (int v = 0; v < STRIP; ++v) {
                    accumulate(sum[o][v], load_pixel(at + o * step_o + v * step_v), tap);
                }
            }
        }
    }
}

#endif

// ---- y -----------------------------------------------------------------------------------------

__device__ __forceinline__ void write_pixel(Y_T* __restrict__ at, Index channel_stride,
                                            const ACC_T (&sum)[VEC], int live, bool vectors) {
    if constexpr (VEC == 2) {
        if (vectors && live >= 2) {
            if constexpr (HALF) {
                *reinterpret_cast<uint32*>(at) =
                    bits_of<Y_T>(sum[0]) | bits_of<Y_T>(sum[VEC - 1]) << 16;
            } else {
                Taps both;
                both.tap[0] = sum[0], both.tap[VEC - 1] = sum[VEC - 1];
                *reinterpret_cast<Taps*>(at) = both;
            }
            return;
        }
    }
#pragma unroll
    for (int c = 0; c < VEC; ++c) {
        if (c < live) at[c * channel_stride] = convert<Y_T>(sum[c]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
depthwise_channels_last(const X_T* __restrict__ x, const W_T* __restrict__ w,
                        const B_T* __restrict__ bias, Y_T* __restrict__ y, const Problem p,
                        const Tile tile) {
    extern __shared__ __align__(16) unsigned char shared[];
    X_T* const shared_x = reinterpret_cast<X_T*>(shared);
    ACC_T* const shared_w = reinterpret_cast<ACC_T*>(shared + tile.weights_at);

    int rest = blockIdx.x;
    const int first_c = split_off(rest, tile.channel_blocks) * tile.channels;
    const int first_channel = split_off(rest, tile.channel_tiles) * tile.multiplier;
    const int tile_column = split_off(rest, tile.tile_columns);
    const int tile_row = split_off(rest, tile.tile_rows);
    const Index n = rest;
    const int live_channels = (int)min((Index)tile.channels, (Index)p.in_channels - first_c);
    const int multiplier = (int)min((Index)tile.multiplier, (Index)p.group_out - first_channel);

    const int tile_height = tile.segments * tile.segment_rows;
    const int tile_width = (int)tile.strips.value * STRIP;
    const Index first_p = (Index)tile_row * tile_height, first_q = (Index)tile_column * tile_width;
    const int rows = (int)min((Index)tile_height, (Index)p.output[AXIS_H] - first_p);
    const int columns = (int)min((Index)tile_width, (Index)p.output[AXIS_W] - first_q);

    fill(shared_x, x, p, tile,
         n * (Index)p.x_strides[0] + first_c * (Index)p.x_strides[1],  // x[n, .., .., first_c]
         first_p * (Index)p.stride[AXIS_H] - (Index)p.pad_lo[AXIS_H],
         first_q * (Index)p.stride[AXIS_W] - (Index)p.pad_lo[AXIS_W],
         (rows - 1) * (int)p.stride[AXIS_H] +
             ((int)p.filter[AXIS_H] - 1) * (int)p.dilation[AXIS_H] + 1,
         (columns - 1) * (int)p.stride[AXIS_W] +
             ((int)p.filter[AXIS_W] - 1) * (int)p.dilation[AXIS_W] + 1,
         live_channels);
    cp_async_commit();
    fill_weights(shared_w, w, p, tile, first_c, live_channels, first_channel, multiplier);
    cp_async_wait<0>();
    __syncthreads();  // x and w are there

    int item = threadIdx.x;
    const int channel = split_off(item, tile.lanes) * VEC;
    const int strip = split_off(item, tile.strips);
    const int first_o = item * tile.segment_rows;
    const int left = columns - strip * STRIP, live = live_channels - channel;
    const int my_rows = min(tile.segment_rows, rows - first_o);
    if (item >= tile.segments || my_rows <= 0 || left <= 0 || live <= 0) return;

    const int step_h = STRIDE ? STRIDE : (int)p.stride[AXIS_H];
    const int step_w = STRIDE ? STRIDE : (int)p.stride[AXIS_W];
    const int groups = tap_groups(p);
    const X_T* const window = shared_x + first_o * step_h * tile.row_pitch +
                              strip * STRIP * step_w * tile.pixel_pitch + channel;
    // y[n, first_p + first_o, first_q + strip*STRIP, k]
    const Index position = n * (Index)p.y_strides[0] + (first_p + first_o) * (Index)p.y_strides[3] +
                           (first_q + strip * STRIP) * (Index)p.y_strides[4];
    const Index k_step = (Index)p.group_out;  // from input channel to input channel

    for (int m = 0; m < multiplier; ++m) {
        Sums sum;
#pragma unroll
        for (int o = 0; o < SEGMENT; ++o) {
#pragma unroll
            for (int v = 0; v < STRIP; ++v) {
#pragma unroll
                for (int c = 0; c < VEC; ++c) sum[o][v][c] = zero<ACC_T>();
            }
        }
        sum_windows(sum, window, shared_w + m * groups * tile.filter_pitch + channel * TAPS, p,
                    tile, strip, my_rows);
        const Index k = (Index)(first_c + channel) * k_step + first_channel + m;
        if (bias != nullptr) {
            ACC_T b[VEC];
#pragma unroll
            for (int c = 0; c < VEC; ++c) {
                b[c] = c < live ? load<ACC_T>(bias, (k + c * k_step) * (Index)p.bias_stride, 0)
                                : zero<ACC_T>();
            }
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
#pragma unroll
                for (int v = 0; v < STRIP; ++v) {
#pragma unroll
                    for (int c = 0; c < VEC; ++c) sum[o][v][c] = add(sum[o][v][c], b[c]);
                }
            }
        }
        Y_T* at = y + (position + k * (Index)p.y_strides[1]);
#pragma unroll
        for (int o = 0; o < SEGMENT; ++o) {
            if (o >= my_rows) break;
#pragma unroll
            for (int v = 0; v < STRIP; ++v) {
                if (v < left) {
                    write_pixel(at + v * (Index)p.y_strides[4], k_step * (Index)p.y_strides[1],
                                sum[o][v], live, tile.vectors);
                }
            }
            at += (Index)p.y_strides[3];
        }
    }
}

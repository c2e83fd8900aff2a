// Depthwise convolution of planes: every output channel sees one input channel.
//
//   y[n, k, p, q] = bias[k] + sum over r, s of
//       x[n, k / M, p*stride + r*dilation - pad, q*stride + s*dilation - pad] * w[k, 0, r, s]
//
// with M = K/C, the channel multiplier, and x read beyond its edges as the boundary mode says. The
// sum runs over r, then s, in every variant and every tile: no choice made here changes a bit.
//
// Mapping: a block brings one tile of one plane (n, c) to shared memory, halo and boundary and all,
// or the whole of several small planes, and makes all outputs of it: M channels one after another.
//
//   block                     -> (planes n*C + c, first of the output channels, tile row,
//                                tile column), the tile column fastest
//   thread                    -> (segment, plane, strip), the strip fastest
//   strip x segment           =  STRIP columns x up to SEGMENT rows of y, all in registers
//
//      tile of y                         one thread: rows of x come by once, for FILTER_R sums each
//      strip 0  strip 1  strip 2  ..       x row i |. . . . . .|  (STRIP-1)*STRIDE + FILTER_S of it
//     +--------+--------+--------+--            |
//     | thread | thread | thread |  segment 0   +--> sum[i  ][0..STRIP) += row * w[0]
//     |   0    |   1    |   2    |              +--> sum[i-1][0..STRIP) += row * w[1]
//     +--------+--------+--------+--            +--> sum[i-2][0..STRIP) += row * w[2]
//     |        |        |        |  segment 1
//
// Shared memory:
//
//   | plane 0: rows of `pitch` elements, as they lie in x  | plane 1 .. | w as ACC_T | y |
//   | pad pad x x x x ... x x pad pad (rest: 0)            |            |            |   |
//   | pad pad x x x x ...                                  |            |            |   |
//
// A strip is one load of 16 bytes (8 for 16-bit types) to the next strip's, so that a warp reads
// consecutive banks; pitches are made such that this goes on from plane to plane. y is there where
// rows of y cannot be written in vectors: it goes over x (or behind w, where M > 1).
//
// x comes by cp.async, 4 bytes each (8 for float64), whatever its alignment; for 16-bit types in
// pairs where rows allow that (tile.pairs), and then the tile begins at an even column of x, up to
// one column early: `shift`.
//
// Macros:
//   X_T, W_T, B_T, Y_T  one type: float16, bfloat16, float32, float64
//   ACC_T               float32, or float64 for float64
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
//   FILTER_R, FILTER_S  the filter's extents, 2 to 9; or 0, 0: those of the problem
//   STRIDE              1 or 2, with dilation 1; or 0: the problem's own, FILTER_R = FILTER_S = 0
//   STRIP               columns of y per thread: STRIP*STRIDE elements of x are 8 or 16 bytes;
//                       1 where STRIDE is 0
//   SEGMENT             rows of y per thread, 1 to 16
//   BLOCKS              that share a multiprocessor at least, 1 to 8: bounds the registers
//
// Launched by gpuconv/cuda_backend/depthwise.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DFILTER_R=3 -DFILTER_S=3 -DSTRIDE=1 -DSTRIP=4 depthwise.cu

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
#define SEGMENT 8
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
static_assert(STRIDE >= 0 && STRIDE <= 2 && (STRIDE > 0 || FILTER_R == 0),
              "STRIDE: 1 or 2, or 0 where FILTER_R is 0");
static_assert(STRIDE == 0 ? STRIP == 1
                          : STRIP * STRIDE * sizeof(X_T) == 8 || STRIP * STRIDE * sizeof(X_T) == 16,
              "STRIP: a strip takes 8 or 16 bytes of x");
static_assert(FILTER_R > 0 || STRIDE < 2, "STRIDE: 1 or 0 where FILTER_R is 0");
static_assert(SEGMENT >= 1 && SEGMENT <= 16, "SEGMENT: 1 to 16");
static_assert(BLOCKS >= 1 && BLOCKS <= 8, "BLOCKS: 1 to 8");

constexpr int THREADS = 256;     // at most
constexpr int MAX_PLANES = 256;  // of a block
constexpr bool LONG = FILTER_R == 0 && STRIDE == 1;
constexpr int TAPS = 16 / sizeof(ACC_T);  // of a long filter's row, taken at once
constexpr int CHUNK = STRIP * (STRIDE ? STRIDE : 1);  // elements of x from strip to strip
constexpr int WORDS = CHUNK * sizeof(X_T) / 4;        // the same in 32-bit words

// How y is written.
enum : int { STORE_ELEMENTS, STORE_VECTORS, STORE_ROWS, STORE_PLANES };

struct Tile {
    Divisor tile_columns, tile_rows, channel_tiles;  // how many there are, in all
    Divisor strips, planes;                          // of one tile, of one block
    Divisor input_rows;                              // of x, of one tile
    Divisor in_channels;
    int32 segments, segment_rows;  // of one tile, of one segment
    int32 channels;                // output channels of each plane that one block makes
    int32 pitch, plane_pitch;      // of x in shared memory, in elements
    int32 filter_pitch;            // of w there, from plane to plane
    int32 stage_pitch;             // of y there, from row to row
    int32 weights_at, stage_at;    // bytes
    int32 fill_shift;              // log2 of the threads that fill one row
    int32 pairs;                   // x is read two 16-bit elements at a time
    int32 store;
};
static_assert(sizeof(Tile) == 160, "depthwise.TILE mirrors this");

// ---- x, from global to shared memory ----------------------------------------------------------

// tile[0] = x[at], or zero; complete after cp_async_wait and a barrier.
__device__ __forceinline__ void copy_element(X_T* tile, const X_T* __restrict__ x, Index at,
                                             bool valid) {
    if constexpr (sizeof(X_T) == 8) {
        cp_async_8(tile, valid ? x + at : x, valid);
    } else if constexpr (sizeof(X_T) == 4) {
        cp_async_4(tile, valid ? x + at : x, valid);
    } else {
        tile[0] = valid ? x[at] : convert<X_T>(0.0f);
    }
}

// Threads go along a row, `1 << fill_shift` of them side by side; a thread stays in its column.
__device__ __forceinline__ void fill(X_T* __restrict__ shared_x, const X_T* __restrict__ x,
                                     const Index* __restrict__ plane_x, const Problem& p,
                                     const Tile& tile, Index first_row, Index first_column,
                                     int columns, int rows) {
    const int width = HALF && tile.pairs ? 2 : 1;
    const int units = tile.pitch / width;
    const int side = 1 << tile.fill_shift;
    const int row_step = blockDim.x >> tile.fill_shift;
    const int plane_step = divide(row_step, tile.input_rows);
    const int row_rest = row_step - plane_step * (int)tile.input_rows.value;
    const Index row_stride = (Index)p.x_strides[3], column_stride = (Index)p.x_strides[4];
    int start_row = threadIdx.x >> tile.fill_shift;
    const int start_plane = divide(start_row, tile.input_rows);
    start_row -= start_plane * (int)tile.input_rows.value;

    for (int unit = threadIdx.x & (side - 1); unit < units; unit += side) {
        const int column = unit * width;
        const Index position = first_column + column;
        Index source[2] = {-1, -1};
#pragma unroll
        for (int i = 0; i < (HALF ? 2 : 1); ++i) {
            if (column + i < columns && i < width) {
                source[i] = source_index(position + i, (Index)p.input[AXIS_W], p.boundary);
            }
        }
        // Both elements of a pair where they lie side by side in x, or are both zero.
        const bool together =
            source[0] < 0 ? source[1] < 0
                          : (source[0] & 1) == 0 && source[1] == source[0] + 1;
        int row = start_row, plane = start_plane;
#pragma unroll 4
        while (plane < (int)tile.planes.value) {
            X_T* const at = shared_x + plane * tile.plane_pitch + row * tile.pitch + column;
            const Index h = row < rows ? source_index(first_row + row, (Index)p.input[AXIS_H],
                                                      p.boundary)
                                       : (Index)-1;
            const Index x_row = plane_x[plane] + h * row_stride;
            if (!HALF || width == 1) {
                copy_element(at, x, x_row + source[0] * column_stride, h >= 0 && source[0] >= 0);
            } else if (together) {
                const bool valid = h >= 0 && source[0] >= 0;
                cp_async_4(at, valid ? x + (x_row + source[0]) : x, valid);
            } else {
#pragma unroll
                for (int i = 0; i < (HALF ? 2 : 1); ++i) {
                    copy_element(at + i, x, x_row + source[i], h >= 0 && source[i] >= 0);
                }
            }
            row += row_rest;
            plane += plane_step;
            if (row >= (int)tile.input_rows.value) {
                row -= (int)tile.input_rows.value;
                ++plane;
            }
        }
    }
}

// Taps of a long filter's row as they lie in shared memory: a multiple of TAPS.
__device__ __forceinline__ int tap_pitch(int taps) {
    return LONG ? (taps + TAPS - 1) / TAPS * TAPS : taps;
}

// shared_w[(channel * planes + plane) * filter_pitch + tap], as ACC_T: tap = r * FILTER_S + s, or
// for a long filter (s / TAPS * R + r) * TAPS + s % TAPS, each TAPS columns of it behind the last.
__device__ __forceinline__ void fill_weights(ACC_T* __restrict__ shared_w,
                                             const W_T* __restrict__ w,
                                             const int* __restrict__ plane_channel,
                                             const Problem& p, const Tile& tile,
                                             int first_channel, int channels) {
    const int filter_r = FILTER_R ? FILTER_R : (int)p.filter[AXIS_H];
    const int filter_s = FILTER_S ? FILTER_S : (int)p.filter[AXIS_W];
    const int pitch_s = tap_pitch(filter_s);
    const int taps = filter_r * pitch_s;
    const int planes = (int)tile.planes.value;
    for (int i = threadIdx.x; i < channels * planes * taps; i += blockDim.x) {
        const int filter = i / taps, tap = i - filter * taps;
        const int r = tap / pitch_s, s = tap - r * pitch_s;
        const int channel = divide(filter, tile.planes), plane = filter - channel * planes;
        // w[k, 0, r, s]
        const Index k = (Index)plane_channel[plane] * (Index)p.group_out + first_channel + channel;
        const int at = LONG ? (s / TAPS * filter_r + r) * TAPS + s % TAPS : tap;
        shared_w[filter * tile.filter_pitch + at] =
            s < filter_s ? load<ACC_T>(w,
                                       (Index)p.w_offset + k * (Index)p.w_strides[0] +
                                           r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4],
                                       0)
                         : zero<ACC_T>();
    }
}

// ---- x, from shared memory to registers --------------------------------------------------------

// row[i] = at[shift + i]; `at` is the start of a chunk, and shift is 0 or (for 16-bit types) 1.
template <int COUNT>
__device__ __forceinline__ void load_row(ACC_T (&row)[COUNT], const X_T* __restrict__ at,
                                         int shift) {
    constexpr int CHUNKS = (COUNT + (HALF ? 1 : 0) + CHUNK - 1) / CHUNK;
    uint32 word[CHUNKS * WORDS + 1];
    word[CHUNKS * WORDS] = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        if constexpr (WORDS == 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(at + i * CHUNK);
            word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
        } else if constexpr (WORDS == 2) {
            const uint2 v = *reinterpret_cast<const uint2*>(at + i * CHUNK);
            word[2 * i] = v.x, word[2 * i + 1] = v.y;
        }
    }
    if constexpr (HALF) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const uint32 both = __funnelshift_r(word[i / 2], word[i / 2 + 1], 16 * shift);
            row[i] = low_of<X_T>(both);
            if (i + 1 < COUNT) row[i + 1] = high_of<X_T>(both);
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if constexpr (sizeof(X_T) == 8) {
                row[i] = __hiloint2double((int)word[2 * i + 1], (int)word[2 * i]);
            } else {
                row[i] = __uint_as_float(word[i]);
            }
        }
    }
}

// ---- sums --------------------------------------------------------------------------------------

typedef ACC_T Sums[SEGMENT][STRIP];

// sum_windows: the sums of the first `rows` rows of a strip's segment, whose windows begin at x.
#if FILTER_R > 0

// All taps in registers, everything unrolled.
__device__ __forceinline__ void sum_windows(Sums& sum, const X_T* __restrict__ x,
                                            const ACC_T* __restrict__ w, const Problem& p,
                                            const Tile& tile, int rows, int shift) {
    constexpr int COUNT = (STRIP - 1) * STRIDE + FILTER_S;
    ACC_T tap[FILTER_R * FILTER_S];
#pragma unroll
    for (int i = 0; i < FILTER_R * FILTER_S; ++i) tap[i] = w[i];
    const int input_rows = (rows - 1) * STRIDE + FILTER_R;
#pragma unroll
    for (int i = 0; i < (SEGMENT - 1) * STRIDE + FILTER_R; ++i) {
        if (i < input_rows) {
            ACC_T row[COUNT];
            load_row(row, x + i * tile.pitch, shift);
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                const int r = i - o * STRIDE;
                if (r < 0 || r >= FILTER_R) continue;
#pragma unroll
                for (int s = 0; s < FILTER_S; ++s) {
#pragma unroll
                    for (int v = 0; v < STRIP; ++v) {
                        sum[o][v] =
                            multiply_add(sum[o][v], row[v * STRIDE + s], tap[r * FILTER_S + s]);
                    }
                }
            }
        }
    }
}

#elif STRIDE == 1

// Whether row i of x meets the segment's row o. ALL: it meets every one, but for a last row that a
// shorter segment does not have.
template <bool ALL>
__device__ __forceinline__ bool meets(int i, int o, int filter_r, int rows) {
    if (o == SEGMENT - 1 && rows < SEGMENT) return false;
    return ALL || (i >= o && i - o < filter_r);
}

// Row i of x, at `row`, for all rows of sums that see it: TAPS taps at a time, the window sliding
// along. Row 0 of the sums takes taps `w`, row o those o rows of the filter before.
template <bool ALL>
__device__ __forceinline__ void sum_row(Sums& sum, const X_T* __restrict__ row,
                                        const ACC_T* __restrict__ w, int filter_r, int filter_s,
                                        int i, int rows, int shift) {
    struct __align__(16) Taps {
        ACC_T tap[TAPS];
    };
    static_assert(STRIP == TAPS && CHUNK == TAPS, "a strip's next window begins at its next load");
    ACC_T now[TAPS], next[TAPS];
    load_row(now, row, shift);
    int s = 0;
#pragma unroll 2
    for (; s + TAPS < filter_s; s += TAPS) {
        load_row(next, row + s + TAPS, shift);
#pragma unroll
        for (int o = 0; o < SEGMENT; ++o) {
            if (!meets<ALL>(i, o, filter_r, rows)) continue;
            const Taps group = *reinterpret_cast<const Taps*>(w - o * TAPS);
#pragma unroll
            for (int t = 0; t < TAPS; ++t) {
#pragma unroll
                for (int v = 0; v < STRIP; ++v) {
                    const ACC_T value = v + t < TAPS ? now[(v + t) % TAPS] : next[(v + t) % TAPS];
                    sum[o][v] = multiply_add(sum[o][v], value, group.tap[t]);
                }
            }
        }
#pragma unroll
        for (int v = 0; v < TAPS; ++v) now[v] = next[v];
        w += filter_r * TAPS;
    }
    // The last 1 to TAPS taps: no product of what the window does not hold.
    ACC_T last[TAPS - 1];
    load_row(last, row + s + TAPS, shift);
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
        if (s + t >= filter_s) break;
#pragma unroll
        for (int o = 0; o < SEGMENT; ++o) {
            if (!meets<ALL>(i, o, filter_r, rows)) continue;
            const ACC_T tap = w[t - o * TAPS];
#pragma unroll
            for (int v = 0; v < STRIP; ++v) {
                const ACC_T value = v + t < TAPS ? now[(v + t) % TAPS] : last[(v + t) % TAPS];
                sum[o][v] = multiply_add(sum[o][v], value, tap);
            }
        }
    }
}

// Any filter, stride 1: rows of x in a loop, each for SEGMENT rows at once.
__device__ __forceinline__ void sum_windows(Sums& sum, const X_T* __restrict__ x,
                                            const ACC_T* __restrict__ w, const Problem& p,
                                            const Tile& tile, int rows, int shift) {
    const int filter_r = (int)p.filter[AXIS_H], filter_s = (int)p.filter[AXIS_W];
#pragma unroll 1
    for (int i = 0; i < rows - 1 + filter_r; ++i) {
        const X_T* const row = x + i * tile.pitch;
        if (i >= SEGMENT - 1 && i < filter_r) {
            sum_row<true>(sum, row, w + i * TAPS, filter_r, filter_s, i, rows, shift);
        } else {
            sum_row<false>(sum, row, w + i * TAPS, filter_r, filter_s, i, rows, shift);
        }
    }
}

#else

// Any filter, stride and dilation: one column of SEGMENT rows.
__device__ __forceinline__ void sum_windows(Sums& sum, const X_T* __restrict__ x,
                                            const ACC_T* __restrict__ w, const Problem& p,
                                            const Tile& tile, int rows, int shift) {
    const int filter_r = (int)p.filter[AXIS_H], filter_s = (int)p.filter[AXIS_W];
    const int step_o = (int)p.stride[AXIS_H] * tile.pitch;
    const int step_r = (int)p.dilation[AXIS_H] * tile.pitch, step_s = (int)p.dilation[AXIS_W];
    for (int r = 0; r < filter_r; ++r) {
        const X_T* at = x + shift + r * step_r;
        for (int s = 0; s < filter_s; ++s, at += step_s, ++w) {
            const ACC_T tap = *w;
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                if (o < rows) {
                    sum[o][0] = multiply_add(sum[o][0], convert<ACC_T>(at[o * step_o]), tap);
                }
            }
        }
    }
}

#endif

// ---- y -----------------------------------------------------------------------------------------

struct __align__(sizeof(Y_T) * STRIP) Strip {
    uint32 word[sizeof(Y_T) * STRIP >= 4 ? sizeof(Y_T) * STRIP / 4 : 1];
};

__device__ __forceinline__ Strip pack(const ACC_T (&sum)[STRIP]) {
    Strip strip;
    if constexpr (HALF) {
#pragma unroll
        for (int v = 0; v < STRIP; v += 2) {
            strip.word[v / 2] = bits_of<Y_T>(sum[v]);
            if (v + 1 < STRIP) {
                strip.word[v / 2] |= bits_of<Y_T>(sum[(v + 1) % STRIP]) << 16;
            }
        }
    } else {
#pragma unroll
        for (int v = 0; v < STRIP; ++v) {
            if constexpr (sizeof(Y_T) == 8) {
                const long long bits = __double_as_longlong(sum[v]);
                strip.word[2 * v] = (uint32)bits;
                strip.word[2 * v + 1] = (uint32)(bits >> 32);
            } else {
                strip.word[v] = __float_as_uint(sum[v]);
            }
        }
    }
    return strip;
}

__device__ __forceinline__ void write_strip(Y_T* at, const Strip& strip) {
    constexpr int BYTES = sizeof(Y_T) * STRIP;
    if constexpr (BYTES == 16) {
        *reinterpret_cast<uint4*>(at) =
            make_uint4(strip.word[0], strip.word[1], strip.word[2], strip.word[3]);
    } else if constexpr (BYTES == 8) {
        *reinterpret_cast<uint2*>(at) = make_uint2(strip.word[0], strip.word[1]);
    } else if constexpr (BYTES == 4) {
        *reinterpret_cast<uint32*>(at) = strip.word[0];
    }
}

// Rows of y from shared memory, neighbouring threads writing neighbouring elements.
__device__ __forceinline__ void copy_out(Y_T* __restrict__ y, const Y_T* __restrict__ stage,
                                         const Index* __restrict__ plane_y, const Problem& p,
                                         const Tile& tile, int planes, int rows, int columns) {
    if (tile.store == STORE_PLANES) {  // whole planes, one behind the other: one long row
        const int count = planes * rows * columns;
        Y_T* const first = y + plane_y[0];
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const int row = divide((int32)i, p.output_divisor[AXIS_W]);
            first[i] = stage[row * tile.stage_pitch + (i - row * columns)];
        }
        return;
    }
    const int lane = threadIdx.x % 32;
    int plane = 0, row = threadIdx.x / 32;
    while (plane < planes) {
        if (row >= rows) {
            row -= rows;
            ++plane;
            continue;
        }
        Y_T* const to = y + (plane_y[plane] + row * (Index)p.y_strides[3]);
        const Y_T* const from = stage + (plane * rows + row) * tile.stage_pitch;
        for (int column = lane; column < columns; column += 32) to[column] = from[column];
        row += blockDim.x / 32;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
depthwise(const X_T* __restrict__ x, const W_T* __restrict__ w, const B_T* __restrict__ bias,
          Y_T* __restrict__ y, const Problem p, const Tile tile) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ Index plane_x[MAX_PLANES], plane_y[MAX_PLANES];  // where the planes begin
    __shared__ int plane_channel[MAX_PLANES];                   // c
    X_T* const shared_x = reinterpret_cast<X_T*>(shared);
    ACC_T* const shared_w = reinterpret_cast<ACC_T*>(shared + tile.weights_at);
    Y_T* const stage = reinterpret_cast<Y_T*>(shared + tile.stage_at);

    int rest = blockIdx.x;
    const int tile_column = split_off(rest, tile.tile_columns);
    const int tile_row = split_off(rest, tile.tile_rows);
    const int first_channel = split_off(rest, tile.channel_tiles) * tile.channels;
    const Index first_plane = (Index)rest * (Index)tile.planes.value;
    const Index all_planes = (Index)p.batch * (Index)p.in_channels;
    const int planes = (int)min((Index)tile.planes.value, all_planes - first_plane);
    const int channels = (int)min((Index)tile.channels, (Index)p.group_out - first_channel);

    const int tile_rows = tile.segments * tile.segment_rows;
    const int tile_width = (int)tile.strips.value * STRIP;
    const Index first_p = (Index)tile_row * tile_rows, first_q = (Index)tile_column * tile_width;
    const int rows = (int)min((Index)tile_rows, (Index)p.output[AXIS_H] - first_p);
    const int columns = (int)min((Index)tile_width, (Index)p.output[AXIS_W] - first_q);

    for (int i = threadIdx.x; i < (int)tile.planes.value; i += blockDim.x) {
        // The last block's missing planes repeat its last one, unstored.
        Index n = first_plane + min(i, planes - 1);
        const Index c = split_off(n, tile.in_channels);
        plane_x[i] = n * (Index)p.x_strides[0] + c * (Index)p.x_strides[1];
        // y[n, c*M + first_channel, first_p, first_q]
        plane_y[i] = n * (Index)p.y_strides[0] +
                     (c * (Index)p.group_out + first_channel) * (Index)p.y_strides[1] +
                     first_p * (Index)p.y_strides[3] + first_q * (Index)p.y_strides[4];
        plane_channel[i] = (int)c;
    }
    __syncthreads();  // fill reads the planes' places

    const Index first_column = first_q * (Index)p.stride[AXIS_W] - (Index)p.pad_lo[AXIS_W];
    const int shift = HALF && tile.pairs ? (int)(first_column & 1) : 0;
    const int input_rows = (rows - 1) * (int)p.stride[AXIS_H] +
                           ((int)p.filter[AXIS_H] - 1) * (int)p.dilation[AXIS_H] + 1;
    const int input_columns = (columns - 1) * (int)p.stride[AXIS_W] +
                              ((int)p.filter[AXIS_W] - 1) * (int)p.dilation[AXIS_W] + 1;
    fill(shared_x, x, plane_x, p, tile,
         first_p * (Index)p.stride[AXIS_H] - (Index)p.pad_lo[AXIS_H], first_column - shift,
         input_columns + shift, input_rows);
    cp_async_commit();
    fill_weights(shared_w, w, plane_channel, p, tile, first_channel, channels);
    cp_async_wait<0>();
    __syncthreads();  // x and w are there

    int item = threadIdx.x;
    const int strip = split_off(item, tile.strips);
    const int plane = split_off(item, tile.planes);
    const int segment = item;
    // Threads beyond the last segment, plane or column have no rows, and only meet the barriers.
    const int first_o = segment * tile.segment_rows;
    const int left = columns - strip * STRIP;
    const int my_rows = segment < tile.segments && plane < planes && left > 0
                            ? min(tile.segment_rows, rows - first_o)
                            : 0;
    const int step = STRIDE ? STRIDE : (int)p.stride[AXIS_W];
    const int step_h = STRIDE ? STRIDE : (int)p.stride[AXIS_H];
    const X_T* const window =
        shared_x + plane * tile.plane_pitch + first_o * step_h * tile.pitch + strip * STRIP * step;
    const bool staged = tile.store >= STORE_ROWS;

    for (int channel = 0; channel < channels; ++channel) {
        Sums sum;
#pragma unroll
        for (int o = 0; o < SEGMENT; ++o) {
#pragma unroll
            for (int v = 0; v < STRIP; ++v) sum[o][v] = zero<ACC_T>();
        }
        if (my_rows > 0) {
            const ACC_T* const taps =
                shared_w + (channel * (int)tile.planes.value + plane) * tile.filter_pitch;
            sum_windows(sum, window, taps, p, tile, my_rows, shift);
            if (bias != nullptr) {
                const Index k =
                    (Index)plane_channel[plane] * (Index)p.group_out + first_channel + channel;
                const ACC_T b = load<ACC_T>(bias, k * (Index)p.bias_stride, 0);
#pragma unroll
                for (int o = 0; o < SEGMENT; ++o) {
#pragma unroll
                    for (int v = 0; v < STRIP; ++v) sum[o][v] = add(sum[o][v], b);
                }
            }
        }
        Y_T* const y_channel = y + channel * (Index)p.y_strides[1];
        if (!staged) {
            if (my_rows <= 0) continue;
            // y[n, k, first_p + first_o, first_q + strip*STRIP]
            Y_T* at = y_channel + (plane_y[plane] + first_o * (Index)p.y_strides[3] +
                                   strip * STRIP * (Index)p.y_strides[4]);
            const bool vectors = tile.store == STORE_VECTORS && left >= STRIP;
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                if (o >= my_rows) break;
                if (vectors) {
                    write_strip(at, pack(sum[o]));
                } else {
#pragma unroll
                    for (int v = 0; v < STRIP; ++v) {
                        if (v < left) at[v * (Index)p.y_strides[4]] = convert<Y_T>(sum[o][v]);
                    }
                }
                at += (Index)p.y_strides[3];
            }
            continue;
        }
        __syncthreads();  // x has been read, or the last channel's y: y may go there
        if (my_rows > 0) {
            Y_T* at = stage + (plane * rows + first_o) * tile.stage_pitch + strip * STRIP;
#pragma unroll
            for (int o = 0; o < SEGMENT; ++o) {
                if (o < my_rows) write_strip(at + o * tile.stage_pitch, pack(sum[o]));
            }
        }
        __syncthreads();  // all of y is there
        copy_out(y_channel, stage, plane_y, p, tile, planes, rows, columns);
    }
}

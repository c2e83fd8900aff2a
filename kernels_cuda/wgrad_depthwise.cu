// The gradient of a depthwise filter: every output channel k sees one input channel, k / M.
//
//   dw[k, 0, r, s] = sum over n, p, q of
//       dy[n, k, p, q] * x[n, k / M, p*stride + r*dilation - pad, q*stride + s*dilation - pad]
//
// with M = K/C, the channel multiplier, and x read beyond its edges as the boundary mode says.
//
// Mapping: a block owns some channels, and of every filter all taps, or some slices of TAPS x TAPS
// of a large one. It goes through its share of the images' tiles, brings each to shared memory, x
// with its halo and dy, and each thread keeps its TAPS x TAPS sums in registers all the while.
//
//   block   -> (channels, slices, share), the first fastest
//   thread  -> (slice, segment, channel, strip), the strip fastest; with CHANNELS_LAST
//              (slice, segment, strip, channel), the channel fastest
//   strip x segment = STRIP columns x segment_rows rows of dy, one row of x after another; a wide
//                     tile's next strips are worked on in further passes
//
//      row i of x   |. . . . . .|        (STRIP-1)*STRIDE + TAPS of it, in registers
//          |
//          +--> sum[0][..] += row * dy[i]       the rows of dy that row i meets are in registers
//          +--> sum[1][..] += row * dy[i-1]     as well, and take turns in there: each element of
//          +--> sum[2][..] += row * dy[i-2]     shared memory is loaded once for TAPS rows of taps
//
// In the end the threads of a channel add up their sums, in a fixed order, and write them to dw, or
// where several blocks share the images to partial[share][k][r][s], which split_sum.cu adds up.
//
// Shared memory: tile.stages of these, one being filled while another is worked on, and in the end
// ACC_T sums[TAPS][threads], one row of taps after the other.
//
//   planes:         | x: channel 0, rows of row_pitch | channel 1 .. | dy: the same |
//                     SHIFT columns early, so that a row that begins pad = TAPS/2 columns before
//                     x lies in shared memory as it does in x, to be copied 16 bytes at a time
//   CHANNELS_LAST:  | x: row 0: | pixel 0: channels | pixel 1 .. | row 1 .. | dy: the same |
//
// Macros:
//   X_T, W_T, B_T, Y_T, ACC_T, INDEX_T  depthwise.cuh; W_T is dw's, Y_T dy's
//   CHANNELS_LAST  0, or 1: neighbours in the memory of x and dy are channels
//   TAPS           the filter's extents, 3, 5 or 7; where SLICED those of a slice, 4 or 8
//   SLICED         0, or 1: any filter
//   STRIDE         1 or 2, with dilation 1; or 0: the problem's own, where SLICED
//   STRIP          columns of dy per thread: STRIP*STRIDE elements of x are 8 or 16 bytes, or with
//                  CHANNELS_LAST 1 to 4; 1 where STRIDE is 0
//   THREADS        of a block at most: whole warps, up to 512
//   BLOCKS         that share a multiprocessor at least, 1 to 8: bounds the registers
//
// Launched by gpuconv/cuda_backend/wgrad_depthwise.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DTAPS=3 -DSTRIDE=1 -DSTRIP=4 wgrad_depthwise.cu

#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif
#ifndef TAPS
#define TAPS 3
#endif
#ifndef SLICED
#define SLICED 0
#endif
#ifndef STRIDE
#define STRIDE 1
#endif
#ifndef STRIP
#define STRIP 4
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

static_assert(CHANNELS_LAST == 0 || CHANNELS_LAST == 1, "CHANNELS_LAST: 0 or 1");
static_assert(SLICED ? TAPS == 4 || TAPS == 8 : TAPS == 3 || TAPS == 5 || TAPS == 7,
              "TAPS: 3, 5 or 7, or where SLICED 4 or 8");
static_assert(STRIDE == 1 || (STRIDE == 2 && !SLICED) || (STRIDE == 0 && SLICED),
              "STRIDE: 1, or 2 where not SLICED, or 0 where SLICED");
static_assert(STRIDE == 0 ? STRIP == 1
              : CHANNELS_LAST
                  ? STRIP >= 1 && STRIP <= 4
                  : STRIP * STRIDE * sizeof(X_T) == 8 || STRIP * STRIDE * sizeof(X_T) == 16,
              "STRIP: a strip takes 8 or 16 bytes of x");
static_assert(THREADS % 32 == 0 && THREADS <= 512, "THREADS: whole warps, up to 512");
static_assert(BLOCKS >= 1 && BLOCKS <= 8, "BLOCKS: 1 to 8");

constexpr int MAX_CHANNELS = 128;         // of a block
constexpr int STEP = STRIDE ? STRIDE : 1;
constexpr int CHUNK = STRIP * STEP;       // elements of x from strip to strip
constexpr int COUNT = CHUNK - STEP + TAPS;  // elements of a row of x that a strip meets
// The tile of planes begins so many columns before the first window; `SKEW` of them are in a
// strip's first load.
constexpr int SHIFT = CHANNELS_LAST || SLICED ? 0 : 16 / (int)sizeof(X_T) - TAPS / 2;
constexpr int SKEW = SHIFT % CHUNK;
// Elements from pixel to pixel, where memory runs channels last, of x and dy in shared memory.
constexpr int PIXEL = TAPS == 8 ? 16 : 32;
constexpr int COLUMN_PITCH = CHANNELS_LAST ? PIXEL : 1;

// How one array lies in shared memory, and is brought there.
struct Area {
    Divisor rows;     // planes: of one channel's tile; CHANNELS_LAST: unused
    Divisor columns;  // CHANNELS_LAST: pixels of a row
    Divisor units;    // copies that make a row; CHANNELS_LAST: a pixel
    int32 row_pitch, channel_pitch;  // elements
    int32 unit;        // elements of one copy
    int32 fill_shift;  // planes: log2 of the threads that fill one row
};
static_assert(sizeof(Area) == 64, "wgrad_depthwise.AREA mirrors this");

enum : int { OF_X, OF_Y };

struct Tile {
    Area area[2];
    Divisor tile_columns, tile_rows;        // of an image
    Divisor channel_blocks, slice_blocks;   // of the grid
    Divisor strips, channels, segments;     // of the threads of one slice
    Divisor slices_s;                       // of a row of the filter
    int32 segment_rows;
    int32 slices;      // of a block
    int32 all_slices;  // of the filter
    int32 shares;
    int32 y_at;         // elements, from x to dy
    int32 stage_pitch;  // from one stage to the next
    int32 stages;       // 1 or 2
    int32 team;         // threads that add up one sum: 1 to 32
    int32 first_tap, tap_step_r, tap_step_s;  // of partial's filters: they run as w's memory does
    int32 passes;       // strips of a tile that a thread works on, one after the other
};
static_assert(sizeof(Tile) == 304, "wgrad_depthwise.TILE mirrors this");

// ---- from global to shared memory --------------------------------------------------------------

// The array that a tile is brought from: x, or dy, which is never read beyond its edges.
struct Source {
    const X_T* __restrict__ from;
    Index image;  // of the tile
    Index first_row, first_column, height, width;
    Index row_stride, column_stride;
    int rows;  // to bring
    int boundary;
};

// to[0] = from[at], or zero; complete after cp_async_wait and a barrier.
__device__ __forceinline__ void copy_element(X_T* to, const X_T* __restrict__ from, Index at,
                                             bool valid) {
    if constexpr (sizeof(X_T) == 8) {
        cp_async_8(to, valid ? from + at : from, valid);
    } else if constexpr (sizeof(X_T) == 4) {
        cp_async_4(to, valid ? from + at : from, valid);
    } else {
        to[0] = valid ? from[at] : convert<X_T>(0.0f);
    }
}

// The same of `unit` neighbours, which both lie at a multiple of their size: 4, 8 or 16 bytes.
__device__ __forceinline__ void copy_unit(X_T* to, const X_T* __restrict__ from, Index at, int unit,
                                          bool valid) {
    const X_T* const source = valid ? from + at : from;
    const int bytes = unit * (int)sizeof(X_T);
    if (bytes == 16) {
        cp_async_16(to, source, valid);
    } else if (bytes == 8) {
        cp_async_8(to, source, valid);
    } else {
        cp_async_4(to, source, valid);
    }
}

// channel_at[i]: where the block's channel i begins in an image.
#if CHANNELS_LAST

// A thread stays with one piece of the channels and goes from pixel to pixel.
__device__ __forceinline__ void fill(X_T* __restrict__ tile, const Source& source,
                                     const Index* __restrict__ channel_at, const Area& area,
                                     int channels) {
    int start = threadIdx.x;
    const int channel = split_off(start, area.units) * area.unit;
    const int step = divide((int32)blockDim.x, area.units);
    if (start >= step) return;
    const int width = (int)area.columns.value;
    const int row_step = divide(step, area.columns), column_step = step - row_step * width;
    int row = divide(start, area.columns), column = start - row * width;
    const bool whole = area.unit > 1 && channel + area.unit <= channels;
    const int live = min(area.unit, channels - channel);
#pragma unroll 4
    while (row < source.rows) {
        const Index h = source_index(source.first_row + row, source.height, source.boundary);
        const Index v = source_index(source.first_column + column, source.width, source.boundary);
        const bool valid = h >= 0 && v >= 0;
        const Index pixel =
            source.image + h * source.row_stride + v * source.column_stride;
        X_T* const to = tile + row * area.row_pitch + column * COLUMN_PITCH + channel;
        if (whole) {
            copy_unit(to, source.from, pixel + channel_at[channel], area.unit, valid);
        } else {
            for (int i = 0; i < live; ++i) {
                copy_element(to + i, source.from, pixel + channel_at[channel + i], valid);
            }
        }
        row += row_step;
        column += column_step;
        if (column >= width) {
            column -= width;
            ++row;
        }
    }
}

#else

// Threads go along a row, `1 << fill_shift` of them side by side; a thread stays in its columns.
__device__ __forceinline__ void fill(X_T* __restrict__ tile, const Source& source,
                                     const Index* __restrict__ channel_at, const Area& area,
                                     int channels) {
    const int side = 1 << area.fill_shift;
    const int step = blockDim.x >> area.fill_shift;
    const int rows = (int)area.rows.value, units = (int)area.units.value;
    const int channel_step = divide(step, area.rows), row_step = step - channel_step * rows;
    const int start = threadIdx.x >> area.fill_shift;
    const int start_channel = divide(start, area.rows);
    const int start_row = start - start_channel * rows;

    for (int unit = threadIdx.x & (side - 1); unit < units; unit += side) {
        const int column = unit * area.unit;
        const Index position = source.first_column + column;
        // All of a unit lies in x, or all of it is zeros; a lone element may lie anywhere.
        const bool inside = position >= 0 && position + area.unit <= source.width;
        const bool outside = source.boundary == BOUNDARY_ZEROS &&
                             (position >= source.width || position + area.unit <= 0);
        const Index lone = source_index(position, source.width, source.boundary);
        int row = start_row, channel = start_channel;
#pragma unroll 4
        while (channel < channels) {
            if (row < source.rows) {
                X_T* const to = tile + channel * area.channel_pitch + row * area.row_pitch + column;
                const Index h =
                    source_index(source.first_row + row, source.height, source.boundary);
                const Index x_row = source.image + channel_at[channel] + h * source.row_stride;
                if (area.unit == 1) {
                    copy_element(to, source.from, x_row + lone * source.column_stride,
                                 h >= 0 && lone >= 0);
                } else if (inside || outside) {
                    copy_unit(to, source.from, x_row + position, area.unit, h >= 0 && inside);
                } else {
                    for (int i = 0; i < area.unit; ++i) {
                        const Index v =
                            source_index(position + i, source.width, source.boundary);
                        copy_element(to + i, source.from, x_row + v, h >= 0 && v >= 0);
                    }
                }
            }
            row += row_step;
            channel += channel_step;
            if (row >= rows) {
                row -= rows;
                ++channel;
            }
        }
    }
}

#endif

// ---- from shared memory to registers -----------------------------------------------------------

// values[i] = from[SKIP + i] for neighbours of a plane's row; `from` lies at a multiple of EACH.
template <int N, int SKIP, int EACH>
__device__ __forceinline__ void load_neighbours(ACC_T (&values)[N], const X_T* __restrict__ from) {
    constexpr int WORDS = EACH * (int)sizeof(X_T) / 4;  // of one load
    constexpr int LOADS = (SKIP + N + EACH - 1) / EACH;
    static_assert(WORDS == 2 || WORDS == 4, "load_neighbours: 8 or 16 bytes at a time");
    uint32 word[LOADS * WORDS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        if constexpr (WORDS == 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(from + i * EACH);
            word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
        } else {
            const uint2 v = *reinterpret_cast<const uint2*>(from + i * EACH);
            word[2 * i] = v.x, word[2 * i + 1] = v.y;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int at = SKIP + i;
        if constexpr (HALF) {
            values[i] = at % 2 ? high_of<X_T>(word[at / 2]) : low_of<X_T>(word[at / 2]);
        } else if constexpr (sizeof(X_T) == 8) {
            values[i] = __hiloint2double((int)word[2 * at + 1], (int)word[2 * at]);
        } else {
            values[i] = __uint_as_float(word[at]);
        }
    }
}

// The elements of one row of x that a strip meets; `at` is the strip's first load.
__device__ __forceinline__ void load_x(ACC_T (&row)[COUNT], const X_T* __restrict__ at) {
    if constexpr (CHANNELS_LAST || STRIDE == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) row[i] = convert<ACC_T>(at[i * COLUMN_PITCH]);
    } else {
        load_neighbours<COUNT, SKEW, CHUNK>(row, at);
    }
}

// The strip's elements of one row of dy.
__device__ __forceinline__ void load_y(ACC_T (&row)[STRIP], const Y_T* __restrict__ at) {
    if constexpr (CHANNELS_LAST || STRIDE == 0) {
#pragma unroll
        for (int i = 0; i < STRIP; ++i) row[i] = convert<ACC_T>(at[i * COLUMN_PITCH]);
    } else {
        load_neighbours<STRIP, 0, STRIP>(row, at);
    }
}

// ---- sums --------------------------------------------------------------------------------------

typedef ACC_T Sums[TAPS][TAPS];

// What of a segment, and of a slice, is there.
struct Live {
    int rows;     // of dy
    int columns;  // of the strip
    int taps_r, taps_s;
};

#if STRIDE == 0

// Any stride and dilation: x and y are the first elements that tap (0, 0) of the slice meets.
__device__ __forceinline__ void accumulate(Sums& sum, const X_T* __restrict__ x,
                                           const Y_T* __restrict__ y, const Tile& tile,
                                           const Problem& p, const Live& live) {
    const int step = (int)p.stride[AXIS_H] * tile.area[OF_X].row_pitch;
    const int step_r = (int)p.dilation[AXIS_H] * tile.area[OF_X].row_pitch;
    const int step_s = (int)p.dilation[AXIS_W] * COLUMN_PITCH;
    if (live.columns <= 0) return;
    for (int o = 0; o < live.rows; ++o) {
        const ACC_T dy = convert<ACC_T>(y[o * tile.area[OF_Y].row_pitch]);
#pragma unroll
        for (int r = 0; r < TAPS; ++r) {
            if (r >= live.taps_r) break;
#pragma unroll
            for (int s = 0; s < TAPS; ++s) {
                if (s >= live.taps_s) break;
                const X_T* const at = x + o * step + r * step_r + s * step_s;
                sum[r][s] = multiply_add(sum[r][s], convert<ACC_T>(*at), dy);
            }
        }
    }
}

#else

constexpr int WINDOW = (TAPS - 1) / STRIDE + 1;  // rows of dy that one row of x meets
constexpr int PERIOD = WINDOW * STRIDE;          // rows of x until the first is replaced

// Rows i to i + PERIOD of x, with the WINDOW rows of dy up to the one that the first of them meets
// in `window`, row o at o % WINDOW. INSIDE: every row of x meets all of its rows of dy, and there
// are all columns and taps; else what is not there is left out, for it need not be finite.
template <bool INSIDE>
__device__ __forceinline__ void slide(Sums& sum, ACC_T (&window)[WINDOW][STRIP],
                                      const X_T* __restrict__ x, const Y_T* __restrict__ y,
                                      const Tile& tile, int i, int x_rows, const Live& live) {
#pragma unroll
    for (int k = 0; k < PERIOD; ++k) {
        if (!INSIDE && i + k >= x_rows) break;
        if (k % STRIDE == 0 && (INSIDE || i + k < live.rows * STRIDE)) {
            load_y(window[k / STRIDE], y + (i + k) / STRIDE * tile.area[OF_Y].row_pitch);
        }
        ACC_T row[COUNT];
        load_x(row, x + (i + k) * tile.area[OF_X].row_pitch);
#pragma unroll
        for (int r = 0; r < TAPS; ++r) {
            if ((k - r) % STRIDE != 0) continue;
            const int slot = ((k - r) / STRIDE + WINDOW) % WINDOW;
            if (!INSIDE && (i + k < r || i + k - r >= live.rows * STRIDE)) continue;
            if (!INSIDE && SLICED && r >= live.taps_r) continue;
#pragma unroll
            for (int v = 0; v < STRIP; ++v) {
                if (!INSIDE && v >= live.columns) continue;
#pragma unroll
                for (int s = 0; s < TAPS; ++s) {
                    sum[r][s] = multiply_add(sum[r][s], row[v * STRIDE + s], window[slot][v]);
                }
            }
        }
    }
}

__device__ __forceinline__ void accumulate(Sums& sum, const X_T* __restrict__ x,
                                           const Y_T* __restrict__ y, const Tile& tile,
                                           const Problem& p, const Live& live) {
    if (live.rows <= 0 || live.columns <= 0) return;
    ACC_T window[WINDOW][STRIP];
#pragma unroll
    for (int o = 0; o < WINDOW; ++o) {
#pragma unroll
        for (int v = 0; v < STRIP; ++v) window[o][v] = zero<ACC_T>();
    }
    const int x_rows = (live.rows - 1) * STRIDE + (SLICED ? live.taps_r : TAPS);
    const bool whole = live.columns >= STRIP && (!SLICED || live.taps_r == TAPS);
#pragma unroll 1
    for (int i = 0; i < x_rows; i += PERIOD) {
        if (whole && i >= TAPS - 1 && i + PERIOD <= live.rows * STRIDE) {
            slide<true>(sum, window, x, y, tile, i, x_rows, live);
        } else {
            slide<false>(sum, window, x, y, tile, i, x_rows, live);
        }
    }
}

#endif

// ---- from registers to dw ----------------------------------------------------------------------

// Where the thread's sums belong, and how many such threads there are.
struct Place {
    int slice, segment, channel, strip;
};

__device__ __forceinline__ Place place_of(int thread, const Tile& tile) {
    Place place;
    if constexpr (CHANNELS_LAST) {
        place.channel = split_off(thread, tile.channels);
        place.strip = split_off(thread, tile.strips);
    } else {
        place.strip = split_off(thread, tile.strips);
        place.channel = split_off(thread, tile.channels);
    }
    place.segment = split_off(thread, tile.segments);
    place.slice = thread;
    return place;
}

// The inverse, of contributor j = segment * strips + strip.
__device__ __forceinline__ int thread_of(int slice, int channel, int j, const Tile& tile) {
    const int strips = (int)tile.strips.value, channels = (int)tile.channels.value;
    const int segments = (int)tile.segments.value;
    if constexpr (CHANNELS_LAST) {
        return (slice * segments * strips + j) * channels + channel;
    } else {
        const int strip = split_off(j, tile.strips);
        return ((slice * segments + j) * channels + channel) * strips + strip;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wgrad_depthwise(const X_T* __restrict__ x, W_T* __restrict__ w, const Y_T* __restrict__ y,
                ACC_T* __restrict__ partial, const Problem p, const Tile tile) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ Index channel_at[2][MAX_CHANNELS];  // where the channels of x and dy begin

    int rest = blockIdx.x;
    const int first_k = split_off(rest, tile.channel_blocks) * (int)tile.channels.value;
    const int first_slice = split_off(rest, tile.slice_blocks) * tile.slices;
    const int share = rest;
    const int channels = (int)min((Index)tile.channels.value, (Index)p.out_channels - first_k);

    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
        Index k = first_k + i;
        channel_at[OF_Y][i] = k * (Index)p.y_strides[1];
        channel_at[OF_X][i] = divide(k, p.group_out_divisor) * (Index)p.x_strides[1];
    }
    __syncthreads();  // fill reads where the channels begin

    const int stride_h = STRIDE ? STRIDE : (int)p.stride[AXIS_H];
    const int stride_w = STRIDE ? STRIDE : (int)p.stride[AXIS_W];
    const int dilation_h = STRIDE ? 1 : (int)p.dilation[AXIS_H];
    const int dilation_w = STRIDE ? 1 : (int)p.dilation[AXIS_W];
    const int tile_height = (int)tile.segments.value * tile.segment_rows;
    const int pass_width = (int)tile.strips.value * STRIP;
    const int tile_width = pass_width * tile.passes;

    const Place place = place_of((int)threadIdx.x, tile);
    const int slice = first_slice + place.slice;
    const bool busy = place.slice < tile.slices && slice < tile.all_slices &&
                      place.channel < channels;
    int first_r = slice, first_s = 0;
    first_s = split_off(first_r, tile.slices_s) * TAPS;
    first_r *= TAPS;
    Live live;
    live.taps_r = SLICED ? min(TAPS, (int)p.filter[AXIS_H] - first_r) : TAPS;
    live.taps_s = SLICED ? min(TAPS, (int)p.filter[AXIS_W] - first_s) : TAPS;
    // The thread's first elements, from the start of a stage.
    const int first_o = place.segment * tile.segment_rows, first_v = place.strip * STRIP;
    const Area &of_x = tile.area[OF_X], &of_y = tile.area[OF_Y];
    const int x_offset = place.channel * of_x.channel_pitch +
                         (first_o * stride_h + first_r * dilation_h) * of_x.row_pitch +
                         (first_v * stride_w + first_s * dilation_w + SHIFT - SKEW) *
                             COLUMN_PITCH;
    const int y_offset = tile.y_at + place.channel * of_y.channel_pitch +
                         first_o * of_y.row_pitch + first_v * COLUMN_PITCH;

    Sums sum;
#pragma unroll
    for (int r = 0; r < TAPS; ++r) {
#pragma unroll
        for (int s = 0; s < TAPS; ++s) sum[r][s] = zero<ACC_T>();
    }

    // Items are the tiles of all images: i = (n * tile rows + tile row) * tile columns + column.
    const int64 items = p.batch * tile.tile_rows.value * tile.tile_columns.value;
    const Index first = (Index)(items * share / tile.shares);
    const Index last = (Index)(items * (share + 1) / tile.shares);

    // Both tiles of an item come to `to`, one after the other in the same code.
    const auto fetch = [&](Index item, X_T* to) {
        const Index first_q = split_off(item, tile.tile_columns) * tile_width;
        const Index first_p = split_off(item, tile.tile_rows) * tile_height;
        const int rows = (int)min((Index)tile_height, (Index)p.output[AXIS_H] - first_p);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            Source source;
            if (i == OF_X) {  // x[n, k/M, first_p*stride - pad, first_q*stride - pad - SHIFT]
                source.from = x;
                source.image = item * (Index)p.x_strides[0];
                source.first_row = first_p * stride_h - (Index)p.pad_lo[AXIS_H];
                source.first_column = first_q * stride_w - (Index)p.pad_lo[AXIS_W] - SHIFT;
                source.height = (Index)p.input[AXIS_H], source.width = (Index)p.input[AXIS_W];
                source.row_stride = (Index)p.x_strides[3];
                source.column_stride = (Index)p.x_strides[4];
                source.rows = (rows - 1) * stride_h +
                              ((int)p.filter[AXIS_H] - 1) * dilation_h + 1;
                source.boundary = p.boundary;
            } else {  // dy[n, k, first_p, first_q]
                source.from = y;
                source.image = item * (Index)p.y_strides[0];
                source.first_row = first_p, source.first_column = first_q;
                source.height = (Index)p.output[AXIS_H], source.width = (Index)p.output[AXIS_W];
                source.row_stride = (Index)p.y_strides[3];
                source.column_stride = (Index)p.y_strides[4];
                source.rows = rows;
                source.boundary = BOUNDARY_ZEROS;
            }
            fill(to, source, channel_at[i], tile.area[i], channels);
            to += tile.y_at;
        }
    };

    // While an item is worked on, the next is on its way to the other stage, if there are two.
    const int ahead = tile.stages - 1;
    for (Index next = first; next < last + ahead; ++next) {
        X_T* const stage = reinterpret_cast<X_T*>(shared);
        if (next < last) fetch(next, stage + ((next - first) & ahead) * tile.stage_pitch);
        cp_async_commit();
        Index n = next - ahead;
        if (n < first) continue;
        const X_T* const from = stage + ((n - first) & ahead) * tile.stage_pitch;
        if (ahead) {
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();  // the tile is there
        const Index first_q = split_off(n, tile.tile_columns) * tile_width;
        const Index first_p = split_off(n, tile.tile_rows) * tile_height;
        live.rows = (int)min((Index)tile.segment_rows,
                             (Index)p.output[AXIS_H] - first_p - place.segment * tile.segment_rows);
        const Index columns = (Index)p.output[AXIS_W] - first_q - place.strip * STRIP;
#pragma unroll 1
        for (int pass = 0; busy && pass < tile.passes; ++pass) {
            const int ahead_by = pass * pass_width;
            live.columns = (int)min((Index)STRIP, columns - ahead_by);
            accumulate(sum, from + x_offset + ahead_by * stride_w * COLUMN_PITCH,
                       from + y_offset + ahead_by * COLUMN_PITCH, tile, p, live);
        }
        __syncthreads();  // the tile has been read, and may be replaced
    }
    cp_async_wait<0>();
    __syncthreads();  // nothing is on its way to where the sums go now

    // The threads of a channel and slice add up sum[r][s], for one r after the other.
    ACC_T* const stack = reinterpret_cast<ACC_T*>(shared);
    const int threads = blockDim.x, team = tile.team, member = threadIdx.x & (team - 1);
    const int contributors = (int)(tile.segments.value * tile.strips.value);
    const int outputs = tile.slices * (int)tile.channels.value * TAPS;
    const int teams = threads / team;
#pragma unroll
    for (int r = 0; r < TAPS; ++r) {
#pragma unroll
        for (int s = 0; s < TAPS; ++s) stack[s * threads + threadIdx.x] = sum[r][s];
        __syncthreads();  // the row of taps is there
        for (int begin = 0; begin < outputs; begin += teams) {
            const int output = begin + (int)threadIdx.x / team;
            int their_slice = output;
            const int channel = split_off(their_slice, tile.channels);
            const int s = their_slice % TAPS;
            their_slice /= TAPS;
            ACC_T total = zero<ACC_T>();
            if (output < outputs) {
                for (int j = member; j < contributors; j += team) {
                    total = add(total,
                                stack[s * threads + thread_of(their_slice, channel, j, tile)]);
                }
            }
            for (int half = team / 2; half > 0; half /= 2) {
                total = add(total, __shfl_xor_sync(0xffffffffu, total, half));
            }
            int to_r = first_slice + their_slice, to_s = 0;
            to_s = split_off(to_r, tile.slices_s) * TAPS + s;
            to_r = to_r * TAPS + r;
            const Index k = first_k + channel;
            if (member == 0 && output < outputs && channel < channels &&
                first_slice + their_slice < tile.all_slices && to_r < (int)p.filter[AXIS_H] &&
                to_s < (int)p.filter[AXIS_W]) {
                if (partial != nullptr) {  // partial[share, k, r, s], flipped where w is
                    const int64 filter = share * p.out_channels + k;
                    partial[filter * p.filter[AXIS_H] * p.filter[AXIS_W] + tile.first_tap +
                            to_r * tile.tap_step_r + to_s * tile.tap_step_s] = total;
                } else {  // dw[k, 0, r, s]
                    store(w,
                          (Index)p.w_offset + k * (Index)p.w_strides[0] +
                              to_r * (Index)p.w_strides[3] + to_s * (Index)p.w_strides[4],
                          0, total);
                }
            }
        }
        __syncthreads();  // the row of taps has been read
    }
}

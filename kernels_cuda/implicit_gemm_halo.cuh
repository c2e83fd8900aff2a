// What the taps of neighbouring output pixels read of x, in shared memory once for all of them.
//
// A buffer has 64 bytes, some channels, of each pixel from the first that a tile of output pixels
// reads to the last, in the padded image: `planes` x `rows` x columns, as far as taps reach.
// A line is those pixels of a row whose columns leave one remainder ("phase") by the stride. Lines
// follow each other by phase, row, plane and image:
//     line = ((image*planes + d)*rows + h)*phases + w % phases,    column = w / phases
// Under one tap, then, neighbouring output pixels of a row read neighbouring columns of a line:
// those of tap (0, 0, 0), moved on by the same Shift. Any eight neighbouring output pixels are to
// read different banks, in however many rows they are. With
//     turn = ((image*Z + d/stride)*P + h/stride)*Q + column,
// which from one output pixel to the next grows by one, chunk c (16 bytes) lies at c ^ (turn/2 % 4)
// in the half turn % 2 of the 128 bytes that two neighbouring columns share:
//     bank         0   4   8  12  16  20  24  28
//     turn 0       0   1   2   3 | 0   1   2   3   turn 1
//     turn 2       1   0   3   2 | 1   0   3   2   turn 3
//     turn 4       2   3   0   1 | 2   3   0   1   turn 5
//     turn 6       3   2   1   0 | 3   2   1   0   turn 7
//
// gpuconv/cuda_backend/implicit_gemm_mma.py makes a Halo for each launch (`Halo`, `HALO_LAYOUT`).
#pragma once

#include "implicit_gemm.cuh"
#include "indexing.cuh"
#include "problem.cuh"

struct Halo {
    Divisor line;          // columns of a line as threads count them: a multiple of 8
    Divisor phases;        // of columns
    Divisor rows, planes;  // of a padded image
    Divisor row_stride, plane_stride;
    int32 taps;
    int32 columns;         // of a line
    int32 pitch;           // from one line to the next in a buffer, in columns: even
    int32 buffer;          // pixels of a buffer
    int32 last_line;       // from the line of tap (0, 0, 0) to the last that a tap reads
    int32 last_column;     // the same of columns
    int32 places;          // pixels that a thread loads
    int32 loads;           // chunks that it loads while those of one tap are multiplied
    int32 bytes;           // of shared memory for two buffers, places and shifts
    int32 split_channels;  // of one split
};
static_assert(sizeof(Halo) == 136, "implicit_gemm_mma.HALO_LAYOUT mirrors this");

constexpr int HALO_CHUNKS = 4;  // of a pixel

// The line and the column of tap (0, 0, 0) of an output pixel.
struct Start {
    int32 line, column;
};
// Where a pixel lies in x, in channel 0 of its group; its chunk 0 in a buffer, times two, plus one
// if it is read and not zero; or -1, where there is no pixel to load.
struct __align__(8) Place {
    int32 at, to;
};
// How much further a tap's pixels lie in a buffer, in chunks, and how much their turns grow.
struct __align__(8) Shift {
    int32 chunks, turn;
};

__device__ __forceinline__ Start start_of(int32 pixel, const Halo& halo, const Problem& p) {
    Start start;
    start.column = split_off(pixel, p.output_divisor[AXIS_W]);
    const int32 h = split_off(pixel, p.output_divisor[AXIS_H]) * (int32)p.stride[AXIS_H];
    const int32 d = split_off(pixel, p.output_divisor[AXIS_D]) * (int32)p.stride[AXIS_D];
    start.line = ((pixel * (int32)halo.planes.value + d) * (int32)halo.rows.value + h) *
                 (int32)halo.phases.value;
    return start;
}

// The first pixel of a buffer, counted in a buffer of all: its column is even.
__device__ __forceinline__ int32 first_of(const Start& start, const Halo& halo) {
    return start.line * halo.pitch + (start.column & ~1);
}

__device__ __forceinline__ int32 turn_of(int32 image, int32 d, int32 h, int32 column,
                                         const Halo& halo, const Problem& p) {
    d = image * (int32)p.output[AXIS_D] + divide(d, halo.plane_stride);
    h = d * (int32)p.output[AXIS_H] + divide(h, halo.row_stride);
    return h * (int32)p.output[AXIS_W] + column;
}

// Of pixel `n` as threads count them, where a buffer begins with `first`, and a group at x[group].
__device__ __forceinline__ Place place_of(int32 n, int32 first, int32 group, const Halo& halo,
                                          const Problem& p) {
    const int32 column = split_off(n, halo.line);
    const int32 to = n * halo.pitch + column - first;
    if ((column >= halo.columns) | (to < 0)) return {0, -1};
    int32 w = split_off(n, halo.phases), h = split_off(n, halo.rows), d = split_off(n, halo.planes);
    const int32 turn = turn_of(n, d, h, column, halo, p);
    w += column * (int32)p.stride[AXIS_W] - (int32)p.pad_lo[AXIS_W];
    h -= (int32)p.pad_lo[AXIS_H];
    d -= (int32)p.pad_lo[AXIS_D];
    int32 at = group + n * (int32)p.x_strides[0] + d * (int32)p.x_strides[2] +
               h * (int32)p.x_strides[3] + w * (int32)p.x_strides[4];
    bool read = inside(d, h, w, p);
    if (!read && p.boundary != BOUNDARY_ZEROS) {
        at += folded(d, h, w, p);
        read = true;
    }
    const int32 chunk = ((to & ~1) + turn % 2) * HALO_CHUNKS + turn / 2 % HALO_CHUNKS;
    return {at, 2 * chunk + read};
}

__device__ __forceinline__ Shift shift_of(int32 tap, const Halo& halo, const Problem& p) {
    int32 column = split_off(tap, p.filter_divisor[AXIS_W]) * (int32)p.dilation[AXIS_W];
    const int32 h = split_off(tap, p.filter_divisor[AXIS_H]) * (int32)p.dilation[AXIS_H];
    const int32 d = tap * (int32)p.dilation[AXIS_D];
    const int32 phase = split_off(column, halo.phases);
    const int32 line = (d * (int32)halo.rows.value + h) * (int32)halo.phases.value + phase;
    return {(line * halo.pitch + column) * HALO_CHUNKS, turn_of(0, d, h, column, halo, p)};
}

// Chunk `chunk` of an output pixel that lies at `at`, and in whose turn it is, under a tap.
__device__ __forceinline__ int32 halo_chunk(int32 at, int32 turn, int32 chunk, const Shift& shift) {
    turn += shift.turn;
    const int32 two = (at + shift.chunks) & ~(2 * HALO_CHUNKS - 1);
    return two | (turn % 2 * HALO_CHUNKS + (chunk ^ turn / 2 % HALO_CHUNKS));
}

// A tile of the padded input in shared memory: what filter2d.cu and separable.cu compute from.
//
//     tile[i][j] = x[n, 0, row0 + i*step, column0 + j]       0 <= i < rows, 0 <= j < columns
//
// or, with its columns dealt into phases (`copy_phases`),
//
//     tile[i][j % stride * phase_pitch + j / stride] = the same
//
// read beyond its edges as the boundary mode says. Rows are `pitch` elements apart, a multiple of
// 16 bytes. Each row is copied by the threads of one row of the block, so that the row's source is
// looked up once, and no division by a row's length is needed.
//
// Bytes travel as they are where the tile has the type of x (`Same<Stage, X>`):
//   16 at a time     where the launcher found the tile's rows aligned in global memory (TILE_ALIGNED)
//   4 or 8 at a time elements of that size, at whatever stride, through cp.async
//   4 at a time      smaller ones in rows without gaps (TILE_UNIT_COLUMNS): two aligned words of x,
//                    shifted into one of the tile
// and else element by element, converted to Stage.
#pragma once

#include "boundary.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "ptx.cuh"
#include "types.cuh"

enum : int { TILE_UNIT_COLUMNS = 1, TILE_ALIGNED = 2, TILE_STORE_VECTORS = 4 };

// How the output is cut into tiles, as gpuconv/cuda_backend/tile.py decided it.
struct Tiling {
    Divisor tiles_w;  // tiles along W and H
    Divisor tiles_h;
    int32 slab;         // filter rows whose window is in shared memory at a time
    int32 columns;      // of the tile, whole vectors
    int32 pitch;        // elements from one row of the tile to the next
    int32 w_pitch;      // the same of the filter in shared memory
    int32 flags;        // TILE_...
    int32 classes;      // output rows r, r + classes, ... are tiled together, for each r < classes
    int32 row_step;     // rows of the tile from one output row of a class to the next
    int32 phase_pitch;  // elements from one phase of a row of the tile to the next
};
static_assert(sizeof(Tiling) == 64, "tile.TILING mirrors this");

// N elements of T at p, in loads of up to 16 bytes; p is a multiple of N * sizeof(T) or of 16.
template <int N, class T>
__device__ __forceinline__ void load_vector(T (&values)[N], const T* p) {
    constexpr int bytes = N * (int)sizeof(T);
    if constexpr (bytes % 16 == 0) {
        uint4 raw[bytes / 16];
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = reinterpret_cast<const T*>(raw)[i];
    } else if constexpr (bytes == 8) {
        const uint2 raw = *reinterpret_cast<const uint2*>(p);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = reinterpret_cast<const T*>(&raw)[i];
    } else {
        static_assert(bytes == 4, "load_vector: 4, 8 or a multiple of 16 bytes");
        const uint32 raw = *reinterpret_cast<const uint32*>(p);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = reinterpret_cast<const T*>(&raw)[i];
    }
}

// p[0:N] = values, under the same conditions.
template <int N, class T>
__device__ __forceinline__ void store_vector(T* p, const T (&values)[N]) {
    constexpr int bytes = N * (int)sizeof(T);
    if constexpr (bytes % 16 == 0) {
        uint4 raw[bytes / 16];
#pragma unroll
        for (int i = 0; i < N; ++i) reinterpret_cast<T*>(raw)[i] = values[i];
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i) reinterpret_cast<uint4*>(p)[i] = raw[i];
    } else if constexpr (bytes == 8) {
        uint2 raw;
#pragma unroll
        for (int i = 0; i < N; ++i) reinterpret_cast<T*>(&raw)[i] = values[i];
        *reinterpret_cast<uint2*>(p) = raw;
    } else {
        static_assert(bytes == 4, "store_vector: 4, 8 or a multiple of 16 bytes");
        uint32 raw;
#pragma unroll
        for (int i = 0; i < N; ++i) reinterpret_cast<T*>(&raw)[i] = values[i];
        *reinterpret_cast<uint32*>(p) = raw;
    }
}

// One element of the tile, out of the row x[row : ]; source_h < 0: the whole row is zeros.
template <class Stage, class X, class Index>
__device__ __forceinline__ void copy_element(Stage* to, const X* __restrict__ x, int64 row,
                                             Index source_h, Index column, const Problem& p) {
    const Index source_w = source_index(column, (Index)p.input[AXIS_W], p.boundary);
    if (source_h < 0 || source_w < 0) {
        *to = convert<Stage>(0.0f);
        return;
    }
    const Index i = source_w * (Index)p.x_strides[4];
    if constexpr (!Same<Stage, X>::value) {
        *to = load<Stage>(x, row + i, p.x_dtype);
    } else if constexpr (sizeof(X) == 8) {
        cp_async_8(to, x + row + i);
    } else if constexpr (sizeof(X) == 4) {
        cp_async_4(to, x + row + i);
    } else {
        *to = (x + row)[i];
    }
}

// Fills the tile; x[plane] is the first element of the image. Rows are found with 64-bit offsets,
// once each; Index is for positions and for offsets within a row. The caller waits for what is in
// flight (cp_async_commit, cp_async_wait<0>) and puts up a barrier.
template <int THREADS_W, int THREADS_H, class Stage, class X, class Index>
__device__ __forceinline__ void copy_tile(Stage* tile, const X* __restrict__ x, int64 plane,
                                          Index row0, Index column0, int rows, const Problem& p,
                                          const Tiling& t, int thread_w, int thread_h,
                                          int step = 1) {
    const Index height = (Index)p.input[AXIS_H], width = (Index)p.input[AXIS_W];
    if constexpr (Same<Stage, X>::value) {
        constexpr int vector = 16 / (int)sizeof(X);
        if (t.flags & TILE_ALIGNED) {
            for (int i = thread_h; i < rows; i += THREADS_H) {
                const Index h = source_index(row0 + (Index)i * step, height, p.boundary);
                const int64 row = plane + h * p.x_strides[3];
                for (int j = thread_w * vector; j < t.columns; j += THREADS_W * vector) {
                    const Index column = column0 + j;
                    Stage* to = tile + i * t.pitch + j;
                    if (h >= 0 && column >= 0 && column + vector <= width) {
                        cp_async_16(to, x + row + column);
                    } else if (p.boundary == BOUNDARY_ZEROS &&
                               (h < 0 || column >= width || column + vector <= 0)) {
                        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
                    } else {
                        for (int e = 0; e < vector; ++e) {
                            copy_element(to + e, x, row, h, column + e, p);
                        }
                    }
                }
            }
            return;
        }
        if constexpr (sizeof(X) < 4) {
            if (t.flags & TILE_UNIT_COLUMNS) {
                constexpr int size = (int)sizeof(X), word = 4 / size, batch = 4;
                // All loads of a batch are on their way before the first is waited for.
                for (int i0 = thread_h; i0 < rows; i0 += THREADS_H * batch) {
                    for (int j = thread_w * word; j < t.columns; j += THREADS_W * word) {
                        uint32 low[batch], high[batch], shift[batch];
#pragma unroll
                        for (int k = 0; k < batch; ++k) {
                            const int i = i0 + k * THREADS_H;
                            low[k] = high[k] = shift[k] = 0;
                            if (i >= rows) continue;
                            const Index h =
                                source_index(row0 + (Index)i * step, height, p.boundary);
                            const int64 row = plane + h * p.x_strides[3];
                            const Index column = column0 + j;
                            // The aligned words that hold x[h, column : column + word], if all
                            // of both belongs to the row.
                            const int lead =
                                (int)(reinterpret_cast<unsigned long long>(x + row + column) & 3);
                            const Index after = column + (lead ? (8 - lead) / size : word);
                            if (h >= 0 && column - lead / size >= 0 && after <= width) {
                                const uint32* from = reinterpret_cast<const uint32*>(
                                    x + row + column - lead / size);
                                low[k] = from[0];
                                high[k] = lead ? from[1] : 0;
                                shift[k] = 8 * lead;
                            } else {
                                Stage edge[word];
#pragma unroll
                                for (int e = 0; e < word; ++e) {
                                    copy_element(edge + e, x, row, h, column + e, p);
                                }
                                store_vector(reinterpret_cast<Stage*>(&low[k]), edge);
                            }
                        }
#pragma unroll
                        for (int k = 0; k < batch; ++k) {
                            const int i = i0 + k * THREADS_H;
                            if (i < rows) {
                                *reinterpret_cast<uint32*>(tile + i * t.pitch + j) =
                                    __funnelshift_r(low[k], high[k], shift[k]);
                            }
                        }
                    }
                }
                return;
            }
        }
    }
    for (int i = thread_h; i < rows; i += THREADS_H) {
        const Index h = source_index(row0 + (Index)i * step, height, p.boundary);
        const int64 row = plane + h * p.x_strides[3];
#pragma unroll 4
        for (int j = thread_w; j < t.columns; j += THREADS_W) {
            copy_element(tile + i * t.pitch + j, x, row, h, column0 + j, p);
        }
    }
}

// The same with column j at [j % stride][j / stride] of its row: windows `stride` columns apart are
// neighbours. x is read in its own order; phase_pitch keeps the banks of a warp's writes apart, but
// for 4 and 8 bytes at even strides that are no power of two, where two columns meet.
template <int THREADS_W, int THREADS_H, class Stage, class X, class Index>
__device__ __forceinline__ void copy_phases(Stage* tile, const X* __restrict__ x, int64 plane,
                                            Index row0, Index column0, int rows, const Problem& p,
                                            const Tiling& t, int thread_w, int thread_h, int step,
                                            int stride) {
    const Index height = (Index)p.input[AXIS_H];
    const int first = thread_w / stride, first_phase = thread_w % stride;
    const int on = THREADS_W / stride, phase_on = THREADS_W % stride;
    for (int i = thread_h; i < rows; i += THREADS_H) {
        const Index h = source_index(row0 + (Index)i * step, height, p.boundary);
        const int64 row = plane + h * p.x_strides[3];
        Stage* const to = tile + i * t.pitch;
        int at = first, phase = first_phase;
#pragma unroll 4
        for (int j = thread_w; j < t.columns; j += THREADS_W) {
            copy_element(to + phase * t.phase_pitch + at, x, row, h, column0 + j, p);
            at += on;
            phase += phase_on;
            if (phase >= stride) {
                phase -= stride;
                ++at;
            }
        }
    }
}

// ---- from a warp's registers to y ------------------------------------------------------------

// The elements of shared memory that one warp needs to hand 32 * N sums from lanes to lanes.
template <int N, class T>
__host__ __device__ constexpr int exchange_size() {
    return 32 * N + 32 * N * (int)sizeof(T) / 128;
}

// Position c of a warp's exchange memory: one element is left free after each 128 bytes, so that
// both neighbouring elements and every N-th are in different banks.
template <class T>
__device__ __forceinline__ int exchange_index(int c) {
    return c + c / (128 / (int)sizeof(T));
}

// The bias, where there is one, as it is added to every sum of a block.
template <class Acc>
struct Bias {
    bool given;
    Acc value;

    __device__ __forceinline__ Bias(const void* bias, const Problem& p)
        : given(bias != nullptr), value(given ? load<Acc>(bias, 0, p.bias_dtype) : Acc(0)) {}

    template <class Sum>
    __device__ __forceinline__ Acc add_to(Sum sum) const {
        const Acc total = convert<Acc>(sum);
        return given ? add(total, value) : total;
    }
};

// A thread's outputs of one row in one store, but for those at the row's end.
template <int N, class Y, class Sum, class Acc, class Index>
__device__ __forceinline__ void store_row(Y* __restrict__ y, int64 y_row, Index out_w, Index width,
                                          const Sum (&sum)[N], const Bias<Acc>& bias) {
    if constexpr (!Same<Y, any_dtype>::value) {
        if constexpr (N * sizeof(Y) <= 16) {
            Y values[N];
#pragma unroll
            for (int j = 0; j < N; ++j) values[j] = convert<Y>(bias.add_to(sum[j]));
            if (out_w + N <= width) {
                store_vector(y + y_row + out_w, values);
            } else {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    if (out_w + j < width) y[y_row + out_w + j] = values[j];
                }
            }
        }
    }
}

// y[n, 0, out_h : out_h + ROWS, first_w + tx*N : ... + N] = sum, of every thread of a warp, with the
// bias. out_h is the same for a warp; first_w its first lane's column. exchange: the warp's own.
template <class Acc, int ROWS, int N, class Y, class Sum, class Index>
__device__ __forceinline__ void write_rows(Y* __restrict__ y, const Sum (&sum)[ROWS][N], Index n,
                                           Index out_h, Index first_w,
                                           const void* __restrict__ bias, const Problem& p,
                                           const Tiling& t, Sum* exchange) {
    const Bias<Acc> added(bias, p);
    const Index height = (Index)p.output[AXIS_H], width = (Index)p.output[AXIS_W];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 0; o < ROWS; ++o) {
        if (out_h + o >= height) break;
        const int64 y_row = n * p.y_strides[0] + (out_h + o) * p.y_strides[3];
        if (t.flags & TILE_STORE_VECTORS) {
            store_row(y, y_row, first_w + lane * N, width, sum[o], added);
            continue;
        }
        // The lanes trade their sums, so that neighbours write neighbouring elements.
        __syncwarp();  // the row before has been read
#pragma unroll
        for (int j = 0; j < N; ++j) exchange[exchange_index<Sum>(lane * N + j)] = sum[o][j];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const Index out_w = first_w + j * 32 + lane;
            const Sum value = exchange[exchange_index<Sum>(j * 32 + lane)];
            if (out_w < width) {
                store(y, y_row + out_w * (Index)p.y_strides[4], p.y_dtype, added.add_to(value));
            }
        }
    }
}

// What lies beyond the edge of x: gpuconv/numpy_backend/boundary.py, in CUDA.
#pragma once

#include "types.cuh"

// In the order of gpuconv.problem.PADDING_MODES. What position -2, -1 | 0 1 2 3 | 4, 5 reads:
enum : int {
    BOUNDARY_ZEROS,      //  -1 -1 | 0 1 2 3 | -1 -1    (-1: a zero)
    BOUNDARY_REFLECT,    //   2  1 | 0 1 2 3 |  2  1
    BOUNDARY_SYMMETRIC,  //   1  0 | 0 1 2 3 |  3  2
    BOUNDARY_REPLICATE,  //   0  0 | 0 1 2 3 |  3  3
    BOUNDARY_CIRCULAR,   //   2  3 | 0 1 2 3 |  0  1
};

// i modulo n, never negative.
template <class Index>
__device__ __forceinline__ Index modulo(Index i, Index n) {
    const Index r = i % n;
    return r < 0 ? r + n : r;
}

// The element of x, along an axis of `extent`, that position i reads; -1 for a zero. `mode` may be a
// constant (a macro of the kernel) or a field of Problem: then it costs nothing until i is outside.
// Any distance from the edge will do.
template <class Index>
__device__ __forceinline__ Index source_index(Index i, Index extent, int mode) {
    if (i >= 0 && i < extent) return i;
    if (mode == BOUNDARY_ZEROS) return -1;
    if (mode == BOUNDARY_REPLICATE) return i < 0 ? 0 : extent - 1;
    // One fold brings back what lies within one period; only longer pads pay for a division.
    Index folded;
    if (mode == BOUNDARY_CIRCULAR) {
        folded = i < 0 ? i + extent : i - extent;
    } else if (mode == BOUNDARY_SYMMETRIC) {
        folded = i < 0 ? -1 - i : 2 * extent - 1 - i;
    } else {
        folded = i < 0 ? -i : 2 * extent - 2 - i;
    }
    if (folded >= 0 && folded < extent) return folded;
    if (mode == BOUNDARY_CIRCULAR) return modulo(i, extent);
    if (mode == BOUNDARY_SYMMETRIC) {
        const Index j = modulo(i, 2 * extent);
        return j < extent ? j : 2 * extent - 1 - j;
    }
    if (extent == 1) return 0;  // a lone element repeats
    const Index j = modulo(i, 2 * extent - 2);
    return j < extent ? j : 2 * extent - 2 - j;
}

// The positions from -lo to `last` that read element i along an axis, which a gradient comes back
// from: i, i + period, i - period, ..., and where the boundary mirrors, the images of those.
//     for (Index j = r.first; j <= r.last; j = r.next(j)) ...
template <class Index>
struct Readers {
    Index first, second, period, last;  // `second` starts the images: the larger of the two, or none

    __device__ __forceinline__ Index next(Index j) const {
        // The two series alternate: from first's to second's and on to first's next.
        const Index gap = second - first;
        if (gap == 0) return j + period;
        return (j - first) % period == 0 ? j + gap : j + period - gap;
    }
};

template <class Index>
__device__ __forceinline__ Readers<Index> readers(Index i, Index extent, Index lo, Index last,
                                                  int mode) {
    if (mode == BOUNDARY_ZEROS) return {i, i, 1, i};
    if (mode == BOUNDARY_REPLICATE || (mode == BOUNDARY_REFLECT && extent == 1)) {
        const Index first = i == 0 ? -lo : i;
        return {first, first, 1, i == extent - 1 ? last : i};
    }
    const Index period = mode == BOUNDARY_CIRCULAR    ? extent
                         : mode == BOUNDARY_SYMMETRIC ? 2 * extent
                                                      : 2 * extent - 2;
    const Index image = mode == BOUNDARY_CIRCULAR    ? i
                        : mode == BOUNDARY_SYMMETRIC ? 2 * extent - 1 - i
                                                     : period - i;
    const Index a = i - (i + lo) / period * period;          // the first of each series
    const Index b = image - (image + lo) / period * period;  // that is not before -lo
    return a <= b ? Readers<Index>{a, b, period, last} : Readers<Index>{b, a, period, last};
}

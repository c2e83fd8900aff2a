// Where the elements lie that an implicit matrix product reads and writes.
#pragma once

#include "boundary.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

template <class Index>
struct Unsigned {
    typedef uint32 type;
};
template <>
struct Unsigned<int64> {
    typedef uint64 type;
};

// Whether position (d, h, w) lies in the image.
template <class Index>
__device__ __forceinline__ bool inside(Index d, Index h, Index w, const Problem& p) {
    typedef typename Unsigned<Index>::type Natural;  // one comparison finds both edges
    // & and not &&, here and where this is used: a comparison is cheaper than a branch.
    return ((Natural)d < (Natural)p.input[AXIS_D]) & ((Natural)h < (Natural)p.input[AXIS_H]) &
           ((Natural)w < (Natural)p.input[AXIS_W]);
}

// How much further than position (d, h, w) the element lies that it reads, in modes without zeros.
template <class Index>
__device__ __forceinline__ Index folded(Index d, Index h, Index w, const Problem& p) {
    Index further = 0;
#pragma unroll 1  // the folding of one axis is long enough
    for (int axis = 0; axis < 3; ++axis) {
        const Index i = axis == AXIS_D ? d : axis == AXIS_H ? h : w;
        const Index from = source_index(i, (Index)p.input[axis], p.boundary);
        further += (from - i) * (Index)p.x_strides[2 + axis];
    }
    return further;
}

// Offset in y of (pixel n of the batch, channel 0).
template <class Index>
__device__ __forceinline__ Index y_offset(Index pixel, const Problem& p) {
    const Index q = split_off(pixel, p.output_divisor[AXIS_W]);
    const Index row = split_off(pixel, p.output_divisor[AXIS_H]);
    const Index z = split_off(pixel, p.output_divisor[AXIS_D]);
    return pixel * (Index)p.y_strides[0] + z * (Index)p.y_strides[2] +
           row * (Index)p.y_strides[3] + q * (Index)p.y_strides[4];
}

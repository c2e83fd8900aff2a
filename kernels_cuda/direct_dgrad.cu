// The gradient of x as the sum that it is, for any problem and padding mode, without workspace.
//
//   dx[n, c, i] = bias[c] + sum over k, r, p of  dy[n, k, p] * w[k, c, r]
//
// over all r and p where the convolution reads x[n, c, i]: stride*p + dilation*r - pad is i, or a
// position beyond an edge that reads i (readers, boundary.cuh). With `conjugate` w's conjugate.
//
// Mapping: one thread computes C_TILE neighbouring channels of one group at one position (n, d, h,
// w), so that each element of dy that it reads serves C_TILE sums. Items are numbered with w fastest,
// or with c fastest where dx's memory runs channels last.
//
//     item i of grid-stride loop       block b = items b*BLOCK ... b*BLOCK + BLOCK-1, and then
//     = ((((n*CT + ct)*D + d)*H + h)*W + w            again after gridDim.x*BLOCK items
//     (channels last: ((((n*D + d)*H + h)*W + w)*CT + ct)
//
//     one axis, reflect, i = 1:   -1 | 0 1 2 3 |     position 1 and position -1 read it; each meets
//                                  ^     ^           tap r at p = (position + pad - dilation*r) / stride
//
// Shared memory: none.
//
// Macros:
//   X_T, W_T, B_T, Y_T  element types of dx, w, bias and dy: a dtype's name, or `any_dtype`
//   ACC_T               the sum's: int64, uint64, float32, float64, complex64, complex128
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
//   C_TILE              1 to 8: input channels per thread
//   BLOCK               threads per block, a multiple of 32 up to 1024
//
// Launched by gpuconv/cuda_backend/direct.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 -DW_T=float16 -DY_T=float16 direct_dgrad.cu

#ifndef X_T
#define X_T float32
#endif
#ifndef W_T
#define W_T float32
#endif
#ifndef B_T
#define B_T float32
#endif
#ifndef Y_T
#define Y_T float32
#endif
#ifndef ACC_T
#define ACC_T float32
#endif
#ifndef C_TILE
#define C_TILE 1
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "boundary.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(is_element_or_any<X_T> && is_element_or_any<W_T> && is_element_or_any<B_T> &&
                  is_element_or_any<Y_T>,
              "X_T, W_T, B_T, Y_T: the name of a dtype, or any_dtype");
static_assert(is_accumulator<ACC_T>, "ACC_T: a type that sums are made in");
static_assert(C_TILE >= 1 && C_TILE <= 8, "C_TILE: 1 to 8");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && BLOCK % 32 == 0, "BLOCK: whole warps, up to 1024");

typedef INDEX_T Index;

// The position p at which tap r of an axis reads `position`, or -1.
__device__ __forceinline__ Index meets(Index position, Index r, int axis, const Problem& p) {
    const Index from = position + (Index)p.pad_lo[axis] - r * (Index)p.dilation[axis];
    if (from < 0) return -1;
    const Index stride = (Index)p.stride[axis];
    const Index at = stride == 1 ? from : from / stride;
    return at * stride == from && at < (Index)p.output[axis] ? at : -1;
}

// The positions of an axis that read element i.
__device__ __forceinline__ Readers<Index> readers_of(Index i, int axis, const Problem& p) {
    const Index last = (Index)(p.output[axis] - 1) * (Index)p.stride[axis] +
                       (Index)(p.filter[axis] - 1) * (Index)p.dilation[axis] - (Index)p.pad_lo[axis];
    return readers(i, (Index)p.input[axis], (Index)p.pad_lo[axis], last, p.boundary);
}

// dx is X_T, dy Y_T. c_tiles: C_TILE-wide pieces of all groups; group_tiles: those of one group.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
direct_dgrad(X_T* __restrict__ x, const W_T* __restrict__ w, const B_T* __restrict__ bias,
             const Y_T* __restrict__ y, const Problem p, const Divisor c_tiles,
             const Divisor group_tiles, const Divisor input_d, const Divisor input_h,
             const Divisor input_w, const int32 channels_last, const int32 conjugate) {
    const Index items = (Index)p.batch * (Index)c_tiles.value * (Index)p.input[AXIS_D] *
                        (Index)p.input[AXIS_H] * (Index)p.input[AXIS_W];
    const Index step = (Index)gridDim.x * BLOCK;

    for (Index item = (Index)blockIdx.x * BLOCK + threadIdx.x; item < items; item += step) {
        Index rest = item, tile = 0;
        if (channels_last) tile = split_off(rest, c_tiles);
        const Index column = split_off(rest, input_w);
        const Index row = split_off(rest, input_h);
        const Index plane = split_off(rest, input_d);
        if (!channels_last) tile = split_off(rest, c_tiles);
        const Index n = rest;
        const Index group = divide(tile, group_tiles);
        const Index c_in_group = (tile - group * (Index)group_tiles.value) * C_TILE;
        const Index c = group * (Index)p.group_in + c_in_group;
        // The group's last tile may be narrower: its missing channels repeat the first, unstored.
        const int live = (int)min((Index)C_TILE, (Index)p.group_in - c_in_group);

        // y[n, group * K/G, ...], w[group * K/G, c, ...]
        const Index y_image =
            n * (Index)p.y_strides[0] + group * (Index)p.group_out * (Index)p.y_strides[1];
        const Index w_group = (Index)p.w_offset +
                              group * (Index)p.group_out * (Index)p.w_strides[0] +
                              c_in_group * (Index)p.w_strides[1];
        ACC_T sum[C_TILE];
#pragma unroll
        for (int j = 0; j < C_TILE; ++j) sum[j] = zero<ACC_T>();

        const Readers<Index> planes = readers_of(plane, AXIS_D, p);
        const Readers<Index> rows = readers_of(row, AXIS_H, p);
        const Readers<Index> columns = readers_of(column, AXIS_W, p);
        for (Index d = planes.first; d <= planes.last; d = planes.next(d)) {
            for (Index t = 0; t < (Index)p.filter[AXIS_D]; ++t) {
                const Index out_d = meets(d, t, AXIS_D, p);
                if (out_d < 0) continue;
                for (Index h = rows.first; h <= rows.last; h = rows.next(h)) {
                    for (Index r = 0; r < (Index)p.filter[AXIS_H]; ++r) {
                        const Index out_h = meets(h, r, AXIS_H, p);
                        if (out_h < 0) continue;
                        const Index y_row = y_image + out_d * (Index)p.y_strides[2] +
                                            out_h * (Index)p.y_strides[3];
                        const Index w_row =
                            w_group + t * (Index)p.w_strides[2] + r * (Index)p.w_strides[3];
                        for (Index v = columns.first; v <= columns.last; v = columns.next(v)) {
                            for (Index s = 0; s < (Index)p.filter[AXIS_W]; ++s) {
                                const Index out_w = meets(v, s, AXIS_W, p);
                                if (out_w < 0) continue;
                                Index y_at = y_row + out_w * (Index)p.y_strides[4];
                                Index w_at = w_row + s * (Index)p.w_strides[4];
                                for (Index k = 0; k < (Index)p.group_out; ++k) {
                                    const ACC_T value = load<ACC_T>(y, y_at, p.y_dtype);
#pragma unroll
                                    for (int j = 0; j < C_TILE; ++j) {
                                        const Index at =
                                            w_at + (j < live ? j : 0) * (Index)p.w_strides[1];
                                        const ACC_T weight = conjugate_if(
                                            load<ACC_T>(w, at, p.w_dtype), conjugate);
                                        sum[j] = multiply_add(sum[j], value, weight);
                                    }
                                    y_at += (Index)p.y_strides[1];
                                    w_at += (Index)p.w_strides[0];
                                }
                            }
                        }
                    }
                }
            }
        }

        // x[n, c, d, h, w]
        const Index x_position =
            n * (Index)p.x_strides[0] + plane * (Index)p.x_strides[2] +
            row * (Index)p.x_strides[3] + column * (Index)p.x_strides[4];
#pragma unroll
        for (int j = 0; j < C_TILE; ++j) {
            if (j < live) {
                if (bias != nullptr) {
                    const Index at = (c + j) * (Index)p.bias_stride;
                    sum[j] = add(sum[j], load<ACC_T>(bias, at, p.bias_dtype));
                }
                store(x, x_position + (c + j) * (Index)p.x_strides[1], p.x_dtype, sum[j]);
            }
        }
    }
}

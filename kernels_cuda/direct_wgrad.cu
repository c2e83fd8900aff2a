// The gradient of w as the sum that it is, for any problem and padding mode, without workspace.
//
//   dw[k, c, t, r, s] = sum over n, z, p, q of
//       dy[n, k, z, p, q] * x[n, g*C/G + c, z*stride + t*dilation - pad, p*... , q*...]
//
// with g the group of k, and x read beyond its edges as the boundary mode says. With `conjugate` x's
// conjugate.
//
// Mapping: one block computes K_TILE neighbouring output channels of one (c, t, r, s); its threads
// share out the positions, so that each element of x that one reads serves K_TILE sums. A thread's
// own sum runs in the order of its positions; the threads' sums are added up as a tree. Every order
// is fixed: no atomics, the same bits at every call.
//
//     tile i of grid-stride loop = (((kt*C/G + c)*T + t)*R + r)*S + s
//     thread j: positions j, j + BLOCK, ... of ((n*Z + z)*P + p)*Q + q
//
//     shared: partial[BLOCK], one K after the other     p0  p1  p2  p3
//                                                       p0+p2 p1+p3
//                                                       (p0+p2)+(p1+p3)  --> dw[k, c, t, r, s]
//
// Macros:
//   X_T, W_T, Y_T  element types of x, dw and dy: a dtype's name, or `any_dtype` (types.cuh)
//   ACC_T          the sum's: int64, uint64, float32, float64, complex64, complex128
//   INDEX_T        int32, or int64 where an array spans 2^31 elements or more
//   K_TILE         1 to 8: output channels per block
//   BLOCK          threads per block, a power of two from 32 to 1024
//
// Launched by gpuconv/cuda_backend/direct.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 -DW_T=float16 -DY_T=float16 direct_wgrad.cu

#ifndef X_T
#define X_T float32
#endif
#ifndef W_T
#define W_T float32
#endif
#ifndef Y_T
#define Y_T float32
#endif
#ifndef ACC_T
#define ACC_T float32
#endif
#ifndef K_TILE
#define K_TILE 1
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "boundary.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(is_element_or_any<X_T> && is_element_or_any<W_T> && is_element_or_any<Y_T>,
              "X_T, W_T, Y_T: the name of a dtype, or any_dtype");
static_assert(is_accumulator<ACC_T>, "ACC_T: a type that sums are made in");
static_assert(K_TILE >= 1 && K_TILE <= 8, "K_TILE: 1 to 8");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && (BLOCK & (BLOCK - 1)) == 0,
              "BLOCK: a power of two from 32 to 1024");

// k_tiles: K_TILE-wide pieces of all groups; group_tiles: those of one group.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
direct_wgrad(const X_T* __restrict__ x, W_T* __restrict__ w, const Y_T* __restrict__ y,
             const Problem p, const Divisor k_tiles, const Divisor group_tiles,
             const int32 conjugate) {
    typedef INDEX_T Index;
    __shared__ ACC_T partial[BLOCK];
    const int thread = threadIdx.x;
    const Index tiles = (Index)k_tiles.value * (Index)p.group_in * (Index)p.filter[AXIS_D] *
                        (Index)p.filter[AXIS_H] * (Index)p.filter[AXIS_W];
    const Index positions = (Index)p.batch * (Index)p.output[AXIS_D] * (Index)p.output[AXIS_H] *
                            (Index)p.output[AXIS_W];

    for (Index item = blockIdx.x; item < tiles; item += gridDim.x) {
        Index rest = item;
        const Index s = split_off(rest, p.filter_divisor[AXIS_W]);
        const Index r = split_off(rest, p.filter_divisor[AXIS_H]);
        const Index t = split_off(rest, p.filter_divisor[AXIS_D]);
        const Index c = split_off(rest, p.group_in_divisor);
        const Index tile = rest;
        const Index group = divide(tile, group_tiles);
        const Index k_in_group = (tile - group * (Index)group_tiles.value) * K_TILE;
        const Index k = group * (Index)p.group_out + k_in_group;
        // The group's last tile may be narrower: its missing channels repeat the first, unstored.
        const int live = (int)min((Index)K_TILE, (Index)p.group_out - k_in_group);

        // x[0, group * C/G + c, ...], y[0, k, ...]
        const Index x_channel = (group * (Index)p.group_in + c) * (Index)p.x_strides[1];
        const Index y_channel = k * (Index)p.y_strides[1];
        ACC_T sum[K_TILE];
#pragma unroll
        for (int j = 0; j < K_TILE; ++j) sum[j] = zero<ACC_T>();

        for (Index position = thread; position < positions; position += BLOCK) {
            Index n = position;
            const Index out_w = split_off(n, p.output_divisor[AXIS_W]);
            const Index out_h = split_off(n, p.output_divisor[AXIS_H]);
            const Index out_d = split_off(n, p.output_divisor[AXIS_D]);
            const Index d = source_index(out_d * (Index)p.stride[AXIS_D] +
                                             t * (Index)p.dilation[AXIS_D] - (Index)p.pad_lo[AXIS_D],
                                         (Index)p.input[AXIS_D], p.boundary);
            const Index h = source_index(out_h * (Index)p.stride[AXIS_H] +
                                             r * (Index)p.dilation[AXIS_H] - (Index)p.pad_lo[AXIS_H],
                                         (Index)p.input[AXIS_H], p.boundary);
            const Index v = source_index(out_w * (Index)p.stride[AXIS_W] +
                                             s * (Index)p.dilation[AXIS_W] - (Index)p.pad_lo[AXIS_W],
                                         (Index)p.input[AXIS_W], p.boundary);
            // A pad's zero is multiplied like any other number: 0 * infinity is NaN.
            ACC_T value = zero<ACC_T>();
            if (d >= 0 && h >= 0 && v >= 0) {
                const Index at = n * (Index)p.x_strides[0] + x_channel + d * (Index)p.x_strides[2] +
                                 h * (Index)p.x_strides[3] + v * (Index)p.x_strides[4];
                value = load<ACC_T>(x, at, p.x_dtype);
            }
            value = conjugate_if(value, conjugate);
            const Index y_at = n * (Index)p.y_strides[0] + y_channel +
                               out_d * (Index)p.y_strides[2] + out_h * (Index)p.y_strides[3] +
                               out_w * (Index)p.y_strides[4];
#pragma unroll
            for (int j = 0; j < K_TILE; ++j) {
                const Index at = y_at + (j < live ? j : 0) * (Index)p.y_strides[1];
                sum[j] = multiply_add(sum[j], value, load<ACC_T>(y, at, p.y_dtype));
            }
        }

#pragma unroll
        for (int j = 0; j < K_TILE; ++j) {
            partial[thread] = sum[j];
            __syncthreads();  // every thread's sum is there
            for (int half = BLOCK / 2; half > 0; half /= 2) {
                if (thread < half) partial[thread] = add(partial[thread], partial[thread + half]);
                __syncthreads();  // before the next, smaller half is read
            }
            if (thread == 0 && j < live) {
                const Index at = (Index)p.w_offset + (k + j) * (Index)p.w_strides[0] +
                                 c * (Index)p.w_strides[1] + t * (Index)p.w_strides[2] +
                                 r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4];
                store(w, at, p.w_dtype, partial[0]);
            }
            __syncthreads();  // partial[0] has been read, and may be written again
        }
    }
}

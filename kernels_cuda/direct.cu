// The sum as it is written, for any problem: the algorithm of last resort, without workspace.
//
//   y[n, k, z, p, q] = bias[k] + sum over t, r, s, c of
//       x[n, g*C/G + c, z*stride + t*dilation - pad, p*... , q*...] * w[k, c, t, r, s]
//
// with g the group of k, and x read beyond its edges as the boundary mode says.
//
// Mapping: one thread computes K_TILE neighbouring output channels at one position (n, z, p, q), so
// that each element of x it reads serves K_TILE sums. Items are numbered with q fastest, or with k
// fastest where y's memory runs channels last: neighbouring threads write neighbouring elements.
//
//     item i of grid-stride loop       block b = items b*BLOCK ... b*BLOCK + BLOCK-1, and then
//     = ((((n*KT + kt)*Z + z)*P + p)*Q + q            again after gridDim.x*BLOCK items
//     (channels last: ((((n*Z + z)*P + p)*Q + q)*KT + kt)
//
//     thread:   x[n, c, d, h, w] --+--> sum[0]  += x * w[k+0, c, t, r, s]  --> y[n, k+0, z, p, q]
//               (one register)     +--> sum[1]  += x * w[k+1, c, t, r, s]  --> y[n, k+1, z, p, q]
//                                  ...  K_TILE
//
// Shared memory: none.
//
// Macros:
//   X_T, W_T, B_T, Y_T  element types: a dtype's name, or `any_dtype` (types.cuh)
//   ACC_T               the sum's: int64, uint64, float32, float64, complex64, complex128
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
//   K_TILE              1 to 8: output channels per thread
//   BLOCK               threads per block, a multiple of 32 up to 1024
//
// Launched by gpuconv/cuda_backend/direct.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 -DW_T=float16 -DY_T=float16 direct.cu

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
#ifndef K_TILE
#define K_TILE 1
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "boundary.cuh"
#include "epilogue.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(is_element_or_any<X_T> && is_element_or_any<W_T> && is_element_or_any<B_T> &&
                  is_element_or_any<Y_T>,
              "X_T, W_T, B_T, Y_T: the name of a dtype, or any_dtype");
static_assert(is_accumulator<ACC_T>, "ACC_T: a type that sums are made in");
static_assert(K_TILE >= 1 && K_TILE <= 8, "K_TILE: 1 to 8");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && BLOCK % 32 == 0, "BLOCK: whole warps, up to 1024");

// Input channels in flight; one where each load is a switch of 15 cases.
constexpr int UNROLL = Same<X_T, any_dtype>::value || Same<W_T, any_dtype>::value ? 1 : 4;

// k_tiles: K_TILE-wide pieces of all groups; group_tiles: those of one group.
// Two blocks a multiprocessor: left to itself, ptxas spills registers to fit more.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
direct(const X_T* __restrict__ x, const W_T* __restrict__ w, const B_T* __restrict__ bias,
       Y_T* __restrict__ y, const Problem p, const Divisor k_tiles, const Divisor group_tiles) {
    typedef INDEX_T Index;
    const Index items = (Index)p.batch * (Index)k_tiles.value * (Index)p.output[AXIS_D] *
                        (Index)p.output[AXIS_H] * (Index)p.output[AXIS_W];
    const Index step = (Index)gridDim.x * BLOCK;

    for (Index item = (Index)blockIdx.x * BLOCK + threadIdx.x; item < items; item += step) {
        Index rest = item, tile = 0;
        if (p.channels_last) tile = split_off(rest, k_tiles);
        const Index out_w = split_off(rest, p.output_divisor[AXIS_W]);
        const Index out_h = split_off(rest, p.output_divisor[AXIS_H]);
        const Index out_d = split_off(rest, p.output_divisor[AXIS_D]);
        if (!p.channels_last) tile = split_off(rest, k_tiles);
        const Index n = rest;
        const Index group = divide(tile, group_tiles);
        const Index k_in_group = (tile - group * (Index)group_tiles.value) * K_TILE;
        const Index k = group * (Index)p.group_out + k_in_group;
        // The group's last tile may be narrower: its missing channels repeat the first, unstored.
        const int live = (int)min((Index)K_TILE, (Index)p.group_out - k_in_group);

        // x[n, group * C/G, ...], w[k, 0, ...]
        const Index x_image =
            n * (Index)p.x_strides[0] + group * (Index)p.group_in * (Index)p.x_strides[1];
        Index w_channel[K_TILE];
#pragma unroll
        for (int j = 0; j < K_TILE; ++j) {
            w_channel[j] = (Index)p.w_offset + (k + (j < live ? j : 0)) * (Index)p.w_strides[0];
        }
        ACC_T sum[K_TILE];
#pragma unroll
        for (int j = 0; j < K_TILE; ++j) sum[j] = zero<ACC_T>();

        for (Index t = 0; t < (Index)p.filter[AXIS_D]; ++t) {
            const Index d = source_index(out_d * (Index)p.stride[AXIS_D] +
                                             t * (Index)p.dilation[AXIS_D] - (Index)p.pad_lo[AXIS_D],
                                         (Index)p.input[AXIS_D], p.boundary);
            for (Index r = 0; r < (Index)p.filter[AXIS_H]; ++r) {
                const Index h =
                    source_index(out_h * (Index)p.stride[AXIS_H] + r * (Index)p.dilation[AXIS_H] -
                                     (Index)p.pad_lo[AXIS_H],
                                 (Index)p.input[AXIS_H], p.boundary);
                const Index x_row =
                    x_image + d * (Index)p.x_strides[2] + h * (Index)p.x_strides[3];
                const Index w_row = t * (Index)p.w_strides[2] + r * (Index)p.w_strides[3];
                for (Index s = 0; s < (Index)p.filter[AXIS_W]; ++s) {
                    const Index column =
                        source_index(out_w * (Index)p.stride[AXIS_W] +
                                         s * (Index)p.dilation[AXIS_W] - (Index)p.pad_lo[AXIS_W],
                                     (Index)p.input[AXIS_W], p.boundary);
                    // A pad's zero is multiplied like any other number: 0 * infinity is NaN.
                    const bool inside = d >= 0 && h >= 0 && column >= 0;
                    const Index x_tap = x_row + column * (Index)p.x_strides[4];
                    const Index w_tap = w_row + s * (Index)p.w_strides[4];
#pragma unroll UNROLL
                    for (Index c = 0; c < (Index)p.group_in; ++c) {
                        const ACC_T value =
                            inside ? load<ACC_T>(x, x_tap + c * (Index)p.x_strides[1], p.x_dtype)
                                   : zero<ACC_T>();
#pragma unroll
                        for (int j = 0; j < K_TILE; ++j) {
                            const Index at = w_channel[j] + w_tap + c * (Index)p.w_strides[1];
                            sum[j] = multiply_add(sum[j], value, load<ACC_T>(w, at, p.w_dtype));
                        }
                    }
                }
            }
        }

        // y[n, k, z, p, q]
        const Index y_position =
            n * (Index)p.y_strides[0] + out_d * (Index)p.y_strides[2] +
            out_h * (Index)p.y_strides[3] + out_w * (Index)p.y_strides[4];
#pragma unroll
        for (int j = 0; j < K_TILE; ++j) {
            if (j < live) {
                store_result(y, y_position + (k + j) * (Index)p.y_strides[1], sum[j], bias, k + j,
                             p);
            }
        }
    }
}

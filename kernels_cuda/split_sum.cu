// The second pass of a sum that was split among blocks: adds up the parts, always in their order.
//
//   y[n, k, z, p, q] = bias[k] + partial[0][i] + partial[1][i] + ... + partial[splits - 1][i]
//       i = (((n*K + k)*Z + z)*P + p)*Q + q, or with k fastest where y's memory runs channels last
//
// Mapping: block b, thread t -> element i = b*BLOCK + t, and again after gridDim.x*BLOCK.
// Shared memory: none.
//
// Macros:
//   Y_T, B_T   float16, bfloat16, float32, float64 or complex64
//   ACC_T      float32, float64 or complex64: what the parts are in
//   BLOCK      threads per block, a multiple of 32 up to 1024
//
// One part has fewer than 2^31 elements, and all of them lie in a workspace; y may be of any size.
// Launched by gpuconv/cuda_backend/split_sum.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DY_T=float16 -DB_T=float16 split_sum.cu

#ifndef Y_T
#define Y_T float32
#endif
#ifndef B_T
#define B_T Y_T
#endif
#ifndef ACC_T
#define ACC_T float32
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "epilogue.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(is_element<Y_T> && is_element<B_T>, "Y_T, B_T: the name of a dtype");
static_assert(is_accumulator<ACC_T>, "ACC_T: a type that sums are made in");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && BLOCK % 32 == 0, "BLOCK: whole warps, up to 1024");

extern "C" __global__ void __launch_bounds__(BLOCK)
split_sum(const ACC_T* __restrict__ partial, const B_T* __restrict__ bias, Y_T* __restrict__ y,
          const Problem p, const int32 items, const int32 splits) {
    const int32 step = gridDim.x * BLOCK;
    for (int32 item = blockIdx.x * BLOCK + threadIdx.x; item < items; item += step) {
        ACC_T sum = partial[item];
#pragma unroll 4
        for (int32 split = 1; split < splits; ++split) {
            sum = add(sum, partial[(int64)split * items + item]);
        }
        int32 n = item, k = 0;
        if (p.channels_last) k = split_off(n, p.out_channels_divisor);
        const int64 out_w = split_off(n, p.output_divisor[AXIS_W]);
        const int64 out_h = split_off(n, p.output_divisor[AXIS_H]);
        const int64 out_d = split_off(n, p.output_divisor[AXIS_D]);
        if (!p.channels_last) k = split_off(n, p.out_channels_divisor);
        const int64 at = n * p.y_strides[0] + k * p.y_strides[1] + out_d * p.y_strides[2] +
                         out_h * p.y_strides[3] + out_w * p.y_strides[4];
        store_result(y, at, sum, bias, (int64)k, p);
    }
}

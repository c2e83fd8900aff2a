// From the finished sum to the element of y: the bias added, then rounded once.
#pragma once

#include "problem.cuh"
#include "types.cuh"

// y[i] = sum + bias[k]; `bias` may be null.
template <class Acc, class B, class Y, class Index>
__device__ __forceinline__ void store_result(Y* __restrict__ y, Index i, Acc sum,
                                             const B* __restrict__ bias, Index k,
                                             const Problem& p) {
    if (bias != nullptr) {
        sum = add(sum, load<Acc>(bias, k * (Index)p.bias_stride, p.bias_dtype));
    }
    store(y, i, p.y_dtype, sum);
}

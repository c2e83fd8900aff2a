// Offsets, and divisions by numbers that are known only at run time.
//
//   INDEX_T  int32 or int64: what offsets into the arrays are counted in. int32 where every array
//            spans fewer than 2^31 elements (launch.py decides, `index_type`), else int64.
#pragma once

#include "types.cuh"

#ifndef INDEX_T
#define INDEX_T int32
#endif
static_assert(is_one_of<INDEX_T, int32, int64>, "INDEX_T is int32 or int64");

// Division by `value` as a multiplication and a shift (launch.py, `divisor`): exact for numerators
// from 0 to 2^31 - 1 and 1 <= value < 2^31. The 64-bit kernels, which run on arrays of more than
// 2^31 elements alone, divide as the hardware does.
struct Divisor {
    int64 value;
    uint32 magic;
    int32 shift;
};
static_assert(sizeof(Divisor) == 16, "launch.DIVISOR mirrors this");

__device__ __forceinline__ int32 divide(int32 n, const Divisor& d) {
    return (int32)((__umulhi((uint32)n, d.magic) + (uint32)n) >> d.shift);
}
__device__ __forceinline__ int64 divide(int64 n, const Divisor& d) { return n / d.value; }

// n / d, and n becomes n % d: takes the last digit off a linear index.
//     q = split_off(i, p.output_divisor[AXIS_W])   // i = (... * P + p) * Q + q
template <class Index>
__device__ __forceinline__ Index split_off(Index& n, const Divisor& d) {
    const Index quotient = divide(n, d);
    const Index remainder = n - quotient * (Index)d.value;
    n = quotient;
    return remainder;
}

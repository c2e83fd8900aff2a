// What the two depthwise kernels share: their types, and 16-bit elements two to a word.
//
//   X_T, W_T, B_T, Y_T  one type: float16, bfloat16, float32, float64
//   ACC_T               float32, or float64 for float64
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
#pragma once

#ifndef X_T
#define X_T float32
#endif
#ifndef W_T
#define W_T X_T
#endif
#ifndef B_T
#define B_T X_T
#endif
#ifndef Y_T
#define Y_T X_T
#endif
#ifndef ACC_T
#define ACC_T float32
#endif

#include "indexing.cuh"
#include "types.cuh"

static_assert(is_floating<X_T> && Same<X_T, W_T>::value && Same<X_T, B_T>::value &&
                  Same<X_T, Y_T>::value,
              "X_T, W_T, B_T, Y_T: one real floating type");
static_assert(Same<ACC_T, float64>::value == Same<X_T, float64>::value &&
                  is_one_of<ACC_T, float32, float64>,
              "ACC_T: float64 for float64, else float32");

typedef INDEX_T Index;

constexpr bool HALF = sizeof(X_T) == 2;

// The two 16-bit elements of a word, the earlier one first.
template <class T>
__device__ __forceinline__ float32 low_of(uint32 word) {
    if constexpr (Same<T, float16>::value) {
        return __half2float(__ushort_as_half((unsigned short)(word & 0xffffu)));
    } else {
        return __uint_as_float(word << 16);
    }
}
template <class T>
__device__ __forceinline__ float32 high_of(uint32 word) {
    if constexpr (Same<T, float16>::value) {
        return __half2float(__ushort_as_half((unsigned short)(word >> 16)));
    } else {
        return __uint_as_float(word & 0xffff0000u);
    }
}
template <class T>
__device__ __forceinline__ uint32 bits_of(ACC_T value) {
    if constexpr (Same<T, float16>::value) {
        return __half_as_ushort(convert<float16>(value));
    } else {
        return __bfloat16_as_ushort(convert<bfloat16>(value));
    }
}

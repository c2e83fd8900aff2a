// The fifteen element types of gpuconv, the conversions between them, and the step of every sum.
//
// A kernel names its element types with macros whose values are the names below (the same names
// that NumPy and gpuconv/dtypes.py use):
//
//   X_T    x                  any type below, or `any_dtype`
//   W_T    w                  likewise
//   B_T    bias               likewise
//   Y_T    y                  likewise
//   ACC_T  the running sum    int64, uint64, float32, float64, complex64 or complex128
//
// `any_dtype` stands for "told at run time": the array is a void pointer, and its type one of the DTYPE_
// codes in Problem. One kernel in `any_dtype` serves every rare pair of types, at the price of a switch
// that all threads take alike.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef signed char int8;
typedef short int16;
typedef int int32;
typedef long long int64;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef __half float16;
typedef __nv_bfloat16 bfloat16;
typedef float float32;
typedef double float64;
typedef void any_dtype;

struct __align__(8) complex64 {
    float32 re, im;
};

struct __align__(16) complex128 {
    float64 re, im;
};

// In the order of gpuconv.dtypes.ALL.
enum : int {
    DTYPE_BOOL, DTYPE_INT8, DTYPE_INT16, DTYPE_INT32, DTYPE_INT64,
    DTYPE_UINT8, DTYPE_UINT16, DTYPE_UINT32, DTYPE_UINT64,
    DTYPE_FLOAT16, DTYPE_BFLOAT16, DTYPE_FLOAT32, DTYPE_FLOAT64,
    DTYPE_COMPLEX64, DTYPE_COMPLEX128,
};

template <class A, class B>
struct Same {
    static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
    static constexpr bool value = true;
};
template <class A, class... B>
constexpr bool is_one_of = (Same<A, B>::value || ...);

template <class T>
constexpr bool is_complex = is_one_of<T, complex64, complex128>;
template <class T>
constexpr bool is_half = is_one_of<T, float16, bfloat16>;
template <class T>
constexpr bool is_floating = is_one_of<T, float16, bfloat16, float32, float64>;
template <class T>
constexpr bool is_integer =
    is_one_of<T, bool, int8, int16, int32, int64, uint8, uint16, uint32, uint64>;
template <class T>
constexpr bool is_element = is_integer<T> || is_floating<T> || is_complex<T>;
template <class T>
constexpr bool is_element_or_any = is_element<T> || Same<T, any_dtype>::value;
template <class T>
constexpr bool is_accumulator =
    is_one_of<T, int64, uint64, float32, float64, complex64, complex128>;

// ---- conversions, each rounded once, to nearest even -----------------------------------------

// The float32 beside `value` whose last bit is set, unless one is exactly it: "rounded to odd". A
// 16-bit float made of it is the one that `value` itself rounds to, with no second rounding.
__device__ __forceinline__ float32 round_to_odd(float64 value) {
    const float32 near = (float32)value;
    const float64 error = value - (float64)near;
    const uint32 bits = __float_as_uint(near);
    const bool inexact = error < 0 || error > 0;  // not so where value is infinite or NaN
    if (!inexact || near == 0 || (bits & 1u)) return near;
    return __uint_as_float((error > 0) == (near > 0) ? bits + 1u : bits - 1u);
}

template <class To>
__device__ __forceinline__ To half_of(float32 value) {
    if constexpr (Same<To, float16>::value) {
        return __float2half_rn(value);
    } else {
        return __float2bfloat16_rn(value);
    }
}
__device__ __forceinline__ float32 float_of(float16 value) { return __half2float(value); }
__device__ __forceinline__ float32 float_of(bfloat16 value) { return __bfloat162float(value); }

// `value` as a To. Integers wrap modulo 2^bits; a complex number becomes a real one by dropping
// its imaginary part, which no problem asks for.
template <class To, class From>
__device__ __forceinline__ To convert(From value) {
    static_assert(is_element<To> && is_element<From>, "convert: between two element types");
    if constexpr (Same<To, From>::value) {
        return value;
    } else if constexpr (is_complex<To>) {
        To result;
        if constexpr (is_complex<From>) {
            result.re = value.re;
            result.im = value.im;
        } else {
            result.re = convert<decltype(result.re)>(value);
            result.im = 0;
        }
        return result;
    } else if constexpr (is_complex<From>) {
        return convert<To>(value.re);
    } else if constexpr (is_half<From>) {
        return convert<To>(float_of(value));
    } else if constexpr (Same<To, bool>::value) {
        return value != From(0);
    } else if constexpr (is_half<To>) {
        if constexpr (Same<From, float64>::value) {
            return half_of<To>(round_to_odd(value));
        } else if constexpr (is_integer<From> && sizeof(From) >= 4) {
            return half_of<To>(round_to_odd((float64)value));  // exact up to 2^53
        } else {
            return half_of<To>((float32)value);
        }
    } else {
        return static_cast<To>(value);
    }
}

// ---- sums ------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T zero() {
    if constexpr (is_complex<T>) {
        return T{0, 0};
    } else {
        return T(0);
    }
}

template <class T>
__device__ __forceinline__ T add(T a, T b) {
    static_assert(is_accumulator<T>, "add: of two sums");
    if constexpr (is_complex<T>) {
        return T{a.re + b.re, a.im + b.im};
    } else if constexpr (is_integer<T>) {
        return (T)((uint64)a + (uint64)b);  // modulo 2^64, which signed C++ leaves undefined
    } else {
        return a + b;
    }
}

// The complex conjugate of `value` where `on`; real numbers are their own.
template <class T>
__device__ __forceinline__ T conjugate_if(T value, bool on) {
    if constexpr (is_complex<T>) {
        if (on) value.im = -value.im;
    }
    return value;
}

// sum + a*b. Floating types are fused by name, not by the compiler's choice: every variant of a
// kernel rounds alike.
template <class T>
__device__ __forceinline__ T multiply_add(T sum, T a, T b) {
    static_assert(is_accumulator<T>, "multiply_add: of sums");
    if constexpr (Same<T, float32>::value) {
        return fmaf(a, b, sum);
    } else if constexpr (Same<T, float64>::value) {
        return fma(a, b, sum);
    } else if constexpr (is_complex<T>) {
        using Real = decltype(sum.re);
        return T{multiply_add<Real>(multiply_add<Real>(sum.re, a.re, b.re), -a.im, b.im),
                 multiply_add<Real>(multiply_add<Real>(sum.im, a.re, b.im), a.im, b.re)};
    } else {
        return (T)((uint64)sum + (uint64)a * (uint64)b);
    }
}

// ---- elements in memory ----------------------------------------------------------------------

// array[i] as a To; `dtype`, one of the codes above, is read where the array is `any_dtype` alone.
template <class To, class T, class Index>
__device__ __forceinline__ To load(const T* __restrict__ array, Index i, int dtype) {
    if constexpr (Same<T, any_dtype>::value) {
        switch (dtype) {
            case DTYPE_BOOL: return load<To>((const bool*)array, i, dtype);
            case DTYPE_INT8: return load<To>((const int8*)array, i, dtype);
            case DTYPE_INT16: return load<To>((const int16*)array, i, dtype);
            case DTYPE_INT32: return load<To>((const int32*)array, i, dtype);
            case DTYPE_INT64: return load<To>((const int64*)array, i, dtype);
            case DTYPE_UINT8: return load<To>((const uint8*)array, i, dtype);
            case DTYPE_UINT16: return load<To>((const uint16*)array, i, dtype);
            case DTYPE_UINT32: return load<To>((const uint32*)array, i, dtype);
            case DTYPE_UINT64: return load<To>((const uint64*)array, i, dtype);
            case DTYPE_FLOAT16: return load<To>((const float16*)array, i, dtype);
            case DTYPE_BFLOAT16: return load<To>((const bfloat16*)array, i, dtype);
            case DTYPE_FLOAT32: return load<To>((const float32*)array, i, dtype);
            case DTYPE_FLOAT64: return load<To>((const float64*)array, i, dtype);
            case DTYPE_COMPLEX64: return load<To>((const complex64*)array, i, dtype);
            default: return load<To>((const complex128*)array, i, dtype);
        }
    } else {
        return convert<To>(array[i]);
    }
}

// array[i] = value, converted.
template <class T, class Index, class From>
__device__ __forceinline__ void store(T* __restrict__ array, Index i, int dtype, From value) {
    if constexpr (Same<T, any_dtype>::value) {
        switch (dtype) {
            case DTYPE_BOOL: return store((bool*)array, i, dtype, value);
            case DTYPE_INT8: return store((int8*)array, i, dtype, value);
            case DTYPE_INT16: return store((int16*)array, i, dtype, value);
            case DTYPE_INT32: return store((int32*)array, i, dtype, value);
            case DTYPE_INT64: return store((int64*)array, i, dtype, value);
            case DTYPE_UINT8: return store((uint8*)array, i, dtype, value);
            case DTYPE_UINT16: return store((uint16*)array, i, dtype, value);
            case DTYPE_UINT32: return store((uint32*)array, i, dtype, value);
            case DTYPE_UINT64: return store((uint64*)array, i, dtype, value);
            case DTYPE_FLOAT16: return store((float16*)array, i, dtype, value);
            case DTYPE_BFLOAT16: return store((bfloat16*)array, i, dtype, value);
            case DTYPE_FLOAT32: return store((float32*)array, i, dtype, value);
            case DTYPE_FLOAT64: return store((float64*)array, i, dtype, value);
            case DTYPE_COMPLEX64: return store((complex64*)array, i, dtype, value);
            default: return store((complex128*)array, i, dtype, value);
        }
    } else {
        array[i] = convert<T>(value);
    }
}

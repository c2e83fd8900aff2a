// Stand-in for CUDA's header of the same name.
#pragma once

#include "emu_float16.h"

EMU_FLOAT16_TYPE(__half, __half2, __half_raw)

__inline__ __attribute__((always_inline)) __half::__half(float f)
    : __x(emu::bits<unsigned short>((_Float16)f)) {}
__inline__ __attribute__((always_inline)) __half::__half(double f)
    : __x(emu::bits<unsigned short>((_Float16)f)) {}
__inline__ __attribute__((always_inline)) __half::operator float() const {
    return (float)emu::bits<_Float16>(__x);
}

EMU_FLOAT16_OPERATORS(__half, __half2)

using half = __half;
using half2 = __half2;

EMU_INLINE __half __float2half(float f) { return __half(f); }
EMU_INLINE __half __float2half_rn(float f) { return __half(f); }
EMU_INLINE __half __double2half(double f) { return __half(f); }
EMU_INLINE float __half2float(__half a) { return (float)a; }
EMU_INLINE __half2 __float2half2_rn(float f) { return __half2(__half(f), __half(f)); }
EMU_INLINE __half2 __floats2half2_rn(float x, float y) { return __half2(__half(x), __half(y)); }
EMU_INLINE __half2 __float22half2_rn(float2 f) { return __half2(__half(f.x), __half(f.y)); }
EMU_INLINE float2 __half22float2(__half2 a) { return make_float2((float)a.x, (float)a.y); }
EMU_INLINE __half2 __halves2half2(__half x, __half y) { return __half2(x, y); }
EMU_INLINE __half2 make_half2(__half x, __half y) { return __half2(x, y); }
EMU_INLINE __half2 __half2half2(__half a) { return __half2(a, a); }
EMU_INLINE __half __low2half(__half2 a) { return a.x; }
EMU_INLINE __half __high2half(__half2 a) { return a.y; }
EMU_INLINE __half2 __low2half2(__half2 a) { return __half2(a.x, a.x); }
EMU_INLINE __half2 __high2half2(__half2 a) { return __half2(a.y, a.y); }
EMU_INLINE __half2 __lowhigh2highlow(__half2 a) { return __half2(a.y, a.x); }
EMU_INLINE __half __int2half_rn(int i) { return __half((double)i); }
EMU_INLINE int __half2int_rn(__half a) { return __float2int_rn((float)a); }
EMU_INLINE int __half2int_rz(__half a) { return __float2int_rz((float)a); }
EMU_INLINE unsigned short __half_as_ushort(__half a) { return a.__x; }
EMU_INLINE short __half_as_short(__half a) { return (short)a.__x; }
EMU_INLINE __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
EMU_INLINE __half __short_as_half(short bits) { return __half(__half_raw{(unsigned short)bits}); }

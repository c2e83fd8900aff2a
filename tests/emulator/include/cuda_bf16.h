// Stand-in for CUDA's header of the same name.
#pragma once

#include "emu_float16.h"

EMU_FLOAT16_TYPE(__nv_bfloat16, __nv_bfloat162, __nv_bfloat16_raw)

namespace emu {
// A double goes to float with the last bit sticky first, so that it is rounded only once.
EMU_INLINE unsigned short to_bfloat16(double value) {
    float f = (float)value;
    if ((double)f != value && f == f && !isinf(f)) {
        const bool away = (value < 0 ? -(double)f : (double)f) > (value < 0 ? -value : value);
        unsigned toward_zero = bits<unsigned>(f) - (away ? 1u : 0u);
        f = bits<float>(toward_zero | 1u);
    }
    const unsigned u = bits<unsigned>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
}  // namespace emu

__inline__ __attribute__((always_inline)) __nv_bfloat16::__nv_bfloat16(float f)
    : __x(emu::to_bfloat16(f)) {}
__inline__ __attribute__((always_inline)) __nv_bfloat16::__nv_bfloat16(double f)
    : __x(emu::to_bfloat16(f)) {}
__inline__ __attribute__((always_inline)) __nv_bfloat16::operator float() const {
    return emu::bits<float>((unsigned)__x << 16);
}

EMU_FLOAT16_OPERATORS(__nv_bfloat16, __nv_bfloat162)

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

EMU_INLINE __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
EMU_INLINE __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
EMU_INLINE __nv_bfloat16 __double2bfloat16(double f) { return __nv_bfloat16(f); }
EMU_INLINE float __bfloat162float(__nv_bfloat16 a) { return (float)a; }
EMU_INLINE __nv_bfloat162 __float2bfloat162_rn(float f) {
    return __nv_bfloat162(__nv_bfloat16(f), __nv_bfloat16(f));
}
EMU_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return __nv_bfloat162(__nv_bfloat16(x), __nv_bfloat16(y));
}
EMU_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 f) { return __floats2bfloat162_rn(f.x, f.y); }
EMU_INLINE float2 __bfloat1622float2(__nv_bfloat162 a) { return make_float2((float)a.x, (float)a.y); }
EMU_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return __nv_bfloat162(x, y);
}
EMU_INLINE __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return __nv_bfloat162(x, y);
}
EMU_INLINE __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return __nv_bfloat162(a, a); }
EMU_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
EMU_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
EMU_INLINE __nv_bfloat162 __low2bfloat162(__nv_bfloat162 a) { return __nv_bfloat162(a.x, a.x); }
EMU_INLINE __nv_bfloat162 __high2bfloat162(__nv_bfloat162 a) { return __nv_bfloat162(a.y, a.y); }
EMU_INLINE __nv_bfloat16 __int2bfloat16_rn(int i) { return __nv_bfloat16((double)i); }
EMU_INLINE int __bfloat162int_rn(__nv_bfloat16 a) { return __float2int_rn((float)a); }
EMU_INLINE int __bfloat162int_rz(__nv_bfloat16 a) { return __float2int_rz((float)a); }
EMU_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.__x; }
EMU_INLINE short __bfloat16_as_short(__nv_bfloat16 a) { return (short)a.__x; }
EMU_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return __nv_bfloat16(__nv_bfloat16_raw{bits});
}
EMU_INLINE __nv_bfloat16 __short_as_bfloat16(short bits) {
    return __nv_bfloat16(__nv_bfloat16_raw{(unsigned short)bits});
}

// What cuda_fp16.h and cuda_bf16.h have in common. Arithmetic rounds once, to nearest even: a
// float has more than twice the digits, so computing there first changes nothing; fma goes
// through double.
#pragma once

#define EMU_FLOAT16_OPERATORS(T, T2)                                                            \
    EMU_INLINE T operator+(T a, T b) { return T((float)a + (float)b); }                         \
    EMU_INLINE T operator-(T a, T b) { return T((float)a - (float)b); }                         \
    EMU_INLINE T operator*(T a, T b) { return T((float)a * (float)b); }                         \
    EMU_INLINE T operator/(T a, T b) { return T((float)a / (float)b); }                         \
    EMU_INLINE T operator+(T a) { return a; }                                                   \
    EMU_INLINE T operator-(T a) { return emu::bits<T>((unsigned short)(emu::bits<unsigned short>(a) ^ 0x8000u)); } \
    EMU_INLINE T& operator+=(T& a, T b) { return a = a + b; }                                   \
    EMU_INLINE T& operator-=(T& a, T b) { return a = a - b; }                                   \
    EMU_INLINE T& operator*=(T& a, T b) { return a = a * b; }                                   \
    EMU_INLINE T& operator/=(T& a, T b) { return a = a / b; }                                   \
    EMU_INLINE bool operator==(T a, T b) { return (float)a == (float)b; }                       \
    EMU_INLINE bool operator!=(T a, T b) { return (float)a != (float)b; }                       \
    EMU_INLINE bool operator<(T a, T b) { return (float)a < (float)b; }                         \
    EMU_INLINE bool operator>(T a, T b) { return (float)a > (float)b; }                         \
    EMU_INLINE bool operator<=(T a, T b) { return (float)a <= (float)b; }                       \
    EMU_INLINE bool operator>=(T a, T b) { return (float)a >= (float)b; }                       \
    EMU_INLINE T2 operator+(T2 a, T2 b) { return T2(a.x + b.x, a.y + b.y); }                    \
    EMU_INLINE T2 operator-(T2 a, T2 b) { return T2(a.x - b.x, a.y - b.y); }                    \
    EMU_INLINE T2 operator*(T2 a, T2 b) { return T2(a.x * b.x, a.y * b.y); }                    \
    EMU_INLINE T2 operator/(T2 a, T2 b) { return T2(a.x / b.x, a.y / b.y); }                    \
    EMU_INLINE T2 operator-(T2 a) { return T2(-a.x, -a.y); }                                    \
    EMU_INLINE T2& operator+=(T2& a, T2 b) { return a = a + b; }                                \
    EMU_INLINE T2& operator-=(T2& a, T2 b) { return a = a - b; }                                \
    EMU_INLINE T2& operator*=(T2& a, T2 b) { return a = a * b; }                                \
    EMU_INLINE bool operator==(T2 a, T2 b) { return a.x == b.x && a.y == b.y; }                 \
    EMU_INLINE bool operator!=(T2 a, T2 b) { return a.x != b.x && a.y != b.y; }                 \
    EMU_INLINE T __hadd(T a, T b) { return a + b; }                                             \
    EMU_INLINE T __hadd_rn(T a, T b) { return a + b; }                                          \
    EMU_INLINE T __hsub(T a, T b) { return a - b; }                                             \
    EMU_INLINE T __hsub_rn(T a, T b) { return a - b; }                                          \
    EMU_INLINE T __hmul(T a, T b) { return a * b; }                                             \
    EMU_INLINE T __hmul_rn(T a, T b) { return a * b; }                                          \
    EMU_INLINE T __hdiv(T a, T b) { return a / b; }                                             \
    EMU_INLINE T __hneg(T a) { return -a; }                                                     \
    EMU_INLINE T __habs(T a) { return emu::bits<T>((unsigned short)(emu::bits<unsigned short>(a) & 0x7fffu)); } \
    EMU_INLINE T __hfma(T a, T b, T c) { return T((double)a * (double)b + (double)c); }         \
    EMU_INLINE T __hfma_relu(T a, T b, T c) { T r = __hfma(a, b, c); return (float)r > 0.0f ? r : T(0.0f); } \
    EMU_INLINE T __hmax(T a, T b) { return T(fmaxf((float)a, (float)b)); }                      \
    EMU_INLINE T __hmin(T a, T b) { return T(fminf((float)a, (float)b)); }                      \
    EMU_INLINE bool __heq(T a, T b) { return a == b; }                                          \
    EMU_INLINE bool __hne(T a, T b) { return a != b; }                                          \
    EMU_INLINE bool __hlt(T a, T b) { return a < b; }                                           \
    EMU_INLINE bool __hle(T a, T b) { return a <= b; }                                          \
    EMU_INLINE bool __hgt(T a, T b) { return a > b; }                                           \
    EMU_INLINE bool __hge(T a, T b) { return a >= b; }                                          \
    EMU_INLINE bool __hisnan(T a) { return (float)a != (float)a; }                              \
    EMU_INLINE int __hisinf(T a) { float f = (float)a; return isinf(f) ? (f > 0 ? 1 : -1) : 0; } \
    EMU_INLINE T hsqrt(T a) { return T(sqrtf((float)a)); }                                      \
    EMU_INLINE T hrcp(T a) { return T(1.0f / (float)a); }                                       \
    EMU_INLINE T hexp(T a) { return T(expf((float)a)); }                                        \
    EMU_INLINE T hlog(T a) { return T(logf((float)a)); }                                        \
    EMU_INLINE T2 __hadd2(T2 a, T2 b) { return a + b; }                                         \
    EMU_INLINE T2 __hsub2(T2 a, T2 b) { return a - b; }                                         \
    EMU_INLINE T2 __hmul2(T2 a, T2 b) { return a * b; }                                         \
    EMU_INLINE T2 __h2div(T2 a, T2 b) { return a / b; }                                         \
    EMU_INLINE T2 __hneg2(T2 a) { return -a; }                                                  \
    EMU_INLINE T2 __habs2(T2 a) { return T2(__habs(a.x), __habs(a.y)); }                        \
    EMU_INLINE T2 __hfma2(T2 a, T2 b, T2 c) { return T2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); } \
    EMU_INLINE T2 __hmax2(T2 a, T2 b) { return T2(__hmax(a.x, b.x), __hmax(a.y, b.y)); }        \
    EMU_INLINE T2 __hmin2(T2 a, T2 b) { return T2(__hmin(a.x, b.x), __hmin(a.y, b.y)); }        \
    EMU_INLINE float __low2float(T2 a) { return (float)a.x; }                                   \
    EMU_INLINE float __high2float(T2 a) { return (float)a.y; }                                  \
    EMU_INLINE T2 __lows2##T2(T2 a, T2 b) { return T2(a.x, b.x); }                              \
    EMU_INLINE T2 __highs2##T2(T2 a, T2 b) { return T2(a.y, b.y); }                             \
    EMU_ATOMIC T atomicAdd(T* p, T value) {                                                     \
        EMU_NOTE_ATOMIC(p);                                                                     \
        const T old = *p;                                                                       \
        *p = T((float)old + (float)value);                                                      \
        return old;                                                                             \
    }                                                                                           \
    EMU_ATOMIC T2 atomicAdd(T2* p, T2 value) {                                                  \
        EMU_NOTE_ATOMIC(p);                                                                     \
        const T2 old = *p;                                                                      \
        *p = T2(T((float)old.x + (float)value.x), T((float)old.y + (float)value.y));            \
        return old;                                                                             \
    }

// The type itself: 16 bits, from and to every arithmetic type.
#define EMU_FLOAT16_TYPE(T, T2, Raw)                                                  \
    struct Raw {                                                                      \
        unsigned short x;                                                             \
    };                                                                                \
    struct alignas(2) T {                                                             \
        unsigned short __x;                                                           \
        T() = default;                                                                \
        __inline__ __attribute__((always_inline)) T(Raw r) : __x(r.x) {}              \
        T(float f);                                                                   \
        T(double f);                                                                  \
        template <class I, std::enable_if_t<std::is_integral<I>::value, int> = 0>     \
        __inline__ __attribute__((always_inline)) T(I i) : T((float)i) {}             \
        operator float() const;                                                       \
        operator Raw() const { return {__x}; }                                        \
    };                                                                                \
    struct alignas(4) T2 {                                                            \
        T x, y;                                                                       \
        T2() = default;                                                               \
        __inline__ __attribute__((always_inline)) T2(T x_, T y_) : x(x_), y(y_) {}    \
    };

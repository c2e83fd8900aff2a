// CUDA C++ as g++ sees it: force-included in front of every kernel. Only what device code uses.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "emu.h"

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDACC_VER_MAJOR__ 12

#ifndef EMU_LIST_KERNELS  // build.py looks for these two in the preprocessed source
#define __global__
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __cluster_dims__(...)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define EMU_INLINE static __inline__ __attribute__((always_inline, unused))

// `__shared__ T name[n];` becomes `static T name[n]; EMU_SHARED(name)` when the source is staged.
namespace emu {
template <class T>
constexpr unsigned granule_of() {
    using Element = std::remove_all_extents_t<T>;
    return alignof(Element) < 4 ? alignof(Element) : 4;
}
}  // namespace emu
#define EMU_SHARED(name)                                                                     \
    static_assert(std::is_trivially_default_constructible<decltype(name)>::value,            \
                  "nothing in shared memory can be initialised: " #name);                    \
    static ::emu::SharedVariable emu_shared_##name{&name, sizeof(name),                      \
                                                   ::emu::granule_of<decltype(name)>(),      \
                                                   #name, 0, nullptr};                       \
    ::emu::touch_shared(&emu_shared_##name)
#define EMU_DYNAMIC_SHARED(name, ...)                        \
    __VA_ARGS__* const name = static_cast<__VA_ARGS__*>( \
        ::emu::dynamic_shared(::emu::granule_of<__VA_ARGS__>(), #name))

#define threadIdx (::emu::thread_idx())
#define blockIdx (::emu::block_idx())
#define blockDim (::emu::block_dim())
#define gridDim (::emu::grid_dim())
constexpr int warpSize = 32;

extern "C" int printf(const char*, ...) noexcept(false);
#undef assert
#define assert(condition)                                                               \
    ((condition) ? (void)0                                                              \
                 : ::emu::fail("assertion `%s` failed (%s:%d)", #condition, __FILE__, __LINE__))
[[noreturn]] EMU_INLINE void __trap() { ::emu::fail("__trap()"); }
EMU_INLINE void __brkpt() { ::emu::fail("__brkpt()"); }
#define __builtin_assume(condition) assert(condition)
#define __builtin_assume_aligned(pointer, ...) (pointer)

// ---- vector types ----
#define EMU_VECTORS(T, name, align2, align4)                                                  \
    struct name##1 { T x; };                                                                  \
    struct alignas(align2) name##2 { T x, y; };                                               \
    struct EMU_3(name) { T x, y, z; };                                                        \
    struct alignas(align4) name##4 { T x, y, z, w; };                                         \
    EMU_INLINE name##1 make_##name##1(T x) { name##1 v; v.x = x; return v; }                  \
    EMU_INLINE name##2 make_##name##2(T x, T y) { name##2 v; v.x = x; v.y = y; return v; }    \
    EMU_INLINE name##3 make_##name##3(T x, T y, T z) {                                        \
        name##3 v; v.x = x; v.y = y; v.z = z; return v;                                       \
    }                                                                                         \
    EMU_INLINE name##4 make_##name##4(T x, T y, T z, T w) {                                   \
        name##4 v; v.x = x; v.y = y; v.z = z; v.w = w; return v;                              \
    }
#define EMU_3(name) name##3
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(long, long, 16, 16)
EMU_VECTORS(unsigned long, ulong, 16, 16)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
#undef EMU_3
#define EMU_3(name) emu_unused_##name##3  // uint3 is in emu.h
EMU_VECTORS(unsigned, uint, 8, 16)
#undef EMU_3
#undef EMU_VECTORS

// ---- arithmetic ----
using std::isfinite;
using std::isinf;
using std::isnan;

#define EMU_MINMAX(T, A, B)                                              \
    EMU_INLINE T min(A a, B b) { return (T)b < (T)a ? (T)b : (T)a; }     \
    EMU_INLINE T max(A a, B b) { return (T)a < (T)b ? (T)b : (T)a; }
EMU_MINMAX(int, int, int)
EMU_MINMAX(unsigned, unsigned, unsigned)
EMU_MINMAX(unsigned, int, unsigned)
EMU_MINMAX(unsigned, unsigned, int)
EMU_MINMAX(long, long, long)
EMU_MINMAX(unsigned long, unsigned long, unsigned long)
EMU_MINMAX(unsigned long, long, unsigned long)
EMU_MINMAX(unsigned long, unsigned long, long)
EMU_MINMAX(long long, long long, long long)
EMU_MINMAX(unsigned long long, unsigned long long, unsigned long long)
EMU_MINMAX(unsigned long long, long long, unsigned long long)
EMU_MINMAX(unsigned long long, unsigned long long, long long)
#undef EMU_MINMAX
// As fmin and fmax do, CUDA's drop a NaN where the other operand is a number.
EMU_INLINE float min(float a, float b) { return fminf(a, b); }
EMU_INLINE float max(float a, float b) { return fmaxf(a, b); }
EMU_INLINE double min(double a, double b) { return fmin(a, b); }
EMU_INLINE double max(double a, double b) { return fmax(a, b); }
EMU_INLINE double min(float a, double b) { return fmin(a, b); }
EMU_INLINE double max(float a, double b) { return fmax(a, b); }
EMU_INLINE double min(double a, float b) { return fmin(a, b); }
EMU_INLINE double max(double a, float b) { return fmax(a, b); }
EMU_INLINE int umin(unsigned a, unsigned b) { return min(a, b); }
EMU_INLINE int umax(unsigned a, unsigned b) { return max(a, b); }

EMU_INLINE float rsqrtf(float a) { return (float)(1.0 / sqrt((double)a)); }
EMU_INLINE double rsqrt(double a) { return 1.0 / sqrt(a); }
EMU_INLINE float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
// Macros: glibc has declarations under these names.
#define __expf(a) expf(a)
#define __logf(a) logf(a)
#define __powf(a, b) powf(a, b)
#define __sinf(a) sinf(a)
#define __cosf(a) cosf(a)
EMU_INLINE float __fdividef(float a, float b) { return a / b; }
EMU_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_INLINE float __fadd_rn(float a, float b) { return a + b; }
EMU_INLINE float __fsub_rn(float a, float b) { return a - b; }
EMU_INLINE float __fmul_rn(float a, float b) { return a * b; }
EMU_INLINE float __fdiv_rn(float a, float b) { return a / b; }
EMU_INLINE float __frcp_rn(float a) { return 1.0f / a; }
EMU_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
EMU_INLINE float __frsqrt_rn(float a) { return rsqrtf(a); }
EMU_INLINE double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
EMU_INLINE double __dadd_rn(double a, double b) { return a + b; }
EMU_INLINE double __dsub_rn(double a, double b) { return a - b; }
EMU_INLINE double __dmul_rn(double a, double b) { return a * b; }
EMU_INLINE double __ddiv_rn(double a, double b) { return a / b; }
EMU_INLINE double __dsqrt_rn(double a) { return sqrt(a); }

namespace emu {
template <class To, class From>
EMU_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
// CUDA's conversions saturate, and take NaN to 0 (32 bits) or to the lowest value (64 bits).
template <class To>
EMU_INLINE To saturate(double a) {
    constexpr bool is_signed = std::is_signed<To>::value;
    constexpr To top = is_signed ? (To)((~0ULL >> (64 - 8 * sizeof(To))) >> 1) : (To)~0ULL;
    constexpr To low = is_signed ? (To)(-top - 1) : (To)0;
    if (a != a) return sizeof(To) == 8 ? (To)(1ULL << 63) : (To)0;
    if (a >= (double)top) return top;
    if (a <= (double)low) return low;
    return (To)a;
}
}  // namespace emu
EMU_INLINE int __float_as_int(float a) { return emu::bits<int>(a); }
EMU_INLINE unsigned __float_as_uint(float a) { return emu::bits<unsigned>(a); }
EMU_INLINE float __int_as_float(int a) { return emu::bits<float>(a); }
EMU_INLINE float __uint_as_float(unsigned a) { return emu::bits<float>(a); }
EMU_INLINE long long __double_as_longlong(double a) { return emu::bits<long long>(a); }
EMU_INLINE double __longlong_as_double(long long a) { return emu::bits<double>(a); }
EMU_INLINE int __double2hiint(double a) { return (int)(emu::bits<unsigned long long>(a) >> 32); }
EMU_INLINE int __double2loint(double a) { return (int)emu::bits<unsigned long long>(a); }
EMU_INLINE double __hiloint2double(int hi, int lo) {
    return emu::bits<double>(((unsigned long long)(unsigned)hi << 32) | (unsigned)lo);
}
#define EMU_TO_INTEGER(suffix, round)                                                          \
    EMU_INLINE int __float2int_##suffix(float a) { return emu::saturate<int>(round(a)); }      \
    EMU_INLINE int __double2int_##suffix(double a) { return emu::saturate<int>(round(a)); }    \
    EMU_INLINE unsigned __float2uint_##suffix(float a) {                                       \
        return emu::saturate<unsigned>(round(a));                                              \
    }                                                                                          \
    EMU_INLINE unsigned __double2uint_##suffix(double a) {                                     \
        return emu::saturate<unsigned>(round(a));                                              \
    }                                                                                          \
    EMU_INLINE long long __float2ll_##suffix(float a) {                                        \
        return emu::saturate<long long>(round(a));                                             \
    }                                                                                          \
    EMU_INLINE long long __double2ll_##suffix(double a) {                                      \
        return emu::saturate<long long>(round(a));                                             \
    }                                                                                          \
    EMU_INLINE unsigned long long __float2ull_##suffix(float a) {                              \
        return emu::saturate<unsigned long long>(round(a));                                    \
    }                                                                                          \
    EMU_INLINE unsigned long long __double2ull_##suffix(double a) {                            \
        return emu::saturate<unsigned long long>(round(a));                                    \
    }
EMU_TO_INTEGER(rn, nearbyint)
EMU_TO_INTEGER(rz, trunc)
EMU_TO_INTEGER(rd, floor)
EMU_TO_INTEGER(ru, ceil)
#undef EMU_TO_INTEGER
EMU_INLINE float __int2float_rn(int a) { return (float)a; }
EMU_INLINE float __uint2float_rn(unsigned a) { return (float)a; }
EMU_INLINE float __ll2float_rn(long long a) { return (float)a; }
EMU_INLINE float __ull2float_rn(unsigned long long a) { return (float)a; }
EMU_INLINE double __int2double_rn(int a) { return (double)a; }
EMU_INLINE double __ll2double_rn(long long a) { return (double)a; }
EMU_INLINE double __ull2double_rn(unsigned long long a) { return (double)a; }
EMU_INLINE float __double2float_rn(double a) { return (float)a; }

EMU_INLINE int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
EMU_INLINE unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)(((unsigned long long)a * b) >> 32);
}
EMU_INLINE long long __mul64hi(long long a, long long b) {
    return (long long)(((__int128)a * b) >> 64);
}
EMU_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
EMU_INLINE int __mul24(int a, int b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
EMU_INLINE int __ffs(int a) { return __builtin_ffs(a); }
EMU_INLINE int __ffsll(long long a) { return __builtin_ffsll(a); }
EMU_INLINE int __popc(unsigned a) { return __builtin_popcount(a); }
EMU_INLINE int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
EMU_INLINE int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
EMU_INLINE int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
EMU_INLINE unsigned __brev(unsigned a) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= ((a >> i) & 1u) << (31 - i);
    return r;
}
EMU_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    unsigned long long both = ((unsigned long long)y << 32) | x;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned select = (s >> (4 * i)) & 0xfu;
        unsigned byte = (unsigned)(both >> (8 * (select & 7u))) & 0xffu;
        if (select & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        r |= byte << (8 * i);
    }
    return r;
}
EMU_INLINE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
    return (unsigned)(((((unsigned long long)hi << 32) | lo) << (shift & 31u)) >> 32);
}
EMU_INLINE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return (unsigned)((((unsigned long long)hi << 32) | lo) >> (shift & 31u));
}
EMU_INLINE int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += (int)(signed char)(a >> (8 * i)) * (signed char)(b >> (8 * i));
    return c;
}

// ---- memory ----
template <class T> EMU_INLINE T __ldg(const T* p) { return *p; }
template <class T> EMU_INLINE T __ldca(const T* p) { return *p; }
template <class T> EMU_INLINE T __ldcg(const T* p) { return *p; }
template <class T> EMU_INLINE T __ldcs(const T* p) { return *p; }
template <class T> EMU_INLINE T __ldlu(const T* p) { return *p; }
template <class T> EMU_INLINE T __ldcv(const T* p) { return *p; }
template <class T> EMU_INLINE void __stwb(T* p, T value) { *p = value; }
template <class T> EMU_INLINE void __stcg(T* p, T value) { *p = value; }
template <class T> EMU_INLINE void __stcs(T* p, T value) { *p = value; }
template <class T> EMU_INLINE void __stwt(T* p, T value) { *p = value; }
EMU_INLINE std::size_t __cvta_generic_to_shared(const void* p) { return (std::size_t)p; }
EMU_INLINE std::size_t __cvta_generic_to_global(const void* p) { return (std::size_t)p; }
EMU_INLINE void* __cvta_shared_to_generic(std::size_t p) { return (void*)p; }
EMU_INLINE void __threadfence() { emu::fence(); }
EMU_INLINE void __threadfence_block() {}
EMU_INLINE void __threadfence_system() { emu::fence(); }
EMU_INLINE long long clock64() { return (long long)emu::clock(); }
// What spins on another thread's write gives that thread a turn.
EMU_INLINE void __nanosleep(unsigned) { emu::yield(); }

// Out of line in watch mode, so that the callbacks do not take them for plain accesses.
#ifdef EMU_WATCH
#define EMU_ATOMIC static __attribute__((noinline, unused, no_sanitize("thread")))
#define EMU_NOTE_ATOMIC(p) emu::atomic_access(p, sizeof *(p), __builtin_return_address(0))
#else
#define EMU_ATOMIC EMU_INLINE
#define EMU_NOTE_ATOMIC(p) (void)0
#endif
#define EMU_UPDATE(name, T, expression) \
    EMU_ATOMIC T name(T* p, T value) {  \
        EMU_NOTE_ATOMIC(p);             \
        const T old = *p;               \
        *p = (T)(expression);           \
        return old;                     \
    }
#define EMU_UPDATES(T)                                       \
    EMU_UPDATE(atomicMin, T, value < old ? value : old)      \
    EMU_UPDATE(atomicMax, T, value > old ? value : old)      \
    EMU_UPDATE(atomicAnd, T, old & value)                    \
    EMU_UPDATE(atomicOr, T, old | value)                     \
    EMU_UPDATE(atomicXor, T, old ^ value)                    \
    EMU_UPDATE(atomicExch, T, value)
#define EMU_CAS(T)                                           \
    EMU_ATOMIC T atomicCAS(T* p, T compare, T value) {       \
        EMU_NOTE_ATOMIC(p);                                  \
        const T old = *p;                                    \
        if (old == compare) *p = value;                      \
        return old;                                          \
    }
EMU_UPDATES(int)
EMU_UPDATES(unsigned)
EMU_UPDATES(long long)
EMU_UPDATES(unsigned long long)
EMU_UPDATE(atomicAdd, int, (unsigned)old + (unsigned)value)
EMU_UPDATE(atomicAdd, unsigned, old + value)
EMU_UPDATE(atomicAdd, unsigned long long, old + value)
EMU_UPDATE(atomicAdd, float, old + value)
EMU_UPDATE(atomicAdd, double, old + value)
EMU_UPDATE(atomicSub, int, (unsigned)old - (unsigned)value)
EMU_UPDATE(atomicSub, unsigned, old - value)
EMU_UPDATE(atomicExch, float, value)
EMU_UPDATE(atomicInc, unsigned, old >= value ? 0u : old + 1u)
EMU_UPDATE(atomicDec, unsigned, old == 0u || old > value ? value : old - 1u)
EMU_CAS(int)
EMU_CAS(unsigned)
EMU_CAS(unsigned short)
EMU_CAS(unsigned long long)
#undef EMU_UPDATES
#undef EMU_CAS

// ---- barriers; the source line travels along, for the diagnosis ----
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
EMU_INLINE void __syncthreads(EMU_HERE) { emu::barrier(0, "__syncthreads", file, line); }
EMU_INLINE int __syncthreads_count(int predicate, EMU_HERE) {
    return emu::barrier(predicate, "__syncthreads_count", file, line).count;
}
EMU_INLINE int __syncthreads_and(int predicate, EMU_HERE) {
    return emu::barrier(predicate, "__syncthreads_and", file, line).all;
}
EMU_INLINE int __syncthreads_or(int predicate, EMU_HERE) {
    return emu::barrier(predicate, "__syncthreads_or", file, line).any;
}

// ---- warp collectives ----
namespace emu {

inline void meet(void* const*, unsigned) {}

template <class T>
struct Shuffle {
    T value, result;
    int source, width, mode;  // mode: 0 idx, 1 up, 2 down, 3 xor
};
template <class T>
void complete_shuffle(void* const lanes[32], unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
        auto* mine = static_cast<Shuffle<T>*>(lanes[lane]);
        if (!mine) continue;
        const int width = mine->width, first = lane & ~(width - 1), last = first + width - 1;
        int from = lane;
        switch (mine->mode) {
            case 0: from = first + (mine->source & (width - 1)); break;
            case 1: from = lane - mine->source; if (from < first) from = lane; break;
            case 2: from = lane + mine->source; if (from > last) from = lane; break;
            default: from = lane ^ mine->source; if (from > last) from = lane; break;
        }
        auto* theirs = static_cast<Shuffle<T>*>(lanes[from]);
        if (theirs) mine->result = theirs->value;
        else __builtin_memset(&mine->result, 0xff, sizeof(T));  // undefined on the hardware
    }
}
template <class T>
EMU_INLINE T shuffle(unsigned mask, T value, int source, int width, int mode, const char* name,
                     const char* file, int line) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no shuffle of this size");
    if (width < 1 || width > 32 || (width & (width - 1))) fail("%s: width %d (%s:%d)", name, width, file, line);
    Shuffle<T> data{value, value, source, width, mode};
    collective(mask, complete_shuffle<T>, &data, false, false, name, file, line);
    return data.result;
}

struct Vote {
    unsigned value, result;
};
inline void complete_ballot(void* const lanes[32], unsigned) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes[lane] && static_cast<Vote*>(lanes[lane])->value) ballot |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes[lane]) static_cast<Vote*>(lanes[lane])->result = ballot;
}
inline void complete_all(void* const lanes[32], unsigned) {
    unsigned all = 1;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes[lane] && !static_cast<Vote*>(lanes[lane])->value) all = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes[lane]) static_cast<Vote*>(lanes[lane])->result = all;
}
EMU_INLINE unsigned vote(unsigned mask, unsigned value, Complete complete, const char* name,
                         const char* file, int line) {
    Vote data{value, 0};
    collective(mask, complete, &data, false, false, name, file, line);
    return data.result;
}

template <class T>
struct Operand {
    T value, result;
};
template <class T, T (*combine)(T, T)>
void complete_reduce(void* const lanes[32], unsigned) {
    bool first = true;
    T total{};
    for (int lane = 0; lane < 32; ++lane) {
        if (!lanes[lane]) continue;
        const T value = static_cast<Operand<T>*>(lanes[lane])->value;
        total = first ? value : combine(total, value);
        first = false;
    }
    for (int lane = 0; lane < 32; ++lane)
        if (lanes[lane]) static_cast<Operand<T>*>(lanes[lane])->result = total;
}
template <class T>
void complete_match(void* const lanes[32], unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
        auto* mine = static_cast<Operand<T>*>(lanes[lane]);
        if (!mine) continue;
        unsigned same = 0;
        for (int other = 0; other < 32; ++other) {
            auto* theirs = static_cast<Operand<T>*>(lanes[other]);
            if (theirs && !__builtin_memcmp(&theirs->value, &mine->value, sizeof(T)))
                same |= 1u << other;
        }
        __builtin_memcpy(&mine->result, &same, sizeof same);
    }
}
template <class T> T plus(T a, T b) { return (T)((unsigned)a + (unsigned)b); }
template <class T> T least(T a, T b) { return b < a ? b : a; }
template <class T> T greatest(T a, T b) { return a < b ? b : a; }
template <class T> T bit_and(T a, T b) { return a & b; }
template <class T> T bit_or(T a, T b) { return a | b; }
template <class T> T bit_xor(T a, T b) { return a ^ b; }
}  // namespace emu

template <class T>
EMU_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_HERE) {
    return emu::shuffle(mask, value, lane, width, 0, "__shfl_sync", file, line);
}
template <class T>
EMU_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    return emu::shuffle(mask, value, (int)delta, width, 1, "__shfl_up_sync", file, line);
}
template <class T>
EMU_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    return emu::shuffle(mask, value, (int)delta, width, 2, "__shfl_down_sync", file, line);
}
template <class T>
EMU_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_HERE) {
    return emu::shuffle(mask, value, lanes, width, 3, "__shfl_xor_sync", file, line);
}
EMU_INLINE void __syncwarp(unsigned mask = 0xffffffffu, EMU_HERE) {
    char nothing;
    emu::collective(mask, emu::meet, &nothing, false, true, "__syncwarp", file, line);
}
EMU_INLINE unsigned __ballot_sync(unsigned mask, int predicate, EMU_HERE) {
    return emu::vote(mask, predicate != 0, emu::complete_ballot, "__ballot_sync", file, line);
}
EMU_INLINE int __any_sync(unsigned mask, int predicate, EMU_HERE) {
    return emu::vote(mask, predicate != 0, emu::complete_ballot, "__any_sync", file, line) != 0;
}
EMU_INLINE int __all_sync(unsigned mask, int predicate, EMU_HERE) {
    return (int)emu::vote(mask, predicate != 0, emu::complete_all, "__all_sync", file, line);
}
EMU_INLINE unsigned __activemask() { return emu::active_mask(); }
template <class T>
EMU_INLINE unsigned __match_any_sync(unsigned mask, T value, EMU_HERE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "no match of this size");
    emu::Operand<T> data{value, T{}};
    emu::collective(mask, emu::complete_match<T>, &data, false, false, "__match_any_sync", file, line);
    unsigned result;
    __builtin_memcpy(&result, &data.result, sizeof result);
    return result;
}
#define EMU_REDUCE(name, T, combine)                                                           \
    EMU_INLINE T name(unsigned mask, T value, EMU_HERE) {                                      \
        emu::Operand<T> data{value, 0};                                                        \
        emu::collective(mask, emu::complete_reduce<T, combine<T>>, &data, false, false, #name, \
                        file, line);                                                           \
        return data.result;                                                                    \
    }
EMU_REDUCE(__reduce_add_sync, int, emu::plus)
EMU_REDUCE(__reduce_add_sync, unsigned, emu::plus)
EMU_REDUCE(__reduce_min_sync, int, emu::least)
EMU_REDUCE(__reduce_min_sync, unsigned, emu::least)
EMU_REDUCE(__reduce_max_sync, int, emu::greatest)
EMU_REDUCE(__reduce_max_sync, unsigned, emu::greatest)
EMU_REDUCE(__reduce_and_sync, unsigned, emu::bit_and)
EMU_REDUCE(__reduce_or_sync, unsigned, emu::bit_or)
EMU_REDUCE(__reduce_xor_sync, unsigned, emu::bit_xor)
#undef EMU_REDUCE

// ---- the kernel's entry point, for the runtime ----
namespace emu {
template <class T>
constexpr Parameter describe() {
    return {(int)sizeof(T), std::is_pointer<T>::value          ? ParameterKind::pointer
                            : std::is_same<T, bool>::value     ? ParameterKind::boolean
                            : std::is_integral<T>::value ||
                                    std::is_enum<T>::value     ? ParameterKind::integer
                            : std::is_floating_point<T>::value ? ParameterKind::floating
                                                               : ParameterKind::object};
}
template <auto kernel, class Signature>
struct Caller;
template <auto kernel, class... A>
struct Caller<kernel, void(A...)> {
    static constexpr Parameter parameters[] = {describe<A>()..., Parameter{}};
    static constexpr int count = sizeof...(A);
    template <std::size_t... i>
    static void spread(void* const* a, std::index_sequence<i...>) {
        kernel(*static_cast<A*>(a[i])...);
    }
    static void call(void* const* a) { spread(a, std::index_sequence_for<A...>{}); }
};
}  // namespace emu
#define EMU_ENTRY(kernel, bound)                                                       \
    emu::Entry {                                                                       \
        #kernel, emu::Caller<&kernel, decltype(kernel)>::call,                         \
            emu::Caller<&kernel, decltype(kernel)>::parameters,                        \
            emu::Caller<&kernel, decltype(kernel)>::count, bound                       \
    }

// Twin of kernels_cuda/ptx.cuh: the same functions in plain C++, checked as strictly as the
// hardware would (alignment, all lanes present), with the copies of cp.async arriving at the wait.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PTX_HAS_SM80 0
#else
#define PTX_HAS_SM80 1
#endif

EMU_INLINE unsigned shared_address(const void* smem) {
    return static_cast<unsigned>(__cvta_generic_to_shared(smem));
}

namespace emu {

template <class Vector>
EMU_INLINE void cp_async(void* smem, const void* gmem, int source_bytes, EMU_HERE) {
    constexpr int bytes = sizeof(Vector);
    if (reinterpret_cast<std::size_t>(smem) % bytes || reinterpret_cast<std::size_t>(gmem) % bytes)
        fail("cp.async of %d bytes: misaligned address (%s:%d)", bytes, file, line);
    if (source_bytes < 0 || source_bytes > bytes)
        fail("cp.async of %d bytes: %d source bytes (%s:%d)", bytes, source_bytes, file, line);
#if PTX_HAS_SM80
    // Touched now, so that the checkers see both sides of the copy at this line.
    if (source_bytes == bytes) {
        const Vector seen = *static_cast<const Vector*>(gmem);
        asm volatile("" ::"m"(seen));
    } else {
        for (int i = 0; i < source_bytes; ++i) (void)static_cast<const volatile char*>(gmem)[i];
    }
    Vector poison;
    __builtin_memset(&poison, 0xff, bytes);
    *static_cast<Vector*>(smem) = poison;
    async_copy(smem, gmem, bytes, static_cast<unsigned>(source_bytes));
#else
    for (int i = 0; i < bytes; ++i)
        static_cast<char*>(smem)[i] = i < source_bytes ? static_cast<const char*>(gmem)[i] : char(0);
#endif
}

struct alignas(16) Row {
    unsigned short element[8];
};
struct MatrixLoad {
    Row row;  // the one this lane has the address of
    unsigned* result;
};
template <int count, bool trans>
void complete_ldmatrix(void* const lanes[32], unsigned) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < count; ++i) {
            const int g = lane / 4, t = lane % 4;
            auto at = [&](int row, int column) -> unsigned {
                return static_cast<MatrixLoad*>(lanes[8 * i + row])->row.element[column];
            };
            static_cast<MatrixLoad*>(lanes[lane])->result[i] =
                trans ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
        }
}
template <int count, bool trans>
EMU_INLINE void ldmatrix(unsigned* d, const void* row, EMU_HERE) {
    MatrixLoad load;
    __builtin_memset(&load.row, 0xff, sizeof load.row);
    if (lane_id() < 8 * count) {
        if (reinterpret_cast<std::size_t>(row) % 16) fail("ldmatrix: misaligned row (%s:%d)", file, line);
        load.row = *static_cast<const Row*>(row);
    }
    load.result = d;
    collective(0xffffffffu, complete_ldmatrix<count, trans>, &load, true, false, "ldmatrix", file, line);
}

template <class T, int a_count, int b_count, int c_count>
struct Fragments {
    T a[a_count], b[b_count];
    using C = std::conditional_t<std::is_same<T, double>::value, double, float>;
    C* c;
};
struct F16 {
    static double value(unsigned short bits) { return (float)emu::bits<__half>(bits); }
};
struct Bf16 {
    static double value(unsigned short bits) { return (float)emu::bits<__nv_bfloat16>(bits); }
};
using Fragments16 = Fragments<unsigned, 4, 2, 4>;
// The products are exact and summed in double: the hardware's sums are a little less accurate.
inline void multiply(const double* a, const double* b, int k, void* const lanes[32]) {
    for (int lane = 0; lane < 32; ++lane) {
        float* c = static_cast<Fragments16*>(lanes[lane])->c;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = c[i];
            for (int j = 0; j < k; ++j) sum += a[row * k + j] * b[j * 8 + column];
            c[i] = (float)sum;
        }
    }
}
template <class Type>
void complete_mma16(void* const lanes[32], unsigned) {
    double a[16 * 16], b[16 * 8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& f = *static_cast<Fragments16*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[(g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2) + half] =
                    Type::value((unsigned short)(f.a[i] >> (16 * half)));
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half)
                b[(2 * t + 8 * i + half) * 8 + g] = Type::value((unsigned short)(f.b[i] >> (16 * half)));
    }
    multiply(a, b, 16, lanes);
}
inline void complete_mma_tf32(void* const lanes[32], unsigned) {
    double a[16 * 8], b[8 * 8];
    const auto value = [](unsigned u) { return (double)__uint_as_float(u & 0xffffe000u); };
    for (int lane = 0; lane < 32; ++lane) {
        const auto& f = *static_cast<Fragments16*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)] = value(f.a[i]);
        for (int i = 0; i < 2; ++i) b[(t + 4 * i) * 8 + g] = value(f.b[i]);
    }
    multiply(a, b, 8, lanes);
}
using Fragments64 = Fragments<double, 1, 1, 2>;
inline void complete_mma_f64(void* const lanes[32], unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
        double* c = static_cast<Fragments64*>(lanes[lane])->c;
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 4; ++k)
                c[i] = fma(static_cast<Fragments64*>(lanes[lane / 4 * 4 + k])->a[0],
                           static_cast<Fragments64*>(lanes[(2 * (lane % 4) + i) * 4 + k])->b[0], c[i]);
    }
}
EMU_INLINE void mma(Complete complete, const char* name, float* c, const unsigned* a, const unsigned* b,
                    const char* file, int line) {
    Fragments16 f{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, c};
    collective(0xffffffffu, complete, &f, true, false, name, file, line);
}

}  // namespace emu

EMU_INLINE void cp_async_16(void* smem, const void* gmem, bool valid = true, EMU_HERE) {
    emu::cp_async<int4>(smem, gmem, valid ? 16 : 0, file, line);
}
EMU_INLINE void cp_async_16_cached(void* smem, const void* gmem, bool valid = true, EMU_HERE) {
    emu::cp_async<int4>(smem, gmem, valid ? 16 : 0, file, line);
}
EMU_INLINE void cp_async_8(void* smem, const void* gmem, bool valid = true, EMU_HERE) {
    emu::cp_async<int2>(smem, gmem, valid ? 8 : 0, file, line);
}
EMU_INLINE void cp_async_4(void* smem, const void* gmem, bool valid = true, EMU_HERE) {
    emu::cp_async<int>(smem, gmem, valid ? 4 : 0, file, line);
}
EMU_INLINE void cp_async_commit() { emu::async_commit(); }
template <int GROUPS_IN_FLIGHT>
EMU_INLINE void cp_async_wait() {
    static_assert(GROUPS_IN_FLIGHT >= 0, "a count of groups");
    emu::async_wait(GROUPS_IN_FLIGHT);
}

EMU_INLINE void ldmatrix_x1(unsigned (&d)[1], const void* row, EMU_HERE) {
    emu::ldmatrix<1, false>(d, row, file, line);
}
EMU_INLINE void ldmatrix_x2(unsigned (&d)[2], const void* row, EMU_HERE) {
    emu::ldmatrix<2, false>(d, row, file, line);
}
EMU_INLINE void ldmatrix_x4(unsigned (&d)[4], const void* row, EMU_HERE) {
    emu::ldmatrix<4, false>(d, row, file, line);
}
EMU_INLINE void ldmatrix_x1_trans(unsigned (&d)[1], const void* row, EMU_HERE) {
    emu::ldmatrix<1, true>(d, row, file, line);
}
EMU_INLINE void ldmatrix_x2_trans(unsigned (&d)[2], const void* row, EMU_HERE) {
    emu::ldmatrix<2, true>(d, row, file, line);
}
EMU_INLINE void ldmatrix_x4_trans(unsigned (&d)[4], const void* row, EMU_HERE) {
    emu::ldmatrix<4, true>(d, row, file, line);
}

EMU_INLINE void mma_m16n8k16_f16_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                     EMU_HERE) {
    emu::mma(emu::complete_mma16<emu::F16>, "mma_m16n8k16_f16_f32", c, a, b, file, line);
}
#if PTX_HAS_SM80
EMU_INLINE void mma_m16n8k16_bf16_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                      EMU_HERE) {
    emu::mma(emu::complete_mma16<emu::Bf16>, "mma_m16n8k16_bf16_f32", c, a, b, file, line);
}
EMU_INLINE void mma_m16n8k8_tf32_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                     EMU_HERE) {
    emu::mma(emu::complete_mma_tf32, "mma_m16n8k8_tf32_f32", c, a, b, file, line);
}
EMU_INLINE void mma_m8n8k4_f64(double (&c)[2], double a, double b, EMU_HERE) {
    emu::Fragments64 f{{a}, {b}, c};
    emu::collective(0xffffffffu, emu::complete_mma_f64, &f, true, false, "mma_m8n8k4_f64", file, line);
}
EMU_INLINE unsigned cvt_rna_tf32(float a) {
    const unsigned u = __float_as_uint(a);
    if ((u & 0x7f800000u) == 0x7f800000u) return u;
    return (u + 0x1000u) & 0xffffe000u;
}
#endif

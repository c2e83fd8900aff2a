// All inline PTX of this library, one small function per instruction. No kernel has an asm
// statement of its own: the emulator (tests/emulator) swaps this one file for a twin in plain C++.
//
// Notation of the matrix fragments (PTX ISA, "Matrix fragments for mma"): a warp's lane l has
//   g = l / 4    its group, 0..7
//   t = l % 4    its place in the group, 0..3
// and 16-bit elements are packed two to a register, the one with the lower column (A, C) or
// row (B) in the lower half.
//
//   function              needs    elsewhere
//   cp_async_*            sm_80    a plain copy, done at once; commit and wait do nothing
//   ldmatrix_*            sm_75
//   mma_m16n8k16_f16_f32  sm_80    two m16n8k8 products on sm_75
//   the other mma, cvt    sm_80    not declared (PTX_HAS_SM80 tells)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PTX_HAS_SM80 0
#else
#define PTX_HAS_SM80 1
#endif

// The 32-bit address that shared-memory instructions take.
__device__ __forceinline__ unsigned shared_address(const void* smem) {
    return static_cast<unsigned>(__cvta_generic_to_shared(smem));
}

// ---------------------------------------------------------------- cp.async
//
// smem[0:BYTES] = valid ? gmem[0:BYTES] : 0, some time before the cp_async_wait that covers the
// group it is committed in. Both addresses are multiples of BYTES; gmem is not read if !valid.
// Each thread waits for its own copies only: a barrier makes them visible to the others.

__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid = true) {
#if PTX_HAS_SM80
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(smem)),
                 "l"(gmem), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<int4*>(smem) = valid ? *static_cast<const int4*>(gmem) : make_int4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void cp_async_8(void* smem, const void* gmem, bool valid = true) {
#if PTX_HAS_SM80
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(smem)),
                 "l"(gmem), "r"(valid ? 8 : 0)
                 : "memory");
#else
    *static_cast<int2*>(smem) = valid ? *static_cast<const int2*>(gmem) : make_int2(0, 0);
#endif
}

__device__ __forceinline__ void cp_async_4(void* smem, const void* gmem, bool valid = true) {
#if PTX_HAS_SM80
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(smem)),
                 "l"(gmem), "r"(valid ? 4 : 0)
                 : "memory");
#else
    *static_cast<int*>(smem) = valid ? *static_cast<const int*>(gmem) : 0;
#endif
}

// As cp_async_16, by way of L1: for what other copies of this multiprocessor read again soon.
__device__ __forceinline__ void cp_async_16_cached(void* smem, const void* gmem,
                                                   bool valid = true) {
#if PTX_HAS_SM80
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(smem)),
                 "l"(gmem), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<int4*>(smem) = valid ? *static_cast<const int4*>(gmem) : make_int4(0, 0, 0, 0);
#endif
}

// Closes the group of the copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if PTX_HAS_SM80
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most GROUPS_IN_FLIGHT of this thread's committed groups are unfinished.
template <int GROUPS_IN_FLIGHT>
__device__ __forceinline__ void cp_async_wait() {
#if PTX_HAS_SM80
    asm volatile("cp.async.wait_group %0;\n" ::"n"(GROUPS_IN_FLIGHT) : "memory");
#endif
}

// ---------------------------------------------------------------- ldmatrix
//
// Loads 1, 2 or 4 matrices of 8 x 8 16-bit elements from shared memory. Lane 8 i + r passes the
// address of row r (16 bytes, 16-byte aligned) of matrix i, and gets in d[i] the elements
// (g, 2t) and (g, 2t + 1) of matrix i; with _trans (2t, g) and (2t + 1, g).
// All 32 lanes call it; addresses of lanes that no matrix needs are not read.

__device__ __forceinline__ void ldmatrix_x1(unsigned (&d)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
                 : "=r"(d[0])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(unsigned (&d)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(unsigned (&d)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
                 : "=r"(d[0])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&d)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ---------------------------------------------------------------- mma
//
// c += a b, by a whole warp; a is 16 x k (row major), b is k x 8 (column major), c is 16 x 8.
//
//   k = 16, 16-bit elements           k = 8, tf32                k = 4, f64, m = 8
//   a[0]  (g,     2t), (g,     2t+1)  a[0]  (g,     t)           a  (g, t)
//   a[1]  (g + 8, 2t), (g + 8, 2t+1)  a[1]  (g + 8, t)           b  (t, g)
//   a[2]  (g,     2t+8), ( , 2t+9)    a[2]  (g,     t + 4)       c[0]  (g, 2t)
//   a[3]  (g + 8, 2t+8), ( , 2t+9)    a[3]  (g + 8, t + 4)       c[1]  (g, 2t+1)
//   b[0]  (2t,     g), (2t + 1, g)    b[0]  (t,     g)
//   b[1]  (2t + 8, g), (2t + 9, g)    b[1]  (t + 4, g)
//   c[0]  (g,     2t)   c[1]  (g,     2t+1)       (c: both columns on the left)
//   c[2]  (g + 8, 2t)   c[3]  (g + 8, 2t+1)

__device__ __forceinline__ void mma_m16n8k16_f16_f32(float (&c)[4], const unsigned (&a)[4],
                                                     const unsigned (&b)[2]) {
#if PTX_HAS_SM80
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

#if PTX_HAS_SM80

__device__ __forceinline__ void mma_m16n8k16_bf16_f32(float (&c)[4], const unsigned (&a)[4],
                                                      const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Of each element only the upper 19 bits count: round with cvt_rna_tf32 first.
__device__ __forceinline__ void mma_m16n8k8_tf32_f32(float (&c)[4], const unsigned (&a)[4],
                                                     const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m8n8k4_f64(double (&c)[2], double a, double b) {
    asm volatile(
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
        : "+d"(c[0]), "+d"(c[1])
        : "d"(a), "d"(b));
}

// The nearest tf32, ties away from zero, as the bits that mma takes.
__device__ __forceinline__ unsigned cvt_rna_tf32(float a) {
    unsigned d;
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(d) : "f"(a));
    return d;
}

#endif

// d = a b + c by one warp and one mma, one entry point per instruction of ptx.cuh.
// 16-bit: the fragments of a come from ldmatrix (x4), those of b from ldmatrix with _trans (x2).
#include "ptx.cuh"

template <class T, void (*mma)(float (&)[4], const unsigned (&)[4], const unsigned (&)[2])>
__device__ void product16(const T* a, const T* b, const float* c, float* d) {
    __shared__ __align__(16) T a_tile[16][16], b_tile[16][8];
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) b_tile[i / 8][i % 8] = b[i];
    __syncthreads();
    unsigned a_part[4], b_part[2];
    ldmatrix_x4(a_part, &a_tile[lane % 16][lane / 16 * 8]);
    ldmatrix_x2_trans(b_part, &b_tile[lane % 16][0]);
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma(sum, a_part, b_part);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__device__ void multiply_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_f16_f32(c, a, b);
}

extern "C" __global__ void matrix_f16(const __half* a, const __half* b, const float* c, float* d) {
    product16<__half, multiply_f16>(a, b, c, d);
}

// out[lane, :] = what each form of ldmatrix gives for the 32 x 8 matrix x.
extern "C" __global__ void matrix_load(const unsigned short* x, unsigned* out) {
    __shared__ __align__(16) unsigned short rows[32][8];
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; ++i) rows[lane][i] = x[8 * lane + i];
    __syncthreads();
    unsigned d1[1], d2[2], d4[4];
    unsigned* o = out + 14 * lane;
    ldmatrix_x1(d1, rows[lane]);
    *o++ = d1[0];
    ldmatrix_x1_trans(d1, rows[lane]);
    *o++ = d1[0];
    ldmatrix_x2(d2, rows[lane]);
    for (unsigned v : d2) *o++ = v;
    ldmatrix_x2_trans(d2, rows[lane]);
    for (unsigned v : d2) *o++ = v;
    ldmatrix_x4(d4, rows[lane]);
    for (unsigned v : d4) *o++ = v;
    ldmatrix_x4_trans(d4, rows[lane]);
    for (unsigned v : d4) *o++ = v;
}

#if PTX_HAS_SM80

__device__ void multiply_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_bf16_f32(c, a, b);
}

extern "C" __global__ void matrix_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, const float* c,
                                       float* d) {
    product16<__nv_bfloat16, multiply_bf16>(a, b, c, d);
}

extern "C" __global__ void matrix_tf32(const float* a, const float* b, const float* c, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned a_part[4], b_part[2];
    float sum[4];
    for (int i = 0; i < 4; ++i) a_part[i] = cvt_rna_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) b_part[i] = cvt_rna_tf32(b[(t + i * 4) * 8 + g]);
    for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_m16n8k8_tf32_f32(sum, a_part, b_part);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

extern "C" __global__ void matrix_f64(const double* a, const double* b, const double* c, double* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    double sum[2] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1]};
    mma_m8n8k4_f64(sum, a[g * 4 + t], b[t * 8 + g]);
    for (int i = 0; i < 2; ++i) d[g * 8 + 2 * t + i] = sum[i];
}

#endif

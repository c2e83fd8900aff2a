// c[m, n] = sum over k of a[m, k] b[k, n], float32: the shape of an implicit GEMM.
// A block of 256 threads computes TILE_M x TILE_N, each thread 4 x 4 of them; the tails are
// handled. DYNAMIC_SHARED: the tiles lie in dynamic instead of static shared memory.
#ifndef TILE_K
#define TILE_K 16
#endif
constexpr int TILE_M = 64, TILE_N = 64;
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED 0
#endif
static_assert(TILE_K % 4 == 0, "TILE_K is a multiple of 4");

extern "C" __global__ void __launch_bounds__(256)
    gemm(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c, int m, int n, int k) {
#if DYNAMIC_SHARED
    extern __shared__ __align__(16) float smem[];
    float(*a_tile)[TILE_M + 4] = reinterpret_cast<float(*)[TILE_M + 4]>(smem);
    float(*b_tile)[TILE_N] = reinterpret_cast<float(*)[TILE_N]>(smem + TILE_K * (TILE_M + 4));
#else
    __shared__ __align__(16) float a_tile[TILE_K][TILE_M + 4], b_tile[TILE_K][TILE_N];
#endif
    const int thread = threadIdx.x, row = thread / 16 * 4, column = thread % 16 * 4;
    const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N;
    float sum[4][4] = {};
    for (int k0 = 0; k0 < k; k0 += TILE_K) {
        for (int i = thread; i < TILE_M * TILE_K; i += 256) {
            const int r = i / TILE_K, q = i % TILE_K;
            a_tile[q][r] = m0 + r < m && k0 + q < k ? a[(long long)(m0 + r) * k + k0 + q] : 0.0f;
        }
        for (int i = thread; i < TILE_N * TILE_K; i += 256) {
            const int q = i / TILE_N, s = i % TILE_N;
            b_tile[q][s] = n0 + s < n && k0 + q < k ? b[(long long)(k0 + q) * n + n0 + s] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int q = 0; q < TILE_K; ++q) {
            const float4 x = *reinterpret_cast<const float4*>(&a_tile[q][row]);
            const float4 y = *reinterpret_cast<const float4*>(&b_tile[q][column]);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
            if (m0 + row + i < m && n0 + column + j < n)
                c[(long long)(m0 + row + i) * n + n0 + column + j] = sum[i][j];
}

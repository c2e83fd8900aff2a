// Arithmetic of the 16-bit types: per element i, out[i, :] holds every operation's result.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef DATA_T
#define DATA_T __half
#endif

struct Pair2 {
    static __device__ __half2 pair(__half x, __half y) { return __halves2half2(x, y); }
    static __device__ __nv_bfloat162 pair(__nv_bfloat16 x, __nv_bfloat16 y) { return __halves2bfloat162(x, y); }
};

extern "C" __global__ void float16(const DATA_T* a, const DATA_T* b, const float* f, DATA_T* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    DATA_T* o = out + 10 * i;
    o[0] = a[i] + b[i];
    o[1] = a[i] - b[i];
    o[2] = a[i] * b[i];
    o[3] = a[i] / b[i];
    o[4] = -a[i];
    o[5] = DATA_T(f[i]);
    o[6] = DATA_T(static_cast<float>(a[i]) + 1.0f);
    const auto pair = __hmul2(Pair2::pair(a[i], b[i]), Pair2::pair(b[i], b[i]));
    o[7] = pair.x;
    o[8] = pair.y;
    o[9] = a[i] > b[i] ? __hmax(a[i], b[i]) : __hmin(a[i], b[i]);
}

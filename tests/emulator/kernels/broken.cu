// Kernels with one planted mistake each: the tests see to it that the emulator finds every one.
#include "ptx.cuh"

// x is turned around within the block, without waiting for the others to have written.
extern "C" __global__ void missing_barrier(const float* x, float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = tile[63 - threadIdx.x];  // line of the read
}

// The same within one warp, where __syncwarp would do.
extern "C" __global__ void missing_warp_barrier(const float* x, float* out, int synchronise) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    if (synchronise) __syncwarp();
    out[threadIdx.x] = tile[31 - threadIdx.x];
}

// The second round overwrites what slow threads still read.
extern "C" __global__ void missing_second_barrier(const float* x, float* out) {
    __shared__ float tile[64];
    for (int round = 0; round < 2; ++round) {
        tile[threadIdx.x] = x[64 * round + threadIdx.x];
        __syncthreads();
        out[64 * round + threadIdx.x] = tile[(threadIdx.x + 33) % 64];
    }
}

extern "C" __global__ void reads_past_end(const float* x, float* out, int count) {
    const int i = threadIdx.x;
    if (i < count) out[i] = x[i] + x[i + 1];
}

extern "C" __global__ void reads_before_start(const float* x, float* out, int count) {
    const int i = threadIdx.x;
    if (i < count) out[i] = x[i] + x[i - 1];
}

extern "C" __global__ void writes_past_end(const float* x, float* out, int count) {
    const int i = threadIdx.x;
    if (i <= count) out[i] = x[0];
}

extern "C" __global__ void shared_past_end(const float* x, float* out) {
    __shared__ float tile[32];
    tile[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void dynamic_shared_past_end(const float* x, float* out) {
    extern __shared__ float dynamic[];
    dynamic[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = dynamic[threadIdx.x + 1];
}

extern "C" __global__ void registers_past_end(const float* x, float* out, int count) {
    float values[4];
    for (int i = 0; i <= count; ++i) values[i] = x[i];
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) sum += values[i];
    out[0] = sum;
}

extern "C" __global__ void unwritten_tail(const float* x, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count / 32 * 32) out[i] = x[i];
}

extern "C" __global__ void uninitialised_shared(float* out) {
    __shared__ float sum[32];
    sum[threadIdx.x] += 1.0f;
    out[threadIdx.x] = sum[threadIdx.x];
}

extern "C" __global__ void two_blocks_one_element(float* out) {
    if (threadIdx.x == 0) out[blockIdx.x / 2] = (float)blockIdx.x;
}

extern "C" __global__ void misaligned_vector(const float* x, float* out) {
    const float4 v = *reinterpret_cast<const float4*>(x + 1);
    out[0] = v.x + v.y + v.z + v.w;
}

extern "C" __global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 16)
        __syncthreads();  // one half here
    else
        __syncwarp();  // the other here
    out[threadIdx.x] = 0.0f;
}

extern "C" __global__ void two_barriers(float* out) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 0.0f;
}

// Threads that exit early are not waited for: fine on the hardware, and here.
extern "C" __global__ void early_exit(float* out) {
    if (threadIdx.x % 3 == 0) return;
    __syncthreads();
    const unsigned present = __ballot_sync(0xffffffffu, 1);
    out[threadIdx.x] = (float)__popc(present);
}

extern "C" __global__ void not_in_mask(int* out) {
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, (int)threadIdx.x, 0);
}

extern "C" __global__ void incomplete_warp(float* out) {
    unsigned d[1];
    __shared__ __align__(16) unsigned rows[8][4];
    rows[threadIdx.x % 8][threadIdx.x % 4] = 0;
    __syncthreads();
    ldmatrix_x1(d, rows[threadIdx.x % 8]);
    out[threadIdx.x] = (float)d[0];
}

extern "C" __global__ void misaligned_async(const float* x, float* out) {
    __shared__ __align__(16) float tile[32];
    if (threadIdx.x == 0) cp_async_16(tile, x + 1);
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = tile[0];
}

extern "C" __global__ void signed_overflow(const int* x, long long* out) { out[0] = x[0] * x[1]; }

extern "C" __global__ void wild_pointer(float* out, long long offset) { out[offset] = 1.0f; }

extern "C" __global__ void divides_by_zero(int* out) { out[1] /= out[0]; }

extern "C" __global__ void endless(volatile int* out) {
    while (out[0] == 0) {
    }
}

extern "C" __global__ void false_assertion(int* out) {
    assert(out[0] == 1);
    out[0] = 2;
}

extern "C" __global__ void __launch_bounds__(64, 2) bounded(float* out) { out[threadIdx.x] = 1.0f; }

extern "C" __global__ void too_much_static_shared(float* out) {
    __shared__ float tile[13000];
    tile[threadIdx.x] = 1.0f;
    out[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void writes_input(float* x) { x[threadIdx.x] = 0.0f; }

// out = 2 x, through a ring of STAGES buffers filled by cp.async.
//
//   ring   stage 0 | stage 1 | ...     a stage is one float4 per thread
//
// WAIT = 0 leaves out the wait for a stage; BYTES is the size of one copy; CACHED has it go by way
// of L1.
#include "ptx.cuh"
#ifndef STAGES
#define STAGES 3
#endif
#ifndef WAIT
#define WAIT 1
#endif
#ifndef BYTES
#define BYTES 16
#endif
#ifndef CACHED
#define CACHED 0
#endif
static_assert(STAGES >= 2, "STAGES is at least 2");
static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "BYTES is 4, 8 or 16");

extern "C" __global__ void async_copy(const float* x, float* out, int count) {
    extern __shared__ __align__(16) float ring[];
    const int thread = threadIdx.x, step = 4 * blockDim.x, tiles = (count + step - 1) / step;
    const auto fetch = [&](int tile) {
        const int i = tile * step + 4 * thread;
        float* to = ring + (tile % STAGES) * step + 4 * thread;
#if BYTES == 16 && CACHED
        cp_async_16_cached(to, i < count ? x + i : x, i < count);
#elif BYTES == 16
        cp_async_16(to, i < count ? x + i : x, i < count);
#else
        for (int j = 0; j < 4; j += BYTES / 4)
#if BYTES == 8
            cp_async_8(to + j, i < count ? x + i + j : x, i < count);
#else
            cp_async_4(to + j, i < count ? x + i + j : x, i < count);
#endif
#endif
    };
    for (int tile = 0; tile < STAGES - 1; ++tile) {
        if (tile < tiles) fetch(tile);
        cp_async_commit();
    }
    for (int tile = 0; tile < tiles; ++tile) {
#if WAIT
        cp_async_wait<STAGES - 2>();
#endif
        __syncthreads();  // the stage is here for all, and nobody still reads the one before it
        if (tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
        cp_async_commit();
        const int other = (thread + 1) % blockDim.x, i = tile * step + 4 * other;
        const float4 v = *reinterpret_cast<const float4*>(ring + (tile % STAGES) * step + 4 * other);
        if (i < count) *reinterpret_cast<float4*>(out + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
    }
}

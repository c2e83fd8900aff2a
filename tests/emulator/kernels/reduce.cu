// total[0] = sum of x, and per_block[b] = how many of block b's elements are positive.
// Shuffles within a warp, shared memory between warps, one atomic per block.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    return value;
}

template <class T>
__device__ T block_sum(T value) {
    __shared__ T partial[32];
    const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
    value = warp_sum(value);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    value = threadIdx.x < blockDim.x / warpSize ? partial[lane] : T(0);
    return warp == 0 ? warp_sum(value) : T(0);
}

extern "C" __global__ void reduce(const float* x, float* total, int* per_block, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float value = i < count ? x[i] : 0.0f;
    const int positive = __syncthreads_count(value > 0.0f);
    const float sum = block_sum(value);
    if (threadIdx.x == 0) {
        atomicAdd(total, sum);
        per_block[blockIdx.x] = positive;
    }
}

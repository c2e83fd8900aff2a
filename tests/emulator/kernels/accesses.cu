// One access of each width, for what watch mode counts.
extern "C" __global__ void accesses(const float* x, float* out, int stride) {
    __shared__ __align__(16) float tile[32 * 32];
    const int lane = threadIdx.x;
    for (int i = lane; i < 32 * 32; i += 32) tile[i] = (float)i;
    __syncthreads();
    const float4 wide = *reinterpret_cast<const float4*>(x + 4 * lane);      // 16 sectors
    const float2 middle = *reinterpret_cast<const float2*>(x + 2 * lane);    // 8 sectors
    const float far = x[8 * lane];                                           // 32 sectors
    const float same = x[7];                                                 // 1 sector
    const float4 tile4 = *reinterpret_cast<const float4*>(tile + 4 * lane);  // 4 wavefronts
    const float strided = tile[(stride * lane) % 1024];                      // stride: 1, 2, 32
    const float4 sum = make_float4(wide.x + middle.x, far + same, tile4.x + tile4.w, strided);
    *reinterpret_cast<float4*>(out + 4 * lane) = sum;  // 16 sectors
}

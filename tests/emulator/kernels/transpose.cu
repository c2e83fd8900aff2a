// out[c, r] = x[r, c] through a 32 x 32 tile of shared memory.
//
//   tile   |<- 32 ->|PAD|     PAD = 0: a column lies in one bank, 32 wavefronts per read
//          32 rows            PAD = 1: a column lies in 32 banks, one wavefront
#ifndef PAD
#define PAD 1
#endif
static_assert(PAD == 0 || PAD == 1, "PAD is 0 or 1");

extern "C" __global__ void transpose(const float* x, float* out, int rows, int columns) {
    __shared__ float tile[32][32 + PAD];
    const int r0 = blockIdx.y * 32, c0 = blockIdx.x * 32;
    for (int r = threadIdx.y; r < 32; r += blockDim.y)
        if (r0 + r < rows && c0 + threadIdx.x < columns)
            tile[r][threadIdx.x] = x[(r0 + r) * columns + c0 + threadIdx.x];
    __syncthreads();
    for (int c = threadIdx.y; c < 32; c += blockDim.y)
        if (c0 + c < columns && r0 + threadIdx.x < rows)
            out[(c0 + c) * rows + r0 + threadIdx.x] = tile[threadIdx.x][c];
}

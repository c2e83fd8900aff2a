// Winograd's method: the transform of the filters, once per call.
//
//   filters[g][kb][c][i*IN + j][k'] = (G w[k, c] G')[i][j]         IN = OUTPUTS + 2, k = kb*64 + k'
//       g  group, kb  block of 64 of its output channels, c  input channel of the group
//
// In float64, rounded once. The k' past the group's last channel are zero.
//
// Mapping: a thread transforms the taps of one (k, c); k' is fastest, so that the threads of a warp
// write neighbours.
//   item = ((g*blocks + kb)*C/G + c)*64 + k'   block b, thread t -> item = b*BLOCK + t, and again
//                                               after gridDim.x*BLOCK
// Shared memory: none.
//
// Macros:
//   W_T      float16, bfloat16 or float32
//   OUTPUTS  2 or 4: the extents of a tile of outputs
//   BLOCK    threads per block, a multiple of 64 up to 1024
//
// Launched by gpuconv/cuda_backend/winograd.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DOUTPUTS=4 winograd_filter.cu

#ifndef W_T
#define W_T float32
#endif
#ifndef OUTPUTS
#define OUTPUTS 2
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "winograd.cuh"

static_assert(is_one_of<W_T, float16, bfloat16, float32>, "W_T: float16, bfloat16 or float32");
static_assert(OUTPUTS == 2 || OUTPUTS == 4, "OUTPUTS: 2 or 4");
static_assert(BLOCK % FILTERS == 0 && BLOCK <= 1024, "BLOCK: whole blocks of filters, up to 1024");

constexpr int IN = OUTPUTS + 2;

extern "C" __global__ void __launch_bounds__(BLOCK)
winograd_filter(const W_T* __restrict__ w, float32* __restrict__ filters, const Problem p,
                const Tiles tiles, const int32 items) {
    const int32 step = gridDim.x * BLOCK;
    for (int32 item = blockIdx.x * BLOCK + threadIdx.x; item < items; item += step) {
        int32 rest = item / FILTERS;
        float32* to = filters + (int64)rest * IN * IN * FILTERS + item % FILTERS;
        const int32 c = split_off(rest, p.group_in_divisor);
        const int32 k = split_off(rest, tiles.filter_blocks) * FILTERS + item % FILTERS;
        float64 taps[3][3];
#pragma unroll
        for (int r = 0; r < 3; ++r) {
#pragma unroll
            for (int s = 0; s < 3; ++s) {
                const int64 from = p.w_offset + (rest * p.group_out + k) * p.w_strides[0] +
                                   c * p.w_strides[1] + r * p.w_strides[3] + s * p.w_strides[4];
                taps[s][r] = k < p.group_out ? convert<float64>(w[from]) : 0.0;
            }
        }
        float64 columns[3][IN];  // [s][i]
#pragma unroll
        for (int s = 0; s < 3; ++s) transform_filter(taps[s], columns[s]);
#pragma unroll
        for (int i = 0; i < IN; ++i) {
            const float64 row[3] = {columns[0][i], columns[1][i], columns[2][i]};
            float64 u[IN];
            transform_filter(row, u);
#pragma unroll
            for (int j = 0; j < IN; ++j) to[(i * IN + j) * FILTERS] = (float32)u[j];
        }
    }
}

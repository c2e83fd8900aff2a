// A copy of w with the channels innermost, so that 16 bytes of them can be loaded at once.
//
//   packed[((k*T + t)*R + r)*S + s][c] = w[k, c, t, r, s]
//
// Mapping: one thread copies the taps of one (k, c); c is fastest, so that at each tap the threads
// write neighbours, and what they read, the taps of neighbouring channels, stays in L1 until all
// of it is used.
//   i = k*C/G + c     block b, thread t -> i = b*BLOCK + t, and again after gridDim.x*BLOCK
//
// Shared memory: none.
//
// Macros:
//   DATA_T  uint16, uint32 or uint64: any type of the size of w's
//   BLOCK   threads per block, a multiple of 32 up to 1024
//
// w has fewer than 2^31 elements, which may lie anywhere.
// Launched by gpuconv/cuda_backend/implicit_gemm.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DDATA_T=uint16 pack_filter.cu

#ifndef DATA_T
#define DATA_T uint32
#endif
#ifndef BLOCK
#define BLOCK 256
#endif

#include "indexing.cuh"
#include "problem.cuh"
#include "types.cuh"

static_assert(is_one_of<DATA_T, uint16, uint32, uint64>, "DATA_T: uint16, uint32 or uint64");
static_assert(BLOCK >= 32 && BLOCK <= 1024 && BLOCK % 32 == 0, "BLOCK: whole warps, up to 1024");

extern "C" __global__ void __launch_bounds__(BLOCK)
pack_filter(const DATA_T* __restrict__ w, DATA_T* __restrict__ packed, const Problem p) {
    const int32 channels = (int32)p.group_in, rows = (int32)p.out_channels;
    const int32 taps = (int32)(p.filter[AXIS_D] * p.filter[AXIS_H] * p.filter[AXIS_W]);
    const int32 step = gridDim.x * BLOCK;
    for (int32 i = blockIdx.x * BLOCK + threadIdx.x; i < rows * channels; i += step) {
        int32 k = i;
        const int32 c = split_off(k, p.group_in_divisor);
        const int64 from = p.w_offset + k * p.w_strides[0] + c * p.w_strides[1];
        int32 to = k * taps * channels + c;
        for (int64 t = 0; t < p.filter[AXIS_D]; ++t) {
            for (int64 r = 0; r < p.filter[AXIS_H]; ++r) {
                for (int64 s = 0; s < p.filter[AXIS_W]; ++s, to += channels) {
                    packed[to] = w[from + t * p.w_strides[2] + r * p.w_strides[3] +
                                   s * p.w_strides[4]];
                }
            }
        }
    }
}

// What a device has to do before gpuconv calls it working: run one thread and write one number.
//
//   out[0] = value
//
// Mapping: one block of one thread. Shared memory: none. Macros: none. It includes types.cuh, so
// that an installation without CUDA's headers is found out here too.
//
// Launched by gpuconv/cuda_backend/device.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin probe.cu

#include "types.cuh"

extern "C" __global__ void probe(int32* out, int32 value) { out[0] = value; }

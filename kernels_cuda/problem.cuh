// One convolution as a kernel gets it: by value, so that every field is a constant-bank operand.
//
// gpuconv.cuda_backend.launch.PROBLEM is the same struct in NumPy, and `pack` fills it. Problems of
// one and two axes come with leading axes of extent 1. All strides are in elements, and may be
// negative. w has been flipped already where the problem says so: w_offset is where its tap
// (0, 0, 0) lies, and the strides of its axes run backwards.
//
// A 32-bit kernel reads the low halves: (INDEX_T)p.x_strides[1].
#pragma once

#include "indexing.cuh"
#include "types.cuh"

enum : int { AXIS_D, AXIS_H, AXIS_W };

struct Problem {
    int64 x_strides[5];  // n, c, d, h, w
    int64 w_strides[5];  // k, c, t, r, s
    int64 y_strides[5];  // n, k, z, p, q
    int64 bias_stride;
    int64 w_offset;
    int64 batch;         // N
    int64 in_channels;   // C
    int64 out_channels;  // K
    int64 groups;        // G
    int64 group_in;      // C/G
    int64 group_out;     // K/G
    int64 input[3];      // D, H, W
    int64 filter[3];     // T, R, S
    int64 output[3];     // Z, P, Q
    int64 stride[3];
    int64 dilation[3];
    int64 pad_lo[3];
    Divisor output_divisor[3];
    Divisor filter_divisor[3];
    Divisor out_channels_divisor;
    Divisor group_in_divisor;
    Divisor group_out_divisor;
    int32 boundary;  // BOUNDARY_..., boundary.cuh
    int32 x_dtype, w_dtype, bias_dtype, y_dtype;  // DTYPE_..., read by kernels in `any`
    int32 channels_last;  // whether y's memory runs channels last
};
static_assert(sizeof(Problem) == 496, "launch.PROBLEM mirrors this");

// One filter over each channel of a stack of images on tensor cores: rows times banded matrices.
//
//   y[n, c, p, q] = bias[c] + sum over r, s of x[n, c, p + r - pad, q + s - pad] * w[c, 0, r, s]
//
// with x read beyond its edges as the boundary mode says. Of one filter row r, the sums of 8
// neighbouring outputs (a group) are a row of inputs times a band:
//
//                                      outputs q ... q+7
//                                    w0
//     y[p, q : q+8] +=               w1 w0                        entry (k, j) is w[r, k - j]:
//         x[p+r, q : q + 16*slices]  w2 w1 w0                     Toeplitz, the same everywhere
//                                       w2 w1 w0
//                                          ...
//
// A product (mma, ptx.cuh) takes 16 output rows, a group, and a slice of k: 16 inputs of 16 bits,
// or 8 of float32 (in tf32). A group needs S + 7 inputs, so S of every 16 multiplications count for
// S up to 9, 31 of 48 for S = 31. What it aims at, on an H200 (of whose peak mma.sync reaches 62%):
// the memory's bandwidth up to 9x9, in either type; beyond, the tensor cores' rate.
//
// Mapping: a block computes TILE_H x TILE_W outputs of one channel of an image,
//
//     TILE_H = 16 * WARPS_H       TILE_W = 8 * GROUPS * WARPS_W
//     blockIdx.x = ((n * C + c) * tiles_h + tile_h) * tiles_w + tile_w
//     warp (warp_h, warp_w): 16 rows, GROUPS groups; its lanes have the sums of ptx.cuh's c
//
// The image is a, read with ldmatrix: 16 rows of the tile, one row further for each r; a chunk of
// 16 bytes of a row serves all groups and slices that see it before the next is read. The band is
// b: a lane's elements are neighbouring taps, read from rows of w between zeros. Per product a warp
// reads 2.25 times 128 bytes of x for one slice (8 groups in 9 chunks), 1.1 for three.
//
// Tiles begin at column0, which is a multiple of 16 bytes of x, whatever the pad: so chunks are
// copied as they are (cp.async) where rows are aligned. Outputs begin `lead` before a multiple
// of TILE_W then, and y's own 16 bytes are found again on the way out. All that decides the order
// of a sum is the position of its group and the number of slices: tiles change no bits.
//
// A band's zeros meet inputs that an output does not see: an infinity or a NaN among them makes the
// sum NaN. A sum that is not finite is marked, and computed anew as it is written, in float32.
//
// Shared memory (dynamic; Strips has slices, copy, tile.pitch, tile.w_pitch, tile.columns):
//
//     uint32  taps[R][w_pitch]                rows of w after 8 zeros, and zeros after them
//         16 bits: two copies, the second one element on: any pair of taps is a word of one
//             0 0 0 0 0 0 0 0 w0 w1 w2 ...  |  0 0 0 0 0 0 0 w0 w1 w2 ...
//         float32: as tf32; PRODUCTS 3: and a copy of what that leaves out
//     X_T     tile[TILE_H + R - 1][pitch]     pitch is an odd number of chunks: 8 rows of a chunk,
//                                             an 8x8 matrix of ldmatrix, are in different banks
//         |<--------------- columns ------------------>|  pitch
//         +---------+---------+---  ---+---------+-----+--+
//         | group 0 | group 1 |        | last    | halo|  |  row0 + i
//         +---------+---------+---  ---+---------+-----+--+
//     Y_T     out[TILE_H][OUT_PITCH]          in the tile's place, once it has been multiplied
//
// Macros:
//   X_T       float16, bfloat16 or float32: of x, w, bias and y
//   PRODUCTS  1, or 3 for float32 in three products: a*b = a1*b1 + a1*b2 + a2*b1
//   INDEX_T   int32, or int64 where a row spans 2^31 elements or more (rows and images always may)
//   WARPS_H   1 to 8
//   WARPS_W   1 to 8
//   GROUPS    4 or 8 of a warp; 4 with PRODUCTS 3
//
// Architectures below sm_80 have float16's product only; the others compile to nothing there.
// Launched by gpuconv/cuda_backend/filter2d_mma.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 filter2d_mma.cu

#ifndef X_T
#define X_T float16
#endif
#ifndef PRODUCTS
#define PRODUCTS 1
#endif
#ifndef WARPS_H
#define WARPS_H 4
#endif
#ifndef WARPS_W
#define WARPS_W 2
#endif
#ifndef GROUPS
#define GROUPS 8
#endif

#include "tile.cuh"

static_assert(is_one_of<X_T, float16, bfloat16, float32>, "X_T: float16, bfloat16 or float32");
static_assert(PRODUCTS == 1 || (PRODUCTS == 3 && Same<X_T, float32>::value),
              "PRODUCTS: 1, or 3 for float32");
static_assert(WARPS_H >= 1 && WARPS_H <= 8, "WARPS_H: 1 to 8");
static_assert(WARPS_W >= 1 && WARPS_W <= 8, "WARPS_W: 1 to 8");
static_assert(GROUPS == 4 || (GROUPS == 8 && PRODUCTS == 1), "GROUPS: 4, or 8 with PRODUCTS = 1");

constexpr int THREADS = 32 * WARPS_H * WARPS_W;
constexpr int WARP_W = 8 * GROUPS;
constexpr int TILE_H = 16 * WARPS_H;
constexpr int TILE_W = WARP_W * WARPS_W;
constexpr int CHUNK = 16 / (int)sizeof(X_T);  // elements of 16 bytes
constexpr int SLICE_BYTES = 32;               // of a row of x: 16 or 8 elements
constexpr int MOST_SLICES = 5;                // that are multiplied at a time
constexpr int MARGIN = 8;                     // zeros before the taps of a row
constexpr int COPY_W = 16;                    // threads that copy a row of the tile
constexpr int OUT_PITCH = TILE_W + 8;  // an odd number of chunks; 8 words from a whole row of banks
constexpr int BLOCKS = (sizeof(X_T) == 4 ? 512 : 768) / THREADS;

static_assert(THREADS % COPY_W == 0 && TILE_W % 32 == 0, "the tile is copied and stored in rows");

// How the image is cut, as gpuconv/cuda_backend/filter2d_mma.py decided it.
struct Strips {
    Tiling tile;
    int32 lead;    // outputs from the first tile's first column to the image's
    int32 slices;  // of k, for a row of the filter,
    int32 step;    // and how many of them are multiplied at a time
    int32 copy;    // words of shared memory from a row of taps to its second copy
};
static_assert(sizeof(Strips) == 80, "filter2d_mma.STRIPS mirrors this");

#if PTX_HAS_SM80
constexpr bool HAS_PRODUCT = true;
#else
constexpr bool HAS_PRODUCT = Same<X_T, float16>::value;
#endif

// ---- the products ----------------------------------------------------------------------------

__device__ __forceinline__ void multiply(float32 (&sum)[4], const uint32 (&a)[4], uint32 b0,
                                         uint32 b1) {
    const uint32 b[2] = {b0, b1};
    if constexpr (Same<X_T, float16>::value) {
        mma_m16n8k16_f16_f32(sum, a, b);
#if PTX_HAS_SM80
    } else if constexpr (Same<X_T, bfloat16>::value) {
        mma_m16n8k16_bf16_f32(sum, a, b);
    } else {
        mma_m16n8k8_tf32_f32(sum, a, b);
#endif
    }
}

// The tf32 of a float32, and of what that leaves out. The latter is rounded by an addition: mma
// takes no notice of the bits below tf32's last. That may lose a NaN, which the former has kept.
__device__ __forceinline__ void split(float32 value, uint32& high, uint32& low) {
#if PTX_HAS_SM80
    high = cvt_rna_tf32(value);
    low = __float_as_uint(value - __uint_as_float(high)) + (1u << 12);
#endif
}

// sum[j] += the rows of x at `row`, from chunk j * (8 / CHUNK) on, times the band of SLICES slices.
// row: the lane's own for ldmatrix; taps: its first word.
template <int SLICES>
__device__ __forceinline__ void multiply_row(float32 (&sum)[GROUPS][4], const unsigned char* row,
                                             const uint32* taps, int copy) {
    uint32 b[2 * SLICES];
#pragma unroll
    for (int e = 0; e < 2 * SLICES; ++e) b[e] = taps[4 * e];
    if constexpr (sizeof(X_T) == 2) {
        // A group is a chunk, a slice two of them: group j meets chunks j + 2i and j + 2i + 1.
        constexpr int CHUNKS = GROUPS + 2 * SLICES - 1;
        uint32 a[CHUNKS][2];
#pragma unroll
        for (int c = 0; c + 1 < CHUNKS; c += 2) {
            uint32 pair[4];
            ldmatrix_x4(pair, row + 16 * c);
            a[c][0] = pair[0], a[c][1] = pair[1];
            a[c + 1][0] = pair[2], a[c + 1][1] = pair[3];
        }
        ldmatrix_x2(a[CHUNKS - 1], row + 16 * (CHUNKS - 1));
#pragma unroll
        for (int c = 0; c + 1 < CHUNKS; ++c) {
            const uint32 inputs[4] = {a[c][0], a[c][1], a[c + 1][0], a[c + 1][1]};
#pragma unroll
            for (int i = 0; i < SLICES; ++i) {
                const int j = c - 2 * i;
                if (j >= 0 && j < GROUPS) multiply(sum[j], inputs, b[2 * i], b[2 * i + 1]);
            }
        }
    } else {
        // A group is two chunks, and so is a slice: group j meets the pair j + i.
        uint32 b_rest[2 * SLICES];
        if constexpr (PRODUCTS == 3) {
#pragma unroll
            for (int e = 0; e < 2 * SLICES; ++e) b_rest[e] = taps[copy + 4 * e];
        }
#pragma unroll
        for (int c = 0; c < GROUPS + SLICES - 1; ++c) {
            uint32 inputs[4], rest[4];
            ldmatrix_x4(inputs, row + 32 * c);
            if constexpr (PRODUCTS == 3) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    split(__uint_as_float(inputs[e]), inputs[e], rest[e]);
                }
            }
#pragma unroll
            for (int i = 0; i < SLICES; ++i) {
                const int j = c - i;
                if (j < 0 || j >= GROUPS) continue;
                if constexpr (PRODUCTS == 3) {
                    multiply(sum[j], rest, b[2 * i], b[2 * i + 1]);
                    multiply(sum[j], inputs, b_rest[2 * i], b_rest[2 * i + 1]);
                }
                multiply(sum[j], inputs, b[2 * i], b[2 * i + 1]);
            }
        }
    }
}

// The same for `count` slices, up to SLICES, and all rows of the filter.
template <int SLICES>
__device__ __forceinline__ void multiply_rows(float32 (&sum)[GROUPS][4], const unsigned char* row,
                                              const uint32* taps, int count, int filter_h,
                                              int pitch, int w_pitch, int copy) {
    if (count == SLICES) {
#pragma unroll 1
        for (int r = 0; r < filter_h; ++r) {
            multiply_row<SLICES>(sum, row, taps, copy);
            row += pitch;
            taps += w_pitch;
        }
    } else if constexpr (SLICES > 1) {
        multiply_rows<SLICES - 1>(sum, row, taps, count, filter_h, pitch, w_pitch, copy);
    }
}

// ---- to and from shared memory ---------------------------------------------------------------

// taps[r][MARGIN + s] = w[r, s], between zeros; w: of the block's channel, its tap (0, 0).
__device__ __forceinline__ void copy_taps(uint32* taps, const X_T* __restrict__ w,
                                          const Problem& p, const Strips& t) {
    typedef INDEX_T Index;
    const int filter_h = (int)p.filter[AXIS_H], filter_w = (int)p.filter[AXIS_W];
    const int length = MARGIN + t.slices * (SLICE_BYTES / (int)sizeof(X_T));
    for (int i = threadIdx.x % 32; i < length; i += 32) {
        const int s = i - MARGIN;
#pragma unroll 4
        for (int r = threadIdx.x / 32; r < filter_h; r += THREADS / 32) {
            uint32* const words = taps + r * t.tile.w_pitch;
            X_T tap = convert<X_T>(0.0f);
            if (s >= 0 && s < filter_w) {
                tap = w[r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4]];
            }
            if constexpr (sizeof(X_T) == 2) {
                reinterpret_cast<X_T*>(words)[i] = tap;
                if (i > 0) reinterpret_cast<X_T*>(words + t.copy)[i - 1] = tap;
            } else {
                uint32 high = 0, low = 0;
                split(convert<float32>(tap), high, low);
                words[i] = high;
                if (PRODUCTS == 3) words[t.copy + i] = low;
            }
        }
    }
}

// The tile's elements, rounded to tf32: mma would cut them off.
__device__ __forceinline__ void round_tile(X_T* tile, int rows, const Tiling& t) {
    if constexpr (sizeof(X_T) == 4) {
        for (int i = threadIdx.x / COPY_W; i < rows; i += THREADS / COPY_W) {
            for (int j = threadIdx.x % COPY_W * CHUNK; j < t.columns; j += COPY_W * CHUNK) {
                X_T values[CHUNK];
                load_vector(values, tile + i * t.pitch + j);
#pragma unroll
                for (int e = 0; e < CHUNK; ++e) {
                    uint32 high = 0, low = 0;
                    split(convert<float32>(values[e]), high, low);
                    values[e] = convert<X_T>(__uint_as_float(high));
                }
                store_vector(tile + i * t.pitch + j, values);
            }
        }
    }
}

// The sum of one output as it is written, from x and w.
template <class Index>
__device__ __forceinline__ float32 direct_sum(const X_T* __restrict__ x,
                                              const X_T* __restrict__ w, int64 plane, Index row0,
                                              Index column0, const Problem& p) {
    float32 sum = 0;
#pragma unroll 1
    for (int r = 0; r < (int)p.filter[AXIS_H]; ++r) {
        const Index h = source_index(row0 + r, (Index)p.input[AXIS_H], p.boundary);
        const int64 row = plane + h * p.x_strides[3];
#pragma unroll 1
        for (int s = 0; s < (int)p.filter[AXIS_W]; ++s) {
            const Index column = source_index(column0 + s, (Index)p.input[AXIS_W], p.boundary);
            const X_T value = h < 0 || column < 0 ? convert<X_T>(0.0f)
                                                  : (x + row)[column * (Index)p.x_strides[4]];
            const X_T tap = w[r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4]];
            sum = multiply_add(sum, convert<float32>(value), convert<float32>(tap));
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
filter2d_mma(const X_T* __restrict__ x, const X_T* __restrict__ w, const X_T* __restrict__ bias,
             X_T* __restrict__ y, const Problem p, const Strips t) {
    if constexpr (!HAS_PRODUCT) return;
    typedef INDEX_T Index;
    extern __shared__ __align__(16) unsigned char shared[];
    const int filter_h = (int)p.filter[AXIS_H];
    uint32* const taps = reinterpret_cast<uint32*>(shared);
    X_T* const tile = reinterpret_cast<X_T*>(taps + filter_h * t.tile.w_pitch);

    Index rest = (Index)blockIdx.x;
    const Index out_w0 = split_off(rest, t.tile.tiles_w) * TILE_W - t.lead;
    const Index out_h0 = split_off(rest, t.tile.tiles_h) * TILE_H;
    const int64 channel = split_off(rest, p.out_channels_divisor), n = rest;
    const int64 plane = n * p.x_strides[0] + channel * p.x_strides[1];
    const X_T* const filter = w + p.w_offset + channel * p.w_strides[0];
    const Index row0 = out_h0 - (Index)p.pad_lo[AXIS_H];
    const Index column0 = out_w0 - (Index)p.pad_lo[AXIS_W];
    const int rows = TILE_H + filter_h - 1;

    copy_tile<COPY_W, THREADS / COPY_W>(tile, x, plane, row0, column0, rows, p, t.tile,
                                        threadIdx.x % COPY_W, threadIdx.x / COPY_W);
    cp_async_commit();
    copy_taps(taps, filter, p, t);
    cp_async_wait<0>();
    __syncthreads();  // the tile and the taps are there
    if (sizeof(X_T) == 4 && PRODUCTS == 1) {
        round_tile(tile, rows, t.tile);
        __syncthreads();  // ... in tf32
    }

    const int lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
    const int warp_h = threadIdx.x / 32 / WARPS_W, warp_w = threadIdx.x / 32 % WARPS_W;
    float32 sum[GROUPS][4];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = 0;
    }
    {
        // For ldmatrix lane 16 c + i has row i of chunk c. For b, entry (k, group) of the band, tap
        // k - group: of float32 k is `place`, of 16 bits 2 * place and the next, which begin at an
        // odd element in every other group, and are a word of the second copy then.
        const int pitch = t.tile.pitch * (int)sizeof(X_T);
        const unsigned char* row =
            reinterpret_cast<const unsigned char*>(tile + warp_w * WARP_W) +
            (warp_h * 16 + lane % 16) * pitch + lane / 16 * 16;
        const uint32* words = taps + (sizeof(X_T) == 4
                                          ? MARGIN + place - group
                                          : MARGIN / 2 + place - (group + 1) / 2 +
                                                (group % 2 ? t.copy : 0));
#pragma unroll 1
        for (int first = 0; first < t.slices; first += t.step) {
            multiply_rows<MOST_SLICES>(sum, row, words, min(t.step, t.slices - first), filter_h,
                                       pitch, t.tile.w_pitch, t.copy);
            row += t.step * SLICE_BYTES;
            words += t.step * SLICE_BYTES / 4;
        }
    }

    bool finite = true;
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) finite &= isfinite(sum[j][e]);
    }
    const bool anew = __syncthreads_or(!finite);  // every warp is done with the tile

    // out[i][shift + j] is y[out_h0 + i, out_w0 + j]: chunks of out are chunks of y.
    X_T* const out = tile;
    const int shift = (CHUNK - t.lead) % CHUNK;
    const Bias<float32> added(bias == nullptr ? bias : bias + channel * p.bias_stride, p);
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            // Half of the lanes swap two neighbours, so that no two float32 meet in a bank.
            const bool other = sizeof(X_T) == 4 && group >= 4;
            const float32 value = other ? sum[j][e ^ 1] : sum[j][e];
            const int column = warp_w * WARP_W + 8 * j + 2 * place + (e % 2 ^ (other ? 1 : 0));
            const int line = warp_h * 16 + group + e / 2 * 8;
            // A mark where it is not finite: infinity - infinity is NaN.
            out[line * OUT_PITCH + shift + column] =
                convert<X_T>(isfinite(value) ? added.add_to(value) : value - value);
        }
    }
    __syncthreads();  // all of the tile is in out

    const Index height = (Index)p.output[AXIS_H], width = (Index)p.output[AXIS_W];
    if (anew) {
        for (int i = threadIdx.x; i < TILE_H * TILE_W; i += THREADS) {
            const int line = i / TILE_W, column = i % TILE_W;
            const Index out_h = out_h0 + line, out_w = out_w0 + column;
            X_T& value = out[line * OUT_PITCH + shift + column];
            if (isnan(convert<float32>(value)) && out_h < height && out_w >= 0 && out_w < width) {
                value = convert<X_T>(added.add_to(
                    direct_sum(x, filter, plane, row0 + line, (Index)(column0 + column), p)));
            }
        }
        __syncthreads();  // the marks have become sums
    }

    const Index begin = max(out_w0, (Index)0), end = min(out_w0 + TILE_W, width);
    const int64 first =
        n * p.y_strides[0] + channel * p.y_strides[1] + out_h0 * p.y_strides[3];
    if (t.tile.flags & TILE_STORE_VECTORS) {
        constexpr int CHUNKS = OUT_PITCH / CHUNK;
        for (int i = threadIdx.x; i < TILE_H * CHUNKS; i += THREADS) {
            const int line = i / CHUNKS, column = i % CHUNKS * CHUNK;
            const Index out_w = out_w0 - shift + column;
            if (out_h0 + line < height && out_w >= begin && out_w + CHUNK <= end) {
                *reinterpret_cast<uint4*>(y + first + line * p.y_strides[3] + out_w) =
                    *reinterpret_cast<const uint4*>(out + line * OUT_PITCH + column);
            }
        }
        // What is left of each row: less than a chunk before the first, and after the last.
        const Index left = min((begin + CHUNK - 1) / CHUNK * CHUNK, end);
        const Index right = max(end / CHUNK * CHUNK, left);
        for (int i = threadIdx.x; i < TILE_H * 2 * CHUNK; i += THREADS) {
            const int line = i / (2 * CHUNK), e = i % (2 * CHUNK);
            const Index out_w = e < CHUNK ? begin + e : right + e - CHUNK;
            if (out_h0 + line < height && out_w < (e < CHUNK ? left : end)) {
                y[first + line * p.y_strides[3] + out_w] =
                    out[line * OUT_PITCH + shift + (int)(out_w - out_w0)];
            }
        }
    } else {
        for (int i = threadIdx.x; i < TILE_H * TILE_W; i += THREADS) {
            const int line = i / TILE_W;
            const Index out_w = out_w0 + i % TILE_W;
            if (out_h0 + line < height && out_w >= begin && out_w < end) {
                y[first + line * p.y_strides[3] + out_w * (Index)p.y_strides[4]] =
                    out[line * OUT_PITCH + shift + i % TILE_W];
            }
        }
    }
}

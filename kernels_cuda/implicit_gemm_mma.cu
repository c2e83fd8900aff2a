// Convolution as a matrix product on tensor cores; the patches of x are never written to memory.
//
//   y[m, n] = bias[m] + sum over k of  w[m, k] * x[k, n]
//       m  output channel of the group          0 ... K/G - 1
//       n  output pixel of the batch            ((image*Z + z)*P + p)*Q + q
//       k  input channel and tap                0 ... C/G*T*R*S - 1
//       x[k, n] = x[image, c, z*stride + t*dilation - pad, p*..., q*...], beyond the edges as the
//                 boundary mode says
//
// What is loaded is chunks: 16 bytes of one row of a tile, CHUNK neighbouring k of one pixel or one
// output channel. How x's are, and with it the order of k and of every sum, is LOAD:
//   0 vectors  NHWC: 16 bytes of x, CHUNK channels of one tap, copied asynchronously
//   1 gather   NCHW: the same CHUNK channels, loaded one by one; the lanes of a warp load
//              neighbouring pixels. There is no asynchronous copy of 2-byte elements, nor of pixels
//              that a tap has moved off their 16 bytes: they go through registers, under way while
//              a slice is multiplied, and turn there into rows of k, as ldmatrix takes any type
//   2 packed   any channels, few as they may be: each k of a chunk has a tap of its own
//   3 pixels   NCHW, a 1x1 filter that moves nothing, 16-bit elements: 16 bytes of x, neighbouring
//              pixels of one channel, copied asynchronously, or twice 8 bytes where planes do not
//              begin at multiples of 16; ldmatrix turns them
//   4 halo     NCHW, filters of several taps, TILE_K channels of a tap in each slice: all that the
//              taps of a tile's pixels read of TILE_K channels is loaded once, one element by one,
//              and turns into rows of k on its way, as in `gather`. A slice reads other rows of it
//   Where taps lie is worked out once per slice, by a thread each, into `taps`.
//   vectors, gather, halo: k = (((c/B*T + t)*R + r)*S + s)*B + c%B    B = tiling.block channels
//   packed:                k = ((c*T + t)*R + r)*S + s                      of a tap
//   pixels:                k = c, as the last two have it there
// Other strides than those expected are read too, only slower; but by `pixels`.
//
// Mapping: a tile is TILE_M x TILE_N sums of one group, over one share ("split") of k. Block b
// computes the tiles b, b + gridDim.x, ...; tile number
//   (((split*G + group)*bands + band)*pixel_tiles + pixel tile)*B + channel tile of the band
//       B = tiling.band channel tiles: all of them where the L2 cache keeps w, else as many as make
//           what runs at a time nearly a square of outputs
// so that blocks which run together read the same pixels. Splits write their sums to `partial`,
// which split_sum.cu adds up in order. A block may also compute all parts of its sums itself
// (tiling.split_slices > tiling.part_slices): it adds them up in the same order, to the same bits,
// with the total of the parts so far in shared memory.
//
// A warp computes WARP_M x WARP_N of the tile, in products of 16 rows x 8 columns (ptx.cuh):
//   CHANNELS_LAST 0   rows are output channels, columns are pixels
//   CHANNELS_LAST 1   rows are pixels, columns are output channels
// so that a lane's neighbouring sums, two columns, are neighbours in y, and whole rows of columns
// are written in 16 bytes at the end, by way of shared memory.
//
//   float16, bfloat16   m16n8k16, sums in float32
//   float32             m16n8k8 in tf32: elements are rounded to 11 bits when they leave shared
//                       memory. PRODUCTS 3 splits each into two tf32: a*b = a1*b1 + a1*b2 + a2*b1;
//                       an infinity makes NaN of the sum then
//   float64             m8n8k4
//
// Shared memory, in a ring of STAGES; slice i + STAGES - 1 is on its way while slice i is
// multiplied, with one barrier per slice, and another at the end of a tile. The ring goes on from a
// tile to the block's next: that one's first slices are on their way while the sums of the one
// before are stored.
//
//   stage 0          | stage 1          | ... |
//   x tile | w tile  | x tile | w tile  |          x: TILE_N rows, w: TILE_M rows of 64 bytes
//   total [sums of a thread][threads]              behind the stages, where a block adds up parts
//   taps, w_taps [2][TAPS]                         of the slice being loaded, and of the next
//
//   Chunks are permuted within their row, so that the 8 rows of an 8x8 matrix (ldmatrix) lie in
//   different banks, and so do the chunks that 8 neighbouring lanes write:
//   chunk c of row r lies at c ^ (r/2 % 4).
//       bank    0   4   8  12  16  20  24  28
//       row 0   0   1   2   3 | 0   1   2   3   row 1
//       row 2   1   0   3   2 | 1   0   3   2   row 3
//       row 4   2   3   0   1 | 2   3   0   1   row 5
//       row 6   3   2   1   0 | 3   2   1   0   row 7
//   A lane of float64 takes 16 bytes, k = 2t and 2t + 1, for two products: any order of k will do
//   as long as rows and columns have the same.
//
//   The x tile of `pixels` is TILE_K rows of TILE_N pixels, chunk c of row k at c ^ (k % 8).
//
//   `halo` has no x tile in its stages, but two buffers behind them: the taps of one channel block
//   are multiplied from one, while each thread loads its share of the next block, or of the next
//   tile's first, into the other, some chunks of it during each slice.
//
//   stage 0 | stage 1 | ... | buffer 0 | buffer 1 | places | shifts | total
//
//   What lies where in a buffer: implicit_gemm_halo.cuh. `places` are each thread's own, of the
//   pixels that it loads; `shifts` is how the pixels of each tap lie to those of the first.
//
//   At the end of a tile each warp has a piece of the stage that was multiplied last, which none
//   is loaded into yet: 8 rows of y, whose chunks are permuted so that neither the writes of a
//   fragment nor the reads of a row meet in a bank.
//
// Macros:
//   X_T, W_T, B_T, Y_T  float16, bfloat16, float32 or float64, all the same
//   ACC_T               float32; float64 for float64
//   PRODUCTS            1, or 3 for float32 in three products
//   INDEX_T             int32, or int64 where an array spans 2^31 elements or more
//   LOAD                0, 1, 2, 3 or 4, see above
//   CHANNELS_LAST       0 or 1, see above
//   TILE_M, TILE_N      multiples of WARP_M and WARP_N; whole loads of the block; of 64 for
//                       TILE_N of `pixels`
//   WARP_M, WARP_N      multiples of 16; of 32 for the columns
//   STAGES              2 to 5
//
// Architectures below sm_80 have float16's product only; the others compile to nothing there.
// Launched by gpuconv/cuda_backend/implicit_gemm_mma.py.
//   nvcc -std=c++17 -arch=sm_80 -cubin -DX_T=float16 -DCHANNELS_LAST=1 implicit_gemm_mma.cu

#ifndef X_T
#define X_T float16
#endif
#ifndef W_T
#define W_T X_T
#endif
#ifndef B_T
#define B_T X_T
#endif
#ifndef Y_T
#define Y_T X_T
#endif
#ifndef ACC_T
#define ACC_T float32
#endif
#ifndef PRODUCTS
#define PRODUCTS 1
#endif
#ifndef LOAD
#define LOAD 0
#endif
#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif
#ifndef TILE_M
#define TILE_M 128
#endif
#ifndef TILE_N
#define TILE_N 128
#endif
#ifndef WARP_M
#define WARP_M 64
#endif
#ifndef WARP_N
#define WARP_N 32
#endif
#ifndef STAGES
#define STAGES 4
#endif

#include "boundary.cuh"
#include "implicit_gemm.cuh"
#include "implicit_gemm_halo.cuh"
#include "indexing.cuh"
#include "problem.cuh"
#include "ptx.cuh"
#include "types.cuh"

static_assert(is_floating<X_T>, "X_T: float16, bfloat16, float32 or float64");
static_assert(Same<X_T, W_T>::value && Same<X_T, B_T>::value && Same<X_T, Y_T>::value,
              "W_T, B_T, Y_T: as X_T");
static_assert(Same<ACC_T, float64>::value ? Same<X_T, float64>::value
                                          : Same<ACC_T, float32>::value && sizeof(X_T) <= 4,
              "ACC_T: float64 for float64, else float32");
static_assert(PRODUCTS == 1 || (PRODUCTS == 3 && Same<X_T, float32>::value),
              "PRODUCTS: 1, or 3 for float32");
static_assert(LOAD >= 0 && LOAD <= 4,
              "LOAD: 0 (vectors), 1 (gather), 2 (packed), 3 (pixels) or 4 (halo)");
static_assert(CHANNELS_LAST == 0 || CHANNELS_LAST == 1, "CHANNELS_LAST: 0 or 1");
static_assert(LOAD != 3 || (sizeof(X_T) == 2 && !CHANNELS_LAST),
              "LOAD: 3 (pixels) for 16-bit elements in planes");
static_assert(LOAD != 4 || (sizeof(X_T) <= 4 && sizeof(INDEX_T) == 4 && !CHANNELS_LAST),
              "LOAD: 4 (halo) for elements of 2 or 4 bytes in planes, INDEX_T int32");
static_assert(STAGES >= 2 && STAGES <= 5, "STAGES: 2 to 5");

constexpr bool VECTORS = LOAD == 0, PACKED = LOAD == 2, PIXELS = LOAD == 3, HALO = LOAD == 4;
constexpr bool STAGED = LOAD == 1 || PACKED;  // x goes through registers
constexpr int CHUNK = 16 / sizeof(X_T);
constexpr int CHUNKS = HALO_CHUNKS;  // of a row of a tile
constexpr int TILE_K = CHUNK * CHUNKS;
constexpr int STEP_CHUNKS = sizeof(X_T) == 8 ? 4 : 2;  // of a row, that a product takes at once
constexpr int STEPS = CHUNKS / STEP_CHUNKS;

constexpr int WARPS_M = TILE_M / WARP_M, WARPS_N = TILE_N / WARP_N;
constexpr int BLOCK = 32 * WARPS_M * WARPS_N;
constexpr int ROWS = CHANNELS_LAST ? WARP_N : WARP_M;  // of a warp
constexpr int COLUMNS = CHANNELS_LAST ? WARP_M : WARP_N;
constexpr int ROW_BLOCKS = ROWS / 16, COLUMN_PAIRS = COLUMNS / 16;
constexpr int SUMS = ROWS * COLUMNS / 32;  // of a thread

constexpr int LOAD_ROWS = BLOCK / CHUNKS;  // rows of chunks that the block copies at once
constexpr int W_LOADS = TILE_M / LOAD_ROWS;
constexpr int X_LOADS = HALO ? 3 : TILE_N * CHUNKS / BLOCK;  // halo: during a slice, at most
constexpr int TAPS = PACKED ? TILE_K : CHUNKS;  // of a slice
constexpr int X_PIXELS = VECTORS ? X_LOADS : PIXELS ? 2 : 1;  // of a thread
constexpr int X_TILE = HALO ? 0 : TILE_N * CHUNKS;  // chunks, as these are:
constexpr int STORE_ROOM = BLOCK / 32 * 8 * COLUMNS * (int)sizeof(ACC_T) / 16;  // at the end
constexpr int LOAD_ROOM = X_TILE + TILE_M * CHUNKS;
constexpr int STAGE = HALO && STORE_ROOM > LOAD_ROOM ? STORE_ROOM : LOAD_ROOM;
constexpr int PIXEL_CHUNKS = TILE_N / CHUNK;  // pixels: of a row
constexpr int PIXEL_ROWS = BLOCK / PIXEL_CHUNKS;  // that the block copies at once

static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && COLUMNS % 32 == 0 && COLUMNS <= 64,
              "WARP_M, WARP_N: whole products, and columns for whole warps at the end");
static_assert(TILE_M % WARP_M == 0 && TILE_N % WARP_N == 0 && BLOCK <= 1024,
              "TILE_M, TILE_N: whole warps");
static_assert(TILE_M % LOAD_ROWS == 0 && (HALO || TILE_N % LOAD_ROWS == 0),
              "TILE_M, TILE_N: the copies divide evenly among the threads");
static_assert(!STAGED || (BLOCK % TILE_N == 0 && CHUNKS % (BLOCK / TILE_N) == 0),
              "TILE_N: a thread of `gather` and `packed` has one pixel");
static_assert(!PIXELS || (BLOCK % PIXEL_CHUNKS == 0 && TILE_K % PIXEL_ROWS == 0),
              "TILE_N: a thread of `pixels` has the same ones in every row");
static_assert(!PIXELS || PIXEL_CHUNKS % 8 == 0, "TILE_N: whole eights of chunks, for `pixels`");
static_assert(BLOCK >= TAPS, "TILE_M, TILE_N: a thread for each tap");
static_assert(STORE_ROOM <= STAGE,
              "TILE_M, TILE_N: room in a stage for the rows of all warps at the end");

// Blocks of a multiprocessor that the registers are shared among, as few as the sums need (and the
// fragments of three products): fragments of two steps and addresses come on top of them.
constexpr int SUM_WORDS = SUMS * (int)sizeof(ACC_T) / 4 * (PRODUCTS == 3 ? 2 : 1);
constexpr int WIDE = sizeof(INDEX_T) == 8;
// Before sm_80 shared memory has room for one block only; on sm_86 and sm_89 for two of `packed`.
constexpr bool ROOMY = PACKED && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890);
constexpr int REGISTERS = !PTX_HAS_SM80 || SUM_WORDS >= (WIDE ? 64 : 128) ? 255
                          : SUM_WORDS >= 64 || WIDE || ROOMY              ? 168
                                                                          : 128;
constexpr int MIN_BLOCKS = 65536 / REGISTERS / BLOCK > 1 ? 65536 / REGISTERS / BLOCK : 1;

// What the launch decides beside the problem. implicit_gemm_mma.TILING is the same in NumPy.
struct Tiling {
    Divisor band;          // channel tiles that follow each other
    Divisor pixel_tiles;
    Divisor bands;         // of all channel tiles of a group
    Divisor groups;
    Divisor block;         // vectors, gather, halo: channels of one tap that follow each other in k
    int64 split_stride;    // elements of `partial` from one split's sums to the next's
    int32 tiles;           // of all
    int32 depth;           // k's
    int32 slices;          // of TILE_K that cover them
    int32 part_slices;     // of them in one part of a sum
    int32 split_slices;    // in one split: a part, or all of them
    int32 w_vector;        // whether 16 bytes of w along k can be copied at once
    int32 x_vector;        // vectors: whether 16 bytes of x along c can be; pixels: whether 16
                           // bytes along w can be, else 8
    int32 y_vector;        // whether 16 bytes of y along the columns can be written
    int32 partial_vector;  // the same of `partial`
    Halo halo;             // halo: how a buffer is laid out
};
static_assert(sizeof(Tiling) == 264, "implicit_gemm_mma.TILING mirrors this");

// Where a tile begins.
struct Origin {
    INDEX_T pixel;
    int channel, group, split;
};
// Where the channels of a chunk lie from tap (0, 0, 0) of channel 0 on, and the tap's position.
struct __align__(16) Tap {
    INDEX_T offset, d, h, w;
};
struct __align__(16) Loaded {
    X_T element[CHUNK];
};
template <class T>
struct __align__(16) Stored {
    T element[16 / sizeof(T)];
};
template <class T>
struct __align__(2 * sizeof(T)) Pair {
    T element[2];
};

// Where a chunk of a tile lies, in chunks.
__device__ __forceinline__ constexpr int place(int row, int chunk) {
    return row * CHUNKS + (chunk ^ (row / 2 % 4));
}

// ---- products --------------------------------------------------------------------------------

#if PTX_HAS_SM80
constexpr bool SERVED = true;
#else
constexpr bool SERVED = Same<X_T, float16>::value;
#endif

// A lane's share of 16 rows, or of 16 columns, by one step of k.
template <class T>
struct Fragment {
    uint32 word[4];
};
template <>
struct Fragment<float32> {
    uint32 word[4], rest[4];  // as tf32, and what that leaves out (PRODUCTS 3)
};
template <>
struct Fragment<float64> {
    float64 element[2][2];  // [row or column g, g + 8][k]
};

// Each lane passes one row of the four matrices; elements of tf32 are rounded.
template <class T>
__device__ __forceinline__ void load_matrices(Fragment<T>& f, const int4* row) {
    if constexpr (sizeof(T) <= 4) ldmatrix_x4(f.word, row);
#if PTX_HAS_SM80
    if constexpr (Same<T, float32>::value) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float32 value = __uint_as_float(f.word[i]);
            f.word[i] = cvt_rna_tf32(value);
            if (PRODUCTS == 3) f.rest[i] = cvt_rna_tf32(value - __uint_as_float(f.word[i]));
        }
    }
#endif
}

// `rows` is the first of 16 rows of a tile. The left operand takes its four 8x8 matrices down its
// rows first, the two right operands each along k first.
template <bool LEFT, class T>
__device__ __forceinline__ void load_fragment(Fragment<T>& f, const int4* rows, int step,
                                              int lane) {
    if constexpr (Same<T, float64>::value) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 8 * half + lane / 4;
            const double2 pair = *reinterpret_cast<const double2*>(
                rows + place(row, STEP_CHUNKS * step + lane % 4));
            f.element[half][0] = pair.x;
            f.element[half][1] = pair.y;
        }
    } else {
        const int row = LEFT ? lane % 16 : lane / 16 * 8 + lane % 8;
        const int chunk = LEFT ? lane / 16 : lane / 8 % 2;
        load_matrices(f, rows + place(row, STEP_CHUNKS * step + chunk));
    }
}

// Of 16 columns, the chunks `first` and the next, where rows of the tile are k's.
template <class T>
__device__ __forceinline__ void load_pixels(Fragment<T>& f, const int4* tile, int first, int step,
                                            int lane) {
    if constexpr (sizeof(T) == 2) {
        const int k = 16 * step + lane % 16;
        ldmatrix_x4_trans(f.word, tile + k * PIXEL_CHUNKS + ((first + lane / 16) ^ (k % 8)));
    }
}

// sum += a * (the first or second 8 columns of b)
template <class T, class Acc>
__device__ __forceinline__ void multiply(Acc (&sum)[4], const Fragment<T>& a,
                                         const Fragment<T>& b, int half) {
    if constexpr (Same<T, float16>::value) {
        const uint32 columns[2] = {b.word[2 * half], b.word[2 * half + 1]};
        mma_m16n8k16_f16_f32(sum, a.word, columns);
    }
#if PTX_HAS_SM80
    if constexpr (Same<T, bfloat16>::value) {
        const uint32 columns[2] = {b.word[2 * half], b.word[2 * half + 1]};
        mma_m16n8k16_bf16_f32(sum, a.word, columns);
    } else if constexpr (Same<T, float32>::value) {
        const uint32 columns[2] = {b.word[2 * half], b.word[2 * half + 1]};
        if (PRODUCTS == 3) {  // the small ones first
            const uint32 rest[2] = {b.rest[2 * half], b.rest[2 * half + 1]};
            mma_m16n8k8_tf32_f32(sum, a.rest, columns);
            mma_m16n8k8_tf32_f32(sum, a.word, rest);
        }
        mma_m16n8k8_tf32_f32(sum, a.word, columns);
    } else if constexpr (Same<T, float64>::value) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            Acc two[2] = {sum[2 * row], sum[2 * row + 1]};
            mma_m8n8k4_f64(two, a.element[row][0], b.element[half][0]);
            mma_m8n8k4_f64(two, a.element[row][1], b.element[half][1]);
            sum[2 * row] = two[0];
            sum[2 * row + 1] = two[1];
        }
    }
#endif
}

// ---- the end of a tile -----------------------------------------------------------------------

typedef ACC_T Sums[ROW_BLOCKS][2 * COLUMN_PAIRS][4];  // of a thread

// Where a warp's sums belong: its first pixel and channel, and how many there are at all.
struct Target {
    INDEX_T pixel, pixels;
    int channel, channels;  // of the group
    int first;              // channel of the group
};

// y = sum, rounded once. 8 rows at a time go by way of `tile`, which is the warp's own.
template <class Out, class Index>
__device__ __forceinline__ void store_sums(Out* __restrict__ y, const Sums& sum, Out* tile,
                                           const Target& to, bool vector, int lane,
                                           const Problem& p) {
    constexpr int VECTOR = 16 / sizeof(Out), LANES = COLUMNS / VECTOR;  // that a row takes
    const auto in_tile = [](int row, int column) {
        constexpr int OF_EIGHT = 8 / VECTOR;  // chunks that eight columns of a fragment take
        const int turn = LANES < 8 ? row / 2 % 4 : OF_EIGHT * (row % VECTOR);
        return (row * LANES + (column / VECTOR ^ turn)) * VECTOR + column % VECTOR;
    };
    const Index stride_k = (Index)p.y_strides[1];
    y += to.first * stride_k;
    const auto exists = [&](int row, int column) {
        return CHANNELS_LAST ? (to.pixel + row < to.pixels) & (to.channel + column < to.channels)
                             : (to.pixel + column < to.pixels) & (to.channel + row < to.channels);
    };
    // Rows and columns add up to an offset: one is worked out once, the other on the way.
    const auto row_offset = [&](int row) {
        return CHANNELS_LAST ? y_offset((Index)(to.pixel + row), p)
                             : (to.channel + row) * stride_k;
    };
    const auto column_offset = [&](int column) {
        return CHANNELS_LAST ? (to.channel + column) * stride_k
                             : y_offset((Index)(to.pixel + column), p);
    };
    const int column = vector ? lane % LANES * VECTOR : lane;
    Index at_column[COLUMNS / 32];
#pragma unroll
    for (int j = 0; j < COLUMNS / 32; ++j) at_column[j] = column_offset(column + 32 * j);
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            __syncwarp();  // the rows before these have been read
#pragma unroll
            for (int j = 0; j < 2 * COLUMN_PAIRS; ++j) {
                Pair<Out> pair;
                pair.element[0] = convert<Out>(sum[i][j][2 * half]);
                pair.element[1] = convert<Out>(sum[i][j][2 * half + 1]);
                *reinterpret_cast<Pair<Out>*>(
                    tile + in_tile(lane / 4, 8 * j + lane % 4 * 2)) = pair;
            }
            __syncwarp();  // all of these rows are written
            const int first = 16 * i + 8 * half;
            if (vector) {
#pragma unroll
                for (int r = 0; r < 8; r += 32 / LANES) {
                    const int row = r + lane / LANES;
                    if (!exists(first + row, column)) continue;
                    *reinterpret_cast<Stored<Out>*>(y + row_offset(first + row) + at_column[0]) =
                        *reinterpret_cast<const Stored<Out>*>(tile + in_tile(row, column));
                }
            } else {
#pragma unroll 1
                for (int row = 0; row < 8; ++row) {
                    const Index at = row_offset(first + row);
#pragma unroll
                    for (int j = 0; j < COLUMNS / 32; ++j) {
                        if (!exists(first + row, column + 32 * j)) continue;
                        y[at + at_column[j]] = tile[in_tile(row, column + 32 * j)];
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
implicit_gemm_mma(const X_T* __restrict__ x, const W_T* __restrict__ w,
                  const B_T* __restrict__ bias, Y_T* __restrict__ y, ACC_T* __restrict__ partial,
                  const Problem p, const Tiling tiling) {
    typedef INDEX_T Index;
    extern __shared__ __align__(16) uint32 memory[];
    int4* const stages = reinterpret_cast<int4*>(memory);
    __shared__ __align__(16) Tap taps[2][TAPS];
    __shared__ Index w_taps[2][TAPS];
    if (!SERVED) return;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    const Index pixels = (Index)p.batch * (Index)p.output[AXIS_D] * (Index)p.output[AXIS_H] *
                         (Index)p.output[AXIS_W];
    const int group_in = (int)p.group_in, group_out = (int)p.group_out;

    const auto origin_of = [&](int tile) {
        Origin at;
        at.channel = split_off(tile, tiling.band);
        at.pixel = (Index)split_off(tile, tiling.pixel_tiles) * TILE_N;
        at.channel += split_off(tile, tiling.bands) * (int)tiling.band.value;
        at.channel *= TILE_M;
        at.group = split_off(tile, tiling.groups);
        at.split = tile;
        return at;
    };
    const auto slices_of = [&](int split) {
        return min(tiling.split_slices, tiling.slices - split * tiling.split_slices);
    };

    // ---- what this thread loads: of w a chunk of the rows load_row + i*LOAD_ROWS, of x the same;
    // where x goes through registers, the chunks x_chunk + j*CHUNK_STEP of one pixel; of `pixels`
    // one chunk of the rows thread / PIXEL_CHUNKS + i*PIXEL_ROWS
    int load_tile = blockIdx.x, next_slice = 0, end_slice = 0;  // what is loaded next, and of it
    Index w_row[W_LOADS];
    Tap pixel[X_PIXELS];
    const int load_row = thread / CHUNKS, load_chunk = thread % CHUNKS;
    // Channels past the end repeat the last, pixels past it the first: nobody stores their sums.
    const auto row_of_w = [&](const Origin& at, int i) {
        const int row = min(at.channel + load_row + i * LOAD_ROWS, group_out - 1);
        return (Index)p.w_offset + (at.group * group_out + row) * (Index)p.w_strides[0];
    };
    const auto pixel_of_x = [&](const Origin& at, int i) {
        Index n = at.pixel + (VECTORS  ? load_row + i * LOAD_ROWS
                              : PIXELS ? thread % PIXEL_CHUNKS * CHUNK + i * CHUNK / 2
                                       : thread % TILE_N);
        n = n < pixels ? n : 0;
        Tap first;  // tap (0, 0, 0), which may lie beyond the edge
        first.w = split_off(n, p.output_divisor[AXIS_W]) * (Index)p.stride[AXIS_W] -
                  (Index)p.pad_lo[AXIS_W];
        first.h = split_off(n, p.output_divisor[AXIS_H]) * (Index)p.stride[AXIS_H] -
                  (Index)p.pad_lo[AXIS_H];
        first.d = split_off(n, p.output_divisor[AXIS_D]) * (Index)p.stride[AXIS_D] -
                  (Index)p.pad_lo[AXIS_D];
        first.offset = n * (Index)p.x_strides[0] +
                       (Index)at.group * group_in * (Index)p.x_strides[1] +
                       first.d * (Index)p.x_strides[2] + first.h * (Index)p.x_strides[3] +
                       first.w * (Index)p.x_strides[4];
        return first;
    };
    const auto begin_tile = [&] {
        const Origin at = origin_of(load_tile);
        next_slice = at.split * tiling.split_slices;
        end_slice = next_slice + slices_of(at.split);
#pragma unroll
        for (int i = 0; i < W_LOADS; ++i) w_row[i] = row_of_w(at, i);
        if (HALO) return;
#pragma unroll
        for (int i = 0; i < X_PIXELS; ++i) pixel[i] = pixel_of_x(at, i);
    };

    // ---- the taps of a slice's chunks, or of its k; past the end of the first: none is read there
    const auto find_taps = [&](int slice, int slot) {
        if (!PIXELS && thread < TAPS) {
            int k = slice * TILE_K + thread * (PACKED ? 1 : CHUNK);
            k = k < tiling.depth ? k : 0;
            int c = PACKED ? 0 : split_off(k, tiling.block);
            const Index s = split_off(k, p.filter_divisor[AXIS_W]);
            const Index r = split_off(k, p.filter_divisor[AXIS_H]);
            const Index t = split_off(k, p.filter_divisor[AXIS_D]);
            c += PACKED ? k : k * (int)tiling.block.value;
            Tap tap;
            tap.d = t * (Index)p.dilation[AXIS_D];
            tap.h = r * (Index)p.dilation[AXIS_H];
            tap.w = s * (Index)p.dilation[AXIS_W];
            tap.offset = c * (Index)p.x_strides[1] + tap.d * (Index)p.x_strides[2] +
                         tap.h * (Index)p.x_strides[3] + tap.w * (Index)p.x_strides[4];
            if (!HALO) taps[slot][thread] = tap;
            w_taps[slot][thread] = c * (Index)p.w_strides[1] + t * (Index)p.w_strides[2] +
                                   r * (Index)p.w_strides[3] + s * (Index)p.w_strides[4];
        }
    };
    // Whether `tap` of a pixel is read, and where: in the image, or where the mode folds it to.
    const auto in_image = [&](const Tap& first, const Tap& tap) {
        return inside(first.d + tap.d, first.h + tap.h, first.w + tap.w, p);
    };
    const auto folded_at = [&](const Tap& first, const Tap& tap) {
        Index at = first.offset + tap.offset;
        if (!in_image(first, tap)) {
            at += folded(first.d + tap.d, first.h + tap.h, first.w + tap.w, p);
        }
        return at;
    };
    const bool zeros = p.boundary == BOUNDARY_ZEROS;

    // ---- global memory -> a stage: copied asynchronously, or else at once
    const auto copy_slice = [&](int slice, int slot, int4* stage) {
        const int k = slice * TILE_K + load_chunk * CHUNK;
        const bool live = k < tiling.depth;
#if LOAD == 3
        const int row = thread / PIXEL_CHUNKS, column = thread % PIXEL_CHUNKS;
        const Index plane = (Index)p.x_strides[1];
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i) {
            const int of = row + i * PIXEL_ROWS, c = slice * TILE_K + of;
            int4* const to = stage + of * PIXEL_CHUNKS + (column ^ (of % 8));
            if (tiling.x_vector) {
                cp_async_16(to, x + (pixel[0].offset + c * plane), c < tiling.depth);
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    cp_async_8(reinterpret_cast<int2*>(to) + half,
                               x + (pixel[half].offset + c * plane), c < tiling.depth);
                }
            }
        }
#endif
        stage += place(load_row, load_chunk);
#if LOAD == 0
        const Tap tap = taps[slot][load_chunk];
        // Most of what a tap reads the next ones read again: hence by way of L1.
        if (!tiling.x_vector) {
            const Origin origin = origin_of(load_tile);
#pragma unroll 1  // in few registers: pixels are worked out once more
            for (int i = 0; i < X_LOADS; ++i) {
                const Tap first = pixel_of_x(origin, i);
                const bool read = live & (!zeros | in_image(first, tap));
                const Index at = read ? folded_at(first, tap) : 0;
                Loaded chunk;
#pragma unroll
                for (int e = 0; e < CHUNK; ++e) {
                    chunk.element[e] =
                        read ? x[at + e * (Index)p.x_strides[1]] : convert<X_T>(0.0f);
                }
                *reinterpret_cast<Loaded*>(stage + i * LOAD_ROWS * CHUNKS) = chunk;
            }
        } else if (zeros) {  // without a branch
#pragma unroll
            for (int i = 0; i < X_LOADS; ++i) {
                cp_async_16_cached(stage + i * LOAD_ROWS * CHUNKS,
                                   x + (pixel[i].offset + tap.offset),
                                   live & in_image(pixel[i], tap));
            }
        } else {
#pragma unroll
            for (int i = 0; i < X_LOADS; ++i) {
                cp_async_16_cached(stage + i * LOAD_ROWS * CHUNKS, x + folded_at(pixel[i], tap),
                                   live);
            }
        }
#endif
        stage += X_TILE;
        if (tiling.w_vector) {
            const Index at = PACKED || PIXELS ? (Index)k : w_taps[slot][load_chunk];
#pragma unroll
            for (int i = 0; i < W_LOADS; ++i) {
                cp_async_16(stage + i * LOAD_ROWS * CHUNKS, w + (w_row[i] + at), live);
            }
            return;
        }
        const Origin origin = origin_of(load_tile);
#pragma unroll 1
        for (int i = 0; i < W_LOADS; ++i) {
            const Index row = row_of_w(origin, i);
            Loaded chunk;
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) {
                const Index at =
                    PACKED   ? w_taps[slot][(load_chunk * CHUNK + e) % TAPS]
                    : PIXELS ? (k + e) * (Index)p.w_strides[1]
                             : w_taps[slot][load_chunk] + e * (Index)p.w_strides[1];
                chunk.element[e] = k + e < tiling.depth ? w[row + at] : convert<X_T>(0.0f);
            }
            *reinterpret_cast<Loaded*>(stage + i * LOAD_ROWS * CHUNKS) = chunk;
        }
    };

    // ---- global memory -> registers -> a stage: x where it is not copied
    constexpr int LOADED = STAGED || HALO ? X_LOADS : 1;
    constexpr int CHUNK_STEP = STAGED ? BLOCK / TILE_N : 1;
    const int x_row = thread % TILE_N, x_chunk = thread / TILE_N;
    X_T loaded[LOADED][CHUNK];
    const auto load_slice = [&](int slice, int slot) {
#if LOAD == 1 || LOAD == 2
        const int live = tiling.depth - slice * TILE_K;
#pragma unroll
        for (int j = 0; j < LOADED; ++j) {
            const int chunk = x_chunk + j * CHUNK_STEP;
#if LOAD == 1
            const Tap tap = taps[slot][chunk];
            const bool read = (chunk * CHUNK < live) & (!zeros | in_image(pixel[0], tap));
            const Index at = zeros ? pixel[0].offset + tap.offset : folded_at(pixel[0], tap);
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) {
                loaded[j][e] = read ? x[at + e * (Index)p.x_strides[1]] : convert<X_T>(0.0f);
            }
#else
            if (zeros) {  // without a branch, so that all loads are under way
#pragma unroll
                for (int e = 0; e < CHUNK; ++e) {
                    const int k = chunk * CHUNK + e;
                    const Tap tap = taps[slot][k];
                    const bool read = (k < live) & in_image(pixel[0], tap);
                    loaded[j][e] =
                        read ? x[pixel[0].offset + tap.offset] : convert<X_T>(0.0f);
                }
            } else {
#pragma unroll
                for (int e = 0; e < CHUNK; ++e) {
                    const int k = chunk * CHUNK + e;
                    const Index at = folded_at(pixel[0], taps[slot][k]);
                    loaded[j][e] = k < live ? x[at] : convert<X_T>(0.0f);
                }
            }
#endif
        }
#endif
    };
    const auto store_slice = [&](int4* stage) {
#if LOAD == 1 || LOAD == 2
#pragma unroll
        for (int j = 0; j < LOADED; ++j) {
            Loaded chunk;
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) chunk.element[e] = loaded[j][e];
            *reinterpret_cast<Loaded*>(stage + place(x_row, x_chunk + j * CHUNK_STEP)) = chunk;
        }
#endif
    };

    // ---- the same of `halo`: a channel block of a tile -> a buffer, chunk by chunk
    const Halo& halo = tiling.halo;
    int4* const buffers = stages + STAGES * STAGE;
    Place* const places =
        reinterpret_cast<Place*>(buffers + 2 * CHUNKS * halo.buffer) + thread;
    Shift* const shifts = reinterpret_cast<Shift*>(places - thread + halo.places * BLOCK);
    // What is loaded next, its first channel, and the slices of its tile from there on.
    int halo_tile = blockIdx.x, halo_channel = 0, halo_slices = 0;
    const auto find_places = [&](const Origin& origin) {
        const Start start = start_of((int)origin.pixel, halo, p);
        const Start last = start_of(min((int)origin.pixel + TILE_N, (int)pixels) - 1, halo, p);
        const int columns = (int)halo.line.value;
        const int end = (last.line + halo.last_line) * columns + last.column + halo.last_column;
        const int first = first_of(start, halo);
        const int group = origin.group * group_in * (int)p.x_strides[1];
        // Eight neighbouring threads are in one line: their writes do not meet in a bank.
        int n = start.line * columns + (start.column & ~7) + thread;
#pragma unroll 1
        for (int i = 0; i < halo.places; ++i, n += BLOCK) {
            Place place = {0, -1};
            if (n <= end) place = place_of(n, first, group, halo, p);
            places[i * BLOCK] = place;
        }
    };
    const auto begin_halo = [&] {
        const Origin at = origin_of(halo_tile);
        halo_channel = at.split * halo.split_channels;
        halo_slices = slices_of(at.split);
        find_places(at);
    };
    const auto next_halo = [&] {
        halo_channel += TILE_K;
        halo_slices -= halo.taps;
        if (halo_slices > 0) return;
        halo_tile += gridDim.x;
        if (halo_tile < tiling.tiles) begin_halo();
    };
    const auto load_halo = [&](int number, X_T(&chunk)[CHUNK]) {
        const Place place = places[number / CHUNKS * BLOCK];
        if (place.to < 0 || !(place.to & 1)) return;
        const int c = halo_channel + number % CHUNKS * CHUNK;
        // A chain of sums in bytes takes fewer instructions than an offset for each.
        const int64 step = p.x_strides[1] * (int64)sizeof(X_T);
        const char* from =
            reinterpret_cast<const char*>(x + (place.at + c * (int)p.x_strides[1]));
#pragma unroll
        for (int e = 0; e < CHUNK; ++e, from += step) {
            chunk[e] = *reinterpret_cast<const X_T*>(from);
        }
    };
    const auto store_halo = [&](int number, const X_T(&from)[CHUNK], int4* buffer) {
        const Place place = places[number / CHUNKS * BLOCK];
        if (place.to < 0) return;
        Loaded chunk;
#pragma unroll
        for (int e = 0; e < CHUNK; ++e) chunk.element[e] = from[e];
        int4 words = *reinterpret_cast<const int4*>(&chunk);
        if (!(place.to & 1)) words = make_int4(0, 0, 0, 0);
        buffer[place.to / 2 ^ number % CHUNKS] = words;
    };
    // Whether there is an i-th chunk to load during a tap's slice.
    const auto loads_halo = [&](int tap, int i) {
        return halo_tile < tiling.tiles && i < halo.loads &&
               tap * halo.loads + i < CHUNKS * halo.places;
    };
    const auto begin_halos = [&] {
        for (int i = thread; i < halo.taps; i += BLOCK) shifts[i] = shift_of(i, halo, p);
        begin_halo();
#pragma unroll 1
        for (int i = 0; i < halo.places; ++i) {
            X_T chunks[CHUNKS][CHUNK];  // all under way
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) load_halo(i * CHUNKS + c, chunks[c]);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) store_halo(i * CHUNKS + c, chunks[c], buffers);
        }
        next_halo();
    };

    // ---- the sums of this warp
    const int warp_m = warp % WARPS_M * WARP_M, warp_n = warp / WARPS_M * WARP_N;
    const int m_at = X_TILE + warp_m * CHUNKS, n_at = warp_n * CHUNKS;
    const int rows_at = CHANNELS_LAST ? n_at : m_at, columns_at = CHANNELS_LAST ? m_at : n_at;
    Sums sum;
    const auto clear = [&] {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            sum[i / 4 / (2 * COLUMN_PAIRS)][i / 4 % (2 * COLUMN_PAIRS)][i % 4] = zero<ACC_T>();
        }
    };
    // halo: where a lane's row of a fragment lies in a buffer under tap (0, 0, 0), in chunks.
    int row_at[HALO ? COLUMN_PAIRS : 1];
    const auto find_rows = [&](int number) {
        const int first_pixel = (int)origin_of(number).pixel;
        const int first = first_of(start_of(first_pixel, halo, p), halo);
#pragma unroll
        for (int j = 0; j < COLUMN_PAIRS; ++j) {
            // Pixels past the end read where the last one does, if not what: nobody stores their
            // sums.
            const int n = first_pixel + warp_n + 16 * j + lane / 16 * 8 + lane % 8;
            const Start start = start_of(min(n, (int)pixels - 1), halo, p);
            row_at[HALO ? j : 0] = (start.line * halo.pitch + start.column - first) * CHUNKS;
        }
    };
    const auto multiply_slice = [&](const int4* stage, const int4* buffer, int tap) {
        Fragment<X_T> a[2][ROW_BLOCKS], b[2][COLUMN_PAIRS];
        const Shift shift = HALO ? shifts[tap] : Shift();
        const auto load_step = [&](int step) {
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS; ++i) {
                load_fragment<true>(a[step & 1][i], stage + rows_at + i * 16 * CHUNKS, step, lane);
            }
#pragma unroll
            for (int j = 0; j < COLUMN_PAIRS; ++j) {
                if (HALO) {
                    const int chunk = STEP_CHUNKS * step + lane / 8 % 2;
                    load_matrices(b[step & 1][j],
                                  buffer + halo_chunk(row_at[HALO ? j : 0], lane, chunk, shift));
                } else if (PIXELS) {
                    load_pixels(b[step & 1][j], stage, (warp_n + 16 * j) / CHUNK, step, lane);
                } else {
                    load_fragment<false>(b[step & 1][j], stage + columns_at + j * 16 * CHUNKS,
                                         step, lane);
                }
            }
        };
        // Loads that some lanes have and others not may have parted the warp, which ldmatrix and
        // mma take whole.
        __syncwarp();
        load_step(0);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step + 1 < STEPS) load_step(step + 1);  // under way while these are multiplied
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS; ++i) {
#pragma unroll
                for (int j = 0; j < 2 * COLUMN_PAIRS; ++j) {
                    multiply(sum[i][j], a[step & 1][i], b[step & 1][j / 2], j % 2);
                }
            }
        }
    };
    // The sums of the parts so far, each thread's own, where a block computes several.
    ACC_T* const total =
        reinterpret_cast<ACC_T*>(buffers + (HALO ? halo.bytes / 16 : 0)) + thread;
    const auto add_part = [&](bool first) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            ACC_T& part = sum[i / 4 / (2 * COLUMN_PAIRS)][i / 4 % (2 * COLUMN_PAIRS)][i % 4];
            if (!first) part = add(total[i * BLOCK], part);
            total[i * BLOCK] = part;
        }
    };

    // ---- registers -> y, by way of a stage
    const auto store_tile = [&](int number, int4* stage) {
        const Origin at = origin_of(number);
        const Target to = {at.pixel + warp_n, pixels, at.channel + warp_m, group_out,
                           at.group * group_out};
        if (bias != nullptr) {
            const auto bias_of = [&](int m) {
                m += to.channel;
                m = to.first + (m < group_out ? m : 0);
                return load<ACC_T>(bias, m * (Index)p.bias_stride, 0);
            };
#pragma unroll
            for (int i = 0; i < (CHANNELS_LAST ? 2 * COLUMN_PAIRS : ROW_BLOCKS); ++i) {
                // Two neighbouring columns, or rows eight apart.
                const int m = CHANNELS_LAST ? 8 * i + lane % 4 * 2 : 16 * i + lane / 4;
                const ACC_T b[2] = {bias_of(m), bias_of(m + (CHANNELS_LAST ? 1 : 8))};
#pragma unroll
                for (int j = 0; j < (CHANNELS_LAST ? ROW_BLOCKS : 2 * COLUMN_PAIRS); ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        ACC_T& value = CHANNELS_LAST ? sum[j][i][e] : sum[i][j][e];
                        value = add(value, b[CHANNELS_LAST ? e % 2 : e / 2]);
                    }
                }
            }
        }
        ACC_T* const room = reinterpret_cast<ACC_T*>(stage) + warp * 8 * COLUMNS;
        if (partial != nullptr) {
            store_sums<ACC_T, Index>(partial + at.split * (Index)tiling.split_stride, sum, room, to,
                                     tiling.partial_vector, lane, p);
        } else {
            store_sums<Y_T, Index>(y, sum, reinterpret_cast<Y_T*>(room), to, tiling.y_vector,
                                   lane, p);
        }
    };

    // ---- the slices of all tiles
    int tile = blockIdx.x, slice = 0;  // what is multiplied next
    int count = slices_of(origin_of(tile).split);
    int part_end = tiling.part_slices;
    int multiplied = 0, filled = 0;  // the stages of the slice to multiply and of the one to load
    int tap = 0;
    int4 *buffer = buffers, *other = buffers + CHUNKS * halo.buffer;
    if (HALO) begin_halos();
    if (HALO) find_rows(tile);
    clear();
    begin_tile();
    find_taps(next_slice, 0);
#pragma unroll 1
    for (int step = 0; tile < tiling.tiles; ++step) {
        cp_async_wait<STAGES - 2>();
        // The slice to multiply is there, for all, and so are the taps of the one to load; the
        // stage of the slice before is free.
        __syncthreads();
        const bool loading = load_tile < tiling.tiles;
        int4* const to = stages + filled * STAGE;
        if (loading) {
            copy_slice(next_slice, step & 1, to);
            load_slice(next_slice, step & 1);
            if (++next_slice == end_slice) {
                load_tile += gridDim.x;
                if (load_tile < tiling.tiles) begin_tile();
            }
            find_taps(next_slice, (step & 1) ^ 1);
        }
        cp_async_commit();
        filled = filled + 1 == STAGES ? 0 : filled + 1;
        if (step < STAGES - 1) {  // there is none to multiply yet
            if (loading) store_slice(to);
            continue;
        }
        int4* const stage = stages + multiplied * STAGE;
        if (HALO) {
#pragma unroll
            for (int i = 0; i < LOADED; ++i) {
                if (loads_halo(tap, i)) load_halo(tap * halo.loads + i, loaded[i]);
            }
        }
        multiply_slice(stage, buffer, tap);
        if (HALO) {
#pragma unroll
            for (int i = 0; i < LOADED; ++i) {
                if (loads_halo(tap, i)) store_halo(tap * halo.loads + i, loaded[i], other);
            }
            if (++tap == halo.taps) {
                tap = 0;
                int4* const next = other;
                other = buffer;
                buffer = next;
                next_halo();
            }
        }
        if (loading) store_slice(to);
        multiplied = multiplied + 1 == STAGES ? 0 : multiplied + 1;
        const bool last = ++slice == count;
        if (tiling.part_slices < tiling.split_slices && (last || slice == part_end)) {
            add_part(part_end == tiling.part_slices);
            if (!last) clear();
            part_end += tiling.part_slices;
        }
        if (!last) continue;
        __syncthreads();  // all have read this stage: it is theirs now
        store_tile(tile, stage);
        clear();
        tile += gridDim.x;
        slice = 0;
        count = slices_of(origin_of(tile).split);
        part_end = tiling.part_slices;
        if (HALO && tile < tiling.tiles) find_rows(tile);
    }
}

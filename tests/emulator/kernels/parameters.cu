// Arguments of every kind arrive as they were sent.
struct Problem {
    int extent[3];
    bool flag;
    long long stride;
    float scale;
    double offset;
};

struct Complex {
    float re, im;
};

extern "C" __global__ void parameters(const __grid_constant__ Problem p, Complex c, const float* missing, bool yes,
                                      signed char i8, unsigned short u16, long long i64, double f64,
                                      const double* negative, double* out) {
    if (threadIdx.x + threadIdx.y + threadIdx.z != 0) return;
    double* o = out + 16 * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    o[0] = p.extent[0];
    o[1] = p.extent[2];
    o[2] = p.flag;
    o[3] = (double)p.stride;
    o[4] = p.scale;
    o[5] = p.offset;
    o[6] = c.re;
    o[7] = c.im;
    o[8] = missing == nullptr;
    o[9] = yes;
    o[10] = i8;
    o[11] = u16;
    o[12] = (double)i64;
    o[13] = f64;
    o[14] = negative[0] - negative[-1];
    o[15] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * blockDim.y;
}

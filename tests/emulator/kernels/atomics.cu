// Every thread updates the same few places.
extern "C" __global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int number = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&count, 1);
    atomicAdd(&i[0], number);
    atomicMax(&i[1], number);
    atomicMin(&i[2], -number);
    atomicOr(&u[0], 1u << (number % 32));
    atomicAdd(l, 1ull << 32);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
    unsigned seen = atomicAdd(&u[1], 0u), expected;
    do {
        expected = seen;
        seen = atomicCAS(&u[1], expected, expected + 2u);
    } while (seen != expected);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&i[3], count);
}

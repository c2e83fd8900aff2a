// One warp; out[row, lane] is what collective number `row` gave to the lane.
extern "C" __global__ void collectives(const int* x, int* out) {
    const int lane = threadIdx.x;
    const int value = x[lane];
    const unsigned all = 0xffffffffu;
    int row = 0;
    auto put = [&](int result) { out[32 * row++ + lane] = result; };
    put(__shfl_sync(all, value, 5));
    put(__shfl_sync(all, value, lane + 3, 8));
    put(__shfl_up_sync(all, value, 3));
    put(__shfl_up_sync(all, value, 3, 16));
    put(__shfl_down_sync(all, value, 3));
    put(__shfl_down_sync(all, value, 3, 4));
    put(__shfl_xor_sync(all, value, 9));
    put((int)__ballot_sync(all, value > 0));
    put(__any_sync(all, value > 1000));
    put(__all_sync(all, value > -1000));
    put(__reduce_add_sync(all, value));
    put(__reduce_max_sync(all, value));
    put((int)__match_any_sync(all, value & 3));
    // Half a warp on its own, in divergent code.
    if (lane < 16)
        put(__shfl_xor_sync(0x0000ffffu, value, 1));
    else
        put(__reduce_min_sync(0xffff0000u, value));
    __syncwarp();
    put((int)__double2int_rz(__shfl_sync(all, 2.5 * value, lane ^ 1)));
}

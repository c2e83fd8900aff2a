// out[i] = the i-th intrinsic of a and b.
extern "C" __global__ void intrinsics(int a, int b, long long* out) {
    int i = 0;
    auto put = [&](long long value) { out[i++] = value; };
    put(__umulhi((unsigned)a, (unsigned)b));
    put(__mulhi(a, b));
    put(__ffs(b));
    put(__popc((unsigned)a));
    put(__clz(b));
    put(__clz(0));
    put(__brev(1u));
    put(__byte_perm(0x33221100u, 0x77665544u, 0x7531u));
    put(__float_as_int(1.0f));
    put(__float2int_rn(2.5f));
    put(__float2int_rz(-2.5f));
    put(__float2int_rd(-2.5f));
    put(__float2int_rn(1e20f));
    put(min(a, b));
    put(max(a, b));
    put((long long)(1000.0f * rsqrtf(4.0f)));
    put((long long)max(1.0f, __int_as_float(0x7fc00000)));
    put(__funnelshift_r(0x11223344u, 0x55667788u, 8));
    put(__dp4a(0x01020304, 0x01010101, 5));
    put(sizeof(long long) + sizeof(void*) + alignof(float4) + alignof(int2) + alignof(double2));
}

// Integer arithmetic: one kernel an operation, out[i] = f(x[i], y[i], z[i]).
#include <cstdint>

#define INTEGER(name, type, expression)                                                        \
  extern "C" __global__ void name(const type* xs, const type* ys, const type* zs, type* out) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                       \
    [[maybe_unused]] const type x = xs[i], y = ys[i], z = zs[i];                               \
    out[i] = expression;                                                                       \
  }

INTEGER(sum_u64, uint64_t, x + y - z)
INTEGER(product_u64, uint64_t, x* y + z)
INTEGER(high_u64, uint64_t, __umul64hi(x, y))
INTEGER(high_s64, int64_t, __mul64hi(x, y))
INTEGER(quotient_u64, uint64_t, x / (y | 1))
INTEGER(quotient_s64, int64_t, x / (y | 1))
INTEGER(remainder_s64, int64_t, x % (y | 1))
INTEGER(by_constant_s64, int64_t, x / 1000003 + y % 10)
INTEGER(shifts_u64, uint64_t, (x << (y & 63)) ^ (x >> (z & 63)))
INTEGER(shift_s64, int64_t, x >> (y & 63))
INTEGER(minimum_s64, int64_t, x < y ? x : y < z ? y : z)
INTEGER(bits_u64, uint64_t, __popcll(x) + (__clzll(y) << 8) + (__ffsll(z) << 16))
INTEGER(reverse_u64, uint64_t, __brevll(x))
INTEGER(square_u128, uint64_t, (static_cast<unsigned __int128>(x) * y + z) % 0xfffffffffffffff1u)

INTEGER(high_u32, uint32_t, __umulhi(x, y))
INTEGER(high_s32, int32_t, __mulhi(x, y) + __mul24(x & 0xffffff, y & 0xffffff))
INTEGER(quotient_s32, int32_t, x / (y | 1) + x % (z | 1))
INTEGER(quotient_u32, uint32_t, x / (y | 1) + x % (z | 1))
INTEGER(sad_s32, uint32_t, __sad(x, y, z))
INTEGER(averages, int32_t, __hadd(x, y) ^ __rhadd(y, z))
INTEGER(bits_u32, uint32_t, __popc(x) + (__clz(y) << 8) + (__ffs(z) << 16))
INTEGER(reverse_u32, uint32_t, __brev(x))
INTEGER(funnel, uint32_t, __funnelshift_l(x, y, z) ^ __funnelshift_rc(y, x, z))
INTEGER(permute, uint32_t, __byte_perm(x, y, z & 0x7777))
INTEGER(field, uint32_t, (x >> 7 & 0x3ff) | (y & 0xff) << 10 | (z & 0xfff00000))
INTEGER(logic, uint32_t, (x & y) | (~x & z))
INTEGER(majority, uint32_t, (x & y) ^ (y & z) ^ (x & z))
INTEGER(dot_s8, int32_t, __dp4a(x, y, z))
INTEGER(dot_s16, int32_t, __dp2a_lo(x, y, z))
INTEGER(bytes_sum, uint32_t, __vadd4(x, y))
INTEGER(bytes_maximum, uint32_t, __vmaxu4(x, y))
INTEGER(bytes_difference, uint32_t, __vabsdiffu4(x, y))
INTEGER(halves_sum, uint32_t, __vaddss2(x, y))
INTEGER(halves_relu, uint32_t, __viaddmax_s16x2_relu(x, y, z))
INTEGER(largest_of_three, int32_t, __vimax3_s32(x, y, z))
INTEGER(narrow, int32_t, static_cast<int8_t>(x) + static_cast<uint8_t>(y) + static_cast<int16_t>(z))

extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = a * x[i] + y[i];
}

/* Vectors of floats as wide as the machine's registers, and the few functions on them that every kernel shares. */
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define IOTA {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif defined(__AVX__)
#define LANES 8
#define IOTA {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define LANES 4
#define IOTA {0, 1, 2, 3}
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static const ivec iota = IOTA;

INLINE long round_up(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }
INLINE long smaller(long a, long b) { return a < b ? a : b; }
INLINE vec spread(float x) { return x - (vec){}; }
INLINE vec load(const float *from) { return *(const unaligned_vec *)from; }
INLINE void store(float *to, vec x) { *(unaligned_vec *)to = x; }

/* Up to LANES floats: `fill` in the lanes after the first `count`, which are neither read nor written. */
INLINE vec load_up_to(const float *from, long count, float fill) {
#if defined(__AVX512F__)
    __mmask16 mask = count >= LANES ? 0xffff : (1u << count) - 1;
    return (vec)_mm512_mask_loadu_ps((__m512)spread(fill), mask, from);
#else
    if (count >= LANES) return load(from);
    vec x = spread(fill);
    for (long i = 0; i < count; i++) x[i] = from[i];
    return x;
#endif
}
INLINE void store_up_to(float *to, vec x, long count) {
#if defined(__AVX512F__)
    __mmask16 mask = count >= LANES ? 0xffff : (1u << count) - 1;
    _mm512_mask_storeu_ps(to, mask, (__m512)x);
#else
    if (count >= LANES) store(to, x);
    else for (long i = 0; i < count; i++) to[i] = x[i];
#endif
}

/* Both return the second argument when one is not a number, so a NaN there travels on. */
INLINE vec larger_of(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    ivec first = a > b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
#endif
}
INLINE vec smaller_of(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
    ivec first = a < b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
#endif
}

/* x in the lanes before `count`, `fill` after them. */
INLINE vec first_lanes(vec x, long count, float fill) {
    ivec kept = iota < (int32_t)smaller(count, LANES);
    return (vec)((kept & (ivec)x) | (~kept & (ivec)spread(fill)));
}

INLINE vec rotated(vec x, int by) { return __builtin_shuffle(x, (iota + by) & (LANES - 1)); }

/* Sum and maximum over the lanes, in an order fixed by LANES alone. */
INLINE float sum_of(vec x) {
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) x += rotated(x, by);
    return x[0];
}
INLINE float largest_of(vec x) {
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) x = larger_of(x, rotated(x, by));
    return x[0];
}

/* e^x with a relative error under 2e-7; exactly 0 below -87.3, and about 2e38 above 88.3.
   x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 p(r), p fitted on that interval. */
INLINE vec exponential(vec x) {
    const vec magic = spread(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number in the low bits */
    vec clamped = smaller_of(spread(88.3f), larger_of(spread(-87.3f), x));
    vec shifted = clamped * 1.44269504f + magic;
    vec n = shifted - magic;
    vec r = n * -0.693359375f + clamped;
    r = n * 2.12194440e-4f + r;
    vec p = spread(1.9899858560e-4f);
    p = p * r + 1.3934092894e-3f;
    p = p * r + 8.3332977774e-3f;
    p = p * r + 4.1666460908e-2f;
    p = p * r + 1.6666666721e-1f;
    p = p * r + 0.5f;
    vec e = p * (r * r) + r;
    e = e + 1.0f;
    ivec power = ((ivec)shifted - (ivec)magic + 127) << 23;
    ivec tiny = x < spread(-87.3f);
    return (vec)((ivec)(e * (vec)power) & ~tiny);
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

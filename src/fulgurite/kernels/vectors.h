/*
Vectors of float32 that numbers in memory come from and go to, and the functions of them that networks want. Numbers are
bfloat16, or float32 where that is what this is compiled for (FLOAT32).
*/
#include <stdint.h>
#include <string.h>

#ifdef FLOAT32
enum { LANES = 8 };
#else
enum { LANES = 16 };
#endif
enum { PAIR = 2 * LANES };
enum { FEW = 1 << 14 }; /* numbers; to go through so few is for one thread */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

/* Compiled for each kind of processor, where it is not for one alone: which one it is, is found out as the library is
loaded. */
#if defined __x86_64__ && !defined FLOAT32
#define EACH static __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH static
#endif

/* Rounded to bfloat16, in the upper halves; what is in the lower ones is left over. */
INLINE words to_nearest(floats x) { return (words)x + 0x7FFF + ((words)x >> 16 & 1); }

#ifdef FLOAT32
typedef float number;
typedef struct {
    floats first, second;
} pairs;

INLINE float widened(number x) { return x; }
INLINE floats evens(pairs x) { return x.first; }
INLINE floats odds(pairs x) { return x.second; }
INLINE pairs paired(floats even, floats odd) { return (pairs){even, odd}; }

INLINE long place(long i) { return i; }

INLINE pairs load_pairs(const number *from) {
    pairs x; /* each vector by itself: as one piece it would go by way of memory */
    memcpy(&x.first, from, sizeof x.first);
    memcpy(&x.second, from + LANES, sizeof x.second);
    return x;
}

INLINE void store_pairs(pairs x, number *to) {
    memcpy(to, &x.first, sizeof x.first);
    memcpy(to + LANES, &x.second, sizeof x.second);
}
#else
typedef uint16_t number;
typedef words pairs; /* as bfloat16 lies in 32-bit words: those of even places are in the lower halves */

INLINE float widened(number x) {
    uint32_t word = (uint32_t)x << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE floats evens(pairs x) { return (floats)(x << 16); }
INLINE floats odds(pairs x) { return (floats)(x & 0xFFFF0000); }
INLINE pairs paired(floats even, floats odd) { return to_nearest(even) >> 16 | (to_nearest(odd) & 0xFFFF0000); }

/* Where the i-th of many is, once of each pair of vectors those of even places stand before the others, as evens and odds
give them. */
INLINE long place(long i) { return i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2; }

INLINE pairs load_pairs(const number *from) {
    pairs x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_pairs(pairs x, number *to) { memcpy(to, &x, sizeof x); }
#endif

INLINE floats either(ints where, floats a, floats b) { return (floats)((where & (ints)a) | (~where & (ints)b)); }

/* 2 to the power of t, from -126 to 126: to the whole part by the exponent's bits, to the rest by a polynomial. For
bfloat16 it is off by 3e-6 of the value at most (least squares), a thousandth of that; for float32 by 2e-8, a quarter of
its last place. */
INLINE floats power_of_2(floats t) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    t = either(t < -126.0f, (floats){} - 126.0f, t);
    t = either(t > 126.0f, (floats){} + 126.0f, t);
    floats whole = t + shift, f = t - (whole - shift);
#ifdef FLOAT32
    floats power = 0.0096184891f + f * (0.0013399931f + f * 0.00015345811f);
    power = 1.0f + f * (0.69314718f + f * (0.24022646f + f * (0.055503286f + f * power)));
#else
    floats power = 0.99999917f + f * (0.69312197f + f * (0.24024981f + f * (0.05591704f + f * 0.00956051f)));
#endif
    return (floats)(((words)whole << 23) + (words)power);
}

INLINE floats silu(floats x) { return x / (1.0f + power_of_2(-1.44269504f * x)); }

/* x times the normal distribution up to x; the error function after Abramowitz and Stegun, 7.1.26, off by 1.5e-7. */
INLINE floats gelu(floats x) {
    floats size = either(x < 0.0f, -x, x), t = 1.0f / (1.0f + 0.23164190f * size);
    floats tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return either(x < 0.0f, (floats){}, x) - 0.5f * size * tail * power_of_2(-0.72134752f * x * x);
}

/* Vectors of float32 that bfloat16 comes from and goes to, and the functions of them that networks want. */
#include <stdint.h>
#include <string.h>

enum { LANES = 16, PAIR = 2 * LANES };
enum { FEW = 1 << 14 }; /* numbers; to go through so few is for one thread */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

#ifdef __x86_64__ /* compiled for each kind of processor; which one it is, is found out as the library is loaded */
#define EACH static __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH static
#endif

/* Rounded to bfloat16, in the upper halves; what is in the lower ones is left over. */
INLINE words to_nearest(floats x) { return (words)x + 0x7FFF + ((words)x >> 16 & 1); }

/* Numbers come in pairs, as bfloat16 lies in 32-bit words: the even ones in the lower halves, the odd ones in the upper. */
INLINE floats evens(words x) { return (floats)(x << 16); }
INLINE floats odds(words x) { return (floats)(x & 0xFFFF0000); }

INLINE words paired(floats even, floats odd) { return to_nearest(even) >> 16 | (to_nearest(odd) & 0xFFFF0000); }

INLINE floats either(ints where, floats a, floats b) { return (floats)((where & (ints)a) | (~where & (ints)b)); }

/* 2 to the power of t, from -126 to 126: to the whole part by the exponent's bits, to the rest by a polynomial that is
off by 3e-6 of the value at most (least squares), a thousandth of what bfloat16 is. */
INLINE floats power_of_2(floats t) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    t = either(t < -126.0f, (floats){} - 126.0f, t);
    t = either(t > 126.0f, (floats){} + 126.0f, t);
    floats whole = t + shift, f = t - (whole - shift);
    floats power = 0.99999917f + f * (0.69312197f + f * (0.24024981f + f * (0.05591704f + f * 0.00956051f)));
    return (floats)(((words)whole << 23) + (words)power);
}

INLINE floats silu(floats x) { return x / (1.0f + power_of_2(-1.44269504f * x)); }

/* x times the normal distribution up to x; the error function after Abramowitz and Stegun, 7.1.26, off by 1.5e-7. */
INLINE floats gelu(floats x) {
    floats size = either(x < 0.0f, -x, x), t = 1.0f / (1.0f + 0.23164190f * size);
    floats tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return either(x < 0.0f, (floats){}, x) - 0.5f * size * tail * power_of_2(-0.72134752f * x * x);
}

/*
Tokens and pictures in bfloat16 to 8 bits, and products back: what int8 takes besides its products, in few passes.

In torch it is a dozen of them, a quarter of the time. A token's bits do not depend on the tokens beside it.
*/
#include "vectors.h"

enum { MOST = 127, ZERO = 128 }; /* of 8 bits, either way; what stands for 0 */

/* The largest of a token's numbers, whatever its sign: bfloat16 without its sign is ordered as whole numbers are. */
EACH float size_of(const uint16_t *x, long inner) {
    words even = {}, odd = {};
    for (long i = 0; i < inner; i += PAIR) {
        words pair;
        memcpy(&pair, x + i, sizeof pair);
        words low = pair << 16 & 0x7FFF0000, high = pair & 0x7FFF0000;
        even = (words)either((ints)(low > even), (floats)low, (floats)even);
        odd = (words)either((ints)(high > odd), (floats)high, (floats)odd);
    }
    uint32_t most = 0;
    for (long i = 0; i < LANES; i++) {
        if (even[i] > most) most = even[i];
        if (odd[i] > most) most = odd[i];
    }
    float size;
    memcpy(&size, &most, sizeof size);
    return size;
}

/* So many numbers times the steps to 1, plus what stands for 0, to the nearest whole ones. */
EACH void round_all(const uint16_t *x, uint8_t *values, long count, float steps, int zero) {
    const float whole = 12582912.0f + zero; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    for (long i = 0; i < count; i += PAIR) {
        words pair;
        memcpy(&pair, x + i, sizeof pair);
        words even = (words)(evens(pair) * steps + whole) & 0xFF, odd = (words)(odds(pair) * steps + whole) & 0xFF;
        halves both = __builtin_convertvector(even | odd << 8, halves);
        memcpy(values + i, &both, sizeof both);
    }
}

/* Tokens [tokens, inner] to values, and what 1 stands for in each, [tokens]; inner is a multiple of 32. What is no
number or infinite spoils its token. */
void quantize(const uint16_t *x, uint8_t *values, float *scales, long tokens, long inner, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * inner > FEW)
    for (long token = 0; token < tokens; token++) {
        float size = size_of(x + token * inner, inner);
        scales[token] = (size < 1e-10f ? 1e-10f : size) / MOST + (size - size);
        round_all(x + token * inner, values + token * inner, inner, 1 / scales[token], ZERO);
    }
}

/* Lowers low and raises high to so many numbers' own; makes spoiled no number where one of them is none or infinite. */
EACH void bound(const uint16_t *x, long count, float *low, float *high, float *spoiled) {
    floats least = (floats){} + *low, most = (floats){} + *high, none = {};
    for (long i = 0; i < count; i += PAIR) {
        words pair;
        memcpy(&pair, x + i, sizeof pair);
        floats even = evens(pair), odd = odds(pair);
        least = either(even < least, even, least), most = either(even > most, even, most);
        least = either(odd < least, odd, least), most = either(odd > most, odd, most);
        none += (even - even) + (odd - odd);
    }
    for (long i = 0; i < LANES; i++) {
        if (least[i] < *low) *low = least[i];
        if (most[i] > *high) *high = most[i];
        *spoiled += none[i];
    }
}

/* The lowest and the highest of lines of so many numbers and of 0; none where one is no number or infinite. */
void bounds(const uint16_t *x, float *found, long lines, long count, int threads) {
    float low = 0, high = 0, spoiled = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : low) reduction(max : high) \
    reduction(+ : spoiled)
    for (long line = 0; line < lines; line++) bound(x + line * count, count, &low, &high, &spoiled);
    found[0] = low + spoiled, found[1] = high + spoiled;
}

/* A picture [height, width, channels] to values [height + 2, width + 2, channels], with what stands for 0 around. */
void quantize_picture(const uint16_t *x, uint8_t *values, long height, long width, long channels, double steps, int zero,
                      int threads) {
    long line = (width + 2) * channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (height * width * channels > FEW)
    for (long row = 0; row < height + 2; row++) {
        uint8_t *to = values + row * line;
        if (row == 0 || row == height + 1) {
            memset(to, zero, line);
            continue;
        }
        memset(to, zero, channels);
        round_all(x + (row - 1) * width * channels, to + channels, width * channels, (float)steps, zero);
        memset(to + line - channels, zero, channels);
    }
}

typedef struct {
    floats even, odd;
} numbers;

INLINE numbers scaled(const uint16_t *y, float scale, const float *bias) {
    words pair;
    floats even, odd;
    memcpy(&pair, y, sizeof pair);
    memcpy(&even, bias, sizeof even);
    memcpy(&odd, bias + LANES, sizeof odd);
    return (numbers){evens(pair) * scale + even, odds(pair) * scale + odd};
}

EACH void scale_token(uint16_t *y, const uint16_t *gate, long outer, float scale, const float *bias,
                      const float *gate_bias) {
    for (long i = 0; i < outer; i += PAIR) {
        numbers both = scaled(y + i, scale, bias + i);
        if (gate) {
            numbers gates = scaled(gate + i, scale, gate_bias + i);
            both.even *= gelu(gates.even), both.odd *= gelu(gates.odd);
        }
        words pair = paired(both.even, both.odd);
        memcpy(y + i, &pair, sizeof pair);
    }
}

/* Products [tokens, outer] of values times what 1 stands for in their token, plus a bias; times the same of gates after
GELU, where there are some. In place; outer is a multiple of 32, and of each 32 of a bias evens come before odds. */
void dequantize(uint16_t *y, const uint16_t *gate, const float *scales, const float *bias, const float *gate_bias,
                long tokens, long outer, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * outer > FEW)
    for (long token = 0; token < tokens; token++)
        scale_token(y + token * outer, gate ? gate + token * outer : 0, outer, scales[token], bias, gate_bias);
}

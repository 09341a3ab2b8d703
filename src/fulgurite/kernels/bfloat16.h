/* Numbers in bfloat16 on their way into products and out, as processors do it that multiply them (AVX-512 BF16). */

INLINE words load_halves(const uint16_t *from) {
    halves half;
    memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, words);
}

INLINE floats load_numbers(const number *from) { return (floats)(load_halves(from) << 16); }

INLINE void store(floats x, number *to) {
    halves half = __builtin_convertvector(to_nearest(x) >> 16, halves);
    memcpy(to, &half, sizeof half);
}

/* A block's keys, those from count on as zeros, to tiles of pairs of their numbers: [2][wide / 32][16][16][2]. */
INLINE void turn(const number *k, long apart, long count, long wide, number *tiles) {
    ints at = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * (int32_t)apart;
    for (long first = 0; first < DEPTH; first += SIDE, k += SIDE * apart) {
        long left = count - first < SIDE ? count - first : SIDE;
        __mmask16 there = left > 0 ? (1 << left) - 1 : 0;
        for (long i = 0; i < wide; i += 2, tiles += 2 * SIDE)
            _mm512_storeu_si512(tiles, _mm512_mask_i32gather_epi32((__m512i){}, there, (__m512i)at, k + i, 2));
    }
}

/* A tile's depth of keys' values, those from count on as zeros, to tiles of pairs of keys: [wide / 16][16][16][2]. */
INLINE void lay_out(const number *v, long apart, long count, long wide, number *tiles) {
    for (long i = 0; i < wide; i += SIDE)
        for (long key = 0; key < DEPTH; key += 2, tiles += 2 * SIDE) {
            words pair = {};
            if (key < count) pair = load_halves(v + key * apart + i);
            if (key + 1 < count) pair |= load_halves(v + (key + 1) * apart + i) << 16;
            memcpy(tiles, &pair, sizeof pair);
        }
}

/* 2 to the power of t, off by 8e-5 of the value at most, a fiftieth of bfloat16's last place; below what a number can
be, 0. */
INLINE floats power(floats t) {
    floats f = (floats)_mm512_reduce_ps((__m512)t, 1); /* what is above the whole number beneath */
    floats y = 0.99992523f + f * (0.69583334f + f * (0.22606771f + f * 0.07802414f));
    return (floats)_mm512_scalef_ps((__m512)y, (__m512)t);
}

/* The highest of so many, whole vectors; what is no number is passed over. */
INLINE float highest(const float *x, long count) {
    __m512 most = _mm512_set1_ps(NONE);
    for (long i = 0; i < count; i += LANES) most = _mm512_max_ps((__m512)load(x + i), most);
    return _mm512_reduce_max_ps(most);
}

INLINE float added_up(floats x) { return _mm512_reduce_add_ps((__m512)x); }

/* A pair of vectors, the low numbers first. */
INLINE void store_two(floats low, floats high, number *to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

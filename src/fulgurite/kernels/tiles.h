/* What all that is computed on the matrix tiles of x86 processors (AMX) shares. */
#include "vectors.h"

enum { SIDE = 16, DEPTH = 32, BLOCK = 2 * SIDE }; /* of tiles: rows and columns, numbers summed at a time; of outputs */

#ifdef __x86_64__
#include <immintrin.h>

#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights; of the first and the second sixteen positions. */
TILES static inline void configure(int first, int second) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 4 * LANES, tiles.rows[i] = SIDE;
    tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = first;
    tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = second ? second : 1;
    _tile_loadconfig(&tiles);
}

/* Adds to tiles 0 to 3, a block's sums, the products of so many thirty-twos of its positions' inputs, from x on, and of its
outputs' weights; the second sixteen outputs' weights are next further on. Only of the first sixteen positions where not
low, of outputs where not wide. */
TILES INLINE void add_products(const uint16_t *x, long apart, const uint16_t *weight, long next, long step, long depths,
                               int low, int wide) {
    for (; depths; depths--, x += DEPTH, weight += step) {
        _tile_loadd(4, x, 2 * apart);
        _tile_loadd(6, weight, 4 * LANES);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            _tile_loadd(7, weight + next, 4 * LANES);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (low) {
            _tile_loadd(5, x + SIDE * apart, 2 * apart);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (low && wide) _tile_dpbf16ps(3, 5, 7);
    }
}

TILES INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums from where store_sums has put them: rows are so many numbers apart. */
TILES INLINE void load_sums(const float *sums, long apart, int low, int wide) {
    _tile_loadd(0, sums, 4 * apart);
    if (wide) _tile_loadd(1, sums + SIDE, 4 * apart);
    if (low) _tile_loadd(2, sums + SIDE * apart, 4 * apart);
    if (low && wide) _tile_loadd(3, sums + SIDE * apart + SIDE, 4 * apart);
}

TILES INLINE void store_sums(float *sums, long apart, int low, int wide) {
    _tile_stored(0, sums, 4 * apart);
    if (wide) _tile_stored(1, sums + SIDE, 4 * apart);
    if (low) _tile_stored(2, sums + SIDE * apart, 4 * apart);
    if (low && wide) _tile_stored(3, sums + SIDE * apart + SIDE, 4 * apart);
}

TILES INLINE floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

TILES INLINE words load_halves(const uint16_t *from) {
    halves half;
    memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, words);
}

TILES INLINE void store(floats x, uint16_t *to) {
    halves half = __builtin_convertvector(to_nearest(x) >> 16, halves);
    memcpy(to, &half, sizeof half);
}
#endif

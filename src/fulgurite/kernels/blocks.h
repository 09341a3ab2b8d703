/*
Products of a block of up to 32 positions with up to 32 outputs' weights, in bfloat16, summed in float32: on the matrix
tiles of x86 processors (AMX) or on their vectors (AVX-512 BF16), whichever of the two this is compiled for.

Weights come in tiles: of sixteen outputs and thirty-two inputs [16][16][2], pairs of inputs innermost.
*/
#include <immintrin.h>

#include "vectors.h"

enum { SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH }; /* a tile's outputs; the numbers that it sums; all of its numbers */
enum { BLOCK = 2 * SIDE };                           /* a block's positions, and its outputs */

typedef struct {
    long apart, depths; /* numbers from a position to the next; thirty-twos of numbers that are summed */
    long next, step;    /* numbers from a tile to that of the next sixteen outputs, of the next thirty-two inputs */
    long taps, kernel;  /* of a convolution, three on each line; numbers from a tap's tiles to the next one's */
    long aside, below;  /* numbers from what a tap sees to what the next one does, on its line and on the next line */
    const long *places; /* numbers from x to each position; or nothing: they are so far apart, from x on */
} operands;

/* Numbers from a position to what a tap sees of it. */
INLINE long shift_of(const operands *o, long tap) { return tap / 3 * o->below + tap % 3 * o->aside; }

INLINE floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE words load_halves(const uint16_t *from) {
    halves half;
    memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, words);
}

INLINE void store(floats x, uint16_t *to) {
    halves half = __builtin_convertvector(to_nearest(x) >> 16, halves);
    memcpy(to, &half, sizeof half);
}

#ifdef __AMX_BF16__
enum { EVENLY = 1 }; /* a block's positions must be equally far apart, also where they have places */

typedef struct {
    int first, second; /* positions that tiles are configured for, of the first and of the second sixteen */
} unit;

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights; of the first and the second sixteen positions. */
INLINE void prepare(unit *u, long rows) {
    int first = rows < SIDE ? rows : SIDE, second = rows - first;
    if (first == u->first && second == u->second) return;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 4 * LANES, tiles.rows[i] = SIDE;
    tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = u->first = first;
    u->second = second;
    tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = second ? second : 1;
    _tile_loadconfig(&tiles);
}

INLINE void release(unit *u) {
    if (u->first) _tile_release();
}

INLINE void sum_tiles(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                      int low, int wide) {
    if (onto) {
        _tile_loadd(0, sums, 4 * sums_apart);
        if (wide) _tile_loadd(1, sums + SIDE, 4 * sums_apart);
        if (low) _tile_loadd(2, sums + SIDE * sums_apart, 4 * sums_apart);
        if (low && wide) _tile_loadd(3, sums + SIDE * sums_apart + SIDE, 4 * sums_apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long tap = 0; tap < o->taps; tap++) {
        const uint16_t *inputs = x + shift_of(o, tap), *tiles = weight + tap * o->kernel;
        for (long left = o->depths; left; left--, inputs += DEPTH, tiles += o->step) {
            _tile_loadd(4, inputs, 2 * o->apart);
            _tile_loadd(6, tiles, 4 * LANES);
            _tile_dpbf16ps(0, 4, 6);
            if (wide) {
                _tile_loadd(7, tiles + o->next, 4 * LANES);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (low) {
                _tile_loadd(5, inputs + SIDE * o->apart, 2 * o->apart);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (low && wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * sums_apart);
    if (wide) _tile_stored(1, sums + SIDE, 4 * sums_apart);
    if (low) _tile_stored(2, sums + SIDE * sums_apart, 4 * sums_apart);
    if (low && wide) _tile_stored(3, sums + SIDE * sums_apart + SIDE, 4 * sums_apart);
}

/* Puts the block's products with inputs from x on, and tiles from weight on, where sums are, or adds them onto what is
there. Of so many rows, as the unit is prepared for; of the first sixteen outputs alone where not wide. */
INLINE void sum_block(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                      long rows, int wide) {
    if (o->places) x += o->places[0];
    if (rows > SIDE && wide) /* almost always: known to the compiler, so that nothing is asked between products */
        sum_tiles(o, x, weight, sums, sums_apart, onto, 1, 1);
    else
        sum_tiles(o, x, weight, sums, sums_apart, onto, rows > SIDE, wide);
}

#else
enum { EVENLY = 0 };

typedef struct {
} unit;

INLINE void prepare(unit *u, long rows) {}
INLINE void release(unit *u) {}

enum { ROWS = 8 }; /* whose sums the registers hold at a time */

/* Of so many rows, from the first one on; how many, and whether wide, is known to the compiler. */
INLINE void sum_some(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                     long first, const int rows, const int wide) {
    const uint16_t *inputs[ROWS];
    __m512 sum[ROWS][2];
    sums += first * sums_apart;
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
        inputs[row] = x + (o->places ? o->places[first + row] : (first + row) * o->apart);
#pragma GCC unroll 2
        for (int half = 0; half <= wide; half++)
            sum[row][half] = onto ? _mm512_loadu_ps(sums + row * sums_apart + half * SIDE) : _mm512_setzero_ps();
    }
    for (long tap = 0; tap < o->taps; tap++) {
        const uint16_t *tiles = weight + tap * o->kernel;
        long from = shift_of(o, tap), end = from + DEPTH * o->depths;
        for (; from < end; from += DEPTH, tiles += o->step)
            for (long pair = 0; pair < DEPTH; pair += 2) {
                __m512bh both[2];
#pragma GCC unroll 2
                for (int half = 0; half <= wide; half++)
                    both[half] = (__m512bh)_mm512_loadu_si512(tiles + half * o->next + pair * SIDE);
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++) {
                    int32_t two;
                    memcpy(&two, inputs[row] + from + pair, sizeof two);
                    __m512bh input = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
                    for (int half = 0; half <= wide; half++)
                        sum[row][half] = _mm512_dpbf16_ps(sum[row][half], input, both[half]);
                }
            }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int half = 0; half <= wide; half++) _mm512_storeu_ps(sums + row * sums_apart + half * SIDE, sum[row][half]);
}

INLINE void sum_rows(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                     long first, const int rows, int wide) {
    if (wide)
        sum_some(o, x, weight, sums, sums_apart, onto, first, rows, 1);
    else
        sum_some(o, x, weight, sums, sums_apart, onto, first, rows, 0);
}

/* As on tiles. */
INLINE void sum_block(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                      long rows, int wide) {
    long row = 0;
    for (; row + ROWS <= rows; row += ROWS) sum_rows(o, x, weight, sums, sums_apart, onto, row, ROWS, wide);
    for (; row + 2 <= rows; row += 2) sum_rows(o, x, weight, sums, sums_apart, onto, row, 2, wide);
    if (row < rows) sum_rows(o, x, weight, sums, sums_apart, onto, row, 1, wide);
}
#endif

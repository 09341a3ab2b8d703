/*
Linear layers, 3x3 convolutions and attention of small networks in bfloat16, on the matrix tiles of x86 processors (AMX).

For each call oneDNN looks up what it made for these shapes, which takes longer than the product of a few dozen tokens
with a small weight. Large ones are oneDNN's: here a weight is gone through again for every 32 positions.

The first two are the same product. A convolution's picture is padded by zeros and then a sequence of positions, lines
one after the other, each w + 2 long; a tap's positions are the same ones, some further on, so that rows of a tile are
as far apart in memory as a linear layer's. What comes out at the two positions between lines is dropped.
*/
#include "vectors.h"

enum { SIDE = 16, DEPTH = 32, BLOCK = 2 * SIDE }; /* of tiles: rows and columns, numbers summed at a time; of outputs */
enum { ALONE = 1 << 20 };                         /* multiplications; so few are for one thread */

#ifdef __x86_64__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,fma")))

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    const uint16_t *x, *weight; /* weight: [taps][outer / 16][inner / 32][16][16][2], pairs of inner innermost */
    const float *bias;
    const uint16_t *factor; /* what the outputs are multiplied by, of their shape; or nothing */
    uint16_t *y;
    long pictures, apart, positions; /* apart: positions from one picture's first to the next one's */
    long spread, kept;               /* positions from one line's first to the next one's; those that are put out */
    long inner, outer, taps;
    int with_gelu;
} product;

/* Whether this processor has tiles, and the system lets this process use them. */
int has_tiles(void) {
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           !syscall(SYS_arch_prctl, request, tile_data);
}

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights; of the first and the second sixteen positions. */
TILES static void configure(int first, int second) {
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

/* Products summed for a block of positions, from x on, and of outputs, from weight on; or for half of the one, of the
other. */
TILES INLINE void sum_up(const product *p, const uint16_t *x, const uint16_t *weight, int low, int wide,
                         float (*sums)[BLOCK]) {
    long stride = 2 * p->inner, next = SIDE * p->inner, lower = SIDE * p->inner;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long tap = 0; tap < p->taps; tap++) {
        const uint16_t *a = x + (tap / 3 * p->spread + tap % 3) * p->inner, *b = weight + tap * p->inner * p->outer;
        for (long k = 0; k < p->inner; k += DEPTH, a += DEPTH, b += SIDE * DEPTH) {
            _tile_loadd(4, a, stride);
            _tile_loadd(6, b, 4 * LANES);
            _tile_dpbf16ps(0, 4, 6);
            if (wide) {
                _tile_loadd(7, b + next, 4 * LANES);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (low) {
                _tile_loadd(5, a + lower, stride);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (low && wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, &sums[0][0], sizeof *sums);
    if (wide) _tile_stored(1, &sums[0][SIDE], sizeof *sums);
    if (low) _tile_stored(2, &sums[SIDE][0], sizeof *sums);
    if (low && wide) _tile_stored(3, &sums[SIDE][SIDE], sizeof *sums);
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

/* Sums of sixteen outputs of a position to bfloat16, with what comes after the product. */
TILES INLINE void put_out(const product *p, const float *sums, const float *bias, long at) {
    floats y = load(sums) + load(bias);
    if (p->with_gelu) y = gelu(y);
    if (p->factor) y *= (floats)(load_halves(p->factor + at) << 16);
    store(y, p->y + at);
}

/* This thread's share of the product. */
TILES static void multiply(const product *p) {
    long blocks = (p->positions + BLOCK - 1) / BLOCK, columns = (p->outer + BLOCK - 1) / BLOCK;
    long lines = (p->positions + p->spread - 1) / p->spread;
    int first = 0, second = 0; /* rows that tiles are configured for */
    float sums[BLOCK][BLOCK] __attribute__((aligned(64)));
#pragma omp for schedule(static)
    for (long job = 0; job < p->pictures * blocks * columns; job++) {
        long column = job % columns * BLOCK, start = job / columns % blocks * BLOCK, picture = job / columns / blocks;
        long left = p->positions - start < BLOCK ? p->positions - start : BLOCK;
        int high = left < SIDE ? left : SIDE, low = left - high, wide = column + SIDE < p->outer;
        if (high != first || low != second) configure(first = high, second = low);
        const uint16_t *x = p->x + (picture * p->apart + start) * p->inner, *weight = p->weight + column * p->inner;
        if (low && wide) /* almost always: known to the compiler, so that nothing is asked between products */
            sum_up(p, x, weight, 1, 1, sums);
        else
            sum_up(p, x, weight, low, wide, sums);
        for (long row = 0; row < left; row++) {
            long line = (start + row) / p->spread, place = (start + row) % p->spread;
            if (place >= p->kept) continue;
            long at = ((picture * lines + line) * p->kept + place) * p->outer + column;
            put_out(p, sums[row], p->bias + column, at);
            if (wide) put_out(p, sums[row] + SIDE, p->bias + column + SIDE, at + SIDE);
        }
    }
    if (first) _tile_release();
}

/* Tokens [tokens, inner] to [tokens, outer]; inner is a multiple of 32, outer one of 16. */
void linear(const uint16_t *x, const uint16_t *weight, const float *bias, const uint16_t *factor, uint16_t *y,
            long tokens, long inner, long outer, int with_gelu, int threads) {
    product p = {x, weight, bias, factor, y, 1, 0, tokens, tokens, tokens, inner, outer, 1, with_gelu};
#pragma omp parallel num_threads(threads) if (tokens * inner * outer > ALONE)
    multiply(&p);
}

/* Channels-last pictures [pictures, height, width, inner] to [.., outer], 3x3, zeros around; padded: room for
[pictures, height + 2, width + 2, inner]. */
void convolve(const uint16_t *x, uint16_t *padded, const uint16_t *weight, const float *bias, uint16_t *y, long pictures,
              long height, long width, long inner, long outer, int threads) {
    long spread = width + 2, apart = (height + 2) * spread, positions = apart - 2 * spread - 2;
    product p = {padded, weight, bias, 0, y, pictures, apart, positions, spread, width, inner, outer, 9, 0};
#pragma omp parallel num_threads(threads) if (9 * pictures * positions * inner * outer > ALONE)
    {
#pragma omp for schedule(static)
        for (long line = 0; line < pictures * (height + 2); line++) {
            long within = line % (height + 2) - 1, picture = line / (height + 2);
            uint16_t *to = padded + line * spread * inner;
            memset(to, 0, 2 * spread * inner);
            if (within >= 0 && within < height)
                memcpy(to + inner, x + (picture * height + within) * width * inner, 2 * width * inner);
        }
        multiply(&p);
    }
}

/* Sixteen rows of 32 numbers, those of rows from count on as zeros, to sixteen columns of pairs. */
TILES INLINE void turn(const uint16_t *rows, long apart, long count, uint32_t (*pairs)[SIDE]) {
    __mmask16 there = count < SIDE ? (1 << (count < 0 ? 0 : count)) - 1 : 0xFFFF;
    ints at = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * (int32_t)apart;
    for (int i = 0; i < DEPTH / 2; i++, at += 2)
        _mm512_store_epi32(pairs[i], _mm512_mask_i32gather_epi32((__m512i){}, there, (__m512i)at, rows, 2));
}

/* 32 rows of 16 numbers, those of rows from count on as zeros, to pairs of rows. */
TILES INLINE void pair_up(const uint16_t *rows, long apart, long count, uint32_t (*pairs)[SIDE]) {
    for (long row = 0; row < DEPTH; row += 2, rows += 2 * apart) {
        words pair = {};
        if (row < count) pair = load_halves(rows);
        if (row + 1 < count) pair |= load_halves(rows + apart) << 16;
        memcpy(pairs[row / 2], &pair, sizeof pair);
    }
}

/* Scores of so many keys to weights in bfloat16, beyond the keys zeros. Gives 1 over their sum. */
TILES INLINE float softmax(float *scores, uint16_t *weights, long keys, long room, float scale) {
    const float none = -3e38f;
    for (long i = keys; i < room; i++) scores[i] = none;
    floats most = load(scores), sum = {};
    for (long i = LANES; i < room; i += LANES) most = (floats)_mm512_max_ps((__m512)load(scores + i), (__m512)most);
    floats top = (floats){} + _mm512_reduce_max_ps((__m512)most);
    for (long i = 0; i < room; i += LANES) {
        floats less = (load(scores + i) - top) * scale, weight = power_of_2(less) + (less - less);
        sum += weight; /* what is no number stays none, by the difference */
        store(weight, weights + i);
    }
    return 1 / _mm512_reduce_add_ps((__m512)sum);
}

enum { MOST_KEYS = 256, MOST_WIDE = 64 }; /* keys; numbers of a head: who calls sees to it (compiled.py) */

typedef struct {
    const uint16_t *q, *k, *v; /* a head's first number */
    uint16_t *y;
    long q_apart, kv_apart, y_apart; /* numbers from a token to the next */
    long queries, keys, wide;
    float scale; /* of scores, for powers of 2 */
} head;

TILES static void attend_head(const head *h) {
    uint32_t turned[MOST_KEYS / SIDE][MOST_WIDE / DEPTH][DEPTH / 2][SIDE] __attribute__((aligned(64)));
    uint32_t paired[MOST_KEYS / DEPTH][MOST_WIDE / SIDE][DEPTH / 2][SIDE] __attribute__((aligned(64)));
    float scores[SIDE][MOST_KEYS] __attribute__((aligned(64))), sums[SIDE][SIDE] __attribute__((aligned(64)));
    uint16_t weights[SIDE][MOST_KEYS] __attribute__((aligned(64)));
    long room = (h->keys + DEPTH - 1) / DEPTH * DEPTH;
    for (long key = 0; key < room; key += SIDE)
        for (long i = 0; i < h->wide; i += DEPTH)
            turn(h->k + key * h->kv_apart + i, h->kv_apart, h->keys - key, turned[key / SIDE][i / DEPTH]);
    for (long key = 0; key < room; key += DEPTH)
        for (long i = 0; i < h->wide; i += SIDE)
            pair_up(h->v + key * h->kv_apart + i, h->kv_apart, h->keys - key, paired[key / DEPTH][i / SIDE]);
    for (long query = 0; query < h->queries; query += SIDE) {
        long count = h->queries - query < SIDE ? h->queries - query : SIDE;
        if (query == 0 || count < SIDE) configure(count, 0);
        for (long key = 0; key < room; key += SIDE) {
            _tile_zero(0);
            for (long i = 0; i < h->wide; i += DEPTH) {
                _tile_loadd(4, h->q + query * h->q_apart + i, 2 * h->q_apart);
                _tile_loadd(6, turned[key / SIDE][i / DEPTH], 4 * SIDE);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, &scores[0][key], sizeof *scores);
        }
        float share[SIDE];
        for (long i = 0; i < count; i++) share[i] = softmax(scores[i], weights[i], h->keys, room, h->scale);
        for (long i = 0; i < h->wide; i += SIDE) {
            _tile_zero(0);
            for (long key = 0; key < room; key += DEPTH) {
                _tile_loadd(4, &weights[0][key], sizeof *weights);
                _tile_loadd(6, paired[key / DEPTH][i / SIDE], 4 * SIDE);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, sums, sizeof *sums);
            for (long j = 0; j < count; j++) store(load(sums[j]) * share[j], h->y + (query + j) * h->y_apart + i);
        }
    }
    _tile_release();
}

/* Scaled dot-product attention (Vaswani et al., arXiv 1706.03762): tokens [rows, queries or keys, heads * wide], keys
and values equally far apart, to [rows, queries, heads * wide]. Keys are at most 256, wide is 32 or 64. */
void attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *y, long q_apart, long kv_apart, long rows,
            long queries, long keys, long heads, long wide, double scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * queries * keys * heads * wide > ALONE / 8)
    for (long i = 0; i < rows * heads; i++) {
        long row = i / heads, first = i % heads * wide, y_apart = heads * wide;
        attend_head(&(head){q + row * queries * q_apart + first, k + row * keys * kv_apart + first,
                            v + row * keys * kv_apart + first, y + row * queries * y_apart + first, q_apart, kv_apart,
                            y_apart, queries, keys, wide, (float)(scale * 1.4426950408889634)});
    }
}

#else
int has_tiles(void) { return 0; }
#endif

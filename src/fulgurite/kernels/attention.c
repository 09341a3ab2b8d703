/*
Scaled dot-product attention (Vaswani et al., arXiv 1706.03762) in bfloat16, in one pass over the keys.

A block of queries goes through the keys a few hundred at a time, so that scores and weights stay in the nearest cache;
what was summed by the highest score so far is reduced where a higher one comes (Dao et al., arXiv 2205.14135). A query's
bits depend neither on the queries beside it nor on the threads.
*/
#include "blocks.h"

enum { KEYS = 256, MOST_WIDE = 512 }; /* keys at a time; numbers of a head: who calls sees to it (compiled.py) */
enum { ALONE = 1 << 17 };             /* multiplications; so few are for one thread */

static const float NONE = -3e38f; /* the score of a key that is not there */

typedef struct {
    long q_apart;    /* numbers from a query to the next */
    long keys, room; /* room: keys filled up to whole tiles */
    long heads, wide;
    float scale; /* of scores, for powers of 2 */
} attention;

/* 32 keys, those from count on as zeros, to tiles of pairs of their numbers: [2][wide / 32][16][16][2]. */
static void turn(const uint16_t *k, long apart, long count, long wide, uint16_t *tiles) {
    ints at = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * (int32_t)apart;
    for (long first = 0; first < DEPTH; first += SIDE, k += SIDE * apart) {
        long left = count - first < SIDE ? count - first : SIDE;
        __mmask16 there = left > 0 ? (1 << left) - 1 : 0;
        for (long i = 0; i < wide; i += 2, tiles += 2 * SIDE)
            _mm512_storeu_si512(tiles, _mm512_mask_i32gather_epi32((__m512i){}, there, (__m512i)at, k + i, 2));
    }
}

/* 32 keys' values, those from count on as zeros, to tiles of pairs of keys: [wide / 16][16][16][2]. */
static void pair_up(const uint16_t *v, long apart, long count, long wide, uint16_t *tiles) {
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

/* A query's scores of so many keys to weights. Where the highest is above what it was, top, weights before it become
less: gives the factor. */
INLINE float softmax(const float *scores, uint16_t *weights, long keys, float scale, float *top, floats *sum) {
    __m512 most = _mm512_set1_ps(NONE);
    for (long i = 0; i < keys; i += LANES) most = _mm512_max_ps((__m512)load(scores + i), most);
    float before = *top, now = scale * _mm512_reduce_max_ps(most);
    if (now > before) *top = now;
    float less = ((floats)power((floats){} + (before - *top)))[0];
    floats added = *sum * less;
    for (long i = 0; i < keys; i += 2 * LANES) {
        floats low = power(load(scores + i) * scale - *top), high = power(load(scores + i + LANES) * scale - *top);
        added += low;
        added += high;
        _mm512_storeu_si512(weights + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
    *sum = added;
    return less;
}

/* A block of up to 32 queries of a head. */
INLINE void attend_block(const attention *a, const uint16_t *q, const uint16_t *turned, const uint16_t *paired,
                         uint16_t *y, long count) {
    operands of_keys = {a->q_apart, a->wide / DEPTH, SIDE * a->wide, TILE, .taps = 1};
    float scores[BLOCK][KEYS] __attribute__((aligned(64))), sums[BLOCK * MOST_WIDE] __attribute__((aligned(64)));
    uint16_t weights[BLOCK][KEYS] __attribute__((aligned(64)));
    float tops[BLOCK];
    floats shares[BLOCK] = {};
    for (long i = 0; i < count; i++) tops[i] = NONE;
    memset(sums, 0, count * a->wide * sizeof *sums);
    for (long from = 0; from < a->room; from += KEYS) {
        long keys = a->room - from < KEYS ? a->room - from : KEYS;
        for (long key = 0; key < keys; key += BLOCK)
            sum_block(&of_keys, q, turned + (from + key) * a->wide, &scores[0][key], KEYS, 0, count, 1);
        for (long i = 0; i < count; i++) {
            for (long key = a->keys - from; key < keys; key++) scores[i][key] = NONE;
            float less = softmax(scores[i], weights[i], keys, a->scale, &tops[i], &shares[i]);
            if (less != 1)
                for (long j = 0; j < a->wide; j++) sums[i * a->wide + j] *= less;
        }
        operands of_values = {KEYS, keys / DEPTH, TILE, DEPTH * a->wide, .taps = 1};
        for (long j = 0; j < a->wide; j += BLOCK)
            sum_block(&of_values, weights[0], paired + from * a->wide + j * DEPTH, sums + j, a->wide, 1, count, 1);
    }
    for (long i = 0; i < count; i++) {
        float share = 1 / _mm512_reduce_add_ps((__m512)shares[i]);
        const float *sum = sums + i * a->wide;
        uint16_t *to = y + i * a->heads * a->wide;
        for (long j = 0; j < a->wide; j += SIDE) store(load(sum + j) * share, to + j);
    }
}

/* Tokens [rows, queries or keys, heads * wide], keys and values equally far apart, to [rows, queries, heads * wide].
Wide is a multiple of 32 up to 512; scratch: room for 2 * [rows, heads, keys up to whole thirty-twos, wide]. */
void attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *y, uint16_t *scratch, long q_apart,
            long kv_apart, long rows, long queries, long keys, long heads, long wide, double scale, int threads) {
    long room = (keys + DEPTH - 1) / DEPTH * DEPTH, blocks = (queries + BLOCK - 1) / BLOCK;
    uint16_t *turned = scratch, *paired = scratch + rows * heads * room * wide;
    attention a = {q_apart, keys, room, heads, wide, (float)(scale * 1.4426950408889634)};
#pragma omp parallel num_threads(threads) if (rows * queries * keys * heads * wide > ALONE)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < rows * heads * (room / DEPTH); i++) {
            long key = i % (room / DEPTH) * DEPTH, head = i / (room / DEPTH);
            long from = (head / heads * keys + key) * kv_apart + head % heads * wide, to = (head * room + key) * wide;
            turn(k + from, kv_apart, keys - key, wide, turned + to);
            pair_up(v + from, kv_apart, keys - key, wide, paired + to);
        }
        unit u = {};
#pragma omp for schedule(static)
        for (long i = 0; i < rows * heads * blocks; i++) {
            long query = i % blocks * BLOCK, head = i / blocks;
            long left = queries - query < BLOCK ? queries - query : BLOCK;
            long token = head / heads * queries + query, place = head % heads * wide, tiles = head * room * wide;
            prepare(&u, left);
            const uint16_t *from = q + token * q_apart + place;
            uint16_t *to = y + token * heads * wide + place;
            attend_block(&a, from, turned + tiles, paired + tiles, to, left);
        }
        release(&u);
    }
}

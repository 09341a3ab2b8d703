/*
Scaled dot-product attention (Vaswani et al., arXiv 1706.03762) in one pass over the keys.

A block of queries goes through the keys a few hundred at a time, so that scores and weights stay in the nearest cache;
what was summed by the highest score so far is reduced where a higher one comes (Dao et al., arXiv 2205.14135). A query's
bits depend neither on the queries beside it nor on the threads.
*/
#include "blocks.h"

enum { KEYS = 256, MOST_WIDE = 512 }; /* keys at a time; numbers of a head: who calls sees to it (compiled.py) */
enum { ALONE = 1 << 17 };             /* multiplications; so few are for one thread */

typedef struct {
    long q_apart;    /* numbers from a query to the next */
    long keys, room; /* room: keys filled up to whole blocks */
    long heads, wide;
    float scale; /* of scores, for powers of 2 */
} attention;

/* A query's scores of so many keys to weights. Where the highest is above what it was, top, weights before it become
less: gives the factor. */
INLINE float softmax(const float *scores, number *weights, long keys, float scale, float *top, floats *sum) {
    float before = *top, now = scale * highest(scores, keys);
    if (now > before) *top = now;
    float less = ((floats)power((floats){} + (before - *top)))[0];
    floats added = *sum * less;
    for (long i = 0; i < keys; i += 2 * LANES) {
        floats low = power(load(scores + i) * scale - *top), high = power(load(scores + i + LANES) * scale - *top);
        added += low;
        added += high;
        store_two(low, high, weights + i);
    }
    *sum = added;
    return less;
}

/* A block of up to 32 queries of a head. */
INLINE void attend_block(const attention *a, const number *q, const number *turned, const number *laid_out,
                         number *y, long count) {
    operands of_keys = {a->q_apart, a->wide / DEPTH, SIDE * a->wide, TILE, .taps = 1};
    float scores[BLOCK][KEYS] __attribute__((aligned(64))), sums[BLOCK * MOST_WIDE] __attribute__((aligned(64)));
    number weights[BLOCK][KEYS] __attribute__((aligned(64)));
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
            sum_block(&of_values, weights[0], laid_out + from * a->wide + j * DEPTH, sums + j, a->wide, 1, count, 1);
    }
    for (long i = 0; i < count; i++) {
        float share = 1 / added_up(shares[i]);
        const float *sum = sums + i * a->wide;
        number *to = y + i * a->heads * a->wide;
        for (long j = 0; j < a->wide; j += LANES) store(load(sum + j) * share, to + j);
    }
}

/* Tokens [rows, queries or keys, heads * wide], keys and values equally far apart, to [rows, queries, heads * wide].
Wide is a multiple of 32 up to 512; scratch: room for 2 * [rows, heads, keys up to whole thirty-twos, wide]. */
void attend(const number *q, const number *k, const number *v, number *y, number *scratch, long q_apart,
            long kv_apart, long rows, long queries, long keys, long heads, long wide, double scale, int threads) {
    long room = (keys + BLOCK - 1) / BLOCK * BLOCK, blocks = (queries + BLOCK - 1) / BLOCK;
    number *turned = scratch, *laid_out = scratch + rows * heads * room * wide;
    attention a = {q_apart, keys, room, heads, wide, (float)(scale * 1.4426950408889634)};
#pragma omp parallel num_threads(threads) if (rows * queries * keys * heads * wide > ALONE)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < rows * heads * (room / BLOCK); i++) {
            long key = i % (room / BLOCK) * BLOCK, head = i / (room / BLOCK);
            long from = (head / heads * keys + key) * kv_apart + head % heads * wide, to = (head * room + key) * wide;
            turn(k + from, kv_apart, keys - key, wide, turned + to);
            for (long more = 0; more < BLOCK; more += DEPTH)
                lay_out(v + from + more * kv_apart, kv_apart, keys - key - more, wide, laid_out + to + more * wide);
        }
        unit u = {};
#pragma omp for schedule(static)
        for (long i = 0; i < rows * heads * blocks; i++) {
            long query = i % blocks * BLOCK, head = i / blocks;
            long left = queries - query < BLOCK ? queries - query : BLOCK;
            long token = head / heads * queries + query, place = head % heads * wide, tiles = head * room * wide;
            prepare(&u, left);
            const number *from = q + token * q_apart + place;
            number *to = y + token * heads * wide + place;
            attend_block(&a, from, turned + tiles, laid_out + tiles, to, left);
        }
        release(&u);
    }
}

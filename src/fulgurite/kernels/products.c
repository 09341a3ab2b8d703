/*
Linear layers and 3x3 convolutions of small networks, block by block.

For each call oneDNN looks up what it made for these shapes, which takes longer than the product of a few dozen tokens
with a small weight. Large ones are oneDNN's: here a weight is gone through again for every 32 positions.

Both are the same product. A convolution's picture is padded by zeros and then a sequence of positions, lines
one after the other, each w + 2 long; a tap's positions are the same ones, some further on. Tiles want rows that are
equally far apart in memory, as a linear layer's are: what comes out at positions between lines is dropped then.
*/
#include "blocks.h"

enum { ALONE = 1 << 20 }; /* multiplications; so few are for one thread */
enum { NOWHERE = -1 };    /* goes what comes out between lines */

typedef struct {
    const number *x, *weight; /* weight: [outer / 16][taps][inner / DEPTH], tiles */
    const float *bias;
    const number *factor; /* what the outputs are multiplied by, of their shape; or nothing */
    number *y;
    long pictures, lines, across; /* of outputs */
    long apart, spread, stride;   /* positions from a picture's first to the next one's, a line's; from output to output */
    long inner, outer, taps;
    int with_gelu;
} product;

/* Sums of sixteen outputs of a position to numbers, with what comes after the product. */
INLINE void put_out(const product *p, const float *sums, const float *bias, long at) {
    for (long end = at + SIDE; at < end; at += LANES, sums += LANES, bias += LANES) {
        floats y = load(sums) + load(bias);
        if (p->with_gelu) y = gelu(y);
        if (p->factor) y *= load_numbers(p->factor + at);
        store(y, p->y + at);
    }
}

/* This thread's share of the product. */
static void multiply(const product *p) {
    long counted = EVENLY ? p->spread : p->across, positions = (p->lines - 1) * counted + p->across;
    long blocks = (positions + BLOCK - 1) / BLOCK, columns = (p->outer + BLOCK - 1) / BLOCK;
    long further = p->stride * p->inner, places[BLOCK], outputs[BLOCK]; /* where a block's are */
    float sums[BLOCK][BLOCK] __attribute__((aligned(64)));
    operands o = {.apart = further, .depths = p->inner / DEPTH, .next = p->taps * SIDE * p->inner, .step = TILE};
    o.taps = p->taps, o.kernel = SIDE * p->inner, o.aside = p->inner, o.below = p->spread * p->inner, o.places = places;
    unit u = {};
#pragma omp for schedule(static)
    for (long job = 0; job < p->pictures * blocks * columns; job++) {
        long column = job % columns * BLOCK, start = job / columns % blocks * BLOCK, picture = job / columns / blocks;
        long left = positions - start < BLOCK ? positions - start : BLOCK;
        int wide = column + SIDE < p->outer;
        long line = start / counted, place = start % counted;
        for (long row = 0; row < left; row++) {
            places[row] = (line * p->spread + place) * further;
            outputs[row] = place < p->across ? (line * p->across + place) * p->outer : NOWHERE;
            if (++place == counted) place = 0, line++;
        }
        prepare(&u, left);
        const number *x = p->x + picture * p->apart * p->inner, *weight = p->weight + p->taps * column * p->inner;
        sum_block(&o, x, weight, sums[0], BLOCK, 0, left, wide);
        for (long row = 0; row < left; row++) {
            if (outputs[row] == NOWHERE) continue;
            long at = picture * p->lines * p->across * p->outer + outputs[row] + column;
            put_out(p, sums[row], p->bias + column, at);
            if (wide) put_out(p, sums[row] + SIDE, p->bias + column + SIDE, at + SIDE);
        }
    }
    release(&u);
}

/* Tokens [tokens, inner] to [tokens, outer]; both come to whole tiles. */
void linear(const number *x, const number *weight, const float *bias, const number *factor, number *y,
            long tokens, long inner, long outer, int with_gelu, int threads) {
    product p = {x, weight, bias, factor, y, 1, 1, tokens, 0, tokens, 1, inner, outer, 1, with_gelu};
#pragma omp parallel num_threads(threads) if (tokens * inner * outer > ALONE)
    multiply(&p);
}

/* Channels-last pictures [pictures, height, width, channels] to [.., outer], 3x3, zeros around, so many pixels from one
output to the next. inner: channels filled up to whole tiles, as weights are; padded: room for
[pictures, height + 2, width + 2, inner]. */
void convolve(const number *x, number *padded, const number *weight, const float *bias, number *y, long pictures,
              long height, long width, long channels, long inner, long outer, long stride, int threads) {
    long spread = width + 2, apart = (height + 2) * spread, lines = (height - 1) / stride + 1, across = (width - 1) / stride + 1;
    product p = {padded, weight, bias, 0, y, pictures, lines, across, apart, spread, stride, inner, outer, 9, 0};
#pragma omp parallel num_threads(threads) if (9 * pictures * lines * across * inner * outer > ALONE)
    {
#pragma omp for schedule(static)
        for (long line = 0; line < pictures * (height + 2); line++) {
            long within = line % (height + 2) - 1, picture = line / (height + 2);
            number *to = padded + line * spread * inner;
            memset(to, 0, spread * inner * sizeof *to);
            if (within < 0 || within >= height) continue;
            const number *from = x + (picture * height + within) * width * channels;
            if (channels == inner)
                memcpy(to + inner, from, width * inner * sizeof *to);
            else
                for (long i = 0; i < width; i++) memcpy(to + (i + 1) * inner, from + i * channels, channels * sizeof *to);
        }
        multiply(&p);
    }
}

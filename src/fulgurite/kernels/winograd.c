/*
3x3 convolutions of large pictures in float32 by minimal filtering, F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): four
by four outputs take 36 products for each channel, where they are summed one by one 144.

A picture is cut into squares of four by four outputs, which six by six pixels are behind. These are transformed, and so
are the weights, beforehand; each of the 36 numbers of a square is then a product of its own over the channels; what
comes out is transformed back. Some squares at a time go through all of that, so that what is in between stays in the
cache. A pixel's bits depend neither on the pictures beside its own nor on the threads.
*/
#include "blocks.h"

extern int omp_get_thread_num(void); /* of the library that torch has loaded */

enum { FOUR = 4, SIX = 6, ALL = SIX * SIX };
enum { SPREAD = SIDE }; /* between the 36 matrices: numbers as far apart as powers of 2 would share few places of a cache */

typedef struct {
    const float *bias;
    long height, width, inner, outer; /* of a picture of outputs */
    long larger;                      /* how many times as large it is as what x has, by nearest neighbours: 1 or 2 */
    long lines, places;               /* of a picture of x */
    long across, squares;             /* of a line, of a picture */
} filter;

typedef struct {
    long picture, line, column; /* of its first output */
} square;

INLINE square square_at(const filter *f, long i) {
    long within = i % f->squares;
    return (square){i / f->squares, within / f->across * FOUR, within % f->across * FOUR};
}

/* Six values in a line to six: products of these and of the weights' are those of polynomials at 0, 1, -1, 2, -2 and at
infinity. */
INLINE void there(const floats d[SIX], floats v[SIX]) {
    floats even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
    floats even_2 = d[4] - d[2], odd_2 = 2.0f * (d[3] - d[1]);
    v[0] = d[4] + 4.0f * d[0] - 5.0f * d[2];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = even_2 + odd_2;
    v[4] = even_2 - odd_2;
    v[5] = d[5] + 4.0f * d[1] - 5.0f * d[3];
}

/* Six products in a line to four outputs. */
INLINE void back(const floats m[SIX], floats y[FOUR]) {
    floats even = m[1] + m[2], odd = m[1] - m[2], even_2 = m[3] + m[4], odd_2 = m[3] - m[4];
    y[0] = m[0] + even + even_2;
    y[1] = odd + 2.0f * odd_2;
    y[2] = even + 4.0f * even_2;
    y[3] = odd + 8.0f * odd_2 + m[5];
}

/* Where x has what is at this line and column. */
INLINE long place_of(const filter *f, long line, long column) { return line / f->larger * f->places + column / f->larger; }

/* The pixels behind a square, from this line and column on, transformed: [36], so far apart, of inner. */
static void transform(const filter *f, const number *picture, long line, long column, float *to, long apart) {
    for (long channel = 0; channel < f->inner; channel += LANES) {
        floats half[SIX][SIX];
        for (long j = 0; j < SIX; j++) {
            floats d[SIX] = {}, v[SIX];
            if (column + j >= 0 && column + j < f->width)
                for (long i = 0; i < SIX; i++)
                    if (line + i >= 0 && line + i < f->height)
                        d[i] = load_numbers(picture + place_of(f, line + i, column + j) * f->inner + channel);
            there(d, v);
            for (long i = 0; i < SIX; i++) half[i][j] = v[i];
        }
        for (long i = 0; i < SIX; i++) {
            floats v[SIX];
            there(half[i], v);
            for (long j = 0; j < SIX; j++) store(v[j], to + (i * SIX + j) * apart + channel);
        }
    }
}

/* A square's products to its outputs, from this line and column on. */
static void put_back(const filter *f, const float *from, long apart, number *picture, long line, long column) {
    for (long channel = 0; channel < f->outer; channel += LANES) {
        floats half[FOUR][SIX];
        for (long j = 0; j < SIX; j++) {
            floats m[SIX], y[FOUR];
            for (long i = 0; i < SIX; i++) m[i] = load(from + (i * SIX + j) * apart + channel);
            back(m, y);
            for (long i = 0; i < FOUR; i++) half[i][j] = y[i];
        }
        for (long i = 0; i < FOUR && line + i < f->height; i++) {
            floats y[FOUR];
            back(half[i], y);
            for (long j = 0; j < FOUR && column + j < f->width; j++)
                store(y[j] + load(f->bias + channel), picture + ((line + i) * f->width + column + j) * f->outer + channel);
        }
    }
}

/* Channels-last pictures [pictures, .., inner], as large as the outputs or half as large, to [pictures, height, width,
outer], zeros around; inner and outer are whole sixteens. So many squares at a time, up to 32. weight: [outer / 16][36]
[inner / 16], tiles; scratch: for each thread room for 36 * (squares * (inner + outer) + 32). */
void convolve_large(const number *x, const number *weight, const float *bias, number *y, float *scratch, long pictures,
                    long height, long width, long inner, long outer, long larger, long at_once, int threads) {
    filter f = {bias, height, width, inner, outer, larger};
    f.lines = (height + larger - 1) / larger, f.places = (width + larger - 1) / larger;
    f.across = (width + FOUR - 1) / FOUR, f.squares = f.across * ((height + FOUR - 1) / FOUR);
    long all = pictures * f.squares, before = at_once * inner + SPREAD, after = at_once * outer + SPREAD;
    operands o = {inner, inner / DEPTH, ALL * SIDE * inner, TILE, .taps = 1};
#pragma omp parallel num_threads(threads)
    {
        float *transformed = scratch + omp_get_thread_num() * ALL * (before + after), *products = transformed + ALL * before;
#pragma omp for schedule(static)
        for (long first = 0; first < all; first += at_once) {
            long count = all - first < at_once ? all - first : at_once;
            for (long i = 0; i < count; i++) {
                square s = square_at(&f, first + i);
                const number *picture = x + s.picture * f.lines * f.places * inner;
                transform(&f, picture, s.line - 1, s.column - 1, transformed + i * inner, before);
            }
            for (long column = 0; column < outer; column += BLOCK)
                for (long matrix = 0; matrix < ALL; matrix++) {
                    const float *tiles = weight + (column * ALL + matrix * SIDE) * inner;
                    float *sums = products + matrix * after + column;
                    sum_block(&o, transformed + matrix * before, tiles, sums, outer, 0, count, column + SIDE < outer);
                }
            for (long i = 0; i < count; i++) {
                square s = square_at(&f, first + i);
                put_back(&f, products + i * outer, after, y + s.picture * height * width * outer, s.line, s.column);
            }
        }
    }
}

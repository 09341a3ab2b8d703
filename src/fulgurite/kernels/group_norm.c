/*
Group normalization (Wu and He, arXiv 1803.08494) of channels-last pictures, and SiLU with it.

torch reads a picture twice and writes it for the norm, then reads and writes it again for SiLU, with exact functions; of
small pictures with narrow groups it wants planes besides, which have to be turned around before and after. Here it is
read twice and written once, in parts that do not depend on how many threads there are or on the rows beside a row.

OpenMP's functions are those of the library that torch has loaded: this file is not linked with one of its own, whose
threads would fight torch's for the cores.
*/
#include <math.h>

#include "vectors.h"

/* Of x's first numbers at most a pair of vectors; where there are fewer, the pair's own are left. */
INLINE pairs loaded(const number *x, long count, pairs pair) {
    if (count >= PAIR) return load_pairs(x);
    number some[PAIR];
    store_pairs(pair, some);
    memcpy(some, x, count * sizeof *x);
    return load_pairs(some);
}

/* Adds up numbers that are a span apart, less those from which to count, and their squares; a span's floats are in the
order that pairs give them. */
EACH void add_up(const number *x, long count, long span, const floats *from, floats *plain, floats *squared) {
    memset(plain, 0, 4 * span);
    memset(squared, 0, 4 * span);
    for (; count > 0; count -= span, x += span)
        for (long i = 0; i < span && i < count; i += PAIR) {
            long at = i / LANES;
            pairs pair = loaded(x + i, count - i, paired(from[at], from[at + 1])); /* nothing, less itself */
            floats even = evens(pair) - from[at], odd = odds(pair) - from[at + 1];
            plain[at] += even, plain[at + 1] += odd;
            squared[at] += even * even, squared[at + 1] += odd * odd;
        }
}

/* Scales and shifts numbers, alike those that are a span apart. */
EACH void apply(const number *x, number *y, long count, long span, const floats *scale, const floats *shift,
                int with_silu) {
    for (; count > 0; count -= span, x += span, y += span)
        for (long i = 0; i < span && i < count; i += PAIR) {
            pairs pair = loaded(x + i, count - i, (pairs){});
            long at = i / LANES;
            floats even = evens(pair) * scale[at] + shift[at], odd = odds(pair) * scale[at + 1] + shift[at + 1];
            pair = with_silu ? paired(silu(even), silu(odd)) : paired(even, odd);
            if (count - i >= PAIR) {
                store_pairs(pair, y + i);
            } else {
                number some[PAIR];
                store_pairs(pair, some);
                memcpy(y + i, some, (count - i) * sizeof *y);
            }
        }
}

/* A group's first number: counted from it, squares lose nothing where a mean is far larger than what is spread. */
INLINE float first_of(const number *row, long group, long wide) { return widened(row[group * wide]); }

/*
x, y: rows of pixels of channels. weight, bias: of the channels. part: pixels that one thread goes through at a time.
scratch: rows * (2 * groups * parts + channels) doubles, of as many parts as a row has.
*/
void group_norm(const number *x, number *y, const float *weight, const float *bias, double *scratch, long rows,
                long pixels, long channels, long groups, long part, double eps, int with_silu, int threads) {
    long parts = (pixels + part - 1) / part, wide = channels / groups, repeat = channels < 512 ? 512 / channels : 1;
    while (channels * repeat % PAIR) repeat++;
    long span = channels * repeat;
    double(*sums)[2] = (void *)scratch; /* of groups, in each part */
    float(*found)[2] = (void *)(sums + rows * groups * parts); /* scale and shift of channels */

#pragma omp parallel num_threads(threads) if (rows * pixels * channels > FEW)
    {
        floats from[span / LANES], plain[span / LANES], squared[span / LANES];
        floats scale[span / LANES], shift[span / LANES];
#pragma omp for schedule(static)
        for (long job = 0; job < rows * parts; job++) {
            const number *row = x + job / parts * pixels * channels;
            long first = job % parts * part, count = pixels - first;
            for (long i = 0; i < span; i++) ((float *)from)[place(i)] = first_of(row, i % channels / wide, wide);
            add_up(row + first * channels, (count < part ? count : part) * channels, span, from, plain, squared);
            double(*of_part)[2] = sums + job * groups;
            memset(of_part, 0, groups * sizeof *of_part);
            for (long i = 0; i < span;)
                for (long group = 0; group < groups; group++)
                    for (long end = i + wide; i < end; i++) {
                        of_part[group][0] += ((float *)plain)[place(i)];
                        of_part[group][1] += ((float *)squared)[place(i)];
                    }
        }
#pragma omp for schedule(static)
        for (long job = 0; job < rows * groups; job++) {
            double sum = 0, square = 0, count = (double)pixels * wide;
            for (long i = 0; i < parts; i++) {
                double *of_part = sums[(job / groups * parts + i) * groups + job % groups];
                sum += of_part[0], square += of_part[1];
            }
            double mean = sum / count, variance = square / count - mean * mean;
            mean += first_of(x + job / groups * pixels * channels, job % groups, wide);
            for (long i = 0; i < wide; i++) {
                long channel = job % groups * wide + i;
                double scale = weight[channel] / sqrt((variance < 0 ? 0 : variance) + eps);
                found[job * wide + i][0] = scale, found[job * wide + i][1] = bias[channel] - mean * scale;
            }
        }
#pragma omp for schedule(static)
        for (long job = 0; job < rows * parts; job++) {
            long row = job / parts, first = row * pixels + job % parts * part, count = pixels - job % parts * part;
            for (long i = 0; i < span;)
                for (long channel = 0; channel < channels; channel++, i++) {
                    float *of_group = found[(row * channels + channel)];
                    ((float *)scale)[place(i)] = of_group[0];
                    ((float *)shift)[place(i)] = of_group[1];
                }
            apply(x + first * channels, y + first * channels, (count < part ? count : part) * channels, span, scale,
                  shift, with_silu);
        }
    }
}

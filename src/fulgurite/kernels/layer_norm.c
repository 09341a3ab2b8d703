/*
Layer normalization (Ba et al., arXiv 1607.06450) of tokens, each read once and written once.
*/
#include <math.h>

#include "vectors.h"

INLINE double added(floats x) {
    double sum = 0;
    for (long i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* A token, its deviations from the mean kept in between. */
EACH void norm_token(const number *x, number *y, long wide, const floats *weight, const floats *bias, double eps,
                     floats *kept) {
    floats sum = {}, square = {};
    for (long i = 0; i < wide / LANES; i += 2) {
        pairs pair = load_pairs(x + i * LANES);
        kept[i] = evens(pair), kept[i + 1] = odds(pair);
        sum += kept[i] + kept[i + 1];
    }
    float mean = added(sum) / wide;
    for (long i = 0; i < wide / LANES; i++) {
        kept[i] -= mean;
        square += kept[i] * kept[i];
    }
    float scale = 1 / sqrt(added(square) / wide + eps);
    for (long i = 0; i < wide / LANES; i += 2) {
        pairs pair = paired(kept[i] * scale * weight[i] + bias[i], kept[i + 1] * scale * weight[i + 1] + bias[i + 1]);
        store_pairs(pair, y + i * LANES);
    }
}

/* Tokens [tokens, wide]; wide is a multiple of 32; weight and bias are in the order that numbers have in vectors. */
void layer_norm(const number *x, number *y, const floats *weight, const floats *bias, long tokens, long wide, double eps,
                int threads) {
#pragma omp parallel num_threads(threads) if (tokens * wide > FEW)
    {
        floats kept[wide / LANES];
#pragma omp for schedule(static)
        for (long token = 0; token < tokens; token++)
            norm_token(x + token * wide, y + token * wide, wide, weight, bias, eps, kept);
    }
}

/*
Linear layers and 3x3 convolutions of small networks in bfloat16, on the matrix tiles of x86 processors (AMX).

For each call oneDNN looks up what it made for these shapes, which takes longer than the product of a few dozen tokens
with a small weight. Large ones are oneDNN's: here a weight is gone through again for every 32 positions.

Both are the same product. A convolution's picture is padded by zeros and then a sequence of positions, lines
one after the other, each w + 2 long; a tap's positions are the same ones, some further on, so that rows of a tile are
as far apart in memory as a linear layer's. What comes out at the two positions between lines is dropped.
*/
#include "tiles.h"

enum { ALONE = 1 << 20 }; /* multiplications; so few are for one thread */

#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>

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
           __builtin_cpu_supports("avx512bf16") && !syscall(SYS_arch_prctl, request, tile_data);
}

/* Products summed for a block of positions, from x on, and of outputs, from weight on; or for half of the one, of the
other. */
TILES INLINE void sum_up(const product *p, const uint16_t *x, const uint16_t *weight, int low, int wide,
                         float (*sums)[BLOCK]) {
    zero_sums();
    for (long tap = 0; tap < p->taps; tap++) {
        const uint16_t *shifted = x + (tap / 3 * p->spread + tap % 3) * p->inner;
        add_products(shifted, p->inner, weight + tap * p->inner * p->outer, SIDE * p->inner, SIDE * DEPTH, p->inner / DEPTH,
                     low, wide);
    }
    store_sums(sums[0], BLOCK, low, wide);
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

#else
int has_tiles(void) { return 0; }
#endif

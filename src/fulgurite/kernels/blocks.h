/*
Products of a block of up to 32 positions with up to 32 outputs' weights, summed in float32: in bfloat16 on the matrix
tiles of x86 processors (AMX) or on their vectors (AVX-512 BF16), or in float32 on older vectors (AVX2), whichever of
the three this is compiled for.

Weights come in tiles of sixteen outputs: in bfloat16 of thirty-two inputs, pairs of them innermost, [16][16][2], in
float32 of sixteen inputs, [16][16].
*/
#include <immintrin.h>

#include "vectors.h"

enum { SIDE = 16, DEPTH = 64 / sizeof(number), TILE = SIDE * DEPTH }; /* a tile's outputs; its inputs; all of its numbers */
enum { BLOCK = 2 * SIDE }; /* a block's positions, and its outputs */

static const float NONE = -3e38f; /* the score of a key that is not there */

typedef struct {
    long apart, depths; /* numbers from a position to the next; tiles, whose inputs are summed */
    long next, step;    /* numbers from a tile to that of the next sixteen outputs, of the next inputs */
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

/*
Each kind of unit has these: EVENLY, whether a block's positions must be equally far apart, also where they have places;
prepare(unit, rows) before products of blocks of so many positions, release(unit) after the last; and

    sum_block(operands, x, weight, sums, sums_apart, onto, rows, wide)

which puts the block's products with inputs from x on, and tiles from weight on, where sums are, or adds them onto what
is there. Of so many rows, as the unit is prepared for; of the first sixteen outputs alone where not wide.
*/
#ifdef __AMX_BF16__
#include "bfloat16.h"
#include "amx.h"
#else /* vectors take positions from anywhere, and need no preparing */
enum { EVENLY = 0 };

typedef struct {
} unit;

INLINE void prepare(unit *u, long rows) {}
INLINE void release(unit *u) {}

#ifdef FLOAT32
#include "avx2.h"
#else
#include "bfloat16.h"
#include "avx512.h"
#endif
#endif

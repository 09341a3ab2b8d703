/* Products in bfloat16 on vectors (AVX-512 BF16). */

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

INLINE void sum_block(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                      long rows, int wide) {
    long row = 0;
    for (; row + ROWS <= rows; row += ROWS) sum_rows(o, x, weight, sums, sums_apart, onto, row, ROWS, wide);
    for (; row + 2 <= rows; row += 2) sum_rows(o, x, weight, sums, sums_apart, onto, row, 2, wide);
    if (row < rows) sum_rows(o, x, weight, sums, sums_apart, onto, row, 1, wide);
}

/* Numbers in float32, and their products, on vectors of eight (AVX2, FMA). */

INLINE floats load_numbers(const number *from) { return load(from); }
INLINE void store(floats x, number *to) { memcpy(to, &x, sizeof x); }

/* A block's keys, those from count on as zeros, to tiles of their numbers: [2][wide / 16][16][16]. */
INLINE void turn(const number *k, long apart, long count, long wide, number *tiles) {
    for (long first = 0; first < BLOCK; first += SIDE, tiles += SIDE * wide)
        for (long key = 0; key < SIDE; key++)
            for (long i = 0; i < wide; i++)
                tiles[i * SIDE + key] = first + key < count ? k[(first + key) * apart + i] : 0;
}

/* A tile's depth of keys' values, those from count on as zeros: [wide / 16][16][16]. */
INLINE void lay_out(const number *v, long apart, long count, long wide, number *tiles) {
    for (long i = 0; i < wide; i += SIDE)
        for (long key = 0; key < DEPTH; key++)
            for (long j = i; j < i + SIDE; j += LANES, tiles += LANES)
                store(key < count ? load(v + key * apart + j) : (floats){}, tiles);
}

INLINE floats power(floats t) { return power_of_2(t); }

/* The highest of so many, whole vectors; what is no number is passed over. */
INLINE float highest(const float *x, long count) {
    floats most = (floats){} + NONE;
    for (long i = 0; i < count; i += LANES) most = either(load(x + i) > most, load(x + i), most);
    float found = most[0];
    for (long i = 1; i < LANES; i++) found = most[i] > found ? most[i] : found;
    return found;
}

INLINE float added_up(floats x) {
    float sum = 0;
    for (long i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* A pair of vectors, the low numbers first. */
INLINE void store_two(floats low, floats high, number *to) {
    store(low, to);
    store(high, to + LANES);
}

enum { ROWS = 6 }; /* whose sums the registers hold at a time */

/* Of so many rows, from the first one on, and sixteen outputs; how many is known to the compiler. */
INLINE void sum_rows(const operands *o, const number *x, const number *weight, float *sums, long sums_apart, int onto,
                     long first, const int rows) {
    const number *inputs[ROWS];
    __m256 sum[ROWS][2];
    sums += first * sums_apart;
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        inputs[row] = x + (o->places ? o->places[first + row] : (first + row) * o->apart);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            sum[row][half] = onto ? _mm256_loadu_ps(sums + row * sums_apart + half * LANES) : _mm256_setzero_ps();
    }
    for (long tap = 0; tap < o->taps; tap++) {
        const number *tiles = weight + tap * o->kernel;
        long from = shift_of(o, tap), end = from + DEPTH * o->depths;
        for (; from < end; from += DEPTH, tiles += o->step)
            for (long i = 0; i < DEPTH; i++) {
                __m256 low = _mm256_loadu_ps(tiles + i * SIDE), high = _mm256_loadu_ps(tiles + i * SIDE + LANES);
#pragma GCC unroll 6
                for (int row = 0; row < rows; row++) {
                    __m256 input = _mm256_broadcast_ss(inputs[row] + from + i);
                    sum[row][0] = _mm256_fmadd_ps(input, low, sum[row][0]);
                    sum[row][1] = _mm256_fmadd_ps(input, high, sum[row][1]);
                }
            }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) _mm256_storeu_ps(sums + row * sums_apart + half * LANES, sum[row][half]);
}

/* Rows are shared out evenly: sums of few at a time would wait for each other. */
INLINE void sum_block(const operands *o, const number *x, const number *weight, float *sums, long sums_apart, int onto,
                      long rows, int wide) {
    for (int half = 0; half <= wide; half++, weight += o->next, sums += SIDE)
        for (long first = 0, left = (rows + ROWS - 1) / ROWS; left; left--) {
            long some = (rows - first + left - 1) / left;
            switch (some) {
            case 1: sum_rows(o, x, weight, sums, sums_apart, onto, first, 1); break;
            case 2: sum_rows(o, x, weight, sums, sums_apart, onto, first, 2); break;
            case 3: sum_rows(o, x, weight, sums, sums_apart, onto, first, 3); break;
            case 4: sum_rows(o, x, weight, sums, sums_apart, onto, first, 4); break;
            case 5: sum_rows(o, x, weight, sums, sums_apart, onto, first, 5); break;
            case 6: sum_rows(o, x, weight, sums, sums_apart, onto, first, 6); break;
            }
            first += some;
        }
}

/* Products in bfloat16 on matrix tiles (AMX). */

enum { EVENLY = 1 };

typedef struct {
    int first, second; /* positions that tiles are configured for, of the first and of the second sixteen */
} unit;

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights; of the first and the second sixteen positions. */
INLINE void prepare(unit *u, long rows) {
    int first = rows < SIDE ? rows : SIDE, second = rows - first;
    if (first == u->first && second == u->second) return;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 4 * LANES, tiles.rows[i] = SIDE;
    tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = u->first = first;
    u->second = second;
    tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = second ? second : 1;
    _tile_loadconfig(&tiles);
}

INLINE void release(unit *u) {
    if (u->first) _tile_release();
}

INLINE void sum_tiles(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                      int low, int wide) {
    if (onto) {
        _tile_loadd(0, sums, 4 * sums_apart);
        if (wide) _tile_loadd(1, sums + SIDE, 4 * sums_apart);
        if (low) _tile_loadd(2, sums + SIDE * sums_apart, 4 * sums_apart);
        if (low && wide) _tile_loadd(3, sums + SIDE * sums_apart + SIDE, 4 * sums_apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long tap = 0; tap < o->taps; tap++) {
        const uint16_t *inputs = x + shift_of(o, tap), *tiles = weight + tap * o->kernel;
        for (long left = o->depths; left; left--, inputs += DEPTH, tiles += o->step) {
            _tile_loadd(4, inputs, 2 * o->apart);
            _tile_loadd(6, tiles, 4 * LANES);
            _tile_dpbf16ps(0, 4, 6);
            if (wide) {
                _tile_loadd(7, tiles + o->next, 4 * LANES);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (low) {
                _tile_loadd(5, inputs + SIDE * o->apart, 2 * o->apart);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (low && wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * sums_apart);
    if (wide) _tile_stored(1, sums + SIDE, 4 * sums_apart);
    if (low) _tile_stored(2, sums + SIDE * sums_apart, 4 * sums_apart);
    if (low && wide) _tile_stored(3, sums + SIDE * sums_apart + SIDE, 4 * sums_apart);
}

INLINE void sum_block(const operands *o, const uint16_t *x, const uint16_t *weight, float *sums, long sums_apart, int onto,
                      long rows, int wide) {
    if (o->places) x += o->places[0];
    if (rows > SIDE && wide) /* almost always: known to the compiler, so that nothing is asked between products */
        sum_tiles(o, x, weight, sums, sums_apart, onto, 1, 1);
    else
        sum_tiles(o, x, weight, sums, sums_apart, onto, rows > SIDE, wide);
}

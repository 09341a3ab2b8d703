/*
Matrix tiles (AMX) in plain C, for processors without: included before a kernel, it is compiled as for tiles. What the
instructions refuse ends the process: tiles that are not configured, shapes that do not go together.
*/
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __AMX_BF16__ 1

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} configuration;

static __thread configuration configured;
static __thread uint16_t contents[8][16][32];

static void check(int tile) {
    if (configured.palette != 1 || !configured.rows[tile] || configured.rows[tile] > 16) abort();
}

static void configure(const void *from) {
    memcpy(&configured, from, sizeof configured);
    memset(contents, 0, sizeof contents);
}

static void unconfigure(void) { memset(&configured, 0, sizeof configured); }

static void clear(int tile) {
    check(tile);
    memset(contents[tile], 0, sizeof contents[tile]);
}

static void fetch(int tile, const void *from, long apart) {
    clear(tile);
    for (int row = 0; row < configured.rows[tile]; row++)
        memcpy(contents[tile][row], (const char *)from + row * apart, configured.bytes[tile]);
}

static void put(int tile, void *to, long apart) {
    check(tile);
    for (int row = 0; row < configured.rows[tile]; row++)
        memcpy((char *)to + row * apart, contents[tile][row], configured.bytes[tile]);
}

static float in_float(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static void add_products(int sums, int x, int weight) {
    check(sums), check(x), check(weight);
    if (configured.rows[sums] != configured.rows[x] || 4 * configured.rows[weight] != configured.bytes[x]) abort();
    for (int row = 0; row < configured.rows[sums]; row++) {
        float sum[16];
        memcpy(sum, contents[sums][row], sizeof sum);
        for (int pair = 0; pair < configured.rows[weight]; pair++)
            for (int i = 0; i < 32; i++)
                sum[i / 2] += in_float(contents[x][row][2 * pair + i % 2]) * in_float(contents[weight][pair][i]);
        memcpy(contents[sums][row], sum, sizeof sum);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig configure
#define _tile_release unconfigure
#define _tile_zero clear
#define _tile_loadd fetch
#define _tile_stored put
#define _tile_dpbf16ps add_products

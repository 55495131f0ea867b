#include "products.h"
#include "parts.h"

#define DEPTH_BLOCK 512
#define ROW_BLOCK 192
#define LEFT_PANEL 48 /* a multiple of TILE_ROWS and LANES */

struct start {
    const float *from; /* NULL: zero */
    long stride;
};

INLINE void tile(const int rows, const int vectors, const float *left, long row_step, long step, const float *right,
                 long width, long depth, float *output, long stride, long columns, struct start start) {
    vec sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[r][v] = !start.from ? (vec){}
                       : v + 1 < vectors ? load(start.from + r * start.stride + v * LANES)
                       : load_up_to(start.from + r * start.stride + v * LANES, columns - v * LANES, 0);
    for (long k = 0; k < depth; k++) {
        vec across[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) across[v] = load(right + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec down = spread(left[r * row_step]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += down * across[v];
        }
        left += step;
        right += width;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            if (v + 1 < vectors) store(output + r * stride + v * LANES, sums[r][v]);
            else store_up_to(output + r * stride + v * LANES, sums[r][v], columns - v * LANES);
        }
}

typedef void tile_function(const float *left, long row_step, long step, const float *right, long width, long depth,
                           float *output, long stride, long columns, struct start start);

#define TILE(rows, vectors)                                                                                           \
    static void tile_##rows##x##vectors(const float *left, long row_step, long step, const float *right, long width, \
                                        long depth, float *output, long stride, long columns, struct start start) {  \
        tile(rows, vectors, left, row_step, step, right, width, depth, output, stride, columns, start);              \
    }
#define TILES(vectors) \
    TILE(1, vectors) TILE(2, vectors) TILE(3, vectors) TILE(4, vectors) TILE(5, vectors) TILE(6, vectors)
#define NAMES(vectors)                                                                                            \
    {tile_1x##vectors, tile_2x##vectors, tile_3x##vectors, tile_4x##vectors, tile_5x##vectors, tile_6x##vectors}

TILES(1)
TILES(2)
#if TILE_VECTORS == 4
TILES(3)
TILES(4)
static tile_function *const tiles[TILE_VECTORS][TILE_ROWS] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4)};
#else
static tile_function *const tiles[TILE_VECTORS][TILE_ROWS] = {NAMES(1), NAMES(2)};
#endif

void multiply(const float *left, long row_step, long step, struct packed right, long rows, long columns, long depth,
              float *output, long output_stride, enum beginning beginning, const float *bias) {
    if (depth == 0) { /* an empty sum: one pass of the loop below stores the beginnings */
        for (long r = 0; r < rows && beginning != FROM_OUTPUT; r++)
            for (long c = 0; c < columns; c++)
                output[r * output_stride + c] = beginning == FROM_BIAS ? bias[c] : 0;
        return;
    }
    for (long k = 0; k < depth; k += DEPTH_BLOCK) {
        long deep = smaller(DEPTH_BLOCK, depth - k);
        for (long block = 0; block < rows; block += ROW_BLOCK) {
            long block_end = smaller(rows, block + ROW_BLOCK);
            for (long column = 0; column < columns; column += PANEL) {
                long valid = smaller(PANEL, columns - column);
                long width = round_up(smaller(PANEL, right.columns - column), LANES);
                const float *panel = right.at + column * right.depth + k * width;
                tile_function *const *of_width = tiles[(valid + LANES - 1) / LANES - 1];
                for (long row = block; row < block_end; row += TILE_ROWS) {
                    float *to = output + row * output_stride + column;
                    struct start start = {NULL, 0};
                    if (k > 0 || beginning == FROM_OUTPUT) start = (struct start){to, output_stride};
                    else if (beginning == FROM_BIAS) start = (struct start){bias + column, 0};
                    of_width[smaller(TILE_ROWS, block_end - row) - 1](left + row * row_step + k * step, row_step,
                                                                      step, panel, width, deep, to, output_stride,
                                                                      valid, start);
                }
            }
        }
    }
}

void multiply_in_place(const float *left, long row_step, const float *right, long right_stride, long rows, long columns,
                       long depth, float *output, long output_stride, int add) {
    for (long column = 0; column < columns; column += PANEL) {
        long valid = smaller(PANEL, columns - column);
        struct start start = {add ? output + column : NULL, output_stride};
        tiles[valid / LANES - 1][rows - 1](left, row_step, 1, right + column, right_stride, depth, output + column,
                                           output_stride, valid, start);
    }
}

void multiply_transposed(const float *left, long left_stride, const float *right, long right_stride, long depth,
                         long rows, long columns, float *output, long output_stride) {
    const long block = smaller(depth, 256);
    float *left_packed = scratch(SCRATCH_LEFT, round_up(rows, LANES) * block);
    float *right_packed = scratch(SCRATCH_RIGHT, packed_size(columns, block));
    for (long k = 0; k < depth; k += block) {
        long deep = smaller(block, depth - k);
        struct packed packed = {right_packed, columns, deep};
        pack_straight(left + k * left_stride, left_stride, deep, rows, LEFT_PANEL, left_packed);
        pack_straight(right + k * right_stride, right_stride, deep, columns, PANEL, right_packed);
        for (long row = 0; row < rows; row += LEFT_PANEL) {
            long valid = smaller(LEFT_PANEL, rows - row);
            multiply(left_packed + row * deep, 1, round_up(valid, LANES), packed, valid, columns, deep,
                     output + row * output_stride, output_stride, FROM_OUTPUT, NULL);
        }
    }
}

/* The transpose of LANES vectors, by log2(LANES) perfect shuffles. */
INLINE void transpose(vec x[LANES]) {
    const ivec low = (iota >> 1) + (iota & 1) * LANES, high = low + LANES / 2;
    vec y[LANES];
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

static void pack_lanes(const float *const *rows, long valid, long depth, float *to, long step) {
    for (long k = 0; k < depth; k += LANES) {
        long deep = smaller(LANES, depth - k);
        vec block[LANES];
        if (valid == LANES && deep == LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) block[i] = load(rows[i] + k);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(to + (k + i) * step, block[i]);
            continue;
        }
        for (int i = 0; i < LANES; i++) block[i] = i < valid ? load_up_to(rows[i] + k, deep, 0) : (vec){};
        transpose(block);
        for (int i = 0; i < deep; i++) store(to + (k + i) * step, block[i]);
    }
}

void pack_rows_as_columns(const float *const *rows, long columns, long depth, float *packed) {
    for (long column = 0; column < columns; column += PANEL) {
        long width = round_up(smaller(PANEL, columns - column), LANES);
        for (long lane = 0; lane < width; lane += LANES)
            pack_lanes(rows + column + lane, smaller(LANES, columns - column - lane), depth,
                       packed + column * depth + lane, width);
    }
}

void pack_transposed(const float *from, long stride, long columns, long depth, float *packed) {
    const float *rows[PANEL];
    for (long column = 0; column < columns; column += PANEL) {
        long valid = smaller(PANEL, columns - column);
        for (long i = 0; i < valid; i++) rows[i] = from + (column + i) * stride;
        pack_rows_as_columns(rows, valid, depth, packed + column * depth);
    }
}

void pack_straight(const float *from, long stride, long depth, long columns, long panel, float *packed) {
    for (long column = 0; column < columns; column += panel) {
        long valid = smaller(panel, columns - column), width = round_up(valid, LANES);
        float *to = packed + column * depth;
        for (long k = 0; k < depth; k++, to += width)
            for (long lane = 0; lane < width; lane += LANES)
                store(to + lane, load_up_to(from + k * stride + column + lane, valid - lane, 0));
    }
}

void pack_rows(const float *const *rows, long depth, long columns, float *packed) {
    for (long column = 0; column < columns; column += PANEL) {
        long valid = smaller(PANEL, columns - column), width = round_up(valid, LANES);
        float *to = packed + column * depth;
        for (long k = 0; k < depth; k++, to += width)
            for (long lane = 0; lane < width; lane += LANES)
                store(to + lane, load_up_to(rows[k] + column + lane, valid - lane, 0));
    }
}

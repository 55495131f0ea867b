/* Matrix products out of one tile whose every output walks the depth in order with one accumulator, so that the
   value of an output depends on its row and its column only: not on the other rows, the blocking or the threads. */
#pragma once
#include "vectors.h"

#if LANES == 16
#define TILE_ROWS 6
#define TILE_VECTORS 4
#else
#define TILE_ROWS 6
#define TILE_VECTORS 2
#endif
#define PANEL (TILE_VECTORS * LANES)

/* A right-hand side [depth, columns] is packed in panels of PANEL columns, each [depth, its width]; the last panel
   is as wide as its columns rounded up to LANES, with zeros after them. */
INLINE long packed_size(long columns, long depth) { return round_up(columns, LANES) * depth; }

/* Packs the transpose of rows[columns] of `depth` floats each. */
void pack_rows_as_columns(const float *const *rows, long columns, long depth, float *packed);
/* The same for rows `stride` apart. */
void pack_transposed(const float *from, long stride, long columns, long depth, float *packed);
/* Packs rows[depth] of `columns` floats each as they lie. */
void pack_rows(const float *const *rows, long depth, long columns, float *packed);
/* Packs [depth, columns] as it lies, in panels of `panel` columns (PANEL for a right-hand side). */
void pack_straight(const float *from, long stride, long depth, long columns, long panel, float *packed);

/* Where the accumulators of a product begin. */
enum beginning { FROM_ZERO, FROM_OUTPUT, FROM_BIAS };

/* A packed right-hand side and the size it was packed with. */
struct packed {
    const float *at;
    long columns, depth;
};

/* output[rows, columns] (+)= left[rows, depth] @ the first rows and columns of `right`; element (r, k) of the left
   lies at left[r * row_step + k * step]. */
void multiply(const float *left, long row_step, long step, struct packed right, long rows, long columns, long depth,
              float *output, long output_stride, enum beginning beginning, const float *bias);

/* output[rows, columns] (+)= left[rows, depth] @ right[depth, columns] for at most TILE_ROWS rows and columns in whole
   LANES, with the right-hand side read where it lies. */
void multiply_in_place(const float *left, long row_step, const float *right, long right_stride, long rows, long columns,
                       long depth, float *output, long output_stride, int add);

/* output[columns_of_left, columns] += left[depth, columns_of_left]^T @ right[depth, columns]. */
void multiply_transposed(const float *left, long left_stride, const float *right, long right_stride, long depth,
                         long rows, long columns, float *output, long output_stride);

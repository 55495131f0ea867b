/* Causal attention over packed sequences and over a paged cache: one routine, so that both give the same bits.

   A piece of work is one sequence and one key/value head. Its keys are packed as columns, its values as rows; the
   query rows of the group's heads (position by position, head by head) then take scores, softmax and the weighted
   sum of values, each of which walks the keys in order. Keys after a row's own position have weight exactly 0. */
#include "parts.h"
#include "products.h"
#include <math.h>
#include <stdbool.h>

#define ROWS_BACKWARD 48

struct attention {
    const float *queries, *keys, *values; /* keys and values: flat tokens, or the caches */
    float *output, *normalizers;          /* normalizers [tokens, heads]: max + log sum, or NULL */
    long query_stride, key_stride, value_stride;
    const int32_t *query_starts, *contexts, *block_tables; /* contexts and block_tables NULL: packed */
    long block_size, table_width, sequences, heads, kv_heads, size, taken;
    float scale;
};

struct piece {
    long first, queries, context, kv_head, group; /* first: the flat place of the first query */
};

INLINE struct piece piece_at(const struct attention *w, long index) {
    long sequence = index / w->kv_heads, first = w->query_starts[sequence];
    long queries = w->query_starts[sequence + 1] - first;
    return (struct piece){first, queries, w->contexts ? w->contexts[sequence] : queries, index % w->kv_heads,
                          w->heads / w->kv_heads};
}

static void point_at_rows(const struct attention *w, long sequence, struct piece p, const float *from, long stride,
                          const float **rows) {
    from += p.kv_head * w->size;
    if (!w->block_tables) {
        for (long i = 0; i < p.context; i++) rows[i] = from + (p.first + i) * stride;
        return;
    }
    const int32_t *table = w->block_tables + sequence * w->table_width;
    for (long start = 0; start < p.context; start += w->block_size) {
        const float *block = from + table[start / w->block_size] * w->block_size * stride;
        long end = smaller(w->block_size, p.context - start);
        for (long i = 0; i < end; i++) rows[start + i] = block + i * stride;
    }
}

/* How many keys the given query row (of the piece) sees. */
INLINE long keys_of(struct piece p, long row) { return p.context - p.queries + row / p.group + 1; }

INLINE long row_place(const struct attention *w, struct piece p, long row) {
    return (p.first + row / p.group) * w->heads + p.kv_head * p.group + row % p.group;
}

static void scaled_queries(const struct attention *w, struct piece p, long row, long count, float *to) {
    for (long r = row; r < row + count; r++, to += w->size) {
        const float *from = w->queries + (p.first + r / p.group) * w->query_stride +
                            (p.kv_head * p.group + r % p.group) * w->size;
        for (long i = 0; i < w->size; i += LANES)
            store_up_to(to + i, load_up_to(from + i, w->size - i, 0) * w->scale, w->size - i);
    }
}

/* Scores become weights e^(score - max) in place, 0 from `keys` up to `end`, a multiple of LANES; returns max, sum. */
struct softmax {
    float top, sum;
};
static struct softmax softmax(float *scores, long keys, long end) {
    vec largest = spread(-INFINITY), sums = {};
    long i = 0;
    for (; i + LANES <= keys; i += LANES) largest = larger_of(largest, load(scores + i));
    vec last = i < keys ? first_lanes(load(scores + i), keys - i, -INFINITY) : spread(-INFINITY);
    float top = largest_of(larger_of(largest, last));
    for (i = 0; i + LANES <= keys; i += LANES) {
        vec weight = exponential(load(scores + i) - top);
        sums += weight;
        store(scores + i, weight);
    }
    if (i < keys) {
        vec weight = exponential(last - top);
        sums += weight;
        store(scores + i, weight);
        i += LANES;
    }
    for (; i < end; i += LANES) store(scores + i, (vec){});
    return (struct softmax){top, sum_of(sums)};
}

/* sums = weights @ values, block by block where the values lie: one tile of rows is too few to pay for packing. */
static void sum_in_place(const struct attention *w, long sequence, struct piece p, const float *weights, long stride,
                         long count, float *sums) {
    const float *from = w->values + p.kv_head * w->size;
    long run = w->block_tables ? w->block_size : p.context;
    const int32_t *table = w->block_tables ? w->block_tables + sequence * w->table_width : NULL;
    for (long start = 0; start < p.context; start += run) {
        const float *block = from + (table ? table[start / run] * run : p.first) * w->value_stride;
        multiply_in_place(weights + start, stride, block, w->value_stride, count, w->size,
                          smaller(run, p.context - start), sums, w->size, start > 0);
    }
}

static void attend_rows(const struct attention *w, struct piece p, long row, long count, struct packed keys,
                        struct packed values, long sequence) {
    long size = w->size, seen = keys_of(p, row + count - 1), end = round_up(seen, LANES);
    float *queries = scratch(SCRATCH_ROWS, TILE_ROWS * size), *sums = scratch(SCRATCH_OUTPUT, TILE_ROWS * size);
    float *scores = scratch(SCRATCH_HIDDEN, TILE_ROWS * end), inverse[TILE_ROWS];
    scaled_queries(w, p, row, count, queries);
    multiply(queries, size, 1, keys, count, end, size, scores, end, FROM_ZERO, NULL);
    for (long r = 0; r < count; r++) {
        struct softmax s = softmax(scores + r * end, keys_of(p, row + r), end);
        inverse[r] = 1.0f / s.sum;
        if (w->normalizers) w->normalizers[row_place(w, p, row + r)] = s.top + (float)log((double)s.sum);
    }
    if (values.at) multiply(scores, end, 1, values, count, size, seen, sums, size, FROM_ZERO, NULL);
    else sum_in_place(w, sequence, p, scores, end, count, sums);
    for (long r = 0; r < count; r++) {
        float *to = w->output + row_place(w, p, row + r) * size;
        for (long i = 0; i < size; i += LANES)
            store_up_to(to + i, load_up_to(sums + r * size + i, size - i, 0) * inverse[r], size - i);
    }
}

static void attention_part(void *given, int part, int parts) {
    struct attention *w = given;
    (void)part, (void)parts;
    for (long index; (index = next_piece(&w->taken)) < w->sequences * w->kv_heads;) {
        struct piece p = piece_at(w, index);
        if (p.queries == 0) continue;
        const float **rows = (const float **)scratch(SCRATCH_ORDER, 2 * p.context);
        struct packed keys = {scratch(SCRATCH_WEIGHTS, packed_size(p.context, w->size)), p.context, w->size};
        struct packed values = {NULL, w->size, p.context};
        point_at_rows(w, index / w->kv_heads, p, w->keys, w->key_stride, rows);
        pack_rows_as_columns(rows, p.context, w->size, (float *)keys.at);
        if (p.queries * p.group > TILE_ROWS || w->size % LANES) {
            float *packed = scratch(SCRATCH_WEIGHTS_2, packed_size(w->size, p.context));
            point_at_rows(w, index / w->kv_heads, p, w->values, w->value_stride, rows);
            pack_rows(rows, p.context, w->size, packed);
            values.at = packed;
        }
        for (long row = 0; row < p.queries * p.group; row += TILE_ROWS)
            attend_rows(w, p, row, smaller(TILE_ROWS, p.queries * p.group - row), keys, values,
                        index / w->kv_heads);
    }
}

/* Strides are those of a token, in floats; output is [tokens, heads, size]. */
EXPORT void hone_packed_attention(const float *queries, long query_stride, const float *keys, long key_stride,
                                  const float *values, long value_stride, const int32_t *starts, float scale,
                                  float *output, float *normalizers, long sequences, long heads, long kv_heads,
                                  long size, int threads) {
    struct attention work = {.queries = queries, .keys = keys, .values = values, .output = output,
                             .normalizers = normalizers, .query_stride = query_stride, .key_stride = key_stride,
                             .value_stride = value_stride, .query_starts = starts, .sequences = sequences,
                             .heads = heads, .kv_heads = kv_heads, .size = size, .scale = scale};
    in_parts(attention_part, &work, threads);
}

/* Caches are [blocks, block_size, kv_heads, size]; the queries of a sequence are the last of its context. */
EXPORT void hone_paged_attention(const float *queries, long query_stride, const float *key_cache,
                                 const float *value_cache, const int32_t *block_tables, long table_width,
                                 const int32_t *query_starts, const int32_t *contexts, float scale, float *output,
                                 long block_size, long sequences, long heads, long kv_heads, long size, int threads) {
    struct attention work = {.queries = queries, .keys = key_cache, .values = value_cache, .output = output,
                             .query_stride = query_stride, .key_stride = kv_heads * size,
                             .value_stride = kv_heads * size, .query_starts = query_starts, .contexts = contexts,
                             .block_tables = block_tables, .block_size = block_size, .table_width = table_width,
                             .sequences = sequences, .heads = heads, .kv_heads = kv_heads, .size = size,
                             .scale = scale};
    in_parts(attention_part, &work, threads);
}

struct attention_backward {
    struct attention forward;
    const float *d_output;
    float *d_queries, *d_keys, *d_values;
};

struct packed_for_backward {
    struct packed keys, values_as_columns, keys_as_rows;
    float *d_keys, *d_values; /* [context, size] of this piece */
};

/* With P the softmax weights, D = d_output @ values^T and delta = d_output . output:
   dS = P (D - delta), d_queries = scale dS @ keys, d_keys += dS^T @ scaled queries, d_values += P^T @ d_output. */
static void backward_rows(struct attention_backward *b, struct piece p, long row, long count,
                          struct packed_for_backward *x) {
    const struct attention *w = &b->forward;
    long size = w->size, all_seen = keys_of(p, row + count - 1), end = round_up(all_seen, LANES);
    float *queries = scratch(SCRATCH_ROWS, 2 * ROWS_BACKWARD * size), *d_output = queries + ROWS_BACKWARD * size;
    float *weights = scratch(SCRATCH_HIDDEN, ROWS_BACKWARD * end), *d_scores = scratch(SCRATCH_ACTIVE, ROWS_BACKWARD * end);
    scaled_queries(w, p, row, count, queries);
    for (long r = 0; r < count; r++)
        memcpy(d_output + r * size, b->d_output + row_place(w, p, row + r) * size, 4 * size);
    for (long r = 0; r < count; r += TILE_ROWS) { /* each tile of rows only as far as its last row sees */
        long rows = smaller(TILE_ROWS, count - r), seen = round_up(keys_of(p, row + r + rows - 1), LANES);
        multiply(queries + r * size, size, 1, x->keys, rows, seen, size, weights + r * end, end, FROM_ZERO, NULL);
        multiply(d_output + r * size, size, 1, x->values_as_columns, rows, seen, size, d_scores + r * end, end,
                 FROM_ZERO, NULL);
    }
    for (long r = 0; r < count; r++) {
        long place = row_place(w, p, row + r), keys = keys_of(p, row + r);
        float *weight = weights + r * end, *d_score = d_scores + r * end, normalizer = w->normalizers[place];
        vec dots = {};
        for (long i = 0; i < size; i += LANES)
            dots += load_up_to(d_output + r * size + i, size - i, 0) *
                    load_up_to(w->output + place * size + i, size - i, 0);
        float delta = sum_of(dots);
        long i = 0;
        for (; i < keys; i += LANES) {
            vec part = first_lanes(exponential(load(weight + i) - normalizer), keys - i, 0);
            store(d_score + i, part * (load(d_score + i) - delta));
            store(weight + i, part);
        }
        for (; i < end; i += LANES) {
            store(weight + i, (vec){});
            store(d_score + i, (vec){});
        }
    }
    float *d_queries = scratch(SCRATCH_OUTPUT, ROWS_BACKWARD * size);
    multiply(d_scores, end, 1, x->keys_as_rows, count, size, all_seen, d_queries, size, FROM_ZERO, NULL);
    for (long r = 0; r < count; r++)
        for (long i = 0; i < size; i += LANES)
            store_up_to(b->d_queries + row_place(w, p, row + r) * size + i,
                        load_up_to(d_queries + r * size + i, size - i, 0) * w->scale, size - i);
    multiply_transposed(d_scores, end, queries, size, count, all_seen, size, x->d_keys, size);
    multiply_transposed(weights, end, d_output, size, count, all_seen, size, x->d_values, size);
}

static void attention_backward_part(void *given, int part, int parts) {
    struct attention_backward *b = given;
    struct attention *w = &b->forward;
    (void)part, (void)parts;
    for (long index; (index = next_piece(&w->taken)) < w->sequences * w->kv_heads;) {
        struct piece p = piece_at(w, index);
        long size = w->size, as_columns = packed_size(p.context, size), as_rows = packed_size(size, p.context);
        const float **rows = (const float **)scratch(SCRATCH_ORDER, 2 * p.context);
        float *columns = scratch(SCRATCH_WEIGHTS, 2 * as_columns), *straight = scratch(SCRATCH_WEIGHTS_2, as_rows);
        float *sums = scratch(SCRATCH_GRADIENT, 2 * p.context * size);
        struct packed_for_backward x = {{columns, p.context, size}, {columns + as_columns, p.context, size},
                                        {straight, size, p.context}, sums, sums + p.context * size};
        memset(sums, 0, 8 * p.context * size);
        point_at_rows(w, 0, p, w->keys, w->key_stride, rows);
        pack_rows_as_columns(rows, p.context, size, columns);
        pack_rows(rows, p.context, size, straight);
        point_at_rows(w, 0, p, w->values, w->value_stride, rows);
        pack_rows_as_columns(rows, p.context, size, columns + as_columns);
        for (long row = 0; row < p.queries * p.group; row += ROWS_BACKWARD)
            backward_rows(b, p, row, smaller(ROWS_BACKWARD, p.queries * p.group - row), &x);
        for (long i = 0; i < p.context; i++) {
            long to = ((p.first + i) * w->kv_heads + p.kv_head) * size;
            memcpy(b->d_keys + to, x.d_keys + i * size, 4 * size);
            memcpy(b->d_values + to, x.d_values + i * size, 4 * size);
        }
    }
}

/* Gradients of hone_packed_attention: d_queries [tokens, heads, size], the others [tokens, kv_heads, size]. */
EXPORT void hone_packed_attention_backward(const float *d_output, const float *queries, long query_stride,
                                           const float *keys, long key_stride, const float *values, long value_stride,
                                           const int32_t *starts, float scale, const float *output,
                                           const float *normalizers, float *d_queries, float *d_keys, float *d_values,
                                           long sequences, long heads, long kv_heads, long size, int threads) {
    struct attention_backward work = {
        .forward = {.queries = queries, .keys = keys, .values = values, .output = (float *)output,
                    .normalizers = (float *)normalizers, .query_stride = query_stride, .key_stride = key_stride,
                    .value_stride = value_stride, .query_starts = starts, .sequences = sequences, .heads = heads,
                    .kv_heads = kv_heads, .size = size, .scale = scale},
        .d_output = d_output, .d_queries = d_queries, .d_keys = d_keys, .d_values = d_values};
    in_parts(attention_backward_part, &work, threads);
}

/* The kernels that take one row at a time, forward and backward. */
#include "parts.h"
#include "products.h"
#include <math.h>
#include <stdbool.h>

INLINE long part_start(long count, int part, int parts, long multiple) {
    return smaller(count, round_up(count * part / parts, multiple));
}

/* ---- linear ---- */

struct linear {
    const float *left, *bias;
    struct packed right;
    float *output;
    long left_stride, rows, columns, depth;
};

static void linear_part(void *given, int part, int parts) {
    const struct linear *w = given;
    if (w->rows >= 12 * parts) { /* rows shared out, whole tiles each */
        long start = part_start(w->rows, part, parts, 6), end = part_start(w->rows, part + 1, parts, 6);
        multiply(w->left + start * w->left_stride, w->left_stride, 1, w->right, end - start, w->columns, w->depth,
                 w->output + start * w->columns, w->columns, w->bias ? FROM_BIAS : FROM_ZERO, w->bias);
    } else { /* columns shared out, whole panels each */
        long start = part_start(w->columns, part, parts, PANEL), end = part_start(w->columns, part + 1, parts, PANEL);
        struct packed right = {w->right.at + start * w->depth, w->columns - start, w->depth};
        multiply(w->left, w->left_stride, 1, right, w->rows, end - start, w->depth,
                 w->output + start, w->columns, w->bias ? FROM_BIAS : FROM_ZERO, w->bias ? w->bias + start : NULL);
    }
}

/* Packs weight[columns, depth] for hone_linear. */
EXPORT void hone_pack(const float *weight, long columns, long depth, float *packed) {
    pack_transposed(weight, depth, columns, depth, packed);
}

EXPORT long hone_packed_size(long columns, long depth) { return packed_size(columns, depth); }

/* output[rows, columns] = left @ weight[columns, depth]^T + bias; `packed` may be NULL, `bias` too. */
EXPORT void hone_linear(const float *left, long left_stride, const float *weight, const float *packed,
                        const float *bias, float *output, long rows, long columns, long depth, int threads) {
    if (!packed) {
        float *fresh = scratch(SCRATCH_WEIGHTS, packed_size(columns, depth));
        pack_transposed(weight, depth, columns, depth, fresh);
        packed = fresh;
    }
    struct linear work = {left, bias, {packed, columns, depth}, output, left_stride, rows, columns, depth};
    in_parts(linear_part, &work, threads);
}

/* output[rows, columns] = left[rows, depth] @ right[depth, columns]. */
EXPORT void hone_product(const float *left, const float *right, float *output, long rows, long columns, long depth,
                         int threads) {
    float *packed = scratch(SCRATCH_WEIGHTS, packed_size(columns, depth));
    pack_straight(right, columns, depth, columns, PANEL, packed);
    struct linear work = {left, NULL, {packed, columns, depth}, output, depth, rows, columns, depth};
    in_parts(linear_part, &work, threads);
}

struct product_transposed {
    const float *left, *right;
    float *output;
    long rows, columns, depth;
};

static void product_transposed_part(void *given, int part, int parts) {
    const struct product_transposed *w = given;
    long start = part_start(w->rows, part, parts, 48), end = part_start(w->rows, part + 1, parts, 48);
    memset(w->output + start * w->columns, 0, 4 * (end - start) * w->columns);
    if (end > start && w->depth > 0)
        multiply_transposed(w->left + start, w->rows, w->right, w->columns, w->depth, end - start, w->columns,
                            w->output + start * w->columns, w->columns);
}

/* output[rows, columns] = left[depth, rows]^T @ right[depth, columns]. */
EXPORT void hone_product_transposed(const float *left, const float *right, float *output, long rows, long columns,
                                    long depth, int threads) {
    struct product_transposed work = {left, right, output, rows, columns, depth};
    in_parts(product_transposed_part, &work, threads);
}

/* ---- rms norm ---- */

static float inverse_rms(const float *x, long width, float epsilon) {
    vec sums[4] = {};
    long i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            vec part = load(x + i + v * LANES);
            sums[v] += part * part;
        }
    for (; i < width; i += LANES) {
        vec part = load_up_to(x + i, width - i, 0);
        sums[0] += part * part;
    }
    return 1.0f / sqrtf(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)width + epsilon);
}

/* `inverse` keeps 1 / rms of each row for the backward pass; it may be NULL. Every `group` rows of x lie together,
   and the groups `stride` apart. */
EXPORT void hone_rms_norm(const float *x, long stride, long group, const float *weight, float epsilon, float *output,
                          float *inverse, long rows, long width) {
    for (long row = 0; row < rows; row++) {
        const float *from = x + row / group * stride + row % group * width;
        float *to = output + row * width, scale = inverse_rms(from, width, epsilon);
        if (inverse) inverse[row] = scale;
        for (long i = 0; i < width; i += LANES) {
            vec scaled = load_up_to(from + i, width - i, 0) * scale;
            store_up_to(to + i, scaled * load_up_to(weight + i, width - i, 0), width - i);
        }
    }
}

/* sum = x + residual, output = rms_norm(sum). */
EXPORT void hone_add_rms_norm(const float *x, const float *residual, const float *weight, float epsilon, float *sum,
                              float *output, long rows, long width) {
    for (long i = 0; i < rows * width; i += LANES)
        store_up_to(sum + i,
                    load_up_to(x + i, rows * width - i, 0) + load_up_to(residual + i, rows * width - i, 0),
                    rows * width - i);
    hone_rms_norm(sum, width, 1, weight, epsilon, output, NULL, rows, width);
}

/* d_weight must begin at zero. */
EXPORT void hone_rms_norm_backward(const float *d_output, const float *x, long stride, long group,
                                   const float *weight, const float *inverse, float *d_x, float *d_weight, long rows, long width) {
    for (long row = 0; row < rows; row++) {
        const float *dy = d_output + row * width, *from = x + row / group * stride + row % group * width;
        float scale = inverse[row];
        vec dots = {};
        for (long i = 0; i < width; i += LANES) {
            long left = width - i;
            vec gradient = load_up_to(dy + i, left, 0), value = load_up_to(from + i, left, 0);
            dots += gradient * load_up_to(weight + i, left, 0) * value;
            store_up_to(d_weight + i, load_up_to(d_weight + i, left, 0) + gradient * value * scale, left);
        }
        float shrink = sum_of(dots) * scale * scale * scale / (float)width;
        for (long i = 0; i < width; i += LANES) {
            long left = width - i;
            vec direct = load_up_to(dy + i, left, 0) * load_up_to(weight + i, left, 0) * scale;
            store_up_to(d_x + row * width + i, direct - load_up_to(from + i, left, 0) * shrink, left);
        }
    }
}

/* ---- rotary ---- */

static void turn(const float *from, const float *c, const float *s, float *to, long half, bool back) {
    for (long i = 0; i < half; i += LANES) {
        long left = half - i;
        vec first = load_up_to(from + i, left, 0), second = load_up_to(from + half + i, left, 0);
        vec cosine = load_up_to(c + i, left, 0), sine = load_up_to(s + i, left, 0);
        if (back) sine = -sine;
        vec cross_first = second * sine, cross_second = first * sine;
        store_up_to(to + i, first * cosine - cross_first, left);
        store_up_to(to + half + i, second * cosine + cross_second, left);
    }
}

static void turn_heads(const float *x, const float *c, const float *s, float *to, long heads, long size, long rotated,
                       bool back) {
    for (long head = 0; head < heads; head++, x += size, to += size) {
        turn(x, c, s, to, rotated / 2, back);
        if (size > rotated) memcpy(to + rotated, x + rotated, 4 * (size - rotated));
    }
}

/* Turns the pairs (i, i + rotated/2) of each head by the row's angle; the rest of the head is copied. `back` turns
   the other way, which is the gradient. cos and sin are [rows, rotated], both halves equal. */
EXPORT void hone_rotary(const float *queries, long query_stride, long heads, const float *keys, long key_stride,
                        long kv_heads, const float *cosines, const float *sines, float *turned_queries,
                        float *turned_keys, long rows, long size, long rotated, int back) {
    for (long row = 0; row < rows; row++) {
        const float *c = cosines + row * rotated, *s = sines + row * rotated;
        turn_heads(queries + row * query_stride, c, s, turned_queries + row * heads * size, heads, size, rotated, back);
        turn_heads(keys + row * key_stride, c, s, turned_keys + row * kv_heads * size, kv_heads, size, rotated, back);
    }
}

/* ---- swiglu ---- */

EXPORT void hone_swiglu(const float *gate_up, float *output, long rows, long width) {
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
        for (long i = 0; i < width; i += LANES) {
            vec g = load_up_to(gate + i, width - i, 0), u = load_up_to(up + i, width - i, 0);
            store_up_to(output + row * width + i, g * sigmoid(g) * u, width - i);
        }
    }
}

EXPORT void hone_swiglu_backward(const float *d_output, const float *gate_up, float *d_gate_up, long rows,
                                 long width) {
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width, *dy = d_output + row * width;
        float *to = d_gate_up + row * 2 * width;
        for (long i = 0; i < width; i += LANES) {
            long left = width - i;
            vec g = load_up_to(gate + i, left, 0), u = load_up_to(up + i, left, 0), d = load_up_to(dy + i, left, 0);
            vec s = sigmoid(g);
            store_up_to(to + i, d * u * (s + g * s * (1.0f - s)), left);
            store_up_to(to + width + i, d * g * s, left);
        }
    }
}

/* ---- logprobs ---- */

/* logprobs[row] = log softmax(logits[row] / temperature[row])[target], NaN for a target outside the vocabulary; `normalizers` keeps max/T + log sum, for the
   backward pass; it may be NULL. temperature_step 0 means one temperature for all. */
EXPORT void hone_token_logprobs(const float *logits, const int64_t *targets, const float *temperatures,
                                long temperature_step, float *logprobs, float *normalizers, long rows, long vocabulary) {
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * vocabulary;
        float cold = 1.0f / temperatures[row * temperature_step];
        vec largest = spread(-INFINITY), sums[2] = {};
        for (long i = 0; i < vocabulary; i += LANES)
            largest = larger_of(largest, load_up_to(x + i, vocabulary - i, -INFINITY));
        float top = largest_of(largest);
        long i = 0;
        for (; i + 2 * LANES <= vocabulary; i += 2 * LANES) {
            sums[0] += exponential((load(x + i) - top) * cold);
            sums[1] += exponential((load(x + i + LANES) - top) * cold);
        }
        for (; i < vocabulary; i += LANES)
            sums[0] += exponential((load_up_to(x + i, vocabulary - i, -INFINITY) - top) * cold);
        float log_sum = (float)log((double)sum_of(sums[0] + sums[1]));
        int64_t target = targets[row];
        bool known = target >= 0 && target < vocabulary;
        logprobs[row] = known ? (x[target] - top) * cold - log_sum : NAN;
        if (normalizers) normalizers[row] = top * cold + log_sum;
    }
}

/* d_logits = (onehot - softmax) / T * d_logprobs. */
EXPORT void hone_token_logprobs_backward(const float *d_logprobs, const float *logits, const int64_t *targets,
                                         const float *temperatures, long temperature_step, const float *normalizers,
                                         float *d_logits, long rows, long vocabulary) {
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * vocabulary;
        float *to = d_logits + row * vocabulary;
        float cold = 1.0f / temperatures[row * temperature_step], scale = d_logprobs[row] * cold;
        for (long i = 0; i < vocabulary; i += LANES) {
            long left = vocabulary - i;
            vec probability = exponential(load_up_to(x + i, left, 0) * cold - normalizers[row]);
            store_up_to(to + i, -scale * probability, left);
        }
        if (targets[row] >= 0 && targets[row] < vocabulary) to[targets[row]] += scale;
    }
}

/* ---- cache ---- */

/* Rows of keys and values to their slots; caches are [slots, width]. */
EXPORT void hone_write_cache(const float *keys, long key_stride, const float *values, long value_stride,
                             float *key_cache, float *value_cache, const int64_t *slots, long rows, long width) {
    for (long row = 0; row < rows; row++) {
        memcpy(key_cache + slots[row] * width, keys + row * key_stride, 4 * width);
        memcpy(value_cache + slots[row] * width, values + row * value_stride, 4 * width);
    }
}

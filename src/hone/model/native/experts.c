/* A mixture of experts: the rows of each expert gathered, multiplied only with the experts they chose, and summed. */
#include "parts.h"
#include "products.h"
#include <stdbool.h>

/* Rows of one expert at a time, so that what lies between its two products stays in cache; backward more of them, as
   each block adds to the whole weight gradient: 96 to 256 rows took the step from 64 to 87 GFLOP/s at width 128. */
#define BLOCK 96
#define BLOCK_BACKWARD 256

void hone_swiglu(const float *gate_up, float *output, long rows, long width);
void hone_swiglu_backward(const float *d_output, const float *gate_up, float *d_gate_up, long rows, long width);

struct experts {
    const float *x, *weights, *gate_up, *down, *gate_up_packed, *down_packed;
    float *output, *hidden, *sorted_output;
    const int64_t *ids;
    int64_t *order; /* sorted place -> token * chosen + choice; sorted by expert, then by place in the batch */
    int64_t *place; /* its inverse */
    const int64_t *first; /* expert -> its first sorted place; [num_experts + 1] */
    long tokens, chosen, num_experts, width, inner, taken;
};

/* Counting sort of the choices by expert; false when an id names no expert. */
static bool sort_choices(const int64_t *ids, long choices, long num_experts, int64_t *first, int64_t *order,
                         int64_t *place) {
    memset(first, 0, 8 * (num_experts + 1));
    for (long i = 0; i < choices; i++) {
        if (ids[i] < 0 || ids[i] >= num_experts) return false;
        first[ids[i] + 1]++;
    }
    for (long e = 0; e < num_experts; e++) first[e + 1] += first[e];
    for (long i = 0; i < choices; i++) {
        place[i] = first[ids[i]]++;
        order[place[i]] = i;
    }
    memmove(first + 1, first, 8 * num_experts);
    first[0] = 0;
    return true;
}

static void gather(const float *x, const int64_t *order, long chosen, long count, long width, float *to) {
    for (long i = 0; i < count; i++) memcpy(to + i * width, x + order[i] / chosen * width, 4 * width);
}

static void pack_part(void *given, int part, int parts) {
    struct experts *w = given;
    long gate_up_size = packed_size(2 * w->inner, w->width), down_size = packed_size(w->width, w->inner);
    for (long e = part; e < w->num_experts; e += parts) {
        if (w->first[e] == w->first[e + 1]) continue;
        pack_transposed(w->gate_up + e * 2 * w->inner * w->width, w->width, 2 * w->inner, w->width,
                        (float *)w->gate_up_packed + e * gate_up_size);
        pack_transposed(w->down + e * w->width * w->inner, w->inner, w->width, w->inner,
                        (float *)w->down_packed + e * down_size);
    }
}

static void expert_block(struct experts *w, long expert, long start, long count) {
    long width = w->width, inner = w->inner;
    float *rows = scratch(SCRATCH_ROWS, BLOCK * width), *active = scratch(SCRATCH_ACTIVE, BLOCK * inner);
    float *hidden = w->hidden ? w->hidden + start * 2 * inner : scratch(SCRATCH_HIDDEN, BLOCK * 2 * inner);
    gather(w->x, w->order + start, w->chosen, count, width, rows);
    struct packed gate_up = {w->gate_up_packed + expert * packed_size(2 * inner, width), 2 * inner, width};
    struct packed down = {w->down_packed + expert * packed_size(width, inner), width, inner};
    multiply(rows, width, 1, gate_up, count, 2 * inner, width, hidden, 2 * inner, FROM_ZERO, NULL);
    hone_swiglu(hidden, active, count, inner);
    multiply(active, inner, 1, down, count, width, inner, w->sorted_output + start * width, width,
             FROM_ZERO, NULL);
}

static void forward_part(void *given, int part, int parts) {
    struct experts *w = given;
    (void)part, (void)parts;
    long piece = 0, mine = next_piece(&w->taken);
    for (long e = 0; e < w->num_experts; e++)
        for (long start = w->first[e]; start < w->first[e + 1]; start += BLOCK, piece++)
            if (piece == mine) {
                expert_block(w, e, start, smaller(BLOCK, w->first[e + 1] - start));
                mine = next_piece(&w->taken);
            }
}

/* output[token] = sum over choices, in their order, of (weight *) its row of `sorted`. */
static void combine(const float *sorted, const int64_t *place, const float *weights, float *output, long tokens,
                    long chosen, long width) {
    for (long token = 0; token < tokens; token++)
        for (long i = 0; i < width; i += LANES) {
            vec sum = {};
            for (long choice = token * chosen; choice < (token + 1) * chosen; choice++)
                sum += load_up_to(sorted + place[choice] * width + i, width - i, 0) *
                       (weights ? weights[choice] : 1.0f);
            store_up_to(output + token * width + i, sum, width - i);
        }
}

/* `order` [choices], `first` [num_experts + 1] and `hidden` [choices, 2 * inner] are kept for the backward pass; all
   three may be NULL, and the packed weights too.
   Returns 1, having done nothing, when an id names no expert. */
EXPORT int hone_experts(const float *x, const int64_t *ids, const float *weights, const float *gate_up,
                         const float *down, const float *gate_up_packed, const float *down_packed, float *output,
                         int64_t *order, int64_t *first, float *hidden, long tokens, long chosen, long num_experts,
                         long width, long inner, int threads) {
    long choices = tokens * chosen;
    int64_t *place = (int64_t *)scratch(SCRATCH_ORDER, 2 * (2 * choices + num_experts + 1));
    if (!first) order = place + choices, first = order + choices;
    if (!sort_choices(ids, choices, num_experts, first, order, place)) return 1;
    struct experts work = {.x = x, .weights = weights, .gate_up = gate_up, .down = down, .output = output,
                           .gate_up_packed = gate_up_packed, .down_packed = down_packed, .hidden = hidden,
                           .sorted_output = scratch(SCRATCH_OUTPUT, choices * width), .ids = ids, .order = order,
                           .place = place, .first = first, .tokens = tokens, .chosen = chosen,
                           .num_experts = num_experts, .width = width, .inner = inner};
    if (!gate_up_packed) {
        work.gate_up_packed = scratch(SCRATCH_WEIGHTS, num_experts * packed_size(2 * inner, width));
        work.down_packed = scratch(SCRATCH_WEIGHTS_2, num_experts * packed_size(width, inner));
        in_parts(pack_part, &work, threads);
    }
    in_parts(forward_part, &work, threads);
    combine(work.sorted_output, place, weights, output, tokens, chosen, width);
    return 0;
}

struct experts_backward {
    struct experts forward;
    const float *d_output;
    float *d_sorted, *d_weights, *d_gate_up, *d_down;
};

/* One block of one expert. With g = d_output of the row and a = swiglu(h): d_weight = (g @ down) . a, the gradient
   of a is weight * (g @ down), and that of down is g^T (weight * a). */
static void backward_block(struct experts_backward *b, struct packed gate_up, struct packed down, long expert,
                           long start, long count) {
    struct experts *w = &b->forward;
    long width = w->width, inner = w->inner;
    const int64_t *order = w->order + start;
    const float *hidden = w->hidden + start * 2 * inner;
    float *rows = scratch(SCRATCH_ROWS, BLOCK_BACKWARD * width), *active = scratch(SCRATCH_ACTIVE, BLOCK_BACKWARD * inner);
    float *d_active = scratch(SCRATCH_GRADIENT, BLOCK_BACKWARD * inner);
    float *d_hidden = scratch(SCRATCH_GRADIENT_2, BLOCK_BACKWARD * 2 * inner);
    hone_swiglu(hidden, active, count, inner);
    gather(b->d_output, order, w->chosen, count, width, rows);
    multiply(rows, width, 1, down, count, inner, width, d_active, inner, FROM_ZERO, NULL);
    for (long r = 0; r < count; r++) {
        float weight = w->weights[order[r]];
        vec dots = {};
        for (long i = 0; i < inner; i += LANES) {
            long left = inner - i;
            vec d = load_up_to(d_active + r * inner + i, left, 0), a = load_up_to(active + r * inner + i, left, 0);
            dots += d * a;
            store_up_to(d_active + r * inner + i, d * weight, left);
            store_up_to(active + r * inner + i, a * weight, left);
        }
        b->d_weights[order[r]] = sum_of(dots);
    }
    if (b->d_down)
        multiply_transposed(rows, width, active, inner, count, width, inner, b->d_down + expert * width * inner, inner);
    hone_swiglu_backward(d_active, hidden, d_hidden, count, inner);
    if (b->d_sorted)
        multiply(d_hidden, 2 * inner, 1, gate_up, count, width, 2 * inner, b->d_sorted + start * width, width,
                 FROM_ZERO, NULL);
    if (b->d_gate_up) {
        gather(w->x, order, w->chosen, count, width, rows);
        multiply_transposed(d_hidden, 2 * inner, rows, width, count, 2 * inner, width,
                            b->d_gate_up + expert * 2 * inner * width, width);
    }
}

/* One expert is one piece, so that its weight gradients add up in one order. */
static void backward_part(void *given, int part, int parts) {
    struct experts_backward *b = given;
    struct experts *w = &b->forward;
    (void)part, (void)parts;
    long width = w->width, inner = w->inner;
    for (long e; (e = next_piece(&w->taken)) < w->num_experts;) {
        if (w->first[e] == w->first[e + 1]) continue;
        float *gate_up = scratch(SCRATCH_WEIGHTS, packed_size(width, 2 * inner));
        float *down = scratch(SCRATCH_WEIGHTS_2, packed_size(inner, width));
        pack_straight(w->gate_up + e * 2 * inner * width, width, 2 * inner, width, PANEL, gate_up);
        pack_straight(w->down + e * width * inner, inner, width, inner, PANEL, down);
        for (long start = w->first[e]; start < w->first[e + 1]; start += BLOCK_BACKWARD)
            backward_block(b, (struct packed){gate_up, width, 2 * inner}, (struct packed){down, inner, width}, e,
                           start, smaller(BLOCK_BACKWARD, w->first[e + 1] - start));
    }
}

/* d_gate_up and d_down must begin at zero; each of d_x, d_gate_up, d_down may be NULL. */
EXPORT void hone_experts_backward(const float *d_output, const float *x, const float *weights, const float *gate_up,
                                  const float *down, int64_t *order, const int64_t *first, float *hidden, float *d_x,
                                  float *d_weights, float *d_gate_up, float *d_down, long tokens, long chosen,
                                  long num_experts, long width, long inner, int threads) {
    long choices = tokens * chosen;
    struct experts_backward work = {
        .forward = {.x = x, .weights = weights, .gate_up = gate_up, .down = down, .hidden = hidden, .order = order,
                    .first = first, .tokens = tokens, .chosen = chosen, .num_experts = num_experts, .width = width,
                    .inner = inner},
        .d_output = d_output, .d_sorted = d_x ? scratch(SCRATCH_OUTPUT, choices * width) : NULL,
        .d_weights = d_weights, .d_gate_up = d_gate_up, .d_down = d_down};
    in_parts(backward_part, &work, threads);
    if (!d_x) return;
    int64_t *place = (int64_t *)scratch(SCRATCH_ORDER, 2 * choices);
    for (long i = 0; i < choices; i++) place[order[i]] = i;
    combine(work.d_sorted, place, NULL, d_x, tokens, chosen, width);
}

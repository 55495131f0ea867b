/* Whole feed-forward layers in one call, out of the same kernels and so with the same bits as call by call: for
   decoding, where a call costs more than what it computes. */
#include "parts.h"
#include "products.h"

#define BLOCK 96

void hone_linear(const float *left, long left_stride, const float *weight, const float *packed, const float *bias,
                 float *output, long rows, long columns, long depth, int threads);
void hone_swiglu(const float *gate_up, float *output, long rows, long width);
void hone_route(const float *logits, const float *bias, int64_t *ids, float *weights, float *scores, long rows,
                long experts, long chosen, long groups, long kept_groups, int sigmoids, int normalise, float scale);
int hone_experts(const float *x, const int64_t *ids, const float *weights, const float *gate_up, const float *down,
                 const float *gate_up_packed, const float *down_packed, float *output, int64_t *order, int64_t *first,
                 float *hidden, long tokens, long chosen, long num_experts, long width, long inner, int threads);

struct mlp {
    const float *x;
    struct packed gate_up, down;
    float *output;
    long rows, width, inner;
};

static void mlp_part(void *given, int part, int parts) {
    const struct mlp *w = given;
    float *hidden = scratch(SCRATCH_HIDDEN, BLOCK * 2 * w->inner), *active = scratch(SCRATCH_ACTIVE, BLOCK * w->inner);
    for (long row = part * BLOCK; row < w->rows; row += parts * BLOCK) {
        long count = smaller(BLOCK, w->rows - row);
        multiply(w->x + row * w->width, w->width, 1, w->gate_up, count, 2 * w->inner, w->width, hidden, 2 * w->inner,
                 FROM_ZERO, NULL);
        hone_swiglu(hidden, active, count, w->inner);
        multiply(active, w->inner, 1, w->down, count, w->width, w->inner, w->output + row * w->width, w->width,
                 FROM_ZERO, NULL);
    }
}

static struct packed packed_or_fresh(const float *weight, const float *packed, long columns, long depth,
                                     enum scratch_slot slot) {
    if (!packed) {
        float *fresh = scratch(slot, packed_size(columns, depth));
        pack_transposed(weight, depth, columns, depth, fresh);
        packed = fresh;
    }
    return (struct packed){packed, columns, depth};
}

/* output = swiglu(x @ gate_up^T) @ down^T; either packed weight may be NULL. */
EXPORT void hone_mlp(const float *x, const float *gate_up, const float *down, const float *gate_up_packed,
                     const float *down_packed, float *output, long rows, long width, long inner, int threads) {
    struct mlp work = {x, packed_or_fresh(gate_up, gate_up_packed, 2 * inner, width, SCRATCH_WEIGHTS),
                       packed_or_fresh(down, down_packed, width, inner, SCRATCH_WEIGHTS_2), output, rows, width, inner};
    in_parts(mlp_part, &work, threads);
}

/* Router, experts and, when `shared_inner` is not 0, the shared expert: output = experts(x) + mlp(x). */
EXPORT void hone_mixture(const float *x, const float *router, const float *router_packed, const float *bias,
                         const float *gate_up, const float *down, const float *gate_up_packed,
                         const float *down_packed, const float *shared_gate_up, const float *shared_down,
                         const float *shared_gate_up_packed, const float *shared_down_packed, float *output, long rows,
                         long width, long num_experts, long inner, long shared_inner, long chosen, long groups,
                         long kept_groups, int sigmoids, int normalise, float scale, int threads) {
    float *logits = scratch(SCRATCH_ROUTE, rows * (2 * num_experts + 3 * chosen) + 1);
    float *scores = logits + rows * num_experts, *weights = scores + rows * num_experts;
    int64_t *ids = (int64_t *)(((uintptr_t)(weights + rows * chosen) + 7) & ~(uintptr_t)7);
    hone_linear(x, width, router, router_packed, NULL, logits, rows, num_experts, width, 1);
    hone_route(logits, bias, ids, weights, scores, rows, num_experts, chosen, groups, kept_groups, sigmoids, normalise,
               scale);
    hone_experts(x, ids, weights, gate_up, down, gate_up_packed, down_packed, output, NULL, NULL, NULL, rows, chosen,
                 num_experts, width, inner, threads);
    if (!shared_inner) return;
    float *shared = scratch(SCRATCH_OUTPUT, rows * width);
    hone_mlp(x, shared_gate_up, shared_down, shared_gate_up_packed, shared_down_packed, shared, rows, width,
             shared_inner, threads);
    for (long i = 0; i < rows * width; i += LANES) {
        long left = rows * width - i;
        store_up_to(output + i, load_up_to(output + i, left, 0) + load_up_to(shared + i, left, 0), left);
    }
}

/* The choice of experts for each token, and the weights of those chosen. */
#include "vectors.h"
#include "parts.h"
#include <math.h>
#include <stdbool.h>

static void score(const float *logits, float *scores, long experts, bool sigmoids) {
    vec largest = spread(-INFINITY), sums = {};
    for (long e = 0; e < experts; e += LANES)
        largest = larger_of(largest, load_up_to(logits + e, experts - e, -INFINITY));
    float top = largest_of(largest);
    for (long e = 0; e < experts; e += LANES) {
        vec x = load_up_to(logits + e, experts - e, -INFINITY);
        vec y = sigmoids ? sigmoid(x) : exponential(x - top);
        sums += y;
        store_up_to(scores + e, y, experts - e);
    }
    float inverse = 1.0f / sum_of(sums);
    for (long e = 0; e < experts && !sigmoids; e++) scores[e] *= inverse;
}

/* The place of the largest value, the first of equal ones; it is then taken out. */
static long take_largest(float *values, bool *taken, long count) {
    long best = -1;
    for (long i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    taken[best] = true;
    return best;
}

/* Closes (marks as taken) the experts outside the best groups; a group is as good as its two best experts. */
static void close_groups(const float *merits, bool *taken, long experts, long groups, long kept, float *group_merits,
                         bool *open) {
    long each = experts / groups;
    for (long g = 0; g < groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (long e = g * each; e < (g + 1) * each; e++) {
            if (merits[e] > first) second = first, first = merits[e];
            else if (merits[e] > second) second = merits[e];
        }
        group_merits[g] = each > 1 ? first + second : first;
        open[g] = false;
    }
    for (long i = 0; i < kept; i++) take_largest(group_merits, open, groups);
    for (long e = 0; e < experts; e++) taken[e] = !open[e / each];
}

/* ids and weights are [rows, chosen], best first; scores [rows, experts] are kept for the backward pass. `bias`
   may be NULL: it counts for the choice only. */
EXPORT void hone_route(const float *logits, const float *bias, int64_t *ids, float *weights, float *scores, long rows,
                       long experts, long chosen, long groups, long kept_groups, int sigmoids, int normalise,
                       float scale) {
    float *merits = scratch(SCRATCH_ROWS, 2 * experts), *group_merits = merits + experts;
    bool *taken = (bool *)scratch(SCRATCH_ORDER, experts), *open = taken + experts;
    for (long row = 0; row < rows; row++, logits += experts, scores += experts, ids += chosen, weights += chosen) {
        score(logits, scores, experts, sigmoids);
        for (long e = 0; e < experts; e++) merits[e] = bias ? scores[e] + bias[e] : scores[e];
        memset(taken, 0, experts);
        if (kept_groups < groups) close_groups(merits, taken, experts, groups, kept_groups, group_merits, open);
        float sum = 0;
        for (long j = 0; j < chosen; j++) {
            ids[j] = take_largest(merits, taken, experts);
            sum += scores[ids[j]];
        }
        float factor = normalise ? scale / (sum + 1e-20f) : scale;
        for (long j = 0; j < chosen; j++) weights[j] = scores[ids[j]] * factor;
    }
}

/* Gradient of the logits from that of the weights. */
EXPORT void hone_route_backward(const float *d_weights, const int64_t *ids, const float *scores, float *d_logits,
                                long rows, long experts, long chosen, int sigmoids, int normalise, float scale) {
    memset(d_logits, 0, 4 * rows * experts);
    for (long row = 0; row < rows; row++, d_weights += chosen, ids += chosen, scores += experts, d_logits += experts) {
        float sum = 0, dot = 0;
        for (long j = 0; j < chosen; j++) {
            sum += scores[ids[j]];
            dot += scores[ids[j]] * d_weights[j];
        }
        float inverse = 1.0f / (sum + 1e-20f), through_scores = 0;
        for (long j = 0; j < chosen; j++) {
            float s = scores[ids[j]];
            float d_score = normalise ? scale * inverse * (d_weights[j] - dot * inverse) : scale * d_weights[j];
            d_logits[ids[j]] = sigmoids ? d_score * s * (1 - s) : d_score * s;
            through_scores += d_score * s;
        }
        for (long e = 0; e < experts && !sigmoids; e++) d_logits[e] -= scores[e] * through_scores;
    }
}

/* Drawing tokens: the inverse of the cumulative distribution, each row from its own random number. */
#include "parts.h"
#include "vectors.h"
#include <math.h>

/* Weights e^((logit - max) / temperature), a multiple of LANES of them; returns their sum. */
static double weigh(const float *logits, float cold, float *weights, long vocabulary) {
    vec largest = spread(-INFINITY);
    for (long i = 0; i < vocabulary; i += LANES)
        largest = larger_of(largest, load_up_to(logits + i, vocabulary - i, -INFINITY));
    float top = largest_of(largest);
    double total = 0;
    for (long i = 0; i < vocabulary; i += LANES) {
        vec weight = exponential((load_up_to(logits + i, vocabulary - i, -INFINITY) - top) * cold);
        store(weights + i, weight);
        total += sum_of(weight);
    }
    return total;
}

/* tokens[row]: the first at which the weights, summed in the order of the vocabulary, exceed uniforms[row] of their
   total. A weight of 0 is never drawn; logits that are not numbers give the last token. */
EXPORT void hone_draw(const float *logits, const float *temperatures, const float *uniforms, int64_t *tokens,
                      long rows, long vocabulary) {
    float *weights = scratch(SCRATCH_ROWS, round_up(vocabulary, LANES));
    for (long row = 0; row < rows; row++) {
        double wanted = uniforms[row] * weigh(logits + row * vocabulary, 1.0f / temperatures[row], weights, vocabulary);
        double before = 0;
        long block = 0, drawn = vocabulary - 1;
        for (; block < vocabulary; block += LANES) {
            double sum = sum_of(load(weights + block));
            if (before + sum > wanted) break;
            before += sum;
        }
        /* Within the block the sum is taken lane by lane and may round otherwise: its last weight above 0 is the
           one when none exceeds. */
        for (long i = block; i < smaller(block + LANES, vocabulary); i++) {
            if (weights[i] > 0) drawn = i;
            before += weights[i];
            if (before > wanted && weights[i] > 0) break;
        }
        tokens[row] = drawn;
    }
}

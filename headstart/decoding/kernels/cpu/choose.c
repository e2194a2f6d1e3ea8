// The choice of tokens from logits, and the verification of drafts by them: arithmetic of a few microseconds, for which torch's
// operators take as long as a small model's whole pass. Compiled without -ffast-math, so that results are the same for every shape.

#include <math.h>
#include <stdint.h>

#include "pool.h"

static inline uint64_t mix(uint64_t x) {  // SplitMix64's finaliser
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

typedef struct {
    const int64_t *seeds, *positions;
    float *y;
    long V;
} Noise;

static void noise_part(void *argument, long from, long to) {
    const Noise a = *(const Noise *)argument;
    const uint64_t step = 0x9E3779B97F4A7C15u;
    for (long r = from; r < to; r++) {
        const uint64_t key = mix(mix((uint64_t)a.seeds[r] + step) + (uint64_t)a.positions[r] * step);
        for (long v = 0; v < a.V; v++) {
            const uint32_t bits = (uint32_t)(mix(key + (uint64_t)(v + 1) * step) >> 32);
            float uniform = ((float)bits + 0.5f) * 0x1p-32f;
            if (uniform > 1 - 0x1p-24f) uniform = 1 - 0x1p-24f;
            a.y[r * a.V + v] = -logf(-log1pf(-uniform));
        }
    }
}

// Make standard Gumbel noise (rows, V): a hash of seed, position and token, as in `position_noise`.
void noise(const int64_t *seeds, const int64_t *positions, float *y, long rows, long V, int threads) {
    Noise a = {seeds, positions, y, V};
    parallel(noise_part, &a, rows, rows * V > 1 << 14 ? threads : 1);
}

// Return the index of the largest of x[0..V), the first of equals, without a branch per element.
static long largest(const float *x, long V) {
    float top = x[0];
    for (long v = 1; v < V; v++) top = x[v] > top ? x[v] : top;
    for (long v = 0; v < V; v++)
        if (x[v] == top) return v;
    return 0;  // only NaNs
}

// Choose tokens (rows,) from logits (rows, V); row r belongs to slot r / per. The token is the one with the largest logit, or if
// the slot's temperature is above 0 the one with the largest (logit - top) / temperature + noise (rows, V).
void choose(const float *logits, const float *temperature, const float *noise, int64_t *tokens, float *scratch, long rows,
            long per, long V) {
    for (long r = 0; r < rows; r++, logits += V) {
        const float t = temperature[r / per];
        const long best = largest(logits, V);
        tokens[r] = best;
        if (!noise || !(t > 0)) continue;
        const float top = logits[best], *g = noise + r * V;
        for (long v = 0; v < V; v++) scratch[v] = (logits[v] - top) / t + g[v];
        tokens[r] = largest(scratch, V);
    }
}

// Compute the probability (rows,) of tokens (rows,) under softmax(logits / temperature); a temperature of 0 counts as 1.
void confidence(const float *logits, const float *temperature, const int64_t *tokens, float *y, long rows, long per, long V) {
    for (long r = 0; r < rows; r++, logits += V) {
        const float t = temperature[r / per] > 0 ? temperature[r / per] : 1, mine = logits[tokens[r]];
        float sum = 0;
        for (long v = 0; v < V; v++) sum += expf((logits[v] - mine) / t);
        y[r] = 1 / sum;
    }
}

// Verify chains: window (S, n), whose first R tokens were fed, drafted[s] of them drafts; tokens (S, R): head 1's choice after
// each. Sets accepted (S,), the number of drafts before the first wrong one, advances the lengths, and writes the next roots.
// drafted becomes the number of drafts that this pass makes: `drafting` heads draft, of which a slot uses heads[s] - 1.
void settle(const int64_t *tokens, int64_t *window, int64_t *drafted, int64_t *length, const int64_t *heads, int64_t *accepted,
            long S, long R, long n, long drafting) {
    for (long s = 0; s < S; s++) {
        long a = 0;
        while (a < R - 1 && a < drafted[s] && window[s * n + a + 1] == tokens[s * R + a]) a++;
        accepted[s] = a;
        length[s] += a + 1;
        window[s * n] = tokens[s * R + a];
        drafted[s] = heads[s] - 1 < drafting ? heads[s] - 1 : drafting;
    }
}

// Verify trees, otherwise like `settle`: row i is a draft at depth[i] after row parent[i] < i. It is right if its parent is right
// and head 1 chose it there. drafted (S,): the number of depths that hold drafts. row (S,): the deepest right row; accepted (S,):
// its depth.
void settle_tree(const int64_t *tokens, int64_t *window, int64_t *drafted, int64_t *length, const int64_t *heads,
                 int64_t *accepted, int64_t *row, const int64_t *parent, const int64_t *depth, long S, long R, long n,
                 long drafting) {
    for (long s = 0; s < S; s++) {
        char right[R];
        long best = 0;
        right[0] = 1;
        for (long i = 1; i < R; i++) {
            right[i] = right[parent[i]] && depth[i] <= drafted[s] && window[s * n + i] == tokens[s * R + parent[i]];
            if (right[i] && depth[i] > depth[best]) best = i;
        }
        row[s] = best;
        accepted[s] = depth[best];
        length[s] += depth[best] + 1;
        window[s * n] = tokens[s * R + best];
        drafted[s] = heads[s] - 1 < drafting ? heads[s] - 1 : drafting;
    }
}

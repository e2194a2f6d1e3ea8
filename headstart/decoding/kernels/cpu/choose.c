// Choosing tokens from logits, and what a pass decides by them: arithmetic of a few microseconds, for which torch's operators
// take a small model's whole pass. Compiled without -ffast-math: what is computed here is the same for every shape.

#include <math.h>
#include <stdint.h>

static inline uint64_t mix(uint64_t x) {  // SplitMix64's finaliser
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Standard Gumbel noise (rows, V): a hash of seed, position and token, as `position_noise` has it.
void noise(const int64_t *seeds, const int64_t *positions, float *y, long rows, long V, int threads) {
    const uint64_t step = 0x9E3779B97F4A7C15u;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * V > 1 << 14)
    for (long r = 0; r < rows; r++) {
        const uint64_t key = mix(mix((uint64_t)seeds[r] + step) + (uint64_t)positions[r] * step);
        for (long v = 0; v < V; v++) {
            const uint32_t bits = (uint32_t)(mix(key + (uint64_t)(v + 1) * step) >> 32);
            float uniform = ((float)bits + 0.5f) * 0x1p-32f;
            if (uniform > 1 - 0x1p-24f) uniform = 1 - 0x1p-24f;
            y[r * V + v] = -logf(-log1pf(-uniform));
        }
    }
}

// The place of the largest of x[0..V): the first of equals, found without a branch per element.
static long largest(const float *x, long V) {
    float top = x[0];
    for (long v = 1; v < V; v++) top = x[v] > top ? x[v] : top;
    for (long v = 0; v < V; v++)
        if (x[v] == top) return v;
    return 0;  // only NaNs
}

// Tokens (rows,) of logits (rows, V), row r of slot r / per: the largest, or where the slot's temperature is above 0 the
// largest of (logit - top) / temperature + noise (rows, V).
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

// The probability (rows,) of tokens (rows,) under softmax(logits / temperature), a temperature of 0 counting as 1.
void confidence(const float *logits, const float *temperature, const int64_t *tokens, float *y, long rows, long per, long V) {
    for (long r = 0; r < rows; r++, logits += V) {
        const float t = temperature[r / per] > 0 ? temperature[r / per] : 1, mine = logits[tokens[r]];
        float sum = 0;
        for (long v = 0; v < V; v++) sum += expf((logits[v] - mine) / t);
        y[r] = 1 / sum;
    }
}

// Which drafts were right: window (S, n) of which R tokens were fed, drafted[s] of them drafts; tokens (S, R) that head 1
// says after each. accepted (S,): the drafts before the first wrong one. Moves lengths on, and the root to its place; drafted
// becomes what this pass drafts, with `drafting` heads after head 1, of which a slot uses heads[s] - 1.
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

// `settle` for windows that are trees: row i is a draft of depth[i] after row parent[i] < i, right if its parent is and head 1
// says it there. drafted (S,): of how many depths there are drafts. row (S,): the deepest right one; accepted (S,): its depth.
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

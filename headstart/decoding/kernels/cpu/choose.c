// The choice of tokens from logits, and the verification of drafts by them: arithmetic of a few microseconds, for which torch's
// operators take as long as a small model's whole pass. Compiled without -ffast-math, so that results are the same for every shape.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

#define STEP 0x9E3779B97F4A7C15u

static inline uint64_t mix(uint64_t x) {  // SplitMix64's finaliser
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static inline uint64_t key_of(int64_t seed, int64_t position) {
    return mix(mix((uint64_t)seed + STEP) + (uint64_t)position * STEP);
}

static inline uint32_t bits_of(uint64_t key, long token) { return (uint32_t)(mix(key + (uint64_t)(token + 1) * STEP) >> 32); }

// Return the noise of 32 random bits: the fewer, the larger.
static inline float gumbel(uint32_t bits) {
    float uniform = ((float)bits + 0.5f) * 0x1p-32f;
    if (uniform > 1 - 0x1p-24f) uniform = 1 - 0x1p-24f;
    return -logf(-log1pf(-uniform));
}

typedef struct {
    const int64_t *seeds, *positions;
    float *y;
    long V;
} Noise;

static void noise_part(void *argument, long from, long to) {
    const Noise a = *(const Noise *)argument;
    for (long r = from; r < to; r++) {
        const uint64_t key = key_of(a.seeds[r], a.positions[r]);
        for (long v = 0; v < a.V; v++) a.y[r * a.V + v] = gumbel(bits_of(key, v));
    }
}

// Make standard Gumbel noise (rows, V): a hash of seed, position and token, as in `position_noise`.
void noise(const int64_t *seeds, const int64_t *positions, float *y, long rows, long V, int threads) {
    Noise a = {seeds, positions, y, V};
    parallel(noise_part, &a, rows, rows * V > 1 << 14 ? threads : 1);
}

#define BLOCK 32  // logits whose largest decides whether any of them is looked at

static inline float larger(float a, float b) { return b > a ? b : a; }

// Set most[i] to the largest of block i of x[0..V). Return the index of the largest of all, the first of equals.
static long largest(const float *x, long V, float *most) {
    const long blocks = (V + BLOCK - 1) / BLOCK;
    for (long i = 0; i < V / BLOCK; i++) {
        const float *at = x + i * BLOCK;
        float top[8];
        for (int j = 0; j < 8; j++) top[j] = larger(larger(at[j], at[j + 8]), larger(at[j + 16], at[j + 24]));
        for (int width = 4; width; width /= 2)
            for (int j = 0; j < width; j++) top[j] = larger(top[j], top[j + width]);
        most[i] = top[0];
    }
    if (V % BLOCK) most[blocks - 1] = x[V / BLOCK * BLOCK];
    for (long v = V / BLOCK * BLOCK; v < V; v++) most[blocks - 1] = larger(most[blocks - 1], x[v]);
    float top = most[0];
    for (long i = 1; i < blocks; i++) top = larger(top, most[i]);
    for (long i = 0; i < blocks; i++)
        for (long v = i * BLOCK; most[i] == top && v < V && v < (i + 1) * BLOCK; v++)
            if (x[v] == top) return v;
    return 0;  // only NaNs
}

// The best tokens so far, `size` of at most `count`, by falling score; of equals the lower index is first.
typedef struct {
    int64_t *tokens;
    float *scores;
    long size, count;
} Best;

static void offer(Best *best, float score, long token) {
    long i = best->size;
    while (i > 0 && (score > best->scores[i - 1] || (score == best->scores[i - 1] && token < best->tokens[i - 1]))) i--;
    if (i == best->count) return;
    if (best->size < best->count) best->size++;
    for (long j = best->size - 1; j > i; j--) best->scores[j] = best->scores[j - 1], best->tokens[j] = best->tokens[j - 1];
    best->scores[i] = score, best->tokens[i] = token;
}

// Offer all tokens by their logits, but blocks that are below the best.
static void rank(Best *best, const float *x, const float *most, long V) {
    for (long from = 0; from < V; from += BLOCK) {
        if (best->size == best->count && !(most[from / BLOCK] > best->scores[best->count - 1])) continue;
        for (long v = from; v < V && v < from + BLOCK; v++) offer(best, x[v], v);
    }
}

static int any_below(uint64_t key, long from, uint32_t limit) {
    uint32_t below = 0;
    for (long i = 0; i < BLOCK; i++) below |= bits_of(key, from + i) <= limit;
    return below;
}

// Offer all tokens by (x - x[first]) / t + noise, but those that cannot be among the best. x[first] is the largest logit.
//
// A token needs noise g of at least the worst of the best scores less its block's largest (x - x[first]) / t. Noise is
// -log(-log(1 - u)) for a uniform u of 32 bits: at most 22.88, and u < exp(-g). So a block whose need is larger is left out, and in
// others logarithms are computed only of bits up to 2^32 exp(-need), rounded up to a power of two.
static void draw(Best *best, const float *x, const float *most, long V, float t, uint64_t key, long first) {
    const float top = x[first];
    offer(best, gumbel(bits_of(key, first)), first);
    for (long from = 0; from < V; from += BLOCK) {
        uint32_t limit = UINT32_MAX;
        if (best->size == best->count) {
            const float worst = best->scores[best->count - 1], rounding = 1e-4f + 1e-6f * fabsf(worst);
            const float need = worst - (most[from / BLOCK] - top) / t - rounding;
            if (need >= 23) continue;
            if (need > 0) limit = (uint32_t)((uint64_t)UINT32_MAX >> (int)(need * 1.442695f));
            if (from + BLOCK <= V && !any_below(key, from, limit)) continue;
        }
        for (long v = from; v < V && v < from + BLOCK; v++) {
            const uint32_t bits = bits_of(key, v);
            if (bits <= limit && v != first) offer(best, (x[v] - top) / t + gumbel(bits), v);
        }
    }
}

typedef struct {
    const float *logits, *temperature;
    const int64_t *seeds, *positions;
    int64_t *tokens;
    long per, V, count;
} Choice;

static int is_finite(float x) {  // isfinite is always true under -ffinite-math-only
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000) != 0x7f800000;
}

static void choose_part(void *argument, long from, long to) {
    const Choice a = *(const Choice *)argument;
    float *most = malloc(sizeof(float) * ((a.V + BLOCK - 1) / BLOCK + a.count));
    for (long r = from; r < to; r++) {
        const float *x = a.logits + r * a.V, t = a.temperature[r / a.per];
        const long first = largest(x, a.V, most);
        Best best = {a.tokens + r * a.count, most + (a.V + BLOCK - 1) / BLOCK, 0, a.count};
        if (a.seeds && t > 0 && is_finite(x[first])) draw(&best, x, most, a.V, t, key_of(a.seeds[r], a.positions[r]), first);
        else if (a.count == 1) *best.tokens = first;
        else rank(&best, x, most, a.V);
    }
    free(most);
}

// Choose the best `count` tokens (rows, count) from logits (rows, V); row r belongs to slot r / per. The best are those with the
// largest logits, or if the slot's temperature is above 0 those with the largest (logit - top) / temperature + noise of `seeds` and
// `positions` (rows,). seeds: NULL if all slots are greedy.
void choose(const float *logits, const float *temperature, const int64_t *seeds, const int64_t *positions, int64_t *tokens,
            long rows, long per, long V, long count, int threads) {
    Choice a = {logits, temperature, seeds, positions, tokens, per, V, count};
    parallel(choose_part, &a, rows, rows * V > (seeds ? 1 << 16 : 1 << 19) ? threads : 1);
}

// Replace the BLOCK values of x by exp(x), to 2 ulp, and values below -80 by exp(-80).
static void exp_block(float *x) {
    int32_t power[BLOCK];
    for (int i = 0; i < BLOCK; i++) x[i] = larger(-80, x[i]);
    for (int i = 0; i < BLOCK; i++) power[i] = (int32_t)(x[i] * 1.44269504f - 0.5f);
    for (int i = 0; i < BLOCK; i++) {
        const float n = (float)power[i], r = x[i] - n * 0.693359375f + n * 2.12194440e-4f;
        float p = 1.9875691500e-4f;  // Cephes' polynomial
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        x[i] = p * r * r + r + 1;
    }
    for (int i = 0; i < BLOCK; i++) power[i] = (power[i] + 127) << 23;
    float scale[BLOCK];
    memcpy(scale, power, sizeof scale);
    for (int i = 0; i < BLOCK; i++) x[i] *= scale[i];
}

typedef struct {
    const float *logits, *temperature;
    const int64_t *tokens;
    float *y;
    long per, V;
} Confidence;

static void confidence_part(void *argument, long from, long to) {
    const Confidence a = *(const Confidence *)argument;
    float *most = malloc(sizeof(float) * ((a.V + BLOCK - 1) / BLOCK));
    for (long r = from; r < to; r++) {
        const float *x = a.logits + r * a.V, t = a.temperature[r / a.per] > 0 ? a.temperature[r / a.per] : 1;
        const float top = x[largest(x, a.V, most)];
        float sum[8] = {0};
        for (long v = 0; v < a.V; v += BLOCK) {
            if ((most[v / BLOCK] - top) / t < -40) continue;  // they add less than rounding does
            float part[BLOCK];
            const long count = a.V - v < BLOCK ? a.V - v : BLOCK;
            memcpy(part, x + v, sizeof(float) * count);
            for (long i = count; i < BLOCK; i++) part[i] = top - 80 * t;
            for (int i = 0; i < BLOCK; i++) part[i] = (part[i] - top) / t;
            exp_block(part);
            for (int i = 0; i < BLOCK; i += 8)
                for (int j = 0; j < 8; j++) sum[j] += part[i + j];
        }
        for (int j = 1; j < 8; j++) sum[0] += sum[j];
        a.y[r] = expf((x[a.tokens[r]] - top) / t) / sum[0];
    }
    free(most);
}

// Compute the probability (rows,) of tokens (rows,) under softmax(logits / temperature); a temperature of 0 counts as 1.
void confidence(const float *logits, const float *temperature, const int64_t *tokens, float *y, long rows, long per, long V,
                int threads) {
    Confidence a = {logits, temperature, tokens, y, per, V};
    parallel(confidence_part, &a, rows, rows * V > 1 << 18 ? threads : 1);
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
// its depth. stride: the rows of each slot in parent and depth, where each slot has its own tree; 0: one tree for all slots.
void settle_tree(const int64_t *tokens, int64_t *window, int64_t *drafted, int64_t *length, const int64_t *heads,
                 int64_t *accepted, int64_t *row, const int64_t *parent, const int64_t *depth, long S, long R, long n,
                 long drafting, long stride) {
    for (long s = 0; s < S; s++, parent += stride, depth += stride) {
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

// Attention over cached keys and values, for the rows of all slots. The file that includes this one defines `real`, the type of
// activations, `to_float`, `store_row` and `attend_rows`.
#include <string.h>

typedef struct {
    const real *q, *k, *v;
    const long *q_stride, *k_stride, *v_stride;
    real *y;
    float *keys, *values;
    const long *at, *row, *slot;
    const Tree *tree;
    long H, G, W, E, capacity;
} Attention;

// Return where the keys and the values of a pair of a slot and a group of heads begin in the cache.
static inline long cached(const Attention *a, long pair) {
    return ((a->slot ? a->slot[pair / a->G] : pair / a->G) * a->G + pair % a->G) * a->E * a->capacity;
}

// Write the new keys and values of pairs `from` to `to` - 1 of a slot and a group of heads into the cache.
static void cache_part(void *argument, long from, long to) {
    const Attention *a = argument;
    const long G = a->G, W = a->W, E = a->E, *at = a->at;
    for (long pair = from; pair < to; pair++) {
        const long s = pair / G, g = pair % G;
        if (at[s * W] < 0) continue;
        float *kc = a->keys + cached(a, pair), *vc = a->values + cached(a, pair);
        for (long w = 0; w < W; w++) {
            const real *kr = a->k + s * a->k_stride[0] + g * a->k_stride[1] + w * a->k_stride[2];
            const real *vr = a->v + s * a->v_stride[0] + g * a->v_stride[1] + w * a->v_stride[2];
            const long position = at[s * W + w];
            for (long e = 0; e < E; e++) {
                kc[position / 16 * 16 * E + e * 16 + position % 16] = to_float(kr[e]);
                vc[position * E + e] = to_float(vr[e]);
            }
        }
    }
}

// Return the position up to which the rows of slot s may look.
static inline long end_of(const Attention *a, long s) {
    return a->at[s * a->W + (a->row && !a->tree ? a->row[s] : a->W - 1)];
}

// Return how many tiles of up to 4 rows, of all heads of a group, a pair has.
static inline long attention_tiles(const Attention *a) { return (a->H / a->G * (a->row ? 1 : a->W) + 3) / 4; }

// Attend for the rows `first` to `first` + R - 1 of a pair, R <= 4. score: room for 4 rows of scores.
static void attend_tile(const Attention *a, long pair, long first, int R, float *score) {
    const long H = a->H, G = a->G, W = a->W, E = a->E, group = H / G, Q = a->row ? 1 : W, *at = a->at;
    const Tree *tree = a->tree;
    const long s = pair / G, g = pair % G, start = at[s * W] - (tree ? tree->first : 0);
    const long rows = tree ? (a->slot ? a->slot[s] : s) * tree->stride : 0;
    const float scale = 1.0f / sqrtf((float)E), *kc = a->keys + cached(a, pair), *vc = a->values + cached(a, pair);
    const long end = end_of(a, s);
    float rows_q[4 * E], rows_y[4 * E];
    long last[4], depth[4], seen = 0;  // the last position that one of the rows sees
    const long *path[4];
    for (int r = 0; r < R; r++) {
        const long head = g * group + (first + r) / Q, i = (first + r) % Q, w = a->row ? a->row[s] : i;
        const real *qr = a->q + s * a->q_stride[0] + head * a->q_stride[1] + i * a->q_stride[2];
        for (long e = 0; e < E; e++) rows_q[r * E + e] = to_float(qr[e]) * scale;
        last[r] = tree ? end : at[s * W + w];
        seen = last[r] > seen ? last[r] : seen;
        depth[r] = tree ? tree->depth[rows + w] : 0;
        path[r] = tree ? tree->path + (rows + w) * tree->deep : NULL;
    }
    // The first row of a sequential head may lie at the end of the cache, where nothing reads it: it sees no further.
    const long span = ((seen < end ? seen : end) + 16) / 16 * 16;
    switch (R) {
        case 1: attend_rows(1, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y); break;
        case 2: attend_rows(2, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y); break;
        case 3: attend_rows(3, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y); break;
        default: attend_rows(4, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y);
    }
    for (int r = 0; r < R; r++) {
        const long head = g * group + (first + r) / Q, i = (first + r) % Q;
        store_row(a->y + ((s * Q + i) * H + head) * E, rows_y + r * E, E);
    }
}

// Attend for tiles `from` to `to` - 1 of all pairs.
static void attend_part(void *argument, long from, long to) {
    const Attention *a = argument;
    const long H = a->H, G = a->G, W = a->W, E = a->E, group = H / G, Q = a->row ? 1 : W, tiles = attention_tiles(a);
    long longest = 0;
    for (long s = from / tiles / G; s <= (to - 1) / tiles / G; s++) longest = end_of(a, s) > longest ? end_of(a, s) : longest;
    float *score = malloc(4 * (longest + 16) * sizeof(float));
    for (long tile = from; tile < to; tile++) {
        const long pair = tile / tiles, s = pair / G, first = tile % tiles * 4, rows = group * Q;
        if (a->at[s * W] >= 0) attend_tile(a, pair, first, rows - first < 4 ? (int)(rows - first) : 4, score);
        else if (!first)
            for (long i = 0; i < Q; i++) memset(a->y + ((s * Q + i) * H + pair % G * group) * E, 0, group * E * sizeof(real));
    }
    free(score);
}

// Write the new keys and values of W rows per slot at their consecutive positions in the cache, then attend for Q rows per slot:
// all W rows, or the one row that row (S,) names. Row i sees everything up to its position, or the rows that the tree gives it.
// q (S, H, Q, E), k and v (S, G, W, E): `real`, with the strides of the first three axes; E is dense. y (S, Q, H, E).
// keys (S, G, capacity / 16, E, 16) and values (S, G, capacity, E): fp32. at (S, W): the positions.
// E and capacity are multiples of 16, and every position is below capacity. A slot whose first position is negative takes no part:
// nothing is written for it, and its y is 0. slot (S,): the slots of the cache that the S are (NULL: the first S).
void attend(const real *q, const long *q_stride, const real *k, const long *k_stride, const real *v, const long *v_stride,
            real *y, float *keys, float *values, const long *at, const long *row, const long *slot, const Tree *tree, long S,
            long H, long G, long W, long E, long capacity, int threads) {
    Attention a = {q, k, v, q_stride, k_stride, v_stride, y, keys, values, at, row, slot, tree, H, G, W, E, capacity};
    if (S * H * (row ? 1 : W) * at[W - 1] * E <= 1 << 17) threads = 1;  // done before a second thread starts
    parallel(cache_part, &a, S * G, W < 32 ? 1 : threads);
    parallel(attend_part, &a, S * G * attention_tiles(&a), threads);
}

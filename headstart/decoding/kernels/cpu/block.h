// A whole transformer block over cached keys and values, built from the functions of the file that includes this one. One call
// replaces some twenty operators, each of which costs a small model more than its arithmetic.

#include <string.h>

typedef struct {
    const void *qkv, *out, *gate_up, *down;  // packed for `linear`
    const float *qkv_bias, *out_bias;        // NULL: none
    const real *attention_norm, *mlp_norm;
    const real *token_norm;  // of the embeddings that stand before x in the input of qkv, 2 x dim wide (EAGLE); NULL: none
    long dim, heads, kv_heads, width, hidden;
    int stored[4];  // the type of the packed weights of the four products
    float eps;
} Block;

// Rotate the first `heads` heads of each row (rows, stride) to their positions. cosine, sine (rows, E), the sine signed.
// fmaf fixes the rounding, whichever way the compiler vectorizes the loop.
static void rotate(real *x, const real *cosine, const real *sine, long rows, long heads, long E, long stride) {
    const long half = E / 2;
    for (long r = 0; r < rows; r++, cosine += E, sine += E) {
        for (long h = 0; h < heads; h++) {
            real *at = x + r * stride + h * E;
            for (long e = 0; e < half; e++) {
                const float a = to_float(at[e]), b = to_float(at[e + half]);
                at[e] = from_float(fmaf(b, to_float(sine[e]), a * to_float(cosine[e])));
                at[e + half] = from_float(fmaf(a, to_float(sine[e + half]), b * to_float(cosine[e + half])));
            }
        }
    }
}

// What the parts of a block between its products read and write: rows of x and of the buffers of `block`.
typedef struct {
    const Block *b;
    const real *x, *ahead, *cosine, *sine;
    real *normed, *qkv, *change, *gates, *inner, *y;
    const long *row;
    long W, Q;
} BlockRows;

static void norm_part(void *argument, long from, long to) {
    const BlockRows *a = argument;
    const long D = a->b->dim;
    if (!a->ahead) {
        rms_norm(a->x + from * D, a->b->attention_norm, a->normed + from * D, to - from, D, a->b->eps);
        return;
    }
    for (long r = from; r < to; r++) {
        rms_norm(a->ahead + r * D, a->b->token_norm, a->normed + 2 * r * D, 1, D, a->b->eps);
        rms_norm(a->x + r * D, a->b->attention_norm, a->normed + (2 * r + 1) * D, 1, D, a->b->eps);
    }
}

static void rotate_part(void *argument, long from, long to) {
    const BlockRows *a = argument;
    const long H = a->b->heads, G = a->b->kv_heads, E = a->b->width, wide = (H + 2 * G) * E;
    rotate(a->qkv + from * wide, a->cosine + from * E, a->sine + from * E, to - from, H + G, E, wide);
}

static inline void add(real *y, const real *x, const real *change, long count) {
    for (long i = 0; i < count; i++) y[i] = from_float(to_float(x[i]) + to_float(change[i]));
}

// Return the row of x that row `to` of the result continues.
static inline long row_of(const BlockRows *a, long to) {
    return a->row ? to / a->Q * a->W + a->row[to / a->Q] : to;
}

static void add_norm_part(void *argument, long from, long to) {
    const BlockRows *a = argument;
    const long D = a->b->dim;
    for (long r = from; r < to; r++) add(a->y + r * D, a->x + row_of(a, r) * D, a->change + r * D, D);
    rms_norm(a->y + from * D, a->b->mlp_norm, a->normed + from * D, to - from, D, a->b->eps);
}

static void gate_part(void *argument, long from, long to) {
    const BlockRows *a = argument;
    const long F = a->b->hidden;
    silu_times(a->gates + 2 * from * F, a->inner + from * F, to - from, F);
}

static void add_part(void *argument, long from, long to) {
    const BlockRows *a = argument;
    const long D = a->b->dim;
    add(a->y + from * D, a->y + from * D, a->change + from * D, (to - from) * D);
}

// Compute a block: x (S, W, dim) -> y (S, Q, dim), for all W rows, or for the one row of each slot that row (S,) names. Keys and
// values of all rows are cached in both cases. ahead (S, W, dim): the embeddings of a block with `token_norm`, else NULL.
// cosine, sine (S, W, E). keys, values, at, row, slot, tree: as for `attend`.
void block(const Block *b, const real *x, const real *ahead, const real *cosine, const real *sine, real *y, float *keys, float *values,
           const long *at, const long *row, const long *slot, const Tree *tree, long S, long W, long capacity, int threads) {
    const long D = b->dim, H = b->heads, G = b->kv_heads, E = b->width, F = b->hidden, HE = H * E;
    const long wide = (H + 2 * G) * E, Q = row ? 1 : W, rows = S * W, asked = S * Q, in = ahead ? 2 * D : D;
    const int all = rows < 32 ? 1 : threads, some = asked < 32 ? 1 : threads;  // few rows are done before a second thread starts
    real *normed = malloc(sizeof(real) * (rows * (in + wide) + asked * (2 * HE + D + 3 * F)));
    real *qkv = normed + rows * in, *q = qkv + rows * wide, *mixed = q + asked * HE, *change = mixed + asked * HE;
    real *gates = change + asked * D, *inner = gates + asked * 2 * F;
    BlockRows a = {b, x, ahead, cosine, sine, normed, qkv, change, gates, inner, y, row, W, Q};

    parallel(norm_part, &a, rows, all);
    linear(normed, b->qkv, b->qkv_bias, qkv, rows, wide, in, threads, b->stored[0]);
    parallel(rotate_part, &a, rows, all);
    long q_stride[3] = {W * wide, E, wide};
    const long kv_stride[3] = {W * wide, E, wide};
    if (row) {
        for (long s = 0; s < S; s++) memcpy(q + s * HE, qkv + row_of(&a, s) * wide, sizeof(real) * HE);
        q_stride[0] = q_stride[2] = HE;
    }
    attend(row ? q : qkv, q_stride, qkv + HE, kv_stride, qkv + HE + G * E, kv_stride, mixed, keys, values, at, row, slot, tree, S, H,
           G, W, E, capacity, threads);
    linear(mixed, b->out, b->out_bias, change, asked, D, HE, threads, b->stored[1]);

    parallel(add_norm_part, &a, asked, some);
    linear(normed, b->gate_up, NULL, gates, asked, 2 * F, D, threads, b->stored[2]);
    parallel(gate_part, &a, asked, some);
    linear(inner, b->down, NULL, change, asked, D, F, threads, b->stored[3]);
    parallel(add_part, &a, asked, some);
    free(normed);
}

// Compute `count` blocks in turn on all rows: x (S, W, dim) -> y (S, W, dim). keys, values: the cache of the first block; the
// cache of the next block starts `layer` floats later.
static void stack(const Block *const *b, long count, const real *x, const real *cosine, const real *sine, real *y, float *keys,
                  float *values, long layer, const long *at, const long *slot, const Tree *tree, long S, long W, long capacity,
                  int threads) {
    real *between = malloc(sizeof(real) * S * W * b[0]->dim);
    // The last block writes y, for an even and for an odd number of blocks.
    for (long i = 0; i < count; i++) {
        real *to = (count - i) % 2 ? y : between;
        block(b[i], x, NULL, cosine, sine, to, keys + i * layer, values + i * layer, at, NULL, slot, tree, S, W, capacity, threads);
        x = to;
    }
    free(between);
}

// Copy `size` bytes of each of the `live` slots from their place among all slots to one after another, or back.
static void move(void *dense, void *sparse, const long *slot, long live, long size, int back) {
    for (long i = 0; i < live; i++) {
        char *one = (char *)dense + i * size, *other = (char *)sparse + slot[i] * size;
        memcpy(back ? other : one, back ? one : other, size);
    }
}

// Compute `stack` for the slots that take part, whose first position is not negative; y of the others is 0.
void blocks(const Block *const *b, long count, const real *x, const real *cosine, const real *sine, real *y, float *keys,
            float *values, long layer, const long *at, const Tree *tree, long S, long W, long capacity, int threads) {
    long live = 0, *slot = malloc(sizeof(long) * S * (1 + W));
    for (long s = 0; s < S; s++)
        if (at[s * W] >= 0) slot[live++] = s;
    const long row = sizeof(real) * W, D = b[0]->dim, E = b[0]->width;
    if (live == S) {
        stack(b, count, x, cosine, sine, y, keys, values, layer, at, NULL, tree, S, W, capacity, threads);
    } else {
        memset(y, 0, row * D * S);
        real *dense = malloc(row * live * (2 * D + 2 * E)), *result = dense + live * W * D;
        real *cosines = result + live * W * D, *sines = cosines + live * W * E;
        long *positions = slot + S;
        move(dense, (void *)x, slot, live, row * D, 0);
        move(cosines, (void *)cosine, slot, live, row * E, 0);
        move(sines, (void *)sine, slot, live, row * E, 0);
        move(positions, (void *)at, slot, live, sizeof(long) * W, 0);
        if (live) stack(b, count, dense, cosines, sines, result, keys, values, layer, positions, slot, tree, live, W, capacity, threads);
        move(result, y, slot, live, row * D, 1);
        free(dense);
    }
    free(slot);
}

// A whole transformer block over cached keys and values, built from the functions of the file that includes this one. One call
// replaces some twenty operators, each of which costs a small model more than its arithmetic.

#include <string.h>

typedef struct {
    const void *qkv, *out, *gate_up, *down;  // packed for `linear`
    const float *qkv_bias, *out_bias;        // NULL: none
    const real *attention_norm, *mlp_norm;
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

static void add(real *y, const real *x, long count) {
    for (long i = 0; i < count; i++) y[i] = from_float(to_float(y[i]) + to_float(x[i]));
}

// Compute a block: x (S, W, dim) -> y (S, Q, dim), for all W rows, or for the one row of each slot that row (S,) names. Keys and
// values of all rows are cached in both cases. cosine, sine (S, W, E). keys, values, at, row, tree: as for `attend`.
void block(const Block *b, const real *x, const real *cosine, const real *sine, real *y, float *keys, float *values,
           const long *at, const long *row, const Tree *tree, long S, long W, long capacity, int threads) {
    const long D = b->dim, H = b->heads, G = b->kv_heads, E = b->width, F = b->hidden, HE = H * E;
    const long wide = (H + 2 * G) * E, Q = row ? 1 : W, asked = S * Q;
    real *normed = malloc(sizeof(real) * (S * W * (D + wide) + asked * (2 * HE + D + 3 * F)));
    real *qkv = normed + S * W * D, *q = qkv + S * W * wide, *mixed = q + asked * HE, *change = mixed + asked * HE;
    real *gates = change + asked * D, *inner = gates + asked * 2 * F;

    rms_norm(x, b->attention_norm, normed, S * W, D, b->eps);
    linear(normed, b->qkv, b->qkv_bias, qkv, S * W, wide, D, threads, b->stored[0]);
    rotate(qkv, cosine, sine, S * W, H + G, E, wide);
    for (long s = 0; s < S; s++) {
        for (long i = 0; i < Q; i++) {
            const long from = s * W + (row ? row[s] : i), to = s * Q + i;
            memcpy(q + to * HE, qkv + from * wide, sizeof(real) * HE);
            memcpy(y + to * D, x + from * D, sizeof(real) * D);
        }
    }
    const long q_stride[3] = {Q * HE, E, HE}, kv_stride[3] = {W * wide, E, wide};
    attend(q, q_stride, qkv + HE, kv_stride, qkv + HE + G * E, kv_stride, mixed, keys, values, at, row, tree, S, H, G, W, E,
           capacity, threads);
    linear(mixed, b->out, b->out_bias, change, asked, D, HE, threads, b->stored[1]);
    add(y, change, asked * D);

    rms_norm(y, b->mlp_norm, normed, asked, D, b->eps);
    linear(normed, b->gate_up, NULL, gates, asked, 2 * F, D, threads, b->stored[2]);
    silu_times(gates, inner, asked, F);
    linear(inner, b->down, NULL, change, asked, D, F, threads, b->stored[3]);
    add(y, change, asked * D);
    free(normed);
}

// Compute `count` blocks in turn on all rows: x (S, W, dim) -> y (S, W, dim). keys, values: the cache of the first block; the
// cache of the next block starts `layer` floats later.
void blocks(const Block *const *b, long count, const real *x, const real *cosine, const real *sine, real *y, float *keys,
            float *values, long layer, const long *at, const Tree *tree, long S, long W, long capacity, int threads) {
    const long size = S * W * b[0]->dim;
    real *between = malloc(sizeof(real) * size);
    // The last block writes y, for an even and for an odd number of blocks.
    for (long i = 0; i < count; i++) {
        real *to = (count - i) % 2 ? y : between;
        block(b[i], x, cosine, sine, to, keys + i * layer, values + i * layer, at, NULL, tree, S, W, capacity, threads);
        x = to;
    }
    free(between);
}

// Attention over cached keys and values, for the rows of all slots. The file that includes this one defines `real`, the type of
// activations, `to_float`, `store_row` and `attend_rows`.
#include <string.h>

// Write the new keys and values of W rows per slot at their consecutive positions in the cache, then attend for Q rows per slot:
// all W rows, or the one row that row (S,) names. Row i sees everything up to its position, or the rows that the tree gives it.
// q (S, H, Q, E), k and v (S, G, W, E): `real`, with the strides of the first three axes; E is dense. y (S, Q, H, E).
// keys (S, G, capacity / 16, E, 16) and values (S, G, capacity, E): fp32. at (S, W): the positions.
// E and capacity are multiples of 16, and every position is below capacity. A slot whose first position is negative takes no part:
// nothing is written for it, and its y is 0.
void attend(const real *q, const long *q_stride, const real *k, const long *k_stride, const real *v, const long *v_stride,
            real *y, float *keys, float *values, const long *at, const long *row, const Tree *tree, long S, long H, long G, long W,
            long E, long capacity, int threads) {
    const long group = H / G, Q = row ? 1 : W;
    const float scale = 1.0f / sqrtf((float)E);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && S * H * Q * at[W - 1] * E > 1 << 17)
    for (long s = 0; s < S; s++) {
        for (long g = 0; g < G; g++) {
            if (at[s * W] < 0) {
                for (long i = 0; i < Q; i++) memset(y + ((s * Q + i) * H + g * group) * E, 0, group * E * sizeof(real));
                continue;
            }
            float *kc = keys + (s * G + g) * E * capacity, *vc = values + (s * G + g) * capacity * E;
            for (long w = 0; w < W; w++) {
                const real *kr = k + s * k_stride[0] + g * k_stride[1] + w * k_stride[2];
                const real *vr = v + s * v_stride[0] + g * v_stride[1] + w * v_stride[2];
                const long to = at[s * W + w];
                for (long e = 0; e < E; e++) {
                    kc[to / 16 * 16 * E + e * 16 + to % 16] = to_float(kr[e]);
                    vc[to * E + e] = to_float(vr[e]);
                }
            }
            const long rows = group * Q;
            const long start = at[s * W], end = row && !tree ? at[s * W + row[s]] : at[s * W + W - 1];
            const long span = (end + 16) / 16 * 16;
            float *score = malloc(4 * span * sizeof(float)), rows_q[4 * E], rows_y[4 * E];
            for (long first = 0; first < rows; first += 4) {
                const int R = rows - first < 4 ? (int)(rows - first) : 4;
                long last[4], depth[4];
                const long *path[4];
                for (int r = 0; r < R; r++) {
                    const long head = g * group + (first + r) / Q, i = (first + r) % Q, w = row ? row[s] : i;
                    const real *qr = q + s * q_stride[0] + head * q_stride[1] + i * q_stride[2];
                    for (long e = 0; e < E; e++) rows_q[r * E + e] = to_float(qr[e]) * scale;
                    last[r] = tree ? end : at[s * W + w];
                    depth[r] = tree ? tree->depth[w] : 0;
                    path[r] = tree ? tree->path + w * tree->deep : NULL;
                }
                switch (R) {
                    case 1: attend_rows(1, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y); break;
                    case 2: attend_rows(2, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y); break;
                    case 3: attend_rows(3, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y); break;
                    default: attend_rows(4, rows_q, last, path, depth, start, kc, vc, E, span, score, rows_y);
                }
                for (int r = 0; r < R; r++) {
                    const long head = g * group + (first + r) / Q, i = (first + r) % Q;
                    real *yr = y + ((s * Q + i) * H + head) * E;
                    store_row(yr, rows_y + r * E, E);
                }
            }
            free(score);
        }
    }
}

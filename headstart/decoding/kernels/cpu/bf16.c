// The inner loops of a decoding pass on a CPU with AVX-512 BF16: products of few rows with weights that are read once.
//
// Reading the weights bounds a plain pass. oneDNN's packed products read them nearly as fast as memory allows for one row, but
// take 1.4 to 1.5 times as long for 8 rows on a CPU without AMX. Here the arithmetic of 8 rows overlaps the reading. Every
// output is one chain of additions over K in one order, for any number of rows, threads or neighbours: a row's bits depend on
// that row and the weights alone.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "pool.h"
#include "tree.h"

typedef uint16_t bf16, real;

static inline float to_float(bf16 x) {
    union { uint32_t i; float f; } u = { (uint32_t)x << 16 };
    return u.f;
}

static inline __m512 load16(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline void store16(bf16 *y, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

// Compute y[m][n .. n+32) for rows m < M. x: pairs of bf16 [M][K2]; w: one block of packed weights, pairs [K2][32].
static inline __attribute__((always_inline)) void tile(const int M, const uint32_t *x, long K2, const uint32_t *w,
                                                       const float *bias, bf16 *y, long N, long n) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (long k = 0; k < K2; k++, w += 32) {
        const __m512bh w0 = (__m512bh)_mm512_load_si512(w), w1 = (__m512bh)_mm512_load_si512(w + 16);
        _mm_prefetch((const char *)(w + 1024), _MM_HINT_T0);
        _mm_prefetch((const char *)(w + 1040), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[m * K2 + k]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], a, w0);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], a, w1);
        }
    }
    for (int half = 0; half < 2; half++) {
        const long first = n + 16 * half;
        if (first >= N) break;
        const __mmask16 mask = N - first >= 16 ? 0xFFFF : (__mmask16)((1u << (N - first)) - 1);
        const __m512 b = bias ? _mm512_maskz_loadu_ps(mask, bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) store16(y + m * N + first, _mm512_add_ps(sum[m][half], b), mask);
    }
}

typedef struct {
    const bf16 *x;
    const uint32_t *w;
    const float *bias;
    bf16 *y;
    long rows, N, K2;
} Product;

// Compute blocks `from` to `to` - 1 of 32 columns.
static void product_part(void *argument, long from, long to) {
    const Product a = *(const Product *)argument;
    for (long block = from; block < to; block++) {
        const uint32_t *wb = a.w + block * a.K2 * 32;
        for (long m = 0; m < a.rows; m += 8) {  // the block stays in cache for the next rows
            const uint32_t *xm = (const uint32_t *)a.x + m * a.K2;
            bf16 *ym = a.y + m * a.N;
            switch (a.rows - m) {
                case 1: tile(1, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                case 2: tile(2, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                case 3: tile(3, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                case 4: tile(4, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                case 5: tile(5, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                case 6: tile(6, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                case 7: tile(7, xm, a.K2, wb, a.bias, ym, a.N, block * 32); break;
                default: tile(8, xm, a.K2, wb, a.bias, ym, a.N, block * 32);
            }
        }
    }
}

// Compute y (rows, N) = x (rows, K) W^T + bias, K even. w: W packed as [ceil(N/32)][K/2][32] pairs, 64-byte aligned.
void linear(const bf16 *x, const bf16 *w, const float *bias, bf16 *y, long rows, long N, long K, int threads) {
    Product a = {x, (const uint32_t *)w, bias, y, rows, N, K / 2};
    // Waking a second thread takes some microseconds: small products finish before it starts.
    parallel(product_part, &a, (N + 31) / 32, N * K * rows > 1 << 18 ? threads : 1);
}

// Compute y = x / rms(x) * weight over rows of D, D a multiple of 16.
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, long rows, long D, float eps) {
    for (long r = 0; r < rows; r++, x += D, y += D) {
        __m512 squares = _mm512_setzero_ps();
        for (long d = 0; d < D; d += 16) {
            const __m512 v = load16(x + d);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)D + eps));
        for (long d = 0; d < D; d += 16)
            store16(y + d, _mm512_mul_ps(_mm512_mul_ps(load16(x + d), scale), load16(weight + d)), 0xFFFF);
    }
}

// Compute y (rows, H) = silu(gate) * up for x (rows, 2 H), gate first. The exponent is bounded, because -ffast-math divides
// through a reciprocal, and a division by infinity gives NaN.
void silu_times(const bf16 *x, bf16 *y, long rows, long H) {
    for (long r = 0; r < rows; r++, x += 2 * H, y += H) {
        for (long h = 0; h < H; h += 16) {
            float value[16];
            const long n = H - h < 16 ? H - h : 16;
            for (long i = 0; i < 16; i++) {
                const float gate = i < n ? to_float(x[h + i]) : 0.0f, up = i < n ? to_float(x[H + h + i]) : 0.0f;
                value[i] = gate / (1.0f + expf(fminf(-gate, 80.0f))) * up;
            }
            store16(y + h, _mm512_loadu_ps(value), n == 16 ? 0xFFFF : (__mmask16)((1u << n) - 1));
        }
    }
}

// Compute exp(x) for x <= 0, to 2 ulp, and exactly 0 below -87. Every element takes the same instructions: no scalar tail.
static inline __m512 exp16(__m512 x) {
    const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // Cephes' polynomial
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_maskz_mov_ps((__mmask16)~tiny, _mm512_scalef_ps(p, n));
}

// Attend from up to 4 rows of one group of heads to cached keys, in blocks of 16 positions [E][16], and values [position][E],
// all fp32. Row r sees positions 0 .. last[r]; in a tree, where path[0] is not NULL, it sees the first `start` positions and its
// path. score: 4 x span floats. Sums run over positions in order, in lanes that depend on the position alone, and positions that
// a row does not see add exactly 0: its bits depend neither on the other rows nor on the span.
static inline __attribute__((always_inline)) void attend_rows(const int R, const float *q, const long *last,
                                                              const long *const *path, const long *depth, long start,
                                                              const float *keys, const float *values, long E, long span,
                                                              float *score, float *y) {
    const int tree = path[0] != NULL;
    __m512 largest[4], total[4];
    for (int r = 0; r < R; r++) largest[r] = _mm512_set1_ps(-1e30f);
    for (long t = 0; t < span; t += 16) {
        __m512 s[4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) s[r] = _mm512_setzero_ps();
        for (long e = 0; e < E; e++) {
            const __m512 k = _mm512_loadu_ps(keys + t * E + e * 16);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) s[r] = _mm512_fmadd_ps(_mm512_set1_ps(q[r * E + e]), k, s[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const long seen = last[r] - t + 1;
            const __mmask16 mask = seen >= 16 ? 0xFFFF : seen <= 0 ? 0 : (__mmask16)((1u << seen) - 1);
            s[r] = _mm512_mask_mov_ps(_mm512_set1_ps(-1e30f), mask, s[r]);
            largest[r] = _mm512_max_ps(largest[r], s[r]);
            _mm512_storeu_ps(score + r * span + t, s[r]);
        }
    }
    for (int r = 0; tree && r < R; r++)
        largest[r] = _mm512_set1_ps(arrange(score + r * span, path[r], depth[r], start, span));
    const long shared = tree ? start : span;  // beyond it each row of a tree sees other rows
    for (int r = 0; r < R; r++) {
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest[r]));
        __m512 sum = _mm512_setzero_ps();
        for (long t = 0; t < span; t += 16) {
            const __m512 p = exp16(_mm512_sub_ps(_mm512_loadu_ps(score + r * span + t), top));
            sum = _mm512_add_ps(sum, p);
            _mm512_storeu_ps(score + r * span + t, p);
        }
        total[r] = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    }
    for (long e = 0; e < E; e += 32) {
        __m512 mix[4][2];
        const __mmask16 more = E - e > 16 ? 0xFFFF : 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) mix[r][0] = mix[r][1] = _mm512_setzero_ps();
        for (long t = 0; t < shared; t++) {
            const __m512 v0 = _mm512_loadu_ps(values + t * E + e), v1 = _mm512_maskz_loadu_ps(more, values + t * E + e + 16);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m512 p = _mm512_set1_ps(score[r * span + t]);
                mix[r][0] = _mm512_fmadd_ps(p, v0, mix[r][0]);
                mix[r][1] = _mm512_fmadd_ps(p, v1, mix[r][1]);
            }
        }
        if (tree) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                for (long j = 0; j <= depth[r]; j++) {
                    const float *v = values + (start + path[r][j]) * E + e;
                    const __m512 p = _mm512_set1_ps(score[r * span + start + j]);
                    mix[r][0] = _mm512_fmadd_ps(p, _mm512_loadu_ps(v), mix[r][0]);
                    mix[r][1] = _mm512_fmadd_ps(p, _mm512_maskz_loadu_ps(more, v + 16), mix[r][1]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            _mm512_storeu_ps(y + r * E + e, _mm512_mul_ps(mix[r][0], total[r]));
            _mm512_mask_storeu_ps(y + r * E + e + 16, more, _mm512_mul_ps(mix[r][1], total[r]));
        }
    }
}

static inline void store_row(bf16 *y, const float *x, long E) {
    for (long e = 0; e < E; e += 16) store16(y + e, _mm512_loadu_ps(x + e), 0xFFFF);
}

#include "attend.h"

// The inner loops of a decoding pass in fp32, for CPUs with AVX2 and FMA; bf16.c has those for CPUs with AVX-512 BF16.
//
// The number of operators bounds a pass of a small model, reading the weights that of a large one. Weights that bf16 holds
// exactly are stored in bf16: half the bytes, and the same bits after widening. Every output is one chain of additions over K in
// one order, for any number of rows, threads or neighbours: a row's bits depend on that row and the weights alone.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "tree.h"

typedef float real;

// Keep v in its register: gcc would load it again for each product, and loads would then bound the loop.
#define KEEP(v) __asm__("" : "+x"(v))

static inline float to_float(float x) { return x; }
static inline float from_float(float x) { return x; }

// Load sixteen weights of a row of a block. Narrow weights are stored in pairs, (0, 8), (1, 9), ..., the first in the lower bits.
static inline __attribute__((always_inline)) void load_weights(const int narrow, const void *w, long i, __m256 *low, __m256 *high) {
    if (!narrow) {
        *low = _mm256_loadu_ps((const float *)w + i);
        *high = _mm256_loadu_ps((const float *)w + i + 8);
        return;
    }
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)((const uint16_t *)w + i));
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *high = _mm256_and_ps(_mm256_castsi256_ps(pairs), _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000)));
}

// The memory that a tile prefetches while it computes: lines of 64 bytes, up to four for every four steps, each from a part of
// its own. The processor itself reads ahead only within a page of one stream, which leaves the memory half idle during
// arithmetic. These requests come from several streams and keep it busy (docs/lab-notes.md).
typedef struct {
    const char *from;
    long part;
    int lines;
} Ahead;

static inline __attribute__((always_inline)) void fetch(const Ahead *ahead, long k) {
    const char *from = ahead->from + k * 16;  // 64 bytes of a part for four steps
    if (ahead->lines > 0) _mm_prefetch(from, _MM_HINT_T1);
    if (ahead->lines > 1) _mm_prefetch(from + ahead->part, _MM_HINT_T1);
    if (ahead->lines > 2) _mm_prefetch(from + 2 * ahead->part, _MM_HINT_T1), _mm_prefetch(from + 3 * ahead->part, _MM_HINT_T1);
}

// Add the products of input k.
static inline __attribute__((always_inline)) void step(const int M, const int B, const int narrow, const float *x, long K,
                                                       const void *w, long begin, long k, __m256 sum[6][2]) {
#pragma GCC unroll 6
    for (int b = 0; b < B; b++) {
        const long at = begin + (b * K + k) * 16;
        __m256 w0, w1;
        load_weights(narrow, w, at, &w0, &w1);
        KEEP(w0);
        KEEP(w1);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const __m256 a = _mm256_broadcast_ss(x + m * K + k);
            sum[m * B + b][0] = _mm256_fmadd_ps(a, w0, sum[m * B + b][0]);
            sum[m * B + b][1] = _mm256_fmadd_ps(a, w1, sum[m * B + b][1]);
        }
    }
}

// Compute y[m][16 block .. ) for M rows and B blocks of 16 columns, M * B <= 6. x: [M][K]; w: packed weights [.][K][16].
static inline __attribute__((always_inline)) void tile(const int M, const int B, const int narrow, const float *x, long K,
                                                       const void *w, const float *bias, float *y, long N, long block,
                                                       const Ahead ahead) {
    __m256 sum[6][2];
#pragma GCC unroll 6
    for (int i = 0; i < M * B; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    const long begin = block * K * 16;
    long k = 0;
    for (; M > 1 && k + 4 <= K; k += 4) {
        fetch(&ahead, k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) step(M, B, narrow, x, K, w, begin, k + i, sum);
    }
    for (; k < K; k++) step(M, B, narrow, x, K, w, begin, k, sum);
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
        const long first = (block + b) * 16, count = N - first < 16 ? N - first : 16;
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            float line[16];
            _mm256_storeu_ps(line, sum[m * B + b][0]);
            _mm256_storeu_ps(line + 8, sum[m * B + b][1]);
            for (long i = 0; i < count; i++) y[m * N + first + i] = bias ? line[i] + bias[first + i] : line[i];
        }
    }
}

// Each tile is a function: if several are inlined into one, gcc keeps sums on the stack.
typedef void Tile(const float *x, long K, const void *w, const float *bias, float *y, long N, long block, Ahead ahead);
#define TILE(M, B, NARROW)                                                                                                  \
    static __attribute__((noinline)) void tile_##M##x##B##_##NARROW(const float *x, long K, const void *w, const float *bias, \
                                                                    float *y, long N, long block, Ahead ahead) {            \
        tile(M, B, NARROW, x, K, w, bias, y, N, block, ahead);                                                              \
    }
#define TILES(NARROW)                                                                                                       \
    TILE(1, 1, NARROW) TILE(2, 1, NARROW) TILE(3, 1, NARROW) TILE(4, 1, NARROW) TILE(5, 1, NARROW) TILE(6, 1, NARROW)       \
    TILE(1, 4, NARROW) TILE(2, 2, NARROW)
TILES(0)
TILES(1)
#define BY_ROWS(NARROW) {tile_1x1_##NARROW, tile_2x1_##NARROW, tile_3x1_##NARROW, tile_4x1_##NARROW, tile_5x1_##NARROW, tile_6x1_##NARROW}
static Tile *const tall[2][6] = {BY_ROWS(0), BY_ROWS(1)};
static Tile *const wide[2][2] = {{tile_1x4_0, tile_2x2_0}, {tile_1x4_1, tile_2x2_1}};

typedef struct {
    int narrow;
    const float *x;
    const void *w;
    const float *bias;
    float *y;
    long rows, N, K;
} Product;

// Compute blocks 4 from .. 4 to - 1 of the columns.
static void product_part(void *argument, long from, long to) {
    const Product a = *(const Product *)argument;
    const long blocks = (a.N + 15) / 16, bytes = a.K * 16 * (a.narrow ? 2 : 4), part = a.K * 16;
    // A tile has as many rows as the registers have room for sums; the numbers of rows differ by at most one. The tiles of a
    // block prefetch the next block, each a share of it.
    const long most = a.narrow ? 5 : 6, tiles = (a.rows + most - 1) / most;
    const int whole = a.narrow ? 2 : 4, lines = a.rows < 3 ? 0 : tiles == 1 ? whole : tiles < whole ? 2 : 1;
    for (long four = 4 * from; four < 4 * to; four += 4) {
        const long end = four + 4 < blocks ? four + 4 : blocks;
        long block = four;
        // Each addition waits for the one before it, so one or two rows go through several blocks at once. The four streams of
        // one row keep the memory busy.
        for (const long B = 4 / a.rows; B > 1 && block + B <= end; block += B) {
            const Ahead ahead = {(const char *)a.w + (block + B) * bytes, part, a.rows == 2 && a.narrow ? 4 : 0};
            wide[a.narrow][a.rows - 1](a.x, a.K, a.w, a.bias, a.y, a.N, block, ahead);
        }
        for (; block < end; block++) {
            for (long i = 0, row = 0; i < tiles; i++) {
                const long M = (a.rows - row + tiles - i - 1) / (tiles - i), skip = i * lines * part;
                const Ahead ahead = {(const char *)a.w + (block + 1) * bytes + skip, part, skip < bytes ? lines : 0};
                tall[a.narrow][M - 1](a.x + row * a.K, a.K, a.w, a.bias, a.y + row * a.N, a.N, block, ahead);
                row += M;
            }
        }
    }
}

static inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float max8(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#include "blocks.h"

enum { FP32, BF16, BLOCKS };

// Compute y (rows, N) = x (rows, K) W^T + bias. w: W packed as [ceil(N/16)][K][16] in fp32 or bf16, or as in blocks.h, by `stored`.
void linear(const float *x, const void *w, const float *bias, float *y, long rows, long N, long K, int threads, int stored) {
    if (stored == BLOCKS) product_blocks(x, w, bias, y, rows, N, K, threads);
    else {
        Product a = {stored == BF16, x, w, bias, y, rows, N, K};
        // Waking a second thread takes some microseconds: small products finish before it starts.
        parallel(product_part, &a, (N + 63) / 64, N * K * rows > 1 << 18 ? threads : 1);
    }
}

// Compute exp(x) to 2 ulp for x <= 88, and exactly 0 below -87. Every element takes the same instructions: no scalar tail.
static inline __m256 exp8(__m256 x) {
    const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);  // Cephes' polynomial
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// Compute y = x / rms(x) * weight over rows of D, D a multiple of 8.
void rms_norm(const float *x, const float *weight, float *y, long rows, long D, float eps) {
    for (long r = 0; r < rows; r++, x += D, y += D) {
        __m256 squares = _mm256_setzero_ps();
        for (long d = 0; d < D; d += 8) {
            const __m256 v = _mm256_loadu_ps(x + d);
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(sum8(squares) / (float)D + eps));
        for (long d = 0; d < D; d += 8) {
            const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + d), scale);
            _mm256_storeu_ps(y + d, _mm256_mul_ps(v, _mm256_loadu_ps(weight + d)));
        }
    }
}

static inline __m256 silu8(__m256 gate, __m256 up) {
    const __m256 minus = _mm256_min_ps(_mm256_sub_ps(_mm256_setzero_ps(), gate), _mm256_set1_ps(88.0f));
    const __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(one, exp8(minus))), up);
}

// Compute y (rows, H) = silu(gate) * up for x (rows, 2 H), gate first.
void silu_times(const float *x, float *y, long rows, long H) {
    for (long r = 0; r < rows; r++, x += 2 * H, y += H) {
        long h = 0;
        for (; h + 8 <= H; h += 8) _mm256_storeu_ps(y + h, silu8(_mm256_loadu_ps(x + h), _mm256_loadu_ps(x + H + h)));
        if (h < H) {
            float gate[8] = {0}, up[8] = {0}, value[8];
            for (long i = h; i < H; i++) gate[i - h] = x[i], up[i - h] = x[H + i];
            _mm256_storeu_ps(value, silu8(_mm256_loadu_ps(gate), _mm256_loadu_ps(up)));
            for (long i = h; i < H; i++) y[i] = value[i - h];
        }
    }
}

#define MIXED 256  // positions whose values are weighted at a time

// Return how many groups of 16 columns of the values the registers have room to sum, for R rows.
static inline __attribute__((always_inline)) long mix_columns(const int R, long left) {
    return R == 1 && left >= 64 ? 4 : R <= 2 && left >= 32 ? 2 : 1;
}

// Add to y[r][e ..), C times 16 columns, the values of positions `from` to `to` weighted by their scores, in order.
static inline __attribute__((always_inline)) void mix_values(const int R, const int C, long e, long from, long to,
                                                             const float *values, long E, long span, const float *score, float *y) {
    __m256 mix[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < R * C; i++) {
        const float *at = y + i / C * E + e + i % C * 16;
        mix[i][0] = _mm256_loadu_ps(at), mix[i][1] = _mm256_loadu_ps(at + 8);
    }
    for (long t = from; t < to; t++) {
        const float *v = values + t * E + e;
        if (e == 0)  // prefetch the remaining columns
            for (long ahead = 16 * C; ahead < E; ahead += 16) _mm_prefetch((const char *)(v + ahead), _MM_HINT_T1);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            __m256 v0 = _mm256_loadu_ps(v + 16 * c), v1 = _mm256_loadu_ps(v + 16 * c + 8);
            KEEP(v0);
            KEEP(v1);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m256 p = _mm256_broadcast_ss(score + r * span + t);
                mix[r * C + c][0] = _mm256_fmadd_ps(p, v0, mix[r * C + c][0]);
                mix[r * C + c][1] = _mm256_fmadd_ps(p, v1, mix[r * C + c][1]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R * C; i++) {
        float *at = y + i / C * E + e + i % C * 16;
        _mm256_storeu_ps(at, mix[i][0]), _mm256_storeu_ps(at + 8, mix[i][1]);
    }
}

// Attend from up to 4 rows of one group of heads to cached keys, in blocks of 16 positions [E][16], and values [position][E].
// Row r sees positions 0 .. last[r]; in a tree, where path[0] is not NULL, it sees the first `start` positions and its path.
// score: 4 x span floats. Sums run over positions in order, in lanes that depend on the position alone, and positions that a row
// does not see add exactly 0: its bits depend neither on the other rows nor on the span.
static inline __attribute__((always_inline)) void attend_rows(const int R, const float *q, const long *last,
                                                              const long *const *path, const long *depth, long start,
                                                              const float *keys, const float *values, long E, long span,
                                                              float *score, float *y) {
    const int tree = path[0] != NULL;
    const __m256 unseen = _mm256_set1_ps(-1e30f), lanes = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 largest[4], total[4];
    for (int r = 0; r < R; r++) largest[r] = unseen;
    for (long t = 0; t < span; t += 16) {
        __m256 s[4][2];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) s[r][0] = s[r][1] = _mm256_setzero_ps();
        for (long e = 0; e < E; e++) {
            __m256 k0 = _mm256_loadu_ps(keys + t * E + e * 16), k1 = _mm256_loadu_ps(keys + t * E + e * 16 + 8);
            KEEP(k0);
            KEEP(k1);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m256 a = _mm256_broadcast_ss(q + r * E + e);
                s[r][0] = _mm256_fmadd_ps(a, k0, s[r][0]);
                s[r][1] = _mm256_fmadd_ps(a, k1, s[r][1]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            for (int half = 0; half < 2; half++) {
                const __m256 seen = _mm256_set1_ps((float)(last[r] - t - 8 * half));
                const __m256 v = _mm256_blendv_ps(unseen, s[r][half], _mm256_cmp_ps(lanes, seen, _CMP_LE_OQ));
                largest[r] = _mm256_max_ps(largest[r], v);
                _mm256_storeu_ps(score + r * span + t + 8 * half, v);
            }
        }
    }
    for (int r = 0; tree && r < R; r++)
        largest[r] = _mm256_set1_ps(arrange(score + r * span, path[r], depth[r], start, span));
    for (int r = 0; r < R; r++) {
        const __m256 top = _mm256_set1_ps(max8(largest[r]));
        __m256 sum = _mm256_setzero_ps();
        for (long t = 0; t < span; t += 8) {
            const __m256 p = exp8(_mm256_sub_ps(_mm256_loadu_ps(score + r * span + t), top));
            sum = _mm256_add_ps(sum, p);
            _mm256_storeu_ps(score + r * span + t, p);
        }
        total[r] = _mm256_set1_ps(1.0f / sum8(sum));
    }
    const long shared = tree ? start : span;  // beyond it each row of a tree sees other rows
    memset(y, 0, sizeof(float) * R * E);
    for (long from = 0; from < shared; from += MIXED) {  // values stay in cache for all columns
        const long to = from + MIXED < shared ? from + MIXED : shared;
        for (long e = 0; e < E; e += 16 * mix_columns(R, E - e)) {
            switch (mix_columns(R, E - e)) {
                case 4: mix_values(R, 4, e, from, to, values, E, span, score, y); break;
                case 2: mix_values(R, 2, e, from, to, values, E, span, score, y); break;
                default: mix_values(R, 1, e, from, to, values, E, span, score, y);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        for (long e = 0; e < E; e += 8) {
            __m256 mix = _mm256_loadu_ps(y + r * E + e);
            for (long j = 0; tree && j <= depth[r]; j++) {
                const __m256 p = _mm256_broadcast_ss(score + r * span + start + j);
                mix = _mm256_fmadd_ps(p, _mm256_loadu_ps(values + (start + path[r][j]) * E + e), mix);
            }
            _mm256_storeu_ps(y + r * E + e, _mm256_mul_ps(mix, total[r]));
        }
    }
}

static inline void store_row(float *y, const float *x, long E) {
    for (long e = 0; e < E; e++) y[e] = x[e];
}

#include "attend.h"
#include "block.h"

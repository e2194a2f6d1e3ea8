// Products of weights in blocks, for fp32.c: each group of 32 or 16 inputs of an output has codes of 4, 5 or 8 bits and a scale,
// and may have a minimum: a weight is scale * code + minimum. Activations are quantized here to 8 bits, by groups of 32 inputs of
// a row. decoding/kernels/blocks.py is the reference that tests compare with.
//
// Sums over the inputs of a group are whole numbers, exact in any order. Sums over groups are one chain of additions in fp32: a
// row's bits depend on that row and the weights alone.

#define GROUP 32
#define PANEL 32  // most rows of a panel: a record is unpacked once for all of them

// Some outputs of a linear map: the parts of a fused map can have different forms. Weights are packed as [ceil(outputs / 16)]
// [groups of 32 inputs] records. A record has codes, scales and minimums of 16 outputs:
//   4 bits: [2][4][8][4] bytes, for 8 outputs each; byte [i][output][k] has input 4 i + k in its lower half, 16 + 4 i + k above it.
//   5 bits: the lower four bits so, then [2][8][4] bytes; bit i of byte [output][k] is the highest bit of input 4 i + k.
//   8 bits: [2][8][8][4] signed bytes.
//   scales, then minimums: [32 / group][16] fp16 or fp32.
// Codes of 4 and 5 bits without minimums are stored with 8 or 16 added.
typedef struct {
    int64_t outputs, bits, group, wide, minimums;  // wide: scales are fp32; minimums: 1 if there are any
    int64_t record, from;                          // bytes of a record; the first one's place behind the header
} Segment;

// What packed weights begin with.
typedef struct {
    int64_t segments;
    Segment segment[];
} BlockHeader;

// Quantized rows, in tiles of M <= QUAD rows: of each tile the codes [group][8][M][4], the values of one step [group][M], and
// the sums of codes [group][3][M], of the group and of its halves.
typedef struct {
    int8_t *codes;
    float *step, *sum;
    long groups;
} Activations;

// Bytes: reading so far ahead keeps the memory busy during arithmetic (docs/lab-notes/blocks-avx2.md).
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define AHEAD 8192
#else
#define AHEAD 2048
#endif

// Always inlined: gcc takes a function that only prefetches for one without effect, and removes calls of it.
static inline __attribute__((always_inline)) void fetch_record(const uint8_t *w, const Segment *s) {
    for (long line = 0; line < s->record; line += 64) _mm_prefetch((const char *)w + AHEAD + line, _MM_HINT_T0);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "blocks_avx512.h"
#else
#include "blocks_avx2.h"
#endif

typedef void BlockPanel(const uint8_t *w, const Segment *s, Activations a, long rows, const float *bias, float *y, long N,
                        long count);
// Each is a function: if several are inlined into one, gcc keeps sums on the stack.
#define BLOCK_FUNCTION(NAME, BODY)                                                                                          \
    static __attribute__((noinline)) void NAME(const uint8_t *w, const Segment *s, Activations a, long rows,                \
                                               const float *bias, float *y, long N, long count) {                           \
        BODY;                                                                                                               \
    }
#define BLOCK_TILE(M, BITS, PARTS)                                                                                          \
    BLOCK_FUNCTION(tile_##M##_q##BITS##_##PARTS, (void)rows; block_tile(M, BITS, PARTS, w, s, a, bias, y, N, count))
#define BLOCK_NAME(M, BITS, PARTS) tile_##M##_q##BITS##_##PARTS,
#define BLOCK_FUNCTIONS(BITS, PARTS)                                                                                        \
    FOR_ROWS(BLOCK_TILE, BITS, PARTS)                                                                                       \
    BLOCK_FUNCTION(panel_q##BITS##_##PARTS, block_panel(BITS, PARTS, w, s, a, rows, bias, y, N, count))                     \
    static BlockPanel *const panels_q##BITS##_##PARTS[] = {panel_q##BITS##_##PARTS, FOR_ROWS(BLOCK_NAME, BITS, PARTS)};
BLOCK_FUNCTIONS(4, 1)
BLOCK_FUNCTIONS(5, 1)
BLOCK_FUNCTIONS(8, 1)
BLOCK_FUNCTIONS(8, 2)

// Return the function for a tile of `rows` rows, or for a panel of whole tiles.
static BlockPanel *panel_of(const Segment *s, long rows) {
    BlockPanel *const *panels =
        s->bits == 4 ? panels_q4_1 : s->bits == 5 ? panels_q5_1 : s->group == GROUP ? panels_q8_1 : panels_q8_2;
    return panels[rows <= QUAD ? rows : 0];
}

// Quantize row m of a tile of M rows, K inputs, into a.
static void quantize_row(const float *x, long K, long M, long m, Activations a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), ones = _mm256_set1_epi8(1);
    for (long g = 0; g < a.groups; g++, x += GROUP) {
        float last[GROUP] = {0};
        const float *from = x;
        if (K - g * GROUP < GROUP) memcpy(last, x, sizeof(float) * (K - g * GROUP)), from = last;
        __m256 v[4];
        for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(from + 8 * i);
        const __m256 low = _mm256_max_ps(_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1]));
        const __m256 high = _mm256_max_ps(_mm256_andnot_ps(sign, v[2]), _mm256_andnot_ps(sign, v[3]));
        const float top = max8(_mm256_max_ps(low, high));
        // An explicit instruction, because -ffast-math may divide through an inexact reciprocal.
        const float steps = top > 1e-30f ? _mm_cvtss_f32(_mm_div_ss(_mm_set_ss(127.0f), _mm_set_ss(top))) : 0.0f;
        const __m256 factor = _mm256_set1_ps(steps);
        __m256i n[4];
        for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], factor));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        const __m256i codes = _mm256_permutevar8x32_epi32(bytes, order);
        int32_t fours[8];
        _mm256_storeu_si256((__m256i *)fours, codes);
        for (int i = 0; i < 8; i++) memcpy(a.codes + ((g * 8 + i) * M + m) * 4, fours + i, 4);
        const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, codes), _mm256_set1_epi16(1));
        const __m128i pairs = _mm_hadd_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const __m128i halves = _mm_hadd_epi32(pairs, pairs);
        const int first = _mm_cvtsi128_si32(halves), second = _mm_extract_epi32(halves, 1);
        a.step[g * M + m] = top * (1.0f / 127.0f);
        a.sum[g * 3 * M + m] = (float)(first + second);
        a.sum[(g * 3 + 1) * M + m] = (float)first;
        a.sum[(g * 3 + 2) * M + m] = (float)second;
    }
}

// Return the part of `a` that belongs to the tile that begins with row `row`.
static Activations tile_at(Activations a, long row) {
    const long before = row * a.groups;
    return (Activations){a.codes + before * GROUP, a.step + before, a.sum + 3 * before, a.groups};
}

typedef struct {
    const float *x, *bias;
    const BlockHeader *w;
    float *y;
    long rows, N, K, cached;
    Activations a;
} BlockProduct;

static void quantize_tiles(void *argument, long from, long to) {
    const BlockProduct *p = argument;
    for (long tile = from; tile < to; tile++) {
        const long first = tile * QUAD, M = p->rows - first < QUAD ? p->rows - first : QUAD;
        for (long m = 0; m < M; m++) quantize_row(p->x + (first + m) * p->K, p->K, M, m, tile_at(p->a, first));
    }
}

#define COLUMNS 32  // outputs of a task

// Compute the outputs of a task. The codes of `cached` rows stay in cache.
static void multiply_columns(const BlockProduct *p, long task) {
    const Segment *s = p->w->segment;
    long column = 0;
    for (; task >= (s->outputs + COLUMNS - 1) / COLUMNS; s++) task -= (s->outputs + COLUMNS - 1) / COLUMNS, column += s->outputs;
    const long begin = task * COLUMNS, end = begin + COLUMNS < s->outputs ? begin + COLUMNS : s->outputs;
    const uint8_t *w = (const uint8_t *)p->w + s->from;
    for (long from = 0; from < p->rows; from += p->cached) {
        const long to = from + p->cached < p->rows ? from + p->cached : p->rows;
        for (long n = begin; n < end; n += 16) {
            const uint8_t *records = w + n / 16 * p->a.groups * s->record;
            const float *bias = p->bias ? p->bias + column + n : NULL;
            for (long first = from, rows; first < to; first += rows) {
                const long left = to - first, whole = left / QUAD * QUAD;
                // Two tiles unpack faster than they store and load.
                rows = left > 2 * QUAD ? (whole < PANEL ? whole : PANEL) : (left < QUAD ? left : QUAD);
                float *y = p->y + first * p->N + column + n;
                panel_of(s, rows)(records, s, tile_at(p->a, first), rows, bias, y, p->N, end - n < 16 ? end - n : 16);
            }
        }
    }
}

static void multiply_tasks(void *argument, long from, long to) {
    for (long task = from; task < to; task++) multiply_columns(argument, task);
}

// Compute y (rows, N) = x (rows, K) W^T + bias. w: packed as described above.
static void product_blocks(const float *x, const BlockHeader *w, const float *bias, float *y, long rows, long N, long K,
                           int threads) {
    const long groups = (K + GROUP - 1) / GROUP, tiles = (rows + QUAD - 1) / QUAD;
    const long cached = (256 << 10) / (PANEL * GROUP * groups) * PANEL;
    float *step = malloc(rows * groups * (GROUP + 4 * sizeof(float)));
    const Activations a = {(int8_t *)(step + 4 * rows * groups), step, step + rows * groups, groups};
    BlockProduct p = {x, bias, w, y, rows, N, K, cached ? cached : PANEL, a};
    long tasks = 0;
    for (int i = 0; i < w->segments; i++) tasks += (w->segment[i].outputs + COLUMNS - 1) / COLUMNS;
    if (N * K * rows < 1 << 19) threads = 1;  // done before a second thread starts
    parallel(quantize_tiles, &p, tiles, tiles > 7 ? threads : 1);
    parallel(multiply_tasks, &p, tasks, threads);
    free(step);
}

// Return code `k` of output `o` of a record.
static inline int code_of(const Segment *s, const uint8_t *w, long o, long k) {
    const long half = o / 8, i = k / 4, at = o % 8 * 4 + k % 4;
    if (s->bits == 8) return (int8_t)w[256 * half + 32 * i + at];
    const int low = w[128 * half + 32 * (i % 4) + at] >> (i < 4 ? 0 : 4) & 15;
    const int high = s->bits == 5 ? (w[256 + 32 * half + at] >> i & 1) << 4 : 0;
    return (low | high) - (s->minimums ? 0 : 1 << (s->bits - 1));
}

static inline float scale_of(const Segment *s, const uint8_t *at, long i) {
    if (s->wide) return ((const float *)at)[i];
    return _cvtsh_ss(((const uint16_t *)at)[i]);
}

// Write the weights (count, K) of the outputs `which` (count,), such as rows of an embedding.
void block_rows(const BlockHeader *w, const long *which, float *y, long count, long K) {
    const long groups = (K + GROUP - 1) / GROUP;
    for (long c = 0; c < count; c++, y += K) {
        const Segment *s = w->segment;
        long row = which[c];
        for (; row >= s->outputs; s++) row -= s->outputs;
        const uint8_t *record = (const uint8_t *)w + s->from + row / 16 * groups * s->record;
        const long o = row % 16, parts = GROUP / s->group, bytes = s->wide ? 4 : 2;
        for (long k = 0; k < K; k++) {
            const uint8_t *at = record + k / GROUP * s->record, *scales = at + 64 * s->bits;
            const long i = k % GROUP / s->group * 16 + o;
            __m128 product = _mm_set_ss(scale_of(s, scales, i) * (float)code_of(s, at, o, k % GROUP));
            KEEP(product);  // no fused addition: its bits are those of two operations
            y[k] = _mm_cvtss_f32(product) + (s->minimums ? scale_of(s, scales + parts * 16 * bytes, i) : 0.0f);
        }
    }
}

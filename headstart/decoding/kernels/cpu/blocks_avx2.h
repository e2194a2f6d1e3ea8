// Products of some rows and 16 outputs of weights in blocks (blocks.h), for CPUs with AVX2.

#define QUAD 4  // most rows of a tile: their sums of 16 outputs take 8 registers
#define FOR_ROWS(DO, ...) DO(1, __VA_ARGS__) DO(2, __VA_ARGS__) DO(3, __VA_ARGS__) DO(4, __VA_ARGS__)
// Compute v here: gcc would compute many values before it uses them, and keep them on the stack.
#define PIN(v) __asm__ volatile("" : "+x"(v))

// Add the products of four codes, which are not negative, and four activations to each sum of a chain. `total` returns sums in
// 32 bits. Without VNNI a chain's sums have 16 bits: 8 products of 4-bit codes fit in, 4 of 5 bits, 1 of 8 bits (2 * 128 * 127).
#ifdef __AVXVNNI__
#define CHAIN(BITS) 4
static inline __m256i dot(__m256i sum, __m256i codes, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, codes, x); }
static inline __m256i total(__m256i sum) { return sum; }
#else
#define CHAIN(BITS) ((BITS) == 4 ? 8 : (BITS) == 5 ? 4 : 1)
static inline __m256i dot(__m256i sum, __m256i codes, __m256i x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)); }
static inline __m256i total(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

// Return the codes of inputs 4 i .. 4 i + 3 of a group for 8 outputs.
static inline __attribute__((always_inline)) __m256i unpack(const int BITS, const uint8_t *w, const int half, const int i) {
    if (BITS == 8) return _mm256_loadu_si256((const __m256i *)(w + 256 * half + 32 * i));
    __m256i codes = _mm256_loadu_si256((const __m256i *)(w + 128 * half + 32 * (i % 4)));
    codes = _mm256_and_si256(i < 4 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
    if (BITS == 5) {
        __m256i high = _mm256_loadu_si256((const __m256i *)(w + 256 + 32 * half));
        high = i < 4 ? _mm256_slli_epi16(high, 4 - i) : _mm256_srli_epi16(high, i - 4);
        codes = _mm256_or_si256(codes, _mm256_and_si256(high, _mm256_set1_epi8(16)));
    }
    return codes;
}

static inline __attribute__((always_inline)) __m256 load_scales(const uint8_t *at, long wide) {
    return wide ? _mm256_loadu_ps((const float *)at) : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

// A record as `add_record` reads it. What a panel of rows shares is unpacked before; NULL: unpack it when it is read.
typedef struct {
    const uint8_t *w;
    const __m256i (*codes)[2];             // [8][half], by `unpack`
    const __m256 (*unit)[2], (*least)[2];  // scales and minimums [part][half]
} Record;

// Return the scales (0) or minimums (1) of 8 outputs and a part of the group.
static inline __attribute__((always_inline)) __m256 scales_of(const int BITS, const int PARTS, const uint8_t *w, const Segment *s,
                                                              const int minimums, const int part, const int half) {
    const int place = 8 * (2 * (PARTS * minimums + part) + half);
    return load_scales(w + 64 * BITS + place * (s->wide ? 4 : 2), s->wide);
}

// Add a group's products of 8 outputs to y. least: their minimums, or NULL.
static inline __attribute__((always_inline)) void add_products(const int BITS, __m256i whole, __m256 unit, const __m256 *least,
                                                               const float *step, const float *sum, __m256 *y) {
    __m256 value = _mm256_cvtepi32_ps(whole);
    if (least) value = _mm256_fmadd_ps(value, unit, _mm256_mul_ps(_mm256_broadcast_ss(sum), *least));
    else {
        if (BITS < 8) value = _mm256_fnmadd_ps(_mm256_broadcast_ss(sum), _mm256_set1_ps(1 << (BITS - 1)), value);  // exact
        value = _mm256_mul_ps(value, unit);
    }
    *y = _mm256_fmadd_ps(value, _mm256_broadcast_ss(step), *y);
}

// Add the products of one half of a record (HALVES 1) or of both (2, `half` 0) to y[m][half]. q, step, sum: those of M rows and
// this group.
static inline __attribute__((always_inline)) void add_record(const int M, const int BITS, const int PARTS, const int HALVES,
                                                             const Segment *s, Record r, const int half, const int8_t *q,
                                                             const float *step, const float *sum, __m256 (*y)[2]) {
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
        __m256i chain[QUAD][2], whole[QUAD][2];
#pragma GCC unroll 8
        for (int i = 4 * part; i < 4 * part + 8 / PARTS; i++) {
            const int at = i - 4 * part, begins = at % CHAIN(BITS) == 0, ends = (at + 1) % CHAIN(BITS) == 0;
            // gcc would load before the loop what the stack then holds.
            if (r.codes) __asm__ volatile("" : "+r"(q), "+r"(r.codes));
            else __asm__ volatile("" : "+r"(q), "+r"(r.w));
            __m256i codes[2];
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; h++) {
                codes[h] = r.codes ? r.codes[i][half + h] : unpack(BITS, r.w, half + h, i);
                PIN(codes[h]);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, q + (i * M + m) * 4, 4);
                __m256i x = _mm256_set1_epi32(four);
                PIN(x);
#pragma GCC unroll 2
                for (int h = 0; h < HALVES; h++) {
                    const __m256i size = BITS == 8 ? _mm256_abs_epi8(codes[h]) : codes[h];
                    const __m256i signed_x = BITS == 8 ? _mm256_sign_epi8(x, codes[h]) : x;
                    chain[m][h] = dot(begins ? _mm256_setzero_si256() : chain[m][h], size, signed_x);
                    PIN(chain[m][h]);
                    if (ends) {
                        const __m256i sums = total(chain[m][h]);
                        whole[m][h] = at < CHAIN(BITS) ? sums : _mm256_add_epi32(whole[m][h], sums);
                    }
                }
            }
        }
        const float *sums = PARTS == 2 ? sum + (1 + part) * M : sum;
        __m256 unit[2], least[2];
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++)
            unit[h] = r.unit ? r.unit[part][half + h] : scales_of(BITS, PARTS, r.w, s, 0, part, half + h);
        if (s->minimums) {
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; h++)
                least[h] = r.least ? r.least[part][half + h] : scales_of(BITS, PARTS, r.w, s, 1, part, half + h);
#pragma GCC unroll 8
            for (int i = 0; i < HALVES * M; i++) {
                const int m = i / HALVES, h = i % HALVES;
                add_products(BITS, whole[m][h], unit[h], least + h, step + m, sums + m, y[m] + half + h);
            }
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < HALVES * M; i++) {
                const int m = i / HALVES, h = i % HALVES;
                add_products(BITS, whole[m][h], unit[h], NULL, step + m, sums + m, y[m] + half + h);
            }
        }
    }
}

// Write the sums of M rows and 16 outputs, the first `count` of them.
static inline __attribute__((always_inline)) void store_sums(long M, __m256 (*sums)[2], const float *bias, float *y, long N,
                                                             long count) {
    for (long m = 0; m < M; m++, y += N) {
        float line[16], *to = count == 16 ? y : line;
        _mm256_storeu_ps(to, sums[m][0]);
        _mm256_storeu_ps(to + 8, sums[m][1]);
        if (to == line) memcpy(y, line, sizeof(float) * count);
        for (long i = 0; bias && i < count; i++) y[i] += bias[i];
    }
}

// Compute y[m][0 .. count) for M rows and 16 outputs. w: their records.
static inline __attribute__((always_inline)) void block_tile(const int M, const int BITS, const int PARTS, const uint8_t *w,
                                                             const Segment *s, Activations a, const float *bias, float *y,
                                                             long N, long count) {
    // Halves computed side by side: memory, which bounds few rows, is read faster one after the other.
    const int HALVES = M < 3 ? 1 : 2;
    __m256 sums[QUAD][2];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm256_setzero_ps();
    for (long g = 0; g < a.groups; g++, w += s->record) {
        fetch_record(w, s);
        const Record r = {w, NULL, NULL, NULL};
#pragma GCC unroll 2
        for (int half = 0; half < 2; half += HALVES)
            add_record(M, BITS, PARTS, HALVES, s, r, half, a.codes + g * GROUP * M, a.step + g * M, a.sum + g * 3 * M, sums);
    }
    store_sums(M, sums, bias, y, N, count);
}

// Compute y[m][0 .. count) for a panel of whole tiles and 16 outputs. w: their records, each unpacked once for all rows.
static inline __attribute__((always_inline)) void block_panel(const int BITS, const int PARTS, const uint8_t *w, const Segment *s,
                                                              Activations a, long rows, const float *bias, float *y, long N,
                                                              long count) {
    __m256 sums[PANEL][2];
    memset(sums, 0, sizeof(__m256) * 2 * rows);
    for (long g = 0; g < a.groups; g++, w += s->record) {
        fetch_record(w, s);
        __m256i codes[8][2];
        __m256 unit[PARTS][2], least[PARTS][2];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) codes[i / 2][i % 2] = unpack(BITS, w, i % 2, i / 2);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * PARTS; i++) {
            unit[i / 2][i % 2] = scales_of(BITS, PARTS, w, s, 0, i / 2, i % 2);
            least[i / 2][i % 2] = s->minimums ? scales_of(BITS, PARTS, w, s, 1, i / 2, i % 2) : _mm256_setzero_ps();
        }
        const Record r = {w, codes, unit, least};
        for (long m = 0; m < rows; m += QUAD) {
            const long at = m * a.groups + g * QUAD;
            add_record(QUAD, BITS, PARTS, 2, s, r, 0, a.codes + at * GROUP, a.step + at, a.sum + 3 * at, sums + m);
        }
    }
    store_sums(rows, sums, bias, y, N, count);
}

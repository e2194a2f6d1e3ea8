// Products of some rows and 16 outputs of weights in blocks (blocks.h), for CPUs with AVX-512 VNNI: the operations of
// blocks_avx2.h in its order, with 16 outputs in a register, so the same bits.

#define QUAD 8  // most rows of a tile: their sums and the products of a group take 16 of 32 registers
#define FOR_ROWS(DO, ...)                                                                                                   \
    DO(1, __VA_ARGS__) DO(2, __VA_ARGS__) DO(3, __VA_ARGS__) DO(4, __VA_ARGS__)                                             \
    DO(5, __VA_ARGS__) DO(6, __VA_ARGS__) DO(7, __VA_ARGS__) DO(8, __VA_ARGS__)
// Compute v here: gcc would compute many values before it uses them, and keep them on the stack.
#define PIN(v) __asm__ volatile("" : "+v"(v))

// Return 32 bytes for 8 outputs, and the 32 for the other 8, which lie `apart` bytes behind.
static inline __m512i both(const uint8_t *at, long apart) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at)),
                              _mm256_loadu_si256((const __m256i *)(at + apart)), 1);
}

// Return the codes of inputs 4 i .. 4 i + 3 of a group for 16 outputs, with 128 added to those of 8 bits: none is negative.
static inline __attribute__((always_inline)) __m512i unpack(const int BITS, const uint8_t *w, const int i) {
    if (BITS == 8) return _mm512_xor_si512(both(w + 32 * i, 256), _mm512_set1_epi8(-128));
    __m512i codes = both(w + 32 * (i % 4), 128);
    codes = _mm512_and_si512(i < 4 ? codes : _mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
    if (BITS == 5) {
        __m512i high = both(w + 256, 32);
        high = i < 4 ? _mm512_slli_epi16(high, 4 - i) : _mm512_srli_epi16(high, i - 4);
        codes = _mm512_or_si512(codes, _mm512_and_si512(high, _mm512_set1_epi8(16)));
    }
    return codes;
}

// Return the scales (0) or minimums (1) of 16 outputs and a part of the group.
static inline __attribute__((always_inline)) __m512 scales_of(const int BITS, const int PARTS, const uint8_t *w, const Segment *s,
                                                              const int minimums, const int part) {
    const uint8_t *at = w + 64 * BITS + 16 * (PARTS * minimums + part) * (s->wide ? 4 : 2);
    return s->wide ? _mm512_loadu_ps((const float *)at) : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

// Add a group's products of 16 outputs to y. least: their minimums, or NULL.
static inline __attribute__((always_inline)) void add_products(const int BITS, __m512i whole, __m512 unit, const __m512 *least,
                                                               const float *step, const float *sum, __m512 *y) {
    __m512 value = _mm512_cvtepi32_ps(whole);
    if (!least || BITS == 8) value = _mm512_fnmadd_ps(_mm512_set1_ps(*sum), _mm512_set1_ps(1 << (BITS - 1)), value);  // exact
    if (least) value = _mm512_fmadd_ps(value, unit, _mm512_mul_ps(_mm512_set1_ps(*sum), *least));
    else value = _mm512_mul_ps(value, unit);
    *y = _mm512_fmadd_ps(value, _mm512_set1_ps(*step), *y);
}

// Add the products of a record to y[m]. codes: what several tiles share, by `unpack`; NULL: unpack it here. q, step, sum: those of
// M rows and this group.
static inline __attribute__((always_inline)) void add_record(const int M, const int BITS, const int PARTS, const Segment *s,
                                                             const uint8_t *w, const __m512i *codes, const int8_t *q,
                                                             const float *step, const float *sum, __m512 *y) {
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
        __m512i whole[QUAD];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) whole[m] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 8 / PARTS * part; i < 8 / PARTS * (part + 1); i++) {
            const __m512i code = codes ? codes[i] : unpack(BITS, w, i);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, q + (i * M + m) * 4, 4);
                whole[m] = _mm512_dpbusd_epi32(whole[m], code, _mm512_set1_epi32(four));
                PIN(whole[m]);
            }
        }
        const float *sums = PARTS == 2 ? sum + (1 + part) * M : sum;
        const __m512 unit = scales_of(BITS, PARTS, w, s, 0, part);
        if (s->minimums) {
            const __m512 least = scales_of(BITS, PARTS, w, s, 1, part);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) add_products(BITS, whole[m], unit, &least, step + m, sums + m, y + m);
        } else {
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) add_products(BITS, whole[m], unit, NULL, step + m, sums + m, y + m);
        }
    }
}

// Write the sums of M rows and 16 outputs, the first `count` of them.
static inline __attribute__((always_inline)) void store_sums(long M, const __m512 *sums, const float *bias, float *y, long N,
                                                             long count) {
    const __mmask16 some = (__mmask16)((1u << count) - 1);
    const __m512 add = bias ? _mm512_maskz_loadu_ps(some, bias) : _mm512_setzero_ps();
    for (long m = 0; m < M; m++) _mm512_mask_storeu_ps(y + m * N, some, bias ? _mm512_add_ps(sums[m], add) : sums[m]);
}

// Compute y[m][0 .. count) for M rows and 16 outputs. w: their records.
static inline __attribute__((always_inline)) void block_tile(const int M, const int BITS, const int PARTS, const uint8_t *w,
                                                             const Segment *s, Activations a, const float *bias, float *y,
                                                             long N, long count) {
    __m512 sums[QUAD];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m] = _mm512_setzero_ps();
    for (long g = 0; g < a.groups; g++, w += s->record) {
        fetch_record(w, s);
        add_record(M, BITS, PARTS, s, w, NULL, a.codes + g * GROUP * M, a.step + g * M, a.sum + g * 3 * M, sums);
    }
    store_sums(M, sums, bias, y, N, count);
}

// Compute y[m][0 .. count) for a panel of whole tiles and 16 outputs. w: their records, each unpacked once for all rows.
static inline __attribute__((always_inline)) void block_panel(const int BITS, const int PARTS, const uint8_t *w, const Segment *s,
                                                              Activations a, long rows, const float *bias, float *y, long N,
                                                              long count) {
    __m512 sums[PANEL];
    for (long m = 0; m < rows; m++) sums[m] = _mm512_setzero_ps();
    for (long g = 0; g < a.groups; g++, w += s->record) {
        fetch_record(w, s);
        __m512i codes[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) codes[i] = unpack(BITS, w, i);
        for (long m = 0; m < rows; m += QUAD) {
            const long at = m * a.groups + g * QUAD;
            add_record(QUAD, BITS, PARTS, s, w, codes, a.codes + at * GROUP, a.step + at, a.sum + 3 * at, sums + m);
        }
    }
    store_sums(rows, sums, bias, y, N, count);
}

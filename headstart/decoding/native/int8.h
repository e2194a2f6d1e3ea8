// Products of 8-bit integers, for fp32.c: int8 weights with a scale for each output, and rows of activations that are
// made int8 here, each with a scale of its own. Sums are whole numbers, so they are exact in any order, and a row's bits
// depend on that row and the weights alone. decoding/int8.py says what is computed, and is what tests compare with.
//
// Activations reach from -127 to 127 and go in as 1 to 255; what that adds, 128 times the sum of the weights, lies beside
// the weights. These reach from -63 to 63: two products of 255 * 63 are 32,130, so vpmaddubsw's 16 bits never overflow.

#define INT8_HEADER 128  // bytes before the weights of a block: 16 int32 of 128 * their sum, 16 fp32 scales

static inline __m256i dot4(__m256i sum, __m256i x, __m256i w) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, x, w);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, x, w);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
#endif
}

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define INT8_ROWS 4
#else
#define INT8_ROWS 2  // with 4, gcc 12 keeps sums on the stack: 1.3 times the time
#endif

// One row (K,) -> q, padded with zeros to a multiple of 32; the value of one step of it.
static float quantize(const float *x, long K, uint8_t *q) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    long k = 0;
    for (; k + 8 <= K; k += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + k)));
    float top = max8(most);
    for (; k < K; k++) top = fmaxf(top, fabsf(x[k]));
    // By this instruction, for -ffast-math may divide by way of an inexact reciprocal.
    const float steps = top > 1e-30f ? _mm_cvtss_f32(_mm_div_ss(_mm_set_ss(127.0f), _mm_set_ss(top))) : 0.0f;
    const __m256 factor = _mm256_set1_ps(steps);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (k = 0; k < K; k += 32) {
        float last[32] = {0};
        const float *from = x + k;
        if (K - k < 32) memcpy(last, from, sizeof(float) * (K - k)), from = last;
        __m256i v[4];
        for (int i = 0; i < 4; i++) v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), factor));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        const __m256i whole = _mm256_xor_si256(_mm256_permutevar8x32_epi32(bytes, order), _mm256_set1_epi8(-128));
        _mm256_storeu_si256((__m256i *)(q + k), whole);
    }
    return top * (1.0f / 127.0f);
}

// y[m][first .. first + 16) for M rows. q: [M][stride]; w: one block of packed weights.
static inline __attribute__((always_inline)) void tile8(const int M, const uint8_t *q, long stride, const float *scale,
                                                        const uint8_t *w, const float *bias, float *y, long N, long K,
                                                        long first) {
    __m256i sum[INT8_ROWS][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    const uint8_t *at = w + INT8_HEADER;
    for (long k = 0; k < K; k += 4, at += 64) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i *)at), w1 = _mm256_loadu_si256((const __m256i *)(at + 32));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t four;
            memcpy(&four, q + m * stride + k, 4);
            const __m256i a = _mm256_set1_epi32(four);
            sum[m][0] = dot4(sum[m][0], a, w0);
            sum[m][1] = dot4(sum[m][1], a, w1);
        }
    }
    const long count = N - first < 16 ? N - first : 16;
    float add[16] = {0};
    if (bias) memcpy(add, bias + first, sizeof(float) * count);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        float line[16];
        for (int half = 0; half < 2; half++) {
            const __m256i shift = _mm256_loadu_si256((const __m256i *)(w + 32 * half));
            const __m256 total = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[m][half], shift));
            const __m256 unit = _mm256_mul_ps(_mm256_set1_ps(scale[m]), _mm256_loadu_ps((const float *)(w + 64) + 8 * half));
            // One rounding, however the compiler lays the loop out.
            _mm256_storeu_ps(line + 8 * half, _mm256_fmadd_ps(total, unit, _mm256_loadu_ps(add + 8 * half)));
        }
        memcpy(y + m * N + first, line, sizeof(float) * count);
    }
}

// y (rows, N) = x (rows, K) W^T + bias. w: W packed as [ceil(N/16)] of a header and [ceil(K/4)][16][4] int8.
static void product8(const float *x, const uint8_t *w, const float *bias, float *y, long rows, long N, long K, int threads) {
    const long stride = (K + 31) / 32 * 32, blocks = (N + 15) / 16, size = INT8_HEADER + (K + 3) / 4 * 64;
    float *scale = malloc(rows * (sizeof(float) + stride));
    uint8_t *q = (uint8_t *)(scale + rows);
    for (long r = 0; r < rows; r++) scale[r] = quantize(x + r * K, K, q + r * stride);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && N * K * rows > 1 << 19)
    for (long block = 0; block < blocks; block++) {
        const uint8_t *wb = w + block * size;
        for (long m = 0; m < rows; m += INT8_ROWS) {  // the block stays in cache for the next rows
            const uint8_t *qm = q + m * stride;
            float *ym = y + m * N;
            switch (rows - m < INT8_ROWS ? rows - m : INT8_ROWS) {
                case 1: tile8(1, qm, stride, scale + m, wb, bias, ym, N, K, block * 16); break;
#if INT8_ROWS > 2
                case 2: tile8(2, qm, stride, scale + m, wb, bias, ym, N, K, block * 16); break;
                case 3: tile8(3, qm, stride, scale + m, wb, bias, ym, N, K, block * 16); break;
#endif
                default: tile8(INT8_ROWS, qm, stride, scale + m, wb, bias, ym, N, K, block * 16);
            }
        }
    }
    free(scale);
}

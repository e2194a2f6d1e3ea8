// Products of 8-bit integers, for fp32.c: int8 weights with a scale for each output, and rows of activations that are quantized
// to int8 here with a scale for each row. Sums are whole numbers, so they are exact in any order, and a row's bits depend on that
// row and the weights alone. decoding/kernels/int8.py is the reference that tests compare with.
//
// Activations range from -127 to 127 and enter the products as 1 to 255. The surplus, 128 times the sum of the weights, is stored
// with the weights. Weights range from -63 to 63: two products of 255 * 63 are 32,130, so vpmaddubsw's 16 bits never overflow.

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

// Quantize one row (K,) into q, padded with zeros to a multiple of 32, and return the value of one step.
static float quantize(const float *x, long K, uint8_t *q) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    long k = 0;
    for (; k + 8 <= K; k += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + k)));
    float top = max8(most);
    for (; k < K; k++) top = fmaxf(top, fabsf(x[k]));
    // An explicit instruction, because -ffast-math may divide through an inexact reciprocal.
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

// Add the products of inputs k to k + 3, for M rows and for B blocks at a distance of `size` bytes.
static inline __attribute__((always_inline)) void step8(const int M, const int B, const uint8_t *q, long stride, const uint8_t *w,
                                                        long size, long k, __m256i sum[4][2]) {
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
        const uint8_t *at = w + b * size + 16 * k;
        __m256i w0 = _mm256_loadu_si256((const __m256i *)at), w1 = _mm256_loadu_si256((const __m256i *)(at + 32));
        KEEP(w0);
        KEEP(w1);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t four;
            memcpy(&four, q + m * stride + k, 4);
            const __m256i a = _mm256_set1_epi32(four);
            sum[m * B + b][0] = dot4(sum[m * B + b][0], a, w0);
            sum[m * B + b][1] = dot4(sum[m * B + b][1], a, w1);
        }
    }
}

// Write the sums of one row and block, times their scales, to y[0 .. count).
static inline __attribute__((always_inline)) void finish8(const __m256i sum[2], float scale, const uint8_t *w, const float *bias,
                                                          float *y, long count) {
    float add[16] = {0}, line[16];
    if (bias) memcpy(add, bias, sizeof(float) * count);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m256i shift = _mm256_loadu_si256((const __m256i *)(w + 32 * half));
        const __m256 total = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[half], shift));
        const __m256 unit = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_loadu_ps((const float *)(w + 64) + 8 * half));
        // One rounding, whichever way the compiler vectorizes the loop.
        _mm256_storeu_ps(line + 8 * half, _mm256_fmadd_ps(total, unit, _mm256_loadu_ps(add + 8 * half)));
    }
    memcpy(y, line, sizeof(float) * count);
}

// Compute y[m][16 block .. ) for M rows and B blocks, M * B <= 4. q: [M][stride]; w: packed weights, a block every `size` bytes.
static inline __attribute__((always_inline)) void tile8(const int M, const int B, const uint8_t *q, long stride, const float *scale,
                                                        const uint8_t *w, long size, const float *bias, float *y, long N, long K,
                                                        long block, const Ahead ahead) {
    __m256i sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < M * B; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    w += block * size;
    long k = 0;
    for (; k + 16 <= K; k += 16) {
        if (M > 2) fetch(&ahead, k / 4);
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) step8(M, B, q, stride, w + INT8_HEADER, size, k + i, sum);
    }
    for (; k < K; k += 4) step8(M, B, q, stride, w + INT8_HEADER, size, k, sum);
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
        const long first = 16 * (block + b), count = N - first < 16 ? N - first : 16;
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            finish8(sum[m * B + b], scale[m], w + b * size, bias ? bias + first : NULL, y + m * N + first, count);
    }
}

typedef void Tile8(const uint8_t *q, long stride, const float *scale, const uint8_t *w, long size, const float *bias, float *y,
                   long N, long K, long block, Ahead ahead);
#define TILE8(M, B)                                                                                                             \
    static __attribute__((noinline)) void tile8_##M##x##B(const uint8_t *q, long stride, const float *scale, const uint8_t *w,    \
                                                          long size, const float *bias, float *y, long N, long K, long block,   \
                                                          Ahead ahead) {                                                        \
        tile8(M, B, q, stride, scale, w, size, bias, y, N, K, block, ahead);                                                    \
    }
TILE8(1, 1) TILE8(2, 1) TILE8(3, 1) TILE8(4, 1) TILE8(1, 4) TILE8(2, 2)
static Tile8 *const tall8[] = {tile8_1x1, tile8_2x1, tile8_3x1, tile8_4x1}, *const wide8[] = {tile8_1x4, tile8_2x2};

typedef struct {
    const uint8_t *q;
    const float *scale;
    const uint8_t *w;
    const float *bias;
    float *y;
    long rows, N, K;
} Product8;

// Compute blocks 4 from .. 4 to - 1 of the columns. Tiles are arranged as in `product_part`.
static void product8_part(void *argument, long from, long to) {
    const Product8 a = *(const Product8 *)argument;
    const long stride = (a.K + 31) / 32 * 32, blocks = (a.N + 15) / 16, size = INT8_HEADER + (a.K + 3) / 4 * 64;
    const long part = (a.K + 15) / 16 * 64, tiles = (a.rows + 3) / 4, lines = tiles == 1 ? 4 : tiles < 4 ? 2 : 1;
    for (long four = 4 * from; four < 4 * to; four += 4) {
        const long end = four + 4 < blocks ? four + 4 : blocks;
        long block = four;
        for (const long B = 4 / a.rows; B > 1 && block + B <= end; block += B)
            wide8[a.rows - 1](a.q, stride, a.scale, a.w, size, a.bias, a.y, a.N, a.K, block, (Ahead){0});
        for (; block < end; block++) {
            for (long i = 0, row = 0; i < tiles; i++) {
                const long M = (a.rows - row + tiles - i - 1) / (tiles - i), skip = i * lines * part;
                const Ahead ahead = {(const char *)a.w + (block + 1) * size + skip, part, skip < size ? (int)lines : 0};
                tall8[M - 1](a.q + row * stride, stride, a.scale + row, a.w, size, a.bias, a.y + row * a.N, a.N, a.K, block,
                             ahead);
                row += M;
            }
        }
    }
}

// Compute y (rows, N) = x (rows, K) W^T + bias. w: W packed as [ceil(N/16)] of a header and [ceil(K/4)][16][4] int8.
static void product8(const float *x, const uint8_t *w, const float *bias, float *y, long rows, long N, long K, int threads) {
    const long stride = (K + 31) / 32 * 32;
    float *scale = malloc(rows * (sizeof(float) + stride));
    uint8_t *q = (uint8_t *)(scale + rows);
    for (long r = 0; r < rows; r++) scale[r] = quantize(x + r * K, K, q + r * stride);
    Product8 a = {q, scale, w, bias, y, rows, N, K};
    parallel(product8_part, &a, (N + 63) / 64, N * K * rows > 1 << 19 ? threads : 1);
    free(scale);
}

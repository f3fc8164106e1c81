// Runs the C kernels against plain arithmetic, where there is no Python: under an emulator of another
// processor. Linked with the kernels; prints their instructions and what the processor says it has
// (on Linux), then each fault; ends with 1 if there was one.
//
// Activations are whole numbers with 127 in each block, times a power of two, so that rounding leaves
// them as they are, and all scales are powers of two. The products must then come out exactly.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#define MOST 9       // rows and tokens
#define WIDE 32832   // so many activations that a few tokens are taken at a time
#define THREADS 2

#define TABLE 5  // in place of bits, as in blocks.h

const char *mmchat_instructions(void);
int mmchat_linear_int8(const int8_t *, const float *, const float *, float *, int64_t, int64_t,
                       int64_t, int);
int mmchat_linear_int4(const uint8_t *, const uint16_t *, const uint16_t *, const float *, float *,
                       int64_t, int64_t, int64_t, int64_t, int);
int mmchat_linear_bf16(const uint16_t *, const float *, float *, int64_t, int64_t, int64_t, int);
int mmchat_linear_blocks(const uint8_t *, const uint8_t *, const float *, float *, int64_t, int64_t,
                         int64_t, int64_t, int);
int mmchat_quantize_blocks(const float *, uint8_t *, int64_t, int64_t, int64_t, int);
void mmchat_widen_blocks(const uint8_t *, const uint8_t *, uint16_t *, int64_t, int64_t, int64_t,
                         int);
int mmchat_attend(const float *, const uint8_t *, const uint8_t *, const uint8_t *, float *, int64_t,
                  int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int);
typedef struct {
    const uint8_t *key, *value;
    int64_t length, head_stride;
} Row;
int mmchat_attend_rows(const float *, const Row *, float *, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int);
int mmchat_attend_many(const void *, const void *, const void *, const float *, void *, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int);

static uint32_t state = 7;
static long checks, faults;

static int draw(int low, int high) {  // both included
    state = state * 1664525u + 1013904223u;
    return low + (int)((state >> 8) % (uint32_t)(high - low + 1));
}

static float real(void) {  // from -2 to 2
    return (float)(draw(-1000, 1000) + draw(-1000, 1000)) / 1000;
}

static uint16_t to_bf16(float value) {  // cut
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void check(int is_right, const char *what, int64_t a, int64_t b, int64_t c, int64_t d) {
    checks++;
    if (is_right) return;
    if (++faults <= 20)
        printf("%s is wrong: %lld %lld %lld %lld\n", what, (long long)a, (long long)b, (long long)c,
               (long long)d);
}

// ---- products: whole numbers -------------------------------------------------------------------

static const int KINDS[][2] = {{0, 0}, {-128, -128}, {127, 127}, {-128, 127}};  // 0: random

static void fill(int8_t *w, int64_t count, int kind) {
    for (int64_t i = 0; i < count; i++) w[i] = kind ? KINDS[kind][i % 2] : draw(-128, 127);
}

// random ones with scales that differ from block to block and from token to token
static void activations(float *x, int64_t K, int64_t count, int kind) {
    for (int64_t i = 0; i < count; i++) {
        int extreme = KINDS[kind][i % 2];
        x[i] = (float)(kind ? (extreme < -127 ? -127 : extreme) : draw(-127, 127));
        if (!kind && i % 64 == 5) x[i] = i / 64 % 2 ? -127 : 127;
        if (!kind) x[i] = ldexpf(x[i], (i / K + i % K / 64) % 3 - 1);
    }
}

static void products(int64_t K, int weights, int tokens, int fewest) {
    int8_t *w = malloc(MOST * K);
    uint8_t *packed = malloc(MOST * K / 2);
    uint16_t *half = malloc(MOST * K * 2), *scale = malloc(MOST * K * 2), *zero = malloc(MOST * K * 2);
    float *x = malloc(MOST * K * 4), y[MOST * MOST], wscale[MOST];
    double plain[MOST][MOST];
    fill(w, MOST * K, weights), activations(x, K, MOST * K, tokens);
    for (int n = 0; n < MOST; n++) wscale[n] = ldexpf(1, n % 5 - 2);
    for (int64_t i = 0; i < MOST * K; i++) half[i] = to_bf16((float)w[i]);
    for (int n = 0; n < MOST; n++)
        for (int m = 0; m < MOST; m++) {
            int64_t sum = 0;  // of halves
            for (int64_t k = 0; k < K; k++) sum += w[n * K + k] * (int64_t)(2 * x[m * K + k]);
            plain[m][n] = (double)sum / 2;
        }
    for (int M = fewest; M <= MOST; M++)
        for (int N = 1 + (M - 1) % 3; N <= MOST; N += 3) {  // each with each third of the others
            mmchat_linear_int8(w, wscale, x, y, M, N, K, THREADS);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < N; n++)
                    check(y[m * N + n] == plain[m][n] * wscale[n], "int8", M, N, K, m * N + n);
            if (weights == 0 && tokens == 0) {  // others may have sums of more than 24 bits
                mmchat_linear_bf16(half, x, y, M, N, K, THREADS);
                for (int m = 0; m < M; m++)
                    for (int n = 0; n < N; n++)
                        check(y[m * N + n] == plain[m][n], "bf16", M, N, K, m * N + n);
            }
        }
    for (int64_t group = 32; group <= 128; group *= 2) {
        const int64_t groups = K / group;
        if (K % group) continue;
        for (int64_t i = 0; i < MOST * K / 2; i++) {
            int low = (uint8_t)w[2 * i] >> 4, high = (uint8_t)w[2 * i + 1] >> 4;
            if (weights) low = KINDS[weights][0] < 0 ? 0 : 15, high = KINDS[weights][1] < 0 ? 0 : 15;
            packed[i] = (uint8_t)(low | high << 4);
        }
        for (int64_t i = 0; i < MOST * groups; i++)
            scale[i] = to_bf16(ldexpf(1, i % 3 - 1)), zero[i] = to_bf16((float)(i % 7) - 3);
        for (int n = 0; n < MOST; n++)
            for (int m = 0; m < MOST; m++) {
                double sum = 0;  // of quarters, exact
                for (int64_t k = 0; k < K; k++) {
                    int level = packed[(n * K + k) / 2] >> k % 2 * 4 & 15;
                    int64_t g = n * groups + k / group;
                    sum += ((level - 8) * (double)from_bf16(scale[g]) + from_bf16(zero[g])) * x[m * K + k];
                }
                plain[m][n] = sum;
            }
        for (int M = fewest; M <= MOST; M++)
            for (int N = 1 + (M - 1) % 3; N <= MOST; N += 3) {
                mmchat_linear_int4(packed, scale, zero, x, y, M, N, K, group, THREADS);
                for (int m = 0; m < M; m++)
                    for (int n = 0; n < N; n++)
                        check(y[m * N + n] == plain[m][n], "int4", group, M, N, K);
            }
    }
    free(w), free(packed), free(half), free(scale), free(zero), free(x);
}

// Scales of eight rows, which are powers of two, and the levels of 64 columns, again and again.
static void any_levels(uint8_t *to, int64_t parts) {
    for (int64_t i = 0; i < parts; i++, to += 288) {
        for (int r = 0; r < 8; r++) memcpy(to + 4 * r, &(float){1 << (i + r) % 3}, 4);
        for (int j = 32; j < 288; j++) to[j] = (uint8_t)draw(0, 255);
    }
}

// Weights of which each group reaches the largest level, so that rounding leaves them as they are
// with 8 bits, and whatever it makes of them with fewer. bits: or TABLE, of any levels.
static void blocks(int64_t K, int64_t bits) {
    enum { N = 24 };
    float *w = malloc(N * K * 4), *x = malloc(MOST * K * 4), *y = malloc(MOST * N * 4);
    uint16_t *wide = malloc(N * K * 2);
    uint8_t *held = malloc(N * K * 2);
    for (int64_t i = 0; i < N * K; i++) w[i] = i % 32 == 7 ? 127 : (float)draw(-127, 127);
    activations(x, K, MOST * K, 0);
    uint8_t table[16];
    for (int i = 0; i < 16; i++) table[i] = (uint8_t)(17 * i);
    if (bits == TABLE) any_levels(held, N * K / 512);
    else mmchat_quantize_blocks(w, held, N, K, bits, THREADS);
    mmchat_widen_blocks(held, table, wide, N, K, bits, THREADS);
    for (int64_t i = 0; i < N * K && bits != TABLE; i++)
        check(fabsf(from_bf16(wide[i]) - w[i]) <= (bits == 8 ? 0 : bits == 6 ? 5 : 20), "rounding", bits,
              K, i, 0);
    for (int M = 1; M <= MOST; M++)
        for (int rows = 8; rows <= N; rows += 8) {
            mmchat_linear_blocks(held, table, x, y, M, rows, K, bits, THREADS);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < rows; n++) {
                    double sum = 0, size = 0;
                    for (int64_t k = 0; k < K; k++) {
                        const double product = (double)from_bf16(wide[n * K + k]) * x[m * K + k];
                        sum += product, size += fabs(product);
                    }
                    const int is_exact = bits == 8 || bits == TABLE;
                    check(fabs(y[m * rows + n] - sum) <= (is_exact ? 0 : 0.003 * size), "blocks",
                          bits, M, rows, K);
                }
        }
    free(w), free(x), free(y), free(wide), free(held);
}

// What is infinite or no number makes its own token so, and no other.
static void hostile_products(void) {
    enum { K = 192, M = 5, N = 3 };
    static int8_t w[N * K];
    static uint16_t half[N * K];
    static float x[M * K], y[M * N], wscale[N] = {1, 1, 1};
    for (int odd = 0; odd < 2; odd++) {
        fill(w, N * K, 2), activations(x, K, M * K, 0);
        x[2 * K + 70] = odd ? NAN : INFINITY;
        for (int i = 0; i < N * K; i++) half[i] = to_bf16(1);
        mmchat_linear_int8(w, wscale, x, y, M, N, K, THREADS);
        for (int i = 0; i < M * N; i++) check(!isfinite(y[i]) == (i / N == 2), "int8 of NaN", odd, i, 0, 0);
        mmchat_linear_bf16(half, x, y, M, N, K, THREADS);
        for (int i = 0; i < M * N; i++) check(!isfinite(y[i]) == (i / N == 2), "bf16 of NaN", odd, i, 0, 0);
    }
}

// ---- attention: doubles ------------------------------------------------------------------------

#define BATCH 2
#define HEADS 2

// A key or value: bfloat16, or int8 with a float scale behind it.
static double number(const uint8_t *row, int64_t d, int64_t D, int is_int8) {
    float scale;
    if (!is_int8) return from_bf16(((const uint16_t *)row)[d]);
    memcpy(&scale, row + D, 4);
    return (double)((const int8_t *)row)[d] * scale;
}

static void expected(const float *q, const uint8_t *key, const uint8_t *value, const uint8_t *seen,
                     int64_t n, int64_t D, int is_int8, double *out) {
    const int64_t row = is_int8 ? D + 4 : 2 * D;
    double *score = malloc(sizeof(double) * n), most = -INFINITY, total = 0;
    for (int64_t j = 0; j < n; j++) {
        score[j] = 0;
        for (int64_t d = 0; d < D; d++) score[j] += q[d] * number(key + j * row, d, D, is_int8);
        if ((!seen || seen[j]) && score[j] > most) most = score[j];
    }
    for (int64_t d = 0; d < D; d++) out[d] = 0;
    for (int64_t j = 0; j < n; j++) {
        if (seen && !seen[j]) continue;
        double p = exp(score[j] - most);
        total += p;
        for (int64_t d = 0; d < D; d++) out[d] += p * number(value + j * row, d, D, is_int8);
    }
    for (int64_t d = 0; d < D && total; d++) out[d] /= total;
    free(score);
}

static void fill_rows(uint8_t *rows, int64_t count, int64_t D, int is_int8) {
    for (int64_t j = 0; j < count; j++) {
        float scale = (1 + (float)draw(0, 9) / 9) / 127;
        for (int64_t d = 0; d < D; d++)
            if (is_int8) ((int8_t *)rows)[j * (D + 4) + d] = draw(-127, 127);
            else ((uint16_t *)rows)[j * D + d] = to_bf16(real());
        if (is_int8) memcpy(rows + j * (D + 4) + D, &scale, 4);
    }
}

static void break_row(uint8_t *row, int64_t D, int is_int8) {
    const float nan = NAN;
    if (is_int8) memcpy(row + D, &nan, 4);
    else ((uint16_t *)row)[3] = 0x7fc0;
}

static int near(const float *found, const double *plain, int64_t D) {
    for (int64_t d = 0; d < D; d++)
        if (!(fabs(found[d] - plain[d]) <= 1e-5 + 1e-4 * fabs(plain[d]))) return 0;
    return 1;
}

static void attention(int64_t length, int64_t D, int64_t R, float spread, int is_int8) {
    const int64_t heads = BATCH * HEADS, row = is_int8 ? D + 4 : 2 * D, head = length * row;
    float *q = malloc(heads * R * D * 4), *out = malloc(heads * R * D * 4);
    uint8_t *key = malloc(heads * head), *value = malloc(heads * head);
    uint8_t *mask = malloc(BATCH * length);
    double plain[256];
    for (int64_t i = 0; i < heads * R * D; i++) q[i] = real() * spread / sqrtf((float)D);
    fill_rows(key, heads * length, D, is_int8), fill_rows(value, heads * length, D, is_int8);
    for (int64_t i = 0; i < BATCH * length; i++) mask[i] = i % length == length - 1 || draw(0, 9) < 6;
    for (int masked = 0; masked < 2; masked++) {
        mmchat_attend(q, key, value, masked ? mask : NULL, out, BATCH, HEADS, R, length, D,
                      HEADS * head, head, length, is_int8, THREADS);
        for (int64_t i = 0; i < heads * R; i++) {
            int64_t h = i / R;
            expected(q + i * D, key + h * head, value + h * head,
                     masked ? mask + h / HEADS * length : NULL, length, D, is_int8, plain);
            check(near(out + i * D, plain, D), masked ? "masked attention" : "attention", length, D, R, i);
        }
    }
    Row rows[BATCH];
    for (int b = 0; b < BATCH; b++)
        rows[b] = (Row){key + b * HEADS * head, value + b * HEADS * head, b ? length / 2 + 1 : length,
                        head};
    mmchat_attend_rows(q, rows, out, BATCH, HEADS, R, D, is_int8, THREADS);
    for (int64_t i = 0; i < heads * R; i++) {
        int64_t h = i / R;
        expected(q + i * D, key + h * head, value + h * head, NULL, rows[h / HEADS].length, D, is_int8,
                 plain);
        check(near(out + i * D, plain, D), "attention of rows", length, D, R, i);
    }
    memset(mask, 0, BATCH * length);
    mmchat_attend(q, key, value, mask, out, BATCH, HEADS, R, length, D, HEADS * head, head, length,
                  is_int8, THREADS);
    for (int64_t i = 0; i < heads * R * D; i++) check(out[i] == 0, "attention to nothing", length, D, R, i);
    break_row(value + (length - 1) * row, D, is_int8);  // of the first head
    mmchat_attend(q, key, value, NULL, out, BATCH, HEADS, R, length, D, HEADS * head, head, 0, is_int8,
                  THREADS);
    for (int64_t i = 0; i < heads * R * D; i++)
        check(isnan(out[i]) == (i < R * D && (is_int8 || i % D == 3)), "attention to a NaN value", length,
              D, R, i);
    break_row(key + (length - 1) * row, D, is_int8);
    mmchat_attend(q, key, value, NULL, out, BATCH, HEADS, R, length, D, HEADS * head, head, 0, is_int8,
                  THREADS);
    for (int64_t i = 0; i < heads * R * D; i++)
        check(isnan(out[i]) == (i < R * D), "attention to a NaN key", length, D, R, i);
    free(q), free(out), free(key), free(value), free(mask);
}

// S queries of two heads that share N keys, as float or bfloat16; causal: the last one sees all.
static void attention_of_many(int64_t S, int64_t N, int64_t D, int is_bf16, int causal) {
    const int64_t H = 2, width = is_bf16 ? 2 : 4;
    uint16_t *half = malloc((H * S + 2 * N) * D * 2), *out = malloc(H * S * D * 4);
    float *wide = malloc((H * S + 2 * N) * D * 4);
    double plain[256];
    for (int64_t i = 0; i < (H * S + 2 * N) * D; i++) wide[i] = from_bf16(half[i] = to_bf16(real()));
    const uint8_t *given = is_bf16 ? (uint8_t *)half : (uint8_t *)wide;  // queries [S, H, D]
    const int64_t keys = H * S * D, values = keys + N * D;
    mmchat_attend_many(given, given + keys * width, given + values * width, NULL, out, 1, H, 1, S, N, D,
                       0, D, H * D, 0, 0, D, 0, 0, D, 0, causal ? N - S : N, is_bf16, THREADS);
    for (int64_t i = 0; i < H * S; i++) {
        float q[256], found[256];
        for (int64_t d = 0; d < D; d++) {
            q[d] = wide[i * D + d] / sqrtf((float)D);
            found[d] = is_bf16 ? from_bf16(out[i * D + d]) : ((float *)out)[i * D + d];
        }
        int64_t n = causal ? N - S + i / H + 1 : N;
        expected(q, (uint8_t *)(half + keys), (uint8_t *)(half + values), NULL, n, D, 0, plain);
        int is_near = 1;
        for (int64_t d = 0; d < D; d++)
            is_near &= fabs(found[d] - plain[d]) <= 2e-5 + (is_bf16 ? 8e-3 : 1e-4) * fabs(plain[d]);
        check(is_near, "attention of many queries", S, N, D, i);
    }
    free(half), free(out), free(wide);
}

int main(void) {
    static const int64_t WIDTHS[] = {64, 128, 192, 256, 640, 576, 1152};  // every remainder of groups
    static const int64_t LENGTHS[] = {1, 2, 3, 63, 65, 513, 578};
    static const int64_t HEAD_WIDTHS[] = {16, 48, 128, 256};
    printf("%s\n", mmchat_instructions());
#ifdef __linux__
    printf("%lu %lu\n", getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
#else
    printf("0 0\n");
#endif
    fflush(stdout);  // what an unknown instruction would lose
    for (int i = 0; i < 7; i++)
        for (int weights = 0; weights < 4; weights++)
            for (int tokens = 0; tokens < 4; tokens++)
                if (WIDTHS[i] == 640 || weights + tokens == 0) products(WIDTHS[i], weights, tokens, 1);
    products(WIDE, 0, 0, MOST);
    for (int i = 0; i < 7; i++)
        for (int64_t bits = 4; bits <= 8; bits += bits == 4 || bits == TABLE ? 1 : 2)
            blocks(WIDTHS[i], bits);
    hostile_products();
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 4; j++)
            for (int64_t R = 1 + (i + j) % 4; R <= 9; R += 4)  // a remainder of QUERIES each
                for (int is_int8 = 0; is_int8 < 2; is_int8++)
                    if (LENGTHS[i] < 100 || R <= 4)
                        attention(LENGTHS[i], HEAD_WIDTHS[j], R, 1, is_int8);
    for (int is_int8 = 0; is_int8 < 2; is_int8++)
        attention(200, 64, 4, 40, is_int8);  // scores far apart
    static const int64_t MANY[][3] = {{1, 1, 8}, {33, 97, 80}, {9, 12, 16}, {130, 193, 24}, {40, 40, 256}};
    for (int i = 0; i < 5; i++)
        for (int kind = 0; kind < 4; kind++)
            attention_of_many(MANY[i][0], MANY[i][1], MANY[i][2], kind % 2, kind / 2);
    printf("%ld checks, %ld faults\n", checks, faults);
    return faults > 0;
}

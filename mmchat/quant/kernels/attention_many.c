// softmax(query · keyᵀ + bias) · value of many queries, in float32.
//
//   query       [B, H, S, D], key, value  [B, G, N, D] of float or bfloat16, the D side by side,
//               all else where the strides say, in numbers; H is a multiple of G
//   bias        float [B, N] by its stride, added to all scores of a key; or NULL
//   out         [B, S, H, D] of the same dtype; zeros where nothing may be seen
//
// A query s sees the keys 0 .. first + s. D is a multiple of WIDE.
//
// Tasks are blocks of queries of one head, which read the keys a block at a time with a softmax
// that is corrected as they come (Dao et al. 2022). Lanes are queries, so that nothing is added
// across lanes: a vector of them meets one number of a key, or of a value, in all lanes. For that
// keys and values are laid out anew, those of a few heads at a time, and filled up with keys that
// nobody sees. Sums are added in one order, whatever the number of threads and of heads.

#include <stdlib.h>

#include "bfloat16.h"
#include "products.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
#define TILE 12  // keys whose scores are made together
#define WIDE 8   // elements of values that are added up together
#else
#define TILE 6
#define WIDE 4
#endif
#define STRIP (2 * LANES)  // queries of a tile
#define KEYS 96            // of a block; a multiple of TILE
#define QUERIES 128        // of a task

typedef float Real __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef Real Unaligned __attribute__((aligned(4)));

INLINE Real load(const float *at) { return *(const Unaligned *)at; }
INLINE void store(float *at, Real v) { *(Unaligned *)at = v; }
INLINE Real all(float x) { return x - (Real){0}; }

INLINE Real either(Bits chosen, Real a, Real b) {
    return (Real)((chosen & (Bits)a) | (~chosen & (Bits)b));
}

// 2^x for x <= 0, by 2^n · 2^f with |f| <= 1/2; zero below 2^-126. NaN stays.
INLINE Real power(Real x) {
    static const float c[] = {1.534581e-4f, 1.339993e-3f, 9.618489e-3f, 5.5503288e-2f,
                              2.4022647e-1f, 6.9314721e-1f, 1};  // off by 2e-9 before rounding
    const float whole = 12582912;  // so large that what is added to it is rounded
    const Real shifted = x + whole, f = x - (shifted - whole);
    Real p = all(c[0]);
    for (int i = 1; i < 7; i++) p = p * f + c[i];
    p *= (Real)(((Bits)shifted + 127) << 23);
    return (Real)((Bits)p & ~(Bits)(x < -126));
}

// Where numbers lie.
typedef struct {
    const void *at;
    int64_t batch, head, row;
    int is_bf16;
} Numbers;

INLINE float number(const Numbers *of, int64_t i) {
    return of->is_bf16 ? bf16_to_float(((const uint16_t *)of->at)[i]) : ((const float *)of->at)[i];
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Of TILE keys [D, TILE] and STRIP queries [D, STRIP], with a bias of each key: [TILE, STRIP].
INLINE void tile_scores(const float *q, const float *k, const float *bias, int64_t D, float *out) {
    Real sum[TILE][2];
    for (int t = 0; t < TILE; t++) sum[t][0] = sum[t][1] = all(bias[t]);
    for (int64_t d = 0; d < D; d++) {
        const Real a = load(q + d * STRIP), b = load(q + d * STRIP + LANES);
        for (int t = 0; t < TILE; t++) {
            const Real key = all(k[d * TILE + t]);
            sum[t][0] += a * key;
            sum[t][1] += b * key;
        }
    }
    for (int t = 0; t < TILE; t++)
        for (int i = 0; i < 2; i++) store(out + t * STRIP + i * LANES, sum[t][i]);
}

// out [WIDE, STRIP] = out · shrink + values [n, D], of which WIDE are read, by weights p [n, STRIP].
INLINE void tile_values(const float *p, const float *v, int64_t n, int64_t D, const Real *shrink,
                        float *out) {
    Real sum[WIDE][2] = {{{0}}};
    for (int64_t j = 0; j < n; j++) {
        const Real a = load(p + j * STRIP), b = load(p + j * STRIP + LANES);
        for (int t = 0; t < WIDE; t++) {
            const Real value = all(v[j * D + t]);
            sum[t][0] += a * value;
            sum[t][1] += b * value;
        }
    }
    for (int t = 0; t < WIDE; t++)
        for (int i = 0; i < 2; i++) {
            float *at = out + t * STRIP + i * LANES;
            store(at, load(at) * shrink[i] + sum[t][i]);
        }
}

// n scores of each query -> 2^(score - most).
INLINE void softmax(float *scores, int64_t n, float *most, float *total, Real *shrink) {
    for (int i = 0; i < 2; i++) {
        float *at = scores + i * LANES;
        const Real before = load(most + i * LANES);
        Real largest = before, sum = {0};
        for (int64_t j = 0; j < n; j++) {
            const Real score = load(at + j * STRIP);
            largest = either((Bits)(score > largest), score, largest);
        }
        for (int64_t j = 0; j < n; j++) {
            const Real p = power(load(at + j * STRIP) - largest);
            store(at + j * STRIP, p);
            sum += p;
        }
        shrink[i] = power(before - largest);
        store(most + i * LANES, largest);
        store(total + i * LANES, load(total + i * LANES) * shrink[i] + sum);
    }
}

// STRIP queries against n keys of a block. seen: of the first query, so many keys of the block.
INLINE void strip(const float *q, const float *key, const float *value, const float *bias,
                  int64_t n, int64_t seen, int64_t D, float *scores, float *most, float *total,
                  float *out) {
    n = least(n, (seen + STRIP - 1 + TILE - 1) / TILE * TILE);
    for (int64_t j = 0; j < n; j += TILE)
        tile_scores(q, key + j * D, bias + j, D, scores + j * STRIP);
    for (int64_t j = seen < 0 ? 0 : seen; j < n; j++)
        for (int64_t i = 0; i < least(STRIP, j - seen + 1); i++) scores[j * STRIP + i] = -INFINITY;
    Real shrink[2];
    softmax(scores, n, most, total, shrink);
    for (int64_t d = 0; d < D; d += WIDE)
        tile_values(scores, value + d, n, D, shrink, out + d * STRIP);
}

// What a thread works in: of QUERIES queries.
typedef struct {
    float most[QUERIES], total[QUERIES], scores[KEYS * STRIP];
    float sums[];  // queries [strips, D, STRIP], and as many sums
} Room;

// Lays out a block of KEYS keys, or what is left of N, as tiles [D, TILE], and of values [D].
static void lay_out(const Numbers *key, const Numbers *value, int64_t b, int64_t g, int64_t first,
                    int64_t N, int64_t D, float *keys, float *values) {
    for (int64_t j = 0; j < KEYS; j++) {
        const int64_t at = first + j, n = at < N ? D : 0;  // what is not there is zeros
        const int64_t k = b * key->batch + g * key->head + at * key->row;
        const int64_t v = b * value->batch + g * value->head + at * value->row;
        float *tile = keys + j / TILE * TILE * D + j % TILE, *row = values + j * D;
        for (int64_t d = 0; d < n; d++) tile[d * TILE] = number(key, k + d);
        for (int64_t d = 0; d < n; d++) row[d] = number(value, v + d);
        for (int64_t d = n; d < D; d++) tile[d * TILE] = row[d] = 0;
    }
}

// A block of queries of one head, from query s on; keys: N of them, filled up to whole blocks.
static void task(const Numbers *query, int64_t from, int64_t count, const float *keys,
                 const float *values, const float *bias, int64_t N, int64_t seen, int64_t D,
                 float scale, Room *room) {
    const int64_t strips = (count + STRIP - 1) / STRIP;
    float *q = room->sums, *out = q + QUERIES * D;
    memset(q, 0, sizeof(float) * 2 * QUERIES * D);
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < D; d++)
            q[(i / STRIP * D + d) * STRIP + i % STRIP] =
                number(query, from + i * query->row + d) * scale;
    for (int i = 0; i < QUERIES; i++) room->most[i] = -FLT_MAX, room->total[i] = 0;
    const int64_t end = least(N, seen + count - 1);
    for (int64_t first = 0; first < end; first += KEYS) {
        const int64_t left = (end - first + TILE - 1) / TILE * TILE;
        for (int64_t s = 0; s < strips; s++) {
            const int64_t own = seen + s * STRIP - first;
            if (own + STRIP - 1 <= 0) continue;  // the keys come after all of its queries
            strip(q + s * STRIP * D, keys + first * D, values + first * D, bias + first,
                  least(left, KEYS), own, D, room->scores, room->most + s * STRIP,
                  room->total + s * STRIP, out + s * STRIP * D);
        }
    }
}

INLINE uint16_t rounded_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);  // NaN
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Writes the sums of `count` queries, `apart` from each other, divided by their totals.
static void write_rows(const Room *room, int64_t count, int64_t D, int is_bf16, void *out, int64_t at,
                  int64_t apart) {
    for (int64_t i = 0; i < count; i++) {
        const float *sum = room->sums + (QUERIES + i / STRIP * STRIP) * D + i % STRIP;
        const float inverse = room->total[i] != 0 ? 1 / room->total[i] : 0;
        for (int64_t d = 0; d < D; d++) {
            const float x = sum[d * STRIP] * inverse;
            if (is_bf16) ((uint16_t *)out)[at + i * apart + d] = rounded_bf16(x);
            else ((float *)out)[at + i * apart + d] = x;
        }
    }
}

// Returns 0, or 1 when there is no memory. first: N or more where each query sees all keys.
int mmchat_attend_many(const void *query, const void *key, const void *value, const float *bias,
                       void *out, int64_t B, int64_t H, int64_t G, int64_t S, int64_t N,
                       int64_t D, int64_t q_batch, int64_t q_head, int64_t q_row, int64_t k_batch,
                       int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head,
                       int64_t v_row, int64_t bias_stride, int64_t first, int64_t is_bf16,
                       int threads) {
    const Numbers q = {query, q_batch, q_head, q_row, is_bf16 != 0};
    const Numbers k = {key, k_batch, k_head, k_row, is_bf16 != 0};
    const Numbers v = {value, v_batch, v_head, v_row, is_bf16 != 0};
    const float log2e = 1.44269504f, scale = log2e / sqrtf((float)D);
    const int64_t per_group = H / G, blocks = (S + QUERIES - 1) / QUERIES;
    const int64_t padded = (N + KEYS - 1) / KEYS * KEYS, size = padded * D;
    // groups of heads that are laid out at once: as few as keep all threads busy
    const int64_t tasks = per_group * blocks, together = least(B * G, (4 * threads - 1) / tasks + 1);
    float *biases = malloc(sizeof(float) * (size_t)(B * padded));
    float *keys = aligned_alloc(64, sizeof(float) * (size_t)(2 * together * size));
    int failed = !biases || !keys;
    for (int64_t i = 0; i < B * padded && !failed; i++) {
        const int64_t b = i / padded, j = i % padded;
        biases[i] = j >= N ? -INFINITY : bias ? bias[b * bias_stride + j] * log2e : 0;
    }
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        Room *room = aligned_alloc(64, sizeof(Room) + sizeof(float) * (size_t)(2 * QUERIES * D));
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t g0 = 0; g0 < B * G; g0 += together) {
            const int64_t groups = least(together, B * G - g0);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < groups * (padded / KEYS); i++) {
                const int64_t at = i * KEYS, g = g0 + at / padded;
                lay_out(&k, &v, g / G, g % G, at % padded, N, D, keys + at * D,
                        keys + (together * padded + at) * D);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < groups * tasks; i++) {
                const int64_t g = i / tasks, b = (g0 + g) / G, s = i % blocks * QUERIES;
                const int64_t h = (g0 + g) % G * per_group + i % tasks / blocks;
                const int64_t count = least(QUERIES, S - s), from = b * q.batch + h * q.head;
                if (!room) continue;
                task(&q, from + s * q.row, count, keys + g * size, keys + (together + g) * size,
                     biases + b * padded, N, first + s + 1, D, scale, room);
                write_rows(room, count, D, q.is_bf16, out, ((b * S + s) * H + h) * D, H * D);
            }
        }
        free(room);
    }
    free(biases), free(keys);
    return failed;
}

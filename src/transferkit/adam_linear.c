/* One pass over the weight of a fully connected layer: the weight gradient
 * G^T X (bf16 inputs, fp32 sums) is formed tile by tile in registers and used
 * by Adam at once, so that it never has to be written to memory. */
/* A fused multiply-add only where it is written: the roundings are part of the result. */
#pragma GCC optimize("fp-contract=off")
#include <errno.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define ROWS 4              /* rows and 16-column vectors of a register tile */
#define VECS 2
#define CHUNK 16            /* rows a thread takes at a time */
#define PANEL (1 << 21)     /* most bytes of packed X; 2**21 holds 32 samples of 32,768 features */
#define COLS (16 * VECS)
#define HOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE HOT static inline __attribute__((always_inline))
#define MAXTHREADS 64

_Static_assert(CHUNK % ROWS == 0, "a chunk holds whole tiles");

struct adam {
    float step_size, bias2_sqrt, eps, beta2, one_minus_beta1, one_minus_beta2, weight_decay, shrink;
};

struct job {
    float *w, *m, *v;
    const uint16_t *g, *x;
    int64_t ldg, ldx, n, o, k, pairs, panel, chunks, items;
    struct adam a;
    atomic_llong *next;
    uint32_t *pack;         /* this thread's packed panel of X, then its packed rows of G */
};

/* The operations of torch's fused CPU Adam, in its order and with its roundings.
 * last: the lanes that torch's vector loop leaves over, whose second moment
 * its compiler fuses the other way round. */
INLINE void adam16(const struct job *j, int64_t at, __m512 sum, int plain, int full, __mmask16 k, __mmask16 last)
{
    const struct adam *a = &j->a;
    __m512 g = _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sum)), 16));
#define LOAD(p) (full ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(k, p))
    __m512 w = LOAD(j->w + at), m = LOAD(j->m + at), v = LOAD(j->v + at);
    __m512 c1 = _mm512_set1_ps(a->one_minus_beta1), b2 = _mm512_set1_ps(a->beta2);
    if (!plain && a->weight_decay != 0)
        g = _mm512_fmadd_ps(w, _mm512_set1_ps(a->weight_decay), g);
    if (!plain && a->shrink != 1)
        w = _mm512_mul_ps(w, _mm512_set1_ps(a->shrink));
    if (plain || a->one_minus_beta1 < 0.5f)
        m = _mm512_fmadd_ps(c1, _mm512_sub_ps(g, m), m);
    else
        m = _mm512_fmadd_ps(_mm512_sub_ps(c1, _mm512_set1_ps(1)), _mm512_sub_ps(g, m), g);
    __m512 cg = _mm512_mul_ps(_mm512_set1_ps(a->one_minus_beta2), g), old = v;
    v = _mm512_fmadd_ps(cg, g, _mm512_mul_ps(v, b2));
    if (!full)
        v = _mm512_mask_blend_ps(last, v, _mm512_fmadd_ps(old, b2, _mm512_mul_ps(cg, g)));
    __m512 d = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(a->bias2_sqrt)),
                             _mm512_set1_ps(a->eps));
    w = _mm512_add_ps(w, _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(-a->step_size), m), d));
    if (full) {
        _mm512_storeu_ps(j->w + at, w), _mm512_storeu_ps(j->m + at, m), _mm512_storeu_ps(j->v + at, v);
    } else {
        _mm512_mask_storeu_ps(j->w + at, k, w);
        _mm512_mask_storeu_ps(j->m + at, k, m);
        _mm512_mask_storeu_ps(j->v + at, k, v);
    }
}

/* One register tile of sums: samples 2*from .. 2*to of the product. */
INLINE void product(__m512 sum[ROWS][VECS], const uint32_t *x, const uint32_t *g, int64_t pairs,
                    int64_t from, int64_t to)
{
    for (int64_t p = from; p < to; p++) {
        __m512i b[VECS];
        for (int c = 0; c < VECS; c++)
            b[c] = _mm512_loadu_si512(x + p * COLS + 16 * c);
        for (int r = 0; r < ROWS; r++) {
            __m512i s = _mm512_set1_epi32((int)g[r * pairs + p]);
            for (int c = 0; c < VECS; c++)
                sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)s, (__m512bh)b[c]);
        }
    }
}

#define TILE(s) \
    __m512 s[ROWS][VECS]; \
    for (int r = 0; r < ROWS; r++) \
        for (int c = 0; c < VECS; c++) \
            s[r][c] = _mm512_setzero_ps()

/* Whole tiles of ROWS rows.  The product of a tile is interleaved with Adam for the tile before
 * it: one keeps the multipliers busy, the other the divider and the memory. */
INLINE void strip(const struct job *shared, const uint32_t *x, const uint32_t *g, int64_t row,
                  int64_t col, int64_t tiles, int64_t pairs, int plain)
{
    enum { STEPS = ROWS * VECS };
    const struct job own = *shared, *j = &own;      /* a copy that no store can alias */
    __m512 held[STEPS] = {0};
    for (int64_t t = 0; t <= tiles; t++, x += COLS * pairs, col += COLS) {
        TILE(sum);
#pragma GCC unroll 32
        for (int i = 0; i < STEPS; i++) {
            int64_t at = (row + i / VECS) * j->k + col + 16 * (i % VECS);
            if (t < tiles)
                product(sum, x, g, pairs, i * pairs / STEPS, (i + 1) * pairs / STEPS);
            if (t)
                adam16(j, at - COLS, held[i], plain, 1, 0xffff, 0);
        }
#pragma GCC unroll 32
        for (int i = 0; i < STEPS; i++)
            held[i] = sum[i / VECS][i % VECS];
    }
}

HOT static void strips(const struct job *j, const uint32_t *x, const uint32_t *g, int64_t row,
                       int64_t col, int64_t tiles)
{
    int plain = j->a.weight_decay == 0 && j->a.shrink == 1 && j->a.one_minus_beta1 < 0.5f;
    if (j->pairs == 16 && plain)    /* the usual case, with everything known */
        strip(j, x, g, row, col, tiles, 16, 1);
    else
        strip(j, x, g, row, col, tiles, j->pairs, 0);
}

/* A tile at the right or lower edge; rows: how many of the packed rows of G are real ones. */
HOT static void edge(const struct job *j, const uint32_t *x, const uint32_t *g, int64_t row,
                     int64_t col, int64_t rows)
{
    TILE(sum);
    product(sum, x, g, j->pairs, 0, j->pairs);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < VECS && col + 16 * c < j->k; c++) {
            int64_t here = col + 16 * c, at = (row + r) * j->k + here, rest = j->k - here;
            int64_t even = j->o * j->k / 8 * 8 - at;
            __mmask16 k = rest < 16 ? (1u << rest) - 1 : 0xffff;
            adam16(j, at, sum[r][c], 0, 0, k, even < 0 ? 0xffff : even < 16 ? 0xffffu << even : 0);
        }
}

/* Columns from..to of X as pairs of samples side by side, COLS columns a block. */
HOT static void pack_x(const struct job *j, uint32_t *out, int64_t from, int64_t to)
{
    for (int64_t col = from; col < to; col += COLS)
        for (int64_t p = 0; p < j->pairs; p++)
            for (int c = 0; c < VECS; c++, out += 16) {
                int64_t rest = to - col - 16 * c;
                __mmask16 k = rest < 0 ? 0 : rest < 16 ? (1u << rest) - 1 : 0xffff;
                const uint16_t *a = j->x + 2 * p * j->ldx + col + 16 * c;
                __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, a));
                __m512i hi = _mm512_cvtepu16_epi32(
                    _mm256_maskz_loadu_epi16(2 * p + 1 < j->n ? k : 0, a + j->ldx));
                _mm512_storeu_si512(out, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
            }
}

static void pack_g(const struct job *j, uint32_t *out, int64_t row, int64_t rows)
{
    for (int64_t p = 0; p < j->pairs; p++)
        for (int64_t r = 0; r < CHUNK; r++) {
            const uint16_t *a = j->g + 2 * p * j->ldg + row + r;
            uint32_t lo = r < rows ? a[0] : 0, hi = r < rows && 2 * p + 1 < j->n ? a[j->ldg] : 0;
            out[r * j->pairs + p] = lo | hi << 16;
        }
}

HOT static void *work(void *arg)
{
    const struct job *j = arg;
    uint32_t *px = j->pack, *pg = px + j->panel * j->pairs;
    int64_t packed = -1;
    for (int64_t i; (i = atomic_fetch_add(j->next, 1)) < j->items;) {
        int64_t panel = i / j->chunks, row = i % j->chunks * CHUNK, from = panel * j->panel;
        int64_t to = from + j->panel < j->k ? from + j->panel : j->k;
        int64_t rows = j->o - row < CHUNK ? j->o - row : CHUNK;
        if (panel != packed)
            pack_x(j, px, from, to), packed = panel;
        pack_g(j, pg, row, rows);
        for (int64_t r = 0; r < rows; r += ROWS) {
            const uint32_t *g = pg + r * j->pairs;
            int64_t real = rows - r < ROWS ? rows - r : ROWS, tiles = (to - from) / COLS;
            if (real < ROWS || (row + r + ROWS >= j->o && j->o * j->k % 8))
                tiles = 0;
            else
                strips(j, px, g, row + r, from, tiles);
            for (int64_t col = from + tiles * COLS; col < to; col += COLS)
                edge(j, px + (col - from) * j->pairs, g, row + r, col, real);
        }
    }
    _mm_sfence();
    return 0;
}

/* w, m, v: o x k, contiguous fp32, updated in place; g: n x o and x: n x k bf16, with row strides
 * ldg and ldx.  Returns 0 or an errno value, with nothing changed. */
int adam_linear(float *w, float *m, float *v, const uint16_t *g, int64_t ldg,
                const uint16_t *x, int64_t ldx, int64_t n, int64_t o, int64_t k, const float *coefficients,
                int threads)
{
    if (n < 1 || o < 1 || k < 1)
        return EINVAL;
    threads = threads < 1 ? 1 : threads > MAXTHREADS ? MAXTHREADS : threads;
    struct job jobs[MAXTHREADS];
    pthread_t ids[MAXTHREADS];
    const float *f = coefficients;
    int64_t pairs = (n + 1) / 2, panel = PANEL / (4 * pairs) / COLS * COLS, whole = (k + COLS - 1) / COLS * COLS;
    panel = panel < COLS ? COLS : panel > whole ? whole : panel;
    size_t words = ((panel + CHUNK) * pairs + 15) / 16 * 16;
    uint32_t *pack = aligned_alloc(64, threads * words * 4);
    if (!pack)
        return ENOMEM;
    atomic_llong next = 0;
    int64_t chunks = (o + CHUNK - 1) / CHUNK;
    for (int t = 0; t < threads; t++)
        jobs[t] = (struct job){w, m, v, g, x, ldg, ldx, n, o, k, pairs, panel, chunks,
                               chunks * ((k + panel - 1) / panel),
                               {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]}, &next, pack + t * words};
    int started = 1;        /* a thread that cannot be had leaves its share to the others */
    while (started < threads && !pthread_create(&ids[started], 0, work, &jobs[started]))
        started++;
    work(&jobs[0]);
    for (int t = 1; t < started; t++)
        pthread_join(ids[t], 0);
    free(pack);
    return 0;
}

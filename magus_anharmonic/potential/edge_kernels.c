/* The main blocks of M3GNet over all edges, forward and backward: matrix products and all that lies between them, in blocks of
 * edges that stay in a core's own cache.
 *
 * Single precision, row-major. Symbols as in layers.py, which computes the same with torch: u units, E edges of which the first
 * `near` are within the three-body cutoff, N atoms. What the backward pass needs of an edge are derivatives, not sums before a
 * nonlinearity, so that it takes no exponential. The edges are cut into pieces whose number depends on E alone; threads share the
 * pieces, and what they add to the atoms is joined in the order of the pieces, so that no result depends on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* Columns of a packed matrix lie in panels of 16: [panel][row][16]. */
#define PANEL 16
#if defined(__AVX512F__)
#define LANES 16
#define TILE 12
#elif defined(__AVX__)
#define LANES 8
#define TILE 6
#else
#define LANES 4
#define TILE 3
#endif
#define VECTORS (PANEL / LANES)
/* Rows of a block, a multiple of all tiles. */
#define ROWS 48
#define LEAST_PIECE 8192
#define MOST_PIECES 16

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(array) (*(vector *)(array))
#define GET(array) (*(const vector *)(array))
#define ALL(c) for (long c = 0; c < u; c += LANES)

struct network { /* of [v_i, v_j, e_ij], both branches side by side; packed */
    const float *bond, *bond_back, *second, *second_bias, *second_back;
    const float *beside; /* the layer on e0, transposed: (4, u) */
};
struct layer {
    const float *three, *three_back;
    struct network edge, atom;
};
struct graph {
    long units, n_edges, near, n_atoms;
    const int64_t *centre, *neighbour;
    const float *basis, *threebody; /* e0 (E, 4), B (near, 16) */
};
struct scratch {
    float *hidden, *y, *product;
};

/* c = a b (+ bias) or c += a b of `rows` rows; b is one panel. */
static inline __attribute__((always_inline)) void tile(const int rows, long inner, const float *a, long stride, const float *b,
                                                       const float *bias, int add, float *c, long width)
{
    vector sum[TILE][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = add    ? *(const vector *)(c + r * width + v * LANES)
                        : bias ? *(const vector *)(bias + v * LANES)
                               : (vector){0};
    for (long k = 0; k < inner; k++) {
        vector row[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) row[v] = *(const vector *)(b + k * PANEL + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] += a[r * stride + k] * row[v];
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) *(vector *)(c + r * width + v * LANES) = sum[r][v];
}

/* c (rows, columns) = a (rows, inner) b (+ bias), or c += a b. */
static void product(long rows, long inner, long columns, const float *a, long stride, const float *b, const float *bias, int add,
                    float *c, long width)
{
    for (long n = 0; n < columns; n += PANEL, b += PANEL * inner) {
        const float *shift = bias ? bias + n : 0;
        long r = 0;
        for (; r + TILE <= rows; r += TILE) tile(TILE, inner, a + r * stride, stride, b, shift, add, c + r * width + n, width);
        for (; r < rows; r++) tile(1, inner, a + r * stride, stride, b, shift, add, c + r * width + n, width);
    }
}

/* x between -40 and 40, or NaN. Beyond, nothing is left of a sigmoid's difference from 0 or 1; within, the product of two stays
 * finite. */
static inline vector clamped(vector x)
{
    const vector high = (vector){0} + 40.0f, low = -high;
#if defined(__AVX512F__)
    return (vector)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)x));
#elif defined(__AVX__)
    return (vector)_mm256_max_ps((__m256)low, _mm256_min_ps((__m256)high, (__m256)x));
#else
    integers above = x > high, below = x < low;
    return (vector)((above & (integers)high) | (below & (integers)low) | (~(above | below) & (integers)x));
#endif
}

/* 1 + exp(-x), to about one unit in the last place: 2^n times a polynomial for 2^f, |f| <= 1/2. */
static inline vector denominator(vector x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: a sum with it is rounded to a whole number, in its lowest bits */
    x = clamped(x);
    vector whole = x * -1.44269502162933350f + shift;
    vector f = x * -1.44269502162933350f - (whole - shift) - x * 1.9259629911e-8f, f2 = f * f;
    vector y = (0.00132764713f * f + 0.00967554096f) * f2 + (0.0555071309f * f + 0.240221202f);
    y = y * f2 + (0.693146944f * f + 1.0f);
    return 1.0f + (vector)((integers)y + ((integers)whole << 23));
}

/* Numbers that an edge keeps for the backward pass, in the order edge network, atom network, three-body network: slope of the
 * first layer (2 u); derivatives of the output by inner and gate of the second (u each) and by the layer on e0 (u). */
static inline long kept_of(const struct graph *g, long row)
{
    return row < g->near ? 12 * g->units * row : 12 * g->units * g->near + 10 * g->units * (row - g->near);
}

/* hidden = silu(hidden + own[centre] + other[neighbour]) */
static void first_forward(long rows, long width, const int64_t *centre, const int64_t *neighbour, const float *own,
                          const float *other, float *hidden, float *kept, long step)
{
    for (long r = 0; r < rows; r++) {
        const float *a = own + centre[r] * width, *b = other + neighbour[r] * width;
        float *h = hidden + r * width, *slope = kept + r * step;
        for (long c = 0; c < width; c += LANES) {
            vector x = GET(h + c) + GET(a + c) + GET(b + c), s = 1.0f / denominator(x), active = x * s;
            AT(h + c) = active;
            AT(slope + c) = s + active * (1.0f - s);
        }
    }
}

/* silu(inner) sigmoid(gate) as `both`, and its derivatives. */
#define GATED(inner_array, gate_array) \
    vector inner = GET(inner_array), gate = GET(gate_array), di = denominator(inner), dg = denominator(gate); \
    vector reciprocal = 1.0f / (di * dg), si = reciprocal * dg, sg = reciprocal * di, active = inner * si, both = active * sg; \
    vector by_inner = sg * (si + active * (1.0f - si)), by_gate = both * (1.0f - sg)
#define RAW (s[0] * GET(w0 + c) + s[1] * GET(w1 + c) + s[2] * GET(w2 + c) + s[3] * GET(w3 + c))
#define BESIDE const float *w0 = beside, *w1 = beside + u, *w2 = beside + 2 * u, *w3 = beside + 3 * u

static void edge_forward(long rows, long u, const float *basis, const float *beside, const float *y, float *edge, float *kept,
                         long step)
{
    BESIDE;
    for (long r = 0; r < rows; r++) {
        const float *s = basis + 4 * r, *in = y + 2 * u * r, *out = in + u;
        float *e = edge + u * r, *k = kept + r * step;
        ALL(c) {
            vector weight = RAW;
            GATED(in + c, out + c);
            AT(e + c) += weight * both;
            AT(k + c) = weight * by_inner;
            AT(k + u + c) = weight * by_gate;
            AT(k + 2 * u + c) = both;
        }
    }
}

/* Over a hundred nearly equal messages reach an atom: their sum in single precision would lose a digit or two. */
static void atom_forward(long rows, long u, const float *basis, const float *beside, const float *y, const int64_t *centre,
                         double *atom, float *kept, long step)
{
    BESIDE;
    for (long r = 0; r < rows; r++) {
        const float *s = basis + 4 * r, *in = y + 2 * u * r, *out = in + u;
        float *k = kept + r * step;
        double *v = atom + u * centre[r];
        ALL(c) {
            vector raw = RAW, sr = 1.0f / denominator(raw), weight = raw * sr;
            GATED(in + c, out + c);
            vector message = weight * both;
            for (int lane = 0; lane < LANES; lane++) v[c + lane] += message[lane];
            AT(k + c) = weight * by_inner;
            AT(k + u + c) = weight * by_gate;
            AT(k + 2 * u + c) = both * (sr + weight * (1.0f - sr));
        }
    }
}

static void three_forward(long rows, long u, const float *y, float *edge, float *kept, long step)
{
    for (long r = 0; r < rows; r++) {
        const float *in = y + 2 * u * r, *out = in + u;
        float *e = edge + u * r, *k = kept + r * step;
        ALL(c) {
            GATED(in + c, out + c);
            AT(e + c) += both;
            AT(k + c) = by_inner;
            AT(k + u + c) = by_gate;
        }
    }
}

static inline float sum_of(vector x)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) x[lane] += x[lane + half];
    return x[0];
}

#define NO_SUMS vector sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0}
#define SUM_BESIDE(by) \
    sum0 += (by) * GET(w0 + c); \
    sum1 += (by) * GET(w1 + c); \
    sum2 += (by) * GET(w2 + c); \
    sum3 += (by) * GET(w3 + c)
#define ADD_SUMS(target) \
    (target)[0] += sum_of(sum0); \
    (target)[1] += sum_of(sum1); \
    (target)[2] += sum_of(sum2); \
    (target)[3] += sum_of(sum3)

/* by_y from the gradient by the output: row r, or row index[r]; by_basis grows. */
static void second_backward(long rows, long u, const float *kept, long step, const float *beside, const float *gradient,
                            const int64_t *index, float *by_y, float *by_basis)
{
    BESIDE;
    for (long r = 0; r < rows; r++) {
        const float *k = kept + r * step, *g = gradient + u * (index ? index[r] : r);
        float *in = by_y + 2 * u * r, *out = in + u;
        NO_SUMS;
        ALL(c) {
            vector by = GET(g + c), by_raw = by * GET(k + 2 * u + c);
            AT(in + c) = by * GET(k + c);
            AT(out + c) = by * GET(k + u + c);
            SUM_BESIDE(by_raw);
        }
        ADD_SUMS(by_basis + 4 * r);
    }
}

static void first_backward(long rows, long width, const int64_t *centre, const int64_t *neighbour, const float *kept, long step,
                           float *by_hidden, float *own, float *other)
{
    for (long r = 0; r < rows; r++) {
        const float *slope = kept + r * step;
        float *g = by_hidden + r * width;
        for (long c = 0; c < width; c += LANES) AT(g + c) *= GET(slope + c);
        if (!own) continue;
        float *a = own + centre[r] * width, *b = other + neighbour[r] * width;
        for (long c = 0; c < width; c += LANES) AT(a + c) += GET(g + c);
        for (long c = 0; c < width; c += LANES) AT(b + c) += GET(g + c);
    }
}

/* One gated network up to the sums of its second layer, which are left in y. */
static void network_forward(const struct graph *g, const struct network *w, const float *tables, long start, long rows,
                            const float *edge, float *kept, long step, struct scratch s)
{
    long u = g->units, width = 2 * u;
    product(rows, u, width, edge + u * start, u, w->bond, 0, 0, s.hidden, width);
    first_forward(rows, width, g->centre + start, g->neighbour + start, tables, tables + g->n_atoms * width, s.hidden, kept, step);
    for (long half = 0; half < width; half += u)
        product(rows, u, u, s.hidden + half, width, w->second + half * u, w->second_bias + half, 0, s.y + half, width);
}

static void network_backward(const struct graph *g, const struct network *w, const float *kept, long step, long start, long rows,
                             const float *gradient, const int64_t *index, float *by_edge, float *by_basis, float *by_tables,
                             struct scratch s)
{
    long u = g->units, width = 2 * u;
    second_backward(rows, u, kept + width, step, w->beside, gradient, index, s.y, by_basis + 4 * start);
    for (long half = 0; half < width; half += u)
        product(rows, u, u, s.y + half, width, w->second_back + half * u, 0, 0, s.hidden + half, width);
    first_backward(rows, width, g->centre + start, g->neighbour + start, kept, step, s.hidden, by_tables,
                   by_tables ? by_tables + g->n_atoms * width : 0);
    product(rows, width, u, s.hidden, width, w->bond_back, 0, 1, by_edge + u * start, u);
}

struct pass { /* what a whole pass reads and writes, besides sums over the edges of an atom */
    const float *gates;  /* (N, 16) */
    const float *tables; /* (2, 2, N, 2 u): edge and atom network, v_i as centre and as neighbour; forward */
    const float *by_atom; /* (N, u); backward */
    float *edge;          /* (E, u), or its gradient */
    float *kept, *by_basis, *by_threebody;
};

static void block_forward(const struct graph *g, const struct layer *w, const struct pass *p, long start, long rows, double *atom,
                          struct scratch s)
{
    long u = g->units, step = (start < g->near ? 12 : 10) * u, network = 4 * g->n_atoms * u;
    float *e = p->edge + u * start, *kept = p->kept + kept_of(g, start);
    const float *basis = g->basis + 4 * start;
    if (start < g->near) {
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < 16; c++)
                s.product[16 * r + c] = p->gates[16 * g->centre[start + r] + c] * g->threebody[16 * (start + r) + c];
        product(rows, 16, 2 * u, s.product, 16, w->three, 0, 0, s.y, 2 * u);
        three_forward(rows, u, s.y, e, kept + 10 * u, step);
    }
    network_forward(g, &w->edge, p->tables, start, rows, p->edge, kept, step, s);
    edge_forward(rows, u, basis, w->edge.beside, s.y, e, kept + 2 * u, step);
    network_forward(g, &w->atom, p->tables + network, start, rows, p->edge, kept + 5 * u, step, s);
    atom_forward(rows, u, basis, w->atom.beside, s.y, g->centre + start, atom, kept + 7 * u, step);
}

/* sums: gradients by the gates (N, 16), then by the tables; null where v is constant. */
static void block_backward(const struct graph *g, const struct layer *w, const struct pass *p, long start, long rows, float *sums,
                           struct scratch s)
{
    long u = g->units, step = (start < g->near ? 12 : 10) * u, network = 4 * g->n_atoms * u;
    float *e = p->edge + u * start, *by_tables = sums ? sums + 16 * g->n_atoms : 0;
    const float *kept = p->kept + kept_of(g, start);
    network_backward(g, &w->atom, kept + 5 * u, step, start, rows, p->by_atom, g->centre + start, p->edge, p->by_basis,
                     by_tables ? by_tables + network : 0, s);
    network_backward(g, &w->edge, kept, step, start, rows, e, 0, p->edge, p->by_basis, by_tables, s);
    if (start >= g->near) return;
    for (long r = 0; r < rows; r++) {
        const float *k = kept + 10 * u + r * step;
        float *in = s.y + 2 * u * r, *out = in + u;
#pragma omp simd
        for (long c = 0; c < u; c++) {
            in[c] = e[u * r + c] * k[c];
            out[c] = e[u * r + c] * k[u + c];
        }
    }
    product(rows, 2 * u, 16, s.y, 2 * u, w->three_back, 0, 0, s.product, 16);
    for (long r = 0; r < rows; r++) {
        long i = g->centre[start + r];
        for (long c = 0; c < 16; c++) {
            p->by_threebody[16 * (start + r) + c] += s.product[16 * r + c] * p->gates[16 * i + c];
            if (sums) sums[16 * i + c] += s.product[16 * r + c] * g->threebody[16 * (start + r) + c];
        }
    }
}

/* All blocks of edges first to last - 1. */
static void piece(const struct graph *g, const struct layer *w, const struct pass *p, long first, long last, double *atom,
                  float *sums, struct scratch s)
{
    while (first < last) {
        long end = first < g->near && g->near < last ? g->near : last;
        long rows = end - first < ROWS ? end - first : ROWS;
        if (atom)
            block_forward(g, w, p, first, rows, atom, s);
        else
            block_backward(g, w, p, first, rows, sums, s);
        first += rows;
    }
}

/* Forward where `atom` is given: its messages are added to atom (N, u); else backward, to sums (N, 16 + 8 u), zero before, or null.
 * Not 0 when memory ran out. */
int layer_pass(const struct graph *g, const struct layer *w, const struct pass *p, double *atom, float *sums, long threads)
{
    long size = (g->n_edges + MOST_PIECES - 1) / MOST_PIECES;
    size = size < LEAST_PIECE ? LEAST_PIECE : size;
    long pieces = (g->n_edges + size - 1) / size;
    long length = atom ? g->n_atoms * g->units : sums ? g->n_atoms * (16 + 8 * g->units) : 0, bytes = length * (atom ? sizeof(double) : sizeof(float));
    threads = threads > pieces ? pieces : threads;
    long block = ROWS * (4 * g->units + 16);
    char *own = pieces > 1 ? malloc(threads * bytes + 1) : 0;
    float *memory = pieces ? malloc(threads * block * sizeof(float)) : 0;
    int failed = pieces && (!memory || (pieces > 1 && !own));
    for (long wave = 0; wave < pieces && !failed; wave += threads) {
        long count = pieces - wave < threads ? pieces - wave : threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(count) if (count > 1)
#endif
        for (long t = 0; t < count; t++) {
            float *base = memory + t * block;
            struct scratch s = {base, base + 2 * ROWS * g->units, base + 4 * ROWS * g->units};
            char *target = pieces > 1 ? own + t * bytes : (char *)(atom ? (void *)atom : (void *)sums);
            long first = (wave + t) * size, last = first + size < g->n_edges ? first + size : g->n_edges;
            if (pieces > 1) memset(target, 0, bytes);
            piece(g, w, p, first, last, atom ? (double *)target : 0, sums ? (float *)target : 0, s);
        }
        for (long t = 0; pieces > 1 && t < count; t++)
            for (long c = 0; c < length; c++) {
                if (atom)
                    atom[c] += ((double *)(own + t * bytes))[c];
                else
                    sums[c] += ((float *)(own + t * bytes))[c];
            }
    }
    free(own);
    free(memory);
    return failed;
}

#ifdef _OPENMP
#define SHARED _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
#else
#define SHARED
#endif

/* First edge features, silu(e0 @ beside). */
void encode(const struct graph *g, const float *beside, float *edge, long threads)
{
    long u = g->units;
    BESIDE;
    SHARED
    for (long r = 0; r < g->n_edges; r++) {
        const float *s = g->basis + 4 * r;
        float *e = edge + u * r;
        ALL(c) {
            vector raw = RAW;
            AT(e + c) = raw / denominator(raw);
        }
    }
}

/* by_basis (E, 4) grows by the gradient through the first edge features. */
void encode_backward(const struct graph *g, const float *beside, const float *gradient, float *by_basis, long threads)
{
    long u = g->units;
    BESIDE;
    SHARED
    for (long r = 0; r < g->n_edges; r++) {
        const float *s = g->basis + 4 * r, *by = gradient + u * r;
        NO_SUMS;
        ALL(c) {
            vector raw = RAW, sigmoid = 1.0f / denominator(raw);
            vector by_raw = GET(by + c) * sigmoid * (1.0f + raw * (1.0f - sigmoid));
            SUM_BESIDE(by_raw);
        }
        ADD_SUMS(by_basis + 4 * r);
    }
}

/* The elementwise parts of M3GNet's gated edge networks between two matrix products, each as one pass over a block of edges.
 *
 * Single precision, row-major, contiguous. Symbols as in edge_kernels.py, whose torch functions of the same names compute the
 * same. Threads share rows, or columns where rows are summed into atoms, so that no two of them write to one place and the
 * result does not depend on their number.
 */
#include <math.h>
#include <stdint.h>

#ifdef _OPENMP
#define SHARED _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
#else
#define SHARED
#endif

/* 1 + exp(-x) after Cephes (expf), to about one unit in the last place; comparisons let NaN through. Beyond 40 nothing is left
 * of a sigmoid's difference from 0 or 1, and within, the product of two stays finite. */
static inline float denominator(float x)
{
    x = -x;
    x = x > 40.0f ? 40.0f : x;
    x = x < -40.0f ? -40.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    union { int32_t i; float f; } power;
    power.i = ((int32_t)n + 127) << 23;
    return 1.0f + y * power.f;
}

/* Columns of thread t of all: whole multiples of 16. */
static inline long bound(long width, long t, long threads)
{
    long size = ((width + threads - 1) / threads + 15) / 16 * 16;
    return t * size < width ? t * size : width;
}

void first_forward(long rows, long width, const int64_t *centre, const int64_t *neighbour, const float *own, const float *other,
                   float *before, float *hidden, long threads)
{
    SHARED
    for (long r = 0; r < rows; r++) {
        const float *a = own + centre[r] * width, *b = other + neighbour[r] * width;
        float *x = before + r * width, *h = hidden + r * width;
#pragma omp simd
        for (long c = 0; c < width; c++) {
            float value = x[c] + a[c] + b[c];
            x[c] = value;
            h[c] = value / denominator(value);
        }
    }
}

/* beside holds the weights of the layer on e0, transposed: (4, u). */
#define RAW (s[0] * w0[c] + s[1] * w1[c] + s[2] * w2[c] + s[3] * w3[c])
#define BESIDE const float *w0 = beside, *w1 = beside + u, *w2 = beside + 2 * u, *w3 = beside + 3 * u

void edge_forward(long rows, long u, const float *basis, const float *beside, const float *y, float *edge, long threads)
{
    BESIDE;
    SHARED
    for (long r = 0; r < rows; r++) {
        const float *s = basis + 4 * r, *inner = y + 2 * u * r, *gate = inner + u;
        float *e = edge + u * r;
#pragma omp simd
        for (long c = 0; c < u; c++) e[c] += RAW * inner[c] / (denominator(inner[c]) * denominator(gate[c]));
    }
}

void atom_forward(long rows, long u, const float *basis, const float *beside, const float *y, const int64_t *centre, double *atom,
                  long threads)
{
    BESIDE;
    SHARED
    for (long t = 0; t < threads; t++) {
        long first = bound(u, t, threads), last = bound(u, t + 1, threads);
        for (long r = 0; r < rows; r++) {
            const float *s = basis + 4 * r, *inner = y + 2 * u * r, *gate = inner + u;
            double *v = atom + u * centre[r];
#pragma omp simd
            for (long c = first; c < last; c++) {
                float raw = RAW;
                v[c] += raw / denominator(raw) * (inner[c] / (denominator(inner[c]) * denominator(gate[c])));
            }
        }
    }
}

/* The gradient of row r is gradient[index[r]], or gradient[r] without an index. */
#define BACKWARD(...) \
    BESIDE; \
    SHARED \
    for (long r = 0; r < rows; r++) { \
        const float *s = basis + 4 * r, *inner = y + 2 * u * r, *gate = inner + u; \
        const float *g = gradient + u * (index ? index[r] : r); \
        float *by_inner = by_y + 2 * u * r, *by_gate = by_inner + u, *target = by_basis + 4 * r; \
        float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0; \
        _Pragma("omp simd reduction(+ : sum0, sum1, sum2, sum3)") for (long c = 0; c < u; c++) \
        { \
            float raw = RAW, di = denominator(inner[c]), dg = denominator(gate[c]), product = 1.0f / (di * dg); \
            float si = product * dg, sg = product * di, active = inner[c] * si; \
            float both = g[c] * sg, by_raw = both * active; \
            __VA_ARGS__ \
            float weighted = both * weight; \
            by_inner[c] = weighted * (si + active * (1.0f - si)); \
            by_gate[c] = weighted * active * (1.0f - sg); \
            by_raw *= slope; \
            sum0 += by_raw * w0[c]; \
            sum1 += by_raw * w1[c]; \
            sum2 += by_raw * w2[c]; \
            sum3 += by_raw * w3[c]; \
        } \
        target[0] += sum0; \
        target[1] += sum1; \
        target[2] += sum2; \
        target[3] += sum3; \
    }

void edge_backward(long rows, long u, const float *basis, const float *beside, const float *y, const float *gradient,
                   const int64_t *index, float *by_y, float *by_basis, long threads)
{
    BACKWARD(float weight = raw, slope = 1.0f;)
}

void atom_backward(long rows, long u, const float *basis, const float *beside, const float *y, const float *gradient,
                   const int64_t *index, float *by_y, float *by_basis, long threads)
{
    BACKWARD(float sr = 1.0f / denominator(raw), weight = raw * sr, slope = sr + weight * (1.0f - sr);)
}

void first_backward(long rows, long width, const int64_t *centre, const int64_t *neighbour, const float *before, float *by_hidden,
                    float *own, float *other, long threads)
{
    SHARED
    for (long t = 0; t < threads; t++) {
        long first = bound(width, t, threads), last = bound(width, t + 1, threads);
        for (long r = 0; r < rows; r++) {
            const float *x = before + r * width;
            float *g = by_hidden + r * width, *a = own + centre[r] * width, *b = other + neighbour[r] * width;
#pragma omp simd
            for (long c = first; c < last; c++) {
                float s = 1.0f / denominator(x[c]);
                float value = g[c] * s * (1.0f + x[c] * (1.0f - s));
                g[c] = value;
                a[c] += value;
            }
#pragma omp simd
            for (long c = first; c < last; c++) b[c] += g[c];
        }
    }
}

void three_forward(long rows, long u, const float *y, float *edge, long threads)
{
    SHARED
    for (long r = 0; r < rows; r++) {
        const float *inner = y + 2 * u * r, *gate = inner + u;
        float *e = edge + u * r;
#pragma omp simd
        for (long c = 0; c < u; c++) e[c] += inner[c] / (denominator(inner[c]) * denominator(gate[c]));
    }
}

void three_backward(long rows, long u, const float *y, const float *by_edge, float *by_y, long threads)
{
    SHARED
    for (long r = 0; r < rows; r++) {
        const float *inner = y + 2 * u * r, *gate = inner + u, *g = by_edge + u * r;
        float *by_inner = by_y + 2 * u * r, *by_gate = by_inner + u;
#pragma omp simd
        for (long c = 0; c < u; c++) {
            float di = denominator(inner[c]), dg = denominator(gate[c]), product = 1.0f / (di * dg);
            float si = product * dg, sg = product * di, active = inner[c] * si, both = g[c] * sg;
            by_inner[c] = both * (si + active * (1.0f - si));
            by_gate[c] = both * active * (1.0f - sg);
        }
    }
}

/* The functions of the edges on which M3GNet is built, and their gradient: edge vectors -> e0 (E, 4) and B (near, 16), and back to
 * forces and virial. Double precision, because the closed forms of R_ln cancel at small r. Symbols as in edge_basis.py.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#define SHARED _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
#else
#define SHARED
#endif

struct functions { /* of a model */
    double cutoff, factor, near_cutoff; /* of R_ln, R_ln's prefactor, of the three-body sum */
    const double *roots, *sine, *cosine; /* (16,), (4, 16), (4, 16): R_ln = factor sum_p x^-p (sine sin(z x) + cosine cos(z x)) */
    const double *waves, *smooth;        /* (5,), (4, 5): e0_n = sum_k smooth_nk sin(w_k r) / (w_k r) */
};
struct bonds {
    long n_edges, near, n_atoms, threads;
    const int64_t *centre, *neighbour, *structure;
    const float *vector;
};
/* What the way back needs: of every edge the slopes of e0 (4); of a near one R_ln and its slope (32); of an atom A (64), with n
 * fastest. */
struct kept {
    double *smooth, *radial, *density;
};

static const int ORDER[16] = {0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3}; /* l of Y_lm */
static const double NORMAL[4] = {0.28209479177387814, 0.4886025119029199, 0.6307831305050401, 0.7463526651802308};
#define C1 0.4886025119029199
#define C2 1.0925484305920792
#define C3 0.31539156525252005
#define C4 0.5900435899266435
#define C5 2.890611442640554
#define C6 0.4570457994644658
#define C7 0.3731763325901154

/* To the last digit for |x| far below 1e5; kernels after Cephes. */
static inline void sine_cosine(double x, double *s, double *c)
{
    double k = rint(x * 0.63661977236758134308), half = floor(0.5 * k), odd = k - 2 * half;
    double sign = 1 - 2 * (half - 2 * floor(0.5 * half));
    double r = x - k * 1.57079632673412561417e+00 - k * 6.07710050650619224932e-11, z = r * r;
    double a = 1.58962301576546568060e-10;
    a = a * z - 2.50507477628578072866e-8;
    a = a * z + 2.75573136213857245213e-6;
    a = a * z - 1.98412698295895385996e-4;
    a = a * z + 8.33333333332211858878e-3;
    a = a * z - 1.66666666666666307295e-1;
    a = r + r * z * a;
    double b = -1.13585365213876817300e-11;
    b = b * z + 2.08757008419747316778e-9;
    b = b * z - 2.75573141792967388112e-7;
    b = b * z + 2.48015872888517045348e-5;
    b = b * z - 1.38888888888730564116e-3;
    b = b * z + 4.16666666666665929218e-2;
    b = 1 - 0.5 * z + z * z * b;
    *s = sign * (odd != 0 ? b : a);
    *c = sign * (odd != 0 ? -a : b);
}

static inline double length_of(const float *v, double *unit)
{
    double x = v[0], y = v[1], z = v[2], r = sqrt(x * x + y * y + z * z);
    unit[0] = x / r;
    unit[1] = y / r;
    unit[2] = z / r;
    return r;
}

static void smooth_basis(const struct functions *f, double r, float *e0, double *slope)
{
    double value[5], by_r[5];
    for (int k = 0; k < 5; k++) {
        double x = f->waves[k] * r, s, c;
        sine_cosine(x, &s, &c);
        value[k] = s / x;
        by_r[k] = (c - s / x) / r;
    }
    for (int n = 0; n < 4; n++) {
        double sum = 0, change = 0;
        for (int k = 0; k < 5; k++) {
            sum += f->smooth[5 * n + k] * value[k];
            change += f->smooth[5 * n + k] * by_r[k];
        }
        e0[n] = sum;
        slope[n] = change;
    }
}

static void radial_basis(const struct functions *f, double r, double *restrict radial)
{
    double inverse = f->cutoff / r, i2 = inverse * inverse, i3 = i2 * inverse, i4 = i2 * i2, scale = f->factor / f->cutoff;
    const double *a = f->sine, *b = f->cosine;
#pragma omp simd
    for (int c = 0; c < 16; c++) {
        double si, co, x = r / f->cutoff;
        sine_cosine(x * f->roots[c], &si, &co);
        double sine = a[c] * inverse + a[16 + c] * i2 + a[32 + c] * i3 + a[48 + c] * i4;
        double cosine = b[c] * inverse + b[16 + c] * i2 + b[32 + c] * i3 + b[48 + c] * i4;
        double by_sine = -inverse * (a[c] * inverse + 2 * a[16 + c] * i2 + 3 * a[32 + c] * i3 + 4 * a[48 + c] * i4);
        double by_cosine = -inverse * (b[c] * inverse + 2 * b[16 + c] * i2 + 3 * b[32 + c] * i3 + 4 * b[48 + c] * i4);
        radial[c] = f->factor * (sine * si + cosine * co);
        radial[16 + c] = scale * ((by_sine - cosine * f->roots[c]) * si + (by_cosine + sine * f->roots[c]) * co);
    }
}

/* f(r) and its slope */
static inline double cut(const struct functions *f, double r, double *slope)
{
    double x = r / f->near_cutoff;
    if (x >= 1) {
        *slope = 0;
        return 0;
    }
    *slope = -30 * x * x * (1 - x) * (1 - x) / f->near_cutoff;
    return 1 - x * x * x * (10 - x * (15 - 6 * x));
}

static void harmonics(const double *unit, double *y)
{
    double x = unit[0], v = unit[1], z = unit[2], xx = x * x, vv = v * v, zz = z * z;
    y[0] = NORMAL[0];
    y[1] = C1 * v;
    y[2] = C1 * z;
    y[3] = C1 * x;
    y[4] = C2 * x * v;
    y[5] = C2 * v * z;
    y[6] = C3 * (2 * zz - xx - vv);
    y[7] = C2 * x * z;
    y[8] = 0.5 * C2 * (xx - vv);
    y[9] = C4 * v * (3 * xx - vv);
    y[10] = C5 * x * v * z;
    y[11] = C6 * v * (4 * zz - xx - vv);
    y[12] = C7 * z * (2 * zz - 3 * xx - 3 * vv);
    y[13] = C6 * x * (4 * zz - xx - vv);
    y[14] = 0.5 * C5 * z * (xx - vv);
    y[15] = C4 * x * (xx - 3 * vv);
}

/* Gradient by the unit vector from that by Y_lm. */
static void harmonics_backward(const double *unit, const double *b, double *by)
{
    double x = unit[0], y = unit[1], z = unit[2], xx = x * x, yy = y * y, zz = z * z;
    by[0] = C1 * b[3] + C2 * (y * b[4] + z * b[7] + x * b[8]) - 2 * C3 * x * b[6] + C4 * (6 * x * y * b[9] + 3 * (xx - yy) * b[15]) +
            C5 * (y * z * b[10] + x * z * b[14]) + C6 * ((4 * zz - 3 * xx - yy) * b[13] - 2 * x * y * b[11]) - 6 * C7 * x * z * b[12];
    by[1] = C1 * b[1] + C2 * (x * b[4] + z * b[5] - y * b[8]) - 2 * C3 * y * b[6] + C4 * (3 * (xx - yy) * b[9] - 6 * x * y * b[15]) +
            C5 * (x * z * b[10] - y * z * b[14]) + C6 * ((4 * zz - xx - 3 * yy) * b[11] - 2 * x * y * b[13]) - 6 * C7 * y * z * b[12];
    by[2] = C1 * b[2] + C2 * (y * b[5] + x * b[7]) + 4 * C3 * z * b[6] + C5 * (x * y * b[10] + 0.5 * (xx - yy) * b[14]) +
            8 * C6 * z * (y * b[11] + x * b[13]) + C7 * (6 * zz - 3 * xx - 3 * yy) * b[12];
}

/* e0 (E, 4) and B (near, 16). */
void basis_forward(const struct bonds *g, const struct functions *f, const struct kept *k, float *e0, float *threebody)
{
    long threads = g->threads;
    SHARED
    for (long e = 0; e < g->n_edges; e++) {
        double unit[3], r = length_of(g->vector + 3 * e, unit);
        smooth_basis(f, r, e0 + 4 * e, k->smooth + 4 * e);
        if (e < g->near) radial_basis(f, r, k->radial + 32 * e);
    }
    memset(k->density, 0, 64 * g->n_atoms * sizeof(double));
    for (long e = 0; e < g->near; e++) {
        double unit[3], y[16], slope, r = length_of(g->vector + 3 * e, unit), weight = cut(f, r, &slope);
        double *density = k->density + 64 * g->centre[e], *radial = k->radial + 32 * e;
        harmonics(unit, y);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 4; n++) density[4 * m + n] += weight * radial[4 * ORDER[m] + n] * y[m];
    }
    SHARED
    for (long e = 0; e < g->near; e++) {
        double unit[3], y[16], sum[16] = {0}, slope, r = length_of(g->vector + 3 * e, unit), weight = cut(f, r, &slope);
        const double *density = k->density + 64 * g->centre[e], *radial = k->radial + 32 * e;
        harmonics(unit, y);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 4; n++) sum[4 * ORDER[m] + n] += y[m] * density[4 * m + n];
        for (int l = 0; l < 4; l++)
            for (int n = 4 * l; n < 4 * l + 4; n++)
                threebody[16 * e + n] = weight * (sum[n] / NORMAL[l] - NORMAL[l] * weight * radial[n]);
    }
}

/* Gradient by one edge vector, of which `by_r` is that by its length through e0; by_density is that by A of its centre. */
static void bond_backward(const struct functions *f, const double *radial, const double *density, const double *by_density,
                          const float *by_threebody, const double *unit, double r, double by_r, double *gradient)
{
    double y[16], by_y[16], slope, weight = cut(f, r, &slope), by_weight = 0, by_unit[3], sum[16] = {0}, by_scaled[16] = {0};
    harmonics(unit, y);
    for (int m = 0; m < 16; m++) {
        int l = 4 * ORDER[m];
        double change = 0, part = weight / NORMAL[ORDER[m]];
        for (int n = 0; n < 4; n++) {
            double own = density[4 * m + n], by_own = by_density[4 * m + n];
            sum[l + n] += y[m] * own;
            by_scaled[l + n] += y[m] * by_own;
            change += part * by_threebody[l + n] * own + weight * radial[l + n] * by_own;
        }
        by_y[m] = change;
    }
    for (int l = 0; l < 4; l++)
        for (int c = 4 * l; c < 4 * l + 4; c++) {
            double normal = NORMAL[l], by = by_scaled[c] - weight * normal * by_threebody[c];
            by_weight += by_threebody[c] * (sum[c] / normal - normal * weight * radial[c]) + by * radial[c];
            by_r += by * weight * radial[16 + c];
        }
    by_r += by_weight * slope;
    harmonics_backward(unit, by_y, by_unit);
    double along = by_unit[0] * unit[0] + by_unit[1] * unit[1] + by_unit[2] * unit[2];
    for (int c = 0; c < 3; c++) gradient[c] = by_r * unit[c] + (by_unit[c] - along * unit[c]) / r;
}

/* Forces (N, 3) and virial (n, 3, 3), both zero before, from the gradients by e0, B and, unless null, the lengths beyond the near
 * ones. Not 0 when memory ran out. */
int basis_backward(const struct bonds *g, const struct functions *f, const struct kept *k, const float *by_e0,
                   const float *by_threebody, const double *by_length, double *forces, double *virial)
{
    long threads = g->threads;
    double *by_density = calloc(64 * g->n_atoms + 1, sizeof(double)), *gradient = malloc((3 * g->n_edges + 1) * sizeof(double));
    int failed = !by_density || !gradient;
    for (long e = 0; e < g->near && !failed; e++) {
        double unit[3], y[16], slope, r = length_of(g->vector + 3 * e, unit), weight = cut(f, r, &slope);
        double *target = by_density + 64 * g->centre[e];
        harmonics(unit, y);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 4; n++)
                target[4 * m + n] += weight / NORMAL[ORDER[m]] * by_threebody[16 * e + 4 * ORDER[m] + n] * y[m];
    }
    SHARED
    for (long e = 0; e < (failed ? 0 : g->n_edges); e++) {
        double unit[3], r = length_of(g->vector + 3 * e, unit), by_r = 0;
        for (int n = 0; n < 4; n++) by_r += by_e0[4 * e + n] * k->smooth[4 * e + n];
        if (e < g->near)
            bond_backward(f, k->radial + 32 * e, k->density + 64 * g->centre[e], by_density + 64 * g->centre[e],
                          by_threebody + 16 * e, unit, r, by_r, gradient + 3 * e);
        else
            for (int c = 0; c < 3; c++) gradient[3 * e + c] = (by_r + (by_length ? by_length[e - g->near] : 0)) * unit[c];
    }
    for (long e = 0; e < (failed ? 0 : g->n_edges); e++)
        for (int c = 0; c < 3; c++) {
            double by = gradient[3 * e + c];
            forces[3 * g->centre[e] + c] += by;
            forces[3 * g->neighbour[e] + c] -= by;
            for (int a = 0; a < 3; a++) virial[9 * g->structure[e] + 3 * a + c] += g->vector[3 * e + a] * by;
        }
    free(by_density);
    free(gradient);
    return failed;
}

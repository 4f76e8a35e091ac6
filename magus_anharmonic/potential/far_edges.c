/* What the first block of M3GNet makes of the edges beyond the three-body cutoff: functions of two species and a length alone,
 * interpolated by polynomials of degree 5 in intervals. Symbols as in far_edges.py.
 */
#include <math.h>
#include <stdint.h>

#define POWERS 6
typedef float vector __attribute__((vector_size(16 * sizeof(float)), aligned(4), may_alias));
#define LANES 16
#define GET(array) (*(const vector *)(array))

struct far {
    long units, n_edges, intervals, species;
    double start, width;
    const int64_t *centre, *neighbour, *kind; /* of the edges; of the atoms: place among the species */
    const float *vector;
    const float *table; /* (species of the centre, of the neighbour, interval, power, 2 u): edge features, then message */
};

/* The coefficients for an edge, and where in the interval it is, -1 to 1. */
static const float *place(const struct far *f, long e, float *x)
{
    const float *v = f->vector + 3 * e;
    double r = sqrt((double)v[0] * v[0] + (double)v[1] * v[1] + (double)v[2] * v[2]), t = (r - f->start) / f->width;
    long interval = t <= 0 ? 0 : t >= f->intervals ? f->intervals - 1 : (long)t;
    long pair = f->kind[f->centre[e]] * f->species + f->kind[f->neighbour[e]];
    *x = (float)(2 * (t - interval) - 1);
    return f->table + (pair * f->intervals + interval) * POWERS * 2 * f->units;
}

/* Edge features (E, u); the messages are added to atom (N, u). */
void far_forward(const struct far *f, float *edge, double *atom)
{
    long u = f->units;
    for (long e = 0; e < f->n_edges; e++) {
        float x;
        const float *t = place(f, e, &x);
        double *target = atom + u * f->centre[e];
        for (long c = 0; c < 2 * u; c += LANES) {
            vector y = GET(t + (POWERS - 1) * 2 * u + c);
            for (long p = POWERS - 2; p >= 0; p--) y = y * x + GET(t + p * 2 * u + c);
            if (c < u)
                *(vector *)(edge + u * e + c) = y;
            else
                for (int lane = 0; lane < LANES; lane++) target[c - u + lane] += y[lane];
        }
    }
}

/* Gradient by the lengths (E,) from those by the edge features (E, u) and by the atoms (N, u). */
void far_backward(const struct far *f, const float *by_edge, const float *by_atom, double *by_length)
{
    long u = f->units;
    for (long e = 0; e < f->n_edges; e++) {
        float x;
        const float *t = place(f, e, &x);
        vector sum = {0};
        for (long c = 0; c < 2 * u; c += LANES) {
            vector y = (float)(POWERS - 1) * GET(t + (POWERS - 1) * 2 * u + c);
            for (long p = POWERS - 2; p > 0; p--) y = y * x + (float)p * GET(t + p * 2 * u + c);
            sum += y * (c < u ? GET(by_edge + u * e + c) : GET(by_atom + u * f->centre[e] + c - u));
        }
        double total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        by_length[e] = 2 / f->width * total;
    }
}

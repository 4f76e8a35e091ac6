/* The polynomial potential of polynomial.py: energies, forces and virials of many atoms, and what its coefficients multiply there.
 * One atom at a time, whose functions of its neighbours stay in a core's own cache; symbols as in polynomial.py. Double precision.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 8
#elif defined(__AVX__)
#define LANES 4
#else
#define LANES 2
#endif
#define M 20      /* monomials up to degree 3 */
#define DEGREES 4 /* 0 to 3 */
#define LAST 0.8  /* the last centre over the cutoff */
#define SHARP 0.5 /* exponent of a function at its neighbour's centre */

#ifdef _OPENMP
#define SHARED _Pragma("omp parallel for schedule(static) num_threads(g->threads) if (g->threads > 1)")
#else
#define SHARED
#endif

typedef double vector __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

struct shape {
    long species, radial; /* C = species * radial */
    double cutoff, first; /* first: centre of the first radial function */
};
struct pairs { /* of a reference with n_atoms; `first` (n_atoms + 1,): where those of a centre begin; of n configurations, as graph.py
                  has them, `strain` (n, 3, 3) and `moved` (n, n_atoms, 3): v = strain v_0 + moved_j - moved_i */
    long n, n_atoms, threads;
    const int64_t *first, *neighbour, *kind;
    const double *vector, *strain, *moved;
};
#define COINCIDENT 1e-3
/* Of one atom, its K neighbours by species, each species filled up to whole vectors: columns of arrays with rows of K. */
struct shell {
    long size, *edge;          /* number of columns, and the neighbour of one; -1 where it fills up */
    int coincident;            /* a neighbour closer than COINCIDENT */
    long *begin;               /* of the columns of a species */
    double *vector;            /* (K, 3) */
    double *unit, *length;     /* (3, K), (K,) */
    double *angular;           /* (M, K) */
    double *radial, *slope;    /* (radial, K), and its derivative */
    double *pull;              /* (3, K) */
    double *moments, *by;      /* (C, M): A, dE/dA */
    double *memory;
};

static const int PART[DEGREES + 1] = {0, 1, 4, 10, 20};
static const double MULTIPLICITY[M] = {1, 1, 1, 1, 1, 2, 2, 1, 2, 1, 1, 3, 3, 3, 6, 3, 1, 3, 3, 1};
/* A monomial is that of one degree less times the component of an axis. */
static const int LOWER[M] = {0, 0, 0, 0, 1, 2, 3, 2, 3, 3, 4, 5, 6, 7, 8, 9, 7, 8, 9, 9};
static const int AXIS[M] = {0, 0, 1, 2, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2};
/* By axis: monomial, its derivative's, and that one's factor. */
static const int SLOPES[3][10][3] = {
    {{1, 0, 1}, {4, 1, 2}, {5, 2, 1}, {6, 3, 1}, {10, 4, 3}, {11, 5, 2}, {12, 6, 2}, {13, 7, 1}, {14, 8, 1}, {15, 9, 1}},
    {{2, 0, 1}, {5, 1, 1}, {7, 2, 2}, {8, 3, 1}, {11, 4, 1}, {13, 5, 2}, {14, 6, 1}, {16, 7, 3}, {17, 8, 2}, {18, 9, 1}},
    {{3, 0, 1}, {6, 1, 1}, {8, 2, 1}, {9, 3, 2}, {12, 4, 1}, {14, 5, 1}, {15, 6, 2}, {17, 7, 1}, {18, 8, 2}, {19, 9, 3}},
};

static long most_neighbours(const struct pairs *g)
{
    long most = 0;
    for (long i = 0; i < g->n_atoms; i++)
        if (g->first[i + 1] - g->first[i] > most)
            most = g->first[i + 1] - g->first[i];
    return most;
}

/* Memory for the shells of all atoms of a batch; fails with a null `memory`. */
static struct shell room(const struct shape *p, const struct pairs *g)
{
    struct shell s = {0};
    long k = most_neighbours(g) + p->species * LANES + 1, width = p->species * p->radial;
    s.memory = malloc(sizeof(double) * (k * (3 + 3 + 1 + M + 2 * p->radial + 3) + 2 * width * M) + sizeof(long) * (k + p->species + 1));
    s.vector = s.memory, s.unit = s.vector + 3 * k, s.length = s.unit + 3 * k, s.angular = s.length + k, s.radial = s.angular + M * k;
    s.slope = s.radial + p->radial * k, s.pull = s.slope + p->radial * k;
    s.moments = s.pull + 3 * k, s.by = s.moments + width * M;
    s.edge = (long *)(s.by + width * M), s.begin = s.edge + k;
    return s;
}

/* R_n and Y_m of the neighbours of atom `i`, and A. */
static void fill(const struct shape *p, const struct pairs *g, long in, long i, struct shell *s)
{
    const double *strain = g->strain + 9 * in, *moved = g->moved + 3 * in * g->n_atoms, *mine = moved + 3 * i;
    double *v = s->vector;
    long k = 0;
    for (long one = 0; one < p->species; one++) {
        s->begin[one] = k;
        for (long e = g->first[i]; e < g->first[i + 1]; e++) {
            const long j = g->neighbour[e];
            if (g->kind[j] != one)
                continue;
            const double *from = g->vector + 3 * e, *other = moved + 3 * j;
            for (int axis = 0; axis < 3; axis++)
                v[3 * k + axis] = strain[3 * axis] * from[0] + strain[3 * axis + 1] * from[1] + strain[3 * axis + 2] * from[2] +
                                  other[axis] - mine[axis];
            s->length[k] = sqrt(v[3 * k] * v[3 * k] + v[3 * k + 1] * v[3 * k + 1] + v[3 * k + 2] * v[3 * k + 2]);
            s->coincident |= s->length[k] < COINCIDENT;
            s->edge[k] = j;
            k += s->length[k] <= p->cutoff;
        }
        for (; (k - s->begin[one]) % LANES; k++)
            s->edge[k] = -1, s->length[k] = 2 * p->cutoff;
    }
    s->begin[p->species] = s->size = k;
    const double first = sqrt(p->first), step = (sqrt(LAST * p->cutoff) - first) / (p->radial - 1), sharp = SHARP / (step * step);
    const double falling = exp(-2 * SHARP);
    double *x = s->unit, *y = x + k, *z = y + k;
    for (long c = 0; c < k; c++) {
        const double r = s->length[c];
        const int real = s->edge[c] >= 0;
        x[c] = real ? v[3 * c] / r : 1, y[c] = real ? v[3 * c + 1] / r : 0, z[c] = real ? v[3 * c + 2] / r : 0;
        double inside = 1 - (r / p->cutoff) * (r / p->cutoff);
        if (inside < 0)
            inside = 0;
        /* exp(-sharp (t - n step)^2) = exp(-sharp t^2) [exp(2 sharp step t)]^n exp(-SHARP n^2) */
        const double root = sqrt(r), t = root - first;
        double gauss = inside > 0 ? exp(-sharp * t * t) * inside : 0, ratio = inside > 0 ? exp(2 * SHARP * t / step - SHARP) : 0;
        for (long n = 0; n < p->radial; n++) {
            s->radial[n * k + c] = gauss * inside;
            s->slope[n * k + c] = gauss * (r * (-4 / (p->cutoff * p->cutoff)) - sharp * (t - n * step) / root * inside);
            gauss *= ratio, ratio *= falling;
        }
        s->angular[c] = 1;
    }
    for (int m = 1; m < M; m++)
        for (long c = 0; c < k; c++)
            s->angular[m * k + c] = s->angular[LOWER[m] * k + c] * s->unit[AXIS[m] * k + c];
    for (long one = 0; one < p->species; one++)
        for (long n = 0; n < p->radial; n++)
            for (int m = 0; m < M; m++) {
                vector sum = {0};
                double total = 0;
                for (long c = s->begin[one]; c < s->begin[one + 1]; c += LANES)
                    sum += *(const vector *)(s->angular + m * k + c) * *(const vector *)(s->radial + n * k + c);
                for (int lane = 0; lane < LANES; lane++)
                    total += sum[lane];
                s->moments[(one * p->radial + n) * M + m] = total;
            }
}

/* Energy of an atom, and dE/dA. */
static double energy_of(const struct shape *p, const double *linear, const double *quadratic, struct shell *s)
{
    const long width = p->species * p->radial;
    double energy = 0;
    for (long one = 0; one < width; one++) {
        double found[M] = {0};
        for (int l = 0; l < DEGREES; l++) {
            const double *row = quadratic + (l * width + one) * width;
            for (long other = 0; other < width; other++)
                for (int m = PART[l]; m < PART[l + 1]; m++)
                    found[m] += row[other] * s->moments[other * M + m];
        }
        const double *own = s->moments + one * M;
        for (int m = 0; m < M; m++) {
            found[m] *= MULTIPLICITY[m];
            energy += own[m] * found[m];
            s->by[one * M + m] = 2 * found[m];
        }
        energy += linear[one] * own[0];
        s->by[one * M] += linear[one];
    }
    return energy;
}

/* dE/d(vector) of the neighbours. */
static void pull_of(const struct shape *p, struct shell *s)
{
    const long k = s->size;
    for (long one = 0; one < p->species; one++)
        for (long c = s->begin[one]; c < s->begin[one + 1]; c += LANES) {
            vector angular[M], by_angular[M] = {{0}}, along = {0}, across[3] = {{0}}, unit[3];
            for (int m = 0; m < M; m++)
                angular[m] = *(const vector *)(s->angular + m * k + c);
            for (int axis = 0; axis < 3; axis++)
                unit[axis] = *(const vector *)(s->unit + axis * k + c);
            for (long n = 0; n < p->radial; n++) {
                const double *by = s->by + (one * p->radial + n) * M;
                const vector radial = *(const vector *)(s->radial + n * k + c);
                vector sum = {0};
                for (int m = 0; m < M; m++) {
                    by_angular[m] += by[m] * radial;
                    sum += by[m] * angular[m];
                }
                along += sum * *(const vector *)(s->slope + n * k + c);
            }
            for (int axis = 0; axis < 3; axis++) {
                for (int j = 0; j < 10; j++)
                    across[axis] += (double)SLOPES[axis][j][2] * by_angular[SLOPES[axis][j][0]] * angular[SLOPES[axis][j][1]];
                across[axis] /= *(const vector *)(s->length + c);
                along -= across[axis] * unit[axis];
            }
            for (int axis = 0; axis < 3; axis++)
                *(vector *)(s->pull + axis * k + c) = across[axis] + along * unit[axis];
        }
}

/* Adds to forces (N, 3) and virial (3, 3) of one structure; its energy. */
static double structure_of(const struct shape *p, const struct pairs *g, long in, const double *linear, const double *quadratic,
                           struct shell *s, double *forces, double *virial)
{
    const long width = p->species * p->radial;
    double energy = 0;
    for (long i = 0; i < g->n_atoms; i++) {
        const long at = g->kind[i];
        fill(p, g, in, i, s);
        energy += energy_of(p, linear + at * width, quadratic + at * DEGREES * width * width, s);
        pull_of(p, s);
        for (long c = 0; c < s->size; c++) {
            if (s->edge[c] < 0)
                continue;
            const double *v = s->vector + 3 * c;
            const long j = s->edge[c];
            for (int axis = 0; axis < 3; axis++) {
                const double pull = s->pull[axis * s->size + c];
                forces[3 * i + axis] += pull;
                forces[3 * j + axis] -= pull;
                for (int other = 0; other < 3; other++)
                    virial[3 * axis + other] += pull * v[other];
            }
        }
    }
    return energy;
}

/* energy (n,); adds to forces (n, N, 3) and virial (n, 3, 3); 2 where atoms coincide; linear (species, C), quadratic (species, 4, C, C). */
int polynomial_evaluate(const struct shape *p, const struct pairs *g, const double *linear, const double *quadratic, double *energy,
                        double *forces, double *virial)
{
    int failed = 0;
    SHARED
    for (long in = 0; in < g->n; in++) {
        struct shell s = room(p, g);
        if (s.memory)
            energy[in] = structure_of(p, g, in, linear, quadratic, &s, forces + 3 * in * g->n_atoms, virial + 9 * in);
        if (!s.memory || s.coincident)
            failed = s.memory ? 2 : 1;
        free(s.memory);
    }
    return failed;
}

/* For a neighbour (column c) and the `weights` (4 C + 1, of which the last is that of the linear terms), what the coefficients of
 * its species' radial functions multiply in dE/d(vector): found (3, radial, width). by (M, C): A times its multiplicity. */
static void columns(const struct shape *p, const struct shell *s, long c, const double *by, double *found)
{
    const long k = s->size, C = p->species * p->radial, width = DEGREES * C + 1;
    double own[width], turned[3][width], slopes[3][M] = {{0}}, along[M];
    for (int axis = 0; axis < 3; axis++)
        for (int j = 0; j < 10; j++)
            slopes[axis][SLOPES[axis][j][0]] += SLOPES[axis][j][2] * s->angular[SLOPES[axis][j][1] * k + c];
    for (int m = 0; m < M; m++) {
        along[m] = 0;
        for (int axis = 0; axis < 3; axis++)
            along[m] += slopes[axis][m] * s->unit[axis * k + c];
        for (int axis = 0; axis < 3; axis++)
            slopes[axis][m] = (slopes[axis][m] - s->unit[axis * k + c] * along[m]) / s->length[c];
    }
    memset(own, 0, sizeof own);
    memset(turned, 0, sizeof turned);
    for (int l = 0; l < DEGREES; l++)
        for (int m = PART[l]; m < PART[l + 1]; m++) {
            const double angular = s->angular[m * k + c], x = slopes[0][m], y = slopes[1][m], z = slopes[2][m];
            for (long q = 0; q < C; q++) {
                own[l * C + q] += angular * by[m * C + q];
                turned[0][l * C + q] += x * by[m * C + q];
                turned[1][l * C + q] += y * by[m * C + q];
                turned[2][l * C + q] += z * by[m * C + q];
            }
        }
    own[width - 1] = 1;
    for (int axis = 0; axis < 3; axis++)
        for (long n = 0; n < p->radial; n++) {
            const double radial = s->radial[n * k + c], slope = s->slope[n * k + c] * s->unit[axis * k + c];
            double *row = found + (axis * p->radial + n) * width;
            for (long q = 0; q < width; q++)
                row[q] = radial * turned[axis][q] + slope * own[q];
        }
}

/* Adds to energy (S, C, 4 C + 1), forces (N, 3, S, C, 4 C + 1) and the upper half of virial (3, 3, S, C, 4 C + 1) of one structure;
 * S species. `found` and `by`: room for `columns`. */
static void features_of(const struct shape *p, const struct pairs *g, long in, struct shell *s, double *found, double *by, double *energy,
                        double *forces, double *virial)
{
    const long C = p->species * p->radial, width = DEGREES * C + 1, block = C * width, whole = p->species * block;
    const long part = p->radial * width;
    for (long i = 0; i < g->n_atoms; i++) {
        const long at = g->kind[i] * block;
        fill(p, g, in, i, s);
        for (long q = 0; q < C; q++)
            for (int m = 0; m < M; m++)
                by[m * C + q] = MULTIPLICITY[m] * s->moments[q * M + m];
        for (long one = 0; one < C; one++) {
            double *row = energy + at + one * width;
            for (int l = 0; l < DEGREES; l++)
                for (int m = PART[l]; m < PART[l + 1]; m++)
                    for (long q = 0; q < C; q++)
                        row[l * C + q] += 0.5 * s->moments[one * M + m] * by[m * C + q];
            row[width - 1] += s->moments[one * M];
        }
        for (long one = 0; one < p->species; one++)
            for (long c = s->begin[one]; c < s->begin[one + 1] && s->edge[c] >= 0; c++) {
                const double *v = s->vector + 3 * c;
                columns(p, s, c, by, found);
                for (int axis = 0; axis < 3; axis++) {
                    const double *pull = found + axis * part;
                    double *mine = forces + (3 * i + axis) * whole + at + one * part;
                    double *other = forces + (3 * s->edge[c] + axis) * whole + at + one * part;
                    double *strain = virial + 3 * axis * whole + at + one * part;
                    for (long q = 0; q < part; q++) {
                        mine[q] += pull[q];
                        other[q] -= pull[q];
                    }
                    for (int second = axis; second < 3; second++)
                        for (long q = 0; q < part; q++)
                            strain[second * whole + q] += v[second] * pull[q];
                }
            }
    }
}

/* Adds to energy (n, S, C, 4 C + 1), forces (n, N, 3, S, C, 4 C + 1) and the upper half of virial (n, 3, 3, S, C, 4 C + 1). */
int polynomial_features(const struct shape *p, const struct pairs *g, double *energy, double *forces, double *virial)
{
    const long C = p->species * p->radial, width = DEGREES * C + 1, whole = p->species * C * width;
    int failed = 0;
    SHARED
    for (long in = 0; in < g->n; in++) {
        struct shell s = room(p, g);
        double *found = malloc(sizeof(double) * (3 * p->radial * width + M * C));
        if (s.memory && found)
            features_of(p, g, in, &s, found, found + 3 * p->radial * width, energy + in * whole, forces + 3 * in * g->n_atoms * whole,
                        virial + 9 * in * whole);
        if (!s.memory || !found || s.coincident)
            failed = s.memory && found ? 2 : 1;
        free(s.memory), free(found);
    }
    return failed;
}

/* Algorithm 1 for all tensors of all groups in one call. Knows nothing of torch or
   Python: addresses come in, through ctypes.

   Sums are taken in blocks of a fixed size, each in a fixed number of interleaved partial sums, and
   added in the order of the blocks: the result depends neither on the number of threads nor on the
   width of the vectors. A small tensor belongs to one thread, whose second pass finds it in that
   core's cache. A large one belongs to all: each thread takes a contiguous run of chunks, twice. While
   a thread computes on what its cache holds, it fetches what comes next. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 &&      \
    !defined(NO_DISPATCH)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum {
    LANES = 16,
    RUN = 8 * LANES,       /* elements whose sums are taken in the state's type: where all are alike
                              the rounding of a sum goes one way, and grows with its length */
    BLOCK = 8 * RUN,       /* elements that share a scale */
    CHUNK = 32 * BLOCK,    /* elements whose sums are kept apart in a large tensor */
    SMALL = 2 * CHUNK,     /* elements up to which a tensor is one thread's */
    PORTION = 16 * BLOCK,  /* elements of small tensors that a thread takes at once */
    STRIDE = 256,          /* elements between fetches */
    LEAD = 512,            /* elements that fetches in a large tensor run ahead */
    LINE = 64,             /* bytes */
    STREAMS = 5,           /* g, m, B, p and the compensation of p */
};

/* The numbers of a step, the same for many tensors; cpu.py fills this from rule.StepScalars. */
typedef struct {
    double alpha, rate, offset, previous_threshold, previous_offset, kappa, omega;
    double threshold, eps, sign, l2, decoupled, decay, belief, stochastic, t;
} step_scalars;

/* Columns with an entry for each tensor; addresses as numbers. */
typedef struct {
    int64_t count;
    const uint64_t *p, *g, *m, *B, *step, *previous_lr, *threshold, *low; /* the last three: 0 for
                                                                   none; low: compensation of p */
    const int64_t *n;
    const int32_t *kind, *which; /* which: of the scalars */
    const uint32_t *stream;      /* of rounding.py */
    const step_scalars *scalars;
    const uint64_t *shared; /* part_sums of each tensor that is a part of another, 0 for the others;
                               NULL: all are whole */
} table;

/* rule.Sums of a part of a tensor, and later of all of it. */
typedef struct {
    double scale, q4, k, largest; /* scale: a power of 2 */
} part_sums;

typedef struct {
    char *p, *m, *B, *low; /* low: NULL for none */
    const char *g;
    size_t n;
    int kind;
} tensor;

/* Over a part of a tensor, with u = d / 2^e: sum u^4, <u, y + B d>, max |d|, max |g - m|. */
typedef struct {
    double q4, k, d, most;
    int e;
} sums;

/* What the sums of a whole tensor come to: B' = B - c u^2 and the threshold of D; and the keys of
   its random bits. */
typedef struct {
    double c, threshold, d;
    int e;
    uint32_t key, second_key;
} result;

/* How theta' is stored, in 16 bits. */
enum { NEAREST, STOCHASTIC, KAHAN };

/* Fetches what a thread works on next, in step with what it works on now. */
typedef struct {
    const table *all;
    int64_t next, end;     /* tensors still to fetch */
    const char *at[STREAMS]; /* of the one being fetched */
    size_t left[STREAMS];    /* bytes */
    double pace, due;      /* lines for each element worked on */
} forerunner;

/* Denormal numbers, a hundred times slower than others, count as 0. They come of themselves where
   gradients are 0 and m fades away. */
static void flush_denormals(int on)
{
#if defined(__x86_64__)
    const unsigned bits = 0x8040, now = _mm_getcsr();
    _mm_setcsr(on ? now | bits : now & ~bits);
#else
    (void)on;
#endif
}

INLINE double larger(double x, double y) { return x > y ? x : y; }

INLINE double power_of_2(int e) /* |e| <= 1000 */
{
    const uint64_t bits = (uint64_t)(1023 + e) << 52;
    double y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* e with 2^(e-1) <= x < 2^e, of a normal number; at most as large as that either way. */
INLINE int exponent(double x, int most)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int e = (int)(bits >> 52 & 0x7ff) - 1022;
    return e > most ? most : e < -most ? -most : e;
}

/* In the order of the calls, in the larger of both scales. */
static void add(sums *total, const sums *part)
{
    total->d = larger(total->d, part->d);
    total->most = larger(total->most, part->most);
    if (part->q4 == 0 && part->k == 0) return;
    if (total->q4 == 0 && total->k == 0) total->e = part->e;
    int shift = part->e - total->e;
    double q4 = part->q4, k = part->k;
    if (shift > 0) {
        total->q4 = ldexp(total->q4, -4 * shift);
        total->k = ldexp(total->k, -shift);
        total->e = part->e;
    } else if (shift < 0) {
        q4 = ldexp(q4, 4 * shift);
        k = ldexp(k, shift);
    }
    total->q4 += q4;
    total->k += k;
}

static inline float from_bf16(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline uint16_t to_bf16(float x) /* to the nearest, ties to even */
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

/* rounding.py: a hash, and the two numbers around x */
INLINE uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0xd35a2d97u;
    return x ^ x >> 15;
}

INLINE uint16_t draw_bf16(float x, uint32_t random) /* random < 2^16 */
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int beyond = (bits & 0x7fffffffu) >= 0x7f7f0000u; /* the largest finite number, or more */
    return beyond ? to_bf16(x) : (uint16_t)((bits + random) >> 16);
}

/* of parameter, gradient and state; the numbers are those of cpu.py */
#define KINDS(X)                                                                                   \
    X(0, f32, float, float, float)                                                                 \
    X(1, f32_bf16, float, uint16_t, float)                                                         \
    X(2, bf16, uint16_t, uint16_t, float)                                                          \
    X(3, bf16_f32, uint16_t, float, float)                                                         \
    X(4, f64, double, double, double)                                                              \
    X(5, f32_s16, float, float, uint16_t)                                                          \
    X(6, bf16_s16, uint16_t, uint16_t, uint16_t)
enum { F64 = 4 };

static const struct {
    size_t p, g, state;
} SIZES[] = {
#define X(id, name, P_, G_, S_) [id] = {sizeof(P_), sizeof(G_), sizeof(S_)},
    KINDS(X)
#undef X
};

static tensor tensor_at(const table *all, int64_t i)
{
    return (tensor){.p = (char *)(uintptr_t)all->p[i],
                    .m = (char *)(uintptr_t)all->m[i],
                    .B = (char *)(uintptr_t)all->B[i],
                    .low = (char *)(uintptr_t)all->low[i],
                    .g = (const char *)(uintptr_t)all->g[i],
                    .n = (size_t)all->n[i],
                    .kind = all->kind[i]};
}

/* Let the forerunner fetch n elements of a tensor. */
static void aim(forerunner *ahead, const tensor *t, size_t at, size_t n)
{
    const size_t p = SIZES[t->kind].p, g = SIZES[t->kind].g, state = SIZES[t->kind].state;
    ahead->at[0] = t->g + at * g;
    ahead->at[1] = t->m + at * state;
    ahead->at[2] = t->B + at * state;
    ahead->at[3] = t->p + at * p;
    ahead->left[0] = n * g;
    ahead->left[1] = ahead->left[2] = n * state;
    ahead->left[3] = n * p;
    ahead->at[4] = t->low + (t->low ? at * p : 0);
    ahead->left[4] = t->low ? n * p : 0;
}

INLINE void fetch(forerunner *ahead, size_t n)
{
    enum { FEW = 4 * LINE };
    const double due = ahead->due + ahead->pace * (double)n;
    ptrdiff_t lines = (ptrdiff_t)due; /* below 0 afterwards, where a run was too long */
    const double rest = due - (double)lines;
    while (lines > 0) {
        size_t left = 0;
        for (int k = 0; k < STREAMS; k++) {
            const char *at = ahead->at[k];
            const size_t bytes = ahead->left[k] < FEW ? ahead->left[k] : FEW;
            for (size_t i = 0; i < bytes; i += LINE) __builtin_prefetch(at + i);
            lines -= (ptrdiff_t)((bytes + LINE - 1) / LINE);
            ahead->at[k] = at + bytes;
            left |= ahead->left[k] -= bytes;
        }
        if (left) continue;
        if (ahead->next >= ahead->end) {
            ahead->pace = ahead->due = 0;
            return;
        }
        const tensor t = tensor_at(ahead->all, ahead->next++);
        if (t.n <= SMALL) aim(ahead, &t, 0, t.n);
    }
    ahead->due = rest + (double)lines;
}

#define SAME(x) (x)
#define S float
#define ABS fabsf
#define E_MOST 120
#define TINY 0x1p-104 /* of which the smallest normal number is no more than a rounding */
#define M float
#define LOAD_M SAME
#define STORE_M SAME
#define DRAW_M(x, random) (x)
#define P float
#define LOAD_P SAME
#define STORE_P SAME
#define DRAW_P(x, random) (x)
#define G float
#define LOAD_G SAME
#define NAME(x) x##_f32
#include "kernel.h"
#undef NAME
#undef G
#undef LOAD_G
#define G uint16_t
#define LOAD_G from_bf16
#define NAME(x) x##_f32_bf16
#include "kernel.h"
#undef NAME
#undef M
#undef LOAD_M
#undef STORE_M
#undef DRAW_M
#define M uint16_t
#define LOAD_M from_bf16
#define STORE_M to_bf16
#define DRAW_M draw_bf16
#undef G
#undef LOAD_G
#define G float
#define LOAD_G SAME
#define NAME(x) x##_f32_s16
#include "kernel.h"
#undef NAME
#undef P
#undef LOAD_P
#undef STORE_P
#undef DRAW_P
#define P uint16_t
#define LOAD_P from_bf16
#define STORE_P to_bf16
#define DRAW_P draw_bf16
#undef G
#undef LOAD_G
#define G uint16_t
#define LOAD_G from_bf16
#define NAME(x) x##_bf16_s16
#include "kernel.h"
#undef NAME
#undef M
#undef LOAD_M
#undef STORE_M
#undef DRAW_M
#define M float
#define LOAD_M SAME
#define STORE_M SAME
#define DRAW_M(x, random) (x)
#define NAME(x) x##_bf16
#include "kernel.h"
#undef NAME
#undef G
#undef LOAD_G
#define G float
#define LOAD_G SAME
#define NAME(x) x##_bf16_f32
#include "kernel.h"
#undef NAME
#undef S
#undef M
#undef ABS
#undef E_MOST
#undef TINY
#undef P
#undef LOAD_P
#undef STORE_P
#undef DRAW_P
#undef G
#define S double
#define ABS fabs
#define E_MOST 1000
#define TINY 0x1p-970
#define M double
#define P double
#define LOAD_P SAME
#define STORE_P SAME
#define DRAW_P(x, random) (x)
#define G double
#define NAME(x) x##_f64
#include "kernel.h"

/* The modes are constants here, so that the compiler makes a loop for each. */
#define X(id, name, P_, G_, M_)                                                                    \
    CLONES static void measure_all_##name(const tensor *t, size_t at, size_t n,                    \
                                          const step_scalars *s, sums *out, forerunner *ahead)     \
    {                                                                                              \
        const P_ *p = (const P_ *)t->p + at, *low = (const P_ *)t->low + (t->low ? at : 0);        \
        const G_ *g = (const G_ *)t->g + at;                                                       \
        const M_ *m = (const M_ *)t->m + at, *B = (const M_ *)t->B + at;                           \
        if (sizeof(P_) == 2 && t->low && s->decay != 0) {                                          \
            if (s->belief != 0) measure_##name(p, low, g, m, B, n, s, 1, 1, KAHAN, out, ahead);    \
            else measure_##name(p, low, g, m, B, n, s, 1, 0, KAHAN, out, ahead);                   \
        } else if (s->belief != 0) {                                                               \
            if (s->decay != 0) measure_##name(p, low, g, m, B, n, s, 1, 1, NEAREST, out, ahead);   \
            else measure_##name(p, low, g, m, B, n, s, 0, 1, NEAREST, out, ahead);                 \
        } else {                                                                                   \
            if (s->decay != 0) measure_##name(p, low, g, m, B, n, s, 1, 0, NEAREST, out, ahead);   \
            else measure_##name(p, low, g, m, B, n, s, 0, 0, NEAREST, out, ahead);                 \
        }                                                                                          \
    }                                                                                              \
    CLONES static void apply_all_##name(const tensor *t, size_t at, size_t n,                      \
                                        const step_scalars *s, const result *r, forerunner *ahead) \
    {                                                                                              \
        P_ *p = (P_ *)t->p + at, *low = (P_ *)t->low + (t->low ? at : 0);                          \
        const G_ *g = (const G_ *)t->g + at;                                                       \
        M_ *m = (M_ *)t->m + at, *B = (M_ *)t->B + at;                                             \
        if (sizeof(P_) == 2 && t->low) {                                                           \
            if (s->decay != 0) apply_##name(p, low, g, m, B, at, n, s, r, 1, KAHAN, ahead);        \
            else apply_##name(p, low, g, m, B, at, n, s, r, 0, KAHAN, ahead);                      \
        } else if (sizeof(P_) == 2 && s->stochastic != 0) {                                        \
            if (s->decay != 0) apply_##name(p, low, g, m, B, at, n, s, r, 1, STOCHASTIC, ahead);   \
            else apply_##name(p, low, g, m, B, at, n, s, r, 0, STOCHASTIC, ahead);                 \
        } else {                                                                                   \
            if (s->decay != 0) apply_##name(p, low, g, m, B, at, n, s, r, 1, NEAREST, ahead);      \
            else apply_##name(p, low, g, m, B, at, n, s, r, 0, NEAREST, ahead);                    \
        }                                                                                          \
    }
KINDS(X)
#undef X

static void measure(const tensor *t, size_t at, size_t n, const step_scalars *s, sums *out,
                    forerunner *ahead)
{
    switch (t->kind) {
#define X(id, name, P_, G_, S_)                                                                    \
    case id: measure_all_##name(t, at, n, s, out, ahead); break;
        KINDS(X)
#undef X
    }
}

static void apply(const tensor *t, size_t at, size_t n, const step_scalars *s, const result *r,
                  forerunner *ahead)
{
    switch (t->kind) {
#define X(id, name, P_, G_, S_)                                                                    \
    case id: apply_all_##name(t, at, n, s, r, ahead); break;
        KINDS(X)
#undef X
    }
}

/* The scalars of one tensor: with belief its threshold of the step before is its own. */
static step_scalars scalars_of(const table *all, int64_t i)
{
    step_scalars s = all->scalars[all->which[i]];
    if (s.belief != 0) {
        const void *threshold = (const void *)(uintptr_t)all->threshold[i];
        s.previous_threshold = all->kind[i] == F64 ? *(const double *)threshold
                                                   : (double)*(const float *)threshold;
    }
    return s;
}

/* rule.secant_coefficient and rule.finite */
static result conclude(const sums *total, const step_scalars *s, int kind, uint32_t stream)
{
    result r = {.e = total->e, .d = total->d, .threshold = s->threshold};
    const double scale = power_of_2(total->e), n = scale * sqrt(sqrt(total->q4)) + s->eps;
    if (n != 0) {
        const double share = scale / n, c = share * share * share * (total->k / n);
        const double most = kind == F64 ? 0x1p1020 : 0x1p125;
        r.c = c > most ? most : c < -most ? -most : c;
    }
    r.key = mix((uint32_t)s->t ^ stream);
    r.second_key = mix(r.key ^ stream ^ 0x9e3779b9u);
    if (s->belief != 0) /* a maximum may have passed over a NaN, k has not */
        r.threshold = total->k != total->k ? total->k : total->most;
    return r;
}

static part_sums *shared_of(const table *all, int64_t i)
{
    return all->shared ? (part_sums *)(uintptr_t)all->shared[i] : NULL;
}

static void tell(const sums *total, part_sums *out)
{
    *out = (part_sums){power_of_2(total->e), total->q4, total->k, total->most};
}

static sums told(const part_sums *whole)
{
    return (sums){.q4 = whole->q4, .k = whole->k, .most = whole->largest,
                  .d = whole->scale * sqrt(sqrt(whole->q4)), .e = ilogb(whole->scale)};
}

static void record(const table *all, int64_t i, const step_scalars *s, const result *r)
{
    *(float *)(uintptr_t)all->step[i] += 1;
    if (all->previous_lr[i]) *(double *)(uintptr_t)all->previous_lr[i] = s->rate;
    if (s->belief != 0) {
        void *threshold = (void *)(uintptr_t)all->threshold[i];
        if (all->kind[i] == F64) *(double *)threshold = r->threshold;
        else *(float *)threshold = (float)r->threshold;
    }
}

/* What the threads of one call share. */
typedef struct {
    const table *all;
    sums *chunks; /* room for those of the largest tensor */
    int measuring; /* only take the sums of parts; nothing is changed */
    int wanted, (*member)(void), (*members)(void);
    atomic_long next; /* tensor */
    atomic_int arrived, turn;
} job;

static size_t length(size_t at, size_t end, size_t most) { return end - at < most ? end - at : most; }

static void step_small(const job *j, int64_t i, forerunner *ahead)
{
    const table *all = j->all;
    part_sums *shared = shared_of(all, i);
    if (j->measuring && !shared) return;
    const tensor t = tensor_at(all, i);
    const step_scalars s = scalars_of(all, i);
    sums total = {0}, part;
    if (shared && !j->measuring) total = told(shared);
    else
        for (size_t at = 0; at < t.n; at += CHUNK) {
            measure(&t, at, length(at, t.n, CHUNK), &s, &part, ahead);
            add(&total, &part);
        }
    if (j->measuring) {
        tell(&total, shared);
        return;
    }
    const result r = conclude(&total, &s, t.kind, all->stream[i]);
    apply(&t, 0, t.n, &s, &r, ahead);
    record(all, i, &s, &r);
}

/* Some small tensors in a row, [first, end) */
typedef struct {
    int64_t first, end;
    double lines, elements;
} portion;

static portion take(job *j)
{
    const table *all = j->all;
    long first = atomic_load(&j->next), end;
    portion taken;
    do {
        taken = (portion){.first = first};
        for (end = first; end < all->count && taken.elements < PORTION; end++) {
            const size_t n = (size_t)all->n[end];
            if (n > SMALL) continue;
            const int kind = all->kind[end];
            taken.elements += (double)n;
            const size_t p = SIZES[kind].p * (all->low[end] ? 2 : 1);
            taken.lines += (double)(n * (p + SIZES[kind].g + 2 * SIZES[kind].state)) / LINE;
        }
        taken.end = end;
    } while (!atomic_compare_exchange_weak(&j->next, &first, end));
    return taken;
}

static void step_all_small(job *j)
{
    portion now = take(j);
    while (now.first < now.end) {
        const portion next = take(j);
        forerunner ahead = {.all = j->all, .next = next.first, .end = next.end};
        ahead.pace = now.elements > 0 ? next.lines / (2 * now.elements) : 0;
        for (int64_t i = now.first; i < now.end; i++)
            if (j->all->n[i] <= SMALL) step_small(j, i, &ahead);
        now = next;
    }
}

static void wait_for_all(job *j, int members)
{
    if (members == 1) return;
    const int turn = atomic_load(&j->turn);
    if (atomic_fetch_add(&j->arrived, 1) == members - 1) {
        atomic_store(&j->arrived, 0);
        atomic_fetch_add(&j->turn, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&j->turn, memory_order_acquire) == turn; spins++)
        if (spins < 10000) PAUSE();
        else sched_yield(); /* more threads than cores */
}

/* Let the forerunner keep a little ahead within a chunk of a large tensor. */
static void keep_ahead(forerunner *ahead, const tensor *t, size_t chunk, int with_p)
{
    const size_t at = chunk * CHUNK + LEAD, end = chunk * CHUNK + length(chunk * CHUNK, t->n, CHUNK);
    ahead->pace = ahead->due = 0;
    if (at >= end) return;
    aim(ahead, t, at, end - at);
    if (!with_p) ahead->left[3] = ahead->left[4] = 0;
    size_t bytes = 0;
    for (int k = 0; k < STREAMS; k++) bytes += ahead->left[k];
    ahead->pace = (double)bytes / (double)((end - at) * LINE);
}

static void step_large(job *j, int64_t i, int member, int members)
{
    part_sums *shared = shared_of(j->all, i);
    if (j->measuring && !shared) return;
    const tensor t = tensor_at(j->all, i);
    const step_scalars s = scalars_of(j->all, i);
    const size_t chunks = (t.n + CHUNK - 1) / CHUNK;
    const size_t first = chunks * (size_t)member / (size_t)members;
    const size_t last = chunks * ((size_t)member + 1) / (size_t)members;
    forerunner ahead = {0};
    sums total = {0};
    if (shared && !j->measuring) {
        total = told(shared);
    } else {
        for (size_t k = first; k < last; k++) {
            keep_ahead(&ahead, &t, k, s.decay != 0);
            measure(&t, k * CHUNK, length(k * CHUNK, t.n, CHUNK), &s, &j->chunks[k], &ahead);
        }
        wait_for_all(j, members);
        for (size_t k = 0; k < chunks; k++) add(&total, &j->chunks[k]);
    }
    if (j->measuring) {
        wait_for_all(j, members); /* the chunks' sums have been read */
        if (member == 0) tell(&total, shared);
        return;
    }
    const result r = conclude(&total, &s, t.kind, j->all->stream[i]);
    for (size_t k = first; k < last; k++) {
        keep_ahead(&ahead, &t, k, 1);
        apply(&t, k * CHUNK, length(k * CHUNK, t.n, CHUNK), &s, &r, &ahead);
    }
    wait_for_all(j, members);
    if (member == 0) record(j->all, i, &s, &r);
}

static void take_part(job *j, int member, int members)
{
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
#endif
    flush_denormals(1);
    for (int64_t i = 0; i < j->all->count; i++)
        if (j->all->n[i] > SMALL) step_large(j, i, member, members);
    step_all_small(j);
#if defined(__x86_64__)
    _mm_setcsr(before);
#endif
}

static void openmp_member(void *data)
{
    job *j = data; /* the team may be smaller than was asked for */
    take_part(j, j->member(), j->members());
}

typedef struct {
    job *j;
    pthread_t thread;
    int member;
    atomic_int *members; /* 0: not known yet */
} worker;

static void *thread_member(void *data)
{
    worker *w = data;
    int members;
    while ((members = atomic_load(w->members)) == 0) sched_yield();
    take_part(w->j, w->member, members);
    return NULL;
}

/* Threads of our own, for this call only. */
static int run_threads(job *j)
{
    worker *workers = calloc((size_t)j->wanted, sizeof *workers);
    if (!workers) return -1;
    atomic_int members = 0;
    int started = 1;
    for (; started < j->wanted; started++) {
        worker *w = &workers[started];
        *w = (worker){.j = j, .member = started, .members = &members};
        if (pthread_create(&w->thread, NULL, thread_member, w)) break;
    }
    atomic_store(&members, started);
    take_part(j, 0, started);
    for (int i = 1; i < started; i++) pthread_join(workers[i].thread, NULL);
    free(workers);
    return 0;
}

/* DLPack's DLTensor (version 1 of its ABI), and a function that describes a Python object so. */
typedef struct {
    void *data;
    int32_t device_type, device, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset;
} dl_tensor;
typedef int (*describe)(void *object, dl_tensor *out);

/* Of Python's stable ABI; as the header is not needed for more, it is not needed at all. */
extern void *PyList_GetItem(void *list, ptrdiff_t i);

/* Looks at the tensors in so many lists (0: no list) of count each, of which some may be the object
   none. Writes for each its object, its address, 0 for none, and, one after the other, what else
   DLPack says of it: device, type, shape and strides. Returns how many words that takes, of which no
   more than room are written, or -1 with a Python exception set. The caller holds the GIL. */
EXPORT int64_t apollo_qn_look(describe look, int64_t lists, const uint64_t *list, int64_t count,
                              uint64_t none, uint64_t *object, uint64_t *address, int64_t *words,
                              int64_t room)
{
    int64_t used = 0;
    for (int64_t i = 0; i < lists * count; i++) {
        dl_tensor t;
        void *const column = (void *)(uintptr_t)list[i / count];
        void *const x = column ? PyList_GetItem(column, (ptrdiff_t)(i % count)) : NULL;
        object[i] = (uint64_t)(uintptr_t)x;
        address[i] = 0;
        if (!column || object[i] == none) continue;
        if (!x || look(x, &t)) return -1;
        address[i] = (uint64_t)(uintptr_t)t.data + t.offset;
        const int64_t needed = 2 + 2 * (int64_t)t.dimensions;
        if (used + needed <= room) {
            int64_t *out = words + used;
            *out++ = (int64_t)t.device_type << 32 | t.device;
            *out++ = (int64_t)t.dimensions << 32 | (int64_t)t.code << 24 | t.bits << 16 | t.lanes;
            for (int k = 0; k < t.dimensions; k++) *out++ = t.shape[k];
            for (int k = 0; k < t.dimensions; k++) *out++ = t.strides[k];
        }
        used += needed;
    }
    return used;
}

/* The index of a gradient that reaches into one of the ranges [start, end), which are written,
   sorted and apart; -1: none does. */
EXPORT int64_t apollo_qn_overlap(const table *all, const uint64_t *start, const uint64_t *end,
                                 int64_t ranges)
{
    for (int64_t i = 0; i < all->count; i++) {
        const uint64_t first = all->g[i];
        const uint64_t last = first + (uint64_t)all->n[i] * SIZES[all->kind[i]].g;
        int64_t low = 0, high = ranges; /* the first range that starts at last or later */
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (start[middle] < last) low = middle + 1;
            else high = middle;
        }
        if (low > 0 && end[low - 1] > first) return i;
    }
    return -1;
}

/* Runs of neighbours with one group, step and rate before: which[] numbers them, and their steps
   and rates are written; returns how many there are. */
EXPORT int64_t apollo_qn_numbers(int64_t count, const int32_t *group, const uint64_t *step,
                                 const uint64_t *previous_lr, int32_t *which, int32_t *group_of,
                                 double *step_of, double *previous_lr_of)
{
    int64_t runs = 0;
    for (int64_t i = 0; i < count; i++) {
        const double t = (double)*(const float *)(uintptr_t)step[i];
        const double rate = previous_lr[i] ? *(const double *)(uintptr_t)previous_lr[i] : 0;
        if (runs == 0 || group[i] != group_of[runs - 1] || t != step_of[runs - 1] ||
            rate != previous_lr_of[runs - 1]) {
            group_of[runs] = group[i];
            step_of[runs] = t;
            previous_lr_of[runs++] = rate;
        }
        which[i] = (int32_t)(runs - 1);
    }
    return runs;
}

/* After a step that was done elsewhere: counts it, and writes down its rates. */
EXPORT void apollo_qn_record(int64_t count, const uint64_t *step, const uint64_t *previous_lr,
                             const int32_t *which, const step_scalars *scalars)
{
    for (int64_t i = 0; i < count; i++) {
        *(float *)(uintptr_t)step[i] += 1;
        if (previous_lr[i]) *(double *)(uintptr_t)previous_lr[i] = scalars[which[i]].rate;
    }
}

/* One step; or, measuring, only the sums of parts. omp_* are OpenMP's functions that the process
   already has; NULL: threads of our own.
   Returns 0; -1: no memory, nothing has been changed. */
EXPORT int apollo_qn_step(const table *all, int measuring, int threads,
                          void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned),
                          int (*omp_get_thread_num)(void), int (*omp_get_num_threads)(void))
{
    size_t largest = 0, elements = 0;
    for (int64_t i = 0; i < all->count; i++) {
        const size_t n = (size_t)all->n[i];
        elements += n;
        largest = n > largest ? n : largest;
    }
    job j = {.all = all, .measuring = measuring,
             .wanted = elements > 2 * PORTION && threads > 1 ? threads : 1};
    if (largest > SMALL && !(j.chunks = malloc((largest / CHUNK + 1) * sizeof *j.chunks))) return -1;
    int failed = 0;
    if (j.wanted == 1) {
        take_part(&j, 0, 1);
    } else if (omp_parallel) {
        j.member = omp_get_thread_num;
        j.members = omp_get_num_threads;
        omp_parallel(openmp_member, &j, (unsigned)j.wanted, 0);
    } else {
        failed = run_threads(&j);
    }
    free(j.chunks);
    return failed;
}

// Algorithm 1 on runs of elements. This header knows nothing of torch.
//
// The result depends neither on the number of threads nor on the width of the vectors. No
// multiplication is contracted with an addition (-ffp-contract=off), and every sum has a fixed order.
// A sum is taken in blocks of a fixed size, each with LANES interleaved partial sums. The blocks are
// added up in order.
#pragma once

#include <tuple>

#include "numbers.h"

namespace apollo {

constexpr size_t LANES = 16;
constexpr size_t RUN = 8 * LANES;    // elements summed in the type of the arithmetic; short, because the
                                     // rounding error of a sum of equal numbers grows with its length
constexpr size_t BLOCK = 8 * RUN;    // elements that share a scale
constexpr size_t CHUNK = 32 * BLOCK; // elements of a large tensor that have their own sums
constexpr size_t SMALL = 2 * CHUNK;  // largest number of elements of a tensor that one thread updates

// One row of the operators' `scalars`.
struct Scalars {
    double alpha, rate, offset, previous_threshold, previous_offset, kappa, omega;
    double threshold, eps, sign, l2, decoupled, decay, belief, stochastic, t;
};
static_assert(sizeof(Scalars) == 16 * sizeof(double));

// One row of the operators' `sums`: secant.Sums of a tensor or of a shard.
struct ShardSums {
    double scale; // a power of 2; negative: the tensor is not sharded
    double q4, k, largest;
};

// Sums over some elements, with u = d / 2^e: sum u^4, <u, y + B d>, max |d| and max |g - m|.
struct Sums {
    double q4, k, d, most;
    int e;
};

// The update of a tensor: c and e of B' = B - c u^2, threshold of D, keys of the random bits.
struct Update {
    double c, threshold, d;
    int e;
    uint32_t key, second_key;
};

struct Item {
    char *p, *m, *B;
    char *compensation; // compensation of p, or null
    void *threshold;    // threshold of belief, or null
    const char *g;
    size_t n;
    const Scalars *scalars;
    const ShardSums *sums; // global sums of a sharded tensor, or null
    int kind;              // index in Kinds
    uint32_t rng_key;      // key of the random bits, see rounding.py
};

enum Rounding { NEAREST, STOCHASTIC, KAHAN }; // how a 16-bit parameter is stored

// Types of parameter, gradient and state. The arithmetic has the state's type, float or wider.
template <class P_, class G_, class M_> struct Kind {
    using P = P_;
    using G = G_;
    using M = M_;
    using S = std::conditional_t<std::is_same_v<M_, double>, double, float>;
};
using Kinds = std::tuple<Kind<float, float, float>, Kind<float, bf16, float>, Kind<bf16, bf16, float>,
                         Kind<bf16, float, float>, Kind<double, double, double>,
                         Kind<float, float, bf16>, Kind<bf16, bf16, bf16>>;
constexpr size_t KINDS = std::tuple_size_v<Kinds>;
constexpr int F64 = 4;
struct Size {
    size_t p, g, state;
};
template <class... K> constexpr auto sizes_of(std::tuple<K...>)
{
    struct {
        Size of[sizeof...(K)];
    } sizes{{{sizeof(typename K::P), sizeof(typename K::G), sizeof(typename K::M)}...}};
    return sizes;
}
constexpr auto SIZES = sizes_of(Kinds{});

// Adds `part` to `total`, in the larger of the two scales.
inline void add(Sums &total, const Sums &part)
{
    total.d = larger(total.d, part.d);
    total.most = larger(total.most, part.most);
    if (part.q4 == 0 && part.k == 0) return;
    if (total.q4 == 0 && total.k == 0) total.e = part.e;
    const int shift = part.e - total.e;
    double q4 = part.q4, k = part.k;
    if (shift > 0) {
        total.q4 = ldexp(total.q4, -4 * shift);
        total.k = ldexp(total.k, -shift);
        total.e = part.e;
    } else if (shift < 0) {
        q4 = ldexp(q4, 4 * shift);
        k = ldexp(k, shift);
    }
    total.q4 += q4;
    total.k += k;
}

// Prefetches what a thread measures next into the cache while the thread measures, at the same pace: its
// next small tensors, or the same large tensor some elements ahead, because the hardware's prefetching
// stops at the end of a page. Measuring leaves memory bandwidth for this.
class Prefetcher {
  public:
    Prefetcher() = default;
    Prefetcher(const Item *first, const Item *end) : item_(first), end_(end) { open(); }
    Prefetcher(const Item &large, size_t at) : item_(&large), end_(&large + 1), left_(large.n)
    {
        begin(large.scalars->decay != 0, at + AHEAD);
    }

    INLINE void advance(size_t measured)
    {
        for (due_ += measured; due_ >= STEP && item_ != end_; due_ -= STEP) {
            const size_t n = left_ < STEP ? left_ : STEP;
            for (int k = 0; k < STREAMS; k++) {
                const size_t bytes = n * size_[k];
                for (size_t i = 0; i < bytes; i += LINE) __builtin_prefetch(at_[k] + i);
                at_[k] += bytes;
            }
            left_ -= n;
            if (left_ > 0) continue;
            item_++;
            open();
        }
    }

  private:
    static constexpr size_t STEP = 64, LINE = 64;   // elements; bytes
    static constexpr size_t AHEAD = 4 * STEP;       // elements between measuring and prefetching
    static constexpr int STREAMS = 5;
    const Item *item_ = nullptr, *end_ = nullptr;
    size_t due_ = 0, left_ = 0;
    const char *at_[STREAMS] = {};
    size_t size_[STREAMS] = {};

    // Skips large tensors, which all threads process together.
    void open()
    {
        while (item_ != end_ && item_->n > SMALL) item_++;
        if (item_ == end_) return;
        left_ = item_->n;
        begin(true, 0);
    }

    void begin(bool with_theta, size_t place)
    {
        const auto [p, g, state] = SIZES.of[item_->kind];
        const char *const start[STREAMS] = {item_->g, item_->m, item_->B, item_->p,
                                            item_->compensation};
        const size_t theta = with_theta ? p : 0;
        const size_t size[STREAMS] = {g, state, state, theta, item_->compensation ? theta : 0};
        for (int k = 0; k < STREAMS; k++) {
            size_[k] = size[k];
            at_[k] = start[k] + place * size[k];
        }
    }
};

// Constants of a step in the type of the arithmetic, and the formulas for one element.
template <class S, bool DECAY> struct Element {
    S alpha, sign, l2, kappa, omega, floor, offset;

    INLINE explicit Element(const Scalars &s)
        : alpha((S)s.alpha), sign((S)s.sign), l2((S)s.l2), kappa((S)s.kappa), omega((S)s.omega),
          floor((S)s.previous_threshold), offset((S)s.previous_offset)
    {
    }

    // Rebuilds d, the displacement of the step before.
    INLINE S displacement(S m, S b, S theta) const
    {
        const S a = magnitude(b);
        const S d = m / ((floor > a ? floor : a) + offset);
        if constexpr (DECAY) return kappa * d + omega * theta;
        else return d;
    }

    // Returns g - m.
    INLINE S difference(S g, S m, S theta) const
    {
        const S delta = sign * g - m;
        if constexpr (DECAY) return delta + l2 * theta;
        else return delta;
    }
};

template <Rounding ROUNDING, class P> INLINE auto theta_of(const P *p, const P *low, size_t i)
{
    if constexpr (ROUNDING == KAHAN) return load(p[i]) + load(low[i]);
    else return load(p[i]);
}

// Returns the sums over a block, with u = d / 2^e.
template <class K, bool DECAY, bool BELIEF, Rounding ROUNDING>
INLINE Sums measure_block(const typename K::P *__restrict p, const typename K::P *__restrict low,
                          const typename K::G *__restrict g, const typename K::M *__restrict m,
                          const typename K::M *__restrict B, size_t n, const Scalars &s, int e,
                          Prefetcher &ahead)
{
    using S = typename K::S;
    const Element<S, DECAY> element(s);
    const S inverse = (S)power_of_2(-e);
    S q4[LANES] = {}, k[LANES] = {}, largest[LANES] = {}, most[LANES] = {};
    double q4_sum[LANES] = {}, k_sum[LANES] = {};
    size_t i = 0;
#define MEASURE(i, j)                                                                              \
    do {                                                                                           \
        S theta = 0;                                                                               \
        if constexpr (DECAY) theta = (S)theta_of<ROUNDING>(p, low, i);                             \
        const S b = load(B[i]), mi = load(m[i]);                                                   \
        const S d = element.displacement(mi, b, theta);                                            \
        const S delta = element.difference(load(g[i]), mi, theta);                                 \
        if constexpr (BELIEF) {                                                                    \
            const S size = magnitude(delta);                                                       \
            most[j] = size > most[j] ? size : most[j];                                             \
        }                                                                                          \
        const S size = magnitude(d), u = d * inverse, u2 = u * u;                                  \
        largest[j] = size > largest[j] ? size : largest[j];                                        \
        q4[j] += u2 * u2;                                                                          \
        k[j] += u * (element.alpha * delta + b * d);                                               \
    } while (0)
    while (i + LANES <= n) {
        const size_t end = i + RUN <= n ? i + RUN : n;
        ahead.advance(end - i);
        for (; i + LANES <= end; i += LANES)
            for (size_t j = 0; j < LANES; j++) MEASURE(i + j, j);
// unrolled, GCC 12 would not vectorize these
#pragma GCC unroll 1
        for (size_t j = 0; j < LANES; j++) q4_sum[j] += (double)q4[j];
#pragma GCC unroll 1
        for (size_t j = 0; j < LANES; j++) k_sum[j] += (double)k[j];
        for (size_t j = 0; j < LANES; j++) q4[j] = k[j] = 0;
    }
    for (size_t j = 0; i < n; i++, j++) MEASURE(i, j);
#undef MEASURE
    Sums found{};
    found.e = e;
    for (size_t j = 0; j < LANES; j++) {
        found.q4 += q4_sum[j] + (double)q4[j];
        found.k += k_sum[j] + (double)k[j];
        found.d = larger(found.d, (double)largest[j]);
        found.most = larger(found.most, (double)most[j]);
    }
    return found;
}

// Returns the sums over a run. The first guess for the scale of a block is that of the block before. In
// two rare cases the block is measured again: if |u| comes near the limits of its type, and if d is so
// small that denormal numbers matter.
template <class K, bool DECAY, bool BELIEF, Rounding ROUNDING>
INLINE Sums measure_run(const Item &t, size_t at, size_t n, const Scalars &s, Prefetcher &ahead)
{
    using Limit = Limits<typename K::S>;
    const auto *p = (const typename K::P *)t.p, *low = (const typename K::P *)t.compensation;
    const auto *g = (const typename K::G *)t.g;
    const auto *m = (const typename K::M *)t.m, *B = (const typename K::M *)t.B;
    Sums total{};
    int e = 0;
    for (const size_t end = at + n; at < end; at += BLOCK) {
        const size_t length = end - at < BLOCK ? end - at : BLOCK;
        Sums found;
        bool tiny = false, again = false;
        for (;;) {
            if (tiny) flush_denormals(false);
            found = measure_block<K, DECAY, BELIEF, ROUNDING>(
                p + at, ROUNDING == KAHAN ? low + at : low, g + at, m + at, B + at, length, s, e,
                ahead);
            if (tiny) flush_denormals(true);
            const int right = exponent(found.d, Limit::exponent);
            tiny = found.d > 0 && found.d < Limit::tiny;
            if (again || !(found.d > 0) || (!tiny && right <= e + 20 && right >= e - 16)) break;
            e = right;
            again = true;
        }
        add(total, found);
    }
    return total;
}

// Stores m', B' and theta', with B' = B - c u^2 and u = d / 2^e. The upper 32 bits of an element's
// offset in its tensor are constant within a run.
template <class K, bool DECAY, Rounding ROUNDING>
INLINE void apply_run(const Item &t, size_t place, size_t n, const Scalars &s, const Update &r)
{
    using S = typename K::S;
    using P = typename K::P;
    using M = typename K::M;
    P *__restrict p = (P *)t.p + place;
    P *__restrict low = ROUNDING == KAHAN ? (P *)t.compensation + place : nullptr;
    const typename K::G *__restrict g = (const typename K::G *)t.g + place;
    M *__restrict m = (M *)t.m + place;
    M *__restrict B = (M *)t.B + place;
    const Element<S, DECAY> element(s);
    const S next_offset = (S)s.offset, rate = (S)s.rate, decoupled = (S)s.decoupled;
    const S c = (S)r.c, inverse = (S)power_of_2(-r.e), threshold = (S)r.threshold;
    const uint32_t key = r.key, second = r.second_key ^ (uint32_t)((uint64_t)place >> 32);
    const uint32_t first = (uint32_t)place;
    constexpr bool drawing = ROUNDING == STOCHASTIC || sizeof(M) < sizeof(S);
    const bool tiny = r.d > 0 && r.d < Limits<S>::tiny;
    if (tiny) flush_denormals(false);
    for (size_t i = 0; i < n; i++) {
        const S b = load(B[i]), mi = load(m[i]);
        const S theta = (S)theta_of<ROUNDING>(p, low, i);
        const S d = element.displacement(mi, b, theta);
        const S delta = element.difference(load(g[i]), mi, theta);
        const S u = d * inverse, m1 = mi + element.alpha * delta, B1 = b - c * (u * u);
        const S a1 = magnitude(B1);
        S d1 = m1 / ((threshold > a1 ? threshold : a1) + next_offset);
        if constexpr (DECAY) d1 += decoupled * theta;
        const S theta1 = theta - rate * d1;
        uint32_t random = 0;
        if constexpr (drawing) random = mix(mix((first + (uint32_t)i) ^ key) ^ second);
        store(m[i], m1);
        draw(B[i], B1, random & 0xffffu);
        if constexpr (ROUNDING == STOCHASTIC) draw(p[i], theta1, random >> 16);
        else store(p[i], theta1);
        if constexpr (ROUNDING == KAHAN) {
            const S high = load(p[i]);
            store(low[i], high - high == 0 ? theta1 - high : 0); // an infinity has no rounding error
        }
    }
    if (tiny) flush_denormals(true);
}

// Turns the modes into template parameters, so that the compiler generates a loop for each.
template <class K>
INLINE Sums measure_any(const Item &t, size_t at, size_t n, const Scalars &s, Prefetcher &ahead)
{
    if constexpr (std::is_same_v<typename K::P, bf16>) {
        if (t.compensation && s.decay != 0) {
            if (s.belief != 0) return measure_run<K, true, true, KAHAN>(t, at, n, s, ahead);
            return measure_run<K, true, false, KAHAN>(t, at, n, s, ahead);
        }
    }
    if (s.belief != 0) {
        if (s.decay != 0) return measure_run<K, true, true, NEAREST>(t, at, n, s, ahead);
        return measure_run<K, false, true, NEAREST>(t, at, n, s, ahead);
    }
    if (s.decay != 0) return measure_run<K, true, false, NEAREST>(t, at, n, s, ahead);
    return measure_run<K, false, false, NEAREST>(t, at, n, s, ahead);
}

template <class K, Rounding ROUNDING>
INLINE void apply_rounding(const Item &t, size_t at, size_t n, const Scalars &s, const Update &r)
{
    if (s.decay != 0) apply_run<K, true, ROUNDING>(t, at, n, s, r);
    else apply_run<K, false, ROUNDING>(t, at, n, s, r);
}

template <class K>
INLINE void apply_any(const Item &t, size_t at, size_t n, const Scalars &s, const Update &r)
{
    if constexpr (std::is_same_v<typename K::P, bf16>) {
        if (t.compensation) return apply_rounding<K, KAHAN>(t, at, n, s, r);
        if (s.stochastic != 0) return apply_rounding<K, STOCHASTIC>(t, at, n, s, r);
    }
    apply_rounding<K, NEAREST>(t, at, n, s, r);
}

// The kernel for one kind, compiled for one instruction set.
struct Functions {
    Sums (*measure)(const Item &, size_t at, size_t n, const Scalars &, Prefetcher &);
    void (*apply)(const Item &, size_t at, size_t n, const Scalars &, const Update &);
};
struct Table {
    Functions of[KINDS];
};
#define INSTRUCTION_SET(name, attribute)                                                           \
    struct name {                                                                                  \
        template <class K>                                                                         \
        attribute static Sums measure(const Item &t, size_t at, size_t n, const Scalars &s,        \
                                      Prefetcher &ahead)                                           \
        {                                                                                          \
            return measure_any<K>(t, at, n, s, ahead);                                             \
        }                                                                                          \
        template <class K>                                                                         \
        attribute static void apply(const Item &t, size_t at, size_t n, const Scalars &s,          \
                                    const Update &r)                                               \
        {                                                                                          \
            apply_any<K>(t, at, n, s, r);                                                          \
        }                                                                                          \
    };
INSTRUCTION_SET(Baseline, )
#if defined(__x86_64__) && !defined(NO_DISPATCH)
INSTRUCTION_SET(Avx2, __attribute__((target("avx2"))))
INSTRUCTION_SET(Avx512, __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#undef INSTRUCTION_SET

template <class T, class... K> constexpr Table table_of(std::tuple<K...>)
{
    return {{{&T::template measure<K>, &T::template apply<K>}...}};
}

// Returns the kernel for the widest instruction set of this processor, or for the one named `name`.
inline const Table &functions(const char *name = nullptr)
{
    static constexpr Table baseline = table_of<Baseline>(Kinds{});
#if defined(__x86_64__) && !defined(NO_DISPATCH)
    static constexpr Table avx2 = table_of<Avx2>(Kinds{}), avx512 = table_of<Avx512>(Kinds{});
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const auto wanted = [name](const char *other) { return !name || strcmp(name, other) == 0; };
    if (has_avx512 && wanted("avx512")) return avx512;
    if (has_avx2 && wanted("avx2")) return avx2;
#endif
    (void)name;
    return baseline;
}

// Computes secant.correction: the coefficient c, clamped to the range of B's type; NaN stays NaN.
inline Update conclude(const Sums &total, const Scalars &s, int kind, uint32_t rng_key)
{
    Update r{};
    r.e = total.e;
    r.d = total.d;
    r.threshold = s.threshold;
    const double scale = power_of_2(total.e), n = scale * sqrt(sqrt(total.q4)) + s.eps;
    if (n != 0) {
        const double share = scale / n, c = share * share * share * (total.k / n);
        const double most = kind == F64 ? Limits<double>::coefficient : Limits<float>::coefficient;
        r.c = c > most ? most : c < -most ? -most : c;
    }
    r.key = mix((uint32_t)s.t ^ rng_key);
    r.second_key = mix(r.key ^ rng_key ^ 0x9e3779b9u);
    if (s.belief != 0) // a maximum may ignore a NaN, k does not
        r.threshold = total.k != total.k ? total.k : total.most;
    return r;
}

} // namespace apollo

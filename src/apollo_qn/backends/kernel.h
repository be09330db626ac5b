/* Algorithm 1 on a run of elements, for parameters of type P, gradients of type G, state of type M and
   arithmetic of type S; kernel.c includes this once for each combination, and NAME(x) appends its
   suffix. The letters are those of rule.py. No multiplication and addition is contracted and the
   order of every addition is fixed: results depend neither on threads nor on vectors. */

/* The sums over a block with u = d / 2^e, |e| <= E_MOST; the largest |d| is in found->d. */
INLINE void NAME(measure_block)(const P *restrict p, const P *restrict low, const G *restrict g,
                                const M *restrict m, const M *restrict B, size_t n,
                                const step_scalars *s, int decay, int belief, int rounding, int e,
                                sums *found)
{
    const S alpha = (S)s->alpha, sign = (S)s->sign, l2 = (S)s->l2, kappa = (S)s->kappa;
    const S omega = (S)s->omega, floor = (S)s->previous_threshold, offset = (S)s->previous_offset;
    const S inverse = (S)power_of_2(-e);
    S q4[LANES] = {0}, k[LANES] = {0}, largest[LANES] = {0}, most[LANES] = {0};
    double q4_sum[LANES] = {0}, k_sum[LANES] = {0};
#define ELEMENT(i, j)                                                                              \
    do {                                                                                           \
        const S b = LOAD_M(B[i]), mi = LOAD_M(m[i]), a = ABS(b);                                   \
        S d = mi / ((floor > a ? floor : a) + offset);                                             \
        S delta = sign * LOAD_G(g[i]) - mi;                                                        \
        if (decay) {                                                                               \
            const S theta = rounding == KAHAN ? LOAD_P(p[i]) + LOAD_P(low[i]) : LOAD_P(p[i]);      \
            delta += l2 * theta;                                                                   \
            d = kappa * d + omega * theta;                                                         \
        }                                                                                          \
        if (belief) {                                                                              \
            const S size = ABS(delta);                                                             \
            most[j] = size > most[j] ? size : most[j];                                             \
        }                                                                                          \
        const S size = ABS(d), u = d * inverse, u2 = u * u;                                        \
        largest[j] = size > largest[j] ? size : largest[j];                                        \
        q4[j] += u2 * u2;                                                                          \
        k[j] += u * (alpha * delta + b * d);                                                       \
    } while (0)
    size_t i = 0;
    while (i + LANES <= n) {
        const size_t end = i + RUN <= n ? i + RUN : n;
        for (; i + LANES <= end; i += LANES)
            for (size_t j = 0; j < LANES; j++) ELEMENT(i + j, j);
        for (size_t j = 0; j < LANES; j++) {
            q4_sum[j] += (double)q4[j];
            k_sum[j] += (double)k[j];
            q4[j] = k[j] = 0;
        }
    }
    for (size_t j = 0; i < n; i++, j++) ELEMENT(i, j);
#undef ELEMENT
    *found = (sums){.e = e};
    for (size_t j = 0; j < LANES; j++) {
        found->q4 += q4_sum[j] + (double)q4[j];
        found->k += k_sum[j] + (double)k[j];
        found->d = larger(found->d, (double)largest[j]);
        found->most = larger(found->most, (double)most[j]);
    }
}

/* A block's scale is guessed from the block before; where |u| comes near the ends of S, which is
   rare, the block is measured once more. So it is where all of d is so small that denormals matter;
   what is smaller yet is 0. */
INLINE void NAME(measure)(const P *restrict p, const P *restrict low, const G *restrict g,
                          const M *restrict m, const M *restrict B, size_t n,
                          const step_scalars *s, int decay, int belief, int rounding, sums *total,
                          forerunner *ahead)
{
    int e = 0;
    *total = (sums){0};
    for (size_t at = 0; at < n; at += BLOCK) {
        const size_t length = n - at < BLOCK ? n - at : BLOCK;
        fetch(ahead, length);
        sums found;
        const P *rest = rounding == KAHAN ? low + at : low;
        for (int tiny = 0, again = 0;; again = 1) { /* one loop for both: half the code */
            if (tiny) flush_denormals(0);
            NAME(measure_block)
            (p + at, rest, g + at, m + at, B + at, length, s, decay, belief, rounding, e, &found);
            if (tiny) flush_denormals(1);
            const int right = exponent(found.d, E_MOST);
            tiny = found.d > 0 && found.d < TINY;
            if (again || !(found.d > 0) || (!tiny && right <= e + 20 && right >= e - 16)) break;
            e = right;
        }
        add(total, &found);
    }
}

/* m', B' and theta', with B' = B - c u^2 and u = d / 2^e; place is that of the first element in its
   tensor, in whose runs of elements its higher half does not change. */
INLINE void NAME(apply)(P *restrict p, P *restrict low, const G *restrict g, M *restrict m,
                        M *restrict B, size_t place, size_t n, const step_scalars *s,
                        const result *r, int decay, int rounding, forerunner *ahead)
{
    const S alpha = (S)s->alpha, sign = (S)s->sign, l2 = (S)s->l2, kappa = (S)s->kappa;
    const S omega = (S)s->omega, floor = (S)s->previous_threshold, offset = (S)s->previous_offset;
    const S next_offset = (S)s->offset, rate = (S)s->rate, decoupled = (S)s->decoupled;
    const S c = (S)r->c, inverse = (S)power_of_2(-r->e), threshold = (S)r->threshold;
    const uint32_t key = r->key, second = r->second_key ^ (uint32_t)((uint64_t)place >> 32);
    const uint32_t first = (uint32_t)place;
    const int drawing = rounding == STOCHASTIC || sizeof(M) < sizeof(S);
    const int tiny = r->d > 0 && r->d < TINY;
    if (tiny) flush_denormals(0);
    for (size_t at = 0; at < n; at += STRIDE) {
        const size_t end = n - at < STRIDE ? n : at + STRIDE;
        fetch(ahead, end - at);
        for (size_t i = at; i < end; i++) {
            const S b = LOAD_M(B[i]), mi = LOAD_M(m[i]), a = ABS(b);
            const S theta = rounding == KAHAN ? LOAD_P(p[i]) + LOAD_P(low[i]) : LOAD_P(p[i]);
            S d = mi / ((floor > a ? floor : a) + offset);
            S delta = sign * LOAD_G(g[i]) - mi;
            if (decay) {
                delta += l2 * theta;
                d = kappa * d + omega * theta;
            }
            const S u = d * inverse, m1 = mi + alpha * delta, B1 = b - c * (u * u), a1 = ABS(B1);
            S d1 = m1 / ((threshold > a1 ? threshold : a1) + next_offset);
            if (decay) d1 += decoupled * theta;
            const S theta1 = theta - rate * d1;
            const uint32_t word = drawing ? mix(mix((first + (uint32_t)i) ^ key) ^ second) : 0;
            m[i] = STORE_M(m1);
            B[i] = DRAW_M(B1, word & 0xffffu);
            p[i] = rounding == STOCHASTIC ? DRAW_P(theta1, word >> 16) : STORE_P(theta1);
            if (rounding == KAHAN) {
                const S high = LOAD_P(p[i]);
                low[i] = STORE_P(high - high == 0 ? theta1 - high : 0); /* of infinities nothing */
            }
            (void)word;
        }
    }
    if (tiny) flush_denormals(1);
}

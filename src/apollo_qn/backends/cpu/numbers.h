// Numbers as the kernel stores and computes them: types, limits, random bits and rounding. This header
// knows nothing of torch.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))

namespace apollo {

struct bf16 {
    uint16_t bits;
};

// The largest |e| of a scale 2^e, the |d| below which denormal numbers matter, and the largest |c|.
template <class S> struct Limits;
template <> struct Limits<float> {
    static constexpr int exponent = 120;
    static constexpr double tiny = 0x1p-104, coefficient = 0x1p125;
};
template <> struct Limits<double> {
    static constexpr int exponent = 1000;
    static constexpr double tiny = 0x1p-970, coefficient = 0x1p1020;
};

template <class To, class From> INLINE To bits_of(From x)
{
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

// Treats denormal numbers as 0, because operations on them take a hundred times longer. They occur where
// gradients are 0 and m decays.
INLINE void flush_denormals(bool on)
{
#if defined(__x86_64__)
    constexpr unsigned bits = 0x8040;
    const unsigned now = _mm_getcsr();
    _mm_setcsr(on ? now | bits : now & ~bits);
#else
    (void)on;
#endif
}

// Flushes denormal numbers in the thread of the object, until its destruction.
class Flushing {
#if defined(__x86_64__)
  public:
    Flushing() : before_(_mm_getcsr()) { flush_denormals(true); }
    ~Flushing() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#endif
};

INLINE double larger(double x, double y) { return x > y ? x : y; }

INLINE double power_of_2(int e) // |e| <= 1000
{
    return bits_of<double>((uint64_t)(1023 + e) << 52);
}

// Returns e with 2^(e-1) <= x < 2^e for a normal number x, limited to [-most, most].
INLINE int exponent(double x, int most)
{
    const int e = (int)(bits_of<uint64_t>(x) >> 52 & 0x7ff) - 1022;
    return e > most ? most : e < -most ? -most : e;
}

// Hashes a 32-bit integer, as rounding.mix does.
INLINE uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0xd35a2d97u;
    return x ^ x >> 15;
}

INLINE float load(float x) { return x; }
INLINE double load(double x) { return x; }
INLINE float load(bf16 x) { return bits_of<float>((uint32_t)x.bits << 16); }

// Rounds to nearest, ties to even.
INLINE void store(float &to, float x) { to = x; }
INLINE void store(double &to, double x) { to = x; }
INLINE void store(bf16 &to, float x)
{
    const uint32_t bits = bits_of<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to.bits = (uint16_t)(x != x ? 0x7fc0u : rounded);
}

// Rounds up or down at random so that the mean is preserved; random < 2^16.
INLINE void draw(float &to, float x, uint32_t) { to = x; }
INLINE void draw(double &to, double x, uint32_t) { to = x; }
INLINE void draw(bf16 &to, float x, uint32_t random)
{
    const uint32_t bits = bits_of<uint32_t>(x);
    bf16 nearest;
    store(nearest, x);
    // the largest finite number, larger ones, infinities and NaN
    const bool beyond = (bits & 0x7fffffffu) >= 0x7f7f0000u;
    to.bits = beyond ? nearest.bits : (uint16_t)((bits + random) >> 16);
}

INLINE float magnitude(float x) { return __builtin_fabsf(x); }
INLINE double magnitude(double x) { return __builtin_fabs(x); }

} // namespace apollo

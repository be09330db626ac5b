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

// The thread's register that says how denormal numbers are treated, and the bits that flush them to 0.
#if defined(__x86_64__)
constexpr unsigned FLUSH = 0x8040; // FTZ and DAZ
INLINE unsigned control() { return _mm_getcsr(); }
INLINE void set_control(unsigned bits) { _mm_setcsr(bits); }
#elif defined(__aarch64__)
constexpr uint64_t FLUSH = 1u << 24; // FZ
INLINE uint64_t control()
{
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
}
// "memory" keeps the loads before and after the change, and so the arithmetic on what they load.
INLINE void set_control(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#else // denormal numbers are computed with
constexpr unsigned FLUSH = 0;
INLINE unsigned control() { return 0; }
INLINE void set_control(unsigned) {}
#endif

// Treats denormal numbers as 0, because operations on them take a hundred times longer. They occur where
// gradients are 0 and m decays.
INLINE void flush_denormals(bool on)
{
    const auto now = control();
    set_control(on ? now | FLUSH : now & ~FLUSH);
}

// Flushes denormal numbers in the thread of the object, until its destruction.
class Flushing {
  public:
    Flushing() : before_(control()) { set_control(before_ | FLUSH); }
    ~Flushing() { set_control(before_); }

  private:
    decltype(control()) before_;
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

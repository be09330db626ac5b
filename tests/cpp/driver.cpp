// Runs the CPU kernel without torch, for sanitizers: every kind and mode, on sizes around the limits of
// blocks and chunks, with one thread and with three, whose results must be the same.
//
// With the argument "beyond" the kernel is given one element too many, which AddressSanitizer must
// report.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "schedule.h"

using namespace apollo;

namespace {

struct Threads {
    int64_t count;

    template <class F> void operator()(int64_t begin, int64_t end, int64_t, const F &f) const
    {
        const int64_t share = (end - begin + count - 1) / count;
        std::vector<std::thread> threads;
        for (int64_t at = begin; at < end; at += share)
            threads.emplace_back([&f, at, stop = std::min(at + share, end)] { f(at, stop); });
        for (std::thread &thread : threads) thread.join();
    }
};

// Numbers of one tensor, in a block of the heap that ends with them.
struct Column {
    std::vector<char> bytes;

    Column(size_t n, size_t item, uint32_t seed) : bytes(n * item)
    {
        for (size_t i = 0; i < n; i++) {
            const double x = ((double)mix(seed + (uint32_t)i) / 0x80000000u - 1) * 0.1;
            if (item == 8) memcpy(&bytes[i * 8], &x, 8);
            else if (item == 4) store(*(float *)&bytes[i * 4], (float)x);
            else store(*(bf16 *)&bytes[i * 2], (float)x);
        }
    }
};

struct Set {
    std::vector<Column> columns;
    std::vector<double> thresholds;
    std::vector<Item> items;

    Set(const std::vector<size_t> &sizes, const Scalars &scalars, bool kahan)
    {
        columns.reserve(5 * KINDS * sizes.size());
        thresholds.assign(KINDS * sizes.size(), 0);
        for (size_t kind = 0; kind < KINDS; kind++) {
            for (const size_t n : sizes) {
                const Size size = SIZES.of[kind];
                const auto column = [&](size_t item) {
                    return columns.emplace_back(n, item, (uint32_t)columns.size() << 20).bytes.data();
                };
                Item t{};
                t.p = column(size.p), t.g = column(size.g);
                t.m = column(size.state), t.B = column(size.state);
                t.compensation = kahan && size.p == 2 ? column(2) : nullptr;
                t.threshold = &thresholds[items.size()];
                t.n = n, t.kind = (int)kind, t.rng_key = mix((uint32_t)items.size());
                t.scalars = &scalars;
                items.push_back(t);
            }
        }
    }

    bool operator==(const Set &other) const
    {
        for (size_t i = 0; i < columns.size(); i++)
            if (columns[i].bytes != other.columns[i].bytes) return false;
        return memcmp(thresholds.data(), other.thresholds.data(), thresholds.size() * 8) == 0;
    }
};

} // namespace

int main(int count, char **arguments)
{
    const std::vector<size_t> sizes = {1,         LANES - 1, LANES + 1, RUN + 1,   BLOCK - 1,
                                       BLOCK + 1, CHUNK + 1, SMALL,     SMALL + 1, 2 * SMALL + 1};
    Scalars s{0.1, 0.01, 0, 0.5, 0, 1, 0, 0.01, 1e-4, 1, 0, 0, 0, 0, 0, 5};
    if (count > 1 && std::string(arguments[1]) == "beyond") {
        Set set({BLOCK}, s, false);
        set.items[0].n++;
        Schedule(set.items, functions()).step(Threads{1}, 1);
        return 0;
    }
    for (int mode = 0; mode < 16; mode++) {
        const bool kahan = mode & 8;
        s.decay = mode & 1, s.l2 = s.decay * 0.01;
        s.belief = mode >> 1 & 1, s.stochastic = mode >> 2 & 1;
        Set one(sizes, s, kahan), three(sizes, s, kahan), given(sizes, s, kahan);
        std::vector<ShardSums> sums(given.items.size()), again(given.items.size());
        Schedule(given.items, functions()).measure(Threads{3}, 3, sums.data());
        Schedule(one.items, functions()).measure(Threads{1}, 1, again.data());
        if (memcmp(sums.data(), again.data(), sums.size() * sizeof sums[0])) return 1;
        for (size_t i = 0; i < sums.size(); i++) given.items[i].sums = &sums[i];
        Schedule(one.items, functions()).step(Threads{1}, 1);
        Schedule(three.items, functions()).step(Threads{3}, 3);
        Schedule(given.items, functions()).step(Threads{3}, 3);
        if (!(one == three)) return 2;
        if (!(one == given)) return 3;
    }
    puts("the same with one thread and with three");
    return 0;
}

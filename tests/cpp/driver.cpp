// Runs the CPU kernel without torch, for sanitizers and for other processors: every kind and mode, on
// sizes around the limits of blocks and chunks, with one thread and with three, whose results must be the
// same. Some numbers are denormal. Prints a hash of each mode's results, to compare processors.
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

// Numbers of one tensor, in a block of the heap that ends with them. One of `tiny` numbers is near the
// smallest normal number of its type, above or below it; none with 0.
struct Column {
    std::vector<char> bytes;

    Column(size_t n, size_t item, uint32_t seed, uint32_t tiny) : bytes(n * item)
    {
        for (size_t i = 0; i < n; i++) {
            const uint32_t random = mix(seed + (uint32_t)i);
            double x = ((double)random / 0x80000000u - 1) * 0.1;
            if (tiny && mix(random) % tiny == 0) x *= item == 8 ? 0x1p-1018 : 0x1p-122;
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

    Set(const std::vector<size_t> &sizes, const Scalars &scalars, bool kahan, uint32_t tiny)
    {
        columns.reserve(5 * KINDS * sizes.size());
        thresholds.assign(KINDS * sizes.size(), 0);
        for (size_t kind = 0; kind < KINDS; kind++) {
            for (const size_t n : sizes) {
                const Size size = SIZES.of[kind];
                const auto column = [&](size_t item, uint32_t some) {
                    const uint32_t seed = (uint32_t)columns.size() << 20;
                    return columns.emplace_back(n, item, seed, some).bytes.data();
                };
                Item t{};
                t.p = column(size.p, 0), t.g = column(size.g, tiny);
                t.m = column(size.state, tiny), t.B = column(size.state, 0);
                t.compensation = kahan && size.p == 2 ? column(2, 0) : nullptr;
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

    uint64_t hash() const // FNV-1a
    {
        uint64_t now = 0xcbf29ce484222325u;
        const auto take = [&now](const void *data, size_t bytes) {
            for (size_t i = 0; i < bytes; i++)
                now = (now ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
        };
        for (const Column &column : columns) take(column.bytes.data(), column.bytes.size());
        take(thresholds.data(), thresholds.size() * 8);
        return now;
    }
};

} // namespace

int main(int count, char **arguments)
{
    const std::vector<size_t> sizes = {1,         LANES - 1, LANES + 1, RUN + 1,   BLOCK - 1,
                                       BLOCK + 1, CHUNK + 1, SMALL,     SMALL + 1, 2 * SMALL + 1};
    Scalars s{0.1, 0.01, 0, 0.5, 0, 1, 0, 0.01, 1e-4, 1, 0, 0, 0, 0, 0, 5};
    if (count > 1 && std::string(arguments[1]) == "beyond") {
        Set set({BLOCK}, s, false, 0);
        set.items[0].n++;
        Schedule(set.items, functions()).step(Threads{1}, 1);
        return 0;
    }
    const uint32_t tiny[] = {0, 1, 4}; // one of so many numbers is near the smallest normal one
    for (int mode = 0; mode < 16; mode++) {
        const bool kahan = mode & 8;
        const uint32_t some = tiny[mode % 3];
        s.decay = mode & 1, s.l2 = s.decay * 0.01;
        s.belief = mode >> 1 & 1, s.stochastic = mode >> 2 & 1;
        Set one(sizes, s, kahan, some), three(sizes, s, kahan, some), given(sizes, s, kahan, some);
        std::vector<ShardSums> sums(given.items.size()), again(given.items.size());
        Schedule(given.items, functions()).measure(Threads{3}, 3, sums.data());
        Schedule(one.items, functions()).measure(Threads{1}, 1, again.data());
        if (memcmp(sums.data(), again.data(), sums.size() * sizeof sums[0])) return 1;
        for (size_t i = 0; i < sums.size(); i++) given.items[i].sums = &sums[i];
        Schedule(one.items, functions()).step(Threads{1}, 1);
        Schedule(three.items, functions()).step(Threads{3}, 3);
        Schedule(given.items, functions()).step(Threads{3}, 3);
        if (!(one == three)) return 2;
        // Sums of shards lack the largest |d|. Its bound may lie on the other side of Limits::tiny, where
        // denormal numbers begin to matter.
        if (some != 1 && !(one == given)) return 3;
        printf("mode %d: %016llx\n", mode, (unsigned long long)one.hash());
    }
    puts("the same with one thread and with three");
    return 0;
}

// Algorithm 1 on many tensors, in parallel. This header knows nothing of torch.
//
// One thread processes a small tensor, so that its second pass finds the tensor in the core's cache.
// Free threads take the next portion of small tensors. All threads process a large tensor together:
// they first measure its chunks and then update them. Each thread gets the same chunks both times.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernel.h"

namespace apollo {

constexpr size_t PORTION = 16 * BLOCK; // elements of small tensors that a thread takes at once
constexpr size_t OVERHEAD = 256;       // fixed cost of a tensor, expressed in elements

// Returns the scalars of a tensor. With belief each tensor has its own previous threshold.
inline Scalars scalars_of(const Item &t)
{
    Scalars s = *t.scalars;
    if (s.belief != 0)
        s.previous_threshold =
            t.kind == F64 ? *(const double *)t.threshold : (double)*(const float *)t.threshold;
    return s;
}

inline void store_threshold(const Item &t, const Update &r)
{
    if (t.scalars->belief == 0) return;
    if (t.kind == F64) *(double *)t.threshold = r.threshold;
    else *(float *)t.threshold = (float)r.threshold;
}

inline ShardSums to_shard(const Sums &total)
{
    return {power_of_2(total.e), total.q4, total.k, total.most};
}

inline Sums from_shard(const ShardSums &sums)
{
    constexpr int most = Limits<double>::exponent;
    const int e = std::clamp(exponent(sums.scale, most + 1) - 1, -most, most);
    return {sums.q4, sums.k, sums.scale * sqrt(sqrt(sums.q4)), sums.largest, e};
}

// Runs one step on all tensors, or takes only their sums. Only the constructor allocates memory. The
// template parameter ParallelFor is called as parallel_for(begin, end, grain, function of a range).
class Schedule {
  public:
    Schedule(const std::vector<Item> &items, const Table &kernel) : items_(items), kernel_(kernel)
    {
        size_t elements = 0;
        for (size_t i = 0; i < items.size(); i++) {
            if (items[i].n > SMALL) {
                for (size_t at = 0; at < items[i].n; at += CHUNK) chunks_.push_back({i, at, {}});
                continue;
            }
            elements += items[i].n + OVERHEAD;
            if (elements >= PORTION) {
                portions_.push_back(i + 1);
                elements = 0;
            }
        }
        if (elements) portions_.push_back(items.size());
    }

    template <class ParallelFor> void step(const ParallelFor &parallel_for, int64_t threads)
    {
        run(parallel_for, threads, nullptr);
    }

    // Writes only to `out`, which has one element per tensor.
    template <class ParallelFor>
    void measure(const ParallelFor &parallel_for, int64_t threads, ShardSums *out)
    {
        run(parallel_for, threads, out);
    }

  private:
    struct Chunk {
        size_t item, at;
        Sums sums;
    };
    const std::vector<Item> &items_;
    const Table &kernel_;
    std::vector<Chunk> chunks_;    // chunks of the large tensors, in order
    std::vector<size_t> portions_; // end of each portion in items_; portions skip large tensors
    std::atomic<size_t> next_{0};

    template <class ParallelFor>
    void run(const ParallelFor &parallel_for, int64_t threads, ShardSums *out)
    {
        for (size_t first = 0, end; first < chunks_.size(); first = end) {
            const size_t i = chunks_[first].item;
            end = first + (items_[i].n + CHUNK - 1) / CHUNK;
            large(parallel_for, first, end, out ? out + i : nullptr);
        }
        const size_t portions = portions_.size();
        const int64_t workers = portions > 2 ? std::min<int64_t>(threads, (int64_t)portions) : 1;
        const auto work = [this, out](int64_t begin, int64_t end) {
            for (; begin < end; begin++) small(out);
        };
        if (workers > 1) parallel_for(0, workers, 1, work);
        else work(0, 1);
    }

    // Processes the chunks [first, end) of one large tensor.
    template <class ParallelFor>
    void large(const ParallelFor &parallel_for, size_t first, size_t end, ShardSums *out)
    {
        const Item &t = items_[chunks_[first].item];
        const Scalars s = scalars_of(t);
        const auto length = [&t](size_t at) { return std::min(t.n - at, CHUNK); };
        Sums total{};
        if (t.sums && !out) {
            total = from_shard(*t.sums);
        } else {
            parallel_for((int64_t)first, (int64_t)end, 1, [&](int64_t begin, int64_t stop) {
                const Flushing flushing;
                Prefetcher ahead(t, chunks_[begin].at);
                for (int64_t k = begin; k < stop; k++) {
                    const size_t at = chunks_[k].at;
                    chunks_[k].sums = kernel_.of[t.kind].measure(t, at, length(at), s, ahead);
                }
            });
            const Flushing flushing;
            for (size_t k = first; k < end; k++) add(total, chunks_[k].sums);
        }
        if (out) {
            *out = to_shard(total);
            return;
        }
        const Update r = concluded(t, s, total);
        parallel_for((int64_t)first, (int64_t)end, 1, [&](int64_t begin, int64_t stop) {
            const Flushing flushing;
            for (int64_t k = begin; k < stop; k++) {
                const size_t at = chunks_[k].at;
                kernel_.of[t.kind].apply(t, at, length(at), s, r);
            }
        });
        store_threshold(t, r);
    }

    static Update concluded(const Item &t, const Scalars &s, const Sums &total)
    {
        const Flushing flushing;
        return conclude(total, s, t.kind, t.rng_key);
    }

    // Processes portions until none is left.
    void small(ShardSums *out)
    {
        const Flushing flushing;
        for (size_t now = next_++; now < portions_.size();) {
            const size_t next = next_++;
            Prefetcher ahead;
            if (next < portions_.size())
                ahead = Prefetcher(items_.data() + start(next), items_.data() + portions_[next]);
            for (size_t i = start(now); i < portions_[now]; i++)
                if (items_[i].n <= SMALL) small(items_[i], out ? out + i : nullptr, ahead);
            now = next;
        }
    }

    size_t start(size_t portion) const { return portion ? portions_[portion - 1] : 0; }

    void small(const Item &t, ShardSums *out, Prefetcher &ahead)
    {
        const Functions &kernel = kernel_.of[t.kind];
        const Scalars s = scalars_of(t);
        Sums total{};
        if (t.sums && !out) total = from_shard(*t.sums);
        else
            for (size_t at = 0; at < t.n; at += CHUNK)
                add(total, kernel.measure(t, at, std::min(t.n - at, CHUNK), s, ahead));
        if (out) {
            *out = to_shard(total);
            return;
        }
        const Update r = conclude(total, s, t.kind, t.rng_key);
        kernel.apply(t, 0, t.n, s, r);
        store_threshold(t, r);
    }
};

} // namespace apollo

// The torch operators apollo_qn::check, step_ and measure, through PyTorch's stable ABI. The library
// needs no headers of Python and runs with every torch from 2.10 on.
//
// Nothing outlives a call. A call owns its lists, and so keeps the tensors alive whose memory it uses.

#include <optional>
#include <string>

#include "schedule.h"
#include "tensor_lists.h"

namespace {

using namespace apollo;

struct Range {
    uintptr_t start, end;
    size_t owner;
};

// The number of steps that a tensor has taken, and its rate of the last one, or null if not needed.
struct Counter {
    float *step;
    double *previous_lr;
};

// All tensors of a call, their addresses, and which of them the kernel can take.
class Tensors {
  public:
    static constexpr size_t ARGUMENTS = 8; // arguments of an operator that this class reads
    const TensorList params, grads, exp_avgs, hessian_diags, state_steps;
    const TensorList thresholds, compensations, previous_lrs; // empty if no tensor needs them

    explicit Tensors(const StableIValue *stack)
        : params(stack[0]), grads(stack[1]), exp_avgs(stack[2]), hessian_diags(stack[3]),
          state_steps(stack[4]), thresholds(stack[5]), compensations(stack[6]), previous_lrs(stack[7])
    {
    }

    size_t size() const { return params.size(); }

    void check_lengths() const
    {
        const size_t n = size();
        const auto fits = [n](const TensorList &x) { return x.size() == n; };
        const auto fits_or_empty = [&](const TensorList &x) { return !x.size() || fits(x); };
        if (!fits(grads) || !fits(exp_avgs) || !fits(hessian_diags) || !fits(state_steps) ||
            !fits_or_empty(thresholds) || !fits_or_empty(compensations) || !fits_or_empty(previous_lrs))
            refuse("apollo_qn: lists of different lengths");
    }

    // Fills `kinds`, with -1 for tensors that the kernel cannot take, and the addresses in `items`.
    void inspect(bool written)
    {
        check_lengths();
        const size_t n = size();
        kinds.assign(n, -1);
        items.assign(n, Item{});
        counters.assign(n, Counter{});
        std::vector<Range> writes, reads;
        writes.reserve(5 * n);
        reads.reserve(n);
        for (size_t i = 0; i < n; i++) {
            if (i % AT_ONCE == 0)
                for (const TensorList *list : {&params, &grads, &exp_avgs, &hessian_diags, &state_steps})
                    list->prefetch(i);
            inspect(i, written, writes, reads);
        }
        forbid_overlaps(writes, reads);
    }

    bool all_fit() const
    {
        return std::find(kinds.begin(), kinds.end(), -1) == kinds.end();
    }

    // Returns whether all counters are those of the scalars, and all tensors of a row of scalars had the
    // same rate before. The caller read only the first of them.
    bool agree() const
    {
        for (size_t i = 0; i < size(); i++) {
            if (*counters[i].step != (float)items[i].scalars->t) return false;
            const bool same_row = i && items[i].scalars == items[i - 1].scalars;
            if (same_row && previous_lr(i) != previous_lr(i - 1)) return false;
        }
        return true;
    }

    // Counts the step of each tensor and records its rate.
    void count() const
    {
        for (size_t i = 0; i < size(); i++) {
            *counters[i].step += 1;
            if (counters[i].previous_lr) *counters[i].previous_lr = items[i].scalars->rate;
        }
    }

    std::vector<int8_t> kinds;
    std::vector<Item> items;
    std::vector<Counter> counters;

  private:
    double previous_lr(size_t i) const { return counters[i].previous_lr ? *counters[i].previous_lr : 0; }

    void inspect(size_t i, bool written, std::vector<Range> &writes, std::vector<Range> &reads)
    {
        const Dtypes &known = dtypes();
        const View p(params[i], written), g(grads[i], false), m(exp_avgs[i], written);
        const View B(hessian_diags[i], written);
        const auto note = [i](std::vector<Range> &in, const View &x) {
            if (x.usable) in.push_back({(uintptr_t)x.data, (uintptr_t)x.data + x.bytes, i});
        };
        note(writes, p), note(writes, m), note(writes, B), note(reads, g);
        Item &item = items[i];
        const int kind = known.kind(p.dtype, g.dtype, m.dtype, Kinds{});
        bool fits = p.usable && g.usable && m.usable && B.usable && kind >= 0 && B.dtype == m.dtype;
        fits = fits && g.same_sizes(p) && m.same_sizes(p) && B.same_sizes(p);
        bool contiguous = fits && p.contiguous() && g.contiguous() && m.contiguous();
        contiguous = contiguous && B.contiguous();
        bool dense = fits && g.same_strides(p) && m.same_strides(p) && B.same_strides(p);
        int64_t numel = 0;
        if (thresholds.size()) {
            must(aoti_torch_get_numel(thresholds[i], &numel));
            if (numel) {
                const View x(thresholds[i], written);
                note(writes, x);
                fits = fits && x.usable && numel == 1 && x.dtype == (kind == F64 ? known.f64 : known.f32);
                item.threshold = x.data;
            }
        }
        if (compensations.size()) {
            must(aoti_torch_get_numel(compensations[i], &numel));
            if (numel) {
                const View x(compensations[i], written);
                note(writes, x);
                fits = fits && x.usable && x.dtype == p.dtype && p.dtype == known.bf16 && x.same_sizes(p);
                contiguous = contiguous && fits && x.contiguous();
                dense = dense && fits && x.same_strides(p);
                item.compensation = x.data;
            }
        }
        fits = fits && (contiguous || (dense && p.dense()));
        counters[i].step = number<float>(state_steps[i], written);
        fits = fits && counters[i].step;
        if (previous_lrs.size()) {
            must(aoti_torch_get_numel(previous_lrs[i], &numel));
            if (numel) {
                counters[i].previous_lr = number<double>(previous_lrs[i], written);
                fits = fits && counters[i].previous_lr;
            }
        }
        kinds[i] = fits ? (int8_t)kind : -1;
        item.p = p.data, item.g = g.data, item.m = m.data, item.B = B.data;
        item.n = (size_t)p.n;
        item.kind = kind;
    }

    // Refuses overlapping tensors, because the result would depend on the order of updates.
    void forbid_overlaps(std::vector<Range> &writes, const std::vector<Range> &reads)
    {
        std::sort(writes.begin(), writes.end(),
                  [](const Range &x, const Range &y) { return x.start < y.start; });
        Range furthest{0, 0, 0};
        for (Range &x : writes) {
            if (x.start < furthest.end) kinds[x.owner] = kinds[furthest.owner] = -1;
            if (x.end > furthest.end) furthest = x;
            x.end = furthest.end; // from here on: largest end of this and all earlier ranges
        }
        for (const Range &g : reads) {
            const auto after = std::lower_bound(
                writes.begin(), writes.end(), g.end,
                [](const Range &x, uintptr_t end) { return x.start < end; });
            if (after == writes.begin() || (after - 1)->end <= g.start) continue;
            std::fill(kinds.begin(), kinds.end(), (int8_t)-1);
            return;
        }
    }
};

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype)
{
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::empty(sizes, dtype, std::nullopt, cpu);
}

// Returns the memory of an argument, after checks of its type, size and device.
template <class T> const T *numbers(const Tensor &x, ScalarType dtype, int64_t count, const char *name)
{
    if (x.scalar_type() != dtype || !x.is_contiguous() || !x.is_cpu() || x.numel() != count)
        refuse(std::string("apollo_qn: ") + name + " has another type, size or device");
    return (const T *)x.const_data_ptr();
}

// The arguments after the lists: scalars, RNG keys and sums of each tensor.
class Numbers {
  public:
    Numbers(const StableIValue *stack, bool with_sums)
        : rows_(take<std::optional<Tensor>>(stack[Tensors::ARGUMENTS])),
          rng_keys_(take<std::optional<Tensor>>(stack[Tensors::ARGUMENTS + 1])),
          scalars_(take<Tensor>(stack[Tensors::ARGUMENTS + 2]))
    {
        if (with_sums) sums_ = take<std::optional<Tensor>>(stack[Tensors::ARGUMENTS + 3]);
    }

    void fill(Tensors &tensors) const
    {
        const int64_t n = (int64_t)tensors.size();
        constexpr int64_t columns = sizeof(Scalars) / sizeof(double);
        const int64_t count = scalars_.dim() == 2 && scalars_.size(1) == columns ? scalars_.size(0) : 0;
        if (n && !count) refuse("apollo_qn: scalars must be of shape [rows, 16]");
        const auto *scalars = numbers<Scalars>(scalars_, ScalarType::Double, count * columns, "scalars");
        const int64_t *rows = nullptr, *rng_keys = nullptr;
        const ShardSums *sums = nullptr;
        if (rows_) rows = numbers<int64_t>(*rows_, ScalarType::Long, n, "rows");
        if (rng_keys_)
            rng_keys = numbers<int64_t>(*rng_keys_, ScalarType::Long, n, "rng_keys");
        if (sums_) sums = numbers<ShardSums>(*sums_, ScalarType::Double, 4 * n, "sums");
        for (int64_t i = 0; i < n; i++) {
            Item &item = tensors.items[(size_t)i];
            const int64_t row = rows ? rows[i] : 0;
            if (row < 0 || row >= count) refuse("apollo_qn: a row that scalars do not have");
            item.scalars = scalars + row;
            item.rng_key = rng_keys ? (uint32_t)rng_keys[i] : 0;
            item.sums = sums && !(sums[i].scale < 0) ? sums + i : nullptr;
            if (item.scalars->belief != 0 && !item.threshold)
                refuse("apollo_qn: belief needs a threshold");
        }
    }

  private:
    std::optional<Tensor> rows_, rng_keys_, sums_;
    Tensor scalars_;
};

struct Parallel {
    template <class F> void operator()(int64_t begin, int64_t end, int64_t grain, const F &f) const
    {
        torch::stable::parallel_for(begin, end, grain, f);
    }
};

const Table &kernel()
{
    static const Table &found = functions(std::getenv("APOLLO_QN_INSTRUCTION_SET"));
    return found;
}

void check(StableIValue *stack, uint64_t, uint64_t)
{
    Tensors tensors(stack);
    tensors.inspect(false);
    const Tensor result = empty({(int64_t)tensors.size()}, ScalarType::Char);
    std::copy(tensors.kinds.begin(), tensors.kinds.end(), (int8_t *)result.mutable_data_ptr());
    stack[0] = torch::stable::detail::from(result);
}

void step_(StableIValue *stack, uint64_t, uint64_t)
{
    Tensors tensors(stack);
    const Numbers numbers(stack, true);
    tensors.inspect(true);
    bool taken = tensors.all_fit();
    if (taken) {
        numbers.fill(tensors);
        taken = tensors.agree();
    }
    if (taken) {
        Schedule(tensors.items, kernel()).step(Parallel{}, torch::stable::get_num_threads());
        tensors.count();
    }
    stack[0] = torch::stable::detail::from(taken);
}

void measure(StableIValue *stack, uint64_t, uint64_t)
{
    Tensors tensors(stack);
    const Numbers numbers(stack, false);
    tensors.inspect(false);
    if (!tensors.all_fit()) refuse("apollo_qn: measure() of a tensor that check() refuses");
    numbers.fill(tensors);
    const Tensor result = empty({(int64_t)tensors.size(), 4}, ScalarType::Double);
    Schedule(tensors.items, kernel())
        .measure(Parallel{}, torch::stable::get_num_threads(), (ShardSums *)result.mutable_data_ptr());
    stack[0] = torch::stable::detail::from(result);
}

// Returns whether a tensor is a lazy negation or conjugate. For such a tensor torch would pass a copy
// to an operator, so the kernel does not take it.
bool lazy(AtenTensorHandle x)
{
    for (const char *name : {"aten::is_neg", "aten::is_conj"}) {
        AtenTensorHandle copy{};
        must(aoti_torch_new_tensor_handle(x, &copy));
        StableIValue value = torch::stable::detail::from(copy);
        must(torch_call_dispatcher(name, "", &value, TORCH_ABI_VERSION));
        if (take<bool>(value)) return true;
    }
    return false;
}

void check_lazy(StableIValue *stack, uint64_t, uint64_t)
{
    Tensors tensors(stack);
    tensors.inspect(false);
    const Tensor result = empty({(int64_t)tensors.size()}, ScalarType::Char);
    const TensorList *const lists[] = {&tensors.params,        &tensors.grads,
                                       &tensors.exp_avgs,      &tensors.hessian_diags,
                                       &tensors.state_steps,   &tensors.thresholds,
                                       &tensors.compensations, &tensors.previous_lrs};
    for (const TensorList *list : lists)
        for (size_t i = 0; i < list->size(); i++)
            if (lazy((*list)[i])) tensors.kinds[i] = -1;
    std::copy(tensors.kinds.begin(), tensors.kinds.end(), (int8_t *)result.mutable_data_ptr());
    stack[0] = torch::stable::detail::from(result);
}

void step_lazy(StableIValue *stack, uint64_t, uint64_t)
{
    const Tensors tensors(stack);
    const Numbers numbers(stack, true);
    stack[0] = torch::stable::detail::from(false);
}

} // namespace

#define LISTS(p, m, B, s, t, c, r)                                                                 \
    "(Tensor" p "[] params, Tensor[] grads, Tensor" m "[] exp_avgs, Tensor" B "[] hessian_diags, "  \
    "Tensor" s "[] state_steps, Tensor" t "[] thresholds, Tensor" c "[] compensations, "            \
    "Tensor" r "[] previous_lrs"
#define NUMBERS ", Tensor? rows, Tensor? rng_keys, Tensor scalars"

STABLE_TORCH_LIBRARY(apollo_qn, library)
{
    library.def("check" LISTS("", "", "", "", "", "", "") ") -> Tensor");
    library.def("step_" LISTS("(a!)", "(b!)", "(c!)", "(d!)", "(e!)", "(f!)", "(g!)") NUMBERS
                ", Tensor? sums) -> bool");
    library.def("measure" LISTS("", "", "", "", "", "", "") NUMBERS ") -> Tensor");
}

// Registered for every device and layout, so that check() can refuse any tensor.
STABLE_TORCH_LIBRARY_IMPL(apollo_qn, CompositeExplicitAutograd, library)
{
    library.impl("check", check);
    library.impl("step_", step_);
    library.impl("measure", measure);
}

STABLE_TORCH_LIBRARY_IMPL(apollo_qn, Negative, library)
{
    library.impl("check", check_lazy);
    library.impl("step_", step_lazy);
}

STABLE_TORCH_LIBRARY_IMPL(apollo_qn, Conjugate, library)
{
    library.impl("check", check_lazy);
    library.impl("step_", step_lazy);
}

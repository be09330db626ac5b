// Lists of tensors that a call of an operator owns, and the type, shape and memory of each tensor.
// They are read through the C interface, because torch::stable::Tensor allocates memory for each tensor.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernel.h"

namespace apollo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> T take(StableIValue value) { return torch::stable::detail::to<T>(value); }

[[noreturn]] inline void refuse(const std::string &message) { throw std::runtime_error(message); }

inline void must(AOTITorchError error)
{
    if (error != AOTI_TORCH_SUCCESS) refuse("apollo_qn: a function of libtorch failed");
}

struct Dtypes {
    int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64();
    int32_t bf16 = aoti_torch_dtype_bfloat16(), cpu = aoti_torch_device_type_cpu();
    int32_t strided = aoti_torch_layout_strided();

    template <class T> int32_t of() const
    {
        return std::is_same_v<T, float> ? f32 : std::is_same_v<T, double> ? f64 : bf16;
    }
    template <class... K> int kind(int32_t p, int32_t g, int32_t m, std::tuple<K...>) const
    {
        int i = 0, found = -1;
        (((p == of<typename K::P>() && g == of<typename K::G>() && m == of<typename K::M>())
              ? (void)(found = i)
              : (void)0,
          i++),
         ...);
        return found;
    }
};

inline const Dtypes &dtypes()
{
    static const Dtypes found;
    return found;
}

constexpr size_t AT_ONCE = 32; // tensors that TensorList::prefetch reads

// A list of tensors, owned by the call.
class TensorList {
  public:
    explicit TensorList(StableIValue value) : list_(take<StableListHandle>(value))
    {
        size_t size = 0;
        must(torch_list_size(list_, &size));
        tensors_.reserve(size);
        for (size_t i = 0; i < size; i++) {
            StableIValue item{};
            must(torch_list_get_item(list_, i, &item));
            tensors_.push_back(take<AtenTensorHandle>(item));
        }
    }
    TensorList(const TensorList &) = delete;
    TensorList &operator=(const TensorList &) = delete;
    ~TensorList()
    {
        for (size_t i = 0; i < size(); i++) {
            if (i % AT_ONCE == 0) prefetch(i);
            (void)aoti_torch_delete_tensor_object(tensors_[i]);
        }
        (void)torch_delete_list(list_);
    }

    size_t size() const { return tensors_.size(); }
    AtenTensorHandle operator[](size_t i) const { return tensors_[i]; }

    // Reads layout, dimension and storage size of the tensors from `begin` on, to bring all cache lines of
    // their descriptions into the cache. The elements of all tensors have displaced them since the last
    // step. In a loop as short as this one the processor waits for many cache misses at the same time.
    void prefetch(size_t begin) const
    {
        int32_t layout = 0;
        int64_t dim = 0, storage = 0;
        for (size_t i = begin; i < std::min(begin + AT_ONCE, size()); i++) {
            (void)aoti_torch_get_dim(tensors_[i], &dim);
            if (!aoti_torch_get_layout(tensors_[i], &layout) && layout == dtypes().strided)
                (void)aoti_torch_get_storage_size(tensors_[i], &storage);
        }
    }

  private:
    StableListHandle list_;
    std::vector<AtenTensorHandle> tensors_;
};

// Type, shape and memory of a tensor. `usable` is true for a strided tensor in allocated CPU memory.
struct View {
    bool usable = false;
    int32_t dtype = 0;
    int64_t dim = 0, n = 0, *sizes = nullptr, *strides = nullptr;
    char *data = nullptr;
    size_t item = 0, bytes = 0; // size of an element; size from the first to the last element

    View(AtenTensorHandle x, bool written)
    {
        const Dtypes &known = dtypes();
        int32_t device = 0, layout = 0;
        int64_t storage = 0, offset = 0;
        if (aoti_torch_get_device_type(x, &device) || device != known.cpu) return;
        if (aoti_torch_get_layout(x, &layout) || layout != known.strided) return;
        if (aoti_torch_get_dtype(x, &dtype) || aoti_torch_get_dim(x, &dim)) return;
        if (aoti_torch_get_sizes(x, &sizes) || aoti_torch_get_strides(x, &strides)) return;
        if (aoti_torch_get_storage_size(x, &storage)) return;
        if (aoti_torch_get_storage_offset(x, &offset)) return;
        item = dtype == known.f32 ? 4 : dtype == known.bf16 ? 2 : aoti_torch_dtype_element_size(dtype);
        int64_t last = 0;
        n = 1;
        for (int64_t k = 0; k < dim; k++) {
            n *= sizes[k];
            last += (sizes[k] - 1) * strides[k];
        }
        if (n == 0) return;
        bytes = (size_t)(last + 1) * item;
        if ((size_t)offset * item + bytes > (size_t)storage) return; // freed by its owner
        const void *constant = nullptr;
        void *mutable_data = nullptr;
        if (written ? torch_get_mutable_data_ptr(x, &mutable_data)
                    : torch_get_const_data_ptr(x, &constant))
            return;
        data = (char *)(written ? mutable_data : constant);
        usable = data != nullptr;
    }

    bool same_sizes(const View &x) const { return same(x, sizes, x.sizes); }
    bool same_strides(const View &x) const { return same(x, strides, x.strides); }

    bool contiguous() const
    {
        int64_t expected = 1;
        for (int64_t k = dim - 1; k >= 0; k--) {
            if (sizes[k] != 1 && strides[k] != expected) return false;
            expected *= sizes[k];
        }
        return true;
    }

    // Returns whether the tensor is contiguous in some order of its dimensions.
    bool dense() const
    {
        int64_t expected = 1, found = 0;
        for (int64_t k = 0; k < dim; k++) found += sizes[k] == 1;
        while (found < dim) {
            int64_t k = 0;
            while (k < dim && (sizes[k] == 1 || strides[k] != expected)) k++;
            if (k == dim) return false;
            expected *= sizes[k];
            found++;
        }
        return true;
    }

  private:
    bool same(const View &x, const int64_t *mine, const int64_t *others) const
    {
        if (dim != x.dim) return false;
        for (int64_t k = 0; k < dim; k++)
            if (mine[k] != others[k]) return false;
        return true;
    }
};

// Returns the address of the single number in a CPU tensor, or null if the tensor is anything else.
template <class T> T *number(AtenTensorHandle x, bool written)
{
    const View view(x, written);
    return view.usable && view.n == 1 && view.dtype == dtypes().of<T>() ? (T *)view.data : nullptr;
}

} // namespace apollo

// SPDX-License-Identifier: Apache-2.0
// Checks of ops over lists of tensors, which look at each tensor once, and copies where a tensor lies in memory
// otherwise than its weight.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "core/storage.h"
#include "core/tensor.h"

namespace fastflat {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

inline Storage storage_of_code(const char* op, const char* name, int32_t code) {
  static const int32_t codes[storages] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                          aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  for (int s = 0; s < storages; ++s) {
    if (codes[s] == code) return static_cast<Storage>(s);
  }
  STD_TORCH_CHECK(false, "fastflat::", op, ": ", name, " must be float32, bfloat16, float16 or float64");
}

// What there is to know about a tensor; valid while it lives. A list of a thousand asks for it thousands of times a
// step, hence the C functions underneath torch::stable::Tensor.
struct View {
  int64_t dim, numel;
  const int64_t *sizes, *strides;
  Storage storage;
  int32_t device_type, device_index;

  static View of(const char* op, const char* name, const Tensor& t) {
    View v{};
    int64_t *sizes = nullptr, *strides = nullptr;
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &v.dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t.get(), &v.numel));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &v.device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &v.device_index));
    v.sizes = sizes;
    v.strides = strides;
    v.storage = storage_of_code(op, name, code);
    return v;
  }

  bool same_device(const View& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  bool same_shape(const View& other) const {
    return dim == other.dim && std::memcmp(sizes, other.sizes, dim * sizeof(int64_t)) == 0;
  }
  // Of a tensor of the same shape.
  bool same_layout(const View& other) const {
    for (int64_t d = 0; d < dim; ++d) {
      if (strides[d] != other.strides[d] && sizes[d] != 1) return false;
    }
    return true;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim; d-- > 0; expected *= sizes[d]) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
    }
    return true;
  }
};

inline void* written(const Tensor& t) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(t.get(), &data));
  return data;
}

// Streams are not const: those that are only read are told by their place in a call.
inline void* only_read(const Tensor& t) {
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(t.get(), &data));
  return const_cast<void*>(data);
}

inline void check_numbers(const char* op, const char* name, const Tensor& t, int64_t numbers, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == numbers, "fastflat::", op,
                  ": ", name, " must be contiguous float64 with ", numbers, " values");
  STD_TORCH_CHECK(t.device() == like.device(), "fastflat::", op, ": ", name, " must be on the device of the tensors");
}

// Instead of a list of many small tensors a caller may give one int64 tensor [3, T] on the CPU: their addresses,
// numbers of elements and storage types. It vouches for them: alive, contiguous, of the shapes that a list would be
// checked for.
inline bool is_table(const Tensors& ts) {
  return ts.size() == 1 && ts[0].scalar_type() == ScalarType::Long && ts[0].dim() == 2 && ts[0].size(0) == 3 &&
         ts[0].is_contiguous() && ts[0].is_cpu();
}

class Table {
 public:
  explicit Table(const Tensor& table)
      : at_(static_cast<const int64_t*>(table.const_data_ptr())), count_(table.size(1)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(table.get(), &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(table.get(), &device_index_));
  }

  size_t count() const { return count_; }
  void* data(size_t t) const { return reinterpret_cast<void*>(at_[t]); }
  View view(const char* op, const char* name, size_t t) const {
    static const int64_t stride = 1;
    const int64_t storage = at_[2 * count_ + t];
    STD_TORCH_CHECK(storage >= 0 && storage < storages && at_[count_ + t] >= 0, "fastflat::", op, ": ", name,
                    " must be a table of addresses, numbers of elements and storage types");
    return {1, at_[count_ + t], &at_[count_ + t], &stride, static_cast<Storage>(storage), device_type_, device_index_};
  }

 private:
  const int64_t* at_;
  size_t count_;
  int32_t device_type_ = 0, device_index_ = 0;
};

// A list of weights and the lists that go with it.
class TensorLists {
 public:
  // `changed`: whether the op writes the weights.
  TensorLists(const char* op, const char* name, const Tensors& ws, bool changed, bool tables = false)
      : op_(op), count_(ws.size()), tables_(tables) {
    if (tables_ && is_table(ws)) {
      read_table(name, Table(ws[0]));
      return;
    }
    views_.reserve(count_);
    data_.reserve(count_);
    for (const Tensor& w : ws) {
      View view = View::of(op, name, w);
      STD_TORCH_CHECK(views_.empty() || view.same_device(views_[0]), "fastflat::", op, ": ", name,
                      " must be on one device");
      const Tensor* at = &w;
      if (!view.contiguous() && !is_dense(w)) {
        at = &copies_.emplace_back(torch::stable::clone(w));
        view = View::of(op, name, *at);
        if (changed) back_.push_back({&w, at});
      }
      views_.push_back(view);
      data_.push_back(changed ? written(*at) : only_read(*at));
    }
  }

  size_t count() const { return count_; }
  const View& view(size_t t) const { return views_[t]; }
  void* data(size_t t) const { return data_[t]; }

  enum Kind { partner, state, copy };  // any type of the same arithmetic; the compute type; a type that w converts to

  // set(t, data, storage) for each tensor of a list: those of the shape of its weight, in its layout.
  template <class Set>
  void add(const char* name, const Tensors& list, Kind kind, bool changed, bool may_be_empty, const Set& set) {
    const std::optional<Table> table = tables_ && is_table(list) ? std::optional<Table>(list[0]) : std::nullopt;
    const size_t size = table ? table->count() : list.size();
    STD_TORCH_CHECK(size == count_ || (may_be_empty && size == 0), "fastflat::", op_, ": ", name,
                    " must be as long as the list of weights, ", count_, may_be_empty ? ", or empty" : "", ", got ",
                    size);
    for (size_t t = 0; t < size; ++t) {
      const View &like = views_[t], view = table ? table->view(op_, name, t) : View::of(op_, name, list[t]);
      STD_TORCH_CHECK(view.same_shape(like), "fastflat::", op_, ": ", name,
                      " must have the shape of the weight (tensor ", t, ")");
      STD_TORCH_CHECK(view.same_device(like), "fastflat::", op_, ": ", name,
                      " must be on the device of the weight (tensor ", t, ")");
      STD_TORCH_CHECK((view.storage == f64) == (like.storage == f64), "fastflat::", op_, ": ", name,
                      " must be float64 exactly where the weight is (tensor ", t, ")");
      STD_TORCH_CHECK(kind != state || view.storage == (like.storage == f64 ? f64 : f32), "fastflat::", op_, ": ", name,
                      " must be float32, or float64 where the weight is (tensor ", t, ")");
      STD_TORCH_CHECK(kind != copy || view.storage == like.storage || like.storage == f32, "fastflat::", op_, ": ",
                      name, " must have the dtype of the weight, or 16 bits for a float32 one (tensor ", t, ")");
      if (table) {
        set(t, table->data(t), view.storage);
        continue;
      }
      const Tensor* at = &list[t];
      if (!view.same_layout(like)) {
        at = &copies_.emplace_back(laid_out(list[t], like));
        if (changed) back_.push_back({&list[t], at});
      }
      set(t, changed ? written(*at) : only_read(*at), view.storage);
    }
  }

  // The places of a backup where the weights are kept; null pointers without one.
  std::vector<void*> places(const std::optional<Tensor>& backup, const Integers& at, bool changed) const {
    std::vector<void*> places(count_, nullptr);
    STD_TORCH_CHECK(at.size() == (backup ? count_ : 0), "fastflat::", op_, ": at must be ",
                    backup ? "as long as the list of weights, " : "empty without a backup, ", backup ? count_ : 0,
                    ", got ", at.size());
    if (!backup || count_ == 0) return places;
    STD_TORCH_CHECK(backup->scalar_type() == ScalarType::Byte && backup->is_contiguous(), "fastflat::", op_,
                    ": backup must be contiguous uint8");
    check_device("backup", *backup);
    const int64_t size = backup->numel();
    char* base = static_cast<char*>(changed ? written(*backup) : only_read(*backup));
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(base) % 8 == 0, "fastflat::", op_,
                    ": backup must begin on a multiple of 8 bytes");
    for (size_t t = 0; t < count_; ++t) {
      const int64_t bytes = views_[t].numel * storage_bytes(views_[t].storage);
      STD_TORCH_CHECK(at[t] >= 0 && at[t] % 64 == 0 && at[t] <= size - bytes, "fastflat::", op_,
                      ": at must be a multiple of 64 inside the backup, got ", at[t]);
      places[t] = base + at[t];
    }
    return places;
  }

  // The state of the draws, or null; set(t, first) tells where the random elements of each tensor begin.
  template <class Set>
  const int64_t* draw(const std::optional<Tensor>& random, const Set& set) const {
    if (!random) return nullptr;
    STD_TORCH_CHECK(random->scalar_type() == ScalarType::Long && random->numel() == 2 && random->is_contiguous(),
                    "fastflat::", op_, ": state must be int64 [2]");
    check_device("state", *random);
    int64_t first = 0;
    for (size_t t = 0; t < count_; ++t) {
      set(t, first);
      first += (views_[t].numel + 7) / 8 * 8;
    }
    return static_cast<const int64_t*>(random->const_data_ptr());
  }

  // One value for all, or one a tensor, below `limit`.
  int64_t value(const char* name, const Integers& values, size_t t, int64_t limit) const {
    STD_TORCH_CHECK(values.size() == 1 || values.size() == count_, "fastflat::", op_, ": ", name,
                    " must hold one value, or one a tensor, ", count_, ", got ", values.size());
    const int64_t v = values[values.size() == 1 ? 0 : t];
    STD_TORCH_CHECK(v >= 0 && v < limit, "fastflat::", op_, ": ", name, " must lie in [0, ", limit - 1, "], got ", v);
    return v;
  }

  // Copies that were changed go back to their tensors.
  void finish() {
    for (const auto& [to, from] : back_) torch::stable::copy_(const_cast<Tensor&>(*to), *from);
  }

 private:
  void read_table(const char* name, const Table& table) {
    count_ = table.count();
    views_.reserve(count_);
    data_.reserve(count_);
    for (size_t t = 0; t < count_; ++t) {
      views_.push_back(table.view(op_, name, t));
      data_.push_back(table.data(t));
    }
  }

  void check_device(const char* name, const Tensor& t) const {
    if (count_ == 0) return;
    int32_t type = 0, index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    STD_TORCH_CHECK(type == views_[0].device_type && index == views_[0].device_index, "fastflat::", op_, ": ", name,
                    " must be on the device of the weights");
  }

  static Tensor laid_out(const Tensor& t, const View& like) {
    Tensor copy = empty_strided(t, like.sizes, like.strides, like.dim, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }

  const char* op_;
  size_t count_;
  bool tables_;
  std::vector<View> views_;
  std::vector<void*> data_;
  std::deque<Tensor> copies_;  // where they are does not change
  std::vector<std::pair<const Tensor*, const Tensor*>> back_;
};

}  // namespace fastflat

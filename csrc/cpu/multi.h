// SPDX-License-Identifier: Apache-2.0
// Skeleton of ops over a list of tensors: their checks, which look at each tensor once, and one parallel region for the
// whole list, in units of similar size. Sums are formed unit by unit: their order depends on the shapes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <vector>

#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/stream.h"

namespace fastflat::cpu {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// Elements of a unit: a multiple of the elements of a random block and of a stage.
inline constexpr int64_t list_unit = 32768;
// Bytes of a list beyond which written-only streams bypass the caches: more than those of a core and its share hold.
inline constexpr int64_t beyond_caches = int64_t{24} << 20;

inline Storage storage_of_code(const char* op, const char* name, int32_t code) {
  static const int32_t codes[storages] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                          aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  for (int s = 0; s < storages; ++s) {
    if (codes[s] == code) return static_cast<Storage>(s);
  }
  STD_TORCH_CHECK(false, "fastflat::", op, ": ", name, " must be float32, bfloat16, float16 or float64");
}

inline int64_t storage_bytes(Storage s) { return s == f64 ? 8 : s == f32 ? 4 : 2; }

// What there is to know about a tensor; valid while it lives. A list of a thousand asks for it thousands of times a
// step, hence the C functions underneath torch::stable::Tensor.
struct View {
  int64_t dim, numel;
  const int64_t *sizes, *strides;
  Storage storage;

  static View of(const char* op, const char* name, const Tensor& t) {
    View v{};
    int64_t *sizes = nullptr, *strides = nullptr;
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &v.dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t.get(), &v.numel));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
    v.sizes = sizes;
    v.strides = strides;
    v.storage = storage_of_code(op, name, code);
    return v;
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

struct ListUnit {
  int64_t tensor, begin, end;
  int64_t start;  // elements of the list before it
};

class ListWork {
 public:
  explicit ListWork(const std::vector<View>& like) {
    units_.reserve(like.size());
    for (size_t t = 0; t < like.size(); ++t) {
      const int64_t n = like[t].numel;
      for (int64_t begin = 0; begin < n; begin += list_unit) {
        const int64_t end = std::min(n, begin + list_unit);
        units_.push_back({static_cast<int64_t>(t), begin, end, total_});
        total_ += end - begin;
      }
    }
  }

  const std::vector<ListUnit>& units() const { return units_; }

  // body(index of the unit); a unit belongs to the thread in whose share its first element lies. `backwards` starts
  // with what a pass before this one read last, which the caches may still hold.
  template <class Body>
  void run(const Body& body, bool backwards = false) const {
    const auto share = [&](int64_t begin, int64_t end) {
      const auto before = [](const ListUnit& u, int64_t position) { return u.start < position; };
      const auto first = std::lower_bound(units_.begin(), units_.end(), begin, before) - units_.begin();
      const auto last = std::lower_bound(units_.begin(), units_.end(), end, before) - units_.begin();
      for (auto i = first; i < last; ++i) body(backwards ? first + last - 1 - i : i);
    };
    if (total_ == 0) return;
    if (total_ <= list_unit) return share(0, total_);
    torch::stable::parallel_for(0, total_, list_unit, share);
  }

 private:
  std::vector<ListUnit> units_;
  int64_t total_ = 0;
};

// Sums of the units of each of `count` tensors, in their order, to a new tensor [T, 3].
inline Tensor gather_sums(const Tensor& like, size_t count, const ListWork& work, const std::vector<double>& of_units) {
  Tensor sums = empty_dense(like, {static_cast<int64_t>(count), 3}, ScalarType::Double);
  double* to = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(to, 3 * count, 0.0);
  for (size_t i = 0; i < work.units().size(); ++i) {
    for (int k = 0; k < 3; ++k) to[3 * work.units()[i].tensor + k] += of_units[3 * i + k];
  }
  return sums;
}

inline void check_numbers(const char* op, const char* name, const Tensor& t, int64_t numbers) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == numbers, "fastflat::", op,
                  ": ", name, " must be contiguous float64 with ", numbers, " values");
}

// A list of weights, the lists that go with it, and copies where one of them lies in memory otherwise than its weight.
class Lists {
 public:
  // `changed`: whether the op writes the weights.
  Lists(const char* op, const char* name, const Tensors& ws, bool changed) : op_(op), count_(ws.size()) {
    views_.reserve(count_);
    weights_.reserve(count_);
    for (const Tensor& w : ws) {
      View view = View::of(op, name, w);
      bytes_ += view.numel * storage_bytes(view.storage);
      const Tensor* at = &w;
      if (!view.contiguous() && !is_dense(w)) {
        at = &copies_.emplace_back(torch::stable::clone(w));
        view = View::of(op, name, *at);
        if (changed) back_.push_back({&w, at});
      }
      views_.push_back(view);
      weights_.push_back({changed ? written(*at) : only_read(*at), view.storage, false});
    }
  }

  size_t count() const { return count_; }
  const std::vector<View>& views() const { return views_; }
  const Stream& weight(size_t t) const { return weights_[t]; }
  bool is_double(size_t t) const { return views_[t].storage == f64; }
  bool beyond() const { return bytes_ > beyond_caches; }

  enum Kind { partner, state, copy };  // any type of the same arithmetic; the compute type; a type that w converts to

  // set(t, stream) for each tensor of a list: those of the shape of its weight, in its layout.
  template <class Set>
  void add(const char* name, const Tensors& list, Kind kind, bool changed, bool may_be_empty, const Set& set) {
    STD_TORCH_CHECK(list.size() == count_ || (may_be_empty && list.empty()), "fastflat::", op_, ": ", name,
                    " must be as long as the list of weights, ", count_, may_be_empty ? ", or empty" : "", ", got ",
                    list.size());
    for (size_t t = 0; t < list.size(); ++t) {
      const View &like = views_[t], view = View::of(op_, name, list[t]);
      STD_TORCH_CHECK(view.same_shape(like), "fastflat::", op_, ": ", name,
                      " must have the shape of the weight (tensor ", t, ")");
      STD_TORCH_CHECK((view.storage == f64) == (like.storage == f64), "fastflat::", op_, ": ", name,
                      " must be float64 exactly where the weight is (tensor ", t, ")");
      STD_TORCH_CHECK(kind != state || view.storage == (like.storage == f64 ? f64 : f32), "fastflat::", op_, ": ", name,
                      " must be float32, or float64 where the weight is (tensor ", t, ")");
      STD_TORCH_CHECK(kind != copy || view.storage == like.storage || like.storage == f32, "fastflat::", op_, ": ",
                      name, " must have the dtype of the weight, or 16 bits for a float32 one (tensor ", t, ")");
      const Tensor* at = &list[t];
      if (!view.same_layout(like)) {
        at = &copies_.emplace_back(laid_out(list[t], like));
        if (changed) back_.push_back({&list[t], at});
      }
      set(t, Stream{changed ? written(*at) : only_read(*at), view.storage, false});
    }
  }

  // The places of a backup where the weights are kept; null pointers without one.
  std::vector<char*> places(const std::optional<Tensor>& backup, const Integers& at, bool changed) const {
    std::vector<char*> places(count_, nullptr);
    STD_TORCH_CHECK(at.size() == (backup ? count_ : 0), "fastflat::", op_, ": at must be ",
                    backup ? "as long as the list of weights, " : "empty without a backup, ", backup ? count_ : 0,
                    ", got ", at.size());
    if (!backup) return places;
    STD_TORCH_CHECK(backup->scalar_type() == ScalarType::Byte && backup->is_contiguous(), "fastflat::", op_,
                    ": backup must be contiguous uint8");
    const int64_t size = backup->numel();
    char* base = static_cast<char*>(changed ? written(*backup) : only_read(*backup));
    for (size_t t = 0; t < count_; ++t) {
      const int64_t bytes = views_[t].numel * storage_bytes(views_[t].storage);
      STD_TORCH_CHECK(at[t] >= 0 && at[t] % 64 == 0 && at[t] <= size - bytes, "fastflat::", op_,
                      ": at must be a multiple of 64 inside the backup, got ", at[t]);
      places[t] = base + at[t];
    }
    return places;
  }

  // draws(t, ...) for each tensor: where its random elements begin.
  template <class Set>
  void draw(const std::optional<Tensor>& random, const Set& set) const {
    if (!random) return;
    STD_TORCH_CHECK(random->scalar_type() == ScalarType::Long && random->numel() == 2 && random->is_contiguous(),
                    "fastflat::", op_, ": state must be int64 [2]");
    const int64_t* state = static_cast<const int64_t*>(random->const_data_ptr());
    int64_t start = 0;
    for (size_t t = 0; t < count_; ++t) {
      set(t, StreamDraws{state, start});
      start += (views_[t].numel + 7) / 8 * 8;
    }
  }

  // One value for all, or one a tensor.
  int64_t value(const char* name, const Integers& values, size_t t) const {
    STD_TORCH_CHECK(values.size() == 1 || values.size() == count_, "fastflat::", op_, ": ", name,
                    " must hold one value, or one a tensor, ", count_, ", got ", values.size());
    return values[values.size() == 1 ? 0 : t];
  }

  // Copies that were changed go back to their tensors.
  void finish() {
    for (const auto& [to, from] : back_) torch::stable::copy_(const_cast<Tensor&>(*to), *from);
  }

 private:
  static Tensor laid_out(const Tensor& t, const View& like) {
    Tensor copy = empty_strided(t, like.sizes, like.strides, like.dim, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }

  const char* op_;
  size_t count_;
  std::vector<View> views_;
  std::vector<Stream> weights_;
  std::deque<Tensor> copies_;  // where they are does not change
  std::vector<std::pair<const Tensor*, const Tensor*>> back_;
  int64_t bytes_ = 0;
};

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// Skeleton of ops over a list of tensors: one parallel region for the whole list, in units of similar size. Sums are
// formed unit by unit: their order depends on the shapes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/lists.h"
#include "cpu/stream.h"

namespace fastflat::cpu {

// Elements of a unit: a multiple of the elements of a random block and of a stage.
inline constexpr int64_t list_unit = 32768;
// Bytes of a list beyond which written-only streams bypass the caches: more than those of a core and its share hold.
inline constexpr int64_t beyond_caches = int64_t{24} << 20;

// The lists of an op, as streams.
class Lists : public TensorLists {
 public:
  Lists(const char* op, const char* name, const Tensors& ws, bool changed) : TensorLists(op, name, ws, changed, true) {}

  Stream weight(size_t t) const { return {data(t), view(t).storage, false}; }
  bool is_double(size_t t) const { return view(t).storage == f64; }

  // Whether the weights are more than the caches hold.
  bool beyond() const {
    int64_t bytes = 0;
    for (size_t t = 0; t < count(); ++t) bytes += view(t).numel * storage_bytes(view(t).storage);
    return bytes > beyond_caches;
  }
};

struct ListUnit {
  int64_t tensor, begin, end;
  int64_t start;  // elements of the list before it
};

class ListWork {
 public:
  explicit ListWork(const TensorLists& lists) {
    units_.reserve(lists.count());
    for (size_t t = 0; t < lists.count(); ++t) {
      const int64_t n = lists.view(t).numel;
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

}  // namespace fastflat::cpu

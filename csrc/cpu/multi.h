// SPDX-License-Identifier: Apache-2.0
// Skeleton of ops over a list of tensors: one parallel region for the whole list, in units of similar size. Sums are
// formed unit by unit, so that their order depends on the shapes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/stream.h"

namespace fastflat::cpu {

using Tensors = std::vector<Tensor>;

// Elements of a unit: a multiple of the elements of a random block and of a stage.
inline constexpr int64_t list_unit = 32768;
// Bytes of a list beyond which written-only streams bypass the caches: more than those of a core and its share hold.
inline constexpr int64_t beyond_caches = int64_t{24} << 20;

struct ListUnit {
  int64_t tensor, begin, end;
  int64_t start;  // elements of the list before it
};

class ListWork {
 public:
  explicit ListWork(const Tensors& like) {
    units_.reserve(like.size());
    for (size_t t = 0; t < like.size(); ++t) {
      const int64_t n = like[t].numel();
      for (int64_t begin = 0; begin < n; begin += list_unit) {
        const int64_t end = std::min(n, begin + list_unit);
        units_.push_back({static_cast<int64_t>(t), begin, end, total_});
        total_ += end - begin;
      }
    }
  }

  const std::vector<ListUnit>& units() const { return units_; }
  int64_t total() const { return total_; }

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

// Sums of the units of each tensor, in their order, to a new tensor [T, 3].
inline Tensor gather_sums(const Tensors& like, const ListWork& work, const std::vector<double>& of_units) {
  Tensor sums = empty_dense(like[0], {static_cast<int64_t>(like.size()), 3}, ScalarType::Double);
  double* to = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(to, 3 * like.size(), 0.0);
  for (size_t i = 0; i < work.units().size(); ++i) {
    for (int k = 0; k < 3; ++k) to[3 * work.units()[i].tensor + k] += of_units[3 * i + k];
  }
  return sums;
}

// A tensor that kernels change in the layout of `like`: itself, or a copy that finish() writes back.
class Changed {
 public:
  Changed(const Tensor& t, const Tensor& like) : original_(t), work_(in_layout_of(t, like)) {
    copied_ = work_.get() != t.get();
  }
  explicit Changed(const Tensor& t) : original_(t), work_(is_dense(t) ? t : torch::stable::clone(t)) {
    copied_ = work_.get() != t.get();
  }

  const Tensor& tensor() const { return work_; }
  void finish() {
    if (copied_) torch::stable::copy_(original_, work_);
  }

 private:
  Tensor original_, work_;
  bool copied_;
};

inline Stream stream_of(const char* op, const char* name, const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), storage_of(op, name, t.scalar_type()), false};
}

inline void check_lengths(const char* op, const char* name, size_t length, size_t want, bool may_be_empty) {
  STD_TORCH_CHECK(length == want || (may_be_empty && length == 0), "fastflat::", op, ": ", name, " must be as long as ",
                  "the list of weights, ", want, may_be_empty ? ", or empty" : "", ", got ", length);
}

// The partner of weight t has its shape, and its compute type.
inline void check_partner(const char* op, const char* name, const Tensor& p, const Tensor& w) {
  check_same_shape(op, name, p, w);
  STD_TORCH_CHECK(compute_type(p.scalar_type()) == compute_type(w.scalar_type()), "fastflat::", op, ": ", name,
                  " must be float64 exactly where the weight is");
}

// States are kept in the compute type.
inline void check_state(const char* op, const char* name, const Tensor& p, const Tensor& w) {
  check_same_shape(op, name, p, w);
  STD_TORCH_CHECK(p.scalar_type() == compute_type(w.scalar_type()), "fastflat::", op, ": ", name,
                  " must be float32 (float64 for float64 weights)");
}

inline void check_numbers(const char* op, const char* name, const Tensor& t, int64_t numbers) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == numbers, "fastflat::", op,
                  ": ", name, " must be contiguous float64 with ", numbers, " values");
}

inline const int64_t* random_state(const char* op, const std::optional<Tensor>& state) {
  if (!state) return nullptr;
  STD_TORCH_CHECK(state->scalar_type() == ScalarType::Long && state->numel() == 2 && state->is_contiguous(),
                  "fastflat::", op, ": state must be int64 [2]");
  return static_cast<const int64_t*>(state->const_data_ptr());
}

// Where the random elements of each tensor begin.
inline std::vector<int64_t> random_starts(const Tensors& ws) {
  std::vector<int64_t> starts;
  starts.reserve(ws.size());
  int64_t next = 0;
  for (const Tensor& w : ws) {
    starts.push_back(next);
    next += (w.numel() + 7) / 8 * 8;
  }
  return starts;
}

}  // namespace fastflat::cpu

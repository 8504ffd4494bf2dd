// SPDX-License-Identifier: Apache-2.0
// Checks of the ops over tangents, for the glue of every device: the only ones that these ops have.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "core/checks.h"
#include "core/storage.h"
#include "math/tangents.h"

namespace fastflat {

using MaybeTensor = std::optional<Tensor>;

inline const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// One copy of the code that forms texts.
__attribute__((noinline, cold)) inline void refuse(const char* op, const std::string& text) {
  STD_TORCH_CHECK(false, "fastflat::", op, ": ", text);
}

inline void require(bool right, const char* op, const char* text) {
  if (!right) refuse(op, text);
}

__attribute__((noinline)) inline Tensor beside(const Tensor& like, const std::vector<int64_t>& sizes,
                                               ScalarType dtype) {
  return empty_dense(like, sizes, dtype);
}

// Tensors of one call, which agree on [K, O, C, I] and on their dtype; each axis is that of the first that has it.
class TangentTensors {
 public:
  explicit TangentTensors(const char* op) : op_(op) {}

  void tangent(const char* name, const MaybeTensor& t) { add(name, t, "KOCI"); }
  void primal(const char* name, const MaybeTensor& t) { add(name, t, "OCI"); }
  void coefficients(const char* name, const MaybeTensor& t) { add(name, t, "KC"); }

  // [O, C, I], or [C] in the compute type, of which it tells.
  bool factor(const char* name, const MaybeTensor& t) {
    const bool of_channel = t && t->dim() == 1;
    add(name, t, of_channel ? "C" : "OCI");
    return of_channel;
  }

  Geometry geometry() const { return {sizes_[1], sizes_[2], sizes_[3]}; }
  int64_t count() const { return sizes_[0]; }
  Storage storage() const { return storage_; }
  // A new tensor [K, O, C, I] beside the first.
  Tensor result() const { return beside(*like_, {sizes_.begin(), sizes_.end()}, like_->scalar_type()); }

 private:
  // Tensors with an axis I are in the storage type, of which the first comes first, others in the compute type.
  __attribute__((noinline)) void add(const char* name, const MaybeTensor& t, const char* axes) {
    if (!t) return;
    const int64_t dim = static_cast<int64_t>(std::strlen(axes));
    bool fits = t->dim() == dim;
    for (int64_t d = 0; fits && d < dim; ++d) {
      int64_t& size = sizes_[axis(axes[d])];
      fits = size < 0 || t->size(d) == size;
    }
    if (!fits) refuse(op_, std::string(name) + " must have shape " + shape(axes) + ", got " + shape(*t));
    for (int64_t d = 0; d < dim; ++d) sizes_[axis(axes[d])] = t->size(d);
    const char* wrong = nullptr;
    if (!t->is_contiguous()) wrong = " must be contiguous; call .contiguous()";
    if (!like_) {
      storage_ = storage_of(op_, name, t->scalar_type());
      like_ = *t;
      first_ = name;
    }
    const ScalarType dtype = like_->scalar_type(), own = t->scalar_type();
    if (axes[dim - 1] == 'I') {
      if (own != dtype) refuse(op_, std::string(name) + " must have the dtype of " + first_);
    } else if (own != compute_type(dtype)) {
      wrong = " must be float32 (float64 beside float64 tangents)";
    }
    if (wrong) refuse(op_, std::string(name) + wrong);
    if (t->device() != like_->device()) refuse(op_, std::string(name) + " must be on the device of " + first_);
  }

  static int axis(char name) { return static_cast<int>(std::strchr(all_, name) - all_); }

  std::string shape(const char* axes) const {
    std::string text;
    for (; *axes; ++axes) {
      text += text.empty() ? "[" : ", ";
      text += *axes;
      if (sizes_[axis(*axes)] >= 0) text.append("=").append(std::to_string(sizes_[axis(*axes)]));
    }
    return text + "]";
  }
  static std::string shape(const Tensor& t) {
    std::string text = "[";
    for (int64_t d = 0; d < t.dim(); ++d) text.append(d ? ", " : "").append(std::to_string(t.size(d)));
    return text + "]";
  }

  static constexpr const char* all_ = "KOCI";
  const char* op_;
  const char* first_ = "";
  MaybeTensor like_;
  Storage storage_ = f32;
  std::array<int64_t, 4> sizes_{-1, -1, -1, -1};
};

// The arguments of tangents_combine but for its kind.
struct CombineTensors {
  const MaybeTensor &t0, &p0, &t1, &p1, &f0, &r0, &f1, &r1, &shift, &mask;
};

// What a checked call has beside its tensors.
struct CombineTraits {
  Storage storage;
  Geometry geometry;
  int64_t count;
  bool first_of_channel, second_of_channel;  // p0 and p1 are [C]
};

// Makes the result, too.
inline CombineTraits check_combine(const char* op, const CombineTensors& c, int64_t kind, MaybeTensor* out) {
  if (kind < 0 || kind >= activations) refuse(op, "kind must be in [0, 6], got " + std::to_string(kind));
  require(c.t0 || c.t1 || (c.f0 && c.r0), op, "t0, t1 or f0 with r0 must be given");
  require(!c.f0 == !c.r0 && !c.f1 == !c.r1, op, "f0 and r0, f1 and r1 must be given together");
  require((c.t0 || !c.p0 || kind != given) && (c.t1 || !c.p1), op, "p0 and p1 must be given with t0 and t1");
  TangentTensors tensors(op);
  tensors.tangent("t0", c.t0);
  tensors.tangent("t1", c.t1);
  tensors.primal("f0", c.f0);
  CombineTraits traits{};
  if (kind == given) {
    traits.first_of_channel = tensors.factor("p0", c.p0);
    traits.second_of_channel = tensors.factor("p1", c.p1);
  } else {
    require(c.p0 && (c.t0 || c.t1), op, "p0 and t0 or t1 must be given for an activation");
    require(!c.t1 == !c.p1, op, "t1 and p1 must be given together for an activation");
    require(!c.t1 || kind != relu, op, "t1 must be absent for relu, whose second derivative is 0");
    tensors.primal("p0", c.p0);
    tensors.primal("p1", c.p1);
  }
  tensors.coefficients("r0", c.r0);
  tensors.primal("f1", c.f1);
  tensors.coefficients("r1", c.r1);
  tensors.coefficients("shift", c.shift);
  tensors.primal("mask", c.mask);
  traits.storage = tensors.storage();
  traits.geometry = tensors.geometry();
  traits.count = tensors.count();
  *out = tensors.result();
  return traits;
}

// The arguments of tangents_sums but for `total`.
struct SumsTensors {
  const Tensor& t0;
  const MaybeTensor &p0, &t1, &p1, &mask;
};

struct SumsTraits {
  Storage storage;
  Geometry geometry;
  int64_t count;
};

inline SumsTraits check_sums(const char* op, const SumsTensors& s) {
  require(!s.t1 == !s.p1 && (s.p0 || !s.p1), op, "t1 and p1 must be given together, and with p0");
  TangentTensors tensors(op);
  tensors.tangent("t0", s.t0);
  tensors.primal("p0", s.p0);
  tensors.tangent("t1", s.t1);
  tensors.primal("p1", s.p1);
  tensors.primal("mask", s.mask);
  return {tensors.storage(), tensors.geometry(), tensors.count()};
}

// The results of tangents_sums; what is not asked for is empty.
inline std::tuple<Tensor, Tensor, Tensor> sums_results(const SumsTensors& s, const SumsTraits& traits, bool total) {
  const Tensor& t = s.t0;
  const ScalarType wide = compute_type(t.scalar_type());
  const std::vector<int64_t> none{0}, numbers{traits.count, traits.geometry.channels};
  const std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  return {beside(t, s.mask ? sizes : none, t.scalar_type()), beside(t, s.p0 ? numbers : none, wide),
          beside(t, total ? numbers : none, wide)};
}

}  // namespace fastflat

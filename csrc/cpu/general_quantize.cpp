// SPDX-License-Identifier: Apache-2.0
// Glue of the general_quantize family: layouts, allocation, threads. The loops are in general_quantize_loops.cpp.
#include "cpu/general_quantize.h"

#include <optional>

#include "core/checks.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/fake_quantize_call.h"
#include "cpu/scale_from_data.h"
#include "cpu/threads.h"
#include "math/block_scale.h"
#include "math/general_quantize.h"

namespace fastflat::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

// A device scalar in the compute type of x; `absent` without one.
double scalar(const char* op, const char* name, const MaybeTensor& t, const Tensor& x, double absent) {
  if (!t) return absent;
  check_parameter(op, name, *t, x, 1);
  return t->scalar_type() == ScalarType::Double ? *static_cast<const double*>(t->const_data_ptr())
                                                : *static_cast<const float*>(t->const_data_ptr());
}

struct Call : GeneralQuantizeCall {
  Tensor data;
  std::optional<ScaleTensors> scales;

  Call(const char* op, const Tensor& x_, const Tensor& scale_, const MaybeTensor& zero_point_, const MaybeTensor& state,
       const MaybeTensor& nu_, const MaybeTensor& a_, int64_t qmin_, int64_t qmax_, int64_t axis, int64_t group,
       double eps_, int64_t rules_)
      : GeneralQuantizeCall{} {
    check_layout(op, x_, axis, group);
    data = dense(x_, group > 0);
    geometry = geometry_of(data, axis, group);
    qmin = qmin_;
    qmax = qmax_;
    eps = eps_;
    rules = rules_;
    factor = 1.0;
    x = data.const_data_ptr();
    narrow = data.element_size() == 2;
    half = data.scalar_type() == ScalarType::Half;
    scales.emplace(op, scale_, zero_point_, data, static_cast<GeneralQuantizeCall&>(*this));
    nu = scalar(op, "nu", nu_, data, 1.0);
    a = scalar(op, "a", a_, data, 0.0);
    STD_TORCH_CHECK(!(rules & rules::compute_input) || narrow, "fastflat::", op,
                    ": rules may ask for rounding to the type of x only where x has 16 bits");
    STD_TORCH_CHECK(!(rules & rules::compute_input) || !GeneralGrid<float>::floats(rules), "fastflat::", op,
                    ": rules may not ask for rounding to the type of x on a minifloat grid");
    drawn = noise_of(rules) != Noise::none;
    STD_TORCH_CHECK(!drawn || state, "fastflat::", op, ": state must be given with rules that draw noise");
    if (!drawn) return;
    STD_TORCH_CHECK(state->numel() == 2 && state->scalar_type() == ScalarType::Long && state->is_contiguous(),
                    "fastflat::", op, ": state must be a contiguous int64 tensor of 2 values");
    const auto* words = static_cast<const int64_t*>(state->const_data_ptr());
    seed = words[0];
    offset = words[1];
  }
};

// The call as the loops of the fake_quantize family take it, which are the faster ones where they know the rules.
std::optional<FakeQuantizeCall> chained(const Call& call, Pair pair) {
  const bool known = IntegerGrid<float>::is_chained(call.rules, call.zero_point != nullptr);
  if (!known || pair != f32_f32 || call.delta != 0 || call.need_delta) return std::nullopt;
  FakeQuantizeCall simple{};
  simple.geometry = call.geometry;
  simple.qmin = call.qmin;
  simple.qmax = call.qmax;
  simple.eps = call.eps;
  simple.rules = call.rules;
  simple.factor = call.factor;
  simple.x = call.x;
  simple.in = call.in;
  simple.out = call.out;
  simple.scale = call.scale;
  return simple;
}

Tensor general_quantize(const Tensor& x, const Tensor& scale, const MaybeTensor& zero_point, const MaybeTensor& state,
                        const MaybeTensor& nu, const MaybeTensor& a, int64_t qmin, int64_t qmax, int64_t axis,
                        int64_t group, double eps, int64_t rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "general_quantize";
  Call call(op, x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(call.data, result, group > 0);
  call.out = y.mutable_data_ptr();
  if (const auto simple = chained(call, pair)) {
    map(fake_quantize_loops().forward[pair], *simple);
  } else {
    map<GeneralQuantizeCall>(general_quantize_loops().forward[pair], call);
  }
  return y;
}

// Sums to gradients, in the compute type.
template <class C>
void finish(const GeneralQuantizeCall& call, const std::vector<double>& sums, void* gs, void* gz, void* gd) {
  const auto grid = IntegerGrid<C>::make(call.qmin, call.qmax, call.eps, call.factor, call.rules);
  double of_delta = 0;
  for (int64_t c = 0; c < call.geometry.channels; ++c) {
    of_delta += sums[3 * c + 2];
    if (gs) static_cast<C*>(gs)[c] = grid.scale_gradient(static_cast<C>(sums[3 * c]));
    if (!gz) continue;
    const auto group = grid.group(static_cast<const C*>(call.scale)[c]);
    static_cast<C*>(gz)[c] = grid.zero_gradient(static_cast<C>(sums[3 * c + 1]), group);
  }
  if (gd) *static_cast<C*>(gd) = static_cast<C>(of_delta);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> general_quantize_bwd(const Tensor& gy_, const Tensor& x, const Tensor& scale,
                                                                const MaybeTensor& zero_point, const MaybeTensor& state,
                                                                const MaybeTensor& nu, const MaybeTensor& a,
                                                                const MaybeTensor& delta, int64_t qmin, int64_t qmax,
                                                                int64_t axis, int64_t group, double eps, int64_t rules,
                                                                double factor, bool need_scale, bool need_delta) {
  constexpr auto op = "general_quantize_bwd";
  check_same_shape(op, "gy", gy_, x);
  Call call(op, x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules);
  const Tensor gy = in_layout_of(gy_, call.data);
  call.factor = factor;
  call.delta = scalar(op, "delta", delta, call.data, 0.0);
  call.need_delta = need_delta && delta;
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  Tensor gx = empty_like(call.data, x.scalar_type(), group > 0);
  call.in = gy.const_data_ptr();
  call.out = gx.mutable_data_ptr();
  const std::vector<int64_t> none{0}, all(scale.sizes().begin(), scale.sizes().end());
  const bool need_zero = need_scale && zero_point;
  Tensor gs = empty_dense(scale, need_scale ? all : none, scale.scalar_type());
  Tensor gz = empty_dense(scale, need_zero ? all : none, scale.scalar_type());
  Tensor gd = empty_dense(scale, call.need_delta ? std::vector<int64_t>{} : none, scale.scalar_type());
  const auto simple = chained(call, pair);
  if (simple && !need_scale) {
    map(fake_quantize_loops().backward[pair], *simple);
    return {gx, gs, gz, gd};
  }
  if (simple) {
    std::vector<double> sums(2 * call.geometry.channels, 0.0);
    const auto& loops = fake_quantize_loops();
    reduce(loops.backward_channels[pair], loops.backward_range[pair], *simple, 2, sums.data(), std::plus<double>());
    finish(*simple, x.scalar_type(), sums.data(), gs.mutable_data_ptr(), nullptr);
    return {gx, gs, gz, gd};
  }
  if (!need_scale && !call.need_delta) {
    map<GeneralQuantizeCall>(general_quantize_loops().backward[pair], call);
    return {gx, gs, gz, gd};
  }
  std::vector<double> sums(3 * call.geometry.channels, 0.0);
  reduce<GeneralQuantizeCall>(general_quantize_loops().backward_channels[pair],
                              general_quantize_loops().backward_range[pair], call, 3, sums.data(), std::plus<double>());
  const auto target = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  if (compute_type(x.scalar_type()) == ScalarType::Double) {
    finish<double>(call, sums, target(gs), target(gz), target(gd));
  } else {
    finish<float>(call, sums, target(gs), target(gz), target(gd));
  }
  return {gx, gs, gz, gd};
}

Tensor general_quantize_jvp(const MaybeTensor& tx_, const MaybeTensor& ts_, const MaybeTensor& tz_, const Tensor& x,
                            const Tensor& scale, const MaybeTensor& zero_point, const MaybeTensor& state,
                            const MaybeTensor& nu, const MaybeTensor& a, int64_t qmin, int64_t qmax, int64_t axis,
                            int64_t group, double eps, int64_t rules, double factor, std::optional<ScalarType> dtype) {
  constexpr auto op = "general_quantize_jvp";
  Call call(op, x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules);
  call.factor = factor;
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Tangents tangents(op, tx_, ts_, tz_, call.data, result, call.geometry.channels);
  tangents.point(call);
  Tensor ty = empty_like(call.data, result, group > 0);
  call.out = ty.mutable_data_ptr();
  const auto& loops = general_quantize_loops();
  map<GeneralQuantizeCall>(tangents.of_result ? loops.tangent_of_result[pair] : loops.tangent[pair], call);
  return ty;
}

// Scales of the channels [begin, end) from largest magnitudes, in the compute type.
template <class C>
void store_scales(const GeneralQuantizeCall& call, const double* absmax, int64_t begin, int64_t end,
                  const MaybeTensor& outer, void* scale) {
  const auto grid = GeneralGrid<C>::make(call.qmin, call.qmax, call.eps, 1.0, call.rules);
  const C over = outer ? *static_cast<const C*>(outer->const_data_ptr()) : C(1);
  for (int64_t c = begin; c < end; ++c) {
    static_cast<C*>(scale)[c] = block_scale(static_cast<C>(absmax[c]), over, grid.base.qmax, grid.format, call.rules);
  }
}

std::tuple<Tensor, Tensor> general_quantize_dynamic(const Tensor& x_, const MaybeTensor& state, const MaybeTensor& nu,
                                                    const MaybeTensor& a, const MaybeTensor& outer, int64_t qmin,
                                                    int64_t qmax, int64_t axis, int64_t group, double eps,
                                                    int64_t rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "general_quantize_dynamic";
  check_layout(op, x_, axis, group);
  if (outer) check_parameter(op, "outer", *outer, x_, 1);
  const Tensor x = dense(x_, group > 0);
  const ScalarType compute = compute_type(x.scalar_type());
  Tensor scale = empty_dense(x, scale_sizes(x, axis, group), compute);
  Call call(op, x, scale, std::nullopt, state, nu, a, qmin, qmax, axis, group, eps, rules);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Storage storage = storage_of(op, "x", x.scalar_type());
  FakeQuantizeCall measured{};
  measured.geometry = call.geometry;
  measured.x = call.x;
  Tensor y = empty_like(call.data, result, group > 0);
  call.scale = scale.const_data_ptr();
  call.out = y.mutable_data_ptr();
  const auto store = compute == ScalarType::Double ? store_scales<double> : store_scales<float>;
  scale_from_data<GeneralQuantizeCall>(
      storage, measured,
      [&, to = scale.mutable_data_ptr()](const double* absmax, int64_t begin, int64_t end) {
        store(call, absmax, begin, end, outer, to);
      },
      general_quantize_loops().forward[pair], call);
  return {y, scale};
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("general_quantize", TORCH_BOX(&fastflat::cpu::general_quantize));
  m.impl("general_quantize_bwd", TORCH_BOX(&fastflat::cpu::general_quantize_bwd));
  m.impl("general_quantize_jvp", TORCH_BOX(&fastflat::cpu::general_quantize_jvp));
  m.impl("general_quantize_dynamic", TORCH_BOX(&fastflat::cpu::general_quantize_dynamic));
}

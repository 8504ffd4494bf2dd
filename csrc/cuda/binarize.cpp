// SPDX-License-Identifier: Apache-2.0
// Glue of the binarize family: layouts, allocation, device and stream. The kernels are in binarize.cu.
#include "cuda/binarize.h"

#include "core/expand.h"
#include "core/storage.h"
#include "cuda/scaled.h"

namespace fastflat::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// What the ops of the family share. A quotient is a tensor with a value a scale.
struct BinarizeCall : Scaled {
  MaybeTensor h;
  std::vector<int64_t> scales;

  BinarizeCall(const char* op_, const Tensor& x_, int64_t axis, int64_t group)
      : Scaled(op_, x_, std::nullopt, std::nullopt, axis, group), scales(scale_sizes(x, axis, group)) {}

  void weigh(const MaybeTensor& given) {
    if (given) h = aligned(expanded(op, "h", *given, x));
  }

  Tensor quotient() const { return empty_dense(x, scales, compute_type(x.scalar_type())); }
  Tensor workspace(Pair pair) const { return bytes(binarize_workspace(pair, geometry, h.has_value())); }
  // Of an op that does not yet ask what its result is stored in.
  Pair own_pair() const { return pair_of(op, x.scalar_type(), x.scalar_type()); }
};

std::tuple<Tensor, Tensor> binarize(const Tensor& x, const MaybeTensor& h, int64_t axis, int64_t group,
                                    std::optional<ScalarType> dtype) {
  constexpr auto op = "binarize";
  const OnDevice device(x);
  BinarizeCall call(op, x, axis, group);
  call.weigh(h);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const void* from = call.x.const_data_ptr();
  Tensor alpha = call.quotient(), workspace = call.workspace(call.own_pair());
  check_launch(op, launch_binarize_alpha(call.own_pair(), call.geometry, from, data(call.h), alpha.mutable_data_ptr(),
                                         workspace.mutable_data_ptr(), device.stream));
  Tensor y = empty_like(call.x, result, group > 0);
  check_launch(op,
               launch_binarize(pair, call.geometry, from, alpha.const_data_ptr(), y.mutable_data_ptr(), device.stream));
  return {y, alpha};
}

Tensor binarize_bwd(const Tensor& gy_, const MaybeTensor& ga_, const Tensor& x, const MaybeTensor& h,
                    const Tensor& alpha_, double clip, bool through_alpha, int64_t axis, int64_t group) {
  constexpr auto op = "binarize_bwd";
  const OnDevice device(x);
  BinarizeCall call(op, x, axis, group);
  const Tensor gy = call.along("gy", gy_);
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  const MaybeTensor alpha = call.parameter("alpha", alpha_, call.geometry.channels);
  const MaybeTensor ga = call.parameter("ga", ga_, call.geometry.channels);
  const void* from = call.x.const_data_ptr();
  MaybeTensor k;
  if (through_alpha || ga) {
    call.weigh(h);
    k = call.quotient();
    Tensor workspace = call.workspace(pair);
    check_launch(op,
                 launch_binarize_k(pair, call.geometry, through_alpha ? gy.const_data_ptr() : nullptr, data(ga), from,
                                   data(call.h), k->mutable_data_ptr(), workspace.mutable_data_ptr(), device.stream));
  }
  Tensor gx = empty_like(call.x, x.scalar_type(), group > 0);
  check_launch(op, launch_binarize_gx(pair, call.geometry, clip, gy.const_data_ptr(), from, data(call.h), data(alpha),
                                      data(k), gx.mutable_data_ptr(), device.stream));
  return gx;
}

std::tuple<Tensor, Tensor> binarize_jvp(const Tensor& tx_, const Tensor& x, const MaybeTensor& h, const Tensor& alpha_,
                                        double clip, bool through_alpha, int64_t axis, int64_t group,
                                        std::optional<ScalarType> dtype) {
  constexpr auto op = "binarize_jvp";
  const OnDevice device(x);
  BinarizeCall call(op, x, axis, group);
  STD_TORCH_CHECK(tx_.scalar_type() == x.scalar_type(), "fastflat::", op, ": tx must have the dtype of x");
  const Tensor tx = call.along("tx", tx_);
  const MaybeTensor alpha = call.parameter("alpha", alpha_, call.geometry.channels);
  call.weigh(h);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const void* from = call.x.const_data_ptr();
  Tensor ta = call.quotient(), workspace = call.workspace(call.own_pair());
  check_launch(op, launch_binarize_ta(call.own_pair(), call.geometry, tx.const_data_ptr(), from, data(call.h),
                                      ta.mutable_data_ptr(), workspace.mutable_data_ptr(), device.stream));
  Tensor ty = empty_like(call.x, result, group > 0);
  check_launch(op,
               launch_binarize_ty(pair, call.geometry, clip, tx.const_data_ptr(), from, data(alpha),
                                  through_alpha ? ta.const_data_ptr() : nullptr, ty.mutable_data_ptr(), device.stream));
  return {ty, ta};
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("binarize", TORCH_BOX(&fastflat::cuda::binarize));
  m.impl("binarize_bwd", TORCH_BOX(&fastflat::cuda::binarize_bwd));
  m.impl("binarize_jvp", TORCH_BOX(&fastflat::cuda::binarize_jvp));
}

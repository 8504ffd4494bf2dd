// SPDX-License-Identifier: Apache-2.0
#include "cuda/sharpness.h"

#include <cmath>

#include "cuda/multi.cuh"
#include "math/sharpness.h"

namespace fastflat::cuda {
namespace {

// The products of a gradient and its partner, formed and added in double.
template <class G, class O>
struct Products {
  static constexpr int streams = sums_of::streams, width = list_width<G, O>;
  double eta;
  int64_t kind = sum_gradient;

  struct In {
    Pack<G, width> g;
    Pack<O, width> other;
  };

  __device__ __forceinline__ void open(const Piece<streams>& piece) { kind = piece.option(); }

  __device__ __forceinline__ In read(const Piece<streams>& piece, int64_t at) const {
    return {piece.template read<G, width>(sums_of::g, at),
            piece.template read_if<O, width>(kind != sum_gradient, sums_of::other, at)};
  }

  __device__ __forceinline__ void add(const Piece<streams>& piece, int64_t at, const In& in,
                                      Sums<double, 3>& sums) const {
    const Lanes lanes = piece.valid.lanes(at, width);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (!lanes.holds(k)) continue;
      double first = load(in.g.v[k]);
      const double second = load(in.other.v[k]);
      if (kind == sum_scaled) first = (magnitude(second) + eta) * first;
      sums.v[0] = sums.v[0] + first * first;
      if (kind == sum_pair) {
        sums.v[1] = sums.v[1] + first * second;
        sums.v[2] = sums.v[2] + second * second;
      }
    }
  }
};

template <class W, class G, class R>
struct Rise : Rounds {
  using C = compute_t<W>;
  static constexpr int streams = ascent_of::streams, width = list_width<W, G, R>;
  static constexpr bool backwards = true;  // begins with what the sums read last, which the cache may still hold
  const double* scales;
  double eta;
  Ascent<C> rule{};

  Rise(const double* of_tensors, double offset, const int64_t* state)
      : Rounds(state), scales(of_tensors), eta(offset) {}

  struct In {
    Pack<W, width> w;
    Pack<G, width> g;
  };

  __device__ __forceinline__ void open(const Piece<streams>& piece) {
    open_draws();
    rule = {static_cast<C>(load_parameter(scales, piece.index())), static_cast<C>(eta), piece.option()};
  }

  __device__ __forceinline__ In read(const Piece<streams>& piece, int64_t at) const {
    return {piece.template read<W, width>(ascent_of::w, at), piece.template read<G, width>(ascent_of::g, at)};
  }

  __device__ __forceinline__ void write(const Piece<streams>& piece, int64_t at, const In& in) const {
    C risen[width];
#pragma unroll
    for (int k = 0; k < width; ++k) risen[k] = rule(load(in.w.v[k]), load(in.g.v[k]));
    if (piece.has(ascent_of::backup)) piece.write(ascent_of::backup, at, in.w);
    if (piece.has(ascent_of::out)) {
      piece.template write_rounded<R>(ascent_of::out, at, risen, rounding<R>(piece, at));
    } else {
      piece.template write_rounded<W>(ascent_of::w, at, risen, rounding<W>(piece, at));
    }
  }
};

// One block: the total of the norms, and every scale from it.
__global__ void __launch_bounds__(kBlock) scale_kernel(const double* sums, int64_t tensors, const double* rho,
                                                       int64_t count, double eps, bool linf, double* result) {
  Sums<double, 1> total{};
  for (int64_t t = threadIdx.x; t < tensors; t += kBlock) total.v[0] = total.v[0] + load_parameter(sums, 3 * t);
  combine_team<Add>(total, kBlock);
  for (int64_t k = threadIdx.x; k < count; k += kBlock) {
    result[k] = ascent_scale(load_parameter(rho, k), total.v[0], eps, linf);
  }
  if (threadIdx.x != 0) return;
  const double norm = std::sqrt(total.v[0]);
  result[count] = norm;
  result[count + 1] = norm <= 1.7976931348623157e308 ? 0.0 : 1.0;
}

}  // namespace

ErrorCode launch_sharpness_sums(const std::vector<SumsTensor>& list, double eta, double* partials, double* sums,
                                StreamHandle stream) {
  const Roles roles{1u << sums_of::other, 1u << sums_of::g, 0};
  const cudaError_t error = for_each_combination(list, roles, [&](auto w, auto g, auto, const auto& members) {
    const Products<type_of<decltype(g)>, type_of<decltype(w)>> products{eta};
    return launch_list_sums(list, members, products, partials, native(stream));
  });
  return error != cudaSuccess ? error : launch_list_totals(list, partials, sums, native(stream));
}

ErrorCode launch_sharpness_scale(const double* sums, int64_t tensors, const double* rho, int64_t count, double eps,
                                 bool linf, double* result, StreamHandle stream) {
  return launch(scale_kernel, 1, kBlock, native(stream), sums, tensors, rho, count, eps, linf, result);
}

ErrorCode launch_sharpness_ascent(const std::vector<AscentTensor>& list, const double* scale, double eta,
                                  const int64_t* state, StreamHandle stream) {
  const Roles roles{1u << ascent_of::w, 1u << ascent_of::g, 1u << ascent_of::out};
  return for_each_combination(list, roles, [&](auto w, auto g, auto r, const auto& members) {
    const Rise<type_of<decltype(w)>, type_of<decltype(g)>, type_of<decltype(r)>> rise(scale, eta, state);
    return launch_list_map(list, members, rise, native(stream));
  });
}

}  // namespace fastflat::cuda

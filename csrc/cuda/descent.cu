// SPDX-License-Identifier: Apache-2.0
#include "cuda/descent.h"

#include "cuda/multi.cuh"
#include "math/descent.h"

namespace fastflat::cuda {
namespace {

using Part = Piece<descent_of::streams>;

// What all steps share: the row of a tensor, the way to it, and the way of the new weights to memory.
template <class W, class G, class R>
struct Step : Rounds {
  using C = compute_t<W>;
  static constexpr int streams = descent_of::streams, width = list_width<W, G, R>;
  static constexpr int blocks_at_once = 2;  // up to nine streams are in registers
  using Numbers = Pack<C, width>;

  const double* rows;

  Step(const double* of_tensors, const int64_t* from) : Rounds(from), rows(of_tensors) {}

  __device__ __forceinline__ const double* row_of(const Part& part) const {
    return rows + int64_t{part.index()} * row::columns;
  }

  // The bytes of the weights before the ascent; what else they go to is a copy.
  __device__ __forceinline__ void restore(const Part& part, int64_t at, const Pack<W, width>& source) const {
    if (part.has(descent_of::out)) {
      C values[width];
#pragma unroll
      for (int k = 0; k < width; ++k) values[k] = load(source.v[k]);
      part.template write_rounded<R>(descent_of::out, at, values, Rounding{{}, false});
    }
    if (!part.same(descent_of::source, descent_of::w)) part.write(descent_of::w, at, source);
  }

  __device__ __forceinline__ bool averages(const Part& part, const Update<C>& update) const {
    return part.has(descent_of::a) && update.average != C(0);
  }

  __device__ __forceinline__ void finish(const Part& part, int64_t at, const Update<C>& update, const C (&to)[width],
                                         const Numbers& before) const {
    if (averages(part, update)) {
      Numbers average;
#pragma unroll
      for (int k = 0; k < width; ++k) average.v[k] = update.averaged(before.v[k], to[k]);
      part.write(descent_of::a, at, average);
    }
    const Rounding rounding = this->template rounding<W, R>(part, at);
    if (part.has(descent_of::out)) part.template write_rounded<R>(descent_of::out, at, to, rounding);
    part.template write_rounded<W>(descent_of::w, at, to, rounding);
  }
};

template <class W, class G, class R>
struct SgdStep : Step<W, G, R> {
  using Base = Step<W, G, R>;
  using Base::width;
  using typename Base::C, typename Base::Numbers;
  Sgd<C> rule{};

  using Base::Base;

  struct In {
    Pack<W, width> source;
    Pack<G, width> g, f;
    Numbers m, a;
  };

  __device__ __forceinline__ void open(const Part& part) {
    this->open_draws();
    rule = Sgd<C>::make(this->row_of(part), part.has(descent_of::f));
  }

  __device__ __forceinline__ In read(const Part& part, int64_t at) const {
    const bool steps = !rule.common.skipped;
    return {part.template read<W, width>(descent_of::source, at),
            part.template read_if<G, width>(steps, descent_of::g, at),
            part.template read_if<G, width>(steps && rule.common.mixed, descent_of::f, at),
            part.template read_if<C, width>(steps && !rule.first && part.has(descent_of::m), descent_of::m, at),
            part.template read_if<C, width>(steps && this->averages(part, rule.common), descent_of::a, at)};
  }

  __device__ __forceinline__ void write(const Part& part, int64_t at, const In& in) const {
    if (rule.common.skipped) return this->restore(part, at, in.source);
    C to[width];
    if (part.has(descent_of::m)) {
      Numbers m = in.m;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        to[k] = rule.with_momentum(load(in.source.v[k]), load(in.g.v[k]), load(in.f.v[k]), m.v[k]);
      }
      part.write(descent_of::m, at, m);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) to[k] = rule.plain(load(in.source.v[k]), load(in.g.v[k]), load(in.f.v[k]));
    }
    this->finish(part, at, rule.common, to, in.a);
  }
};

template <class W, class G, class R>
struct AdamStep : Step<W, G, R> {
  using Base = Step<W, G, R>;
  using Base::width;
  using typename Base::C, typename Base::Numbers;
  bool padam;
  Adam<C> rule{};

  AdamStep(const double* rows, const int64_t* state, bool by_power) : Base(rows, state), padam(by_power) {}

  struct In {
    Pack<W, width> source;
    Pack<G, width> g, f;
    Numbers m, v, x, a;
  };

  __device__ __forceinline__ void open(const Part& part) {
    this->open_draws();
    rule = Adam<C>::make(this->row_of(part), part.has(descent_of::f));
  }

  __device__ __forceinline__ In read(const Part& part, int64_t at) const {
    const bool steps = !rule.common.skipped;
    return {part.template read<W, width>(descent_of::source, at),
            part.template read_if<G, width>(steps, descent_of::g, at),
            part.template read_if<G, width>(steps && rule.common.mixed, descent_of::f, at),
            part.template read_if<C, width>(steps, descent_of::m, at),
            part.template read_if<C, width>(steps, descent_of::v, at),
            part.template read_if<C, width>(steps && part.has(descent_of::x), descent_of::x, at),
            part.template read_if<C, width>(steps && this->averages(part, rule.common), descent_of::a, at)};
  }

  __device__ __forceinline__ void write(const Part& part, int64_t at, const In& in) const {
    if (rule.common.skipped) return this->restore(part, at, in.source);
    Numbers m = in.m, v = in.v;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const C u = rule.common.direction(load(in.source.v[k]), load(in.g.v[k]), load(in.f.v[k]));
      rule.moments(u, m.v[k], v.v[k]);
    }
    part.write(descent_of::m, at, m);
    part.write(descent_of::v, at, v);
    if (part.has(descent_of::x)) {
#pragma unroll
      for (int k = 0; k < width; ++k) v.v[k] = larger(in.x.v[k], v.v[k]);
      part.write(descent_of::x, at, v);
    }
    C to[width];
    if (padam) {
#pragma unroll
      for (int k = 0; k < width; ++k) to[k] = rule.padam(load(in.source.v[k]), m.v[k], v.v[k]);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) to[k] = rule.adam(load(in.source.v[k]), m.v[k], v.v[k]);
    }
    this->finish(part, at, rule.common, to, in.a);
  }
};

// First half of LAMB.
template <class W, class G>
struct LambMoments : Step<W, G, W> {
  using Base = Step<W, G, W>;
  using Base::width;
  using typename Base::C, typename Base::Numbers;
  Adam<C> rule{};

  explicit LambMoments(const double* rows) : Base(rows, nullptr) {}

  struct In {
    Pack<W, width> source;
    Pack<G, width> g, f;
    Numbers m, v;
  };

  __device__ __forceinline__ void open(const Part& part) {
    rule = Adam<C>::make(this->row_of(part), part.has(descent_of::f));
  }

  __device__ __forceinline__ In read(const Part& part, int64_t at) const {
    const bool steps = !rule.common.skipped;
    return {part.template read<W, width>(descent_of::source, at),
            part.template read_if<G, width>(steps, descent_of::g, at),
            part.template read_if<G, width>(steps && rule.common.mixed, descent_of::f, at),
            part.template read<C, width>(descent_of::m, at), part.template read<C, width>(descent_of::v, at)};
  }

  __device__ __forceinline__ void add(const Part& part, int64_t at, const In& in, Sums<double, 3>& sums) const {
    Numbers m = in.m, v = in.v;
    if (!rule.common.skipped) {
#pragma unroll
      for (int k = 0; k < width; ++k) rule.moments(rule.common.mix(load(in.g.v[k]), load(in.f.v[k])), m.v[k], v.v[k]);
      part.write(descent_of::m, at, m);
      part.write(descent_of::v, at, v);
    }
    const Lanes lanes = part.valid.lanes(at, width);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (!lanes.holds(k)) continue;
      const C w = load(in.source.v[k]);
      const double wide = w, q = rule.lamb(w, m.v[k], v.v[k]);
      sums.v[0] = sums.v[0] + q * q;
      sums.v[2] = sums.v[2] + wide * wide;
    }
  }
};

// Second half.
template <class W, class R>
struct LambStep : Step<W, W, R> {
  using Base = Step<W, W, R>;
  using Base::width;
  using typename Base::C, typename Base::Numbers;
  const double* sums;
  Adam<C> rule{};

  LambStep(const double* rows, const int64_t* state, const double* of_tensors) : Base(rows, state), sums(of_tensors) {}

  struct In {
    Pack<W, width> source;
    Numbers m, v, a;
  };

  __device__ __forceinline__ void open(const Part& part) {
    this->open_draws();
    const double* row = this->row_of(part);
    rule = Adam<C>::make(row, false);
    rule.common.rate = static_cast<C>(lamb_rate(row, sums + 3 * int64_t{part.index()}));
  }

  __device__ __forceinline__ In read(const Part& part, int64_t at) const {
    const bool steps = !rule.common.skipped;
    return {part.template read<W, width>(descent_of::source, at),
            part.template read_if<C, width>(steps, descent_of::m, at),
            part.template read_if<C, width>(steps, descent_of::v, at),
            part.template read_if<C, width>(steps && this->averages(part, rule.common), descent_of::a, at)};
  }

  __device__ __forceinline__ void write(const Part& part, int64_t at, const In& in) const {
    if (rule.common.skipped) return this->restore(part, at, in.source);
    C to[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const C w = load(in.source.v[k]);
      to[k] = rule.common.step(w, rule.lamb(w, in.m.v[k], in.v.v[k]));
    }
    this->finish(part, at, rule.common, to, in.a);
  }
};

// A thread a tensor.
__global__ void __launch_bounds__(kBlock) rows_kernel(RowSources from, int64_t count, int64_t rule, double* rows) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (t >= count) return;
  const bool skip = load_parameter(from.mix, 2) != 0.0, lars = rule == rule_lars;
  double step = load_parameter(from.steps, t);
  if (!skip) {
    step = step + 1.0;
    from.steps[t] = step;
  }
  fill_row(rows + t * row::columns, from.hyper + load_parameter(from.group, t) * hyper::columns, step,
           load_parameter(from.mix, 0), load_parameter(from.mix, 1), skip, lars ? from.of_gradients + 3 * t : nullptr,
           lars ? load_parameter(from.of_weights, 3 * t) : 0.0, rule);
}

constexpr Roles roles{1u << descent_of::source | 1u << descent_of::w, 1u << descent_of::g | 1u << descent_of::f,
                      1u << descent_of::out};

}  // namespace

ErrorCode launch_descent_rows(const RowSources& from, int64_t count, int64_t rule, double* rows, StreamHandle stream) {
  return launch(rows_kernel, ceil_div(count, kBlock), kBlock, native(stream), from, count, rule, rows);
}

ErrorCode launch_descent_sgd(const DescentList& list, const double* rows, const int64_t* state, StreamHandle stream) {
  return for_each_combination(list, roles, [&](auto w, auto g, auto r, const auto& members) {
    const SgdStep<type_of<decltype(w)>, type_of<decltype(g)>, type_of<decltype(r)>> step(rows, state);
    return launch_list_map(list, members, step, native(stream));
  });
}

ErrorCode launch_descent_adam(const DescentList& list, const double* rows, bool padam, const int64_t* state,
                              StreamHandle stream) {
  return for_each_combination(list, roles, [&](auto w, auto g, auto r, const auto& members) {
    const AdamStep<type_of<decltype(w)>, type_of<decltype(g)>, type_of<decltype(r)>> step(rows, state, padam);
    return launch_list_map(list, members, step, native(stream));
  });
}

ErrorCode launch_descent_lamb(const DescentList& list, const double* rows, const double* sums, const int64_t* state,
                              StreamHandle stream) {
  return for_each_combination(list, roles, [&](auto w, auto, auto r, const auto& members) {
    const LambStep<type_of<decltype(w)>, type_of<decltype(r)>> step(rows, state, sums);
    return launch_list_map(list, members, step, native(stream));
  });
}

ErrorCode launch_descent_lamb_moments(const DescentList& list, const double* rows, double* partials, double* sums,
                                      StreamHandle stream) {
  const cudaError_t error = for_each_combination(list, roles, [&](auto w, auto g, auto, const auto& members) {
    const LambMoments<type_of<decltype(w)>, type_of<decltype(g)>> moments(rows);
    return launch_list_sums(list, members, moments, partials, native(stream));
  });
  return error != cudaSuccess ? error : launch_list_totals(list, partials, sums, native(stream));
}

}  // namespace fastflat::cuda

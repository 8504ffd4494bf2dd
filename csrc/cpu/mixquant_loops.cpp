// SPDX-License-Identifier: Apache-2.0
// The loops of the mixquant family: tiles of `block` elements stay in the first cache while the candidates pass over
// them one after another, so that data are read once and the loop over a tile holds one candidate in registers. Tiles
// are in the compute type; 16-bit data are widened on the way in. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/mixquant.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/mixquant.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

// Forms of a grid that are loops of their own: the plain one, and the two kinds of division.
enum Form { plain_form, dividing_form, reciprocal_form, forms };

template <class C, int form>
using CandidateOf = Candidate<C, form == plain_form>;

// The candidates of a call, in the compute type.
template <class C>
struct Mixture {
  const MixquantCall& call;
  const C* scale;
  const C* qmin;
  const C* qmax;
  const C* weight;
  const C* factor;
  const C* ts;
  const C* tw;
  Form form;

  explicit Mixture(const MixquantCall& c)
      : call(c),
        scale(static_cast<const C*>(c.scale)),
        qmin(static_cast<const C*>(c.qmin)),
        qmax(static_cast<const C*>(c.qmax)),
        weight(static_cast<const C*>(c.weight)),
        factor(static_cast<const C*>(c.factor)),
        ts(static_cast<const C*>(c.ts)),
        tw(static_cast<const C*>(c.tw)) {
    form = c.rules == 0 ? plain_form : c.rules & rules::reciprocal ? reciprocal_form : dividing_form;
  }
};

// The parameters of candidate j over a tile: one scale for all of it, or one an element.
template <class C>
struct Uniform {
  C scale, ts;
  C scale_at(int64_t) const { return scale; }
  C ts_at(int64_t) const { return ts; }
};
template <class C>
struct Spread {
  const C* scale;
  const C* ts;
  C scale_at(int64_t i) const { return scale[i]; }
  C ts_at(int64_t i) const { return ts[i]; }
};

template <int form, class C>
FASTFLAT_HD CandidateOf<C, form> candidate(const Mixture<C>& m, int j) {
  auto c = CandidateOf<C, form>::make(m.qmin[j], m.qmax[j], m.weight[j], m.call.eps, m.call.rules);
  c.grid.reciprocal = form == reciprocal_form;
  return c;
}

// The tiles. Functions of their own, with their parameters in registers: inlined into their callers the loops are too
// much for the vectoriser.

// y += w Q(x)
template <int form, class C, class Place>
__attribute__((noinline)) void value_tile(const Mixture<C>& m, int j, Place place, const C* __restrict x,
                                          C* __restrict y, int64_t n) {
  const auto c = candidate<form>(m, j);
  for (int64_t i = 0; i < n; ++i) y[i] += c.grid.forward(x[i], c.grid.group(place.scale_at(i))) * c.weight;
}

// pass += w m; each element's shares of the sums
template <int form, class C, class Place>
__attribute__((noinline)) void gradient_tile(const Mixture<C>& m, int j, Place place, const C* __restrict gy,
                                             const C* __restrict x, C* __restrict pass, C* __restrict of_scale,
                                             C* __restrict of_weight, int64_t n) {
  const auto c = candidate<form>(m, j);
  for (int64_t i = 0; i < n; ++i) {
    const auto t = c.term(x[i], c.grid.group(place.scale_at(i)));
    pass[i] += t.pass;
    of_scale[i] = gy[i] * t.by_scale;
    of_weight[i] = gy[i] * t.value;
  }
}

// The same under one scale, with the shares added to the lanes (add_lanes) on the way.
template <int form, class C, class Place>
__attribute__((noinline)) void gradient_lanes(const Mixture<C>& m, int j, Place place, const C* __restrict gy,
                                              const C* __restrict x, C* __restrict pass, C* __restrict scale_lane,
                                              C* __restrict weight_lane, int64_t n) {
  const auto c = candidate<form>(m, j);
  const auto g = c.grid.group(place.scale_at(0));
  alignas(64) C of_scale[lanes], of_weight[lanes];
  std::copy_n(scale_lane, lanes, of_scale);
  std::copy_n(weight_lane, lanes, of_weight);
  const auto add = [&](int64_t i, int l) __attribute__((always_inline)) {
    const auto t = c.term(x[i + l], g);
    pass[i + l] += t.pass;
    of_scale[l] += gy[i + l] * t.by_scale;
    of_weight[l] += gy[i + l] * t.value;
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int l = 0; l < lanes; ++l) add(i, l);
  }
  for (int l = 0; l < n - i; ++l) add(i, l);
  std::copy_n(of_scale, lanes, scale_lane);
  std::copy_n(of_weight, lanes, weight_lane);
}

// pass += w m, rest += dQ/ds ts w f + Q tw
template <int form, class C, class Place>
__attribute__((noinline)) void tangent_tile(const Mixture<C>& m, int j, Place place, const C* __restrict x,
                                            C* __restrict pass, C* __restrict rest, int64_t n) {
  const auto c = candidate<form>(m, j);
  const C f = m.factor[j], tw = m.tw ? m.tw[j] : C(0);
  for (int64_t i = 0; i < n; ++i) {
    const auto t = c.term(x[i], c.grid.group(place.scale_at(i)));
    pass[i] += t.pass;
    const C by_scale = weighted(t.by_scale, mixture_scale_tangent(place.ts_at(i), c.weight, f));
    rest[i] = (rest[i] + by_scale) + weighted(t.value, tw);
  }
}

#define FASTFLAT_FORMS(tile) \
  {tile<plain_form, C, Place>, tile<dividing_form, C, Place>, tile<reciprocal_form, C, Place>}
template <class C, class Place>
constexpr decltype(&value_tile<plain_form, C, Place>) value_tiles[forms] = FASTFLAT_FORMS(value_tile);
template <class C, class Place>
constexpr decltype(&gradient_tile<plain_form, C, Place>) gradient_tiles[forms] = FASTFLAT_FORMS(gradient_tile);
template <class C, class Place>
constexpr decltype(&gradient_lanes<plain_form, C, Place>) lane_tiles[forms] = FASTFLAT_FORMS(gradient_lanes);
template <class C, class Place>
constexpr decltype(&tangent_tile<plain_form, C, Place>) tangent_tiles[forms] = FASTFLAT_FORMS(tangent_tile);
#undef FASTFLAT_FORMS

// Values in the compute type: the storage itself, or widened into the buffer.
template <class X, class C>
FASTFLAT_HD const C* widen(const X* __restrict from, int64_t n, C* __restrict buffer) {
  if constexpr (std::is_same_v<X, C>) {
    return from;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(from[i]);
    return buffer;
  }
}

// Calls body(j, place) for each candidate of the tile at offset i: with the scale of a channel, or spread over it.
template <class C, class Body>
FASTFLAT_HD void for_uniform(const Mixture<C>& m, int64_t channel, const Body& body) {
  for (int j = 0; j < m.call.candidates; ++j) {
    const int64_t at = j * m.call.geometry.channels + channel;
    body(j, Uniform<C>{m.scale[at], m.ts ? m.ts[at] : C(0)});
  }
}
template <class C, class Body>
FASTFLAT_HD void for_spread(const Mixture<C>& m, int64_t i, int64_t n, const Body& body) {
  alignas(64) C scale[block], ts[block];
  if (!m.ts) std::fill_n(ts, n, C(0));
  for (int j = 0; j < m.call.candidates; ++j) {
    const int64_t at = j * m.call.geometry.channels;
    spread(m.call.geometry, m.scale + at, i, n, scale);
    if (m.ts) spread(m.call.geometry, m.ts + at, i, n, ts);
    body(j, Spread<C>{scale, ts});
  }
}

// The map skeleton: tile(i, n, candidates) for the tiles of [begin, end), where candidates(body) calls body(j, place).
template <class C, class Tile>
FASTFLAT_HD void for_tiles(const Mixture<C>& m, int64_t begin, int64_t end, const Tile& tile) {
  const Geometry& g = m.call.geometry;
  if (g.inner >= mixed_run || g.channels == 1) {
    for_runs(g, begin, end, [&](int64_t start, int64_t count, int64_t channel) {
      for (int64_t i = start; i < start + count; i += block) {
        tile(i, std::min(block, start + count - i), [&](const auto& body) { for_uniform(m, channel, body); });
      }
    });
    return;
  }
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    tile(i, n, [&](const auto& body) { for_spread(m, i, n, body); });
  }
}

template <class X, class Y>
void mixquant_forward(const MixquantCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const Mixture<C> m(call);
  alignas(64) C wide[block], sum[block];
  for_tiles(m, begin, end, [&](int64_t i, int64_t n, const auto& candidates) {
    const C* x = widen(static_cast<const X*>(call.x) + i, n, wide);
    Y* y = static_cast<Y*>(call.out) + i;
    std::fill_n(sum, n, -C(0));
    candidates([&](int j, auto place) {
      if (counts(m.weight[j])) value_tiles<C, decltype(place)>[m.form](m, j, place, x, sum, n);
    });
    for (int64_t k = 0; k < n; ++k) y[k] = store<Y>(sum[k]);
  });
}

template <class X, class T, class Y>
void mixquant_tangent(const MixquantCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const Mixture<C> m(call);
  alignas(64) C wide[block], pass[block], rest[block], tangent[block];
  for_tiles(m, begin, end, [&](int64_t i, int64_t n, const auto& candidates) {
    const C* x = widen(static_cast<const X*>(call.x) + i, n, wide);
    const C* tx = tangent;
    if (call.in) {
      tx = widen(static_cast<const T*>(call.in) + i, n, tangent);
    } else {
      std::fill_n(tangent, n, C(0));
    }
    Y* y = static_cast<Y*>(call.out) + i;
    std::fill_n(pass, n, C(0));
    std::fill_n(rest, n, -C(0));
    candidates([&](int j, auto place) { tangent_tiles<C, decltype(place)>[m.form](m, j, place, x, pass, rest, n); });
    for (int64_t k = 0; k < n; ++k) y[k] = store<Y>(passed(tx[k], pass[k]) + rest[k]);
  });
}

// gx of a tile and, by what candidate(j, place, gy, x) does with them, each candidate's shares of the sums.
template <class X, class Y, class C>
struct GradientTile {
  alignas(64) C wide[block];
  alignas(64) C cotangent[block];
  alignas(64) C pass[block];
  alignas(64) C of_scale[block];
  alignas(64) C of_weight[block];

  template <class Candidates, class Each>
  FASTFLAT_HD void run(const Mixture<C>& m, int64_t i, int64_t n, const Candidates& candidates, const Each& each) {
    const C* x = widen(static_cast<const X*>(m.call.x) + i, n, wide);
    const C* gy = widen(static_cast<const Y*>(m.call.in) + i, n, cotangent);
    X* __restrict gx = static_cast<X*>(m.call.out) + i;
    std::fill_n(pass, n, C(0));
    candidates([&](int j, auto place) { each(j, place, gy, x); });
    for (int64_t k = 0; k < n; ++k) gx[k] = store<X>(passed(gy[k], pass[k]));
  }

  // The same with the shares of candidate j in of_scale and of_weight for sink(j).
  template <class Candidates, class Sink>
  FASTFLAT_HD void spread_run(const Mixture<C>& m, int64_t i, int64_t n, const Candidates& candidates,
                              const Sink& sink) {
    run(m, i, n, candidates, [&](int j, auto place, const C* gy, const C* x) {
      gradient_tiles<C, decltype(place)>[m.form](m, j, place, gy, x, pass, of_scale, of_weight, n);
      sink(j);
    });
  }
};

template <class X, class Y>
void mixquant_backward_run(const MixquantCall& call, int64_t begin, int64_t count, int64_t channel, double* of_scale,
                           double* of_weight) {
  using C = compute_t<X>;
  const Mixture<C> m(call);
  GradientTile<X, Y, C> tile;
  alignas(64) C scale_lane[most_candidates][lanes], weight_lane[most_candidates][lanes];
  for (int64_t start = begin; start < begin + count; start += flush) {
    const int64_t stop = std::min(begin + count, start + flush);
    for (int j = 0; j < call.candidates; ++j) {
      std::fill_n(scale_lane[j], lanes, C(0));
      std::fill_n(weight_lane[j], lanes, C(0));
    }
    for (int64_t i = start; i < stop; i += block) {
      const int64_t n = std::min(block, stop - i);
      const auto candidates = [&](const auto& body) { for_uniform(m, channel, body); };
      tile.run(m, i, n, candidates, [&](int j, auto place, const C* gy, const C* x) {
        lane_tiles<C, decltype(place)>[m.form](m, j, place, gy, x, tile.pass, scale_lane[j], weight_lane[j], n);
      });
    }
    for (int j = 0; j < call.candidates; ++j) {
      of_scale[j * call.geometry.channels + channel] += fold(scale_lane[j]);
      of_weight[j] += fold(weight_lane[j]);
    }
  }
}

template <class X, class Y>
void mixquant_backward_range(const MixquantCall& call, int64_t begin, int64_t end, double* of_scale,
                             double* of_weight) {
  using C = compute_t<X>;
  const Geometry& g = call.geometry;
  if (g.inner >= mixed_run || g.channels == 1) {
    for_runs(g, begin, end, [&](int64_t i, int64_t n, int64_t channel) {
      mixquant_backward_run<X, Y>(call, i, n, channel, of_scale, of_weight);
    });
    return;
  }
  // Columns: rows of all channels are added up elementwise, at most `flush / lanes` of them in the compute type.
  const Mixture<C> m(call);
  GradientTile<X, Y, C> tile;
  alignas(64) C scales[most_candidates][block], ts[block];
  alignas(64) C scale_sum[most_candidates][block], weight_sum[most_candidates][block];
  std::fill_n(ts, block, C(0));
  const int64_t row = g.channels * g.inner;
  for (int64_t column = 0; column < row; column += block) {
    const int64_t n = std::min(block, row - column);
    for (int j = 0; j < call.candidates; ++j) spread(g, m.scale + j * g.channels, column, n, scales[j]);
    const auto candidates = [&](const auto& body) {
      for (int j = 0; j < call.candidates; ++j) body(j, Spread<C>{scales[j], ts});
    };
    for (int64_t start = begin; start < end; start += row * (flush / lanes)) {
      const int64_t stop = std::min(end, start + row * (flush / lanes));
      for (int j = 0; j < call.candidates; ++j) {
        std::fill_n(scale_sum[j], n, C(0));
        std::fill_n(weight_sum[j], n, C(0));
      }
      for (int64_t i = start + column; i < stop; i += row) {
        tile.spread_run(m, i, n, candidates, [&](int j) {
          for (int64_t k = 0; k < n; ++k) scale_sum[j][k] += tile.of_scale[k];
          for (int64_t k = 0; k < n; ++k) weight_sum[j][k] += tile.of_weight[k];
        });
      }
      for (int j = 0; j < call.candidates; ++j) {
        for (int64_t k = 0; k < n; ++k) {
          of_scale[j * g.channels + (column + k) / g.inner] += static_cast<double>(scale_sum[j][k]);
          of_weight[j] += static_cast<double>(weight_sum[j][k]);
        }
      }
    }
  }
}

template <class X, class Y>
void mixquant_backward_channels(const MixquantCall& call, int64_t begin, int64_t end, double* of_scale,
                                double* of_weight) {
  using C = compute_t<X>;
  const Geometry& g = call.geometry;
  if (g.inner >= mixed_run) {
    return mixquant_backward_range<X, Y>(call, begin * g.inner, end * g.inner, of_scale, of_weight);
  }
  const Mixture<C> m(call);
  GradientTile<X, Y, C> tile;
  const int64_t per_block = block / g.inner;
  for (int64_t c = begin; c < end; c += per_block) {
    const int64_t channels = std::min(per_block, end - c), i = c * g.inner, n = channels * g.inner;
    const auto candidates = [&](const auto& body) { for_spread(m, i, n, body); };
    tile.spread_run(m, i, n, candidates, [&](int j) {
      for (int64_t k = 0; k < channels; ++k) {
        of_scale[j * g.channels + c + k] += fold_short(tile.of_scale + k * g.inner, g.inner);
      }
      alignas(64) C lane[lanes] = {};
      add_lanes(tile.of_weight, n, lane);
      of_weight[j] += fold(lane);
    });
  }
}

template <class X, class Y>
constexpr auto tangent_of_data = mixquant_tangent<X, X, Y>;
template <class X, class Y>
constexpr auto tangent_of_result = mixquant_tangent<X, Y, Y>;

}  // namespace
}  // namespace FASTFLAT_ISA

const MixquantLoops FASTFLAT_TABLE(mixquant_loops) = {
    FASTFLAT_PAIRS(mixquant_forward),        FASTFLAT_PAIRS(mixquant_backward_channels),
    FASTFLAT_PAIRS(mixquant_backward_range), FASTFLAT_PAIRS(tangent_of_data),
    FASTFLAT_PAIRS(tangent_of_result),
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"

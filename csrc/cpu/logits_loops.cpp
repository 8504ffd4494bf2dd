// SPDX-License-Identifier: Apache-2.0
// The loops of the logits family. A tile of rows is walked at once: what belongs to an element is a map over all of the
// tile, and only maxima and sums go row by row.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/logits.h"

#include "core/geometry.h"
#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/logits.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

using namespace logits;

#include "cpu/in_blocks.h"
#include "cpu/loops.h"

// Rows from here on have a loop of exponentials each; shorter ones share that of their tile.
constexpr int64_t long_row = 512;
// Terms that are added up in the compute type before a sum goes on in double.
constexpr int64_t run = 4096;

template <class C>
FASTFLAT_SHARED_CODE double sum_of(const C* t, int64_t n) {
  if (n < lanes) return fold_short(t, n);
  double sum = 0.0;
  for (int64_t at = 0; at < n; at += run) {
    alignas(64) C lane[lanes] = {};
    add_lanes(t + at, std::min(run, n - at), lane);
    sum += fold(lane);
  }
  return sum;
}

// The largest, NaN left out.
template <class C>
FASTFLAT_SHARED_CODE C largest_of(const C* t, int64_t n) {
  constexpr int width = 32;
  constexpr C none = -std::numeric_limits<C>::infinity();
  C most = none;
  int64_t i = 0;
  if (n >= width) {
    alignas(64) C lane[width];
    for (int l = 0; l < width; ++l) lane[l] = none;
    for (; i + width <= n; i += width) {
      for (int l = 0; l < width; ++l) lane[l] = t[i + l] > lane[l] ? t[i + l] : lane[l];
    }
    for (int l = 0; l < width; ++l) most = lane[l] > most ? lane[l] : most;
  }
  for (; i < n; ++i) most = t[i] > most ? t[i] : most;
  return most;
}

template <class C>
FASTFLAT_SHARED_CODE void subtract(const C* t, C v, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = t[i] - v;
}

template <class C>
FASTFLAT_SHARED_CODE void exp_of(const C* t, C* out, int64_t n) {
  in_blocks(t, n, out, [](C v) __attribute__((always_inline)) { return elementary::exp(v); });
}
template <class C>
FASTFLAT_SHARED_CODE void exp_below(const C* t, C v, C* out, int64_t n) {
  in_blocks(t, n, out, [=](C x) __attribute__((always_inline)) { return elementary::exp(x - v); });
}
template <class C>
FASTFLAT_SHARED_CODE void log_of(const C* t, C factor, C* out, int64_t n) {
  in_blocks(t, n, out, [=](C v) __attribute__((always_inline)) { return elementary::log(v * factor); });
}

template <class C>
FASTFLAT_SHARED_CODE void add(const C* t, C* sum, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] + t[i];
}

template <class C>
FASTFLAT_SHARED_CODE void divergences(const C* p, const C* log_p, const C* log_q, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = divergence(p[i], log_p[i], log_q[i]);
}

template <class C>
FASTFLAT_SHARED_CODE void divergences_to(const Norm<C>& q_, const C* p, const C* log_p, const C* z, C* out, int64_t n) {
  const Norm<C> q = q_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = divergence(p[i], log_p[i], q(z[i]));
}

template <class C>
FASTFLAT_SHARED_CODE void to_first(C g, const C* p, const C* log_p, const C* log_q, C all, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = gradient_to_first(g, p[i], log_p[i], log_q[i], all);
}
template <class C>
FASTFLAT_SHARED_CODE void to_both(C g, const C* p, const C* log_p, const C* q, const C* log_q, C all, C* first,
                                  C* second, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    first[i] = first[i] + gradient_to_first(g, p[i], log_p[i], log_q[i], all);
    second[i] = gradient_to_second(g, p[i], q[i]);
  }
}

template <class C>
FASTFLAT_SHARED_CODE void balance(C s, const C* z, const C* mult, const C* add, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = balanced(s, z[i], mult[i], add[i], C(0));
}
template <class C>
FASTFLAT_SHARED_CODE void of_losses(C g, C s, const C* mult, const C* p, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = gradient_of_loss(g, s, mult[i], p[i], C(0));
}
template <class C>
FASTFLAT_SHARED_CODE void step_along(const C* a, const C* b, C t, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] - t * b[i];
}

// Rows [row, row + rows) of a call, whose storage types meet the compute type here.
template <class C>
struct Tile {
  const LogitsCall& call;
  C* scratch;
  int64_t row = 0, rows = 0;

  int64_t size() const { return rows * call.C; }
  C* take(int64_t elements = 0) {
    C* const own = scratch;
    scratch += elements ? elements : logits_at_once(call.C) * std::max<int64_t>(call.C, 1);
    return own;
  }
  int64_t at(int64_t k) const { return (k * call.R + row) * call.C; }

  const C* fetch(const void* data, int64_t k, C* buffer) const {
    return FASTFLAT_ISA::fetch(call.storage, data, at(k), size(), buffer);
  }
  C* target(void* data, int64_t k, C* buffer) const { return FASTFLAT_ISA::target(call.storage, data, at(k), buffer); }
  void deliver(const C* from, void* data, int64_t k) const {
    FASTFLAT_ISA::deliver(call.storage, from, data, at(k), size());
  }
  C* norm(int64_t k) const { return static_cast<C*>(call.norm) + 2 * (k * call.R + row); }
};

template <class C, class Body>
inline void for_tiles(const LogitsCall& call, int64_t begin, int64_t end, Tile<C>& tile, const Body& body) {
  const int64_t most = logits_at_once(call.C);
  for (tile.row = begin; tile.row < end; tile.row += most) {
    tile.rows = std::min(most, end - tile.row);
    body();
  }
}

// The numbers of each row, which are written to `norm`; e is left with exponentials.
template <class C>
FASTFLAT_SHARED_CODE void norms(const C* z, C* e, C* norm, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    norm[2 * r] = largest_of(z + r * n, n);
    (n < long_row ? subtract<C> : exp_below<C>)(z + r * n, norm[2 * r], e + r * n, n);
  }
  if (n < long_row) exp_of(e, e, rows * n);
  for (int64_t r = 0; r < rows; ++r) norm[2 * r + 1] = elementary::log(static_cast<C>(sum_of(e + r * n, n)));
}

template <class C>
FASTFLAT_SHARED_CODE void log_probabilities(const C* z, const C* norm, C* t, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    const Norm<C> of{norm[2 * r], norm[2 * r + 1]};
#pragma GCC ivdep
    for (int64_t i = r * n; i < (r + 1) * n; ++i) t[i] = of(z[i]);
  }
}

// The K + 1 distributions of a Jensen-Shannon divergence: of z0 first.
template <class C>
inline const C* fetch_one(const Tile<C>& tile, int64_t i, C* buffer) {
  return i ? tile.fetch(tile.call.z, i - 1, buffer) : tile.fetch(tile.call.z0, 0, buffer);
}

// log M of a tile; `first` says that norms are not there yet.
template <class C>
void mixture(const Tile<C>& tile, bool first, C* buffer, C* t, C* e, C* log_m) {
  const int64_t n = tile.call.C;
  std::memset(log_m, 0, tile.size() * sizeof(C));
  for (int64_t i = 0; i <= tile.call.K; ++i) {
    const C* const z = fetch_one(tile, i, buffer);
    if (first) norms(z, e, tile.norm(i), tile.rows, n);
    log_probabilities(z, tile.norm(i), t, tile.rows, n);
    exp_of(t, e, tile.size());
    add(e, log_m, tile.size());
  }
  log_of(log_m, static_cast<C>(1.0 / static_cast<double>(tile.call.K + 1)), log_m, tile.size());
}

template <class C>
void divergence_loop(const LogitsCall& call, int64_t begin, int64_t end, void* scratch, double*) {
  const int64_t n = call.C;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *buffer = tile.take(), *log_p = tile.take(), *p = tile.take(), *t = tile.take(), *e = tile.take();
  const auto leave = [&](int64_t k, const C* terms) {
    C* const to = static_cast<C*>(call.divergence) + k * call.R + tile.row;
    for (int64_t r = 0; r < tile.rows; ++r) to[r] = static_cast<C>(sum_of(terms + r * n, n));
  };
  for_tiles(call, begin, end, tile, [&] {
    if (call.js) {
      mixture(tile, true, buffer, t, e, log_p);
      for (int64_t i = 0; i <= call.K; ++i) {
        log_probabilities(fetch_one(tile, i, buffer), tile.norm(i), t, tile.rows, n);
        exp_of(t, p, tile.size());
        divergences(p, t, log_p, e, tile.size());
        leave(i, e);
      }
      return;
    }
    const C* const z0 = tile.fetch(call.z0, 0, buffer);
    norms(z0, e, tile.norm(0), tile.rows, n);
    log_probabilities(z0, tile.norm(0), log_p, tile.rows, n);
    exp_of(log_p, p, tile.size());
    for (int64_t k = 0; k < call.K; ++k) {
      const C* const z = tile.fetch(call.z, k, buffer);
      const C* const norm = tile.norm(k + 1);
      norms(z, e, tile.norm(k + 1), tile.rows, n);
      for (int64_t r = 0, j = 0; r < tile.rows; ++r, j += n) {
        divergences_to(Norm<C>{norm[2 * r], norm[2 * r + 1]}, p + j, log_p + j, z + j, e + j, n);
      }
      leave(k, e);
    }
  });
}

template <class C>
void divergence_bwd_loop(const LogitsCall& call, int64_t begin, int64_t end, void* scratch, double*) {
  const int64_t n = call.C;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *buffer = tile.take(), *log_p = tile.take(), *p = tile.take(), *t = tile.take(), *e = tile.take();
  C *of_out = tile.take(), *of_first = tile.take();
  for_tiles(call, begin, end, tile, [&] {
    const C* const g = static_cast<const C*>(call.g) + tile.row;
    const auto all = [&](int64_t k, int64_t r) {
      return static_cast<const C*>(call.divergence)[k * call.R + tile.row + r];
    };
    if (call.js) {
      mixture(tile, false, buffer, t, e, log_p);
      for (int64_t i = 0; i <= call.K; ++i) {
        void* const to = i ? call.out : call.out0;
        log_probabilities(fetch_one(tile, i, buffer), tile.norm(i), t, tile.rows, n);
        exp_of(t, p, tile.size());
        C* const out = tile.target(to, i ? i - 1 : 0, of_out);
        for (int64_t r = 0, j = 0; r < tile.rows; ++r, j += n) {
          to_first(g[r], p + j, t + j, log_p + j, all(i, r), out + j, n);
        }
        tile.deliver(out, to, i ? i - 1 : 0);
      }
      return;
    }
    log_probabilities(tile.fetch(call.z0, 0, buffer), tile.norm(0), log_p, tile.rows, n);
    exp_of(log_p, p, tile.size());
    C* const out0 = tile.target(call.out0, 0, of_first);
    std::memset(out0, 0, tile.size() * sizeof(C));
    for (int64_t k = 0; k < call.K; ++k) {
      log_probabilities(tile.fetch(call.z, k, buffer), tile.norm(k + 1), t, tile.rows, n);
      exp_of(t, e, tile.size());
      C* const out = tile.target(call.out, k, of_out);
      for (int64_t r = 0, j = 0; r < tile.rows; ++r, j += n) {
        to_both(g[r], p + j, log_p + j, e + j, t + j, all(k, r), out0 + j, out + j, n);
      }
      tile.deliver(out, call.out, k);
    }
    tile.deliver(out0, call.out0, 0);
  });
}

// What a re-balanced loss knows of the classes, ones and zeros where nothing is given.
template <class C>
struct Classes {
  const C *mult, *add, *margin;
  C s;

  Classes(Tile<C>& tile) : s(static_cast<C>(tile.call.s)) {
    const LogitsCall& call = tile.call;
    C *const ones = tile.take(std::max<int64_t>(call.C, 1)), *const zeros = tile.take(std::max<int64_t>(call.C, 1));
    std::fill_n(ones, call.C, C(1));
    std::fill_n(zeros, call.C, C(0));
    mult = call.mult ? static_cast<const C*>(call.mult) : ones;
    add = call.add ? static_cast<const C*>(call.add) : zeros;
    margin = call.margin ? static_cast<const C*>(call.margin) : zeros;
  }
  // Logits of a tile as the loss sees them, NaN for labels that are no class.
  void operator()(const Tile<C>& tile, const C* z, C* a, C* of_label) const {
    const int64_t n = tile.call.C;
    for (int64_t r = 0; r < tile.rows; ++r) {
      balance(s, z + r * n, mult, add, a + r * n, n);
      const int64_t y = tile.call.y[tile.row + r];
      of_label[r] = std::numeric_limits<C>::quiet_NaN();
      if (y < 0 || y >= n) continue;
      of_label[r] = a[r * n + y] = balanced(s, z[r * n + y], mult[y], add[y], margin[y]);
    }
  }
};

template <class C>
void loss_loop(const LogitsCall& call, int64_t begin, int64_t end, void* scratch, double*) {
  const int64_t n = call.C;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *buffer = tile.take(), *a = tile.take(), *e = tile.take();
  const Classes<C> classes(tile);
  C* const losses = static_cast<C*>(call.of_row);
  for_tiles(call, begin, end, tile, [&] {
    C* const of_label = losses + tile.row;
    classes(tile, tile.fetch(call.z, 0, buffer), a, of_label);
    norms(a, e, tile.norm(0), tile.rows, n);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* const norm = tile.norm(0) + 2 * r;
      const int64_t y = call.y[tile.row + r];
      C weight = C(0), loss = C(0);
      if (y != call.ignore_index) {
        const bool known = y >= 0 && y < n;
        weight = known ? C(1) : std::numeric_limits<C>::quiet_NaN();
        if (known && call.weight) weight = static_cast<const C*>(call.weight)[y];
        loss = weight * logits::loss(Norm<C>{norm[0], norm[1]}, of_label[r]);
      }
      of_label[r] = loss;
      static_cast<C*>(call.out)[tile.row + r] = weight;
    }
  });
}

template <class C>
void loss_bwd_loop(const LogitsCall& call, int64_t begin, int64_t end, void* scratch, double*) {
  const int64_t n = call.C;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *buffer = tile.take(), *a = tile.take(), *p = tile.take(), *of_out = tile.take();
  const Classes<C> classes(tile);
  C* const of_label = tile.take();
  for_tiles(call, begin, end, tile, [&] {
    const C* const g = static_cast<const C*>(call.g) + tile.row;
    classes(tile, tile.fetch(call.z, 0, buffer), a, of_label);
    log_probabilities(a, tile.norm(0), a, tile.rows, n);
    exp_of(a, p, tile.size());
    C* const out = tile.target(call.out, 0, of_out);
    for (int64_t r = 0, j = 0; r < tile.rows; ++r, j += n) {
      of_losses(g[r], classes.s, classes.mult, p + j, out + j, n);
      const int64_t y = call.y[tile.row + r];
      if (y < 0 || y >= n) continue;
      out[j + y] = gradient_of_loss(g[r], classes.s, classes.mult[y], p[j + y], C(1));
    }
    tile.deliver(out, call.out, 0);
  });
}

template <class C>
void stats_loop(const LogitsCall& call, int64_t begin, int64_t end, void* scratch, double*) {
  const int64_t n = call.C;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *buffer = tile.take(), *e = tile.take();
  C* const out = static_cast<C*>(call.of_row);
  for_tiles(call, begin, end, tile, [&] {
    const C* const z = tile.fetch(call.z, 0, buffer);
    norms(z, e, tile.norm(0), tile.rows, n);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* const norm = tile.norm(0) + 2 * r;
      const int64_t y = call.y[tile.row + r], row = tile.row + r;
      const bool known = y >= 0 && y < n;
      C of_label = std::numeric_limits<C>::quiet_NaN(), other = norm[0];
      if (known) {
        const C before = largest_of(z + r * n, y), behind = largest_of(z + r * n + y + 1, n - y - 1);
        of_label = z[r * n + y];
        other = before > behind ? before : behind;
      }
      Stats<C> stats = Stats<C>::make(Norm<C>{norm[0], norm[1]}, of_label, other);
      if (y == call.ignore_index) stats.loss = stats.p = stats.gap = C(0);
      out[row] = stats.loss;
      out[call.R + row] = stats.p;
      out[2 * call.R + row] = stats.gap;
      out[3 * call.R + row] = stats.curvature;
    }
  });
}

template <class C>
void scan_loop(const LogitsCall& call, int64_t begin, int64_t end, void* scratch, double* sums) {
  const int64_t n = call.C;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *of_a = tile.take(), *of_b = tile.take(), *t = tile.take(), *e = tile.take();
  C* const norm = tile.take(2 * logits_at_once(n));
  for_tiles(call, begin, end, tile, [&] {
    const C *const a = tile.fetch(call.z0, 0, of_a), *const b = tile.fetch(call.z, 0, of_b);
    const int64_t* const y = call.y + tile.row;
    for (int64_t k = 0; k < call.K; ++k) {
      const C step = static_cast<const C*>(call.t)[k];
      step_along(a, b, step, t, tile.size());
      norms(t, e, norm, tile.rows, n);
      double sum = 0.0;
      for (int64_t r = 0; r < tile.rows; ++r) {
        if (y[r] == call.ignore_index) continue;
        const bool known = y[r] >= 0 && y[r] < n;
        const C of_label = known ? t[r * n + y[r]] : std::numeric_limits<C>::quiet_NaN();
        sum += static_cast<double>(logits::loss(Norm<C>{norm[2 * r], norm[2 * r + 1]}, of_label));
      }
      sums[k] += sum;
    }
    for (int64_t r = 0; r < tile.rows; ++r) sums[call.K] += y[r] != call.ignore_index;
  });
}

}  // namespace
}  // namespace FASTFLAT_ISA

#define FASTFLAT_LOGITS_LOOPS(C)                                                                          \
  {                                                                                                       \
    {                                                                                                     \
      FASTFLAT_ISA::divergence_loop<C>, FASTFLAT_ISA::divergence_bwd_loop<C>, FASTFLAT_ISA::loss_loop<C>, \
          FASTFLAT_ISA::loss_bwd_loop<C>, FASTFLAT_ISA::stats_loop<C>, FASTFLAT_ISA::scan_loop<C>         \
    }                                                                                                     \
  }

const LogitsLoops FASTFLAT_TABLE(logits) = FASTFLAT_LOGITS_LOOPS(float);
#if !defined(FASTFLAT_ISA_AVX2) && !defined(FASTFLAT_ISA_AVX512)
const LogitsLoops logits_double = FASTFLAT_LOGITS_LOOPS(double);
#endif

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"

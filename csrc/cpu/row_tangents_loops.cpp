// SPDX-License-Identifier: Apache-2.0
// The loops of the row_tangents family (cpu/row_tangents.h: for which instruction sets).
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/row_tangents.h"

#if !defined(FASTFLAT_ISA_AVX512)
#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/row_tangents.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

using namespace row_tangents;

#include "cpu/in_blocks.h"

// A sum runs in 32 lanes of float or 8 of double whatever the vector width, which are folded to eight and, after every
// `flush` elements, added up in double: an error of 1e-6 of the magnitudes cannot come together.
template <class C>
constexpr int lanes = sizeof(C) == 4 ? 32 : 8;
constexpr int64_t flush = 256;

#if defined(FASTFLAT_ISA_AVX2)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class C>
struct RegisterOf;
template <>
struct RegisterOf<float> {
  typedef float type __attribute__((vector_size(register_bytes)));
};
template <>
struct RegisterOf<double> {
  typedef double type __attribute__((vector_size(register_bytes)));
};
template <class C>
using Register = typename RegisterOf<C>::type;
template <class C>
constexpr int width = register_bytes / static_cast<int>(sizeof(C));

template <class C>
inline Register<C> load_register(const C* from) {
  Register<C> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class C>
inline C total(const C* sum) {
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// A sum on its way; the last elements, fewer than eight, are added to `rest`.
template <class C>
struct Lanes {
  static constexpr int parts = lanes<C> / width<C>;
  Register<C> part[parts] = {};
  C rest = C(0);

  void fold(C* lane) {
#pragma GCC unroll 8
    for (int half = parts / 2; half >= 8 / width<C>; half /= 2) {
#pragma GCC unroll 8
      for (int p = 0; p < half; ++p) part[p] += part[p + half];
    }
    std::memcpy(lane, part, 8 * sizeof(C));
  }
};

struct RowSums {
  double first, product;
};

// At most `flush` elements.
template <bool with_first, class C>
__attribute__((always_inline)) inline void block_sums(const C* a, const C* b, C shift, int64_t n, Lanes<C>& first,
                                                      Lanes<C>& product) {
  constexpr int eight = 8 / width<C>;
  const auto add = [&](int64_t i, int p) __attribute__((always_inline)) {
    const Register<C> x = load_register(a + i) - shift;
    if (with_first) first.part[p] += x;
    product.part[p] += x * load_register(b + i);
  };
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) {
#pragma GCC unroll 8
    for (int p = 0; p < Lanes<C>::parts; ++p) add(i + p * width<C>, p);
  }
#pragma GCC unroll 4
  for (int p = 0; p + eight < Lanes<C>::parts; p += eight) {
    if (i + 8 > n) break;
#pragma GCC unroll 4
    for (int q = 0; q < eight; ++q) add(i + q * width<C>, p + q);
    i += 8;
  }
  for (; i < n; ++i) {
    const C x = a[i] - shift;
    if (with_first) first.rest += x;
    product.rest += x * b[i];
  }
}

// Sums of a - shift, where it is asked for, and of its products with b.
template <bool with_first, class C>
FASTFLAT_SHARED_CODE RowSums sums(const C* a, const C* b, C shift, int64_t n) {
  double of_first[8] = {}, of_product[8] = {}, rest[2] = {};
  C lane[8];
  for (int64_t at = 0; at < n; at += flush) {
    Lanes<C> first, product;
    block_sums<with_first>(a + at, b + at, shift, std::min(flush, n - at), first, product);
    product.fold(lane);
    for (int l = 0; l < 8; ++l) of_product[l] += static_cast<double>(lane[l]);
    rest[1] += static_cast<double>(product.rest);
    if (!with_first) continue;
    first.fold(lane);
    for (int l = 0; l < 8; ++l) of_first[l] += static_cast<double>(lane[l]);
    rest[0] += static_cast<double>(first.rest);
  }
  return {total(of_first) + rest[0], total(of_product) + rest[1]};
}

// <a, b> of a row: what is short is added up in C to the end.
template <class C>
__attribute__((always_inline)) inline C inline_dot(const C* a, const C* b, int64_t n) {
  if (n > flush) return static_cast<C>(sums<false>(a, b, C(0), n).product);
  Lanes<C> none, product;
  C lane[8];
  block_sums<false>(a, b, C(0), n, none, product);
  product.fold(lane);
  return total(lane) + product.rest;
}
template <class C>
FASTFLAT_SHARED_CODE C dot(const C* a, const C* b, int64_t n) {
  return inline_dot(a, b, n);
}

// The tensors of a call in the compute type: in place, or in parts of the scratch.
template <class C>
struct Tile {
  const RowTangentsCall& call;
  C* scratch;

  C* take() {
    C* const own = scratch;
    scratch += rows_at_once(call.D) * call.D;
    return own;
  }
  bool in_place() const { return sizeof(C) == 8 || call.storage == f32; }

  // Elements [at, at + n); an absent tensor stays null.
  const C* fetch(const void* data, int64_t at, int64_t n, C* buffer) const {
    return !data ? nullptr : FASTFLAT_ISA::fetch(call.storage, data, at, n, buffer);
  }

  C* target(int64_t at, C* buffer) const { return FASTFLAT_ISA::target(call.storage, call.out, at, buffer); }
  void deliver(const C* from, int64_t at, int64_t n) const {
    FASTFLAT_ISA::deliver(call.storage, from, call.out, at, n);
  }
};

// body(first row, rows, elements before them)
template <class Body>
inline void for_tiles(const RowTangentsCall& call, const RowTangentsPart& part, const Body& body) {
  const int64_t most = rows_at_once(call.D);
  for (int64_t row = part.begin; row < part.end; row += most) {
    body(row, std::min(most, part.end - row), row * call.D);
  }
}

template <class C>
inline C number(const void* data, int64_t at, C absent = C(0)) {
  return data ? static_cast<const C*>(data)[at] : absent;
}

template <class C>
FASTFLAT_SHARED_CODE void norm_row(const Norm<C>& norm_, const C* x, const C* normal, C* out, int64_t n) {
  const Norm<C> norm = norm_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = norm(x[i], normal[i]);
}

// With weight, its tangent and that of the bias.
template <class C>
FASTFLAT_SHARED_CODE void norm_affine_row(const Norm<C>& norm_, const C* x, const C* normal, const C* weight,
                                          const C* along, const C* bias, C* out, int64_t n) {
  const Norm<C> norm = norm_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = (norm(x[i], normal[i]) * weight[i] + normal[i] * along[i]) + bias[i];
}

// out = a b, or out + a b
template <bool added, class C>
FASTFLAT_SHARED_CODE void product_row(const C* a, const C* b, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const C v = a[i] * b[i];
    out[i] = added ? out[i] + v : v;
  }
}

template <class C>
FASTFLAT_SHARED_CODE void products_row(const C* a, const C* b, const C* c, const C* d, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i] + c[i] * d[i];
}

template <class C>
FASTFLAT_SHARED_CODE void add_row(const C* a, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = out[i] + a[i];
}

template <class C>
void norm(const RowTangentsCall& call, const RowTangentsPart& part, void* scratch) {
  const int64_t D = call.D;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *of_normal = tile.take(), *of_weight = of_normal, *of_along = of_normal, *of_bias = of_normal, *buffer = of_normal;
  if (!tile.in_place()) {
    of_weight = tile.take(), of_along = tile.take(), of_bias = tile.take(), buffer = tile.take();
  }
  const C* const weight = tile.fetch(call.weight, 0, D, of_weight);
  for_tiles(call, part, [&](int64_t row, int64_t rows, int64_t before) {
    const C* const normal = tile.fetch(call.normal, before, rows * D, of_normal);
    for (int64_t k = part.first; k < part.last; ++k) {
      const int64_t at = k * call.R * D + before;
      const C* const x = tile.fetch(call.x, at, rows * D, buffer);
      const C* const along = tile.fetch(call.along_weight, k * D, D, of_along);
      const C* const bias = tile.fetch(call.along_bias, k * D, D, of_bias);
      C* const out = tile.target(at, buffer);
      for (int64_t r = 0; r < rows; ++r) {
        const C* const own = normal + r * D;
        C* const to = out + r * D;
        if (x) {
          const RowSums of = sums<true>(x + r * D, own, C(0), D);
          const double n = static_cast<double>(D);
          const Norm<C> norm{call.option ? static_cast<C>(of.first / n) : C(0), static_cast<C>(of.product / n),
                             number<C>(call.of_row, row + r)};
          static_cast<C*>(call.new_mean)[k * call.R + row + r] = norm.m;
          static_cast<C*>(call.new_scale)[k * call.R + row + r] = norm.scale();
          if (weight && along && bias) {
            norm_affine_row(norm, x + r * D, own, weight, along, bias, to, D);
            continue;
          }
          norm_row(norm, x + r * D, own, to, D);
          if (weight) product_row<false>(to, weight, to, D);
        }
        if (along) (x ? product_row<true, C> : product_row<false, C>)(own, along, to, D);
        if (bias && (x || along)) add_row(bias, to, D);
        if (bias && !x && !along) std::memcpy(to, bias, D * sizeof(C));
      }
      tile.deliver(out, at, rows * D);
    }
  });
}

template <class C>
FASTFLAT_SHARED_CODE void backward_row(const NormBackward<C>& f_, const C* rh, const C* normal, const C* x, const C* h,
                                       C* out, int64_t n) {
  const NormBackward<C> f = f_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    out[i] = ((f.of_rh(rh[i]) + f.of_normal(normal[i])) + f.of_x(x[i])) + f.of_h(h[i]);
  }
}

// out + (a - shift) by
template <class C>
FASTFLAT_SHARED_CODE void shifted_row(const C* a, C shift, C by, C* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = out[i] + (a[i] - shift) * by;
}

// The terms that are there, in the same order.
template <class C>
FASTFLAT_SHARED_CODE void some_backward_row(const NormBackward<C>& f, const C* rh, const C* normal, const C* x,
                                            const C* h, C* out, int64_t n) {
  if (rh) {
    if (rh != out) std::memcpy(out, rh, n * sizeof(C));
    for (int64_t i = 0; i < n; ++i) out[i] = f.of_rh(out[i]);
  } else {
    std::memset(out, 0, n * sizeof(C));
  }
  shifted_row(normal, C(0), f.by_normal, out, n);
  if (x) shifted_row(x, f.m, f.by_x, out, n);
  if (h) shifted_row(h, f.h_mean, f.by_h, out, n);
}

template <class C>
void norm_bwd(const RowTangentsCall& call, const RowTangentsPart& part, void* scratch) {
  const int64_t D = call.D;
  const double n = static_cast<double>(D);
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *of_h = tile.take(), *of_g = tile.take(), *buffer = tile.take();
  C *of_normal = of_h, *of_grad = of_h, *of_weight = of_h, *of_along = of_h, *of_x = buffer;
  if (!tile.in_place()) {
    of_normal = tile.take(), of_grad = tile.take(), of_weight = tile.take(), of_along = tile.take();
    of_x = tile.take();
  }
  const bool moved = call.x || call.mean;
  const C* const weight = tile.fetch(call.weight, 0, D, of_weight);
  for_tiles(call, part, [&](int64_t row, int64_t rows, int64_t before) {
    const C* const normal = tile.fetch(call.normal, before, rows * D, of_normal);
    const C* const grad = tile.fetch(call.grad, before, rows * D, of_grad);
    C h_mean[most_rows], h_normal[most_rows];
    const C* h = grad;
    if (weight) {
      for (int64_t r = 0; r < rows; ++r) product_row<false>(grad + r * D, weight, of_h + r * D, D);
      h = of_h;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const RowSums of = sums<true>(h + r * D, normal + r * D, C(0), D);
      h_mean[r] = call.option ? static_cast<C>(of.first / n) : C(0);
      h_normal[r] = static_cast<C>(of.product / n);
    }
    for (int64_t k = part.first; k < part.last; ++k) {
      const int64_t at = k * call.R * D + before;
      const C* const g = tile.fetch(call.g, at, rows * D, of_g);
      const C* x = tile.fetch(call.x, at, rows * D, of_x);
      const C* const along = tile.fetch(call.along_weight, k * D, D, of_along);
      C* const out = tile.target(at, buffer);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t skip = r * D, of_k = k * call.R + row + r;
        const C* rh = g ? g + skip : nullptr;
        if ((rh && weight) || along) {
          // In the row of the result, where it is read once more before it is overwritten.
          C* const to = out + skip;
          if (rh && weight && along) {
            products_row(rh, weight, grad + skip, along, to, D);
          } else if (rh && weight) {
            product_row<false>(rh, weight, to, D);
          } else {
            if (rh) std::memcpy(to, rh, D * sizeof(C));
            (rh ? product_row<true, C> : product_row<false, C>)(grad + skip, along, to, D);
          }
          rh = to;
        }
        const C m = number<C>(call.mean, of_k);
        const C* of_row = x ? x + skip : nullptr;
        if (moved && !x) {
          std::fill_n(of_x, D, C(0));
          of_row = of_x;
        }
        const RowSums of_rh = rh ? sums<true>(rh, normal + skip, C(0), D) : RowSums{};
        const RowSums of_moved = moved ? sums<false>(of_row, h + skip, m, D) : RowSums{};
        const auto f = NormBackward<C>::make(number<C>(call.of_row, row + r), number<C>(call.scale, of_k), m, h_mean[r],
                                             h_normal[r], call.option ? static_cast<C>(of_rh.first / n) : C(0),
                                             static_cast<C>(of_rh.product / n), static_cast<C>(of_moved.product / n));
        if (rh && moved && call.scale) {
          backward_row(f, rh, normal + skip, of_row, h + skip, out + skip, D);
        } else {
          some_backward_row(f, rh, normal + skip, of_row, call.scale ? h + skip : nullptr, out + skip, D);
        }
      }
      tile.deliver(out, at, rows * D);
    }
  });
}

template <class C>
FASTFLAT_SHARED_CODE void exp_row(const C* p, C* q, int64_t n) {
  in_blocks(p, n, q, [](C v) __attribute__((always_inline)) { return elementary::exp(v); });
}

// Writes of a row may run over its end, where the next row overwrites them; the last row keeps to its place.
template <class C>
FASTFLAT_SHARED_CODE void softmax_rows(const C* t, const C* q, const C* scale, C* out, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, t += n, q += n, out += n) {
    const Softmax<C> f{scale ? scale[r] : C(1), inline_dot(t, q, n)};
    if (r + 1 < rows && n >= width<C>) {
      for (int64_t i = 0; i < n; i += width<C>) {
        const Register<C> v = f(load_register(t + i), load_register(q + i));
        std::memcpy(out + i, &v, sizeof(v));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = f(t[i], q[i]);
    }
  }
}

template <class C>
void softmax(const RowTangentsCall& call, const RowTangentsPart& part, void* scratch) {
  const int64_t D = call.D;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *of_p = tile.take(), *of_q = tile.take(), *of_t = of_p, *buffer = of_p;
  if (!tile.in_place()) of_t = tile.take(), buffer = tile.take();
  for_tiles(call, part, [&](int64_t row, int64_t rows, int64_t before) {
    const C* q = tile.fetch(call.normal, before, rows * D, of_p);
    if (call.option) {
      exp_row(q, of_q, rows * D);
      q = of_q;
    }
    for (int64_t k = part.first; k < part.last; ++k) {
      const int64_t at = k * call.R * D + before;
      const C* const t = tile.fetch(call.x, at, rows * D, of_t);
      C* const out = tile.target(at, buffer);
      softmax_rows(t, q, call.of_row ? static_cast<const C*>(call.of_row) + row : nullptr, out, rows, D);
      tile.deliver(out, at, rows * D);
    }
  });
}

template <class C>
FASTFLAT_SHARED_CODE void along_row(const SoftmaxBackward<C>& f_, const C* along, const C* p, const C* grad, C* out,
                                    int64_t n) {
  const SoftmaxBackward<C> f = f_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = f.of_along(along[i], p[i], grad[i]);
}

template <class C>
FASTFLAT_SHARED_CODE void gradient_row(const SoftmaxBackward<C>& f_, const C* g, const C* p, C* out, int64_t n) {
  const SoftmaxBackward<C> f = f_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = f.of_g(g[i], p[i]);
}

template <class C>
FASTFLAT_SHARED_CODE void both_row(const SoftmaxBackward<C>& f_, const C* along, const C* g, const C* p, const C* grad,
                                   C* out, int64_t n) {
  const SoftmaxBackward<C> f = f_;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = f.of_along(along[i], p[i], grad[i]) + f.of_g(g[i], p[i]);
}

template <class C>
void softmax_bwd(const RowTangentsCall& call, const RowTangentsPart& part, void* scratch) {
  const int64_t D = call.D;
  Tile<C> tile{call, static_cast<C*>(scratch)};
  C *of_p = tile.take(), *of_grad = tile.take(), *of_g = tile.take(), *of_along = of_p;
  if (!tile.in_place()) of_along = tile.take();
  for_tiles(call, part, [&](int64_t, int64_t rows, int64_t before) {
    const C* const p = tile.fetch(call.normal, before, rows * D, of_p);
    const C* const grad = tile.fetch(call.grad, before, rows * D, of_grad);
    C of_rows[most_rows];
    for (int64_t r = 0; r < rows && call.x; ++r) {
      of_rows[r] = dot(grad + r * D, p + r * D, D);
    }
    for (int64_t k = part.first; k < part.last; ++k) {
      const int64_t at = k * call.R * D + before;
      const C* const g = tile.fetch(call.g, at, rows * D, of_g);
      const C* const along = tile.fetch(call.x, at, rows * D, of_along);
      C* const out = tile.target(at, of_g);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t skip = r * D;
        SoftmaxBackward<C> f{};
        if (along) {
          f.D = of_rows[r];
          f.along_dot = dot(along + skip, grad + skip, D);
        }
        if (g) f.g_dot = dot(g + skip, p + skip, D);
        if (along && g) {
          both_row(f, along + skip, g + skip, p + skip, grad + skip, out + skip, D);
        } else if (along) {
          along_row(f, along + skip, p + skip, grad + skip, out + skip, D);
        } else {
          gradient_row(f, g + skip, p + skip, out + skip, D);
        }
      }
      tile.deliver(out, at, rows * D);
    }
  });
}

}  // namespace
}  // namespace FASTFLAT_ISA

#define FASTFLAT_ROW_LOOPS(C) \
  {FASTFLAT_ISA::norm<C>, FASTFLAT_ISA::norm_bwd<C>, FASTFLAT_ISA::softmax<C>, FASTFLAT_ISA::softmax_bwd<C>}

const RowTangentsLoops FASTFLAT_TABLE(row_tangents) = FASTFLAT_ROW_LOOPS(float);
#if !defined(FASTFLAT_ISA_AVX2)
const RowTangentsLoops row_tangents_double = FASTFLAT_ROW_LOOPS(double);
#endif

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
#endif

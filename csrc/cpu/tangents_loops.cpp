// SPDX-License-Identifier: Apache-2.0
// The loops of the tangents family, which the walks of tangents_walk.h call for each tile. Compiled once for each
// instruction set (cpu/isa.h) but AVX-512, which has the factors of
// activations alone and else takes what AVX2 has (cpu/tangents.h).
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/tangents.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/tangents.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

// What is written may be what is read, element by element.
#define FASTFLAT_EACH(n) _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); ++i)

#ifndef FASTFLAT_ISA_AVX512

template <class C>
void multiply(C* out, const C* a, const C* b, int64_t n) {
  FASTFLAT_EACH(n) out[i] = a[i] * b[i];
}
template <class C>
__attribute__((noinline)) void add(C* out, const C* v, const C* a, int64_t n) {
  FASTFLAT_EACH(n) out[i] = v[i] + a[i];
}
template <class C>
__attribute__((noinline)) void add_product(C* out, const C* v, const C* a, const C* b, int64_t n) {
  FASTFLAT_EACH(n) out[i] = v[i] + a[i] * b[i];
}
template <class C>
void add_products(C* out, const C* a, const C* b, const C* c, const C* d, int64_t n) {
  FASTFLAT_EACH(n) out[i] = a[i] * b[i] + c[i] * d[i];
}
template <class C>
void add_products_to(C* out, const C* a, const C* b, const C* c, const C* d, const C* v, int64_t n) {
  FASTFLAT_EACH(n) out[i] = (a[i] * b[i] + c[i] * d[i]) + v[i];
}

#endif

#if defined(FASTFLAT_ISA_AVX512)
constexpr int vector_bytes = 64;
#elif defined(FASTFLAT_ISA_AVX2)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

#ifndef FASTFLAT_ISA_AVX512

// What follows takes whole vectors, so that its code is there once; the last elements pass through a padded one.
template <class From, class To, class Convert>
inline void convert(const From* from, int64_t n, To* to, const Convert& whole) {
  constexpr int64_t width = 2 * vector_bytes / sizeof(float);
  const int64_t done = n / width * width;
  whole(from, done, to);
  if (done == n) return;
  From last[width] = {};
  To converted[width];
  std::memcpy(last, from + done, (n - done) * sizeof(From));
  whole(last, width, converted);
  std::memcpy(to + done, converted, (n - done) * sizeof(To));
}

template <class T>
__attribute__((noinline)) void widen_vectors(const T* from, int64_t n, float* to) {
  n &= -int64_t{2 * vector_bytes / sizeof(float)};
  FASTFLAT_EACH(n) to[i] = load(from[i]);
}
template <class T>
__attribute__((noinline)) void narrow_vectors(const float* from, int64_t n, T* to) {
  n &= -int64_t{2 * vector_bytes / sizeof(float)};
  FASTFLAT_EACH(n) to[i] = store<T>(from[i]);
}

template <class T>
void widen(const void* from, int64_t n, float* to) {
  convert(static_cast<const T*>(from), n, to, widen_vectors<T>);
}
template <class T>
void narrow(const float* from, int64_t n, void* to) {
  convert(from, n, static_cast<T*>(to), narrow_vectors<T>);
}

// sum t, or sum t p, of a run: in sixteen lanes whatever the vector width.
template <class C, bool product>
inline double run_of(const C* t, const C* p, int64_t n) {
  typedef C Vector __attribute__((vector_size(vector_bytes)));
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  constexpr int lanes = 16, width = vector_bytes / sizeof(C), parts = lanes / width;
  Vector sum[parts] = {};
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + lanes <= n; i += lanes) {
#pragma GCC unroll 8
    for (int q = 0; q < parts; ++q) {
      Vector a, b;
      std::memcpy(&a, t + i + q * width, sizeof(a));
      std::memcpy(&b, p + i + q * width, sizeof(b));
      sum[q] += product ? a * b : a;
    }
  }
  Four four[lanes / 4];
  std::memcpy(four, sum, sizeof(four));
  const Four all = ((four[0] + four[1]) + four[2]) + four[3];
  C lane[4];
  std::memcpy(lane, &all, sizeof(lane));
  C rest = 0;
#pragma GCC unroll 1
  for (; i < n; ++i) {
    rest += product ? t[i] * p[i] : t[i];
    asm volatile("");  // not worth a vector loop
  }
  return static_cast<double>(((lane[0] + lane[2]) + (lane[1] + lane[3])) + rest);
}

template <class C, bool product>
__attribute__((noinline)) void sum_runs(const Geometry& g, const C* t, const C* p, int64_t column, int64_t n,
                                        double* sums) {
  const int64_t run = column / g.inner;
  int64_t c = run % g.channels;
  for (int64_t i = 0, stop = (run + 1) * g.inner - column; i < n; stop += g.inner) {
    const int64_t until = std::min(stop, n);
    sums[c] += run_of<C, product>(t + i, p + i, until - i);
    i = until;
    if (++c == g.channels) c = 0;
  }
}

template <class C>
void runs(const Geometry& g, const C* t, const C* p, int64_t column, int64_t n, double* sums) {
  p ? sum_runs<C, true>(g, t, p, column, n, sums) : sum_runs<C, false>(g, t, t, column, n, sums);
}

template <class C>
void columns(C* sums, const C* t, int64_t of_t, const C* p, int64_t of_p, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    p ? add_product(sums, sums, t + r * of_t, p + r * of_p, n) : add(sums, sums, t + r * of_t, n);
  }
}

template <class C>
void widen_sums(const C* v, int64_t n, double* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(v[i]);
}

#endif

// n is a multiple of a vector's numbers, and the compiler knows: the functor is compiled once.
template <class C, class Factors>
__attribute__((noinline)) void form_factors(const Factors& factors, const C* p, const C* g, int64_t n, C* first,
                                            C* second) {
  n &= -static_cast<int64_t>(vector_bytes / sizeof(C));
  FASTFLAT_EACH(n) {
    const TangentFactors<C> f = factors(p[i], g[i]);
    first[i] = f.first;
    second[i] = f.second;
  }
}

template <class C>
__attribute__((noinline)) void vectors_of_factors(int kind, const C* p, const C* g, int64_t n, C* first, C* second) {
  switch (kind) {
    case sigmoid_output:
      return form_factors(SigmoidFactors{}, p, g, n, first, second);
    case tanh_output:
      return form_factors(TanhFactors{}, p, g, n, first, second);
    case silu_input:
      return form_factors(SiluFactors{}, p, g, n, first, second);
    case gelu_input:
      return form_factors(GeluFactors{}, p, g, n, first, second);
    case gelu_tanh_input:
      return form_factors(GeluTanhFactors{}, p, g, n, first, second);
    default:
      return form_factors(ReluFactors{}, p, g, n, first, second);
  }
}

// Of n elements of a tile; what is written has room for whole vectors.
template <class C>
void activation_factors(int kind, const C* p, const C* g, int64_t n, C* first, C* second) {
  constexpr int64_t width = vector_bytes / sizeof(C);
  const int64_t whole = n / width * width;
  vectors_of_factors(kind, p, g, whole, first, second);
  if (whole == n) return;
  C last_p[width] = {}, last_g[width] = {};
  std::memcpy(last_p, p + whole, (n - whole) * sizeof(C));
  std::memcpy(last_g, g + whole, (n - whole) * sizeof(C));
  vectors_of_factors(kind, last_p, last_g, width, first + whole, second + whole);
}

}  // namespace
}  // namespace FASTFLAT_ISA

#ifdef FASTFLAT_ISA_AVX512
const TangentFactorsLoop tangents_factors_avx512 = avx512::activation_factors<float>;
#else
#define FASTFLAT_LOOPS_OF(C)            \
  {FASTFLAT_ISA::multiply<C>,           \
   FASTFLAT_ISA::add<C>,                \
   FASTFLAT_ISA::add_product<C>,        \
   FASTFLAT_ISA::add_products<C>,       \
   FASTFLAT_ISA::add_products_to<C>,    \
   FASTFLAT_ISA::activation_factors<C>, \
   FASTFLAT_ISA::runs<C>,               \
   FASTFLAT_ISA::columns<C>,            \
   FASTFLAT_ISA::widen_sums<C>}

const TangentsLoops FASTFLAT_TABLE(tangents_loops) = {
    FASTFLAT_LOOPS_OF(float),
    FASTFLAT_LOOPS_OF(double),
    {FASTFLAT_ISA::widen<BFloat16>, FASTFLAT_ISA::widen<Half>},
    {FASTFLAT_ISA::narrow<BFloat16>, FASTFLAT_ISA::narrow<Half>},
};
#endif

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"

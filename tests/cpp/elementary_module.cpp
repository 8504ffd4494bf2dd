// SPDX-License-Identifier: Apache-2.0
// Python face of the elementary functions and the random draws of csrc/math, and of the bulk draws of the CPU loops.
// Test code, never in a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "math/elementary.h"
#include "math/noise.h"
#include "math/philox.h"

namespace py = pybind11;
using namespace fastflat;

namespace baseline {
#include "cpu/noise_fill.h"
}
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2")
#define FASTFLAT_ISA_AVX2
namespace avx2 {
#include "cpu/noise_fill.h"
}
#undef FASTFLAT_ISA_AVX2
#pragma GCC pop_options
#endif

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// The functions under test and what they shall be, in a wider type.
struct Exp {
  template <class C>
  static C got(C x) {
    return elementary::exp(x);
  }
  template <class W>
  static W want(W x) {
    return std::exp(x);
  }
};
struct Sigmoid {
  template <class C>
  static C got(C x) {
    return elementary::sigmoid(x);
  }
  template <class W>
  static W want(W x) {
    return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
  }
};
struct Log {
  template <class C>
  static C got(C x) {
    return elementary::log(x);
  }
  template <class W>
  static W want(W x) {
    return std::log(x);
  }
};
constexpr long double half_pi = 1.57079632679489661923132169163975144L;
struct Sine {
  template <class C>
  static C got(C x) {
    return elementary::sine_cosine(x).sine;
  }
  template <class W>
  static W want(W x) {
    return std::sin(x * static_cast<W>(half_pi));
  }
};
struct Cosine {
  template <class C>
  static C got(C x) {
    return elementary::sine_cosine(x).cosine;
  }
  template <class W>
  static W want(W x) {
    return std::cos(x * static_cast<W>(half_pi));
  }
};
// Near 1: their errors are absolute.
struct Tanh {
  template <class C>
  static C got(C x) {
    return elementary::tanh(x);
  }
};
struct Below {
  template <class C>
  static C got(C x) {
    return elementary::normal(x).below;
  }
};
struct Density {
  template <class C>
  static C got(C x) {
    return elementary::normal(x).density;
  }
};

// |got - want| in units in the last place of C at `want`; infinity counts as the next power of two. A NaN on one side
// alone is infinitely wrong, and so is an infinity far from overflow.
template <class C, class W>
double units_off(C got, W want) {
  if (got != got || want != want) return (got != got) == (want != want) ? 0.0 : HUGE_VAL;
  constexpr int digits = sizeof(C) == 4 ? 24 : 53, least = sizeof(C) == 4 ? -126 : -1022;
  const W limit = std::ldexp(W(1), sizeof(C) == 4 ? 128 : 1024);
  const auto bounded = [limit](W v) { return std::max(std::min(v, limit), -limit); };
  const W w = bounded(want), g = bounded(static_cast<W>(got));
  if (g == w) return 0.0;
  const int exponent = std::max(w == 0 ? least : std::ilogb(w), least);
  return static_cast<double>(std::fabs(g - w) * std::ldexp(W(1), digits - 1 - exponent));
}

// The largest error over the fp32 values with representations first, first + step, ..., not past last, and its place.
template <class F>
py::tuple worst_of_range(uint32_t first, uint32_t last, uint32_t step) {
  double worst = 0;
  uint32_t where = first;
  for (uint64_t bits = first; bits <= last; bits += step) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    const double off = units_off(F::got(x), F::want(static_cast<double>(x)));
    if (off > worst) {
      worst = off;
      where = static_cast<uint32_t>(bits);
    }
  }
  return py::make_tuple(worst, where);
}

template <class F>
double worst_of_doubles(const Array<double>& x) {
  double worst = 0;
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    const double v = x.data()[i];
    worst = std::max(worst, units_off(F::got(v), F::want(static_cast<long double>(v))));
  }
  return worst;
}

template <class F, class C>
Array<C> apply(const Array<C>& x) {
  Array<C> y(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = F::got(x.data()[i]);
  return y;
}

template <class F>
void bind_values(py::module_& m, const std::string& name) {
  m.def((name + "32").c_str(), apply<F, float>);
  m.def((name + "64").c_str(), apply<F, double>);
}

template <class F>
void bind(py::module_& m, const std::string& name) {
  bind_values<F>(m, name);
  m.def((name + "_worst32").c_str(), worst_of_range<F>);
  m.def((name + "_worst64").c_str(), worst_of_doubles<F>);
}

template <class Draw>
auto single(Draw draw) {
  return [draw](int64_t seed, int64_t offset, uint64_t first, py::ssize_t count) {
    Array<float> out(count);
    const auto state = PhiloxState::make(seed, offset);
    for (py::ssize_t i = 0; i < count; ++i) out.mutable_data()[i] = draw(state, first + static_cast<uint64_t>(i));
    return out;
  };
}

template <class Fill>
auto bulk(Fill fill) {
  return [fill](int64_t seed, int64_t offset, uint64_t first, py::ssize_t count) {
    Array<float> out(count);
    fill(PhiloxState::make(seed, offset), first, count, out.mutable_data());
    return out;
  };
}

}  // namespace

PYBIND11_MODULE(fastflat_elementary, m) {
  bind<Exp>(m, "exp");
  bind<Sigmoid>(m, "sigmoid");
  bind<Log>(m, "log");
  bind<Sine>(m, "sine");
  bind<Cosine>(m, "cosine");
  bind_values<Tanh>(m, "tanh");
  bind_values<Below>(m, "below");
  bind_values<Density>(m, "density");

  m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
    const PhiloxWords w = philox({c0, c1, c2, c3}, key0, key1);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
  });
  m.def("block", [](int64_t seed, int64_t offset, uint64_t block) {
    const PhiloxWords w = philox(PhiloxState::make(seed, offset), block);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
  });
  m.def("uniform", single([](const PhiloxState& s, uint64_t i) { return uniform_at(s, i); }));
  m.def("centred", single([](const PhiloxState& s, uint64_t i) { return centred_at(s, i); }));
  m.def("normal", single([](const PhiloxState& s, uint64_t i) { return normal_at(s, i); }));
  m.def("normal_pair", [](uint32_t radius, uint32_t angle) {
    const NormalPair pair = normal_pair(radius, angle);
    return py::make_tuple(pair.even, pair.odd);
  });

  py::dict fills;
  fills["uniform baseline"] = py::cpp_function(bulk(baseline::fill_uniform));
  fills["normal baseline"] = py::cpp_function(bulk(baseline::fill_normal));
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) {
    fills["uniform avx2"] = py::cpp_function(bulk(avx2::fill_uniform));
    fills["normal avx2"] = py::cpp_function(bulk(avx2::fill_normal));
  }
#endif
  m.attr("fills") = fills;
}

// SPDX-License-Identifier: Apache-2.0
// Python face of the functors of csrc/math, bare: no torch, no loop skeletons, no kernels. Test code, never in a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <bit>
#include <cmath>

#include "math/convert.h"
#include "math/fake_quantize.h"
#include "math/identity.h"
#include "math/round.h"

namespace py = pybind11;
using namespace fastflat;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class To, class From, class F>
Array<To> map(const Array<From>& in, F f) {
  Array<To> out(in.size());
  const From* from = in.data();
  To* to = out.mutable_data();
  for (py::ssize_t i = 0; i < in.size(); ++i) to[i] = f(from[i]);
  return out;
}

// Runs over all 2^32 fp32 values; the first one for which `agree` fails, and how many do.
template <class F>
py::tuple disagreements(F agree) {
  uint64_t count = 0, first = 0;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); ++bits) {
    if (agree(std::bit_cast<float>(static_cast<uint32_t>(bits)))) continue;
    if (count++ == 0) first = bits;
  }
  return py::make_tuple(count, first);
}

bool same(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (a != a && b != b); }

// A 16-bit format by its definition. Shares no arithmetic with csrc/math: values come from ldexp, midpoints from fp64,
// where both are exact.
struct Format {
  int mantissa, exponent_bits;

  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa; }

  // Of a positive code. That of infinity is taken for the next power of two: overflow rounds like any other value.
  double value(uint32_t code) const {
    const int bias = (1 << (exponent_bits - 1)) - 1, exponent = static_cast<int>(code >> mantissa);
    const double fraction = std::ldexp(static_cast<double>(code & ((1u << mantissa) - 1)), -mantissa);
    return exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  }
};

// Compares `convert` on every fp32 value, both signs, with the nearest code, of two equally near ones the even one.
template <class Convert>
py::tuple narrowing_disagreements(const Format& format, Convert convert) {
  uint64_t count = 0, tested = 0;
  uint32_t first = 0;
  const auto check = [&](uint32_t bits, uint32_t code) {
    const float v = std::bit_cast<float>(bits);
    tested += 2;
    if (convert(v) == code && convert(-v) == (code | 0x8000u)) return;
    if (count++ == 0) first = bits;
  };
  uint32_t bits = 0;
  for (uint32_t low = 0; low < format.infinity(); ++low) {
    const double up = format.value(low + 1), middle = (format.value(low) + up) / 2;
    const uint32_t end = std::bit_cast<uint32_t>(static_cast<float>(up));
    for (; bits < end; ++bits) {
      const double v = std::bit_cast<float>(bits);
      check(bits, v < middle || (v == middle && low % 2 == 0) ? low : low + 1);
    }
  }
  for (; bits <= 0x7f800000u; ++bits) check(bits, format.infinity());
  for (; bits <= 0x7fffffffu; ++bits) {
    tested += 2;
    const float v = std::bit_cast<float>(bits);
    if ((convert(v) & 0x7fffu) > format.infinity() && (convert(-v) & 0x7fffu) > format.infinity()) continue;
    if (count++ == 0) first = bits;
  }
  return py::make_tuple(count, first, tested);
}

template <class C>
void bind_grid(py::module_& m, const char* name) {
  using Grid = IntegerGrid<C>;
  const auto group = [](const Grid& grid, C scale, const py::object& zero_point) {
    return zero_point.is_none() ? grid.group(scale) : grid.group(scale, zero_point.cast<C>());
  };
  py::class_<Grid>(m, name)
      .def(py::init([](int64_t qmin, int64_t qmax, double eps, double factor, int64_t rules) {
        return Grid::make(qmin, qmax, eps, factor, rules);
      }))
      .def("forward",
           [group](const Grid& grid, const Array<C>& x, C scale, const py::object& zero_point) {
             const auto g = group(grid, scale, zero_point);
             return map<C>(x, [&](C v) { return grid.forward(v, g); });
           })
      .def("backward",
           [group](const Grid& grid, const Array<C>& gy, const Array<C>& x, C scale, const py::object& zero_point) {
             const auto g = group(grid, scale, zero_point);
             Array<C> out({py::ssize_t(3), x.size()});
             auto to = out.template mutable_unchecked<2>();
             for (py::ssize_t i = 0; i < x.size(); ++i) {
               const auto gradient = grid.backward(gy.data()[i], x.data()[i], g);
               to(0, i) = gradient.x;
               to(1, i) = gradient.scale;
               to(2, i) = gradient.outside;
             }
             return out;
           })
      .def("tangent",
           [group](const Grid& grid, const Array<C>& tx, C ts, C tz, const Array<C>& x, C scale,
                   const py::object& zero_point) {
             const auto g = group(grid, scale, zero_point);
             Array<C> out(x.size());
             for (py::ssize_t i = 0; i < x.size(); ++i) {
               out.mutable_data()[i] = grid.tangent(tx.data()[i], ts, tz, x.data()[i], g);
             }
             return out;
           })
      .def("scale_gradient", &Grid::scale_gradient)
      .def("zero_gradient", [group](const Grid& grid, C sum, C scale, const py::object& zero_point) {
        return grid.zero_gradient(sum, group(grid, scale, zero_point));
      });
}

}  // namespace

PYBIND11_MODULE(fastflat_functors, m) {
  bind_grid<float>(m, "Grid32");
  bind_grid<double>(m, "Grid64");

  m.def("rounding_disagreements", [] {
    return disagreements([](float v) {
      const float expected = std::nearbyint(v);
      return same(round_even_by_addition(v), expected) && same(round_even(v), expected);
    });
  });
  m.def("round_by_addition",
        [](const Array<double>& x) { return map<double>(x, [](double v) { return round_even_by_addition(v); }); });
  m.def("round", [](const Array<double>& x) { return map<double>(x, [](double v) { return round_even(v); }); });

  m.def("half_disagreements",
        [] { return narrowing_disagreements(Format{10, 5}, [](float v) { return uint32_t(to_half(v).bits); }); });
  m.def("bfloat16_disagreements",
        [] { return narrowing_disagreements(Format{7, 8}, [](float v) { return uint32_t(to_bfloat16(v).bits); }); });
  m.def("half_to_float",
        [](const Array<uint16_t>& x) { return map<float>(x, [](uint16_t v) { return to_float(Half{v}); }); });
  m.def("bfloat16_to_float",
        [](const Array<uint16_t>& x) { return map<float>(x, [](uint16_t v) { return to_float(BFloat16{v}); }); });
  m.def("float_to_half",
        [](const Array<float>& x) { return map<uint16_t>(x, [](float v) { return to_half(v).bits; }); });
  m.def("float_to_bfloat16",
        [](const Array<float>& x) { return map<uint16_t>(x, [](float v) { return to_bfloat16(v).bits; }); });

  m.def("larger_magnitude", [](double a, double b) { return larger_magnitude(a, b); });
  m.def("absmax_scale", [](float absmax, float qmax) { return absmax_scale(absmax, qmax); });
  m.def("identity", [](const Array<uint32_t>& x) { return map<uint32_t>(x, Identity{}); });
  m.def("rules", [] {
    py::dict table;
    table["reciprocal"] = rules::reciprocal;
    table["zero_inside"] = rules::zero_inside;
    table["zero_float"] = rules::zero_float;
    table["mask_after"] = rules::mask_after;
    table["mask_none"] = rules::mask_none;
    table["nan_qmin"] = rules::nan_qmin;
    table["inf_qmin"] = rules::inf_qmin;
    table["positive_zero"] = rules::positive_zero;
    table["round_away"] = rules::round_away;
    table["round_stochastic"] = rules::round_stochastic;
    table["pact"] = rules::pact;
    table["compute_input"] = rules::compute_input;
    table["noise_uniform"] = rules::noise_uniform;
    table["noise_normal"] = rules::noise_normal;
    table["noise_temper"] = rules::noise_temper;
    table["noise_bypass"] = rules::noise_bypass;
    table["binary"] = rules::binary;
    table["e4m3"] = rules::e4m3;
    table["e5m2"] = rules::e5m2;
    table["e3m2"] = rules::e3m2;
    table["e2m3"] = rules::e2m3;
    table["e2m1"] = rules::e2m1;
    table["scale_floor"] = rules::scale_floor;
    table["scale_ceil"] = rules::scale_ceil;
    table["scale_even"] = rules::scale_even;
    table["scale_rceil"] = rules::scale_rceil;
    table["scale_e4m3"] = rules::scale_e4m3;
    table["through_chain"] = rules::through_chain;
    table["inverse"] = rules::inverse;
    table["mask_absmax"] = rules::mask_absmax;
    table["nan_passes"] = rules::nan_passes;
    table["rectified"] = rules::rectified;
    return table;
  });
}

// SPDX-License-Identifier: Apache-2.0
// Lists of tensors in one call: their work is cut into units of similar size, which threads share in one parallel
// region. The loops are those of fake_quantize_loops.cpp, and units keep the order of sums that a tensor alone has.
#include "core/checks.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/fake_quantize.h"
#include "cpu/fake_quantize_call.h"
#include "cpu/threads.h"

namespace fastflat::cpu {
namespace {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;

// The arguments that lists of grids have in common.
struct Grids {
  const Integers &qmin, &qmax, &axis, &group;
  const Numbers& eps;
  const Integers& rules;

  void check(const char* op, const Tensors& xs, const Tensors& scales, const MaybeTensors& zero_points) const {
    const size_t n = xs.size();
    const bool same = scales.size() == n && (zero_points.empty() || zero_points.size() == n) && qmin.size() == n &&
                      qmax.size() == n && axis.size() == n && group.size() == n && eps.size() == n && rules.size() == n;
    STD_TORCH_CHECK(same, "fastflat::", op, ": all lists must be as long as xs, ", n, "; zero_points may be empty");
    for (const Tensor& x : xs) {
      STD_TORCH_CHECK(x.device() == xs[0].device(), "fastflat::", op, ": xs must be on one device");
    }
  }
};

// A call for one tensor of the list, and what its pointers live on.
struct Entry {
  Tensor x;
  FakeQuantizeCall call;
  ScaleTensors scales;

  Entry(const char* op, const Tensors& xs, const Tensors& scale, const MaybeTensors& zero_point, const Grids& of,
        size_t i)
      : x(checked(op, xs[i], of.axis[i], of.group[i])),
        call(describe(x, of.qmin[i], of.qmax[i], of.axis[i], of.group[i], of.eps[i], of.rules[i])),
        scales(op, scale[i], zero_point.empty() ? std::nullopt : zero_point[i], x, call) {}

  static Tensor checked(const char* op, const Tensor& x, int64_t axis, int64_t group) {
    check_layout(op, x, axis, group);
    return dense(x, group > 0);
  }
};

// Work that one thread does at a time: elements or channels [begin, end) of one call.
struct Unit {
  const FakeQuantizeCall* call;
  FakeQuantizeLoops::Map map;        // without sums
  FakeQuantizeLoops::Reduce reduce;  // with
  int64_t begin, end;
  double* sums = nullptr;
  int64_t start = 0;  // elements of all units before this one
};

class Work {
 public:
  explicit Work(size_t entries) { units_.reserve(entries); }

  void map(FakeQuantizeLoops::Map loop, const FakeQuantizeCall& call) {
    const int64_t n = call.geometry.numel();
    for (int64_t begin = 0; begin < n; begin += grain) add({&call, loop, nullptr, begin, std::min(n, begin + grain)});
  }

  // Whole channels, several to a unit; their sums need no more than what the loop writes.
  void channels(FakeQuantizeLoops::Reduce loop, const FakeQuantizeCall& call, const Cut& cut, double* sums) {
    const int64_t per_unit = std::max<int64_t>(1, grain / cut.size);
    for (int64_t begin = 0; begin < cut.pieces; begin += per_unit) {
      add({&call, nullptr, loop, begin, std::min(cut.pieces, begin + per_unit), sums}, cut.size);
    }
  }

  // The pieces of a cut, `numbers` sums each.
  void ranges(FakeQuantizeLoops::Reduce loop, const FakeQuantizeCall& call, const Cut& cut, double* sums,
              int64_t numbers) {
    const int64_t n = call.geometry.numel();
    for (int64_t t = 0; t < cut.pieces; ++t) {
      add({&call, nullptr, loop, t * cut.size, std::min(n, (t + 1) * cut.size), sums + t * numbers});
    }
  }

  // One parallel region over all elements; a unit belongs to the thread in whose share its first element lies.
  void run() const {
    const auto share = [this](int64_t begin, int64_t end) {
      auto unit = std::lower_bound(units_.begin(), units_.end(), begin,
                                   [](const Unit& u, int64_t position) { return u.start < position; });
      for (; unit != units_.end() && unit->start < end; ++unit) {
        if (unit->map) unit->map(*unit->call, unit->begin, unit->end);
        if (unit->reduce) unit->reduce(*unit->call, unit->begin, unit->end, unit->sums);
      }
    };
    if (total_ <= grain) return share(0, total_);
    torch::stable::parallel_for(0, total_, grain, share);
  }

 private:
  void add(Unit unit, int64_t elements = 1) {
    unit.start = total_;
    total_ += (unit.end - unit.begin) * elements;
    units_.push_back(unit);
  }

  std::vector<Unit> units_;
  int64_t total_ = 0;
};

std::vector<Entry> entries_of(const char* op, const Tensors& xs, const Tensors& scales, const MaybeTensors& zero_points,
                              const Grids& grids) {
  grids.check(op, xs, scales, zero_points);
  std::vector<Entry> entries;
  entries.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) entries.emplace_back(op, xs, scales, zero_points, grids, i);
  return entries;
}

Tensors fake_quantize_list(const Tensors& xs, const Tensors& scales, const MaybeTensors& zero_points,
                           const Integers& qmin, const Integers& qmax, const Integers& axis, const Integers& group,
                           const Numbers& eps, const Integers& rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize_list";
  std::vector<Entry> entries = entries_of(op, xs, scales, zero_points, {qmin, qmax, axis, group, eps, rules});
  Work work(entries.size());
  Tensors ys;
  ys.reserve(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    Entry& e = entries[i];
    const ScalarType result = dtype.value_or(e.x.scalar_type());
    const Pair pair = pair_of(op, e.x.scalar_type(), result);
    ys.push_back(empty_like(e.x, result, group[i] > 0));
    e.call.out = ys[i].mutable_data_ptr();
    work.map(fake_quantize_loops().forward[pair], e.call);
  }
  work.run();
  return ys;
}

// Sums of one tensor: where they are, and how many pieces of them are to be added up.
struct Sums {
  int64_t offset = 0, pieces = 0;
};

std::tuple<Tensors, Tensors, Tensors> fake_quantize_list_bwd(const Tensors& gys, const Tensors& xs,
                                                             const Tensors& scales, const MaybeTensors& zero_points,
                                                             const Integers& qmin, const Integers& qmax,
                                                             const Integers& axis, const Integers& group,
                                                             const Numbers& eps, const Integers& rules,
                                                             const Numbers& factor, const Integers& need_scale) {
  constexpr auto op = "fake_quantize_list_bwd";
  std::vector<Entry> entries = entries_of(op, xs, scales, zero_points, {qmin, qmax, axis, group, eps, rules});
  const size_t count = entries.size();
  STD_TORCH_CHECK(gys.size() == count && factor.size() == count && need_scale.size() == count, "fastflat::", op,
                  ": gys, factor and need_scale must be as long as xs, ", count);
  const FakeQuantizeLoops& loops = fake_quantize_loops();
  Tensors gxs, alive;  // cotangents, which may be copies
  std::vector<Sums> sums_of(count);
  std::vector<Pair> pairs(count);
  int64_t numbers = 0;
  for (size_t i = 0; i < count; ++i) {
    Entry& e = entries[i];
    check_same_shape(op, "gy", gys[i], e.x);
    alive.push_back(in_layout_of(gys[i], e.x));
    pairs[i] = pair_of(op, e.x.scalar_type(), alive[i].scalar_type());
    gxs.push_back(empty_like(e.x, e.x.scalar_type(), group[i] > 0));
    e.call.factor = factor[i];
    e.call.in = alive[i].const_data_ptr();
    e.call.out = gxs[i].mutable_data_ptr();
    if (!need_scale[i]) continue;
    sums_of[i].offset = numbers;
    if (e.x.numel() > 0) {
      const Cut cut(e.call.geometry);
      sums_of[i].pieces = cut.by_channel ? 1 : cut.pieces;
    }
    numbers += 2 * e.call.geometry.channels * std::max<int64_t>(1, sums_of[i].pieces);
  }
  std::vector<double> sums(numbers, 0.0);
  Work work(count);
  for (size_t i = 0; i < count; ++i) {
    const FakeQuantizeCall& call = entries[i].call;
    double* own = sums.data() + sums_of[i].offset;
    if (!need_scale[i]) {
      work.map(loops.backward[pairs[i]], call);
    } else if (sums_of[i].pieces) {
      const Cut cut(call.geometry);
      if (cut.by_channel) {
        work.channels(loops.backward_channels[pairs[i]], call, cut, own);
      } else {
        work.ranges(loops.backward_range[pairs[i]], call, cut, own, 2 * call.geometry.channels);
      }
    }
  }
  work.run();

  // A list of gradients that nobody needs is empty; in one that somebody does, the others are tensors of no element.
  Tensors gss, gzs;
  bool any_scale = false, any_zero = false;
  for (size_t i = 0; i < count; ++i) {
    any_scale |= need_scale[i] != 0;
    any_zero |= need_scale[i] && entries[i].scales.zero_point;
  }
  const std::vector<int64_t> none{0};
  for (size_t i = 0; any_scale && i < count; ++i) {
    const Entry& e = entries[i];
    const Tensor& scale = e.scales.scale;
    const bool need_zero = need_scale[i] && e.scales.zero_point;
    const std::vector<int64_t> all(scale.sizes().begin(), scale.sizes().end());
    gss.push_back(empty_dense(scale, need_scale[i] ? all : none, scale.scalar_type()));
    if (any_zero) gzs.push_back(empty_dense(scale, need_zero ? all : none, scale.scalar_type()));
    if (!need_scale[i]) continue;
    double* own = sums.data() + sums_of[i].offset;
    const int64_t width = 2 * e.call.geometry.channels;
    for (int64_t t = 1; t < sums_of[i].pieces; ++t) {
      for (int64_t k = 0; k < width; ++k) own[k] += own[t * width + k];
    }
    void* to_zero = need_zero ? gzs[i].mutable_data_ptr() : nullptr;
    finish(e.call, e.x.scalar_type(), own, gss[i].mutable_data_ptr(), to_zero);
  }
  return {gxs, gss, gzs};
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("fake_quantize_list", TORCH_BOX(&fastflat::cpu::fake_quantize_list));
  m.impl("fake_quantize_list_bwd", TORCH_BOX(&fastflat::cpu::fake_quantize_list_bwd));
}

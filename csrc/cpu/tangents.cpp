// SPDX-License-Identifier: Apache-2.0
// Element-wise and channel-wise work on K tangents at once.
#include "cpu/tangents.h"

#include <tuple>
#include <vector>

// Called once an op: what torch's boxing and the checks make of it shall be small.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("Os")
#endif
#include "core/tangent_checks.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
#include "cpu/tangents_walk.h"

namespace fastflat::cpu {
namespace {

// Elements that make a thread worth waking.
constexpr int64_t grain = 32768;
// Tangents of a group: groups are shared out among threads too.
constexpr int64_t group_size = 16;
// Numbers of all pieces of the sums together, and pieces, at most.
constexpr int64_t most_numbers = int64_t{1} << 20, most_pieces = 256;

// One channel, or no numbers of channels: one run.
Geometry simplest(const Geometry& g, bool of_channels) {
  return of_channels && g.channels != 1 ? g : Geometry{1, 1, g.numel()};
}

// body(first, last, begin, end) for tangents and tiles, threads sharing them out.
template <class Body>
void share(int64_t count, int64_t group, int64_t tiles, int64_t elements, const Body& body) {
  const int64_t groups = (count + group - 1) / group;
  const auto units = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin / tiles * group, tile = begin % tiles;
      const int64_t until = std::min(tiles, tile + end - begin);
      body(first, std::min(count, first + group), tile, until);
      begin += until - tile;
    }
  };
  if (count * elements <= grain) return units(0, groups * tiles);
  const int64_t of_unit = std::max<int64_t>(1, std::min(group, count) * (elements / tiles));
  torch::stable::parallel_for(0, groups * tiles, std::max<int64_t>(1, grain / of_unit), units);
}

__attribute__((noinline)) Tensor tangents_combine(const MaybeTensor& t0, const MaybeTensor& p0, const MaybeTensor& t1,
                                                  const MaybeTensor& p1, const MaybeTensor& f0, const MaybeTensor& r0,
                                                  const MaybeTensor& f1, const MaybeTensor& r1,
                                                  const MaybeTensor& shift, const MaybeTensor& mask, int64_t kind) {
  MaybeTensor result;
  const CombineTraits traits =
      check_combine("tangents_combine", {t0, p0, t1, p1, f0, r0, f1, r1, shift, mask}, kind, &result);
  Tensor& out = *result;
  if (out.numel() == 0) return out;
  CombineCall call{};
  call.t0 = data_of(t0);
  call.p0 = data_of(p0);
  call.t1 = data_of(t1);
  call.p1 = data_of(p1);
  call.f0 = data_of(f0);
  call.r0 = data_of(r0);
  call.f1 = data_of(f1);
  call.r1 = data_of(r1);
  call.shift = data_of(shift);
  call.mask = data_of(mask);
  call.out = out.mutable_data_ptr();
  call.first_of_channel = traits.first_of_channel;
  call.second_of_channel = traits.second_of_channel;
  call.kind = static_cast<int>(kind);
  call.storage = traits.storage;
  call.count = traits.count;
  call.geometry = simplest(traits.geometry, r0 || r1 || shift || call.first_of_channel || call.second_of_channel);
  call.tiles = TangentTiles(call.geometry, combine_tile, combine_tile);
  call.by_rows = call.geometry.inner == 1 || call.geometry.inner >= combine_tile;
  const int64_t tiles = call.tiles.across * call.tiles.rows;
  const auto loop = call.storage == f64 ? combine<double> : combine<float>;
  share(call.count, tiles >= 64 ? call.count : group_size, tiles, call.tiles.n,
        [&](int64_t first, int64_t last, int64_t begin, int64_t end) { loop(call, first, last, begin, end); });
  return out;
}

// Numbers in the compute type.
void put(const std::vector<double>& from, Tensor& to) {
  if (to.scalar_type() == ScalarType::Double) {
    std::copy(from.begin(), from.end(), static_cast<double*>(to.mutable_data_ptr()));
  } else {
    std::transform(from.begin(), from.end(), static_cast<float*>(to.mutable_data_ptr()),
                   [](double v) { return static_cast<float>(v); });
  }
}

__attribute__((noinline)) std::tuple<Tensor, Tensor, Tensor> tangents_sums(const Tensor& t0, const MaybeTensor& p0,
                                                                           const MaybeTensor& t1, const MaybeTensor& p1,
                                                                           const MaybeTensor& mask, bool total) {
  const SumsTensors tensors{t0, p0, t1, p1, mask};
  const SumsTraits traits = check_sums("tangents_sums", tensors);
  auto results = sums_results(tensors, traits, total);
  auto& [mapped, dots, totals] = results;
  SumsCall call{};
  call.t0 = t0.const_data_ptr();
  call.p0 = data_of(p0);
  call.t1 = data_of(t1);
  call.p1 = data_of(p1);
  call.mask = data_of(mask);
  call.mapped = mapped.mutable_data_ptr();
  call.storage = traits.storage;
  call.count = traits.count;
  call.geometry = simplest(traits.geometry, total || p0);
  call.dots = p0.has_value();
  call.totals = total;
  const int64_t channels = traits.geometry.channels, numbers = call.count * channels;
  std::vector<double> of_dots(call.dots ? numbers : 0), of_totals(total ? numbers : 0);
  if (t0.numel() > 0) {
    const bool short_ = call.geometry.inner < short_runs;
    call.tiles = TangentTiles(call.geometry, short_ ? sums_columns : sums_tile, short_ ? sums_deep * sums_columns : 0);
    const int64_t tiles = call.tiles.count();
    const auto loop = call.storage == f64 ? sums<double> : sums<float>;
    // Pieces of tiles, by the shape alone, so that the order of every sum is too.
    const int64_t most = std::clamp<int64_t>(most_numbers / std::max<int64_t>(numbers, 1), 1, most_pieces);
    const int64_t wanted = std::clamp<int64_t>(call.tiles.n / (2 * grain), 1, most);
    const int64_t size = (tiles + wanted - 1) / wanted, pieces = (tiles + size - 1) / size;
    const int64_t rest = numbers * (pieces - 1);
    std::vector<double> more_dots(call.dots ? rest : 0), more_totals(total ? rest : 0);
    const auto place = [&](std::vector<double>& own, std::vector<double>& more, int64_t piece, int64_t first) {
      if (own.empty()) return static_cast<double*>(nullptr);
      return (piece == 0 ? own.data() : more.data() + (piece - 1) * numbers) + first * channels;
    };
    share(call.count, group_size, pieces, call.tiles.n, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        loop(call, first, last, piece * size, std::min(tiles, (piece + 1) * size),
             place(of_dots, more_dots, piece, first), place(of_totals, more_totals, piece, first));
      }
    });
    const auto gather = [&](std::vector<double>& own, const std::vector<double>& more) {
      for (size_t i = 0; i < more.size(); ++i) own[i % numbers] += more[i];
    };
    gather(of_dots, more_dots);
    gather(of_totals, more_totals);
  }
  if (call.dots) put(of_dots, dots);
  if (total) put(of_totals, totals);
  return results;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("tangents_combine", TORCH_BOX(&fastflat::cpu::tangents_combine));
  m.impl("tangents_sums", TORCH_BOX(&fastflat::cpu::tangents_sums));
}

// SPDX-License-Identifier: Apache-2.0
// Compressed gradients: units, codes and what they leave over, sums of workers' codes, the largest elements. The checks
// here are the only ones that the ops have.
#include "cpu/compressors.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "core/checks.h"
#include "core/storage.h"
#include "math/compressors.h"

namespace fastflat::cpu {
namespace {

// Elements of a part: parts of sums follow from the shape alone, and a part makes a thread worth waking.
constexpr int64_t part = 32768;
// Elements of a bin that are worth counting once more instead of ordering them.
constexpr int64_t crowded = 1024;

const CompressorLoops& loops(Storage storage) { return storage == f64 ? compressors_double : compressors_float(); }

__attribute__((noinline)) void require(bool right, const char* op, const char* what) {
  STD_TORCH_CHECK(right, "fastflat::", op, ": ", what);
}

template <class Work>
void share(int64_t count, int64_t least, const Work& work) {
  if (count <= least) {
    if (count) work(0, count);
  } else {
    torch::stable::parallel_for(0, count, least, work);
  }
}

// Elements [begin, end) with begin a multiple of 8.
void share_elements(int64_t numel, void (*loop)(const CompressorCall&, int64_t, int64_t), const CompressorCall& call) {
  share((numel + 7) / 8, part / 8,
        [&](int64_t begin, int64_t end) { loop(call, 8 * begin, std::min(8 * end, numel)); });
}

// g in order, and the residual, which is written where it lies.
template <class Call>
Tensor gradient(const char* op, const Tensor& g_, const std::optional<Tensor>& error, Call& call) {
  const Tensor g = dense(g_, true);
  call.storage = storage_of(op, "g", g.scalar_type());
  call.numel = g.numel();
  call.g = g.const_data_ptr();
  if (error) {
    require(error->scalar_type() == compute_type(g.scalar_type()), op, "error must be float32 (float64 for float64 g)");
    require(error->numel() == g.numel() && error->is_contiguous(), op, "error must be contiguous, of the size of g");
    require(error->device() == g.device(), op, "error must be on the device of g");
    call.error = error->mutable_data_ptr();
  }
  return g;
}

void check_codes(const char* op, int64_t levels, int64_t bucket) {
  require(levels >= 0 && levels <= compressors::most_levels, op, "levels must lie in [0, 127]");
  require(bucket > 0, op, "bucket must be positive");
}

Tensor units(const Tensor& g_, const std::optional<Tensor>& error, int64_t norm, int64_t levels, int64_t bucket,
             double clip) {
  constexpr auto op = "compressors_units";
  CompressorCall call;
  const Tensor g = gradient(op, g_, error, call);
  check_codes(op, levels, bucket);
  require(norm >= 0 && norm < compressors::norms, op, "norm must be 0, 1 or 2");
  call.levels = levels;
  call.bucket = bucket;
  call.norm = norm;
  call.clip = clip;
  Tensor result = empty_dense(g, {call.buckets()}, compute_type(g.scalar_type()));
  void* const to = result.mutable_data_ptr();
  const auto loop = loops(call.storage).sums;
  const auto finish = [&](int64_t b, int64_t n, const CompressorSums& s) {
    const double unit = compressors::unit_of(norm, levels, clip, static_cast<double>(n), s.sum, s.squares, s.most);
    if (call.storage == f64) {
      static_cast<double*>(to)[b] = unit;
    } else {
      static_cast<float*>(to)[b] = static_cast<float>(unit);
    }
  };
  const int64_t buckets = call.buckets(), size = std::min(bucket, call.numel);
  if (size <= part) {
    share(buckets, std::max<int64_t>(1, part / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * bucket, last = std::min(call.numel, first + bucket);
        finish(b, last - first, loop(call, first, last));
      }
    });
    return result;
  }
  const int64_t parts = (size + part - 1) / part;
  std::vector<CompressorSums> found(buckets * parts);
  share(buckets * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / parts * bucket + i % parts * part;
      const int64_t last = std::min({call.numel, i / parts * bucket + bucket, first + part});
      found[i] = first < last ? loop(call, first, last) : CompressorSums{};
    }
  });
  for (int64_t b = 0; b < buckets; ++b) {
    CompressorSums all{};
    for (int64_t i = b * parts; i < (b + 1) * parts; ++i) {
      all.sum += found[i].sum;
      all.squares += found[i].squares;
      all.most = found[i].most <= all.most ? all.most : found[i].most;
      if (all.most != all.most) break;
    }
    finish(b, std::min(bucket, call.numel - b * bucket), all);
  }
  return result;
}

Tensor encode_(const Tensor& g_, const std::optional<Tensor>& error, const Tensor& units_,
               const std::optional<Tensor>& state_, int64_t levels, int64_t bucket) {
  constexpr auto op = "compressors_encode_";
  CompressorCall call;
  const Tensor g = gradient(op, g_, error, call);
  check_codes(op, levels, bucket);
  call.levels = levels;
  call.bucket = bucket;
  const Tensor units = dense(units_, true);
  check_parameter(op, "units", units, g, call.buckets());
  call.units = const_cast<void*>(units.const_data_ptr());
  std::optional<Tensor> state;
  if (levels > 0) {
    require(state_ && state_->scalar_type() == ScalarType::Long && state_->dim() == 1 && state_->numel() == 2, op,
            "state must be an int64 tensor of 2 values");
    require(state_->device() == g.device(), op, "state must be on the device of g");
    state = dense(*state_, true);
    call.state = static_cast<const int64_t*>(state->const_data_ptr());
  }
  Tensor codes = empty_dense(g, {(call.numel * compressors::width_of(levels) + 7) / 8}, ScalarType::Byte);
  call.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  share_elements(call.numel, loops(call.storage).encode, call);
  return codes;
}

void decode_(const Tensor& out, const Tensor& codes_, const Tensor& units_, int64_t levels, int64_t bucket,
             double factor, bool add) {
  constexpr auto op = "compressors_decode_";
  check_codes(op, levels, bucket);
  CompressorCall call;
  call.storage = storage_of(op, "out", out.scalar_type());
  call.numel = out.numel();
  call.levels = levels;
  call.bucket = bucket;
  require(out.is_contiguous(), op, "out must be contiguous");
  const int64_t row = (call.numel * compressors::width_of(levels) + 7) / 8;
  require(codes_.scalar_type() == ScalarType::Byte && codes_.dim() == 2 && codes_.size(1) == row, op,
          "codes must be uint8 of shape [K, bytes of out]");
  require(codes_.device() == out.device(), op, "codes must be on the device of out");
  const Tensor codes = dense(codes_, true), units = dense(units_, true);
  call.workers = codes.size(0);
  check_parameter(op, "units", units, out, call.workers * call.buckets());
  call.codes = const_cast<uint8_t*>(static_cast<const uint8_t*>(codes.const_data_ptr()));
  call.units = const_cast<void*>(units.const_data_ptr());
  call.factor = factor;
  call.add = add;
  call.out = out.mutable_data_ptr();
  share_elements(call.numel, loops(call.storage).decode, call);
}

std::tuple<Tensor, Tensor> topk_(const Tensor& g_, const std::optional<Tensor>& error, int64_t k) {
  constexpr auto op = "compressors_topk_";
  TopCall call;
  const Tensor g = gradient(op, g_, error, call);
  require(k >= 0 && k <= call.numel, op, "k must lie in [0, numel]");
  require(call.numel < int64_t{1} << 31, op, "g must have fewer than 2^31 elements");
  Tensor values = empty_dense(g, {k}, g.scalar_type()), indices = empty_dense(g, {k}, ScalarType::Int);
  call.values = values.mutable_data_ptr();
  call.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  const CompressorLoops& loop = loops(call.storage);
  const int64_t n = call.numel, parts = (n + part - 1) / part;
  const auto in_parts = [&](const auto& work) {
    share(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i, i * part, std::min(n, (i + 1) * part));
    });
  };
  // The bin of the smallest of the k: all beyond it are among them, `above` of them.
  std::vector<int64_t> counts(parts * top_bins);
  int64_t above = 0, of_bin = 0;
  const auto find = [&](int lead) {
    std::fill(counts.begin(), counts.end(), 0);
    in_parts([&](int64_t i, int64_t begin, int64_t end) {
      loop.count(call, begin, end, lead, counts.data() + i * top_bins);
    });
    int bin = top_bins;
    for (of_bin = 0; bin > 0 && above + of_bin < k;) {
      above += of_bin;
      of_bin = 0;
      --bin;
      for (int64_t i = 0; i < parts; ++i) of_bin += counts[i * top_bins + bin];
    }
    return bin;
  };
  int lead = -1, bin = find(lead);
  if (k == 0) return {values, indices};
  if (of_bin > crowded) {
    lead = bin;
    bin = find(lead);
  }
  std::vector<std::vector<Candidate>> found(parts);
  in_parts([&](int64_t i, int64_t begin, int64_t end) { loop.collect(call, begin, end, lead, bin, found[i]); });
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key > b.key : a.index < b.index;
  };
  std::vector<Candidate> all;
  for (const auto& of_part : found) all.insert(all.end(), of_part.begin(), of_part.end());
  std::nth_element(all.begin(), all.begin() + (k - 1), all.end(), before);
  const Candidate least = all[k - 1];
  all.clear();
  for (const auto& of_part : found) {
    for (const Candidate& c : of_part) {
      if (!before(least, c)) all.push_back(c);
    }
  }
  loop.take(call, all.data(), k);
  return {values, indices};
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("compressors_units", TORCH_BOX(&fastflat::cpu::units));
  m.impl("compressors_encode_", TORCH_BOX(&fastflat::cpu::encode_));
  m.impl("compressors_decode_", TORCH_BOX(&fastflat::cpu::decode_));
  m.impl("compressors_topk_", TORCH_BOX(&fastflat::cpu::topk_));
}

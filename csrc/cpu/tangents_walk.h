// SPDX-License-Identifier: Apache-2.0
// How the ops over tangents walk their tiles, for each arithmetic type: what costs time is in the loops that they call
// (tangents_loops.cpp). Storage of 16 bits passes through buffers, and what is absent costs no loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/tangents.h"
#include "math/tangents.h"

namespace fastflat::cpu {
namespace {

// n elements in the arithmetic type: where they are, or in the buffer. Null where the stream is absent.
inline const float* fetch(Storage storage, const void* from, int64_t at, int64_t n, float* buffer) {
  if (!from) return nullptr;
  if (storage == f32) return static_cast<const float*>(from) + at;
  tangents_loops().widen[storage == f16](static_cast<const uint16_t*>(from) + at, n, buffer);
  return buffer;
}
inline const double* fetch(Storage, const void* from, int64_t at, int64_t, double*) {
  return from ? static_cast<const double*>(from) + at : nullptr;
}

// Where n elements are formed, and how they reach their place from there.
template <class C>
inline C* target(Storage storage, void* to, int64_t at, C* buffer) {
  return storage == bf16 || storage == f16 ? buffer : static_cast<C*>(to) + at;
}
inline void deliver(Storage storage, const float* from, int64_t n, void* to, int64_t at) {
  if (storage != f32) tangents_loops().narrow[storage == f16](from, n, static_cast<uint16_t*>(to) + at);
}
inline void deliver(Storage, const double*, int64_t, void*, int64_t) {}

// Writes the numbers p of the channels of elements [begin, begin + count) to `out`, one an element.
template <class C>
void spread(const Geometry& g, const C* p, int64_t begin, int64_t count, C* out) {
  int64_t run = begin / g.inner, c = run % g.channels;
  if (g.inner == 1) {
    for (int64_t i = 0, n; i < count; i += n, c = 0) {
      n = std::min(count - i, g.channels - c);
      std::memcpy(out + i, p + c, n * sizeof(C));
    }
    return;
  }
  for (int64_t i = 0, stop = (run + 1) * g.inner - begin; i < count; stop += g.inner) {
    const int64_t n = std::min(stop, count);
    std::fill(out + i, out + n, p[c]);
    i = n;
    if (++c == g.channels) c = 0;
  }
}

// One coefficient an element for the columns [column, column + n) of a row of periods.
template <class C>
void spread_columns(const Geometry& g, const C* p, int64_t column, int64_t n, C* out) {
  int64_t filled = std::min(n, g.channels * g.inner);
  spread(g, p, column, filled, out);
  for (int64_t m; filled < n; filled += m) {
    m = std::min(filled, n - filled);
    std::memcpy(out + filled, out, m * sizeof(C));
  }
}

// From here on nothing is walked element by element.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O2")
#endif

// A tile of combine.
struct CombineTile {
  int64_t at, column, columns,
      n;  // its first element and column; of the latter its whole width, of elements those left

  CombineTile() = default;
  CombineTile(const CombineCall& call, int64_t number) {
    const TangentTiles& tiles = call.tiles;
    const int64_t row = call.by_rows ? number / tiles.across : number % tiles.rows;
    column = (call.by_rows ? number % tiles.across : number / tiles.rows) * tiles.size;
    at = row * tiles.row + column;
    columns = std::min(tiles.size, tiles.row - column);
    n = std::max<int64_t>(0, std::min(columns, tiles.n - at));
  }

  // Equal where the numbers of the channels are, too.
  int64_t key(const Geometry& g) const {
    const int64_t run = column / g.inner, last = (column + columns - 1) / g.inner;
    return run == last ? run % g.channels : g.channels + column;
  }
};

constexpr int64_t held_tangents = 16;  // of which the spread coefficients of a tile are kept
constexpr int tiles_at_once = 8;       // tangents are read and written in longer stretches than a tile

// The coefficients of tiles, one an element; spread anew only where they are others than those of the last tile.
template <class C>
struct Coefficients {
  static constexpr int most = 3;

  const Geometry& g;
  const void* from[most];
  int64_t first, held;
  int64_t key = -1, column = 0, n = 0;
  std::unique_ptr<C[]> kept;
  alignas(64) C fresh[most][combine_tile];
  alignas(64) C of_channel[2][combine_tile];

  Coefficients(const CombineCall& call, int64_t first_, int64_t last)
      : g(call.geometry),
        from{call.r0, call.r1, call.shift},
        first(first_),
        held(std::min(held_tangents, last - first_)),
        kept((call.r0 || call.r1 || call.shift) && !in_place() ? new C[held * most * combine_tile] : nullptr) {}

  // Numbers of neighbouring channels lie as the tile's elements do.
  bool in_place() const { return g.inner == 1 && g.channels > combine_tile; }
  bool same(const CombineTile& a, const CombineTile& b) const { return in_place() || a.key(g) == b.key(g); }

  void move(const CombineCall& call, const CombineTile& tile) {
    if (in_place() || (tile.key(g) == key && tile.columns <= n)) return;
    key = tile.key(g);
    column = tile.column;
    n = tile.columns;
    if (call.first_of_channel) spread_columns(g, static_cast<const C*>(call.p0), column, n, of_channel[0]);
    if (call.second_of_channel) spread_columns(g, static_cast<const C*>(call.p1), column, n, of_channel[1]);
    for (int64_t k = 0; k < held; ++k) {
      for (int which = 0; which < most; ++which) {
        if (from[which]) form(first + k, which, kept.get() + (k * most + which) * combine_tile);
      }
    }
  }

  const C* of_channels(const void* p, int which, const CombineTile& tile) const {
    return in_place() ? static_cast<const C*>(p) + tile.column : of_channel[which];
  }

  const C* of(int64_t k, int which, const CombineTile& tile) {
    if (!from[which]) return nullptr;
    if (in_place()) return static_cast<const C*>(from[which]) + k * g.channels + tile.column;
    if (k - first < held) return kept.get() + ((k - first) * most + which) * combine_tile;
    form(k, which, fresh[which]);
    return fresh[which];
  }

 private:
  void form(int64_t k, int which, C* out) const {
    spread_columns(g, static_cast<const C*>(from[which]) + k * g.channels, column, n, out);
  }
};

// What all tangents of a tile share.
template <class C>
struct SharedTile {
  CombineTile tile;
  const C *a0, *a1, *f0, *f1, *mask;
  alignas(64) C buffer[5][combine_tile];

  void form(const CombineCall& call, const CombineTile& tile_, const Coefficients<C>& coefficients) {
    tile = tile_;
    const auto get = [&](const void* from, int number) {
      return fetch(call.storage, from, tile.at, tile.n, buffer[number]);
    };
    a0 = call.first_of_channel ? coefficients.of_channels(call.p0, 0, tile) : get(call.p0, 0);
    a1 = call.second_of_channel ? coefficients.of_channels(call.p1, 1, tile) : get(call.p1, 1);
    f0 = get(call.f0, 2);
    f1 = get(call.f1, 3);
    mask = get(call.mask, 4);
    if (call.kind == given) return;
    tangents_factors(C())(call.kind, a0, a1 ? a1 : a0, tile.n, buffer[0], buffer[1]);
    a0 = buffer[0];
    a1 = buffer[1];
  }
};

// a b, or b alone without a.
template <class C>
struct Term {
  const C *a, *b;
};

// The sum of the terms, times the mask: formed in `out`.
template <class C>
void sum_terms(const Term<C>* terms, int count, const C* mask, int64_t n, C* out) {
  const auto& loops = tangents_loops().of(C());
  const C* v = out;  // the sum so far
  int next = 1;
  if (terms[0].a && count > 2 && terms[1].a && !terms[2].a) {
    loops.add_products_to(out, terms[0].a, terms[0].b, terms[1].a, terms[1].b, terms[2].b, n);
    next = 3;
  } else if (terms[0].a && count > 1 && terms[1].a) {
    loops.add_products(out, terms[0].a, terms[0].b, terms[1].a, terms[1].b, n);
    next = 2;
  } else if (terms[0].a) {
    loops.multiply(out, terms[0].a, terms[0].b, n);
  } else {
    v = terms[0].b;
  }
  for (; next < count; ++next, v = out) {
    const Term<C>& term = terms[next];
    term.a ? loops.add_product(out, v, term.a, term.b, n) : loops.add(out, v, term.b, n);
  }
  if (mask) {
    loops.multiply(out, v, mask, n);
  } else if (v != out) {
    std::memcpy(out, v, n * sizeof(C));
  }
}

// Tangents [first, last) of tiles [begin, end).
template <class C>
void combine(const CombineCall& call, int64_t first, int64_t last, int64_t begin, int64_t end) {
  alignas(64) C of_t0[combine_tile], of_t1[combine_tile], sum[combine_tile];
  // Not cleared: calls may be short.
  const std::unique_ptr<SharedTile<C>[]> shared(new SharedTile<C>[std::min<int64_t>(tiles_at_once, end - begin)]);
  Coefficients<C> coefficients(call, first, last);
  const Storage storage = call.storage;
  for (int64_t number = begin; number < end;) {
    const CombineTile leader(call, number);
    coefficients.move(call, leader);
    int count = 0;
    for (; count < tiles_at_once && number < end; ++count, ++number) {
      const CombineTile tile(call, number);
      if (!coefficients.same(tile, leader)) break;
      shared[count].form(call, tile, coefficients);
    }
    for (int64_t k = first; k < last; ++k) {
      for (int t = 0; t < count; ++t) {
        const SharedTile<C>& own = shared[t];
        const int64_t n = own.tile.n, place = k * call.tiles.n + own.tile.at;
        if (n == 0) continue;
        Term<C> terms[5];
        int used = 0;
        const auto add_term = [&](const C* a, const C* b) {
          if (b) terms[used++] = {a, b};
        };
        add_term(own.a0, fetch(storage, call.t0, place, n, of_t0));
        add_term(own.a1, fetch(storage, call.t1, place, n, of_t1));
        add_term(own.f0, coefficients.of(k, 0, own.tile));
        add_term(own.f1, coefficients.of(k, 1, own.tile));
        add_term(nullptr, coefficients.of(k, 2, own.tile));
        C* const out = target(storage, call.out, place, sum);
        sum_terms(terms, used, own.mask, n, out);
        deliver(storage, out, n, call.out, place);
      }
    }
  }
}

// An element-wise primal of a tile: in its place, or its rows behind one another in a buffer.
template <class C>
struct TilePrimal {
  const C* data = nullptr;
  int64_t stride = 0;

  TilePrimal(const SumsCall& call, const void* from, int64_t at, int64_t columns, int64_t rows, C* buffer) {
    if (!from) return;
    data = fetch(call.storage, from, at, std::min(columns, call.tiles.n - at), buffer);
    stride = data == buffer ? columns : call.tiles.row;
    if (data != buffer) return;
    for (int64_t r = 1; r < rows; ++r) {
      const int64_t next = at + r * call.tiles.row;
      fetch(call.storage, from, next, std::min(columns, call.tiles.n - next), buffer + r * columns);
    }
  }

  const C* row(int64_t r) const { return data ? data + r * stride : nullptr; }
};

// Adds what is in the columns [column, column + n) to the numbers of their channels; short runs.
template <class C>
void add_columns(const Geometry& g, const C* v, int64_t column, int64_t n, double* sums) {
  int64_t run = column / g.inner, c = run % g.channels;
  if (g.inner == 1) {
    for (int64_t i = 0, m; i < n; i += m, c = 0) {
      m = std::min(n - i, g.channels - c);
      tangents_loops().of(C()).widen_sums(v + i, m, sums + c);
    }
    return;
  }
  for (int64_t i = 0, stop = (run + 1) * g.inner - column; i < n; stop += g.inner) {
    const int64_t until = std::min(stop, n);
    C sum = v[i];
    while (++i < until) sum += v[i];
    sums[c] += static_cast<double>(sum);
    if (++c == g.channels) c = 0;
  }
}

// The sums of tangents [first, last) over tiles [begin, end), added to dots and totals, [last - first, channels] each.
template <class C>
void sums(const SumsCall& call, int64_t first, int64_t last, int64_t begin, int64_t end, double* dots, double* totals) {
  const auto& loops = tangents_loops().of(C());
  const TangentTiles& tiles = call.tiles;
  const Geometry& g = call.geometry;
  const Storage storage = call.storage;
  const bool direct = storage == f32 || storage == f64, short_ = g.inner < short_runs;
  const int64_t room = tiles.size * tiles.deep, of_rows = short_ ? sums_rows * tiles.size : tiles.size;
  const std::unique_ptr<C[]> buffers(direct ? nullptr : new C[3 * room + 3 * of_rows]);
  const std::unique_ptr<C[]> columns(short_ ? new C[2 * tiles.size] : nullptr);
  C* const buffer = buffers.get();
  C *const of_t0 = buffer + (direct ? 0 : 3 * room), *const of_t1 = of_t0 + (direct ? 0 : of_rows);
  C* const mapped = of_t1 + (direct ? 0 : of_rows);
  C *const dot = columns.get(), *const total = dot + (short_ ? tiles.size : 0);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t column = tile % tiles.across * tiles.size, row = tile / tiles.across * tiles.deep;
    const int64_t at = row * tiles.row + column;
    const int64_t width = std::min(tiles.size, tiles.row - column);
    int64_t rows = std::min(tiles.deep, tiles.rows - row);
    // The last row of all may be short, or end before this tile.
    if (at + (rows - 1) * tiles.row >= tiles.n) --rows;
    if (rows == 0) continue;
    const TilePrimal<C> p0(call, call.p0, at, width, rows, buffer), p1(call, call.p1, at, width, rows, buffer + room),
        mask(call, call.mask, at, width, rows, buffer + 2 * room);
    const int64_t widest = std::min(width, tiles.n - at);
    for (int64_t k = first; k < last; ++k) {
      double* const of_dots = dots + (k - first) * g.channels;
      double* const of_totals = totals + (k - first) * g.channels;
      if (short_) std::fill_n(dot, 2 * tiles.size, C(0));
      for (int64_t r = 0, m; r < rows; r += m) {
        const int64_t place = at + r * tiles.row, here = k * tiles.n + place;
        const int64_t n = std::min(width, tiles.n - place);
        // Rows of one length at a time.
        m = short_ ? std::min(sums_rows, rows - r) : 1;
        while (m > 1 && place + (m - 1) * tiles.row + n > tiles.n) --m;
        const int64_t stride = direct ? tiles.row : width;
        const auto rows_of = [&](const void* from, C* to) {
          const C* const found = fetch(storage, from, here, n, to);
          for (int64_t i = 1; i < m && !direct; ++i) fetch(storage, from, here + i * tiles.row, n, to + i * width);
          return found;
        };
        const C* const t0 = rows_of(call.t0, of_t0);
        const C* const t1 = call.t1 ? rows_of(call.t1, of_t1) : nullptr;
        if (short_) {
          if (call.dots) loops.columns(dot, t0, stride, p0.row(r), p0.stride, m, n);
          if (t1) loops.columns(dot, t1, stride, p1.row(r), p1.stride, m, n);
          if (call.totals) loops.columns(total, t0, stride, nullptr, 0, m, n);
        } else {
          if (call.dots) loops.runs(g, t0, p0.row(r), column, n, of_dots);
          if (t1) loops.runs(g, t1, p1.row(r), column, n, of_dots);
          if (call.totals) loops.runs(g, t0, nullptr, column, n, of_totals);
        }
        for (int64_t i = 0; i < m && call.mask; ++i) {
          const int64_t to = here + i * tiles.row;
          C* const out = target(storage, call.mapped, to, mapped);
          loops.multiply(out, t0 + i * stride, mask.row(r + i), n);
          deliver(storage, out, n, call.mapped, to);
        }
      }
      if (short_ && call.dots) add_columns(g, dot, column, widest, of_dots);
      if (short_ && call.totals) add_columns(g, total, column, widest, of_totals);
    }
  }
}

}  // namespace
}  // namespace fastflat::cpu

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

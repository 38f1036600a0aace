// Products of rows of codes with float32 vectors, written once over the vector type `V` of an instruction set.
//
// A file of an instruction set defines V (kLanes floats; load, store, zero, set, add, mul, sub, fma, sum) and decoders:
//   kVectors     vectors of a group of 64 codes; kShared of them in a row share their scales
//   bytes        of a group
//   kIntegers    whether codes may have zero points
//   group(p, w)  64 codes -> w[kVectors], values divided by `unit`
//   along(s, c)  the scales s[4] of the group's four 16 columns, as the vectors of class c need them
// Up to kFew rows of x are multiplied with values in registers, scales applied to sums of products; more rows with
// weights that were decoded and scaled once, a few rows and kChunk columns at a time, in the first-level cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "gemm.h"

namespace jqopt {
namespace {

constexpr int64_t kChunk = 512;  // columns decoded at a time
constexpr int kTile = 4;         // rows of w decoded at a time
constexpr int64_t kFew = 3;      // rows of x up to which codes are decoded in registers

// ---- scales

// out[0 : places]: `count` values, each `repeat` times; zero from there on. A value is written in whole vectors, what is
// too much is overwritten by the next: `out` has room for one vector more.
template <class V>
void spread(const float* values, int64_t count, int64_t repeat, int64_t places, float* out) {
  int64_t i = 0, at = 0;
  if (repeat <= V::kLanes)
    for (const int64_t whole = std::min(count, places / repeat); i < whole; ++i) V::store(out + i * repeat, V::set(values[i]));
  for (at = i * repeat; i < count; ++i, at += repeat) {
    const V value = V::set(values[i]);
    const int64_t end = std::min(repeat, places - at);
    for (int64_t r = 0; r < end; r += V::kLanes) V::store(out + at + r, value);
  }
  for (at = std::min(at, places); at < places; ++at) out[at] = 0.0f;
}

// Scale bytes -> float32 divided by `scale_unit`, 64 at a time; `out` has room for whole groups.
template <class V>
void decode_e4m3(const uint8_t* bytes, int64_t count, float* out) {
  using D = typename V::E4M3;
  alignas(64) uint8_t rest[kGroup];
  const D decoder;
  for (int64_t at = 0; at < count; at += kGroup) {
    const uint8_t* from = bytes + at;
    if (count - at < kGroup) {
      std::memset(rest, 0, kGroup);
      std::memcpy(rest, from, count - at);
      from = rest;
    }
    V w[D::kVectors];
    decoder.group(from, w);
    for (int i = 0; i < D::kVectors; ++i) V::store(out + at + i * V::kLanes, w[i]);
  }
}

// 2^(byte - 127): the byte is the exponent, except that 0 is subnormal and 255 is NaN, which one more bit makes of both.
inline void decode_e8m0(const uint8_t* bytes, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t b = bytes[i];
    out[i] = bits_to_float(b << 23 | uint32_t(((b + 1) & 255) < 2) << 22);
  }
}

inline int64_t whole_groups(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }

template <class V>
float scale_unit(int64_t kind) {
  return kind == kBitsE4M3 ? V::E4M3::unit : 1.0f;
}

// The scales (or zero points) of one row of w, one for each 16 columns.
template <class V>
void along_row(const Product& p, const void* stored, int64_t kind, int64_t width, int64_t row, float* temporary, float* out) {
  const int64_t r = row / p.rows, count = (p.k + p.block - 1) / p.block, repeat = p.block / kPerScale;
  const float* values = temporary;
  float* target = repeat == 1 ? out : temporary;
  if (kind == kF32) {
    values = static_cast<const float*>(stored) + r * width;
  } else if (kind == kBitsE4M3) {
    decode_e4m3<V>(static_cast<const uint8_t*>(stored) + r * width, count, target);
  } else {
    decode_e8m0(static_cast<const uint8_t*>(stored) + r * width, count, target);
  }
  const int64_t places = p.padded / kPerScale;
  if (target == out && kind != kF32) {
    for (int64_t at = count; at < places; ++at) out[at] = 0.0f;
  } else {
    spread<V>(values, count, repeat, places, out);
  }
}

// ---- one row of codes

struct Row {
  const uint8_t* codes;
  const float* scale;   // one for each 16 columns, or null
  const float* zero;    // as `scale`
  int64_t used;         // bytes that may be read
};

// Calls step(group, its bytes) for groups [first, last). Where the row ends inside of one, its bytes are copied and
// filled up with zeros, so that nothing behind the row is read.
template <class D, class F>
inline void each_group(const Row& row, int64_t first, int64_t last, const F& step) {
  const int64_t whole = std::min(last, row.used / D::bytes);
  for (int64_t g = first; g < whole; ++g) step(g, row.codes + g * D::bytes);
  if (whole == last) return;
  alignas(64) uint8_t rest[kGroup] = {};
  std::memcpy(rest, row.codes + whole * D::bytes, row.used - whole * D::bytes);
  step(whole, rest);
}

// One row of w times kCount rows of x, `stride` apart -> out[kCount].
template <class V, class D, bool kScaled, bool kZero, int kCount>
void dot_row(const D& decoder, const Row& row, const float* x, int64_t stride, int64_t groups, float* out) {
  // enough sums to keep the additions from waiting for each other
  constexpr int kSums = kCount > 1 ? 2 : kScaled ? D::kVectors / D::kShared : D::kVectors;
  V sums[kCount][kSums];
  for (int j = 0; j < kCount; ++j)
    for (int i = 0; i < kSums; ++i) sums[j][i] = V::zero();
  each_group<D>(row, 0, groups, [&](int64_t g, const uint8_t* bytes) __attribute__((always_inline)) {
    V w[D::kVectors], part[kCount];
    decoder.group(bytes, w);
    for (int i = 0; i < D::kVectors; ++i) {
      const int c = i / D::kShared;
      const V value = kZero ? V::sub(w[i], D::along(row.zero + 4 * g, c)) : w[i];
      for (int j = 0; j < kCount; ++j) {
        const V column = V::load(x + j * stride + g * kGroup + i * V::kLanes);
        if (!kScaled) sums[j][i % kSums] = V::fma(value, column, sums[j][i % kSums]);
        else part[j] = i % D::kShared ? V::fma(value, column, part[j]) : V::mul(value, column);
      }
      if (!kScaled || i % D::kShared != D::kShared - 1) continue;
      const V scale = D::along(row.scale + 4 * g, c);
      for (int j = 0; j < kCount; ++j) sums[j][c % kSums] = V::fma(part[j], scale, sums[j][c % kSums]);
    }
  });
  for (int j = 0; j < kCount; ++j) {
    for (int i = 1; i < kSums; ++i) sums[j][0] = V::add(sums[j][0], sums[j][i]);
    out[j] = V::sum(sums[j][0]);
  }
}

template <class V, class D, bool kScaled, bool kZero>
void decode_row(const D& decoder, const Row& row, int64_t first, int64_t groups, float* out) {
  each_group<D>(row, first, first + groups, [&](int64_t g, const uint8_t* bytes) __attribute__((always_inline)) {
    V w[D::kVectors];
    decoder.group(bytes, w);
    for (int i = 0; i < D::kVectors; ++i) {
      V value = w[i];
      if (kZero) value = V::sub(value, D::along(row.zero + 4 * g, i / D::kShared));
      if (kScaled) value = V::mul(value, D::along(row.scale + 4 * g, i / D::kShared));
      V::store(out + (g - first) * kGroup + i * V::kLanes, value);
    }
  });
}

// sums[r * m + j] += w[r, :columns] * x[j, :columns], for kTile rows r and kCount rows j.
template <class V, int kCount>
void multiply_tile(const float* w, const float* x, int64_t stride, int64_t columns, V* sums, int64_t m) {
  V s[kTile][kCount];
  for (int r = 0; r < kTile; ++r)
    for (int j = 0; j < kCount; ++j) s[r][j] = sums[r * m + j];
  for (int64_t c = 0; c < columns; c += V::kLanes) {
    V xs[kCount];
    for (int j = 0; j < kCount; ++j) xs[j] = V::load(x + j * stride + c);
    for (int r = 0; r < kTile; ++r) {
      const V value = V::load(w + r * kChunk + c);
      for (int j = 0; j < kCount; ++j) s[r][j] = V::fma(value, xs[j], s[r][j]);
    }
  }
  for (int r = 0; r < kTile; ++r)
    for (int j = 0; j < kCount; ++j) sums[r * m + j] = s[r][j];
}

template <class V>
void multiply(const float* w, const float* x, int64_t stride, int64_t columns, V* sums, int64_t m) {
  for (int64_t j = 0; j < m;) {
    const int64_t left = m - j, count = left == 4 ? 2 : std::min<int64_t>(left, 3);  // 4 = 2 + 2, not 3 + 1
    if (count == 3) multiply_tile<V, 3>(w, x + j * stride, stride, columns, sums + j, m);
    if (count == 2) multiply_tile<V, 2>(w, x + j * stride, stride, columns, sums + j, m);
    if (count == 1) multiply_tile<V, 1>(w, x + j * stride, stride, columns, sums + j, m);
    j += count;
  }
}

// ---- rows [first, last)

template <class V>
struct Scratch {
  float *scale, *zero, *temporary, *weights;
  V* sums;

  // Floats of: scales, zero points and their undecoded form for kTile rows; decoded weights; sums.
  static int64_t size(const Product& p) {
    return (2 * kTile + 1) * along(p) + kTile * kChunk + kTile * p.m * V::kLanes;
  }
  static int64_t along(const Product& p) { return whole_groups(p.padded / kPerScale + V::kLanes); }

  Scratch(const Product& p, float* at) {
    const int64_t a = along(p);
    scale = at, zero = scale + kTile * a, temporary = zero + kTile * a, weights = temporary + a;
    sums = reinterpret_cast<V*>(weights + kTile * kChunk);
  }
};

// Which scales the buffers hold: rows of 2-D blocks share them.
template <class V>
struct Reader {
  const Product& p;
  const Scratch<V>& scratch;
  int64_t held[kTile];

  Reader(const Product& product, const Scratch<V>& s) : p(product), scratch(s) { std::fill_n(held, kTile, -1); }

  Row at(int64_t row, int slot) {
    float *scale = scratch.scale + slot * Scratch<V>::along(p), *zero = scratch.zero + slot * Scratch<V>::along(p);
    if (held[slot] != row / p.rows) {
      if (p.scale) along_row<V>(p, p.scale, p.kind, p.scale_width, row, scratch.temporary, scale);
      if (p.zero) along_row<V>(p, p.zero, kF32, p.zero_width, row, scratch.temporary, zero);
      held[slot] = row / p.rows;
    }
    return {p.codes + row * p.width, p.scale ? scale : nullptr, p.zero ? zero : nullptr, p.used};
  }
};

template <class V, class D, bool kScaled, bool kZero>
void run_rows(const Product& p, int64_t first, int64_t last, float* at) {
  const D decoder(p.element);
  const Scratch<V> scratch(p, at);
  const float unit = D::unit * scale_unit<V>(p.kind);
  Reader<V> reader(p, scratch);
  if (p.m <= kFew) {
    for (int64_t row = first; row < last; ++row) {
      float y[kFew];
      const Row codes = reader.at(row, 0);
      const int64_t groups = p.padded / kGroup;
      if (p.m == 1) dot_row<V, D, kScaled, kZero, 1>(decoder, codes, p.x, p.padded, groups, y);
      if (p.m == 2) dot_row<V, D, kScaled, kZero, 2>(decoder, codes, p.x, p.padded, groups, y);
      if (p.m == 3) dot_row<V, D, kScaled, kZero, 3>(decoder, codes, p.x, p.padded, groups, y);
      for (int64_t j = 0; j < p.m; ++j) p.y[j * p.n + row] = unit * y[j];
    }
    return;
  }
  for (int64_t row = first; row < last; row += kTile) {
    const int count = int(std::min<int64_t>(kTile, last - row));
    Row rows[kTile];
    for (int r = 0; r < count; ++r) rows[r] = reader.at(row + r, r);
    for (int64_t i = 0; i < kTile * p.m; ++i) scratch.sums[i] = V::zero();
    for (int64_t c = 0; c < p.padded; c += kChunk) {
      const int64_t columns = std::min(kChunk, p.padded - c);
      for (int r = 0; r < kTile; ++r) {
        float* out = scratch.weights + r * kChunk;
        if (r < count) decode_row<V, D, kScaled, kZero>(decoder, rows[r], c / kGroup, columns / kGroup, out);
        else std::fill_n(out, columns, 0.0f);
      }
      multiply<V>(scratch.weights, p.x + c, p.padded, columns, scratch.sums, p.m);
    }
    for (int r = 0; r < count; ++r)
      for (int64_t j = 0; j < p.m; ++j) p.y[j * p.n + row + r] = unit * V::sum(scratch.sums[r * p.m + j]);
  }
}

template <class V, class D>
void run_scaled(const Product& p, int64_t first, int64_t last, float* scratch) {
  if (!p.scale) return run_rows<V, D, false, false>(p, first, last, scratch);
  if constexpr (D::kIntegers)
    if (p.zero) return run_rows<V, D, true, true>(p, first, last, scratch);
  run_rows<V, D, true, false>(p, first, last, scratch);
}

template <class V>
void run(const Product& p, int64_t first, int64_t last, float* scratch) {
  switch (p.element) {
    case kInt8: return run_scaled<V, typename V::Int8>(p, first, last, scratch);
    case kE4M3: return run_scaled<V, typename V::E4M3>(p, first, last, scratch);
    case kE5M2: return run_scaled<V, typename V::E5M2>(p, first, last, scratch);
    default: return run_scaled<V, typename V::Nibble>(p, first, last, scratch);
  }
}

}  // namespace
}  // namespace jqopt

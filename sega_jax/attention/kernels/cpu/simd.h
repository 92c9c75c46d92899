// Vectors of the widest register, in the compiler's own vector types: one source for AVX2 and AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <immintrin.h>

namespace sega {

#if !defined(__FMA__)
#error this processor has no fused multiply-add, without which plain XLA is faster
#endif

#if defined(__AVX512F__) || defined(SEGA_SOFTWARE_TILES)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class Vector>
inline Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Vector>
inline void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

inline Floats fill(float x) { return x - Floats{}; }  // x + 0 would turn -0 into 0

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

template <class Combine>
inline float reduce(Floats x, Combine combine) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}

// 2^x for x <= 0 (a NaN stays one); relative error 8e-8 with a quintic, 8e-5 with a cubic; zero below 2^-126.
template <bool quintic>
inline Floats power(Floats x) {
#if defined(__AVX512F__)
  x = _mm512_max_ps(fill(-200.0f), x);  // the second operand where one is a NaN
  const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats floor = fill(-126.0f);
  const auto vanishes = x < floor;
  x = vanishes ? floor : x;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: a float32 plus this ends in its nearest integer
  const Floats shifted = x + rounding;
  const Floats whole = shifted - rounding;
#endif
  const Floats part = x - whole;
  Floats value;
  if constexpr (quintic) {
    value = 0.00132764719925f * part + 0.00967554133445f;
    value = value * part + 0.055507132735f;
    value = value * part + 0.240221197238f;
    value = value * part + 0.693146967065f;
    value = value * part + 1.00000007165f;
  } else {
    value = 0.0551716690579f * part + 0.242611122193f;
    value = value * part + 0.693260985461f;
    value = value * part + 0.999928073539f;
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(value, whole);
#else
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return vanishes ? Floats{} : value * scale;
#endif
}

// -- bfloat16 ---------------------------------------------------------------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
};

inline float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Bfloat16 narrow(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// -- transposition ----------------------------------------------------------------------------------------------------

// The first (`high` = false) or second row after blocks of `width` lanes of two rows have changed places.
template <int width, bool high, int... lane>
inline Words exchange(Words a, Words b, std::integer_sequence<int, lane...>) {
  constexpr auto from = [](int l) { return l & width ? kLanes + l - (high ? 0 : width) : l + (high ? width : 0); };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from(lane)...);
#else
  constexpr Words lanes = {uint32_t(from(lane))...};
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <int width>
inline void exchange_rows(Words (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int i = 0; i < kLanes; ++i) {
    if (i & width) continue;
    const Words a = rows[i], b = rows[i + width];
    rows[i] = exchange<width, false>(a, b, lanes);
    rows[i + width] = exchange<width, true>(a, b, lanes);
  }
  if constexpr (width > 1) exchange_rows<width / 2>(rows);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < kLanes.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  Words rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load<Words>(from + i * from_stride);
  exchange_rows<kLanes / 2>(rows);
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, rows[i]);
}

}  // namespace sega

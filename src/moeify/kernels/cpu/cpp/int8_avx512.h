// Integer products by AVX-512 with VNNI: vectors of 64 numbers, four products per 32-bit lane and instruction.
#pragma once
#include "int4.h"

#define BY_INT8 __attribute__((target("avx512vnni")))  // processors with products of bf16 have it too

constexpr int SPAN = 4 * SHARED;
constexpr int AT_ONCE = 6;    // activation rows that share unpacked weights, at most
constexpr int NARROW = 2;     // activation rows up to which four weight rows are taken together, and not two
template <Format format>
constexpr float OFFSET = format == INT8 ? 128.f : 8.f;  // what `weights_of` adds to a weight

// Four groups of 64 with one scale each, interleaved in runs of four values: 32-bit lane i belongs to group i % 4.
struct Span {
    __m512i part[4];
};

INLINE Span in_turn(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512i ab = _mm512_permutex2var_epi32(a, low, b), cd = _mm512_permutex2var_epi32(c, low, d);
    const __m512i ab_high = _mm512_permutex2var_epi32(a, high, b), cd_high = _mm512_permutex2var_epi32(c, high, d);
    return {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high)};
}

// Loads stored weights as w + 128 (int8) or w + 8 (int4).
template <Format format>
INLINE Span weights_of(const uint8_t* w) {
    const __m512i sign = _mm512_set1_epi8(-128), four = _mm512_set1_epi8(15);
    const auto from = [&](int i) { return _mm512_loadu_si512(w + i * SHARED); };
    if (format == INT8)
        return in_turn(_mm512_xor_si512(from(0), sign), _mm512_xor_si512(from(1), sign),
                       _mm512_xor_si512(from(2), sign), _mm512_xor_si512(from(3), sign));
    const __m512i turns = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const __m512i ab = _mm512_shuffle_epi8(from(0), turns), cd = _mm512_shuffle_epi8(from(1), turns);
    const __m512i even = _mm512_unpacklo_epi64(ab, cd), odd = _mm512_unpackhi_epi64(ab, cd);
    return {_mm512_and_si512(even, four), _mm512_and_si512(odd, four),
            _mm512_and_si512(_mm512_srli_epi16(even, 4), four), _mm512_and_si512(_mm512_srli_epi16(odd, 4), four)};
}

struct Group {  // activations that share a scale
    __m512i numbers;
    float scale, sum;
};

BY_INT8 inline Group round_group(const float* x) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < SHARED; i += W)  // absolute values compare like their bit patterns, with NaN the largest
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
    const float most = cast<float>(_mm512_reduce_max_epi32(largest)), inverse = most > 0 ? 127.f / most : 0.f;
    alignas(64) int8_t whole[SHARED];
    for (int i = 0; i < SHARED; i += W) {
        const __m512i nearest = _mm512_cvtps_epi32(cast<__m512>(load(x + i) * inverse));
        _mm_store_si128((__m128i*)(whole + i), _mm512_cvtepi32_epi8(nearest));
    }
    const __m512i numbers = _mm512_load_si512(whole), ones = _mm512_set1_epi8(1);
    const int32_t total = _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, numbers));
    return {numbers, most / 127.f, most / 127.f * total};
}

// The activations of a span, in the order of `weights_of`.
INLINE Span in_order(const Group* groups) {
    return in_turn(groups[0].numbers, groups[1].numbers, groups[2].numbers, groups[3].numbers);
}

INLINE Floats first_scales(const float* scales, int64_t count) {  // the others are zero
    return cast<Floats>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), scales));
}

// Lane i has the scale of group i % 4.
INLINE Floats scales_of(const float* scales) { return cast<Floats>(_mm512_broadcast_f32x4(_mm_load_ps(scales))); }

template <Format>
BY_INT8 inline Floats products_of(const Span& weights, const int8_t* numbers) {
    __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++)
        sums = _mm512_dpbusd_epi32(sums, weights.part[p], _mm512_loadu_si512(numbers + p * SHARED));
    return cast<Floats>(_mm512_cvtepi32_ps(sums));
}

// Integer products by AVX2: vectors of 32 numbers, two products per 16-bit lane and instruction.
#pragma once
#include "int4.h"

#define BY_INT8

constexpr int SPAN = 2 * SHARED;
constexpr int AT_ONCE = 4;   // activation rows that share unpacked weights, at most
constexpr int NARROW = 1;    // activation rows up to which four weight rows are taken together, and not two
template <Format format>
constexpr float OFFSET = format == INT8 ? 0.f : 8.f;  // what `weights_of` adds to a weight

// Two groups of 64 with one scale each, in runs of eight values: 32-bit lane i belongs to group i / 2 % 2.
struct Span {
    __m256i part[4];
};

INLINE Span in_turn(__m256i a0, __m256i a1, __m256i b0, __m256i b1) {
    return {_mm256_unpacklo_epi64(a0, b0), _mm256_unpackhi_epi64(a0, b0), _mm256_unpacklo_epi64(a1, b1),
            _mm256_unpackhi_epi64(a1, b1)};
}

INLINE __m256i halves(const uint8_t* low, const uint8_t* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)),
                                   _mm_loadu_si128((const __m128i*)high), 1);
}

// Loads stored weights as w (int8) or w + 8 (int4).
template <Format format>
INLINE Span weights_of(const uint8_t* w) {
    const auto from = [&](int i) { return _mm256_loadu_si256((const __m256i*)w + i); };
    if (format == INT8) return in_turn(from(0), from(1), from(2), from(3));
    const __m256i four = _mm256_set1_epi8(15);
    const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i a = _mm256_shuffle_epi8(halves(w, w + 32), apart), b = _mm256_shuffle_epi8(halves(w + 16, w + 48), apart);
    return {_mm256_and_si256(a, four), _mm256_and_si256(b, four), _mm256_and_si256(_mm256_srli_epi16(a, 4), four),
            _mm256_and_si256(_mm256_srli_epi16(b, 4), four)};
}

struct Group {  // activations that share a scale
    alignas(32) int8_t numbers[SHARED];
    float scale, sum;
};

inline Group round_group(const float* x) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < SHARED; i += W)  // absolute values compare like their bit patterns, with NaN the largest
        largest = _mm256_max_epi32(
            largest, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + i)), _mm256_set1_epi32(0x7fffffff)));
    int32_t bits = 0;
    for (int i = 0; i < W; i++) bits = cast<Ints>(largest)[i] > bits ? cast<Ints>(largest)[i] : bits;
    const float most = cast<float>(bits), inverse = most > 0 ? 127.f / most : 0.f;
    Group group;
    Ints total = {};
    for (int i = 0; i < SHARED; i += W) {
        const Ints nearest = cast<Ints>(_mm256_cvtps_epi32(cast<__m256>(load(x + i) * inverse)));
        const Bytes bytes = __builtin_convertvector(nearest, Bytes);
        std::memcpy(group.numbers + i, &bytes, W);
        total += nearest;
    }
    int32_t sum = 0;
    for (int i = 0; i < W; i++) sum += total[i];
    group.scale = most / 127.f, group.sum = most / 127.f * sum;
    return group;
}

// The activations of a span, in the order of `weights_of`.
INLINE Span in_order(const Group* groups) {
    const auto from = [&](int g, int i) { return _mm256_load_si256((const __m256i*)groups[g].numbers + i); };
    return in_turn(from(0, 0), from(0, 1), from(1, 0), from(1, 1));
}

INLINE Floats first_scales(const float* scales, int64_t count) {  // the others are zero
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return cast<Floats>(_mm256_maskload_ps(scales, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes)));
}

// Lane i has the scale of group i / 2 % 2.
INLINE Floats scales_of(const float* scales) {
    const __m128 two = _mm_castpd_ps(_mm_load_sd((const double*)scales)), four = _mm_unpacklo_ps(two, two);
    return cast<Floats>(_mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1));
}

template <Format format>
INLINE Floats products_of(const Span& weights, const int8_t* numbers) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        const __m256i w = weights.part[p], x = _mm256_loadu_si256((const __m256i*)numbers + p);
        if (format == INT4)  // 8 · 15 · 127 fits into 16 bits
            sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
        else  // one factor must be unsigned: |w| · (x with the sign of w)
            sums = _mm256_add_epi32(
                sums, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), ones));
    }
    return cast<Floats>(_mm256_cvtepi32_ps(format == INT4 ? _mm256_madd_epi16(sums, ones) : sums));
}

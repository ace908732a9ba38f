// Products of whole numbers: weights of 8 or 4 bits with activations that are rounded to 8, of which every 64 share a
// scale. A processor that multiplies bytes does four products at once where one in bf16 takes as long.
#pragma once
#include "maps.h"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__AVX512BF16__)  // such processors know the instructions of VNNI too
#define BYTES __attribute__((target("avx512vnni")))

constexpr int SHARED = 64;  // activations that share a scale

// One token's activations, filled up with zeros. Products take weights as they are stored, w + 128 or w + 8; `seeds` take
// away what that is too much.
struct Token {
    const int8_t* numbers;
    const int32_t* seeds;  // 16 for every 64 numbers
    const float* scales;
};

INLINE Floats absolute(Floats x) { return cast<Floats>(cast<Ints>(x) & 0x7fffffff); }

// 64 numbers to whole ones, in the order of their weights: those of 4 bits come as 0, 32, 1, 33, ...; returns the scale.
BYTES inline float round_bytes(const float* x, Format format, int8_t* out, int32_t* seeds) {
    const Floats a = load(x), b = load(x + 16), c = load(x + 32), d = load(x + 48);
    const __m512 most = _mm512_max_ps(_mm512_max_ps(cast<__m512>(absolute(a)), cast<__m512>(absolute(b))),
                                      _mm512_max_ps(cast<__m512>(absolute(c)), cast<__m512>(absolute(d))));
    const float largest = _mm512_reduce_max_ps(most), inverse = largest > 0 ? 127.f / largest : 0.f;
    const auto whole = [&](Floats v) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(cast<__m512>(v * inverse))); };
    const __m256i low = _mm256_set_m128i(whole(b), whole(a)), high = _mm256_set_m128i(whole(d), whole(c));
    __m512i numbers = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    if (format == INT4)
        numbers = _mm512_or_si512(_mm512_cvtepu8_epi16(low), _mm512_slli_epi16(_mm512_cvtepu8_epi16(high), 8));
    _mm512_storeu_si512(out, numbers);
    const __m512i offset = _mm512_set1_epi8(format == INT8 ? -128 : 8), zero = _mm512_setzero_si512();
    _mm512_storeu_si512(seeds, _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, numbers)));
    return largest / 127.f;
}

struct Rounded {  // the activations of some tokens
    std::vector<int8_t> numbers;
    std::vector<int32_t> seeds;
    std::vector<float> scales;
    std::vector<Token> tokens;

    void round(const float* x, int64_t count, int64_t k, Format format) {
        const int64_t groups = (k + NIBBLES - 1) / NIBBLES * 2;
        numbers.resize(count * groups * SHARED), seeds.resize(count * groups * 16), scales.resize(count * groups);
        tokens.clear();
        for (int64_t t = 0; t < count; t++) {
            const int64_t at = t * groups;
            tokens.push_back({numbers.data() + at * SHARED, seeds.data() + at * 16, scales.data() + at});
            for (int64_t g = 0; g < groups; g++) {
                float padded[SHARED] = {};
                const float* from = x + t * k + g * SHARED;
                if ((g + 1) * SHARED > k) {
                    std::copy(from, from + std::max<int64_t>(k - g * SHARED, 0), padded);
                    from = padded;
                }
                scales[at + g] = round_bytes(from, format, numbers.data() + (at + g) * SHARED, seeds.data() + (at + g) * 16);
            }
        }
    }
};

INLINE Floats scaled(__m512i sums, float scale) { return cast<Floats>(_mm512_cvtepi32_ps(sums)) * scale; }

BYTES inline __m512i add_products(const int32_t* seeds, __m512i w, const int8_t* x) {
    return _mm512_dpbusd_epi32(_mm512_loadu_si512(seeds), w, _mm512_loadu_si512(x));
}

BYTES inline Floats byte_dot(const int8_t* w, int64_t k, const Token& x) {
    Floats even = {}, odd = {};
    const __m512i sign = _mm512_set1_epi8(-128);
    int64_t g = 0;
    for (; (g + 2) * SHARED <= k; g += 2) {
        const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(w + g * SHARED), sign);
        const __m512i b = _mm512_xor_si512(_mm512_loadu_si512(w + g * SHARED + SHARED), sign);
        even += scaled(add_products(x.seeds + g * 16, a, x.numbers + g * SHARED), x.scales[g]);
        odd += scaled(add_products(x.seeds + g * 16 + 16, b, x.numbers + g * SHARED + SHARED), x.scales[g + 1]);
    }
    for (; g * SHARED < k; g++) {
        const int64_t left = std::min<int64_t>(SHARED, k - g * SHARED);
        const __m512i a = _mm512_maskz_loadu_epi8(~0ull >> (64 - left), w + g * SHARED);
        even += scaled(add_products(x.seeds + g * 16, _mm512_xor_si512(a, sign), x.numbers + g * SHARED), x.scales[g]);
    }
    return even + odd;
}

BYTES inline Floats nibble_dot(const uint8_t* w, const float* scales, int64_t groups, const Token& x) {
    Floats even = {}, odd = {};
    const __m512i low = _mm512_set1_epi16(0x00ff), four = _mm512_set1_epi8(15);
    for (int64_t begin = 0; begin < groups; begin += 16) {
        const int64_t end = std::min<int64_t>(16, groups - begin);
        const __mmask16 there = __mmask16((1u << end) - 1);
        alignas(64) float both[16];  // the scales of weights and activations
        _mm512_store_ps(both, _mm512_mul_ps(_mm512_maskz_loadu_ps(there, scales + begin),
                                            _mm512_maskz_loadu_ps(there, x.scales + begin)));
        const uint8_t* here = w + begin * SHARED / 2;
        const int32_t* seeds = x.seeds + begin * 16;
        const int8_t* numbers = x.numbers + begin * SHARED;
        for (int64_t g = 0; g < end; g += 2) {
            const __m512i v = _mm512_loadu_si512(here + g * SHARED / 2);
            const __m512i a = _mm512_ternarylogic_epi32(low, v, _mm512_slli_epi16(v, 4), 0xca);  // low ? v : v << 4
            const __m512i b = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(v, 8), _mm512_srli_epi16(v, 4), 0xca);
            even += scaled(add_products(seeds + g * 16, _mm512_and_si512(a, four), numbers + g * SHARED), both[g]);
            odd += scaled(add_products(seeds + g * 16 + 16, _mm512_and_si512(b, four), numbers + g * SHARED + SHARED),
                          both[g + 1]);
        }
    }
    return even + odd;
}

// out[m * stride + n] = row (first + n) of an expert's weights · x[m], for n < count, m < rows.
BYTES inline void byte_products(const Stack& s, int64_t expert, int64_t first, int64_t count, const Token* x, int rows,
                                int64_t k, float* out, int64_t stride) {
    const int64_t begin = expert * (s.expert_stride / s.row_stride) + first, groups = (k + NIBBLES - 1) / NIBBLES * 2;
    for (int64_t n = 0; n < count; n += 4)
        for (int m = 0; m < rows; m++) {
            Floats sum_of[4] = {};
            const int64_t here = std::min<int64_t>(4, count - n);
            for (int64_t c = 0; c < here; c++) {
                const int64_t row = begin + n + c;
                const uint8_t* w = (const uint8_t*)s.data + row * s.row_stride;
                sum_of[c] = s.format == INT8 ? byte_dot((const int8_t*)w, k, x[m]) * s.scales[row]
                                             : nibble_dot(w, s.scales + row * groups, groups, x[m]);
            }
            float four[4];
            sums(sum_of[0], sum_of[1], sum_of[2], sum_of[3], four);
            std::copy(four, four + here, out + m * stride + n);
        }
}

// Whether a map's weights can be multiplied so, for a few tokens.
inline bool takes_bytes(const Stack& s, int64_t rows) {
    return rows <= FEW && !s.bias && (s.format == INT8 || (s.format == INT4 && s.group == SHARED));
}
#endif

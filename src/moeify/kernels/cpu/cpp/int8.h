// Integer products: int8 or int4 weights times activations quantised to int8 in groups of 64 that share a scale. int8
// instructions (VNNI) accumulate four products per 32-bit lane, those of bf16 two.
#pragma once
#include "projections.h"

#include <algorithm>
#include <vector>

constexpr int INT8_MAX_ROWS = 24;  // rows per expert up to which integer products are used

struct Token {  // one quantised row of activations, zero-padded
    const int8_t* numbers;  // in the order of `Span`
    const float* scales;    // one per group of 64
    const float* sums;      // scaled sum of each group; products use weights w + 128 or w + 8, and sums correct for it
};

#if defined(__AVX512BF16__)  // such processors support VNNI too
#define VNNI __attribute__((target("avx512vnni")))

constexpr int SHARED = 64, SCALES = 16;  // group size; scales that are loaded together
constexpr int AHEAD = 16384;             // prefetch distance into the L2 cache, in bytes after the current rows
constexpr int AT_ONCE = 6;               // activation rows that share unpacked weights, at most

constexpr int SPAN = 4 * SHARED;
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

VNNI inline Group round_group(const float* x) {
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

struct Rounded {  // rows of activations quantised to int8
    int64_t width = 0;
    std::vector<int8_t> numbers;
    std::vector<float> scales, sums;

    void resize(int64_t rows, int64_t k) {
        width = (k + SCALES * SHARED - 1) / (SCALES * SHARED) * SCALES * SHARED;
        const size_t size = rows * width;
        if (numbers.size() < size) numbers.resize(size), scales.resize(size / SHARED), sums.resize(size / SHARED);
    }
    Token operator[](int64_t row) const {
        const int64_t at = row * width;
        return {numbers.data() + at, scales.data() + at / SHARED, sums.data() + at / SHARED};
    }
    template <class X>
    void round(int64_t row, const X* x, int64_t k) {
        for (int64_t begin = 0; begin < width; begin += SPAN) {
            alignas(64) float padded[SPAN] = {};
            for (int64_t i = 0; i < SPAN && begin + i < k; i += W)
                store(padded + i, begin + i + W <= k ? load(x + begin + i) : load_first(x + begin + i, k - begin - i));
            Group groups[4];
            const int64_t at = (row * width + begin) / SHARED;
            for (int g = 0; g < 4; g++) {
                groups[g] = round_group(padded + g * SHARED);
                scales[at + g] = groups[g].scale, sums[at + g] = groups[g].sum;
            }
            const Span span = in_turn(groups[0].numbers, groups[1].numbers, groups[2].numbers, groups[3].numbers);
            std::memcpy(numbers.data() + at * SHARED, &span, SPAN);
        }
    }
};

// total[c][m] += w[c] · x[m], as a vector of partial sums, for c < C, m < M.
template <Format format, int C, int M>
VNNI inline void add_int8_dots(const uint8_t* const* w, const float* const* scales, int64_t ahead, const Token* x, int64_t k,
                            Floats (*total)[M]) {
    constexpr int bytes = format == INT8 ? SPAN : SPAN / 2;
    constexpr bool by_itself = C == 1 && format == INT8;  // contiguous reads: hardware prefetching suffices
    const int64_t blocks = (k + INT4_BLOCK - 1) / INT4_BLOCK, row_bytes = format == INT8 ? k : blocks * INT4_BLOCK / 2;
    for (int64_t begin = 0; begin < k; begin += SCALES * SHARED) {
        const int64_t end = std::min<int64_t>(begin + SCALES * SHARED, k);
        const int64_t groups = std::min<int64_t>(SCALES, 2 * blocks - begin / SHARED);
        alignas(64) float both[C][M][SCALES];  // products of weight and activation scales
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const __mmask16 there = __mmask16((1u << groups) - 1);
            const Floats scale =
                format == INT8 ? all(1) : cast<Floats>(_mm512_maskz_loadu_ps(there, scales[c] + begin / SHARED));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                store(both[c][m], scale * load(x[m].scales + begin / SHARED));
                total[c][m] -= (format == INT8 ? 128.f : 8.f) * scale * load(x[m].sums + begin / SHARED);
            }
        }
        for (int64_t i = begin; i < end; i += SPAN) {
            Span numbers[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const int64_t at = i / SPAN * bytes;
                for (int line = 0; line < bytes; line += LINE)
                    if (!by_itself) __builtin_prefetch(w[0] + ahead + at * C + c * bytes + line, 0, 2);
                if (at + bytes <= row_bytes) {
                    numbers[c] = weights_of<format>(w[c] + at);
                } else {
                    uint8_t padded[bytes];
                    std::memcpy(padded, w[c] + at, row_bytes - at);
                    numbers[c] = weights_of<format>(padded);
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 4
                    for (int p = 0; p < 4; p++) {
                        const __m512i inputs = _mm512_loadu_si512(x[m].numbers + i + p * SHARED);
                        sums = _mm512_dpbusd_epi32(sums, numbers[c].part[p], inputs);
                    }
                    const __m512 scale = _mm512_broadcast_f32x4(_mm_load_ps(both[c][m] + (i - begin) / SHARED));
                    total[c][m] += cast<Floats>(_mm512_cvtepi32_ps(sums)) * cast<Floats>(scale);
                }
        }
    }
}

// out[m * stride + c] = w[c] · x[m] for c < C, m < M; for one token, weight rows are read in memory order.
template <Format format, int C, int M>
VNNI inline void int8_dots(const uint8_t* const* w, const float* const* scales, int64_t ahead, const Token* x, int64_t k,
                            float* out, int64_t stride) {
    Floats total[C][M] = {};
    constexpr int together = M == 1 ? 1 : C;
    for (int c = 0; c < C; c += together) add_int8_dots<format, together, M>(w + c, scales + c, ahead, x, k, total + c);
#pragma GCC unroll 8
    for (int m = 0; format == INT8 && m < M; m++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) total[c][m] *= *scales[c];
#pragma GCC unroll 8
    for (int m = 0; m < M; m += 4 / C) {
        const int other = C == 4 || m + 1 == M ? m : m + 1;
        float four[4];
        sums(total[0][m], total[1][m], total[2 % C][other], total[3 % C][other], four);
        std::memcpy(out + m * stride, four, C * sizeof(float));
        if (other > m) std::memcpy(out + other * stride, four + C, C * sizeof(float));
    }
}

template <Format format>
void some_byte_dots(int m, const uint8_t* const* w, const float* const* scales, int64_t ahead, const Token* x,
                    int64_t k, float* out, int64_t stride) {
    switch (m) {
        case 1: return int8_dots<format, 4, 1>(w, scales, ahead, x, k, out, stride);
        case 2: return int8_dots<format, 4, 2>(w, scales, ahead, x, k, out, stride);
        case 3: return int8_dots<format, 2, 3>(w, scales, ahead, x, k, out, stride);
        case 4: return int8_dots<format, 2, 4>(w, scales, ahead, x, k, out, stride);
        case 5: return int8_dots<format, 2, 5>(w, scales, ahead, x, k, out, stride);
        case 6: return int8_dots<format, 2, 6>(w, scales, ahead, x, k, out, stride);
    }
}

template <Format format>
void int8_products(const Stack& s, int64_t expert, const Columns& columns, const Token* x, int rows, int64_t k, float* out,
                   int64_t stride) {
    const int64_t begin = expert * (s.expert_stride / s.row_stride) + columns.first;
    const int64_t groups = format == INT8 ? 1 : (k + INT4_BLOCK - 1) / INT4_BLOCK * 2;
    const int width = rows <= 2 ? 4 : 2, parts = (rows + AT_ONCE - 1) / AT_ONCE, height = (rows + parts - 1) / parts;
    const int64_t ahead = AHEAD + width * s.row_stride;
    for (int n = 0; n < columns.count; n += width) {
        const uint8_t* w[4];
        const float* scales[4];
        for (int c = 0; c < width; c++) {
            const int64_t row = begin + std::min(n + c, columns.count - 1) * columns.step;
            w[c] = (const uint8_t*)s.data + row * s.row_stride, scales[c] = s.scales + row * groups;
        }
        for (int m = 0; m < rows; m += height)
            some_byte_dots<format>(std::min(height, rows - m), w, scales, ahead, x + m, k, out + m * stride + n,
                                   stride);
    }
}

// out[m * stride + n] = column n of an expert · x[m]; `out` has space for a multiple of four columns.
inline void int8_products(const Stack& s, int64_t expert, const Columns& columns, const Token* x, int rows, int64_t k,
                          float* out, int64_t stride) {
    s.format == INT8 ? int8_products<INT8>(s, expert, columns, x, rows, k, out, stride)
                     : int8_products<INT4>(s, expert, columns, x, rows, k, out, stride);
}

// Whether a projection's weights support integer products.
template <class X>
bool takes_int8(const Stack& s) {
    return sizeof(X) == sizeof(Bf16) && (s.format == INT8 || (s.format == INT4 && s.group_size == SHARED));
}
#else
struct Rounded {
    void resize(int64_t, int64_t) {}
    Token operator[](int64_t) const { return {}; }
    template <class X>
    void round(int64_t, const X*, int64_t) {}
};
inline void int8_products(const Stack&, int64_t, const Columns&, const Token*, int, int64_t, float*, int64_t) {}
template <class X>
bool takes_int8(const Stack&) {
    return false;
}
#endif

// Products of whole numbers: weights of 8 or 4 bits with activations that are rounded to 8, of which every 64 share a
// scale. A processor that multiplies bytes does four products at once where one in bf16 takes as long.
#pragma once
#include "maps.h"

#include <algorithm>
#include <vector>

constexpr int MOST_BYTES = 24;  // rows of an expert for which its weights are multiplied so

// One row of activations, filled up with zeros. Of every 128, fours of the first 64 and of the last 64 take turns, so
// that even and odd sums of four products belong to two scales.
struct Token {
    const int8_t* numbers;
    const float* scales;  // of every 64 numbers
    const float* sums;    // of every 64 numbers, scaled: products take weights as w + 128 or w + 8
};

#if defined(__AVX512BF16__)  // such processors know the instructions of VNNI too
#define BYTES __attribute__((target("avx512vnni")))

constexpr int SHARED = 64, BLOCKS = 8;  // activations that share a scale; blocks of 128 that share a load of scales

struct Pair {  // 128 numbers in the order of a `Token`
    __m512i first, last;
};

INLINE Pair in_turn(__m512i a, __m512i b) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_permutex2var_epi32(a, first, b), _mm512_permutex2var_epi32(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b)};
}

struct Group {  // 64 activations
    __m512i numbers;
    float scale, sum;
};

// A NaN becomes the scale of its group.
BYTES inline Group round_group(const float* x) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < SHARED; i += W)  // as whole numbers, bits have the order of what they stand for, and NaN is last
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
    const float most = cast<float>(_mm512_reduce_max_epi32(largest)), inverse = most > 0 ? 127.f / most : 0.f;
    alignas(64) int8_t whole[SHARED];
    for (int i = 0; i < SHARED; i += W)
        _mm_store_si128((__m128i*)(whole + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(cast<__m512>(load(x + i) * inverse))));
    const __m512i numbers = _mm512_load_si512(whole), ones = _mm512_set1_epi8(1);
    const int32_t total = _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, numbers));
    return {numbers, most / 127.f, most / 127.f * total};
}

struct Rounded {  // the activations of some rows
    int64_t blocks = 0;
    std::vector<int8_t> numbers;
    std::vector<float> scales, sums;

    void make_room(int64_t rows, int64_t k) {
        blocks = (k + BLOCKS * NIBBLES - 1) / (BLOCKS * NIBBLES) * BLOCKS;
        if (int64_t(numbers.size()) < rows * blocks * NIBBLES) numbers.resize(rows * blocks * NIBBLES);
        if (int64_t(scales.size()) < rows * blocks * 2) scales.resize(rows * blocks * 2), sums.resize(rows * blocks * 2);
    }
    Token operator[](int64_t row) const {
        return {numbers.data() + row * blocks * NIBBLES, scales.data() + row * blocks * 2, sums.data() + row * blocks * 2};
    }
    template <class X>
    void round(int64_t row, const X* x, int64_t k) {
        for (int64_t b = 0; b < blocks; b++) {
            alignas(64) float padded[NIBBLES];
            for (int64_t i = 0; i < NIBBLES; i += W) {
                const int64_t at = b * NIBBLES + i, left = std::min<int64_t>(W, k - at);
                store(padded + i, left == W ? load(x + at) : left > 0 ? load_first(x + at, left) : Floats{});
            }
            const Group a = round_group(padded), c = round_group(padded + SHARED);
            const Pair pair = in_turn(a.numbers, c.numbers);
            int8_t* to = numbers.data() + (row * blocks + b) * NIBBLES;
            _mm512_storeu_si512(to, pair.first), _mm512_storeu_si512(to + SHARED, pair.last);
            const int64_t at = (row * blocks + b) * 2;
            scales[at] = a.scale, scales[at + 1] = c.scale, sums[at] = a.sum, sums[at + 1] = c.sum;
        }
    }
};

template <Format format>
INLINE Pair weights_of(const uint8_t* w) {
    if (format == INT8) {
        const __m512i sign = _mm512_set1_epi8(-128);
        return in_turn(_mm512_xor_si512(_mm512_loadu_si512(w), sign), _mm512_xor_si512(_mm512_loadu_si512(w + SHARED), sign));
    }
    const __m512i in_turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const __m512i v = _mm512_shuffle_epi8(_mm512_loadu_si512(w), in_turn), four = _mm512_set1_epi8(15);
    return {_mm512_and_si512(v, four), _mm512_and_si512(_mm512_srli_epi16(v, 4), four)};
}

// out[m * out_stride + c] = w[c] · x[m] for c < 4, m < M, but that a scale that 8 bits share in a row is left out.
template <Format format, int M>
BYTES inline void byte_dots(const uint8_t* const* w, const float* const* scales, int64_t ahead, const Token* x, int64_t k,
                            float* out, int64_t out_stride) {
    constexpr int C = 4, bytes = format == INT8 ? NIBBLES : NIBBLES / 2;
    const int64_t blocks = (k + NIBBLES - 1) / NIBBLES;
    Floats total[C][M] = {};
    for (int64_t begin = 0; begin < blocks; begin += BLOCKS) {
        const int64_t end = std::min<int64_t>(begin + BLOCKS, blocks);
        const __mmask16 there = __mmask16((1u << 2 * (end - begin)) - 1);
        alignas(64) float both[C][M][16];  // scales of weights and activations
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const Floats scale = format == INT8 ? all(1) : cast<Floats>(_mm512_maskz_loadu_ps(there, scales[c] + 2 * begin));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                store(both[c][m], scale * load(x[m].scales + 2 * begin));
                total[c][m] -= (format == INT8 ? 128.f : 8.f) * scale * load(x[m].sums + 2 * begin);
            }
        }
        for (int64_t b = begin; b < end; b++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const uint8_t* here = w[c] + b * bytes;
                uint8_t padded[NIBBLES];
                if (format == INT8 && (b + 1) * NIBBLES > k) {
                    std::memcpy(padded, here, k - b * NIBBLES);
                    here = padded;
                }
                const Pair numbers = weights_of<format>(here);
                for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(w[0] + ahead + (b * C + c) * bytes + i);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const int8_t* input = x[m].numbers + b * NIBBLES;
                    const __m512i first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), numbers.first, _mm512_loadu_si512(input));
                    const __m512i sum = _mm512_dpbusd_epi32(first, numbers.last, _mm512_loadu_si512(input + SHARED));
                    double two;
                    std::memcpy(&two, both[c][m] + 2 * (b - begin), sizeof(two));
                    total[c][m] += cast<Floats>(_mm512_cvtepi32_ps(sum)) * cast<Floats>(_mm512_set1_pd(two));
                }
            }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums(total[0][m], total[1][m], total[2][m], total[3][m], out + m * out_stride);
}

template <Format format>
BYTES inline void byte_products(const Stack& s, int64_t expert, const Columns& columns, const Token* x, int rows, int64_t k,
                                float* out, int64_t stride) {
    const int64_t begin = expert * (s.expert_stride / s.row_stride) + columns.first;
    const int64_t groups = format == INT8 ? 1 : (k + NIBBLES - 1) / NIBBLES * 2;
    const int64_t ahead = std::max<int64_t>(PREFETCH, 4 * s.row_stride);
    for (int n = 0; n < columns.count; n += 4) {
        const uint8_t* w[4];
        const float* scales[4];
        for (int c = 0; c < 4; c++) {
            const int64_t row = begin + std::min(n + c, columns.count - 1) * columns.step;
            w[c] = (const uint8_t*)s.data + row * s.row_stride, scales[c] = s.scales + row * groups;
        }
        for (int m = 0; m < rows; m += 4) {
            alignas(64) float four[4][4];
            switch (std::min(4, rows - m)) {
                case 1: byte_dots<format, 1>(w, scales, ahead, x + m, k, four[0], 4); break;
                case 2: byte_dots<format, 2>(w, scales, ahead, x + m, k, four[0], 4); break;
                case 3: byte_dots<format, 3>(w, scales, ahead, x + m, k, four[0], 4); break;
                case 4: byte_dots<format, 4>(w, scales, ahead, x + m, k, four[0], 4); break;
            }
            for (int i = 0; i < std::min(4, rows - m); i++)
                for (int c = 0; c < std::min(4, columns.count - n); c++)
                    out[(m + i) * stride + n + c] = four[i][c] * (format == INT8 ? *scales[c] : 1.f);
        }
    }
}

// out[m * stride + n] = column n of an expert · x[m].
inline void byte_products(const Stack& s, int64_t expert, const Columns& columns, const Token* x, int rows, int64_t k,
                          float* out, int64_t stride) {
    s.format == INT8 ? byte_products<INT8>(s, expert, columns, x, rows, k, out, stride)
                     : byte_products<INT4>(s, expert, columns, x, rows, k, out, stride);
}

// Whether a map's weights can be multiplied so.
template <class X>
bool takes_bytes(const Stack& s) {
    return sizeof(X) == sizeof(Bf16) && (s.format == INT8 || (s.format == INT4 && s.group == SHARED));
}
#else
struct Rounded {
    void make_room(int64_t, int64_t) {}
    Token operator[](int64_t) const { return {}; }
    template <class X>
    void round(int64_t, const X*, int64_t) {}
};
inline void byte_products(const Stack&, int64_t, const Columns&, const Token*, int, int64_t, float*, int64_t) {}
template <class X>
bool takes_bytes(const Stack&) {
    return false;
}
#endif

// int4 weights. A row is split into blocks of 128, zero-padded; the 16-bit word i of a block holds the weights
// i, i + 32, i + 64 and i + 96, lowest bits first, as w + 8. Every group of 32 or 64 weights shares a scale.
#pragma once
#include "vectors.h"

constexpr int INT4_BLOCK = 128, QUARTER = 32;
constexpr int PREFETCH = 4096;  // prefetch distance in bytes

INLINE Floats quarter_of(Words words, int quarter) {
    return __builtin_convertvector(cast<Ints>((words >> (4 * quarter)) & 15) - 8, Floats);
}

#if defined(__AVX512BF16__)
INLINE __m512bh bf16_of(__m512i words, int quarter) {  // table lookup by the lowest four bits
    const __m512i table = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -16512, -16384, -16320, -16256, -16224, -16192,
        -16160, -16128, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -16512, -16384, -16320, -16256,
        -16224, -16192, -16160, -16128);
    return cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * quarter), table));
}
#endif

// The partial sums over each quarter of a block, one vector per input, for M inputs.
template <class X>
struct Quarters {
    Words words[QUARTER / W];

    INLINE explicit Quarters(const uint8_t* w) {
        for (int p = 0; p < QUARTER / W; p++) words[p] = widen(load_bits<Halves>(w + 2 * p * W));
    }
    template <int M>
    INLINE void dot(int quarter, const X* const* x, int64_t at, Floats* sums) const {
        for (int p = 0; p < QUARTER / W; p++) {
            const Floats numbers = quarter_of(words[p], quarter);
            for (int m = 0; m < M; m++) {
                const Floats product = numbers * load(x[m] + at + p * W);
                sums[m] = p == 0 ? product : sums[m] + product;
            }
        }
    }
};

#if defined(__AVX512BF16__)
template <>
struct Quarters<Bf16> {
    __m512i words;

    INLINE explicit Quarters(const uint8_t* w) : words(_mm512_loadu_si512(w)) {}
    template <int M>
    INLINE void dot(int quarter, const Bf16* const* x, int64_t at, Floats* sums) const {
        const __m512bh numbers = bf16_of(words, quarter);
#pragma GCC unroll 2
        for (int m = 0; m < M; m++)
            sums[m] = cast<Floats>(
                _mm512_dpbf16_ps(_mm512_setzero_ps(), numbers, cast<__m512bh>(_mm512_loadu_si512(x[m] + at))));
    }
};
#endif

// The dot products of two rows of weights, `w_stride` bytes and `scale_stride` scales apart, with M inputs.
template <int M, class X>
INLINE void int4_dots(const uint8_t* w, int64_t w_stride, const float* scales, int64_t scale_stride, int group_size,
                        int64_t blocks, const X* const* x, float (*out)[2]) {
    Floats total[M][2] = {};
    for (int64_t b = 0; b < blocks; b++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            const uint8_t* here = w + c * w_stride + b * INT4_BLOCK / 2;
            const float* scale = scales + c * scale_stride + b * INT4_BLOCK / group_size;
            __builtin_prefetch(here + PREFETCH);
            const Quarters<X> quarters(here);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                Floats sums[M];
                quarters.template dot<M>(q, x, b * INT4_BLOCK + q * QUARTER, sums);
#pragma GCC unroll 2
                for (int m = 0; m < M; m++) total[m][c] += sums[m] * scale[q * QUARTER / group_size];
            }
        }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < 2; c++) out[m][c] = sum(total[m][c]);
}

// Dequantises one row of weights.
template <class X>
void unpack(const uint8_t* w, const float* scales, int group_size, int64_t blocks, X* out) {
    for (int64_t b = 0; b < blocks; b++, w += INT4_BLOCK / 2, out += INT4_BLOCK, scales += INT4_BLOCK / group_size)
        for (int p = 0; p < QUARTER; p += W) {
            const Words words = widen(load_bits<Halves>(w + 2 * p));
            for (int q = 0; q < 4; q++) store(out + q * QUARTER + p, quarter_of(words, q) * scales[q * QUARTER / group_size]);
        }
}

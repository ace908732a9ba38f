// Weights of 4 bits. A row is cut into blocks of 128, padded with zeros; of a block the 16-bit word i holds the weights
// i, i + 32, i + 64 and i + 96, lowest bits first, as w + 8. Every 32 or 64 neighbouring weights share a scale.
#pragma once
#include "vectors.h"

constexpr int NIBBLES = 128, QUARTER = 32;

// The dot products of two rows of weights with one input. Row 1 begins `w_stride` bytes and `scale_stride` scales behind.
template <class X>
INLINE void nibble_dots(const uint8_t* w, int64_t w_stride, const float* scales, int64_t scale_stride, int group,
                        int64_t blocks, const X* x, float* out) {
    Floats total[2] = {};
    for (int64_t b = 0; b < blocks; b++, w += NIBBLES / 2, x += NIBBLES, scales += NIBBLES / group) {
        for (int c = 0; c < 2; c++) {
            __builtin_prefetch(w + (c + 8) * w_stride);
            Words words[QUARTER / W];
            for (int p = 0; p < QUARTER / W; p++) words[p] = widen(load_bits<Halves>(w + c * w_stride + 2 * p * W));
            for (int quarter = 0; quarter < 4; quarter++) {
                Floats sum = {};
                for (int p = 0; p < QUARTER / W; p++) {
                    const Ints number = cast<Ints>((words[p] >> (4 * quarter)) & 15u) - 8;
                    sum += __builtin_convertvector(number, Floats) * load(x + quarter * QUARTER + p * W);
                }
                total[c] += sum * scales[c * scale_stride + quarter * QUARTER / group];
            }
        }
    }
    for (int c = 0; c < 2; c++) out[c] = sum(total[c]);
}

#if defined(__AVX512BF16__)
INLINE __m512i bf16_of_nibbles(__m512i words) {  // by a table that does not look at the bits above
    const __m512i table = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -16512, -16384, -16320, -16256, -16224, -16192,
        -16160, -16128, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -16512, -16384, -16320, -16256,
        -16224, -16192, -16160, -16128);
    return _mm512_permutexvar_epi16(words, table);
}

template <>
INLINE void nibble_dots<Bf16>(const uint8_t* w, int64_t w_stride, const float* scales, int64_t scale_stride, int group,
                              int64_t blocks, const Bf16* x, float* out) {
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t b = 0; b < blocks; b++, w += NIBBLES / 2, x += NIBBLES, scales += NIBBLES / group) {
        __m512i input[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) input[q] = _mm512_loadu_si512(x + q * QUARTER);
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            __builtin_prefetch(w + (c + 8) * w_stride);
            const __m512i words = _mm512_loadu_si512(w + c * w_stride);
            __m512 sum[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
                sum[q] = _mm512_dpbf16_ps(_mm512_setzero_ps(),
                                          cast<__m512bh>(bf16_of_nibbles(_mm512_srli_epi16(words, 4 * q))),
                                          cast<__m512bh>(input[q]));
            const float* scale = scales + c * scale_stride;
            if (group == 64) {
                total[c] = _mm512_fmadd_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_set1_ps(scale[0]), total[c]);
                total[c] = _mm512_fmadd_ps(_mm512_add_ps(sum[2], sum[3]), _mm512_set1_ps(scale[1]), total[c]);
            } else {
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++) total[c] = _mm512_fmadd_ps(sum[q], _mm512_set1_ps(scale[q]), total[c]);
            }
        }
    }
    for (int c = 0; c < 2; c++) out[c] = _mm512_reduce_add_ps(total[c]);
}
#endif

// The numbers of one row of weights.
template <class X>
void unpack(const uint8_t* w, const float* scales, int group, int64_t blocks, X* out) {
    for (int64_t b = 0; b < blocks; b++, w += NIBBLES / 2, out += NIBBLES, scales += NIBBLES / group)
        for (int quarter = 0; quarter < 4; quarter++)
            for (int i = 0; i < QUARTER; i++) {
                const int word = w[2 * i] | w[2 * i + 1] << 8;
                put(out[quarter * QUARTER + i],
                    float((word >> 4 * quarter & 15) - 8) * scales[quarter * QUARTER / group]);
            }
}

// SIMD vectors of floats for the target instruction set, and conversions of stored values to and from fp32.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));
typedef int8_t Bytes __attribute__((vector_size(W)));

#define INLINE inline __attribute__((always_inline))

struct Bf16 {
    uint16_t bits;
};

template <class To, class From>
INLINE To cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V>
INLINE V load_bits(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

INLINE Floats all(float x) { return Floats{} + x; }

INLINE Words widen(Halves h) {
#if defined(__AVX512F__)
    return cast<Words>(_mm512_cvtepu16_epi32(cast<__m256i>(h)));
#elif defined(__AVX2__)
    return cast<Words>(_mm256_cvtepu16_epi32(cast<__m128i>(h)));
#else
    return __builtin_convertvector(h, Words);
#endif
}

INLINE Floats load(const float* p) { return load_bits<Floats>(p); }
INLINE Floats load(const Bf16* p) { return cast<Floats>(widen(load_bits<Halves>(p)) << 16); }
INLINE Floats load(const int8_t* p) {
#if defined(__AVX512F__)
    return cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
#elif defined(__AVX2__)
    return cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    return __builtin_convertvector(__builtin_convertvector(load_bits<Bytes>(p), Ints), Floats);
#endif
}

template <class T>
INLINE Floats load_first(const T* p, int64_t count) {  // remaining elements are zero
    T padded[W] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

INLINE float number(float x) { return x; }
INLINE float number(Bf16 x) { return cast<float>(uint32_t(x.bits) << 16); }

INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
INLINE void store(Bf16* p, Floats x) {  // rounds to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh(x);
#else
    const Words bits = cast<Words>(x), up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words is_nan = cast<Words>(x != x), rounded = (is_nan & 0x7fc0) | (~is_nan & up);
    const Halves halves = __builtin_convertvector(rounded, Halves);
#endif
    std::memcpy(p, &halves, sizeof(halves));
}

template <class T>
INLINE void store_first(T* p, Floats x, int64_t count) {
    T all[W];
    store(all, x);
    std::memcpy(p, all, count * sizeof(T));
}

// Horizontal sums of four vectors.
INLINE void sums(Floats a, Floats b, Floats c, Floats d, float* out) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(cast<float32x4_t>(a), cast<float32x4_t>(b)),
                              vpaddq_f32(cast<float32x4_t>(c), cast<float32x4_t>(d))));
#else
    const Floats of[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) out[i] = (of[i][0] + of[i][1]) + (of[i][2] + of[i][3]);
#endif
}

INLINE float sum(Floats a) {
    float total = 0;
    for (int i = 0; i < W; i++) total += a[i];
    return total;
}

// See products.h.
#include "products.h"

#include <algorithm>
#include <vector>

#include "dots.h"

namespace {

// What is multiplied at once: a float, or where there is an instruction for it, two bf16 that are added up as well.
template <class X>
struct Unit {
    typedef float Word;
    typedef Floats Vector;
    static constexpr int depth = 1, vectors = 1;  // numbers in a word; vectors that hold W · vectors columns
    static float word(const X* a, const X*) { return number(*a); }
    static INLINE Vector words(const float* p) { return load(p); }
    static INLINE void interleave(const X* a, const X*, int64_t count, Vector* out) {
        out[0] = count >= W ? load(a) : load_first(a, count);
    }
    static INLINE Floats add(Floats sum, Vector v, float w) { return sum + v * w; }
    static void natural(Floats*) {}
};

#if defined(__AVX512BF16__)
template <>
struct Unit<Bf16> {
    typedef uint32_t Word;
    typedef __m512i Vector;
    static constexpr int depth = 2, vectors = 2;
    static uint32_t word(const Bf16* a, const Bf16* b) { return a->bits | (b ? uint32_t(b->bits) << 16 : 0); }
    static INLINE Vector words(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static INLINE __m512i first(const Bf16* p, int64_t count) {
        return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : __mmask32((1ull << count) - 1), p);
    }
    static INLINE void interleave(const Bf16* a, const Bf16* b, int64_t count, Vector* out) {
        const __m512i low = first(a, count), high = b ? first(b, count) : _mm512_setzero_si512();
        out[0] = _mm512_unpacklo_epi16(low, high), out[1] = _mm512_unpackhi_epi16(low, high);
    }
    static INLINE Floats add(Floats sum, Vector v, uint32_t w) {
        return cast<Floats>(
            _mm512_dpbf16_ps(cast<__m512>(sum), cast<__m512bh>(v), cast<__m512bh>(_mm512_set1_epi32(int(w)))));
    }
    // Interleaving works on lanes of eight columns: four go to the first vector, four to the second.
    static void natural(Floats* two) {
        const Floats low = two[0], high = two[1];
        float* out = (float*)two;
        for (int i = 0; i < 16; i++) out[i / 4 * 8 + i % 4] = low[i], out[i / 4 * 8 + 4 + i % 4] = high[i];
    }
};
#endif

template <class X>
struct Grouped {
    typedef Unit<X> U;
    typedef typename U::Word Word;
    typedef typename U::Vector Vector;
    static constexpr int SPAN = W * U::vectors, DEEP = 8 / U::depth;  // columns at once; words per row at once
    static constexpr int LINE_SPAN = LINE / sizeof(X) > W ? LINE / sizeof(X) : W;  // columns written at once

    const Products& call;

    const X* left(int64_t row) const { return (const X*)call.left + row * call.left_stride; }
    const X* right(int64_t row) const { return (const X*)call.right + row * call.right_stride; }
    X* weight(int64_t expert, int64_t row) const {
        return (X*)call.weight + expert * call.expert_stride + row * call.row_stride;
    }

    // out[r][o] = weight[o] · left[r]
    void forth(const Run& run, int64_t begin, int64_t end) const {
        constexpr int PANEL = 24, BLOCK = 64;
        float sums[PANEL * BLOCK];
        for (int64_t o = begin; o < end; o += BLOCK) {
            const int columns = int(std::min<int64_t>(BLOCK, end - o));
            for (int64_t done = 0; done < run.count; done += PANEL) {
                const int rows = int(std::min<int64_t>(PANEL, run.count - done));
                const X* x[PANEL];
                for (int m = 0; m < rows; m++) x[m] = left(run.first + done + m);
                product(weight(run.expert, o), call.row_stride, columns, weight(run.expert, o + columns), x, rows,
                        call.width, sums, BLOCK);
                for (int m = 0; m < rows; m++)
                    write(sums + m * BLOCK, columns, (X*)call.out + (run.first + done + m) * call.height + o);
            }
        }
    }

    // out[r][d] = sum over o of left[r][o] · weight[o][d]
    void back(const Run& run, int64_t begin, int64_t end) const {
        const int64_t spans = (end - begin + SPAN - 1) / SPAN, deep = (call.height + U::depth - 1) / U::depth;
        const int64_t stride = spans * U::vectors + APART;
        static thread_local std::vector<Floats> sums;
        static thread_local std::vector<Word> words;
        sums.assign(run.count * stride, Floats{});
        words.resize(run.count * deep);
        for (int64_t r = 0; r < run.count; r++) pack(left(run.first + r), deep, words.data() + r * deep);
        for (int64_t w = 0; w < deep; w += DEEP)
            for (int64_t s = 0; s < spans; s++) {
                const int64_t column = begin + s * SPAN;
                if (deep - w >= DEEP)
                    add_rows<DEEP>(run, w, column, end - column, words.data() + w, deep, sums.data() + s * U::vectors,
                                   stride);
                else
                    for (int64_t i = w; i < deep; i++)
                        add_rows<1>(run, i, column, end - column, words.data() + i, deep, sums.data() + s * U::vectors,
                                    stride);
            }
        for (int64_t r = 0; r < run.count; r++) {
            Floats* row = sums.data() + r * stride;
            for (int64_t s = 0; s < spans; s++) U::natural(row + s * U::vectors);
            write((const float*)row, end - begin, (X*)call.out + (run.first + r) * call.width + begin);
        }
    }

    template <int D>
    INLINE void add_rows(const Run& run, int64_t first, int64_t column, int64_t count, const Word* words, int64_t stride,
                         Floats* sums, int64_t sums_stride) const {
        Vector rows[D][U::vectors];
#pragma GCC unroll 8
        for (int i = 0; i < D; i++) {
            const int64_t o = (first + i) * U::depth;
            const X* here = weight(run.expert, o) + column;
            const X* below = o + 1 < call.height ? here + call.row_stride : nullptr;
            U::interleave(here, below, count, rows[i]);
            __builtin_prefetch(here + AHEAD * D * U::depth * call.row_stride);
            if (U::depth > 1) __builtin_prefetch(here + (AHEAD * D * U::depth + 1) * call.row_stride);
        }
        for (int64_t r = 0; r < run.count; r++)
#pragma GCC unroll 2
            for (int v = 0; v < U::vectors; v++) {
                Floats sum = sums[r * sums_stride + v];
#pragma GCC unroll 8
                for (int i = 0; i < D; i++) sum = U::add(sum, rows[i][v], words[r * stride + i]);
                sums[r * sums_stride + v] = sum;
            }
    }

    // weight[o][d] = sum over r of left[r][o] · right[r][d]
    void outer(const Run& run, int64_t begin, int64_t end) const {
        const int64_t deep = (run.count + U::depth - 1) / U::depth, spans = (call.width + LINE_SPAN - 1) / LINE_SPAN;
        const int64_t stride = spans * LINE_SPAN + APART * W;
        static thread_local std::vector<Word> lefts, rights;
        lefts.resize((end - begin) * deep), rights.assign(deep * stride, Word(0));
        for (int64_t i = 0; i < deep; i++) {
            const int64_t r = run.first + i * U::depth;
            const bool both = i * U::depth + 1 < run.count;
            const X *a = left(r), *b = right(r), *a2 = both ? left(r + 1) : nullptr, *b2 = both ? right(r + 1) : nullptr;
            for (int64_t o = begin; o < end; o++) lefts[(o - begin) * deep + i] = U::word(a + o, a2 ? a2 + o : nullptr);
            for (int64_t d = 0; d < call.width; d++) rights[i * stride + d] = U::word(b + d, b2 ? b2 + d : nullptr);
        }
        for (int64_t o = begin; o < end;) {
            const int64_t height = end - o >= COLUMNS ? COLUMNS : 1;
            const Word* words = lefts.data() + (o - begin) * deep;
            for (int64_t column = 0; column < call.width; column += LINE_SPAN) {
                X* to = weight(run.expert, o) + column;
                if (height == COLUMNS)
                    write_rows<COLUMNS>(words, rights.data() + column, stride, deep, call.width - column, to);
                else
                    write_rows<1>(words, rights.data() + column, stride, deep, call.width - column, to);
            }
            o += height;
        }
    }

    template <int H>
    INLINE void write_rows(const Word* lefts, const Word* rights, int64_t stride, int64_t deep, int64_t count, X* to) const {
        constexpr int V = LINE_SPAN / W;
        Floats sums[H][V] = {};
        for (int64_t i = 0; i < deep; i++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const Vector right = U::words(rights + i * stride + v * W);
#pragma GCC unroll 4
                for (int h = 0; h < H; h++) sums[h][v] = U::add(sums[h][v], right, lefts[h * deep + i]);
            }
#pragma GCC unroll 4
        for (int h = 0; h < H; h++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                X* at = to + h * call.row_stride + v * W;
                const int64_t left = count - v * W;
                if (left <= 0) break;
                if (left < W)
                    store_first(at, call.adds ? sums[h][v] + load_first(at, left) : sums[h][v], left);
                else if (call.adds)
                    store(at, sums[h][v] + load(at));
                else
                    stream(at, sums[h][v]);
            }
    }

    void run() const {
        const int64_t whole = call.kind == BACK ? call.width : call.height;
        const int64_t grain = call.kind == BACK ? SPAN : 64, most = call.threads > 1 ? 4 * call.threads : 1;
        const int64_t share = ((whole + most - 1) / most + grain - 1) / grain * grain, shares = (whole + share - 1) / share;
#pragma omp parallel for schedule(dynamic) num_threads(call.threads) if (call.threads > 1)
        for (int64_t unit = 0; unit < call.count * shares; unit++) {
            const Run& run = call.runs[unit / shares];
            const int64_t begin = unit % shares * share, end = std::min(begin + share, whole);
            if (call.kind == FORTH) forth(run, begin, end);
            if (call.kind == BACK) back(run, begin, end);
            if (call.kind == OUTER) outer(run, begin, end);
        }
    }

  private:
    static constexpr int AHEAD = 2;  // blocks of rows that are fetched before they are needed
    static constexpr int APART = 1;  // vectors between rows, or all would fall into the same few places of the cache

    void pack(const X* row, int64_t deep, Word* out) const {
        for (int64_t i = 0; i < deep; i++) {
            const int64_t o = i * U::depth;
            out[i] = U::word(row + o, o + 1 < call.height ? row + o + 1 : nullptr);
        }
    }
    static void write(const float* from, int64_t count, X* to) {
        int64_t i = 0;
        for (; i + W <= count; i += W) store(to + i, load(from + i));
        if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
    }
    // Past the caches where the processor can: what is written is large, and read much later.
    static INLINE void stream(float* to, Floats x) {
#if defined(__AVX512F__)
        if ((uintptr_t)to % sizeof(x) == 0) return _mm512_stream_ps(to, cast<__m512>(x));
#endif
        store(to, x);
    }
    static INLINE void stream(Bf16* to, Floats x) {
#if defined(__AVX512BF16__)
        if ((uintptr_t)to % 32 == 0)
            return _mm256_stream_si256((__m256i*)to, cast<__m256i>(_mm512_cvtneps_pbh(cast<__m512>(x))));
#endif
        store(to, x);
    }
};

}  // namespace

extern "C" void moeify_products(const Products* call) {
    if (call->is_bf16)
        Grouped<Bf16>{*call}.run();
    else
        Grouped<float>{*call}.run();
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// NT, NN and TN products of rows sorted by expert; products.h describes them.
#include "products.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dots.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TALL = 6, VECTORS = 2;  // a tile of NN and TN: 6 x 2 sums and 2 + 1 operands in 16 registers
#else
constexpr int TALL = ROWS, VECTORS = 4;
#endif

// The operand of one multiply-add: a float, or a pair of bf16 where the processor has dot-product instructions.
template <class X>
struct Unit {
    typedef float Word;
    typedef Floats Vector;
    static constexpr int depth = 1, vectors = 1;  // elements per word; vectors that hold W · vectors columns
    static float word(const X* a, const X*) { return number(*a); }
    static INLINE Vector words(const float* p) { return load(p); }
    static INLINE void interleave(const X* a, const X*, Vector* out) { out[0] = load(a); }
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
    static INLINE void interleave(const Bf16* a, const Bf16* b, Vector* out) {
        const __m512i low = _mm512_loadu_si512(a), high = _mm512_loadu_si512(b);
        out[0] = _mm512_unpacklo_epi16(low, high), out[1] = _mm512_unpackhi_epi16(low, high);
    }
    static INLINE Floats add(Floats sum, Vector v, uint32_t w) {
        return cast<Floats>(
            _mm512_dpbf16_ps(cast<__m512>(sum), cast<__m512bh>(v), cast<__m512bh>(_mm512_set1_epi32(int(w)))));
    }
    // Undoes the order of interleaving, which works on lanes of eight columns: four per vector.
    static void natural(Floats* two) {
        const Floats low = two[0], high = two[1];
        float* out = (float*)two;
        for (int i = 0; i < 16; i++) out[i / 4 * 8 + i % 4] = low[i], out[i / 4 * 8 + 4 + i % 4] = high[i];
    }
};
#endif

// sums[m][v] += sum over i < n of load(i)[v] · words[m * stride + i]: M x V sums stay in registers.
template <class X, int M, int V, class Load>
INLINE void add_products(Floats (&sums)[M][V], int64_t n, const typename Unit<X>::Word* words, int64_t stride, Load load) {
    for (int64_t i = 0; i < n; i++) {
        typename Unit<X>::Vector row[V];
        load(i, row);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[m][v] = Unit<X>::add(sums[m][v], row[v], words[m * stride + i]);
    }
}

// Calls f for at most TALL rows at a time, with their number as a compile-time constant.
template <class F>
INLINE void by_rows(int64_t rows, F f) {
    for (int64_t m = 0; m < rows; m += TALL) switch (std::min<int64_t>(TALL, rows - m)) {
            case 1: f(m, std::integral_constant<int, 1>()); break;
            case 2: f(m, std::integral_constant<int, 2>()); break;
            case 3: f(m, std::integral_constant<int, TALL >= 3 ? 3 : 1>()); break;
            case 4: f(m, std::integral_constant<int, TALL >= 4 ? 4 : 1>()); break;
            case 5: f(m, std::integral_constant<int, TALL >= 5 ? 5 : 1>()); break;
            case 6: f(m, std::integral_constant<int, TALL >= 6 ? 6 : 1>()); break;
        }
}

template <class X>
struct Grouped {
    typedef Unit<X> U;
    typedef typename U::Word Word;
    typedef typename U::Vector Vector;
    static constexpr int V = VECTORS;    // vectors of a tile of columns
    static constexpr int WIDE = V * W;   // columns of a tile
    static constexpr int ROW = WIDE * U::depth * sizeof(X);  // bytes of the weights of a word
    static constexpr int DEEP = 2048 / WIDE;  // words of a row per step of the sum, after which sums are stored
    static constexpr int SHORT = 32;          // the same for few rows
    static constexpr int64_t NT_DEEP = 256;  // the same for NT, whose weights are read a few rows at a time
    static constexpr int64_t MANY = 96;  // rows per block, whose sums stay in cache
    static constexpr int APART = 1;      // padding between rows in vectors, against conflict misses in the cache
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr int64_t FEW = 10;     // rows beyond whole tiles up to which NT multiplies them by dot products
    static constexpr int64_t DIRECT = 16;  // rows up to which NN reads weights where they lie
#else
    static constexpr int64_t FEW = INT64_MAX, DIRECT = INT64_MAX;
#endif

    const Products& call;

    const X* left(int64_t row) const { return (const X*)call.left + row * call.left_stride; }
    const X* right(int64_t row) const { return (const X*)call.right + row * call.right_stride; }
    X* weight(int64_t expert, int64_t row) const {
        return (X*)call.weight + expert * call.expert_stride + row * call.row_stride;
    }

    // out[r][o] = weight[o] · left[r]
    void nt(const Run& run, int64_t begin, int64_t end) const {
        const int64_t beyond = run.count % WIDE, few = FEW >= run.count ? run.count : beyond <= FEW ? beyond : 0;
        const int64_t many = run.count - few, tiles = (many + WIDE - 1) / WIDE, parts = (many + MANY - 1) / MANY;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t first = tiles * part / parts * WIDE, last = std::min(tiles * (part + 1) / parts * WIDE, many);
            nt_part({run.expert, run.first + first, last - first}, begin, end);
        }
        if (few > 0) nt_few({run.expert, run.first + many, few}, begin, end);
    }

    void nt_few(const Run& run, int64_t begin, int64_t end) const {
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

#if defined(__AVX2__) && !defined(__AVX512F__)
    // The same with rows as lanes of the sums, and weights as words: no sums across lanes, and half of the loads.
    void nt_part(const Run& run, int64_t begin, int64_t end) const {
        constexpr int64_t MOST = 84 * TALL;  // columns whose sums are kept
        static thread_local std::vector<Floats> inputs, sums;
        const int64_t tiles = (run.count + WIDE - 1) / WIDE, padded = (call.width + W - 1) / W * W, stride = tiles * V;
        inputs.resize(tiles * padded * V);
        for (int64_t tile = 0; tile < tiles; tile++)
            transpose_inputs(run, tile * WIDE, inputs.data() + tile * padded * V);
        for (int64_t o = begin; o < end; o += MOST) {
            const int64_t last = std::min(o + MOST, end);
            sums.assign((last - o + TALL - 1) / TALL * TALL * stride, Floats{});
            for (int64_t d = 0; d < call.width; d += NT_DEEP)
                for (int64_t column = o; column < last; column += TALL)
                    add_columns(run.expert, column, last, d, inputs.data(), padded, tiles, sums.data() + (column - o) * stride);
            for (int64_t column = o; column < last; column += W)
                for (int64_t r = 0; r < run.count; r += W)
                    write_transposed(sums.data() + (column - o) * stride + r / W, stride, run.first + r,
                                     std::min<int64_t>(W, run.count - r), column, std::min<int64_t>(W, last - column));
        }
    }

    // to[d][m] = element d of row `first` + m for WIDE rows, zeros for those after the last
    void transpose_inputs(const Run& run, int64_t first, Floats* to) const {
        for (int64_t d = 0; d < call.width; d += W)
            for (int v = 0; v < V; v++) {
                Floats block[W] = {};
                for (int64_t m = 0, r = first + v * W; m < W && r < run.count; m++, r++)
                    block[m] = load_at_most(left(run.first + r) + d, call.width - d);
                transpose(block);
                for (int i = 0; i < W; i++) to[(d + i) * V + v] = block[i];
            }
    }

    // kept[c][r] += elements d ... d + NT_DEEP of weight row `column` + c times those of row r, for TALL columns
    void add_columns(int64_t expert, int64_t column, int64_t end, int64_t d, const Floats* inputs, int64_t padded, int64_t tiles,
                     Floats* kept) const {
        const int64_t deep = std::min(NT_DEEP, call.width - d), stride = tiles * V;
        alignas(64) float words[TALL][NT_DEEP];
        for (int m = 0; m < TALL; m++) {
            const X* row = weight(expert, std::min(column + m, end - 1)) + d;
            for (int64_t i = 0; i < deep; i += W) {
                store(words[m] + i, load_at_most(row + i, deep - i));
                __builtin_prefetch(row + i + TALL * call.row_stride, 0, 2);
            }
        }
        for (int64_t tile = 0; tile < tiles; tile++, kept += V) {
            const Floats* rows = inputs + (tile * padded + d) * V;
            update<TALL>(kept, stride, [&](Floats (&sums)[TALL][V]) {
                add_products<X>(sums, deep, words[0], NT_DEEP, [&](int64_t i, Floats* row) {
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) row[v] = rows[i * V + v];
                });
            });
        }
    }

    // out[row + r][column + c] = from[c * stride][r]
    void write_transposed(const Floats* from, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
        Floats block[W] = {};
        for (int64_t c = 0; c < columns; c++) block[c] = from[c * stride];
        transpose(block);
        for (int64_t r = 0; r < rows; r++) {
            X* to = (X*)call.out + (row + r) * call.height + column;
            columns < W ? store_first(to, block[r], columns) : store(to, block[r]);
        }
    }

    static INLINE Floats load_at_most(const X* p, int64_t count) { return count < W ? load_first(p, count) : load(p); }

    // Swaps lanes and vectors: in each round vector i is zipped with vector i + W / 2.
    static INLINE void transpose(Floats (&block)[W]) {
        for (int round = 1; round < W; round *= 2) {
            Floats zipped[W];
#pragma GCC unroll 4
            for (int i = 0; i < W / 2; i++) {
                const Floats low = _mm256_unpacklo_ps(block[i], block[i + W / 2]);
                const Floats high = _mm256_unpackhi_ps(block[i], block[i + W / 2]);
                zipped[2 * i] = _mm256_permute2f128_ps(low, high, 0x20);
                zipped[2 * i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
            }
            std::copy(zipped, zipped + W, block);
        }
    }
#else
    void nt_part(const Run&, int64_t, int64_t) const {}
#endif

    // out[r][d] = sum over o of left[r][o] · weight[o][d]
    void nn(const Run& run, int64_t begin, int64_t end) const {
        const int64_t parts = (run.count + MANY - 1) / MANY;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t first = run.count * part / parts, last = run.count * (part + 1) / parts;
            nn_part({run.expert, run.first + first, last - first}, begin, end);
        }
    }

    void nn_part(const Run& run, int64_t begin, int64_t end) const {
        const int64_t tiles = (end - begin + WIDE - 1) / WIDE, deep = (call.height + U::depth - 1) / U::depth;
        const int64_t stride = tiles * V + APART;
        static thread_local std::vector<Floats> sums;
        static thread_local std::vector<Word> words;
        sums.assign(run.count * stride, Floats{});
        words.resize(run.count * deep);
        for (int64_t r = 0; r < run.count; r++)
            for (int64_t i = 0, o = 0; i < deep; i++, o += U::depth) {
                const X* at = left(run.first + r) + o;
                words[r * deep + i] = U::word(at, o + 1 < call.height ? at + 1 : nullptr);
            }
        const bool few = run.count <= DIRECT;
        const int64_t step = few ? SHORT : DEEP;
        for (int64_t w = 0; w < deep; w += step)
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t n = std::min(step, deep - w), column = begin + tile * WIDE;
                const auto add = [&](auto load) {
                    by_rows(run.count, [&](int64_t r, auto rows) {
                        update<rows>(sums.data() + r * stride + tile * V, stride, [&](Floats (&sum_of)[rows][V]) {
                            add_products<X>(sum_of, n, words.data() + r * deep + w, deep, load);
                        });
                    });
                };
                const X* next = weight(run.expert, (w + step) * U::depth) + column / WIDE * WIDE * step * U::depth;
                const Tile weights = {run.expert, w, n, column, std::min<int64_t>(WIDE, end - column), (const char*)next};
                if (few && is_whole(weights)) {
                    add([&](int64_t i, Vector* row) { load_word(weights, i, row); });
                } else {
                    alignas(64) Vector copied[DEEP][V];
                    for (int64_t i = 0; i < n; i++) load_word_of_part(weights, i, copied[i]);
                    add([&](int64_t i, Vector* row) {
#pragma GCC unroll 4
                        for (int v = 0; v < V; v++) row[v] = copied[i][v];
                    });
                }
            }
        for (int64_t r = 0; r < run.count; r++) {
            Floats* row = sums.data() + r * stride;
            for (int64_t v = 0; v < tiles * V; v += U::vectors) U::natural(row + v);
            write((const float*)row, end - begin, (X*)call.out + (run.first + r) * call.width + begin);
        }
    }

    struct Tile {  // `n` words of at most WIDE columns, and the weights that are needed next, in memory order
        int64_t expert, first, n, column, columns;
        const char* next;
    };

    bool is_whole(const Tile& t) const { return t.columns == WIDE && (t.first + t.n) * U::depth <= call.height; }

    INLINE void load_word(const Tile& t, int64_t i, Vector* to) const {
        const X* here = weight(t.expert, (t.first + i) * U::depth) + t.column;
#pragma GCC unroll 4
        for (int v = 0; v < V; v += U::vectors) U::interleave(here + v * W, here + call.row_stride + v * W, to + v);
        for (int byte = 0; byte < ROW; byte += LINE) __builtin_prefetch(t.next + i * ROW + byte, 0, 2);
    }

    // The same with zeros beyond the matrix.
    void load_word_of_part(const Tile& t, int64_t i, Vector* to) const {
        const int64_t o = (t.first + i) * U::depth, there = std::min<int64_t>(U::depth, call.height - o);
        if (t.columns == WIDE && there == U::depth) return load_word(t, i, to);
        X rows[U::depth][WIDE] = {};
        for (int64_t d = 0; d < there; d++)
            std::memcpy(rows[d], weight(t.expert, o + d) + t.column, t.columns * sizeof(X));
        for (int v = 0; v < V; v += U::vectors) U::interleave(rows[0] + v * W, rows[U::depth - 1] + v * W, to + v);
    }

    // weight[o][d] = sum over r of left[r][o] · right[r][d]
    void tn(const Run& run, int64_t begin, int64_t end) const {
        const int64_t deep = (run.count + U::depth - 1) / U::depth, tiles = (call.width + WIDE - 1) / WIDE;
        const int64_t stride = tiles * WIDE + APART * W;
        static thread_local std::vector<Word> lefts, rights;
        lefts.resize(TALL * deep), rights.assign(deep * stride, Word(0));
        for (int64_t i = 0; i < deep; i++)
            for (int64_t d = 0; d < call.width; d++) rights[i * stride + d] = word_of(right(run.first), call.right_stride, run.count, i, d);
        by_rows(end - begin, [&](int64_t o, auto rows) {
            for (int64_t i = 0; i < deep; i++)
                for (int m = 0; m < rows; m++)
                    lefts[m * deep + i] = word_of(left(run.first), call.left_stride, run.count, i, begin + o + m);
            for (int64_t column = 0; column < call.width; column += WIDE)
                write_rows<rows>(lefts.data(), deep, rights.data() + column, stride, call.width - column,
                                 weight(run.expert, begin + o) + column);
        });
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }

    // Word i of column `at`: its elements in `depth` consecutive rows.
    static INLINE Word word_of(const X* rows, int64_t stride, int64_t count, int64_t i, int64_t at) {
        const X* here = rows + i * U::depth * stride + at;
        return U::word(here, i * U::depth + 1 < count ? here + stride : nullptr);
    }

    // to[m] = lefts[m] · rights, or += if `adds`, for WIDE columns, fewer at the end.
    template <int M>
    INLINE void write_rows(const Word* lefts, int64_t deep, const Word* rights, int64_t stride, int64_t count, X* to) const {
        Floats sums[M][V] = {};
        add_products<X>(sums, deep, lefts, deep, [&](int64_t i, Vector* row) {
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) row[v] = U::words(rights + i * stride + v * W);
        });
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                X* at = to + m * call.row_stride + v * W;
                const int64_t left = count - v * W;
                if (left <= 0) break;
                if (left < W)
                    store_first(at, call.adds ? sums[m][v] + load_first(at, left) : sums[m][v], left);
                else if (call.adds)
                    store(at, sums[m][v] + load(at));
                else
                    stream(at, sums[m][v]);
            }
    }

    void run() const {
        const int64_t whole = call.layout == NN ? call.width : call.height;
        const int64_t grain = call.layout == NN ? WIDE : 64, most = call.threads > 1 ? 4 * call.threads : 1;
        const int64_t share = ((whole + most - 1) / most + grain - 1) / grain * grain, shares = (whole + share - 1) / share;
#pragma omp parallel for schedule(dynamic) num_threads(call.threads) if (call.threads > 1)
        for (int64_t unit = 0; unit < call.count * shares; unit++) {
            const Run& run = call.runs[unit / shares];
            const int64_t begin = unit % shares * share, end = std::min(begin + share, whole);
            if (call.layout == NT) nt(run, begin, end);
            if (call.layout == NN) nn(run, begin, end);
            if (call.layout == TN) tn(run, begin, end);
        }
    }

  private:
    // Calls f with M x V sums that are read from `kept` and written back.
    template <int M, class F>
    static INLINE void update(Floats* kept, int64_t stride, F f) {
        Floats sums[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[m][v] = kept[m * stride + v];
        f(sums);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) kept[m * stride + v] = sums[m][v];
    }
    static void write(const float* from, int64_t count, X* to) {
        int64_t i = 0;
        for (; i + W <= count; i += W) store(to + i, load(from + i));
        if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
    }
    // Non-temporal stores where supported: outputs are large, and read much later.
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

constexpr int64_t COPIED = 1 << 20;  // bytes of the right operand of TN that a thread copies at a time, at most

template <class X>
void run(const Products& call) {
    typedef Grouped<X> G;
    int64_t strip = call.width;  // columns that TN takes at a time, so that its copy of them stays in cache
    if (call.layout == TN) {
        int64_t rows = 1;
        for (int64_t i = 0; i < call.count; i++) rows = std::max(rows, call.runs[i].count);
        const int64_t of_tile = rows * G::WIDE * int64_t(sizeof(typename G::Word)) / G::U::depth;
        strip = std::max<int64_t>(1, COPIED / of_tile) * G::WIDE;
    }
    int64_t first = 0;
    do {
        Products part = call;
        part.width = std::min(strip, call.width - first);
        part.weight = (X*)call.weight + first, part.right = (const X*)call.right + first;
        G{part}.run();
    } while ((first += strip) < call.width);
}

}  // namespace

extern "C" void moeify_products(const Products* call) {
    if (call->is_bf16)
        run<Bf16>(*call);
    else
        run<float>(*call);
}

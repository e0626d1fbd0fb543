// The kernels on a CPU: each walks its operands once, block by block in the cache. Built by native.py, without PyTorch.
//
// The results have the same bits for every number of threads: work is cut into chunks that depend on the sizes alone,
// each chunk adds into sums of its own, and those are added in order. Compiled with -ffp-contract=off: the roundings
// are those written here, which for sgd and shb are torch.optim.SGD's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

enum Kind : int { PLAIN, BUFFER, MIXED };  // as in update.py

struct bfloat16 {
    uint16_t bits;
};

template <class T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* to, float x) { *to = x; }
inline void store(double* to, double x) { *to = x; }
inline void store(bfloat16* to, float x) {  // round to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

template <class A> struct Rule {
    A minus_lr, beta, alpha, fresh, kept, decay;  // u = g + decay p; m = beta m + alpha u; direction fresh u + kept m
    explicit Rule(const double* const* at)
        : minus_lr(A(-*at[0])), beta(A(*at[1])), alpha(A(*at[2])), fresh(A(*at[3])), kept(A(*at[4])),
          decay(A(*at[5])) {}
};

// One coordinate: moves p and m, returns the direction.
template <int kind, bool decayed, class T, class A>
inline A move(const Rule<A>& rule, T* p, A* m, A g) {
    A x = load(*p), u = decayed ? std::fma(x, rule.decay, g) : g, direction = u;
    if (kind != PLAIN) {
        *m = direction = std::fma(u, rule.alpha, rule.beta * *m);
        if (kind == MIXED) direction = std::fma(direction, rule.kept, u * rule.fresh);
    }
    store(p, std::fma(direction, rule.minus_lr, x));
    return direction;
}

constexpr int64_t SHORT = 256;  // squares are summed in A over so many values, then in double: few enough to lose nothing

// A block of n columns of a matrix whose row i begins at row(i), and what moves along its mean.

// The mean of the rows in two parts: `near`, rounded to A, and the `rest` that the rounding left over.
template <class Row, class A>
void block_mean(Row row, int64_t rows, int64_t n, double* total, A* near, A* rest) {
    std::fill(total, total + n, 0.0);
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const auto *a = row(i), *b = row(i + 1), *c = row(i + 2), *d = row(i + 3);
#pragma omp simd
        for (int64_t k = 0; k < n; ++k)
            total[k] += (double(load(a[k])) + double(load(b[k]))) + (double(load(c[k])) + double(load(d[k])));
    }
    for (; i < rows; ++i) {
        const auto* a = row(i);
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) total[k] += load(a[k]);
    }
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        double mean = total[k] / double(rows);
        near[k] = A(mean);
        rest[k] = A(mean - double(near[k]));
    }
}

// Sums of deviation^2 and G^2 of one row.
template <class G, class A>
void row_sums(const G* row, const A* near, const A* rest, int64_t n, double* noise, double* square) {
    for (int64_t start = 0; start < n; start += SHORT) {
        A dd = 0, gg = 0;
#pragma omp simd reduction(+ : dd, gg)
        for (int64_t k = start; k < std::min(n, start + SHORT); ++k) {
            A value = load(row[k]), deviation = (value - near[k]) - rest[k];
            dd += deviation * deviation;
            gg += value * value;
        }
        *noise += double(dd);
        *square += double(gg);
    }
}

template <int kind, bool decayed, class T, class A>
void move_block(const Rule<A>& rule, const A* near, const A* rest, T* p, A* m, int64_t n, double* sums) {
    double gg = 0, mm = 0, gm = 0;
#pragma omp simd reduction(+ : gg, mm, gm)
    for (int64_t k = 0; k < n; ++k) {
        A mean = near[k] + rest[k], direction = move<kind, decayed>(rule, p + k, kind == PLAIN ? nullptr : m + k, mean);
        gg += double(mean) * mean;
        mm += double(direction) * direction;
        gm += double(direction) * mean;
    }
    sums[0] += gg;
    sums[1] += mm;
    sums[2] += gm;
}

// update -------------------------------------------------------------------------------------------------------------

constexpr int64_t UPDATE_CHUNK = 1 << 15;
constexpr int MOST_PARTS = 8;  // as in update.py

struct Chunk {
    int64_t tensor, start, end;
};

template <int kind, bool decayed, class T, class A>
void update_chunk(const Rule<A>& rule, T* p, const T* g, A* m, int64_t n, double* sums) {
    for (int64_t start = 0; start < n; start += SHORT) {
        A gg = 0, mm = 0;
#pragma omp simd reduction(+ : gg, mm)
        for (int64_t i = start; i < std::min(n, start + SHORT); ++i) {
            A slope = load(g[i]), direction = move<kind, decayed>(rule, p + i, kind == PLAIN ? nullptr : m + i, slope);
            gg += slope * slope;
            if (kind != PLAIN || decayed) mm += direction * direction;
        }
        sums[0] += double(gg);
        sums[1] += double(kind != PLAIN || decayed ? mm : gg);
    }
}

constexpr int64_t UPDATE_BLOCK = 1024;  // values of K gradients that stay in a core's cache between their uses

// The same along the mean of K gradients; sums: also of the K deviations^2 and the K gradients^2.
template <int kind, bool decayed, class T, class A>
void mean_chunk(const Rule<A>& rule, T* p, const T* const* gs, int K, A* m, int64_t n, double* sums) {
    double total[UPDATE_BLOCK], moved[3] = {};
    A near[UPDATE_BLOCK], rest[UPDATE_BLOCK];
    for (int64_t start = 0; start < n; start += UPDATE_BLOCK) {
        const int64_t size = std::min(n - start, UPDATE_BLOCK);
        block_mean([&](int64_t k) { return gs[k] + start; }, K, size, total, near, rest);
        for (int k = 0; k < K; ++k) row_sums(gs[k] + start, near, rest, size, sums + 2 + k, sums + 2 + K + k);
        move_block<kind, decayed>(rule, near, rest, p + start, kind == PLAIN ? nullptr : m + start, size, moved);
    }
    sums[0] = moved[0];
    sums[1] = moved[1];
}

template <int kind, bool decayed, class T, class A>
void parts_chunk(const Rule<A>& rule, T* p, const T* const* gs, int K, A* m, int64_t n, double* sums) {
    if (K == 1) return update_chunk<kind, decayed>(rule, p, gs[0], m, n, sums);
    mean_chunk<kind, decayed>(rule, p, gs, K, m, n, sums);
}

// rows [tensors, 3 + K]: parameters, addresses of p, of m and of K gradients. sums [2]: of slope^2, of direction^2;
// noises [2 K], with K > 1: of the K deviations^2, of the K gradients^2.
template <class T>
void update(int64_t tensors, int K, const int64_t* rows, int kind, const double* const* scalars, int threads,
            double* sums, double* noises) {
    using A = typename Wide<T>::type;
    std::vector<Chunk> chunks;
    for (int64_t t = 0; t < tensors; ++t)
        for (int64_t start = 0, size = rows[t * (3 + K)]; start < size; start += UPDATE_CHUNK)
            chunks.push_back({t, start, std::min(size, start + UPDATE_CHUNK)});
    const int width = K == 1 ? 2 : 2 + 2 * K;
    std::vector<double> found(width * chunks.size());
    const Rule<A> rule(scalars);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < int64_t(chunks.size()); ++c) {
        const Chunk& at = chunks[c];
        const int64_t* row = rows + at.tensor * (3 + K);
        T* p = reinterpret_cast<T*>(row[1]) + at.start;
        A* m = kind == PLAIN ? nullptr : reinterpret_cast<A*>(row[2]) + at.start;
        const T* gs[MOST_PARTS];
        for (int k = 0; k < K; ++k) gs[k] = reinterpret_cast<const T*>(row[3 + k]) + at.start;
        int64_t n = at.end - at.start;
        double* to = &found[width * c];
#define CASE(F)                                                                   \
    case F:                                                                       \
        rule.decay != 0 ? parts_chunk<F, true>(rule, p, gs, K, m, n, to)          \
                        : parts_chunk<F, false>(rule, p, gs, K, m, n, to);        \
        break;
        switch (kind) { CASE(PLAIN) CASE(BUFFER) CASE(MIXED) }
#undef CASE
    }
    std::fill(sums, sums + 2, 0.0);
    if (K > 1) std::fill(noises, noises + 2 * K, 0.0);
    for (size_t c = 0; c < chunks.size(); ++c)
        for (int j = 0; j < width; ++j) (j < 2 ? sums[j] : noises[j - 2]) += found[width * c + j];
}

// persample_noise ----------------------------------------------------------------------------------------------------

constexpr int64_t NOISE_CHUNKS = 128;        // at most: how many threads have work
constexpr int64_t CACHED = 192 * 1024 / 4;   // values of G that stay in a core's cache between their two uses
constexpr int64_t NARROW = 256;              // columns of a block at least: rows lie far apart, and each costs a start

template <class G, class T>
void persample_noise(int64_t rows, int64_t columns, const void* gs, void* ps, void* ms, int kind,
                     const double* const* scalars, int threads, double* noise, double* squares, double* out) {
    using A = typename Wide<T>::type;
    const int64_t block = std::clamp<int64_t>(CACHED / rows / 16 * 16, NARROW, 4096);
    const int64_t blocks = (columns + block - 1) / block;
    const int64_t chunks = std::min(NOISE_CHUNKS, blocks), per_chunk = chunks ? (blocks + chunks - 1) / chunks : 0;
    const int64_t width = 2 * rows + 3;
    std::vector<double> sums(chunks * width, 0.0);
    const Rule<A> rule(scalars);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < chunks; ++c) {
        double* to = &sums[c * width];
        std::vector<double> total(block);
        std::vector<A> near(block), rest(block);
        for (int64_t b = c * per_chunk; b < std::min(blocks, (c + 1) * per_chunk); ++b) {
            const int64_t start = b * block, n = std::min(block, columns - start);
            const G* g = static_cast<const G*>(gs) + start;
            block_mean([&](int64_t i) { return g + i * columns; }, rows, n, total.data(), near.data(), rest.data());
            for (int64_t i = 0; i < rows; ++i)
                row_sums(g + i * columns, near.data(), rest.data(), n, to + i, to + rows + i);
            T* p = static_cast<T*>(ps) + start;
            A* m = kind == PLAIN ? nullptr : static_cast<A*>(ms) + start;
            double* last = to + 2 * rows;
#define CASE(F)                                                                                     \
    case F:                                                                                         \
        rule.decay != 0 ? move_block<F, true>(rule, near.data(), rest.data(), p, m, n, last)        \
                        : move_block<F, false>(rule, near.data(), rest.data(), p, m, n, last);      \
        break;
            switch (kind) { CASE(PLAIN) CASE(BUFFER) CASE(MIXED) }
#undef CASE
        }
    }
    std::fill(noise, noise + rows, 0.0);
    std::fill(squares, squares + rows, 0.0);
    std::fill(out, out + 3, 0.0);
    for (int64_t c = 0; c < chunks; ++c) {
        const double* from = &sums[c * width];
        for (int64_t i = 0; i < rows; ++i) {
            noise[i] += from[i];
            squares[i] += from[rows + i];
        }
        for (int j = 0; j < 3; ++j) out[j] += from[2 * rows + j];
    }
}

// conv_noise ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANE_BYTES = 64, TILE_ROWS = 12;  // 24 sums, 2 inputs and a slope in 32 registers
#elif defined(__AVX2__)
constexpr int LANE_BYTES = 32, TILE_ROWS = 6;  // 12, 2 and 1 in 16
#else
constexpr int LANE_BYTES = 16, TILE_ROWS = 8;  // 16, 2 and 1 in 32
#endif
template <class T> struct Vector { typedef T type __attribute__((vector_size(LANE_BYTES))); };
using Floats = Vector<float>::type;
using Doubles = Vector<double>::type;
template <class T> constexpr int64_t LANES = LANE_BYTES / int64_t(sizeof(T));

// a b + c in one instruction where there is one: -ffp-contract=off keeps the compiler from making it.
#if defined(__AVX512F__)
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
inline Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return vfmaq_f64(c, a, b); }
#else
template <class V> inline V fused(V a, V b, V c) { return a * b + c; }
#endif

// to[r][c] (+)= sum over i of dy[ys[i] + r] x[xs[i] + c], for ROWS rows and 2 LANES columns, all of it in registers.
template <int ROWS, class T>
void outer_products(bool add, int64_t count, const int32_t* xs, const int32_t* ys, const T* x, const T* dy, T* to,
                    int64_t stride) {
    using V = typename Vector<T>::type;
    V sums[ROWS][2] = {};
    if (add) {
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) std::memcpy(sums[r], to + r * stride, sizeof sums[r]);
    }
    for (int64_t i = 0; i < count; ++i) {
        V near, far;
        std::memcpy(&near, x + xs[i], sizeof near);
        std::memcpy(&far, x + xs[i] + LANES<T>, sizeof far);
        const T* slopes = dy + ys[i];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            V slope = slopes[r] - V{};
            sums[r][0] = fused(slope, near, sums[r][0]);
            sums[r][1] = fused(slope, far, sums[r][1]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) std::memcpy(to + r * stride, sums[r], sizeof sums[r]);
}

template <class T, int ROWS = TILE_ROWS>
void outer_products_of(int64_t rows, bool add, int64_t count, const int32_t* xs, const int32_t* ys, const T* x,
                       const T* dy, T* to, int64_t stride) {
    if (rows == ROWS) return outer_products<ROWS>(add, count, xs, ys, x, dy, to, stride);
    if constexpr (ROWS > 1) outer_products_of<T, ROWS - 1>(rows, add, count, xs, ys, x, dy, to, stride);
}

// The sum of all lanes.
template <class T> inline T sum_of(typename Vector<T>::type v) {
    T lanes[LANES<T>], sum = 0;
    std::memcpy(lanes, &v, sizeof v);
    for (T lane : lanes) sum += lane;
    return sum;
}

// The same sums, which stay in registers while they are squared and added to `total`, [rows, stride] as `to`; `to` gets
// them with KEEP. The result is the sum of the squares.
template <int ROWS, bool KEEP, class T>
T squared_products(int64_t count, const int32_t* xs, const int32_t* ys, const T* x, const T* dy, T* to, T* total,
                   int64_t stride) {
    using V = typename Vector<T>::type;
    V sums[ROWS][2] = {};
    for (int64_t i = 0; i < count; ++i) {
        V near, far;
        std::memcpy(&near, x + xs[i], sizeof near);
        std::memcpy(&far, x + xs[i] + LANES<T>, sizeof far);
        const T* slopes = dy + ys[i];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            V slope = slopes[r] - V{};
            sums[r][0] = fused(slope, near, sums[r][0]);
            sums[r][1] = fused(slope, far, sums[r][1]);
        }
    }
    V left = {}, right = {};  // squares
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        V a, b;
        std::memcpy(&a, total + r * stride, sizeof a);
        std::memcpy(&b, total + r * stride + LANES<T>, sizeof b);
        a += sums[r][0], b += sums[r][1];
        std::memcpy(total + r * stride, &a, sizeof a);
        std::memcpy(total + r * stride + LANES<T>, &b, sizeof b);
        left = fused(sums[r][0], sums[r][0], left);
        right = fused(sums[r][1], sums[r][1], right);
        if constexpr (KEEP) {
            std::memcpy(to + r * stride, &sums[r][0], sizeof a);
            std::memcpy(to + r * stride + LANES<T>, &sums[r][1], sizeof b);
        }
    }
    return sum_of<T>(left + right);
}

template <class T, int ROWS = TILE_ROWS>
T squared_products_of(int64_t rows, int64_t count, const int32_t* xs, const int32_t* ys, const T* x, const T* dy, T* to,
                      T* total, int64_t stride) {
    if (rows == ROWS)
        return to ? squared_products<ROWS, true>(count, xs, ys, x, dy, to, total, stride)
                  : squared_products<ROWS, false>(count, xs, ys, x, dy, to, total, stride);
    if constexpr (ROWS > 1) return squared_products_of<T, ROWS - 1>(rows, count, xs, ys, x, dy, to, total, stride);
    return 0;
}

struct Convolution {  // x [batch, height, width, groups * inputs], dy [batch, out_height, out_width, groups * outputs]
    int64_t batch, height, width, inputs, out_height, out_width, outputs, groups;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int64_t places() const { return kernel[0] * kernel[1]; }
    int64_t pixels() const { return out_height * out_width; }
};

// For every run of `run` output pixels and every place of the kernel, those of them that see the image there, and the
// input pixel under each.
struct Places {
    std::vector<int32_t> from, to;  // input and output pixels; of run r and place k from starts[r places + k] on
    std::vector<int64_t> starts{0};
    Places(const Convolution& c, int64_t run) {
        for (int64_t start = 0; start < c.pixels(); start += run)
            for (int64_t k = 0; k < c.places(); ++k) {
                const int64_t down = k / c.kernel[1] * c.dilation[0] - c.padding[0];
                const int64_t right = k % c.kernel[1] * c.dilation[1] - c.padding[1];
                for (int64_t t = start; t < std::min(c.pixels(), start + run); ++t) {
                    const int64_t h = t / c.out_width * c.stride[0] + down, w = t % c.out_width * c.stride[1] + right;
                    if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
                    from.push_back(int32_t(h * c.width + w));
                    to.push_back(int32_t(t));
                }
                starts.push_back(int64_t(from.size()));
            }
    }
};

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A piece of the weight, [places, rows, columns]: all samples' shares of it are computed before those of the next.
struct Piece {
    int64_t group, place, places, row, rows, column, columns;
};

constexpr int64_t PIECE_PLACES = 9, PIECE_ROWS = 18, PIECE_COLUMNS = 32;
constexpr int64_t SHORT_ROWS = 72;  // of a piece where samples are short: its columns are copied once for all rows
constexpr int64_t PIECES = 4, CHUNKS = 16;  // fewer pieces than that: threads share a piece, in so many chunks of samples
constexpr int64_t RUN_BYTES = 20 * 1024;  // of x and dy that a piece needs of a run of pixels: they stay in the L1 cache

// Cut [0, size) into `parts` pieces that differ by one at most: calls each(start, length).
template <class Each> void cut(int64_t size, int64_t parts, Each each) {
    for (int64_t i = 0; i < parts; ++i) each(size * i / parts, size * (i + 1) / parts - size * i / parts);
}

std::vector<Piece> pieces_of(const Convolution& c, int64_t wide, int64_t most_rows) {
    const int64_t tiles = std::max<int64_t>(1, c.inputs / wide);
    std::vector<Piece> pieces;
    for (int64_t g = 0; g < c.groups; ++g)
        cut(c.places(), up(c.places(), PIECE_PLACES), [&](int64_t place, int64_t places) {
            cut(tiles, up(tiles * wide, PIECE_COLUMNS), [&](int64_t tile, int64_t several) {
                const int64_t column = tile * wide, end = tile + several == tiles ? c.inputs : column + several * wide;
                cut(c.outputs, up(c.outputs, most_rows), [&](int64_t row, int64_t rows) {
                    pieces.push_back({g, place, places, row, rows, column, end - column});
                });
            });
        });
    return pieces;
}

// The same convolution over images of one group's channels with their padding around them. Where the places of a row of
// the kernel are neighbours, their inputs lie side by side: the row is one place.
Convolution padded(Convolution c) {
    c.height += 2 * c.padding[0];
    c.width += 2 * c.padding[1];
    c.padding[0] = c.padding[1] = 0;
    if (c.dilation[1] == 1) {
        c.inputs *= c.kernel[1];
        c.kernel[1] = 1;
    }
    return c;
}

// Adds g to total; returns the sum of its squares.
template <class T> double add_and_square(const T* g, int64_t values, T* total) {
    double square = 0;
    for (int64_t start = 0; start < values; start += SHORT) {
        T gg = 0;
#pragma omp simd reduction(+ : gg)
        for (int64_t v = start; v < std::min(values, start + SHORT); ++v) {
            total[v] += g[v];
            gg += g[v] * g[v];
        }
        square += double(gg);
    }
    return square;
}

// Of whole tiles: `values` is a multiple of 2 LANES.
template <class T> double square_distance(const T* g, const T* mean, int64_t values) {
    using V = typename Vector<T>::type;
    double square = 0;
    for (int64_t start = 0; start < values; start += SHORT) {
        V left = {}, right = {};
        for (int64_t v = start; v < std::min(values, start + SHORT); v += 2 * LANES<T>) {
            V a, b, c, d;
            std::memcpy(&a, g + v, sizeof a), std::memcpy(&b, g + v + LANES<T>, sizeof b);
            std::memcpy(&c, mean + v, sizeof c), std::memcpy(&d, mean + v + LANES<T>, sizeof d);
            a -= c, b -= d;
            left = fused(a, a, left), right = fused(b, b, right);
        }
        square += double(sum_of<T>(left + right));
    }
    return square;
}

template <class T> struct ConvNoise {
    static constexpr int64_t wide = 2 * LANES<T>;
    const Convolution given;
    const T *x, *dy;
    const bool narrow;  // a tile may read past the inputs of a place: from a copy, with room after it
    const Convolution c;
    const int64_t channels, x_row, x_sample, y_sample, run, runs;
    const Places at;
    std::vector<int32_t> xs, ys;

    ConvNoise(const Convolution& given, const T* x, const T* dy)
        : given(given), x(x), dy(dy), narrow(given.inputs < wide), c(narrow ? padded(given) : given),
          channels(given.inputs), x_row(channels * given.groups), x_sample(given.height * given.width * x_row),
          y_sample(given.pixels() * given.outputs * given.groups), run(run_of(c)), runs(up(c.pixels(), run)), at(c, run) {
        for (int32_t pixel : at.from) xs.push_back(int32_t(pixel * (narrow ? channels : x_row)));
        for (int32_t pixel : at.to) ys.push_back(int32_t(pixel * c.outputs * c.groups));
    }

    static int64_t run_of(const Convolution& c) {
        const int64_t beside = std::min(up(c.inputs, wide) * wide, PIECE_COLUMNS) + std::min(c.outputs, PIECE_ROWS);
        return std::max<int64_t>(16, RUN_BYTES / int64_t(sizeof(T)) / beside);
    }

    int64_t width(const Piece& piece) const { return up(piece.columns, wide) * wide; }  // in whole tiles
    int64_t values(const Piece& piece) const { return piece.places * piece.rows * width(piece); }
    // Of the last tile's columns some are not its own: they belong to the tile before, or to no input at all.
    int64_t junk(const Piece& piece) const { return width(piece) - piece.columns; }
    int64_t junk_at(const Piece& piece) const { return narrow ? piece.columns : width(piece) - wide; }

    // The share g [places, rows, width] of sample i; `image` is scratch.
    void share(const Piece& piece, int64_t i, std::vector<T>& image, T* g) const {
        const T* inputs = x + i * x_sample + piece.group * channels;
        if (narrow) {
            image.resize(c.height * c.width * channels + wide);  // its padding and its end stay zero
            for (int64_t h = 0; h < given.height; ++h)
                for (int64_t w = 0; w < given.width; ++w)
                    std::copy_n(inputs + (h * given.width + w) * x_row, channels,
                                &image[((h + given.padding[0]) * c.width + w + given.padding[1]) * channels]);
            inputs = image.data();
        }
        const T* slopes = dy + i * y_sample + piece.group * c.outputs + piece.row;
        const int64_t width = this->width(piece), last = width - wide, back = narrow ? 0 : junk(piece);
        for (int64_t r = 0; r < runs; ++r)
            for (int64_t k = 0; k < piece.places; ++k) {
                const int64_t* start = &at.starts[r * c.places() + piece.place + k];
                for (int64_t q = 0; q < width; q += wide) {
                    const T* tile = inputs + piece.column + (q == last ? q - back : q);
                    cut(piece.rows, up(piece.rows, TILE_ROWS), [&](int64_t top, int64_t rows) {
                        outer_products_of(rows, r > 0, start[1] - start[0], &xs[start[0]], &ys[start[0]], tile,
                                          slopes + top, g + (k * piece.rows + top) * width + q, width);
                    });
                }
            }
        for (int64_t v = junk_at(piece); junk(piece) && v < values(piece); v += width) std::fill_n(g + v, junk(piece), T(0));
    }

    // Whether all pixels of a sample are one run: then a tile of its share is squared before it leaves the registers.
    bool short_samples() const { return runs == 1 && !narrow; }

    // The columns of a tile that begins at `column`, for all samples side by side, [batch, pixels, wide]; the first
    // `back` of them, which belong to the tile before, are 0.
    void pack(const Piece& piece, int64_t column, int64_t back, std::vector<T>& packed) const {
        packed.resize(c.batch * c.height * c.width * wide);
        const T* from = x + piece.group * channels + column;
        for (T *to = packed.data(), *end = to + packed.size(); to < end; to += wide, from += x_row) {
            std::memcpy(to, from, wide * sizeof(T));  // of a size known here: calls of memmove would take longer
            for (int64_t v = 0; v < back; ++v) to[v] = T(0);
        }
    }

    // The work of a piece where samples are short, tile by tile: all samples' shares of one before the next.
    void tiles(const Piece& piece, bool with_noise, std::vector<T>& packed, std::vector<T>& shares, T* total,
               double* squares, double* noise) const {
        const int64_t width = this->width(piece), last = width - wide, pixels = c.height * c.width;
        std::vector<int32_t> at_packed;
        for (int32_t pixel : at.from) at_packed.push_back(int32_t(pixel * wide));
        shares.resize(with_noise ? c.batch * TILE_ROWS * wide : 0);
        for (int64_t q = 0; q < width; q += wide) {
            const int64_t back = q == last ? junk(piece) : 0;
            pack(piece, piece.column + q - back, back, packed);
            for (int64_t k = 0; k < piece.places; ++k)
                cut(piece.rows, up(piece.rows, TILE_ROWS), [&](int64_t top, int64_t rows) {
                    const int64_t *start = &at.starts[piece.place + k], values = rows * wide;
                    T sum[TILE_ROWS * wide] = {}, *to = shares.data();
                    for (int64_t i = 0; i < c.batch; ++i, to += with_noise ? values : 0)
                        squares[i] += double(squared_products_of(
                            rows, start[1] - start[0], &at_packed[start[0]], &ys[start[0]], &packed[i * pixels * wide],
                            dy + i * y_sample + piece.group * c.outputs + piece.row + top, with_noise ? to : nullptr,
                            sum, wide));
                    for (int64_t r = 0; r < rows; ++r)
                        std::copy_n(sum + r * wide, wide, total + (k * piece.rows + top + r) * width + q);
                    if (!with_noise) return;
                    for (T& value : sum) value /= T(c.batch);
                    for (int64_t i = 0; i < c.batch; ++i)
                        noise[i] += square_distance(shares.data() + i * values, sum, values);
                });
        }
    }

    void store(const Piece& piece, const T* total, T* dw) const {
        const int64_t width = this->width(piece), last = width - wide, here = junk_at(piece);
        for (int64_t k = 0; k < piece.places; ++k)
            for (int64_t r = 0; r < piece.rows; ++r) {
                const int64_t output = piece.group * c.outputs + piece.row + r;
                const T* from = total + (k * piece.rows + r) * width;
                T* to = dw + (output * c.places() + piece.place + k) * c.inputs + piece.column;
                std::copy_n(from, std::min(here, piece.columns), to);
                if (here == last) std::copy_n(from + last + junk(piece), wide - junk(piece), to + last);
            }
    }
};

template <class T>
void conv_noise(const Convolution& given, const T* x, const T* dy, bool with_noise, int threads, T* dw, double* squares,
                double* noise) {
    const ConvNoise<T> of(given, x, dy);
    const int64_t B = given.batch;
    const std::vector<Piece> pieces = pieces_of(of.c, of.wide, of.short_samples() ? SHORT_ROWS : PIECE_ROWS);
    std::vector<double> sums(2 * B * pieces.size(), 0.0);
    // Threads take pieces, and all samples of one; of a weight of few pieces they take samples, one piece after the other.
    const bool by_sample = int64_t(pieces.size()) < PIECES;
    const int64_t chunks = by_sample ? std::min(B, CHUNKS) : 1;
    std::vector<T> shared, totals;  // of the piece that is being computed by all threads
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> own, image;
        // Samples [first, last): shares into `blocks`, or into one block over and over, their sum into `total`.
        auto add_shares = [&](int64_t n, int64_t first, int64_t last, T* blocks, T* total) {
            const int64_t values = of.values(pieces[n]);
            std::fill_n(total, values, T(0));
            for (int64_t i = first; i < last; ++i) {
                T* g = blocks + (with_noise ? i * values : 0);
                of.share(pieces[n], i, image, g);
                sums[2 * B * n + i] = add_and_square(g, values, total);
            }
        };
        auto deviations = [&](int64_t n, int64_t first, int64_t last, const T* blocks, const T* mean) {
            const int64_t values = of.values(pieces[n]);
            for (int64_t i = first; i < last; ++i)
                sums[2 * B * n + B + i] = square_distance(blocks + i * values, mean, values);
        };
        for (int64_t n = 0; by_sample && n < int64_t(pieces.size()); ++n) {
            const int64_t values = of.values(pieces[n]);
#pragma omp single
            {
                totals.resize(chunks * values);
                shared.resize(with_noise ? B * values : 0);
            }
            own.resize(values);
#pragma omp for schedule(dynamic, 1)
            for (int64_t k = 0; k < chunks; ++k)
                add_shares(n, B * k / chunks, B * (k + 1) / chunks, with_noise ? shared.data() : own.data(),
                           &totals[k * values]);
#pragma omp single
            {
                for (int64_t k = 1; k < chunks; ++k)
                    for (int64_t v = 0; v < values; ++v) totals[v] += totals[k * values + v];
                of.store(pieces[n], totals.data(), dw);
                for (int64_t v = 0; v < values; ++v) totals[v] /= T(B);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t k = 0; k < (with_noise ? chunks : 0); ++k)
                deviations(n, B * k / chunks, B * (k + 1) / chunks, shared.data(), totals.data());
        }
        std::vector<T> total;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < (by_sample ? 0 : int64_t(pieces.size())); ++n) {
            const int64_t values = of.values(pieces[n]);
            total.resize(values);
            if (of.short_samples()) {
                of.tiles(pieces[n], with_noise, image, own, total.data(), &sums[2 * B * n], &sums[2 * B * n + B]);
                of.store(pieces[n], total.data(), dw);
                continue;
            }
            own.resize((with_noise ? B : 1) * values);
            add_shares(n, 0, B, own.data(), total.data());
            of.store(pieces[n], total.data(), dw);
            for (T& value : total) value /= T(B);
            if (with_noise) deviations(n, 0, B, own.data(), total.data());
        }
    }
    std::fill(squares, squares + B, 0.0);
    std::fill(noise, noise + B, 0.0);
    for (size_t n = 0; n < pieces.size(); ++n)
        for (int64_t i = 0; i < B; ++i) {
            squares[i] += sums[2 * B * n + i];
            noise[i] += sums[2 * B * n + B + i];
        }
}

// affine_grads -------------------------------------------------------------------------------------------------------

// dw[i][c] = sum over pixels of dy (x - mean) rstd and db[i][c] = sum of dy; x and dy are [batch, pixels, channels], and
// mean and rstd belong to `shared` neighbouring channels, those of sample i `step` further on; or, with `shared` 0, to a
// pixel each.
template <class T>
void affine_grads(int64_t batch, int64_t pixels, int64_t channels, int64_t shared, int64_t step, const T* x, const T* dy,
                  const T* mean, const T* rstd, int threads, double* dw, double* db) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < batch; ++i) {
        std::vector<T> center(channels), scaled(channels), plain(channels);
        for (int64_t c = 0; shared && c < channels; ++c) center[c] = mean[i * step + c / shared];
        std::vector<double> totals(2 * channels, 0.0);
        for (int64_t start = 0; start < pixels; start += SHORT) {
            std::fill(scaled.begin(), scaled.end(), T(0));
            std::fill(plain.begin(), plain.end(), T(0));
            for (int64_t t = start; t < std::min(pixels, start + SHORT); ++t) {
                const T *xt = x + (i * pixels + t) * channels, *yt = dy + (i * pixels + t) * channels;
                if (!shared) {
                    const T middle = mean[i * step + t], scale = rstd[i * step + t];
#pragma omp simd
                    for (int64_t c = 0; c < channels; ++c) {
                        scaled[c] += yt[c] * ((xt[c] - middle) * scale);
                        plain[c] += yt[c];
                    }
                    continue;
                }
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    scaled[c] += yt[c] * (xt[c] - center[c]);
                    plain[c] += yt[c];
                }
            }
            for (int64_t c = 0; c < channels; ++c) {
                totals[c] += double(scaled[c]);
                totals[channels + c] += double(plain[c]);
            }
        }
        for (int64_t c = 0; c < channels; ++c) {
            dw[i * channels + c] = totals[c] * (shared ? double(rstd[i * step + c / shared]) : 1.0);
            db[i * channels + c] = totals[channels + c];
        }
    }
}

// row_noise ----------------------------------------------------------------------------------------------------------

// Of G [rows, columns] the sum of the rows, and of each its square and its squared distance from the mean.
template <class T>
void row_noise(int64_t rows, int64_t columns, bool with_noise, const T* G, T* total, double* squares, double* noise) {
    std::vector<double> sums(columns);
    std::vector<T> near(columns), rest(columns);
    block_mean([&](int64_t i) { return G + i * columns; }, rows, columns, sums.data(), near.data(), rest.data());
    for (int64_t k = 0; k < columns; ++k) total[k] = T(sums[k]);
    for (int64_t i = 0; i < rows; ++i) {
        squares[i] = noise[i] = 0;
        row_sums(G + i * columns, near.data(), rest.data(), columns, noise + i, squares + i);
        if (!with_noise) noise[i] = 0;
    }
}

// augment ------------------------------------------------------------------------------------------------------------

// out[i] is image rows[cursor + i] (rows[i], or i) of pixels [N, size, size, C], moved by its 8 numbers in `moves`, if
// there are any, and its values looked up in table [C][256]; augment.py says what the numbers are. out_labels[i] is that
// image's label.
template <int C, class T>
void augment(int64_t count, int64_t size, int threads, const uint8_t* pixels, const int64_t* rows, const int32_t* moves,
             const T* table, const int64_t* cursor, const int64_t* labels, T* out, int64_t* out_labels) {
    static const uint8_t black[C] = {};
    const auto look_up = [table](T* to, const uint8_t* from) {
        for (int channel = 0; channel < C; ++channel) to[channel] = table[channel * 256 + from[channel]];
    };
    if (cursor) rows += *cursor;
    const uint32_t edge = uint32_t(size);
    int64_t values = size * size * C;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t stored = rows ? rows[i] : i;
        const uint8_t* image = pixels + stored * values;
        T* to = out + i * values;
        if (labels) out_labels[i] = labels[stored];
        if (!moves) {
            for (int64_t at = 0; at < values; at += C) look_up(to + at, image + at);
            continue;
        }
        const int32_t *m = moves + stored * 8, cos = m[2], sin = m[3], minus_sin = m[4], down = m[5], right = m[6];
        const int32_t sign = m[7] ? -1 : 1, shift = right + (m[7] ? int32_t(size) - 1 : 0);
        for (int32_t y = 0; y < int32_t(size); ++y) {
            int32_t across = m[0] + y * sin, along = m[1] + y * cos;
            for (int32_t x = 0; x < int32_t(size); ++x, across += cos, along += minus_sin, to += C) {
                int32_t u = across >> 16, v = along >> 16, c = sign * u + shift, r = v + down;
                bool inside = uint32_t(u) < edge & uint32_t(v) < edge & uint32_t(c) < edge & uint32_t(r) < edge;
                look_up(to, inside ? image + (r * int64_t(size) + c) * C : black);
            }
        }
    }
}

// tally --------------------------------------------------------------------------------------------------------------

// Takes one more update into reals [4] and counts [6]; tally.py says what they are.
void tally(int64_t parts, int64_t count, int64_t taken, const double* norms, double loss, int64_t correct, double* reals,
           int64_t* counts, int64_t* cursor) {
    double gg = 0, mm = 0;
    for (int64_t i = 0; i < parts; ++i) gg += norms[2 * i], mm += norms[2 * i + 1];
    for (int sums = 0; sums < 2; ++sums) {
        reals[sums] += loss * double(count);
        counts[2 * sums] += correct;
        counts[2 * sums + 1] += count;
    }
    reals[2] = gg, reals[3] = mm;
    int64_t &updates = counts[4], &bad = counts[5];
    ++updates;
    if (!bad && !std::isfinite(loss + (gg + mm))) bad = updates;
    if (cursor) *cursor += taken;
}

}  // namespace

#define UPDATE(NAME, T)                                                                                      \
    extern "C" void NAME(int64_t tensors, int K, const int64_t* rows, int kind, const double* const* scalars, \
                         int threads, double* sums, double* noises) {                                        \
        update<T>(tensors, K, rows, kind, scalars, threads, sums, noises);                                   \
    }
UPDATE(update_float32, float)
UPDATE(update_float64, double)
UPDATE(update_bfloat16, bfloat16)

#define NOISE(NAME, G, T)                                                                                       \
    extern "C" void NAME(int64_t rows, int64_t columns, const void* g, void* p, void* m, int kind,              \
                         const double* const* scalars, int threads, double* noise, double* squares,             \
                         double* out) {                                                                         \
        persample_noise<G, T>(rows, columns, g, p, m, kind, scalars, threads, noise, squares, out);             \
    }
NOISE(persample_noise_float32_float32, float, float)
NOISE(persample_noise_float64_float64, double, double)
NOISE(persample_noise_bfloat16_float32, bfloat16, float)
NOISE(persample_noise_bfloat16_bfloat16, bfloat16, bfloat16)
NOISE(persample_noise_float32_bfloat16, float, bfloat16)

#define CONV(NAME, T)                                                                                        \
    extern "C" void NAME(const int64_t* convolution, const void* x, const void* dy, int with_noise, int threads, \
                         void* dw, double* squares, double* noise) {                                         \
        conv_noise<T>(*reinterpret_cast<const Convolution*>(convolution), static_cast<const T*>(x),          \
                      static_cast<const T*>(dy), with_noise, threads, static_cast<T*>(dw), squares, noise);  \
    }
CONV(conv_noise_float32, float)
CONV(conv_noise_float64, double)

#define AFFINE(NAME, T)                                                                                            \
    extern "C" void NAME(int64_t batch, int64_t pixels, int64_t channels, int64_t shared, int64_t step,            \
                         const void* x, const void* dy, const void* mean, const void* rstd, int threads,           \
                         double* dw, double* db) {                                                                 \
        affine_grads<T>(batch, pixels, channels, shared, step, static_cast<const T*>(x), static_cast<const T*>(dy), \
                        static_cast<const T*>(mean), static_cast<const T*>(rstd), threads, dw, db);                \
    }
AFFINE(affine_grads_float32, float)
AFFINE(affine_grads_float64, double)

#define ROWS(NAME, T)                                                                                             \
    extern "C" void NAME(int64_t rows, int64_t columns, int with_noise, const void* g, void* total,               \
                         double* squares, double* noise) {                                                        \
        row_noise<T>(rows, columns, with_noise, static_cast<const T*>(g), static_cast<T*>(total), squares, noise); \
    }
ROWS(row_noise_float32, float)
ROWS(row_noise_float64, double)

#define AUGMENT(NAME, T)                                                                                             \
    extern "C" void NAME(int64_t count, int64_t size, int64_t channels, int threads, const void* pixels,              \
                         const int64_t* rows, const int32_t* moves, const void* table, const int64_t* cursor,         \
                         const int64_t* labels, void* out, int64_t* out_labels) {                                     \
        auto of = channels == 1 ? augment<1, T> : augment<3, T>;                                                      \
        of(count, size, threads, static_cast<const uint8_t*>(pixels), rows, moves, static_cast<const T*>(table),      \
           cursor, labels, static_cast<T*>(out), out_labels);                                                         \
    }
AUGMENT(augment_float32, float)
AUGMENT(augment_bfloat16, bfloat16)

#define TALLY(NAME, T)                                                                                                \
    extern "C" void NAME(int64_t parts, int64_t count, int64_t taken, const double* norms, const T* loss,             \
                         const int64_t* correct, double* reals, int64_t* counts, int64_t* cursor) {                   \
        tally(parts, count, taken, norms, double(*loss), *correct, reals, counts, cursor);                            \
    }
TALLY(tally_float32, float)
TALLY(tally_float64, double)

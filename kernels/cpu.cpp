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

enum Form : int { SGD, SHB, NSHB, QHM };

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
    A minus_lr, beta, alpha, nu, rest, decay;  // u = g + decay p; m = beta m + alpha u; direction rest u + nu m
    Rule(int form, const double* const* at)  // of lr, beta, nu, decay
        : minus_lr(A(-*at[0])), beta(A(*at[1])), alpha(A(form == SHB ? 1.0 : 1.0 - *at[1])), nu(A(*at[2])),
          rest(A(1.0 - *at[2])), decay(A(*at[3])) {}
};

// One coordinate: moves p and m, returns the direction.
template <int form, bool decayed, class T, class A>
inline A move(const Rule<A>& rule, T* p, A* m, A g) {
    A x = load(*p), u = decayed ? std::fma(x, rule.decay, g) : g, direction = u;
    if (form != SGD) {
        A scaled = rule.beta * *m;
        *m = direction = form == SHB ? scaled + u : std::fma(u, rule.alpha, scaled);
        if (form == QHM) direction = std::fma(direction, rule.nu, u * rule.rest);
    }
    store(p, std::fma(direction, rule.minus_lr, x));
    return direction;
}

constexpr int64_t SHORT = 256;  // squares are summed in A over so many values, then in double: few enough to lose nothing

// update -------------------------------------------------------------------------------------------------------------

constexpr int64_t UPDATE_CHUNK = 1 << 15;

struct Chunk {
    int64_t tensor, start, end;
};

template <int form, bool decayed, class T, class A>
void update_chunk(const Rule<A>& rule, T* p, const T* g, A* m, int64_t n, double* sums) {
    for (int64_t start = 0; start < n; start += SHORT) {
        A gg = 0, mm = 0;
#pragma omp simd reduction(+ : gg, mm)
        for (int64_t i = start; i < std::min(n, start + SHORT); ++i) {
            A slope = load(g[i]), direction = move<form, decayed>(rule, p + i, form == SGD ? nullptr : m + i, slope);
            gg += slope * slope;
            if (form != SGD || decayed) mm += direction * direction;
        }
        sums[0] += double(gg);
        sums[1] += double(form != SGD || decayed ? mm : gg);
    }
}

template <class T>
void update(int64_t tensors, const int64_t* sizes, void* const* ps, void* const* gs, void* const* ms, int form,
            const double* const* scalars, int threads, double* out) {
    using A = typename Wide<T>::type;
    std::vector<Chunk> chunks;
    for (int64_t t = 0; t < tensors; ++t)
        for (int64_t start = 0; start < sizes[t]; start += UPDATE_CHUNK)
            chunks.push_back({t, start, std::min(sizes[t], start + UPDATE_CHUNK)});
    std::vector<double> sums(2 * chunks.size());
    const Rule<A> rule(form, scalars);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < int64_t(chunks.size()); ++c) {
        const Chunk& at = chunks[c];
        T* p = static_cast<T*>(ps[at.tensor]) + at.start;
        const T* g = static_cast<const T*>(gs[at.tensor]) + at.start;
        A* m = form == SGD ? nullptr : static_cast<A*>(ms[at.tensor]) + at.start;
        int64_t n = at.end - at.start;
        double* to = &sums[2 * c];
#define CASE(F)                                                              \
    case F:                                                                  \
        rule.decay != 0 ? update_chunk<F, true>(rule, p, g, m, n, to)        \
                        : update_chunk<F, false>(rule, p, g, m, n, to);      \
        break;
        switch (form) { CASE(SGD) CASE(SHB) CASE(NSHB) CASE(QHM) }
#undef CASE
    }
    out[0] = out[1] = 0;
    for (size_t c = 0; c < chunks.size(); ++c) {
        out[0] += sums[2 * c];
        out[1] += sums[2 * c + 1];
    }
}

// persample_noise ----------------------------------------------------------------------------------------------------

constexpr int64_t NOISE_CHUNKS = 128;        // at most: how many threads have work
constexpr int64_t CACHED = 192 * 1024 / 4;   // values of G that stay in a core's cache between their two uses
constexpr int64_t NARROW = 256;              // columns of a block at least: rows lie far apart, and each costs a start

// The mean of the block's rows in two parts: `near`, rounded to A, and the `rest` that the rounding left over.
template <class G, class A>
void block_mean(const G* g, int64_t rows, int64_t stride, int64_t n, double* total, A* near, A* rest) {
    std::fill(total, total + n, 0.0);
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const G *a = g + i * stride, *b = a + stride, *c = b + stride, *d = c + stride;
#pragma omp simd
        for (int64_t k = 0; k < n; ++k)
            total[k] += (double(load(a[k])) + double(load(b[k]))) + (double(load(c[k])) + double(load(d[k])));
    }
    for (; i < rows; ++i) {
        const G* row = g + i * stride;
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) total[k] += load(row[k]);
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

template <int form, bool decayed, class T, class A>
void move_block(const Rule<A>& rule, const A* near, const A* rest, T* p, A* m, int64_t n, double* sums) {
    double gg = 0, mm = 0, gm = 0;
#pragma omp simd reduction(+ : gg, mm, gm)
    for (int64_t k = 0; k < n; ++k) {
        A mean = near[k] + rest[k], direction = move<form, decayed>(rule, p + k, form == SGD ? nullptr : m + k, mean);
        gg += double(mean) * mean;
        mm += double(direction) * direction;
        gm += double(direction) * mean;
    }
    sums[0] += gg;
    sums[1] += mm;
    sums[2] += gm;
}

template <class G, class T>
void persample_noise(int64_t rows, int64_t columns, const void* gs, void* ps, void* ms, int form,
                     const double* const* scalars, int threads, double* noise, double* squares, double* out) {
    using A = typename Wide<T>::type;
    const int64_t block = std::clamp<int64_t>(CACHED / rows / 16 * 16, NARROW, 4096);
    const int64_t blocks = (columns + block - 1) / block;
    const int64_t chunks = std::min(NOISE_CHUNKS, blocks), per_chunk = chunks ? (blocks + chunks - 1) / chunks : 0;
    const int64_t width = 2 * rows + 3;
    std::vector<double> sums(chunks * width, 0.0);
    const Rule<A> rule(form, scalars);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < chunks; ++c) {
        double* to = &sums[c * width];
        std::vector<double> total(block);
        std::vector<A> near(block), rest(block);
        for (int64_t b = c * per_chunk; b < std::min(blocks, (c + 1) * per_chunk); ++b) {
            const int64_t start = b * block, n = std::min(block, columns - start);
            const G* g = static_cast<const G*>(gs) + start;
            block_mean(g, rows, columns, n, total.data(), near.data(), rest.data());
            for (int64_t i = 0; i < rows; ++i)
                row_sums(g + i * columns, near.data(), rest.data(), n, to + i, to + rows + i);
            T* p = static_cast<T*>(ps) + start;
            A* m = form == SGD ? nullptr : static_cast<A*>(ms) + start;
            double* last = to + 2 * rows;
#define CASE(F)                                                                                     \
    case F:                                                                                         \
        rule.decay != 0 ? move_block<F, true>(rule, near.data(), rest.data(), p, m, n, last)        \
                        : move_block<F, false>(rule, near.data(), rest.data(), p, m, n, last);      \
        break;
            switch (form) { CASE(SGD) CASE(SHB) CASE(NSHB) CASE(QHM) }
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

// to[r][c] = sum over i of dy[ys[i] + r] x[xs[i] + c], for ROWS rows and 2 LANES columns, all of it in registers.
template <int ROWS, class T>
void outer_products(int64_t count, const int32_t* xs, const int32_t* ys, const T* x, const T* dy, T* to,
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
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) std::memcpy(to + r * stride, sums[r], sizeof sums[r]);
}

template <class T, int ROWS = TILE_ROWS>
void outer_products_of(int64_t rows, int64_t count, const int32_t* xs, const int32_t* ys, const T* x, const T* dy,
                       T* to, int64_t stride) {
    if (rows == ROWS) return outer_products<ROWS>(count, xs, ys, x, dy, to, stride);
    if constexpr (ROWS > 1) outer_products_of<T, ROWS - 1>(rows, count, xs, ys, x, dy, to, stride);
}

struct Convolution {  // x [batch, height, width, groups * inputs], dy [batch, out_height, out_width, groups * outputs]
    int64_t batch, height, width, inputs, out_height, out_width, outputs, groups;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int64_t places() const { return kernel[0] * kernel[1]; }
    int64_t pixels() const { return out_height * out_width; }
};

// For every place of the kernel, the output pixels that see the image there, and the input pixel under each.
struct Places {
    std::vector<int32_t> from, to;  // input and output pixels, of place k those in [starts[k], starts[k + 1])
    std::vector<int64_t> starts{0};
    explicit Places(const Convolution& c) {
        for (int64_t k = 0; k < c.places(); ++k) {
            const int64_t down = k / c.kernel[1] * c.dilation[0] - c.padding[0];
            const int64_t right = k % c.kernel[1] * c.dilation[1] - c.padding[1];
            for (int64_t t = 0; t < c.pixels(); ++t) {
                const int64_t h = t / c.out_width * c.stride[0] + down, w = t % c.out_width * c.stride[1] + right;
                if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
                from.push_back(int32_t(h * c.width + w));
                to.push_back(int32_t(t));
            }
            starts.push_back(int64_t(from.size()));
        }
    }
};

// A piece of the weight, [places, rows, columns], that one thread computes for every sample before the next piece.
struct Piece {
    int64_t group, place, places, row, rows, column, columns;
    int64_t values() const { return places * rows * columns; }
};

constexpr int64_t PIECE_PLACES = 9, PIECE_ROWS = 16, PIECE_COLUMNS = 32;

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cut [0, size) into `parts` pieces that differ by one at most: calls each(start, length).
template <class Each> void cut(int64_t size, int64_t parts, Each each) {
    for (int64_t i = 0; i < parts; ++i) each(size * i / parts, size * (i + 1) / parts - size * i / parts);
}

template <class T>
void conv_noise(const Convolution& c, const T* x, const T* dy, bool with_noise, int threads, T* dw, double* squares,
                double* noise) {
    const int64_t B = c.batch, wide = 2 * LANES<T>, x_row = c.inputs * c.groups, y_row = c.outputs * c.groups;
    const int64_t x_sample = c.height * c.width * x_row, y_sample = c.pixels() * y_row;
    // Too few channels for a tile: the inputs of an output pixel are copied side by side, and the kernel has one place.
    const bool packed = c.inputs < wide;
    const int64_t places = packed ? 1 : c.places(), used = packed ? c.places() * c.inputs : c.inputs;
    const int64_t inputs = packed ? up(used, wide) * wide : c.inputs;
    const Places at(c);
    std::vector<int32_t> xs(at.from.size()), ys(at.to.size()), all(c.pixels());
    for (size_t i = 0; i < xs.size(); ++i) xs[i] = int32_t(at.from[i] * x_row), ys[i] = int32_t(at.to[i] * y_row);
    for (int64_t t = 0; t < c.pixels(); ++t) all[t] = int32_t(t * y_row);

    std::vector<Piece> pieces;
    for (int64_t g = 0; g < c.groups; ++g)
        cut(places, up(places, PIECE_PLACES), [&](int64_t place, int64_t some) {
            cut(inputs / wide, std::max<int64_t>(1, inputs / PIECE_COLUMNS), [&](int64_t column, int64_t columns) {
                const int64_t start = column * wide, end = start + columns * wide;
                cut(c.outputs, up(c.outputs, PIECE_ROWS), [&](int64_t row, int64_t rows) {
                    pieces.push_back({g, place, some, row, rows, start, end + wide > inputs ? inputs - start : end - start});
                });
            });
        });
    std::vector<double> sums(2 * B * pieces.size(), 0.0);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> blocks, total, columns;
        std::vector<int32_t> rows_of;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < int64_t(pieces.size()); ++n) {
            const Piece& piece = pieces[n];
            const int64_t values = piece.values(), width = piece.columns;
            double* to = &sums[2 * B * n];
            blocks.resize((with_noise ? B : 1) * values);
            total.assign(values, T(0));
            if (packed) {
                columns.assign(c.pixels() * width, T(0));  // padding stays zero
                rows_of.resize(c.pixels());
                for (int64_t t = 0; t < c.pixels(); ++t) rows_of[t] = int32_t(t * width);
            }
            for (int64_t i = 0; i < B; ++i) {
                const T* xi = x + i * x_sample + piece.group * c.inputs;
                const T* yi = dy + i * y_sample + piece.group * c.outputs + piece.row;
                T* g = &blocks[with_noise ? i * values : 0];
                if (packed) {
                    for (int64_t v = 0; v < std::min(width, used - piece.column); ++v) {
                        const int64_t k = (piece.column + v) / c.inputs, channel = (piece.column + v) % c.inputs;
                        for (int64_t j = at.starts[k]; j < at.starts[k + 1]; ++j)
                            columns[at.to[j] * width + v] = xi[xs[j] + channel];
                    }
                }
                for (int64_t q = 0; q < width; q += wide) {
                    const int64_t column = std::min(q, width - wide);  // the last tile may overlap the one before
                    for (int64_t k = 0; k < piece.places; ++k) {
                        const int64_t start = at.starts[piece.place + k];
                        const int64_t count = packed ? c.pixels() : at.starts[piece.place + k + 1] - start;
                        const int32_t* from = packed ? rows_of.data() : xs.data() + start;
                        const int32_t* under = packed ? all.data() : ys.data() + start;
                        const T* inputs_at = packed ? columns.data() + column : xi + piece.column + column;
                        cut(piece.rows, up(piece.rows, TILE_ROWS), [&](int64_t row, int64_t rows) {
                            outer_products_of(rows, count, from, under, inputs_at, yi + row,
                                              g + (k * piece.rows + row) * width + column, width);
                        });
                    }
                }
                for (int64_t start = 0; start < values; start += SHORT) {
                    T gg = 0;
#pragma omp simd reduction(+ : gg)
                    for (int64_t v = start; v < std::min(values, start + SHORT); ++v) {
                        total[v] += g[v];
                        gg += g[v] * g[v];
                    }
                    to[i] += double(gg);
                }
            }
            for (int64_t k = 0; k < piece.places; ++k)
                for (int64_t r = 0; r < piece.rows; ++r) {
                    const int64_t output = piece.group * c.outputs + piece.row + r;
                    const T* from = &total[(k * piece.rows + r) * width];
                    std::copy(from, from + std::min(width, used - piece.column),
                              dw + (output * places + piece.place + k) * used + piece.column);
                }
            if (!with_noise) continue;
            for (T& value : total) value /= T(B);
            for (int64_t i = 0; i < B; ++i) {
                const T* g = &blocks[i * values];
                for (int64_t start = 0; start < values; start += SHORT) {
                    T dd = 0;
#pragma omp simd reduction(+ : dd)
                    for (int64_t v = start; v < std::min(values, start + SHORT); ++v) {
                        T deviation = g[v] - total[v];
                        dd += deviation * deviation;
                    }
                    to[B + i] += double(dd);
                }
            }
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
// mean and rstd belong to `shared` neighbouring channels, those of sample i `step` further on.
template <class T>
void affine_grads(int64_t batch, int64_t pixels, int64_t channels, int64_t shared, int64_t step, const T* x, const T* dy,
                  const T* mean, const T* rstd, int threads, double* dw, double* db) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < batch; ++i) {
        std::vector<T> center(channels), scaled(channels), plain(channels);
        for (int64_t c = 0; c < channels; ++c) center[c] = mean[i * step + c / shared];
        std::vector<double> totals(2 * channels, 0.0);
        for (int64_t start = 0; start < pixels; start += SHORT) {
            std::fill(scaled.begin(), scaled.end(), T(0));
            std::fill(plain.begin(), plain.end(), T(0));
            for (int64_t t = start; t < std::min(pixels, start + SHORT); ++t) {
                const T *xt = x + (i * pixels + t) * channels, *yt = dy + (i * pixels + t) * channels;
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
            dw[i * channels + c] = totals[c] * double(rstd[i * step + c / shared]);
            db[i * channels + c] = totals[channels + c];
        }
    }
}

}  // namespace

#define UPDATE(NAME, T)                                                                                         \
    extern "C" void NAME(int64_t tensors, const int64_t* sizes, void* const* p, void* const* g, void* const* m, \
                         int form, const double* const* scalars, int threads, double* out) {                    \
        update<T>(tensors, sizes, p, g, m, form, scalars, threads, out);                                        \
    }
UPDATE(update_float32, float)
UPDATE(update_float64, double)
UPDATE(update_bfloat16, bfloat16)

#define NOISE(NAME, G, T)                                                                                       \
    extern "C" void NAME(int64_t rows, int64_t columns, const void* g, void* p, void* m, int form,              \
                         const double* const* scalars, int threads, double* noise, double* squares,             \
                         double* out) {                                                                         \
        persample_noise<G, T>(rows, columns, g, p, m, form, scalars, threads, noise, squares, out);             \
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

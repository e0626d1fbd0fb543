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

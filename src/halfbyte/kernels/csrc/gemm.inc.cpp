// Products of matrices of packed codes: linear layers, batches of matrices, and the parts that convolutions share.
//
// A is cut into blocks of rows, one for a thread at a time; B is packed once for all of them, as much of it as a few
// MiB hold. Sums are 32-bit in the result's own memory; where more products are summed than surely fit, they are added
// to 64-bit ones in time.
#include <cstdlib>

#include "gemm_tiles.inc.cpp"

#include "gemm_pack.inc.cpp"

#include "gemm_block.inc.cpp"

namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t PACKED_B = int64_t{4} << 20;  // bytes of B that are packed at a time
constexpr int64_t COLUMNS = 8192;               // and its columns

thread_local Scratch own_scratch, shared_scratch;  // of each thread, and of the one that calls

// A matrix of codes as lines of equal length in a packed tensor.
struct Matrix {
    const hb_codes* codes;
    int64_t first, stride;
    bool along;  // whether a line runs along the reduction

    void fetch(int64_t line, int64_t at, int64_t n, uint8_t* to) const {
        unpack(*codes, first + line * stride + at, n, to);
    }
};

// A stretch of the reduction of B, packed: blocks one after another, in each the panels, in each the steps.
struct PackedB {
    char* data;
    int64_t columns, padded;   // of the matrix, and with the last panel's padding
    int64_t length, block;     // of the reduction, and of each block but the last
    int group;

    int64_t blocks() const { return (length + block - 1) / block; }
    int64_t steps(int64_t i) const { return (least(block, length - i * block) + group - 1) / group; }
    char* panel(int64_t i, int64_t column) const {
        return data + 4 * (padded * (i * block / group) + steps(i) * column);
    }
    static int64_t bytes(int64_t length, int64_t padded, int group) {
        return (length + group - 1) / group * padded * 4;
    }
};

// Packs panel by panel a matrix whose lines run along the reduction: columns `column` ... of one panel, one block.
template <class View>
HB_NOINLINE void pack_panel(const View& view, const Choice& how, int64_t line, int64_t k, int64_t i, int64_t column,
                            const PackedB& b) {
    alignas(64) uint8_t codes[BLOCK_BYTES];
    alignas(64) uint8_t rows[16][ROW_STRIDE];
    const int64_t n = least(b.block, b.length - i * b.block), padded = round_up(n, 64), steps = b.steps(i);
    const int64_t width = least(PANEL, b.padded - column);
    char* to = b.panel(i, column);
    for (int64_t j0 = 0; j0 < width; j0 += 16) {
        const int64_t some = least(16, width - j0);
        for (int64_t j = 0; j < some; j++) {
            uint8_t* bytes = how.method == WORDS ? codes : rows[j];
            const int64_t have = column + j0 + j < b.columns ? n : 0;
            if (have) view.fetch(line + column + j0 + j, k + i * b.block, n, bytes);
            std::memset(bytes + have, 0, static_cast<size_t>(padded - have));
            if (how.method == WORDS)
                read_words(how.b, padded, codes, reinterpret_cast<int16_t*>(rows[j]));
            else
                read_bytes(how.b, padded, bytes);
        }
        transpose_groups(rows[0], ROW_STRIDE, some, steps, width, to + 4 * j0);
    }
}

// Writes the groups of one step, for all columns. `lines`: 4 rows of codes of b.padded + 64, overwritten.
HB_NOINLINE void pack_step(uint8_t* const lines[4], const Choice& how, int64_t i, int64_t s, const PackedB& b) {
    alignas(64) int16_t wide[2][PANEL];
    if (how.method != WORDS)
        for (int j = 0; j < 4; j++) read_bytes(how.b, b.padded, lines[j]);
    for (int64_t column = 0; column < b.padded; column += PANEL) {
        const int64_t width = least(PANEL, b.padded - column);
        auto* to = reinterpret_cast<uint8_t*>(b.panel(i, column) + 4 * s * width);
        if (how.method == WORDS) {
            for (int j = 0; j < 2; j++) read_words(how.b, width, lines[j] + column, wide[j]);
            interleave_words(wide[0], wide[1], width, to);
        } else {
            const uint8_t* const rows[4] = {lines[0] + column, lines[1] + column, lines[2] + column, lines[3] + column};
            interleave_bytes(rows, width, to);
        }
    }
}

// Packs the stretch k ... k + b.length of columns first ... first + b.columns.
template <class View>
void pack_b(const View& view, const Choice& how, int64_t k, int64_t first, const PackedB& b) {
    if (view.along) {
        const int64_t panels = (b.padded + PANEL - 1) / PANEL;
        parallel_for(panels * b.blocks(), 4, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; task++)
                pack_panel(view, how, first, k, task / panels, task % panels * PANEL, b);
        });
        return;
    }
    const int64_t run = 16, runs = (b.block / b.group + run - 1) / run;
    parallel_for(b.blocks() * runs, 2, [&](int64_t begin, int64_t end) {
        const int64_t stride = b.padded + 64;
        auto* memory = reinterpret_cast<uint8_t*>(own_scratch.get(static_cast<size_t>(4 * stride)));
        uint8_t* const lines[4] = {memory, memory + stride, memory + 2 * stride, memory + 3 * stride};
        for (int64_t task = begin; task < end; task++) {
            const int64_t i = task / runs, stop = least(b.steps(i), task % runs * run + run);
            for (int64_t s = task % runs * run; s < stop; s++) {
                for (int j = 0; j < b.group; j++) {
                    const int64_t line = i * b.block + s * b.group + j, have = line < b.length ? b.columns : 0;
                    if (have) view.fetch(k + line, first, have, lines[j]);
                    std::memset(lines[j] + have, 0, static_cast<size_t>(stride - have));
                }
                pack_step(lines, how, i, s, b);
            }
        }
    });
}

#if defined(HB_AVX512VNNI)

template <int V>
void sparse_rows(const BlockA& a, int side, int64_t row, int rows, const char* b, int32_t* out, int64_t stride) {
    for (int r = 0; r < rows; r++) {
        const int count = a.count[side][row + r];
        const int64_t list = (row + r) * LIST;
        if (count || !side)
            sparse_row<V>(a.groups[side] + list, a.places[side] + list, count, b, out + r * stride, !side);
    }
}

// The codes above (side 0) or below the window; side 0 overwrites `out`. Returns whether there were any.
bool add_sparse(const BlockA& a, int side, int64_t row, int rows, const char* b, int vectors, int32_t* out,
                int64_t stride) {
    int any = 0;
    for (int r = 0; r < rows; r++) any |= a.count[side][row + r];
    if (!any) return false;
    if (vectors == 4) sparse_rows<4>(a, side, row, rows, b, out, stride);
    if (vectors == 2) sparse_rows<2>(a, side, row, rows, b, out, stride);
    if (vectors == 1) sparse_rows<1>(a, side, row, rows, b, out, stride);
    return true;
}

#endif

// One tile of C = or += A B: `rows` rows from `row` on, one panel.
HB_INLINE void multiply_tile(const BlockA& a, const Choice& how, int64_t row, int rows, const char* b, int vectors,
                             int32_t* c, int64_t stride, bool add) {
    Tile t{a.steps, a.data + row * a.row_stride, a.row_stride, a.step_stride, b, nullptr, how.shift, a.start + row, c,
           stride, add};
#if defined(HB_AVX512VNNI)
    alignas(64) int32_t first[ROWS * PANEL];
    const bool window = how.method == WINDOW;
    if (window && how.used[0] && add_sparse(a, 0, row, rows, b, vectors, first, PANEL)) t.first = first;
#endif
    (how.method == WORDS ? tile_for<true>(rows, vectors) : tile_for<false>(rows, vectors))(t);
#if defined(HB_AVX512VNNI)
    if (window && how.used[1]) add_sparse(a, 1, row, rows, b, vectors, c, stride);
#endif
}

// C = or += A B for a block of A and block i of B, columns begin ... end (begin at the start of a panel).
HB_NOINLINE void multiply(const BlockA& a, const Choice& how, const PackedB& b, int64_t i, int64_t begin, int64_t end,
                          int32_t* c, int64_t stride, bool add) {
    alignas(64) int32_t edge[ROWS * PANEL];
    for (int64_t column = begin; column < end; column += PANEL) {
        const int64_t left = b.columns - column, valid = least(left, PANEL);
        const int vectors = vectors_for(left);
        const char* panel = b.panel(i, column);
        for (int64_t row = 0; row < a.rows; row += ROWS) {
            const int rows = static_cast<int>(least(ROWS, a.rows - row));
            int32_t* at = c + row * stride + column;
            if (valid == vectors * LANES) {
                multiply_tile(a, how, row, rows, panel, vectors, at, stride, add);
                continue;
            }
            for (int r = 0; add && r < rows; r++)
                std::memcpy(edge + r * PANEL, at + r * stride, static_cast<size_t>(valid) * 4);
            multiply_tile(a, how, row, rows, panel, vectors, edge, PANEL, add);
            for (int r = 0; r < rows; r++)
                std::memcpy(at + r * stride, edge + r * PANEL, static_cast<size_t>(valid) * 4);
        }
    }
}

// Sums to float32 numbers in the same memory.
HB_INLINE void scale_row(int32_t* row, int64_t n, float scale) {
    for (int64_t i = 0; i < n; i++) {
        const float x = static_cast<float>(row[i]) * scale;
        std::memcpy(row + i, &x, 4);
    }
}

HB_INLINE void widen_row(const int32_t* row, int64_t n, bool add, int64_t* wide) {
    for (int64_t i = 0; i < n; i++) wide[i] = (add ? wide[i] : 0) + row[i];
}

struct Result {
    int32_t* sums;       // rows of `stride`
    int64_t* wide;       // null where 32 bits hold every sum
    int64_t stride;
    const float* scale;  // null leaves sums
};

// Cuts that depend on the shape alone: blocks of rows, each of a multiple of ROWS, and stretches of columns.
struct Cut {
    int64_t m, n, rows, row_blocks, columns, column_blocks;

    Cut(int64_t m_, int64_t n_, int64_t limit = BLOCK_ROWS) : m(m_), n(n_) {
        row_blocks = (m + limit - 1) / limit;
        rows = round_up((m + row_blocks - 1) / row_blocks, ROWS);
        row_blocks = (m + rows - 1) / rows;
        columns = ((n + PANEL - 1) / PANEL + 15) / 16 * PANEL;
        column_blocks = (n + columns - 1) / columns;
    }
    // body(row, rows, first column, end of the columns), in parallel. What a thread gets of one row block comes as one.
    template <class Body>
    void run(const Body& body) const {
        parallel_for(row_blocks * column_blocks, 1, [&](int64_t from, int64_t until) {
            while (from < until) {
                const int64_t i = from / column_blocks, stop = least(until, (i + 1) * column_blocks);
                const int64_t begin = from % column_blocks, end = begin + stop - from;
                body(i * rows, least(rows, m - i * rows), begin * columns, least(n, end * columns));
                from = stop;
            }
        });
    }
};

// One block of rows and stretch of columns, times the packed stretch of B that begins at k.
template <class View>
void multiply_stretch(const View& a, const Choice& how, const PackedB& b, int64_t k, int64_t row, int64_t rows,
                      int64_t begin, int64_t end, int32_t* c, int64_t stride, bool add) {
    BlockA block(own_scratch.get(BlockA::BYTES_NEEDED));
    block.rows = rows;
    for (int64_t i = 0; i < b.blocks(); i++) {
        const int64_t n = least(b.block, b.length - i * b.block);
        if (a.along)
            pack_rows(a, how, row, k + i * b.block, n, &block);
        else
            pack_columns(a, how, row, k + i * b.block, n, &block);
        multiply(block, how, b, i, begin, end, c, stride, add || i > 0);
    }
}

// All rows of A times a packed stretch of B that begins at k, for columns first ... of the result; finished if `last`.
template <class View>
void multiply_packed(const View& a, const Choice& how, const PackedB& b, int64_t k, int64_t first, int64_t m, bool last,
                     const Result& to) {
    Cut(m, b.columns, MOST_ROWS).run([&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
        int32_t* c = to.sums + row * to.stride + first;
        multiply_stretch(a, how, b, k, row, rows, begin, end, c, to.stride, k > 0 && !to.wide);
        for (int64_t r = 0; r < rows; r++) {
            int32_t* line = c + r * to.stride + begin;
            if (to.wide)
                widen_row(line, end - begin, k > 0, to.wide + (line - to.sums));
            else if (last && to.scale)
                scale_row(line, end - begin, *to.scale);
        }
    });
}

template <class ViewA, class ViewB>
void product(const ViewA& a, const ViewB& b, const Choice& how, int64_t m, int64_t n, int64_t k, const Result& to) {
    const int group = group_of(how);
    const int64_t limit = to.wide ? most(group, how.limit / group * group) : INT64_MAX / 2;
    const int64_t block = least(block_length(how), limit);
    for (int64_t first = 0; first < n; first += COLUMNS) {
        const int64_t columns = least(COLUMNS, n - first), padded = padded_columns(columns);
        const int64_t fits = PACKED_B / PackedB::bytes(block, padded, group) * block;
        const int64_t stretch = least(most(block, fits), most(block, limit / block * block));
        for (int64_t at = 0; at < k; at += stretch) {
            PackedB packed{nullptr, columns, padded, least(stretch, k - at), block, group};
            packed.data = shared_scratch.get(static_cast<size_t>(PackedB::bytes(packed.length, padded, group)));
            pack_b(b, how, at, first, packed);
            multiply_packed(a, how, packed, at, first, m, at + stretch >= k, to);
        }
    }
    shared_scratch.trim();
}

// Memory with a whole matrix B, as `product` packs it.
PackedB prepared(const Choice& how, int64_t n, int64_t k, void* panels) {
    return {static_cast<char*>(panels), n, padded_columns(n), k, block_length(how), group_of(how)};
}

}  // namespace

static int32_t matmul_method(const hb_codes* a, const hb_codes* b, int64_t n, int32_t method) {
    return choose(*a, *b, n, method).method;
}

static int32_t plane_count(const hb_codes* q) {
    if (!q->planes) return 1;
    // A larger code has a larger magnitude, which needs as many planes or more.
    uint8_t largest = 0;
    for (int64_t i = 0; i < q->numel; i++) {
        const uint8_t code = q->codes[i] & 127;
        largest = code > largest ? code : largest;
    }
    int32_t count = 1;
    for (int c = 0; c <= largest; c++)
        for (int32_t plane = count; plane < 6; plane++) {
            const int16_t both = q->planes[256 * (plane / 2) + c];
            if (plane % 2 ? upper_digit(both) : static_cast<int8_t>(both)) count = plane + 1;
        }
    return count;
}

static int64_t matmul_panels(const hb_codes* b, int32_t b_along, int64_t n, int64_t k, int32_t method, void* panels) {
    Choice how{};
    how.method = static_cast<Method>(method);
    read_b(*b, &how);
    const PackedB packed = prepared(how, n, k, panels);
    if (panels) pack_b(Matrix{b, 0, b_along ? k : n, b_along != 0}, how, 0, 0, packed);
    return PackedB::bytes(k, packed.padded, packed.group);
}

static int32_t matmul(const hb_codes* a, int32_t a_along, const hb_codes* b, int32_t b_along, const void* panels,
                      int64_t batch, int64_t m, int64_t n, int64_t k, int32_t* sums, int64_t* wide,
                      const float* scale_a, const float* scale_b, double unit, int32_t method) {
    const Choice how = choose(*a, *b, n, method);
    // Rounded as halfbyte.kernels.reference.gemm.output_scale does.
    const double scales = scale_a ? static_cast<double>(*scale_a) * static_cast<double>(*scale_b) : 1;
    const auto factor = static_cast<float>(scales * unit);
    const float* scale = scale_a && !wide ? &factor : nullptr;
    if (batch <= 0 || m <= 0 || n <= 0) return how.method;
    if (k <= 0) {
        for (int64_t r = 0; r < batch * m; r++) {
            std::memset(sums + r * n, 0, static_cast<size_t>(n) * 4);
            if (wide) std::memset(wide + r * n, 0, static_cast<size_t>(n) * 8);
            if (scale) scale_row(sums + r * n, n, *scale);
        }
        return how.method;
    }
    const auto one = [&](int64_t i) {
        const Matrix left{a, i * m * k, a_along ? k : m, a_along != 0};
        const Matrix right{b, i * n * k, b_along ? k : n, b_along != 0};
        const Result to{sums + i * m * n, wide ? wide + i * m * n : nullptr, n, scale};
        if (panels)
            multiply_packed(left, how, prepared(how, n, k, const_cast<void*>(panels)), 0, 0, m, true, to);
        else
            product(left, right, how, m, n, k, to);
    };
    if (batch < 8) {
        for (int64_t i = 0; i < batch; i++) one(i);
    } else {
        parallel_for(batch, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) one(i);
        });
    }
    return how.method;
}

}  // namespace HB_NS
}  // namespace hb

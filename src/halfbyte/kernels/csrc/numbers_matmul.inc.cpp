// Products of matrices of numbers.
namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t NUMBER_ROWS = 64;                // rows of A that are packed at a time
constexpr int64_t NUMBER_PIECE = 256;              // columns that one task computes
constexpr int64_t NUMBER_LENGTH = 512;             // of the reduction that is packed at a time; no block is longer
constexpr int64_t NUMBER_BYTES = int64_t{8} << 20; // of B that is packed at a time, unless 64 columns take more

thread_local Scratch number_rows_scratch, number_sums_scratch;

// B as panels of K rows of columns first ... first + columns of N.
template <class T>
void pack_numbers(const float* b, bool along, int64_t n, int64_t k, int64_t first, int64_t columns, T* to) {
    const int64_t padded = number_columns(columns), panels = (padded + WIDTH - 1) / WIDTH;
    const int64_t cuts = (k + NUMBER_LENGTH - 1) / NUMBER_LENGTH;
    parallel_for(panels * cuts, 4, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t column = task / cuts * WIDTH, from = task % cuts * NUMBER_LENGTH;
            const int64_t width = number_width(padded, column), have = least(width, columns - column);
            const int64_t length = least(NUMBER_LENGTH, k - from);
            T* panel = to + column * k + from * width;
            if (have < width) std::memset(panel, 0, static_cast<size_t>(length * width) * sizeof(T));
            if (along) {
                turn(b + (first + column) * k + from, k, have, length, panel, width);
                continue;
            }
            for (int64_t s = 0; s < length; s++)
                widened(b + (from + s) * n + first + column, have, panel + s * width);
        }
    });
}

// A as lines of K, or columns.
struct NumberMatrix {
    const float* data;
    int64_t rows, length;
    bool along;

    // Rows `row` ... of `count`, places k ... of n, to lines of n.
    template <class T>
    void pack(int64_t row, int64_t count, int64_t k, int64_t n, T* to) const {
        if (along) {
            for (int64_t r = 0; r < count; r++) widened(data + (row + r) * length + k, n, to + r * n);
            return;
        }
        turn(data + k * rows + row, rows, n, count, to, n);
    }
};

// Columns begin ... end of the panels at `b` (of `columns` in all), for some rows.
template <class T>
void multiply_numbers(const NumberMatrix& a, int64_t row, int64_t rows, const T* b, int64_t columns, int64_t begin,
                      int64_t end, int64_t flush, const Finish& finish, float* out, int64_t stride) {
    const int64_t padded = number_columns(columns), width = round_up(end - begin, WIDTH), k = a.length;
    auto* lines = reinterpret_cast<T*>(number_rows_scratch.get(sizeof(T) * NUMBER_ROWS * NUMBER_LENGTH));
    auto* sums = reinterpret_cast<double*>(number_sums_scratch.get(static_cast<size_t>(rows * width) * 8));
    const int64_t length = flush ? NUMBER_LENGTH / flush * flush : NUMBER_LENGTH;
    Run run{0, 0};
    NumberTile<T> t{};
    t.runs = &run, t.count = 1, t.flush = flush;
    for (int64_t at = 0; at < k; at += length) {
        t.steps = least(length, k - at), t.add = at > 0;
        const T* line = lines;
        int64_t apart = t.steps;
        if constexpr (sizeof(T) == 4) {
            if (a.along) line = a.data + row * k + at, apart = k;
        }
        if (line == lines) a.pack(row, rows, at, t.steps, lines);
        for (int64_t column = begin; column < end; column += WIDTH) {
            t.apart = number_width(padded, column);
            t.b = b + column * k + at * t.apart;
            const int many = tile_rows(t.apart);
            for (int64_t r = 0; r < rows; r += many) {
                const int some = static_cast<int>(least(many, rows - r));
                for (int i = 0; i < some; i++)
                    t.a[i] = line + (r + i) * apart, t.c[i] = sums + (r + i) * width + column - begin;
                number_tiles(t, some, t.apart);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) finish.row(sums + r * width, end - begin, out + (row + r) * stride + begin);
}

template <class T>
void number_product(const float* a, bool a_along, const float* b, bool b_along, const T* panels, int64_t m, int64_t n,
                    int64_t k, int64_t flush, const Finish& finish, float* out) {
    const NumberMatrix left{a, m, k, a_along};
    const int64_t fits = NUMBER_BYTES / static_cast<int64_t>(k * sizeof(T)) / 64 * 64;
    const int64_t stretch = panels ? n : most(64, fits);
    for (int64_t first = 0; first < n; first += stretch) {
        const int64_t columns = least(stretch, n - first);
        const T* packed = panels;
        if (!panels) {
            const int64_t numbers = k * number_columns(columns);
            auto* to = reinterpret_cast<T*>(shared_scratch.get(static_cast<size_t>(numbers) * sizeof(T)));
            pack_numbers(b, b_along, n, k, first, columns, to);
            packed = to;
        }
        const int64_t blocks = (m + NUMBER_ROWS - 1) / NUMBER_ROWS;
        const int64_t piece = blocks < 8 ? 64 : NUMBER_PIECE, pieces = (columns + piece - 1) / piece;
        parallel_for(blocks * pieces, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; task++) {
                const int64_t row = task / pieces * NUMBER_ROWS, from = task % pieces * piece;
                multiply_numbers(left, row, least(NUMBER_ROWS, m - row), packed, columns, from,
                                 least(columns, from + piece), flush, finish, out + first, n);
            }
        });
    }
    shared_scratch.trim();
}

}  // namespace

static int64_t number_panels(const float* b, int32_t b_along, int64_t n, int64_t k, int64_t flush, void* panels) {
    if (panels && flush) pack_numbers(b, b_along != 0, n, k, 0, n, static_cast<float*>(panels));
    else if (panels) pack_numbers(b, b_along != 0, n, k, 0, n, static_cast<double*>(panels));
    return k * number_columns(n) * (flush ? 4 : 8);
}

static void matmul_numbers(const float* a, int32_t a_along, const float* b, int32_t b_along, const void* panels,
                           int64_t batch, int64_t m, int64_t n, int64_t k, int64_t flush, int32_t power, double scales,
                           int32_t twice, float* out) {
    const Finish finish(power, scales, twice);
    if (k <= 0)
        for (int64_t i = 0; i < batch * m * n; i++) out[i] = finish(0.0);
    if (k <= 0 || m <= 0 || n <= 0) return;
    parallel_for(batch, batch < 8 ? batch : 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const float *left = a + i * m * k, *right = b + i * n * k;
            float* to = out + i * m * n;
            if (flush)
                number_product(left, a_along != 0, right, b_along != 0, static_cast<const float*>(panels), m, n, k,
                               flush, finish, to);
            else
                number_product(left, a_along != 0, right, b_along != 0, static_cast<const double*>(panels), m, n, k,
                               flush, finish, to);
        }
    });
}

}  // namespace HB_NS
}  // namespace hb

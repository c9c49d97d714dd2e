// How two formats are multiplied, and blocks of A in the layout that the tiles read.
//
// Three exact ways:
//   bytes   8-bit numbers on both sides: INT4, UINT4, INT8, radix-2 levels.
//   window  radix-4 levels 4^0 ... 4^6 do not fit 8 bits, but four neighboring ones, 4^b ... 4^(b+3), do, as 1 ... 64.
//           Codes outside go into two short lists of groups for each row, those above as 4^(e-b-4), those below as 4^e:
//           sum = ((above << 8) + window) << 2 b, + below. Pays while few codes are outside.
//   words   16-bit numbers on both sides: all else, and radix 4 whose levels are spread evenly.
namespace hb {
namespace HB_NS {
namespace {

enum Method { AUTO = 0, BYTES = 1, WINDOW = 2, WORDS = 3 };

constexpr int BLOCK_ROWS = 96;                     // rows of A that a convolution packs at a time
constexpr int MOST_ROWS = 192;                     // and others: the longer the lines across rows, the better
constexpr int BLOCK_BYTES = 512;                   // of one row: 512 8-bit or 256 16-bit numbers
constexpr int ROW_STRIDE = BLOCK_BYTES + 64;       // an odd number of cache lines, so that rows differ in their sets
constexpr int LIST = BLOCK_BYTES / 4 + 16;         // groups of a row, and what a vector store may write beyond them
constexpr int WINDOW_PERCENT = 15;                 // outside shares above this are left to words: about even
constexpr int WINDOW_COLUMNS = 2 * PANEL;          // and fewer columns: they do not pay for splitting the rows of A

struct Choice {
    Method method;
    Reading a, b;
    Reading side[2];   // window: the codes above and below it
    bool used[2];
    int shift;         // 2 b
    int offset;        // of B's bytes
    int64_t limit;     // products whose sum surely fits 32 bits
};

Reading reading_of(const hb_codes& q, int offset) {
    Reading how{};
    how.nibbles = q.bits <= 4;
    how.flip = q.flip;
    how.offset = offset;
    how.each = q.planes ? q.planes + 256 * (q.plane / 2) : nullptr;
    how.upper = q.plane % 2 != 0;
    for (int c = 0; c < 16; c++) {
        how.words[c] = q.table[c];
        how.bytes[c] = static_cast<uint8_t>(q.table[c] + offset);
    }
    return how;
}

int offset_of(const hb_codes& b) { return b.low < 0 ? -b.low : 0; }

bool fits_bytes(const hb_codes& a, const hb_codes& b, int offset) {
    bool fits = a.low >= -128 && a.high <= 127 && b.high + offset <= 255;
#if defined(HB_AVX2) && !defined(HB_AVX512VNNI)
    fits = fits && 2 * most(a.high, -a.low) * (b.high + offset) <= 32767;
#endif
    return fits;
}

#if defined(HB_AVX512VNNI)

// The window of four levels that holds most codes; returns the percentage outside. Looks at a sample of the bytes.
double best_window(const hb_codes& q, int* bottom) {
    const int64_t bytes = (q.numel + 1) / 2, run = 64, runs = most(1, least(bytes / run, 512));
    const __mmask64 some = bytes >= run ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
    const __m512i bits = _mm512_set1_epi8(7);
    int64_t level[7] = {}, used = 0, best = -1;
    for (int64_t i = 0; i < runs; i++) {
        const __m512i codes = _mm512_maskz_loadu_epi8(some, q.codes + bytes / runs * i);
        const __m512i low = _mm512_and_si512(codes, bits);
        const __m512i high = _mm512_and_si512(_mm512_srl_epi16(codes, _mm_cvtsi32_si128(4)), bits);
        for (int e = 0; e < 7; e++) {
            const __m512i code = _mm512_set1_epi8(static_cast<char>(e + 1));
            level[e] += __builtin_popcountll(_mm512_cmpeq_epi8_mask(low, code)) +
                        __builtin_popcountll(_mm512_cmpeq_epi8_mask(high, code));
        }
    }
    for (const int64_t one : level) used += one;
    for (int b = 0; b < 4; b++) {
        const int64_t inside = level[b] + level[b + 1] + level[b + 2] + level[b + 3];
        if (inside > best) best = inside, *bottom = b;
    }
    return bytes ? 50.0 * static_cast<double>(used - best) / static_cast<double>(runs * least(run, bytes)) : 0;
}

void set_window(const hb_codes& q, int bottom, Choice* how) {
    how->shift = 2 * bottom;
    how->used[0] = bottom < 3, how->used[1] = bottom > 0;
    for (int c = 0; c < 16; c++) {
        const int e = (c & 7) - 1, value = q.table[c], negative = value < 0 ? -1 : 1;
        const auto power = [&](int exponent) { return static_cast<uint8_t>(negative * (1 << 2 * exponent)); };
        const bool above = e > bottom + 3, below = e >= 0 && e < bottom;
        how->a.bytes[c] = e >= 0 && !above && !below ? power(e - bottom) : 0;
        how->side[0].bytes[c] = above ? power(e - bottom - 4) : 0;
        how->side[1].bytes[c] = below ? power(e) : 0;
    }
}

#endif

// How B is read under the method that was chosen: 8-bit numbers are made unsigned.
void read_b(const hb_codes& b, Choice* how) {
    how->offset = how->method == WORDS ? 0 : offset_of(b);
    how->b = reading_of(b, how->offset);
}

// How to multiply A (signed bytes or words) and B of so many columns. A `wanted` way is taken where it is possible.
Choice choose(const hb_codes& a, const hb_codes& b, [[maybe_unused]] int64_t columns, int wanted) {
    Choice how{};
    const int offset = offset_of(b);
    const int64_t largest = static_cast<int64_t>(most(a.high, -a.low)) * most(b.high, -b.low);
    how.limit = INT32_MAX / most(1, largest);
    how.method = fits_bytes(a, b, offset) && wanted != WORDS ? BYTES : WORDS;
#if defined(HB_AVX512VNNI)
    if (how.method == WORDS && wanted != WORDS && a.bits == 4 && a.table[7] == 4096 && a.table[2] == 4 &&
        b.high + offset <= 255) {
        int bottom = 0;
        const double outside = best_window(a, &bottom);
        if (wanted == WINDOW || (outside <= WINDOW_PERCENT && columns >= WINDOW_COLUMNS)) {
            how.method = WINDOW;
            how.a = reading_of(a, 0);
            set_window(a, bottom, &how);
        }
    }
#endif
    if (how.method != WINDOW) how.a = reading_of(a, 0);
    read_b(b, &how);
    return how;
}

HB_INLINE int group_of(const Choice& how) { return how.method == WORDS ? 2 : 4; }
HB_INLINE int64_t block_length(const Choice& how) { return BLOCK_BYTES / (how.method == WORDS ? 2 : 1); }

// A block of A: up to MOST_ROWS rows and one stretch of the reduction.
struct BlockA {
    int64_t rows, steps, row_stride, step_stride;
    char* data;                              // MOST_ROWS * ROW_STRIDE bytes
    int32_t* groups[2];                      // what lies above and below the window: MOST_ROWS lists of LIST
    int32_t* places[2];
    int32_t count[2][MOST_ROWS];
    int32_t start[MOST_ROWS];                // -offset times the row's sum

    static constexpr size_t BYTES_NEEDED = size_t{MOST_ROWS} * (ROW_STRIDE + 4 * LIST * 4);
    explicit BlockA(char* memory) : data(memory) {
        auto* lists = reinterpret_cast<int32_t*>(memory + MOST_ROWS * ROW_STRIDE);
        for (int side = 0; side < 2; side++) {
            groups[side] = lists + (2 * side) * MOST_ROWS * LIST;
            places[side] = lists + (2 * side + 1) * MOST_ROWS * LIST;
        }
    }
};

HB_INLINE int32_t wrapped(int64_t x) { return static_cast<int32_t>(static_cast<uint32_t>(x)); }

HB_INLINE int64_t sum_bytes(const char* x, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) total += static_cast<int8_t>(x[i]);
    return total;
}

#if defined(HB_AVX512VNNI)

HB_INLINE int64_t sum_lanes(__m512i x) {
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, x);
    int64_t total = 0;
    for (const int32_t lane : lanes) total += lane;
    return total;
}

HB_INLINE __m512i lookup(const Reading& how, __m512i codes) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(how.bytes));
    return _mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(0xffff, table), codes);
}

// One row of n codes (a multiple of 64) to the window's bytes and the lists; returns its sum.
HB_NOINLINE int32_t split_row(const Choice& how, const uint8_t* codes, int64_t n, char* to, int row, BlockA* block) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i inside = _mm512_setzero_si512(), outside[2] = {inside, inside};
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int count[2] = {0, 0};
    for (int64_t i = 0; i < n; i += 64) {
        const __m512i some = _mm512_loadu_si512(codes + i), window = lookup(how.a, some);
        _mm512_storeu_si512(to + i, window);
        inside = _mm512_dpbusd_epi32(inside, ones, window);
        for (int side = 0; side < 2; side++) {
            if (!how.used[side]) continue;
            const __m512i rare = lookup(how.side[side], some);
            const __mmask16 where = _mm512_test_epi32_mask(rare, rare);
            if (!where) continue;
            outside[side] = _mm512_dpbusd_epi32(outside[side], ones, rare);
            const int at = row * LIST + count[side];
            _mm512_storeu_si512(block->groups[side] + at, _mm512_maskz_compress_epi32(where, rare));
            _mm512_storeu_si512(block->places[side] + at, _mm512_maskz_compress_epi32(where, place));
            count[side] += __builtin_popcount(where);
        }
        place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
    block->count[0][row] = count[0], block->count[1][row] = count[1];
    const int64_t above = sum_lanes(outside[0]), below = sum_lanes(outside[1]);
    return wrapped((above * 256 + sum_lanes(inside)) * (1 << how.shift) + below);
}

// The groups of 16 rows at one step, from codes to the window's bytes in place; adds to the rows' sums.
HB_INLINE void split_groups(const Choice& how, char* data, int row, int step, int32_t* sums, BlockA* block) {
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    const __m512i some = _mm512_loadu_si512(data), window = lookup(how.a, some);
    _mm512_storeu_si512(data, window);
    __m512i total = _mm512_dpbusd_epi32(zero, ones, window);
    total = left_shift(total, _mm512_set1_epi32(how.shift));
    for (int side = 0; side < 2; side++) {
        if (!how.used[side]) continue;
        const __m512i rare = lookup(how.side[side], some);
        unsigned where = _mm512_test_epi32_mask(rare, rare);
        if (!where) continue;
        const __m512i sum = _mm512_dpbusd_epi32(zero, ones, rare);
        total = _mm512_add_epi32(total, side ? sum : left_shift(sum, _mm512_set1_epi32(8 + how.shift)));
        alignas(64) int32_t values[16];
        _mm512_store_si512(values, rare);
        for (; where; where &= where - 1) {
            const int j = __builtin_ctz(where), at = (row + j) * LIST + block->count[side][row + j]++;
            block->groups[side][at] = values[j];
            block->places[side][at] = step;
        }
    }
    _mm512_storeu_si512(sums + row, _mm512_add_epi32(_mm512_loadu_si512(sums + row), total));
}

#endif

// Fills a block from lines that run along the reduction: line `row`, places k ... k + n.
template <class View>
HB_NOINLINE void pack_rows(const View& view, const Choice& how, int64_t row, int64_t k, int64_t n, BlockA* block) {
    alignas(64) uint8_t codes[BLOCK_BYTES];
    const int group = group_of(how);
    const int64_t padded = round_up(n, 64);
    block->steps = (n + group - 1) / group;
    block->row_stride = ROW_STRIDE, block->step_stride = 4;
    for (int r = 0; r < block->rows; r++) {
        char* to = block->data + r * ROW_STRIDE;
        auto* bytes = how.method == BYTES ? reinterpret_cast<uint8_t*>(to) : codes;
        view.fetch(row + r, k, n, bytes);
        std::memset(bytes + n, 0, static_cast<size_t>(padded - n));
        int64_t sum = 0;
        if (how.method == BYTES) {
            read_bytes(how.a, padded, bytes);
            if (how.offset) sum = sum_bytes(to, n);
#if defined(HB_AVX512VNNI)
        } else if (how.method == WINDOW) {
            sum = split_row(how, codes, padded, to, r, block);
#endif
        } else {
            read_words(how.a, padded, codes, reinterpret_cast<int16_t*>(to));
        }
        block->start[r] = wrapped(-how.offset * sum);
    }
}

// Fills a block from lines that run across the rows: lines k ... k + n, places row ... row + block->rows.
template <class View>
HB_NOINLINE void pack_columns(const View& view, const Choice& how, int64_t row, int64_t k, int64_t n, BlockA* block) {
    alignas(64) uint8_t lines[4][MOST_ROWS];
    alignas(64) int16_t wide[2][MOST_ROWS];
    alignas(64) int32_t sums[MOST_ROWS] = {};
    const int group = group_of(how);
    const int64_t rows = block->rows, padded = round_up(rows, 16);
    const uint8_t* const pointers[4] = {lines[0], lines[1], lines[2], lines[3]};
    block->steps = (n + group - 1) / group;
    block->row_stride = 4, block->step_stride = padded * 4;
    std::memset(lines, 0, sizeof lines);
    std::memset(block->count, 0, sizeof block->count);
    for (int64_t s = 0; s < block->steps; s++) {
        char* to = block->data + s * block->step_stride;
        for (int j = 0; j < group; j++) {
            const int64_t line = s * group + j;
            if (line < n)
                view.fetch(k + line, row, rows, lines[j]);
            else
                std::memset(lines[j], 0, sizeof lines[j]);
        }
        if (how.method == WORDS) {
            for (int j = 0; j < 2; j++) read_words(how.a, padded, lines[j], wide[j]);
            interleave_words(wide[0], wide[1], padded, reinterpret_cast<uint8_t*>(to));
            continue;
        }
        interleave_bytes(pointers, padded, reinterpret_cast<uint8_t*>(to));
#if defined(HB_AVX512VNNI)
        if (how.method == WINDOW) {
            for (int r = 0; r < padded; r += 16)
                split_groups(how, to + 4 * r, r, static_cast<int>(s), sums, block);
            continue;
        }
#endif
        read_bytes(how.a, 4 * padded, reinterpret_cast<uint8_t*>(to));
        if (how.offset)
            for (int64_t r = 0; r < padded; r++) {
                int8_t x[4];
                std::memcpy(x, to + 4 * r, 4);
                sums[r] += x[0] + x[1] + x[2] + x[3];
            }
    }
    for (int64_t r = 0; r < rows; r++) block->start[r] = wrapped(-static_cast<int64_t>(how.offset) * sums[r]);
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb

// The innermost loops of convolutions: a few rows by one panel, along runs of the reduction that lie apart in memory.
namespace hb {
namespace HB_NS {
namespace {

// Where a run begins, in bytes from the beginning of each row and of the panel.
struct Run {
    int64_t a, b;
};

// C[row][column] = ((first + A B) << shift) + last + start[row], plus what was there if `add`.
struct RunTile {
    const char* a[ROWS];
    int32_t* c[ROWS];
    int32_t start[ROWS];
    const char* b;
    const Run* runs;
    int64_t count, steps;          // of runs; of groups in each
    const int32_t *first, *last;   // PANEL apart; null for zero
    int shift;
    bool add;
};

#if defined(HB_AVX512VNNI)

using Lanes = __m512i;
HB_INLINE Lanes lanes_at(const void* x) { return _mm512_loadu_si512(x); }
HB_INLINE Lanes lanes_of(int32_t x) { return _mm512_set1_epi32(x); }
HB_INLINE Lanes plus(Lanes x, Lanes y) { return _mm512_add_epi32(x, y); }
HB_INLINE void put(void* to, Lanes x) { _mm512_storeu_si512(to, x); }

#elif defined(HB_AVX2)

using Lanes = __m256i;
HB_INLINE Lanes lanes_at(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
HB_INLINE Lanes lanes_of(int32_t x) { return _mm256_set1_epi32(x); }
HB_INLINE Lanes plus(Lanes x, Lanes y) { return _mm256_add_epi32(x, y); }
HB_INLINE void put(void* to, Lanes x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

#else

struct Lanes {
    uint32_t x[LANES];
};
HB_INLINE Lanes lanes_at(const void* x) {
    Lanes y;
    std::memcpy(&y, x, sizeof y);
    return y;
}
HB_INLINE Lanes lanes_of(int32_t x) {
    Lanes y;
    for (uint32_t& lane : y.x) lane = static_cast<uint32_t>(x);
    return y;
}
HB_INLINE Lanes plus(Lanes x, const Lanes& y) {
    for (int i = 0; i < LANES; i++) x.x[i] += y.x[i];
    return x;
}
HB_INLINE void put(void* to, const Lanes& x) { std::memcpy(to, &x, sizeof x); }

template <bool WORDS>
HB_INLINE void multiply_add(Lanes& sum, const Lanes& b, const Lanes& a) {
    if (WORDS) {
        int16_t x[2], y[2 * LANES];
        std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
        for (int j = 0; j < LANES; j++)
            sum.x[j] += static_cast<uint32_t>(x[0] * y[2 * j]) + static_cast<uint32_t>(x[1] * y[2 * j + 1]);
        return;
    }
    int8_t x[4];
    uint8_t y[4 * LANES];
    std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < 4; i++) sum.x[j] += static_cast<uint32_t>(x[i] * y[4 * j + i]);
}

#endif

// Out of line: inside a larger function GCC keeps the sums in memory.
template <int R, int V, bool WORDS>
HB_NOINLINE void run_tile(const RunTile& t) {
    Lanes sum[R * V];
    if (t.first)
        each<R * V>(HB_EACH(i) { sum[i] = lanes_at(t.first + i / V * PANEL + i % V * LANES); });
    else
        each<R * V>(HB_EACH(i) { sum[i] = lanes_of(0); });
    const char* row[R];
    each<R>(HB_EACH(r) { row[r] = t.a[r]; });
    for (int64_t i = 0; i < t.count; i++) {
        const char* b = t.b + t.runs[i].b;
        const int64_t end = t.runs[i].a + 4 * t.steps;
        for (int64_t at = t.runs[i].a; at < end; at += 4, b += V * LANES * 4) {
            Lanes panel[V];
            each<V>(HB_EACH(v) { panel[v] = lanes_at(b + v * LANES * 4); });
            each<R>(HB_EACH(r) {
                int32_t group;
                std::memcpy(&group, row[r] + at, 4);
                const Lanes all = lanes_of(group);
                each<V>(HB_EACH(v) { multiply_add<WORDS>(sum[r * V + v], panel[v], all); });
            });
        }
    }
    each<R * V>(HB_EACH(i) {
        constexpr int r = i / V, column = i % V * LANES;
        Lanes total = sum[i];
#if defined(HB_AVX512VNNI)
        total = left_shift(total, lanes_of(t.shift));
#endif
        total = plus(total, lanes_of(t.start[r]));
        if (t.last) total = plus(total, lanes_at(t.last + r * PANEL + column));
        if (t.add) total = plus(total, lanes_at(t.c[r] + column));
        put(t.c[r] + column, total);
    });
}

template <int V, bool WORDS>
HB_INLINE void run_rows(const RunTile& t, int rows) {
    static constexpr void (*table[])(const RunTile&) = {
        &run_tile<1, V, WORDS>, &run_tile<2, V, WORDS>, &run_tile<3, V, WORDS>, &run_tile<4, V, WORDS>,
#if defined(HB_AVX512VNNI)
        &run_tile<5, V, WORDS>, &run_tile<6, V, WORDS>,
#endif
    };
    table[rows - 1](t);
}

HB_INLINE void run_tiles(const RunTile& t, int rows, int vectors, bool words) {
#if defined(HB_AVX512VNNI)
    if (vectors == 4) return words ? run_rows<4, true>(t, rows) : run_rows<4, false>(t, rows);
#endif
    if (vectors == 2) return words ? run_rows<2, true>(t, rows) : run_rows<2, false>(t, rows);
    words ? run_rows<1, true>(t, rows) : run_rows<1, false>(t, rows);
}

// The groups of A with codes above (0) and below (1) the window, line after line of A; starts[side][i]: where line i's
// begin. A place is a group's number among those of B.
struct Lists {
    int32_t *groups[2], *places[2], *starts[2];
    int64_t count[2];

    // In memory of so many bytes: for lines with `steps` groups in all. A vector store may write 16 too many.
    static int64_t bytes(int64_t lines, int64_t steps) { return 8 * (2 * (steps + 16) + lines + 1); }
    void place(char* memory, int64_t lines, int64_t steps) {
        auto* at = reinterpret_cast<int32_t*>(memory);
        for (int side = 0; side < 2; side++) {
            groups[side] = at, places[side] = at + steps + 16, starts[side] = at + 2 * (steps + 16);
            at += 2 * (steps + 16) + lines + 1;
            count[side] = 0;
        }
    }
    void begin_line(int64_t line) {
        for (int side = 0; side < 2; side++) starts[side][line] = static_cast<int32_t>(count[side]);
    }
};

// Entries of a list that lie one after another, and where the panel would begin for a group of place 0.
struct Stretch {
    int32_t begin, end;
    const char* b;
};

#if defined(HB_AVX512VNNI)

// The sum of the products of a row's entries, shifted.
template <int V>
HB_NOINLINE void sparse_run(const int32_t* groups, const int32_t* places, const Stretch* stretches, int64_t count,
                            int shift, int32_t* out) {
    __m512i sum[V];
    each<V>(HB_EACH(v) { sum[v] = _mm512_setzero_si512(); });
    for (int64_t s = 0; s < count; s++)
        for (int64_t i = stretches[s].begin; i < stretches[s].end; i++) {
            const __m512i all = _mm512_set1_epi32(groups[i]);
            const char* panel = stretches[s].b + static_cast<int64_t>(places[i]) * (V * 64);
            each<V>(HB_EACH(v) { multiply_add<false>(sum[v], _mm512_loadu_si512(panel + v * 64), all); });
        }
    const __m512i by = _mm512_set1_epi32(shift);
    each<V>(HB_EACH(v) { _mm512_storeu_si512(out + v * LANES, left_shift(sum[v], by)); });
}

HB_INLINE void sparse_runs(const Lists& lists, int side, const Stretch* stretches, int64_t count, int vectors,
                           int32_t* out) {
    const int32_t *groups = lists.groups[side], *places = lists.places[side];
    const int shift = side ? 0 : 8;
    if (vectors == 4) sparse_run<4>(groups, places, stretches, count, shift, out);
    if (vectors == 2) sparse_run<2>(groups, places, stretches, count, shift, out);
    if (vectors == 1) sparse_run<1>(groups, places, stretches, count, shift, out);
}

// n codes to the window's bytes, in place allowed; returns their sum. Group i has place places[i] + base.
HB_INLINE int32_t split_line(const Choice& how, const uint8_t* codes, int64_t n, uint8_t* to, const int32_t* places,
                             int32_t base, Lists* lists) {
    const __m512i ones = _mm512_set1_epi8(1), add = _mm512_set1_epi32(base);
    __m512i total[2], inside = _mm512_setzero_si512();
    total[0] = total[1] = inside;
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 some = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
        const __m512i x = _mm512_maskz_loadu_epi8(some, codes + i), window = lookup(how.a, x);
        _mm512_mask_storeu_epi8(to + i, some, window);
        inside = _mm512_dpbusd_epi32(inside, ones, window);
        for (int side = 0; side < 2; side++) {
            if (!how.used[side]) continue;
            const __m512i rare = lookup(how.side[side], x);
            const __mmask16 where = _mm512_test_epi32_mask(rare, rare);
            if (!where) continue;
            total[side] = _mm512_dpbusd_epi32(total[side], ones, rare);
            const int64_t at = lists->count[side];
            const __m512i place = _mm512_add_epi32(_mm512_loadu_si512(places + i / 4), add);
            _mm512_storeu_si512(lists->groups[side] + at, _mm512_maskz_compress_epi32(where, rare));
            _mm512_storeu_si512(lists->places[side] + at, _mm512_maskz_compress_epi32(where, place));
            lists->count[side] += __builtin_popcount(where);
        }
    }
    if (!how.offset) return 0;
    const __m512i above = left_shift(total[0], _mm512_set1_epi32(8));
    const __m512i all = left_shift(_mm512_add_epi32(above, inside), _mm512_set1_epi32(how.shift));
    return static_cast<int32_t>(sum_lanes(_mm512_add_epi32(all, total[1])));
}

#endif

// n codes of A to numbers (in place, but for words); returns their sum where the offset of B wants it.
HB_INLINE int32_t read_line(const Choice& how, const uint8_t* codes, int64_t n, uint8_t* to,
                            [[maybe_unused]] const int32_t* places, [[maybe_unused]] int32_t base,
                            [[maybe_unused]] Lists* lists) {
    if (how.method == WORDS) {
        read_words(how.a, n, codes, reinterpret_cast<int16_t*>(to));
        return 0;
    }
#if defined(HB_AVX512VNNI)
    if (how.method == WINDOW) return split_line(how, codes, n, to, places, base, lists);
#endif
    read_bytes(how.a, n, to);
    return how.offset ? static_cast<int32_t>(sum_bytes(reinterpret_cast<char*>(to), n)) : 0;
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb

// From packed codes to the groups that gemm_tiles.inc.cpp multiplies.
namespace hb {
namespace HB_NS {
namespace {

HB_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that a thread keeps and uses again; what is larger than KEPT is given back after use.
struct Scratch {
    static constexpr size_t KEPT = size_t{32} << 20;
    void* memory = nullptr;
    size_t size = 0;

    ~Scratch() { std::free(memory); }
    char* get(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = round_up(static_cast<int64_t>(bytes), 1 << 16);
            memory = std::aligned_alloc(4096, size);
            if (!memory) std::abort();
        }
        return static_cast<char*>(memory);
    }
    void trim() {
        if (size <= KEPT) return;
        std::free(memory);
        memory = nullptr;
        size = 0;
    }
};

// Low or high halves of as many bytes as T has, a vector of 16-bit words: the mask takes what words shift across bytes.
template <class T>
HB_INLINE void halves_of(const uint8_t* from, int shift, uint8_t* to) {
    T x;
    std::memcpy(&x, from, sizeof x);
    x = x >> shift & (T{} + uint16_t{0x0f0f});
    std::memcpy(to, &x, sizeof x);
}

// Low or high halves of n bytes. The last ones overlap those before: masked stores of bytes are slow.
HB_INLINE void halves(const uint8_t* from, int shift, int64_t n, uint8_t* to) {
    typedef uint16_t bytes16 __attribute__((vector_size(16)));
    typedef uint16_t bytes64 __attribute__((vector_size(64)));
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) halves_of<bytes64>(from + i, shift, to + i);
    if (i == n) return;
    if (n >= 16) {
        for (; i + 16 <= n; i += 16) halves_of<bytes16>(from + i, shift, to + i);
        halves_of<bytes16>(from + n - 16, shift, to + n - 16);
        return;
    }
    for (; i < n; i++) to[i] = static_cast<uint8_t>(from[i] >> shift & 15);
}

// The codes start ... start + n of a tensor, one to a byte.
HB_NOINLINE void unpack(const hb_codes& q, int64_t start, int64_t n, uint8_t* to) {
    if (q.bits > 4) {
        std::memcpy(to, q.codes + start, static_cast<size_t>(n));
        return;
    }
    const int64_t whole = q.numel / BLOCK * BLOCK, rest = q.numel - whole, middle = (rest + 1) / 2;
    while (n > 0) {
        const bool last = start >= whole;
        const int64_t half = last ? middle : BLOCK / 2;
        const int64_t j = last ? start - whole : start % BLOCK;
        const bool high = j >= half;
        const int64_t at = high ? j - half : j;
        const int64_t count = least(n, (last && high ? rest - middle : half) - at);
        halves(q.codes + (last ? whole : start - j) / 2 + at, high ? 4 : 0, count, to);
        start += count, to += count, n -= count;
    }
}

// How a byte that holds a code becomes a number.
struct Reading {
    bool nibbles;
    uint8_t bytes[16];   // as 8-bit numbers, offset included
    int16_t words[16];
    int flip, offset;    // codes of more than four bits: (code ^ flip) - flip + offset
    const int16_t* each; // of 256 codes, 16 bits of which one half is read; null for none
    bool upper;
};

// The upper digit of 16 bits in two signed ones of 8.
HB_INLINE int8_t upper_digit(int16_t x) { return static_cast<int8_t>((x + 128) >> 8); }

// n codes to the lower or upper digit of a table of 256, in place.
HB_INLINE void look_up(const int16_t* table, bool upper, int64_t n, uint8_t* x) {
    int64_t i = 0;
#if defined(HB_AVX512VNNI)
    __m512i part[8];
    for (int j = 0; j < 8; j++) part[j] = _mm512_loadu_si512(table + 32 * j);
    for (; i + 32 <= n; i += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
        __m512i found[4];
        for (int j = 0; j < 4; j++) found[j] = _mm512_permutex2var_epi16(part[2 * j], code, part[2 * j + 1]);
        const __mmask32 odd = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
        const __mmask32 high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
        __m512i word = _mm512_mask_blend_epi16(high, _mm512_mask_blend_epi16(odd, found[0], found[1]),
                                               _mm512_mask_blend_epi16(odd, found[2], found[3]));
        if (upper) word = _mm512_srai_epi16(_mm512_add_epi16(word, _mm512_set1_epi16(128)), 8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + i), _mm512_cvtepi16_epi8(word));
    }
#endif
    if (upper)
        for (; i < n; i++) x[i] = static_cast<uint8_t>(upper_digit(table[x[i]]));
    else
        for (; i < n; i++) x[i] = static_cast<uint8_t>(table[x[i]]);
}

HB_INLINE void read_bytes(const Reading& how, int64_t n, uint8_t* x) {
    int64_t i = 0;
    if (how.each) return look_up(how.each, how.upper, n, x);
    if (!how.nibbles) {
        const int flip = how.flip, add = how.offset - how.flip;
        for (; i < n; i++) x[i] = static_cast<uint8_t>((x[i] ^ flip) + add);
        return;
    }
#if defined(HB_AVX2)
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(how.bytes));
#if defined(HB_AVX512VNNI)
    const __m512i wide = _mm512_maskz_broadcast_i32x4(0xffff, table);
    for (; i + 64 <= n; i += 64)
        _mm512_storeu_si512(x + i, _mm512_shuffle_epi8(wide, _mm512_loadu_si512(x + i)));
#endif
    for (; i + 16 <= n; i += 16) {
        auto* at = reinterpret_cast<__m128i*>(x + i);
        _mm_storeu_si128(at, _mm_shuffle_epi8(table, _mm_loadu_si128(at)));
    }
#endif
    for (; i < n; i++) x[i] = how.bytes[x[i]];
}

HB_INLINE void read_words(const Reading& how, int64_t n, const uint8_t* x, int16_t* to) {
    int64_t i = 0;
    if (!how.nibbles) {
        const int flip = how.flip;
        for (; i < n; i++) to[i] = static_cast<int16_t>((x[i] ^ flip) - flip);
        return;
    }
#if defined(HB_AVX512VNNI)
    const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(how.words));
    const __m512i wide = _mm512_castsi256_si512(table);
    for (; i + 32 <= n; i += 32) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), wide));
    }
#elif defined(HB_AVX2)
    alignas(16) uint8_t low[16], high[16];
    for (int c = 0; c < 16; c++) {
        low[c] = static_cast<uint8_t>(how.words[c]);
        high[c] = static_cast<uint8_t>(static_cast<uint16_t>(how.words[c]) >> 8);
    }
    const __m128i lows = _mm_load_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i highs = _mm_load_si128(reinterpret_cast<const __m128i*>(high));
    for (; i + 16 <= n; i += 16) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
        const __m128i l = _mm_shuffle_epi8(lows, codes), h = _mm_shuffle_epi8(highs, codes);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_unpacklo_epi8(l, h));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + 8), _mm_unpackhi_epi8(l, h));
    }
#endif
    for (; i < n; i++) to[i] = how.words[x[i]];
}

// Four rows of bytes to n groups of four.
HB_INLINE void interleave_bytes(const uint8_t* const rows[4], int64_t n, uint8_t* to) {
    int64_t i = 0;
#if defined(HB_AVX2)
    for (; i + 16 <= n; i += 16) {
        __m128i x[4];
        for (int j = 0; j < 4; j++) x[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[j] + i));
        const __m128i a = _mm_unpacklo_epi8(x[0], x[1]), b = _mm_unpackhi_epi8(x[0], x[1]);
        const __m128i c = _mm_unpacklo_epi8(x[2], x[3]), d = _mm_unpackhi_epi8(x[2], x[3]);
        auto* at = reinterpret_cast<__m128i*>(to + 4 * i);
        _mm_storeu_si128(at, _mm_unpacklo_epi16(a, c));
        _mm_storeu_si128(at + 1, _mm_unpackhi_epi16(a, c));
        _mm_storeu_si128(at + 2, _mm_unpacklo_epi16(b, d));
        _mm_storeu_si128(at + 3, _mm_unpackhi_epi16(b, d));
    }
#endif
    for (; i < n; i++)
        for (int j = 0; j < 4; j++) to[4 * i + j] = rows[j][i];
}

// Lines of 32-bit groups, `apart` bytes from each other, to columns: group s of line j becomes group s * stride + j.
HB_INLINE void transpose_groups(const uint8_t* from, int64_t apart, int64_t lines, int64_t steps, int64_t stride,
                                char* to) {
    int64_t s = 0;
#if defined(HB_AVX2)
    for (; s + 4 <= steps; s += 4)
        for (int64_t j = 0; j < lines; j += 4) {  // lines: a multiple of 8
            __m128i x[4];
            for (int i = 0; i < 4; i++)
                x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (j + i) * apart + 4 * s));
            const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpackhi_epi32(x[0], x[1]);
            const __m128i c = _mm_unpacklo_epi32(x[2], x[3]), d = _mm_unpackhi_epi32(x[2], x[3]);
            const __m128i y[4] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                                  _mm_unpackhi_epi64(b, d)};
            for (int i = 0; i < 4; i++)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * ((s + i) * stride + j)), y[i]);
        }
#endif
    for (; s < steps; s++)
        for (int64_t j = 0; j < lines; j++) std::memcpy(to + 4 * (s * stride + j), from + j * apart + 4 * s, 4);
}

// Two rows of words to n groups of two.
HB_INLINE void interleave_words(const int16_t* first, const int16_t* second, int64_t n, uint8_t* to) {
    int64_t i = 0;
#if defined(HB_AVX2)
    for (; i + 8 <= n; i += 8) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + i));
        const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second + i));
        auto* at = reinterpret_cast<__m128i*>(to + 4 * i);
        _mm_storeu_si128(at, _mm_unpacklo_epi16(x, y));
        _mm_storeu_si128(at + 1, _mm_unpackhi_epi16(x, y));
    }
#endif
    for (; i < n; i++) {
        std::memcpy(to + 4 * i, first + i, 2);
        std::memcpy(to + 4 * i + 2, second + i, 2);
    }
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb

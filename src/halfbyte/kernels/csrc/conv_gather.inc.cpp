// What a convolution reads: an image with its channels last, and the rows of its unfolded matrix, made when needed.
namespace hb {
namespace HB_NS {
namespace {

#if defined(HB_AVX2)

// 16 rows of 16 bytes to 16 columns.
HB_INLINE void transpose_bytes(const uint8_t* from, int64_t row, uint8_t* to, int64_t column) {
    __m128i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * row));
    // Four times: rows i and i + 8 interleaved become rows 2 i and 2 i + 1.
    const auto interleave = [](const __m128i* in, __m128i* out) {
        for (int i = 0; i < 8; i++) {
            out[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 8]);
            out[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 8]);
        }
    };
    interleave(x, y), interleave(y, x), interleave(x, y), interleave(y, x);
    for (int i = 0; i < 16; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * column), x[i]);
}

#endif

// Some depths and heights of one image's channels: codes of (depth, height, width, channel).
struct Box {
    uint8_t* data;
    int64_t channels, from[2], size[2], width;

    int64_t bytes() const { return size[0] * size[1] * width * channels; }
};

// Fills a box from a packed tensor (..., C, D, H, W); `plane` counts (image, channel) pairs before the first channel.
HB_NOINLINE void fill_box(const hb_codes& q, int64_t plane, const int64_t* spatial, const Box& box) {
    constexpr int64_t RUN = 512;
    alignas(64) uint8_t rows[16][RUN];
    const int64_t volume = spatial[0] * spatial[1] * spatial[2], channels = box.channels;
    const int64_t length = box.size[1] * box.width;  // contiguous in the tensor and in the box
    for (int64_t d = 0; d < box.size[0]; d++)
        for (int64_t start = 0; start < length; start += RUN)
            for (int64_t c = 0; c < channels; c += 16) {
                const int64_t n = least(RUN, length - start), some = least(16, channels - c);
                const int64_t at = ((box.from[0] + d) * spatial[1] + box.from[1]) * spatial[2] + start;
                for (int64_t j = 0; j < some; j++) unpack(q, (plane + c + j) * volume + at, n, rows[j]);
                uint8_t* to = box.data + (d * length + start) * channels + c;
                int64_t i = 0;
#if defined(HB_AVX2)
                for (; some == 16 && i + 16 <= n; i += 16)
                    transpose_bytes(rows[0] + i, RUN, to + i * channels, channels);
#endif
                for (; i < n; i++)
                    for (int64_t j = 0; j < some; j++) to[i * channels + j] = rows[j][i];
            }
}

HB_INLINE void copy_bytes(const uint8_t* from, int64_t n, uint8_t* to) {
#if defined(HB_AVX512VNNI)
    for (; n > 64; n -= 64, from += 64, to += 64) _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    const __mmask64 some = ~__mmask64{0} >> (64 - n);
    _mm512_mask_storeu_epi8(to, some, _mm512_maskz_loadu_epi8(some, from));
#else
    std::memcpy(to, from, static_cast<size_t>(n));
#endif
}

HB_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// One part of a convolution in which every tap has a fixed offset: position j reads source j * step + offset(tap).
// fprop and wgrad have one. dgrad with a stride has one for each remainder of an input position by the stride, with the
// taps that reach it, so that nothing is multiplied with zeros between positions.
struct Phase {
    int64_t taps[3], step[3];
    int64_t first[3], apart[3];        // position j stands for first + j * apart in the result
    int64_t *offset[3], *index[3];     // of each tap: in the source, and among the kernel's
    int64_t length;                    // of the reduction
    int64_t packed;                    // where its weights begin

    int64_t all() const { return taps[0] * taps[1] * taps[2]; }
    // Tap t among the kernel's.
    int64_t tap(int64_t t, const int64_t* kernel) const {
        const int64_t x = index[2][t % taps[2]], y = index[1][t / taps[2] % taps[1]];
        return (index[0][t / taps[2] / taps[1]] * kernel[1] + y) * kernel[2] + x;
    }
};

// Fills phase `number`; `memory` takes the taps' numbers, 2 * sum of the kernel's lengths.
void set_phase(const hb_conv_shape& shape, bool gradient, int64_t number, int64_t* memory, Phase* phase) {
    for (int d = 2; d >= 0; d--) {
        const int64_t remainder = gradient ? number % shape.stride[d] : 0;
        if (gradient) number /= shape.stride[d];
        phase->step[d] = gradient ? 1 : shape.stride[d];
        phase->first[d] = remainder, phase->apart[d] = gradient ? shape.stride[d] : 1;
        phase->offset[d] = memory, phase->index[d] = memory + shape.kernel[d];
        memory += 2 * shape.kernel[d];
        int64_t taps = 0;
        for (int64_t t = 0; t < shape.kernel[d]; t++) {
            const int64_t reach = t * shape.dilation[d] - shape.padding[d];
            if (gradient && (remainder - reach) % shape.stride[d]) continue;
            phase->offset[d][taps] = gradient ? (remainder - reach) / shape.stride[d] : reach;
            phase->index[d][taps++] = t;
        }
        phase->taps[d] = taps;
    }
    phase->length = phase->all() * (gradient ? shape.fan_out : shape.fan_in);
}

// The unfolded matrix of one phase and box: a line for each position, on it the channels of each tap.
struct Gather {
    const Box* box;
    const Phase* phase;
    const int64_t* source;             // lengths of the image
    int64_t begin[3], count[3];        // positions
    static constexpr bool along = true;

    int64_t positions() const { return count[0] * count[1] * count[2]; }
    void place(int64_t line, int64_t* j) const {
        const auto rest = static_cast<uint32_t>(line);
        const auto w = static_cast<uint32_t>(count[2]), h = static_cast<uint32_t>(count[1]);
        const uint32_t row = rest / w;
        j[2] = begin[2] + rest % w, j[1] = begin[1] + row % h, j[0] = begin[0] + row / h;
    }
    void fetch(int64_t line, int64_t at, int64_t n, uint8_t* to) const {
        const int64_t channels = box->channels;
        const int64_t* taps = phase->taps;
        int64_t j[3];
        place(line, j);
        int64_t t = at / channels, c = at % channels;
        int64_t t2 = t % taps[2], t1 = t / taps[2] % taps[1], t0 = t / taps[2] / taps[1];
        while (n > 0) {
            const int64_t s0 = j[0] * phase->step[0] + phase->offset[0][t0];
            const int64_t s1 = j[1] * phase->step[1] + phase->offset[1][t1];
            const int64_t s2 = j[2] * phase->step[2] + phase->offset[2][t2];
            const int64_t some = least(n, channels - c);
            const int64_t row = (s0 - box->from[0]) * box->size[1] + s1 - box->from[1];
            const bool outside = static_cast<uint64_t>(s0) >= static_cast<uint64_t>(source[0]) ||
                                 static_cast<uint64_t>(s1) >= static_cast<uint64_t>(source[1]) ||
                                 static_cast<uint64_t>(s2) >= static_cast<uint64_t>(source[2]);
            if (outside)
                std::memset(to, 0, static_cast<size_t>(some));
            else
                copy_bytes(box->data + (row * box->width + s2) * channels + c, some, to);
            to += some, n -= some, c = 0;
            if (++t2 == taps[2]) {
                t2 = 0;
                if (++t1 == taps[1]) t1 = 0, t0++;
            }
        }
    }
};

// The depths and heights that positions begin ... end of the result read, in a box without memory.
Box box_for(const hb_conv_shape& shape, bool gradient, const int64_t* begin, const int64_t* end) {
    const int64_t* source = gradient ? shape.output : shape.input;
    Box box{nullptr, gradient ? shape.fan_out : shape.fan_in, {0, 0}, {0, 0}, source[2]};
    for (int d = 0; d < 2; d++) {
        const int64_t reach = (shape.kernel[d] - 1) * shape.dilation[d];
        int64_t low = begin[d] * shape.stride[d] - shape.padding[d];
        int64_t high = (end[d] - 1) * shape.stride[d] - shape.padding[d] + reach + 1;
        if (gradient) {
            low = floor_div(begin[d] + shape.padding[d] - reach, shape.stride[d]);
            high = floor_div(end[d] - 1 + shape.padding[d], shape.stride[d]) + 1;
        }
        box.from[d] = least(most(low, 0), source[d]);
        box.size[d] = most(0, least(high, source[d]) - box.from[d]);
    }
    return box;
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb

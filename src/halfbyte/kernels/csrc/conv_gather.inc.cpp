// What a convolution reads: images with their channels last and zeros around them, and the taps that read them.
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

HB_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// A piece of a result: some images, depths and heights, the whole width.
struct Part {
    int64_t image, images, begin[3], end[3];

    int64_t length(int d) const { return end[d] - begin[d]; }
    int64_t positions() const { return length(0) * length(1) * length(2); }
};

// What a part reads: (depth, height, width, image, channel), with zeros where it reaches beyond the images.
struct Box {
    int64_t images, from[3], size[3], channels;
    int64_t pitch;         // bytes of a position
    uint8_t *codes, *data; // the codes, `channels` to a position, and the numbers; the same memory but for words

    int64_t positions() const { return size[0] * size[1] * size[2] * images; }
    int64_t bytes() const { return positions() * pitch; }
    // A position's number, image 0, counted from the box's beginning.
    int64_t at(int64_t d, int64_t h, int64_t w) const {
        return (((d - from[0]) * size[1] + h - from[1]) * size[2] + w - from[2]) * images;
    }
};

// The box that a part of the result reads, in memory yet to be had.
Box box_for(const hb_conv_shape& shape, bool gradient, const Part& part, int64_t channels, int64_t pitch) {
    const int64_t* source = gradient ? shape.output : shape.input;
    Box box{part.images, {}, {}, channels, pitch, nullptr, nullptr};
    for (int d = 0; d < 3; d++) {
        const int64_t reach = (shape.kernel[d] - 1) * shape.dilation[d];
        int64_t low = part.begin[d] * shape.stride[d] - shape.padding[d];
        int64_t high = (part.end[d] - 1) * shape.stride[d] - shape.padding[d] + reach + 1;
        if (gradient) {
            low = floor_div(part.begin[d] + shape.padding[d] - reach, shape.stride[d]);
            high = floor_div(part.end[d] - 1 + shape.padding[d], shape.stride[d]) + 1;
        }
        if (d == 2) low = least(low, 0), high = most(high, source[2]);  // whole rows are unpacked
        box.from[d] = low, box.size[d] = most(0, high - low);
    }
    return box;
}

// Unpacks the codes of channels first ... first + box.channels of images `image` ... from a tensor (N, C, D, H, W) of
// `all` channels. Leaves alone what lies outside.
HB_NOINLINE void fill_box(const hb_codes& q, int64_t image, int64_t all, int64_t first, const int64_t* source,
                          const Box& box, int64_t pitch) {
    constexpr int64_t RUN = 512;
    alignas(64) uint8_t rows[16][RUN];
    const int64_t volume = source[0] * source[1] * source[2], channels = box.channels;
    const int64_t low = most(box.from[1], 0), high = least(box.from[1] + box.size[1], source[1]);
    const int64_t length = most(0, high - low) * source[2];  // contiguous in the tensor
    const int64_t step = box.images * pitch, jump = (box.size[2] - source[2]) * step;
    for (int64_t i = 0; i < box.images; i++)
        for (int64_t d = most(box.from[0], 0); d < least(box.from[0] + box.size[0], source[0]); d++)
            for (int64_t start = 0; start < length; start += RUN)
                for (int64_t c = 0; c < channels; c += 16) {
                    const int64_t n = least(RUN, length - start), some = least(16, channels - c);
                    const int64_t plane = (image + i) * all + first + c;
                    const int64_t in = (d * source[1] + low) * source[2] + start;
                    for (int64_t j = 0; j < some; j++) unpack(q, (plane + j) * volume + in, n, rows[j]);
                    int64_t w = start % source[2], k = 0;
                    uint8_t* to = box.codes + (box.at(d, low + start / source[2], w) + i) * pitch + c;
                    const auto next = [&] {
                        to += step;
                        if (++w == source[2]) w = 0, to += jump;
                    };
#if defined(HB_AVX2)
                    alignas(16) uint8_t columns[16][16];
                    for (; some == 16 && k + 16 <= n; k += 16) {
                        transpose_bytes(rows[0] + k, RUN, columns[0], 16);
                        for (int j = 0; j < 16; j++, next()) std::memcpy(to, columns[j], 16);
                    }
#endif
                    for (; k < n; k++, next())
                        for (int64_t j = 0; j < some; j++) to[j] = rows[j][k];
                }
}

// Positions of a convolution for which every tap has a fixed offset: position j reads source j * step + offset(tap).
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
        for (int64_t i = 0; i < shape.kernel[d]; i++) {
            const int64_t t = gradient ? shape.kernel[d] - 1 - i : i;  // so that the offsets rise
            const int64_t reach = t * shape.dilation[d] - shape.padding[d];
            if (gradient && (remainder - reach) % shape.stride[d]) continue;
            phase->offset[d][taps] = gradient ? (remainder - reach) / shape.stride[d] : reach;
            phase->index[d][taps++] = t;
        }
        phase->taps[d] = taps;
    }
    phase->length = phase->all() * (gradient ? shape.fan_out : shape.fan_in);
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb

// The gradient of a convolution's weight.
namespace hb {
namespace HB_NS {
namespace {

// The reduction of wgrad: every image in slabs of some rows, each filled up to a multiple of four.
struct Slabs {
    int64_t rows, height, width, volume;  // rows (depth, height) of the output in a slab, all of them; positions
    int64_t count, length, image;         // slabs of an image; places of a slab and of an image along the reduction

    Slabs(const hb_conv_shape& shape, int64_t padded) {
        width = shape.output[2], height = shape.output[0] * shape.output[1], volume = width * height;
        const int64_t fits = least(SLAB, PACKED_B / most(1, padded));
        rows = most(1, least(height, fits / most(1, width)));
        count = (height + rows - 1) / rows;
        length = round_up(rows * width, 4);
        image = (count - 1) * length + round_up(positions(count - 1), 4);
    }
    int64_t positions(int64_t slab) const { return least(rows, height - slab * rows) * width; }
    int64_t start(int64_t slab) const { return slab / count * image + slab % count * length; }  // of any image's
};

// A of wgrad: a line for each output channel of a group.
struct Gradient {
    const hb_codes* codes;
    const Slabs* slabs;
    int64_t first, channels;  // of the group; of an image
    static constexpr bool along = true;

    void fetch(int64_t line, int64_t at, int64_t n, uint8_t* to) const {
        while (n > 0) {
            const int64_t image = at / slabs->image, rest = at % slabs->image;
            const int64_t slab = least(rest / slabs->length, slabs->count - 1), in = rest - slab * slabs->length;
            const int64_t real = slabs->positions(slab), whole = round_up(real, 4);
            const int64_t plane = (image * channels + first + line) * slabs->volume;
            const int64_t some = least(n, (in < real ? real : whole) - in);
            if (in < real)
                unpack(*codes, plane + slab * slabs->rows * slabs->width + in, some, to);
            else
                std::memset(to, 0, static_cast<size_t>(some));
            to += some, at += some, n -= some;
        }
    }
};

// Unfolds and packs one slab; `from` is where the packed stretch begins along the reduction.
void pack_slab(const hb_conv_shape& shape, const hb_codes& x, const Phase& phase, const Slabs& slabs, int64_t slab,
               int64_t group, const Choice& how, int64_t from, const PackedB& b) {
    const int64_t image = slab / slabs.count, row = slab % slabs.count * slabs.rows;
    const int64_t last = least(row + slabs.rows, slabs.height) - 1, high = shape.output[1];
    const bool one = row / high == last / high;
    const int64_t begin[2] = {row / high, one ? row % high : 0};
    const int64_t end[2] = {last / high + 1, one ? last % high + 1 : high};
    Box box = box_for(shape, false, begin, end);
    box.data = reinterpret_cast<uint8_t*>(box_scratch.get(static_cast<size_t>(box.bytes() + 64)));
    fill_box(x, (image * shape.groups + group) * shape.fan_in, shape.input, box);
    const Gather lines{&box, &phase, shape.input, {0, 0, 0}, {shape.output[0], shape.output[1], shape.output[2]}};
    const int64_t stride = b.padded + 64, positions = slabs.positions(slab % slabs.count);
    auto* memory = reinterpret_cast<uint8_t*>(line_scratch.get(static_cast<size_t>(4 * stride)));
    uint8_t* const four[4] = {memory, memory + stride, memory + 2 * stride, memory + 3 * stride};
    const int64_t first = (slabs.start(slab) - from) / b.group, per_block = b.block / b.group;
    for (int64_t s = 0; s < round_up(positions, 4) / b.group; s++) {
        for (int j = 0; j < b.group; j++) {
            const int64_t line = s * b.group + j, have = line < positions ? b.columns : 0;
            if (have) lines.fetch(row * slabs.width + line, 0, have, four[j]);
            std::memset(four[j] + have, 0, static_cast<size_t>(stride - have));
        }
        pack_step(four, how, (first + s) / per_block, (first + s) % per_block, b);
    }
}

// float32(sum) * scale, from (taps, I) to (I, taps).
template <class T>
void store_weight(const T* sums, int64_t fan_in, int64_t taps, float scale, float* to) {
    for (int64_t i = 0; i < fan_in; i++)
        for (int64_t t = 0; t < taps; t++) to[i * taps + t] = static_cast<float>(sums[t * fan_in + i]) * scale;
}

}  // namespace

static int32_t convolve_weight(const hb_codes* a, const hb_codes* b, const hb_conv_shape* shape, int32_t* sums,
                               int64_t* wide, const float* scale, float* result, int32_t method) {
    const int64_t taps = shape->kernel[0] * shape->kernel[1] * shape->kernel[2], columns = taps * shape->fan_in;
    const Choice how = choose(*a, *b, columns, method);
    const int64_t out = shape->groups * shape->fan_out, all = out * columns;
    std::memset(sums, 0, static_cast<size_t>(all) * 4);
    if (wide) std::memset(wide, 0, static_cast<size_t>(all) * 8);
    const int64_t padded = padded_columns(columns);
    const Slabs slabs(*shape, padded);
    const int64_t kernel = shape->kernel[0] + shape->kernel[1] + shape->kernel[2];
    auto* numbers = static_cast<int64_t*>(std::malloc(static_cast<size_t>(2 * kernel) * sizeof(int64_t)));
    if (!numbers) std::abort();
    Phase phase;
    set_phase(*shape, false, 0, numbers, &phase);
    const int64_t fits = least(PACKED_B / most(1, padded) / (4 / group_of(how)), wide ? how.limit : INT64_MAX);
    const int64_t at_a_time = most(1, fits / most(1, slabs.length));
    const int64_t total = slabs.volume && all ? shape->images * slabs.count : 0;
    const Cut cut(most(1, shape->fan_out), most(1, columns));
    for (int64_t group = 0; group < shape->groups && total; group++) {
        const Gradient g{a, &slabs, group * shape->fan_out, out};
        int32_t* c = sums + group * shape->fan_out * columns;
        int64_t since = 0;  // products since the last flush
        for (int64_t slab = 0; slab < total; slab += at_a_time) {
            const int64_t stop = least(total, slab + at_a_time), from = slabs.start(slab);
            const int64_t until = stop == total ? shape->images * slabs.image : slabs.start(stop);
            const int64_t length = until - from;
            PackedB packed{nullptr, columns, padded, length, block_length(how), group_of(how)};
            packed.data = shared_scratch.get(static_cast<size_t>(PackedB::bytes(length, padded, packed.group)));
            parallel_for(stop - slab, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++)
                    pack_slab(*shape, *b, phase, slabs, slab + i, group, how, from, packed);
            });
            const int64_t next = stop == total ? 0 : (least(total, stop + at_a_time) - stop) * slabs.length;
            const bool flush = wide && (stop == total || since + length + next > how.limit), add = since > 0;
            cut.run([&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
                multiply_stretch(g, how, packed, from, row, rows, begin, end, c + row * columns, columns, add);
                for (int64_t r = row; flush && r < row + rows; r++) {
                    const int64_t at = r * columns + begin;
                    widen_row(c + at, end - begin, true, wide + (c - sums) + at);
                }
            });
            since = flush ? 0 : since + length;
        }
    }
    if (scale)
        parallel_for(all ? out : 0, 4, [&](int64_t begin, int64_t end) {
            for (int64_t o = begin; o < end; o++)
                if (wide)
                    store_weight(wide + o * columns, shape->fan_in, taps, *scale, result + o * columns);
                else
                    store_weight(sums + o * columns, shape->fan_in, taps, *scale, result + o * columns);
        });
    std::free(numbers);
    shared_scratch.trim();
    return how.method;
}

}  // namespace HB_NS
}  // namespace hb

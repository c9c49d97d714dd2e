// wgrad of a convolution of numbers. The reduction runs over images and positions. Where blocks run along the images,
// those of one block lie innermost, so that the products of a block are neighbors.
namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t NUMBER_SPAN = 64;                    // columns (input channels) that one task computes
constexpr int64_t NUMBER_IMAGES = 16;                  // that are read together where there are no blocks
constexpr int64_t NUMBER_BOX = int64_t{256} << 10;     // bytes of input that are read at a time, wanted at most
constexpr int64_t NUMBER_PARTS = int64_t{64} << 20;    // bytes of the sums of all parts

thread_local Scratch number_gradient_scratch;

template <class T>
struct NumberWeightPlan {
    const hb_conv_shape* shape;
    const float *a, *b;
    int64_t flush, taps, padded, spans, images, image_cuts, rows, row_cuts, parts;
    double* sums;  // (part, group, output channel, tap, padded columns)

    int64_t stretches() const { return image_cuts * shape->output[0] * row_cuts; }
    double* place(int64_t part, int64_t channel) const {
        return sums + (part * shape->groups * shape->fan_out + channel) * taps * padded;
    }
};

// Adds one stretch of the reduction (or begins with it): some images, and rows of one depth.
template <class T>
void number_stretch(const NumberWeightPlan<T>& plan, int64_t group, int64_t span, int64_t stretch, double* sums,
                    bool add) {
    const hb_conv_shape& shape = *plan.shape;
    const int64_t* out = shape.output;
    const int64_t cut = stretch % plan.row_cuts, depth = stretch / plan.row_cuts % out[0];
    const int64_t image = stretch / plan.row_cuts / out[0] * plan.images, first = span * NUMBER_SPAN;
    const int64_t images = least(plan.images, shape.images - image), begin = cut * plan.rows;
    const int64_t lines = least(plan.rows, out[1] - begin), length = out[2] * images;
    const Part part{image, images, {depth, begin, 0}, {depth + 1, begin + lines, out[2]}};
    const int64_t have = least(NUMBER_SPAN, shape.fan_in - first), pitch = number_columns(have);
    Box box = box_for(shape, false, part, have, 0);
    const size_t numbers = static_cast<size_t>(box.positions() * pitch);
    T* data = reinterpret_cast<T*>(number_box_scratch.get((numbers + 1) * sizeof(T)));
    std::memset(data, 0, numbers * sizeof(T));
    for (int64_t i = 0; i < images; i++)
        fill_numbers(plan.b, image + i, shape.groups * shape.fan_in, group * shape.fan_in + first, have, shape.input,
                     box, pitch, i * pitch, data);
    const int64_t volume = out[0] * out[1] * out[2], channels = shape.groups * shape.fan_out, row = lines * length;
    T* gradient = reinterpret_cast<T*>(
        number_gradient_scratch.get(static_cast<size_t>(shape.fan_out * row) * sizeof(T)));
    for (int64_t o = 0; o < shape.fan_out; o++) {
        const float* from = plan.a + (image * channels + group * shape.fan_out + o) * volume;
        turn(from + (depth * out[1] + begin) * out[2], channels * volume, images, lines * out[2], gradient + o * row,
             images);
    }
    // So many lines at a time that what a tap reads stays in the nearest cache.
    const int64_t some_lines = most(1, 192 / most(1, length)), step = shape.stride[2];
    auto* runs = reinterpret_cast<Run*>(
        number_list_scratch.get(static_cast<size_t>(some_lines * out[2]) * sizeof(Run)));
    for (int64_t line = 0; line < lines; line += some_lines) {
        const int64_t count = least(some_lines, lines - line);
        for (int64_t tap = 0; tap < plan.taps; tap++) {
            const int64_t t[3] = {tap / shape.kernel[2] / shape.kernel[1], tap / shape.kernel[2] % shape.kernel[1],
                                  tap % shape.kernel[2]};
            int64_t at[3];
            for (int d = 0; d < 3; d++) at[d] = t[d] * shape.dilation[d] - shape.padding[d];
            NumberTile<T> tile{};
            tile.apart = pitch, tile.flush = images, tile.runs = runs, tile.add = add || line > 0;
            for (int64_t y = 0; y < count; y++) {
                const int64_t b = box.at(depth * shape.stride[0] + at[0], (begin + line + y) * shape.stride[1] + at[1],
                                         at[2]) * pitch;
                if (step == 1) runs[tile.count++] = {y * length, b};
                for (int64_t w = 0; step > 1 && w < out[2]; w++)
                    runs[tile.count++] = {y * length + w * images, b + w * step * images * pitch};
            }
            tile.steps = step == 1 ? length : images;
            for (int64_t column = 0; column < pitch; column += WIDTH) {
                const int64_t width = number_width(pitch, column);
                const int many = tile_rows(width);
                tile.b = data + column;
                for (int64_t o = 0; o < shape.fan_out; o += many) {
                    const int some = static_cast<int>(least(many, shape.fan_out - o));
                    for (int j = 0; j < some; j++) {
                        tile.a[j] = gradient + (o + j) * row + line * length;
                        tile.c[j] = sums + ((o + j) * plan.taps + tap) * plan.padded + first + column;
                    }
                    number_tiles(tile, some, width);
                }
            }
        }
    }
}

template <class T>
void number_weight(const float* a, const float* b, const hb_conv_shape& shape, int64_t flush, const Finish& finish,
                   float* out) {
    NumberWeightPlan<T> plan{&shape, a, b, flush, shape.kernel[0] * shape.kernel[1] * shape.kernel[2],
                             number_columns(shape.fan_in), (shape.fan_in + NUMBER_SPAN - 1) / NUMBER_SPAN,
                             flush ? flush : NUMBER_IMAGES, 0, 0, 0, 1, nullptr};
    const int64_t *output = shape.output, all = shape.groups * shape.fan_out, size = all * plan.taps * plan.padded;
    plan.images = most(1, least(plan.images, shape.images));
    plan.image_cuts = (shape.images + plan.images - 1) / plan.images;
    const int64_t reach = (shape.kernel[1] - 1) * shape.dilation[1], width = shape.input[2] + 2 * shape.padding[2];
    const int64_t line = shape.kernel[0] * width * plan.images * least(NUMBER_SPAN, plan.padded) * 4;
    plan.rows = most(1, least(output[1], (NUMBER_BOX / most(1, line) - reach) / shape.stride[1]));
    plan.row_cuts = (output[1] + plan.rows - 1) / plan.rows;
    const int64_t stretches = output[2] ? plan.stretches() : 0, tasks = shape.groups * plan.spans;
    plan.parts = most(1, least(least(stretches, 8 / most(1, tasks)), NUMBER_PARTS / most(1, size * 8)));
    const size_t bytes = static_cast<size_t>(most(1, plan.parts * size)) * 8;
    plan.sums = reinterpret_cast<double*>(shared_scratch.get(bytes));
    if (!stretches) std::memset(plan.sums, 0, bytes);
    parallel_for(stretches ? tasks * plan.parts : 0, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t part = task / tasks, group = task % tasks / plan.spans, span = task % plan.spans;
            const int64_t from = stretches * part / plan.parts, until = stretches * (part + 1) / plan.parts;
            double* sums = plan.place(part, group * shape.fan_out);
            for (int64_t i = from; i < until; i++) number_stretch(plan, group, span, i, sums, i > from);
        }
    });
    parallel_for(all, 4, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++)
            for (int64_t tap = 0; tap < plan.taps; tap++)
                for (int64_t i = 0; i < shape.fan_in; i++) {
                    double sum = 0;
                    for (int64_t part = 0; part < plan.parts; part++)
                        sum += plan.place(part, o)[tap * plan.padded + i];
                    out[(o * shape.fan_in + i) * plan.taps + tap] = finish(sum);
                }
    });
    shared_scratch.trim();
}

}  // namespace

static void convolve_weight_numbers(const float* a, const float* b, const hb_conv_shape* shape, int64_t flush,
                                    int32_t power, double scales, int32_t twice, float* out) {
    const Finish finish(power, scales, twice);
    if (flush) number_weight<float>(a, b, *shape, flush, finish, out);
    else number_weight<double>(a, b, *shape, flush, finish, out);
}

}  // namespace HB_NS
}  // namespace hb

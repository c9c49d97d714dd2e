// fprop and dgrad of a convolution of numbers: what a part of an image's result reads is laid out with channels last
// and zeros around; a tap is then an offset to where a row's numbers begin.
namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t NUMBER_PART = int64_t{256} << 10;  // bytes of sums that are computed at a time
constexpr int64_t NUMBER_NEAR = int64_t{24} << 10;   // and of B that are multiplied at a time

thread_local Scratch number_box_scratch, number_list_scratch;

// Channels first ... first + channels of one image to the box, place `offset` of `pitch` numbers for each position.
template <class T>
void fill_numbers(const float* x, int64_t image, int64_t all, int64_t first, int64_t channels, const int64_t* source,
                  const Box& box, int64_t pitch, int64_t offset, T* to) {
    constexpr int64_t LENGTH = 256;
    const int64_t volume = source[0] * source[1] * source[2], width = source[2];
    const int64_t low = most(box.from[1], 0), high = least(box.from[1] + box.size[1], source[1]);
    const int64_t length = most(0, high - low) * width, step = box.images * pitch;
    for (int64_t c = 0; c < channels; c += 16) {
        const int64_t some = least(16, channels - c);
        const float* plane = x + (image * all + first + c) * volume;
        for (int64_t d = most(box.from[0], 0); d < least(box.from[0] + box.size[0], source[0]); d++)
            for (int64_t start = 0; start < length; start += LENGTH) {
                alignas(64) float turned[LENGTH][16];
                const int64_t n = least(LENGTH, length - start);
                turn(plane + (d * source[1] + low) * width + start, volume, some, n, turned[0], 16);
                int64_t w = start % width;
                T* at = to + box.at(d, low + start / width, w) * pitch + offset + c;
                for (int64_t k = 0; k < n; k++) {
                    if (some == 16) widened(turned[k], 16, at);
                    else widened(turned[k], some, at);
                    at += step;
                    if (++w == width) w = 0, at += (box.size[2] - width) * step;
                }
            }
    }
}

// What the parts of a convolution share.
template <class T>
struct NumberPlan {
    const hb_conv_shape* shape;
    const float* a;
    bool gradient;
    int64_t fan, channels, padded, flush;  // of a group: what is read, and of the result, with the last panel's padding
    const int64_t *source, *result;
    const Phase* phases;
    int64_t phase_count;
    T* packed;
    int64_t packed_group;                  // numbers of one group's weights
    int64_t rows, cuts;                    // of the height that are computed at a time, and how often
    Finish finish;
    float* out;

    T* panel(int64_t group, const Phase& phase, int64_t column) const {
        return packed + group * packed_group + phase.packed + phase.all() * fan * column;
    }
};

template <class T>
void pack_number_weights(const NumberPlan<T>& plan, const float* weight, int64_t group, const Phase& phase,
                         int64_t column) {
    const hb_conv_shape& shape = *plan.shape;
    const int64_t taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
    const int64_t width = number_width(plan.padded, column), have = least(width, plan.channels - column);
    // From one channel of the result, and of what is read, to the next.
    const int64_t next = plan.gradient ? taps : shape.fan_in * taps, inner = plan.gradient ? shape.fan_in * taps : taps;
    T* to = plan.panel(group, phase, column);
    const float* first = weight + group * shape.fan_out * shape.fan_in * taps + column * next;
    for (int64_t t = 0; t < phase.all(); t++) {
        const int64_t tap = phase.tap(t, shape.kernel);
        for (int64_t k = 0; k < plan.fan; k++, to += width)
            for (int64_t j = 0; j < width; j++) to[j] = j < have ? first[j * next + k * inner + tap] : 0;
    }
}

// Sums of positions by channels to a tensor whose channels come first.
HB_NOINLINE void store_numbers(const double* sums, int64_t n, int64_t stride, int64_t have, int64_t volume,
                               const Finish& finish, float* out) {
    alignas(64) float some[16][16];
    for (int64_t c = 0; c < have; c += 16)
        for (int64_t k = 0; k < n; k += 16) {
            const int64_t rows = least(16, n - k), columns = least(16, have - c);
            for (int64_t r = 0; r < rows; r++) {
                if (columns == 16) finish.row(sums + (k + r) * stride + c, 16, some[r]);
                else finish.row(sums + (k + r) * stride + c, columns, some[r]);
            }
            turn(some[0], 16, rows, columns, out + c * volume + k, volume);
        }
}

// One panel of all rows of a phase. Of B so much is read at a time that it stays near: some taps, or a part of one.
template <class T>
void number_panel(const NumberPlan<T>& plan, const Phase& phase, const Box& box, const Run* rows, int64_t count,
                  const T* data, const T* panel, int64_t column, Run* runs, double* sums) {
    NumberTile<T> t{};
    t.apart = number_width(plan.padded, column), t.b = panel, t.runs = runs, t.flush = plan.flush;
    const int64_t fits = NUMBER_NEAR / static_cast<int64_t>(sizeof(T)) / t.apart, taps = phase.all(), fan = plan.fan;
    const int64_t length = fan <= fits ? most(1, fan) : plan.flush ? most(1, 128 / plan.flush) * plan.flush : 128;
    const int64_t at_a_time = fan <= fits ? fits / most(1, fan) : 1;
    const int many = tile_rows(t.apart);
    for (int64_t first = 0; first < most(1, taps); first += at_a_time)
        for (int64_t from = 0; from < most(1, fan); from += length) {  // no channels: the sums become zero
            t.count = 0, t.steps = least(length, fan - from), t.add = first > 0 || from > 0;
            for (int64_t tap = first; tap < least(taps, first + at_a_time); tap++) {
                const int64_t t2 = tap % phase.taps[2], t1 = tap / phase.taps[2] % phase.taps[1];
                const int64_t t0 = tap / phase.taps[2] / phase.taps[1];
                const int64_t height = phase.offset[0][t0] * box.size[1] + phase.offset[1][t1];
                runs[t.count++] = {(height * box.size[2] + phase.offset[2][t2]) * fan + from,
                                   (tap * fan + from) * t.apart};
            }
            for (int64_t r = 0; r < count; r += many) {
                const int some = static_cast<int>(least(many, count - r));
                for (int j = 0; j < some; j++)
                    t.a[j] = data + rows[r + j].a, t.c[j] = sums + rows[r + j].b * plan.padded + column;
                number_tiles(t, some, t.apart);
            }
        }
}

// One part of one image and group.
template <class T>
void number_part(const NumberPlan<T>& plan, int64_t group, int64_t image, int64_t depth, int64_t cut) {
    const hb_conv_shape& shape = *plan.shape;
    const int64_t *result = plan.result, begin1 = cut * plan.rows, end1 = least(result[1], begin1 + plan.rows);
    const Part part{image, 1, {depth, begin1, 0}, {depth + 1, end1, result[2]}};
    Box box = box_for(shape, plan.gradient, part, plan.fan, 0);
    const size_t numbers = static_cast<size_t>(box.positions() * plan.fan);
    T* data = reinterpret_cast<T*>(number_box_scratch.get((numbers + 1) * sizeof(T)));
    std::memset(data, 0, numbers * sizeof(T));
    fill_numbers(plan.a, image, shape.groups * plan.fan, group * plan.fan, plan.fan, plan.source, box, plan.fan, 0,
                 data);
    const int64_t positions = part.positions(), taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
    auto* sums = reinterpret_cast<double*>(number_sums_scratch.get(static_cast<size_t>(positions * plan.padded) * 8));
    auto* runs = reinterpret_cast<Run*>(number_list_scratch.get(static_cast<size_t>(taps + positions) * sizeof(Run)));
    Run* rows = runs + taps;  // where a row begins in the box, and its place among the sums
    for (int64_t i = 0; i < plan.phase_count; i++) {
        const Phase& phase = plan.phases[i];
        int64_t count = 0, from[3], to[3];
        for (int d = 0; d < 3; d++) {
            const int64_t apart = phase.apart[d], more = apart - 1 - phase.first[d];
            from[d] = most(0, floor_div(part.begin[d] + more, apart));
            to[d] = floor_div(part.end[d] + more, apart);
        }
        const auto place = [&](int d, int64_t j) { return phase.first[d] + j * phase.apart[d] - part.begin[d]; };
        for (int64_t j0 = from[0]; j0 < to[0]; j0++)
            for (int64_t j1 = from[1]; j1 < to[1]; j1++)
                for (int64_t j2 = from[2]; j2 < to[2]; j2++) {
                    const int64_t at = box.at(j0 * phase.step[0], j1 * phase.step[1], j2 * phase.step[2]);
                    rows[count++] = {at * plan.fan, (place(0, j0) * part.length(1) + place(1, j1)) * part.length(2) +
                                                        place(2, j2)};
                }
        for (int64_t column = 0; column < plan.padded; column += WIDTH)
            number_panel(plan, phase, box, rows, count, data, plan.panel(group, phase, column), column, runs, sums);
    }
    const int64_t volume = result[0] * result[1] * result[2];
    float* out = plan.out + (image * shape.groups + group) * plan.channels * volume +
                 (depth * result[1] + begin1) * result[2];
    store_numbers(sums, positions, plan.padded, plan.channels, volume, plan.finish, out);
}

template <class T>
void number_convolution(const float* a, const float* b, const hb_conv_shape& shape, bool gradient, int64_t flush,
                        const Finish& finish, float* out) {
    const int64_t phases = gradient ? shape.stride[0] * shape.stride[1] * shape.stride[2] : 1;
    const int64_t kernel = shape.kernel[0] + shape.kernel[1] + shape.kernel[2];
    const size_t size = static_cast<size_t>(phases) * (sizeof(Phase) + static_cast<size_t>(2 * kernel) * 8);
    auto* phase = static_cast<Phase*>(std::malloc(size));
    if (!phase) std::abort();
    const int64_t channels = gradient ? shape.fan_in : shape.fan_out;
    NumberPlan<T> plan{&shape, a, gradient, gradient ? shape.fan_out : shape.fan_in, channels, number_columns(channels),
                       flush, gradient ? shape.output : shape.input, gradient ? shape.input : shape.output, phase,
                       phases, nullptr, 0, 0, 0, finish, out};
    auto* numbers = reinterpret_cast<int64_t*>(phase + phases);
    for (int64_t i = 0; i < phases; i++) {
        set_phase(shape, gradient, i, numbers + i * 2 * kernel, phase + i);
        phase[i].packed = plan.packed_group;
        plan.packed_group += phase[i].all() * plan.fan * plan.padded;
    }
    const size_t all = static_cast<size_t>(most(1, shape.groups * plan.packed_group)) * sizeof(T);
    plan.packed = reinterpret_cast<T*>(shared_scratch.get(all));
    const int64_t panels = (plan.padded + WIDTH - 1) / WIDTH;
    parallel_for(shape.groups * phases * panels, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            pack_number_weights(plan, b, i / panels / phases, phase[i / panels % phases], i % panels * WIDTH);
    });
    const int64_t* result = plan.result;
    plan.rows = most(1, NUMBER_PART / most(1, result[2] * plan.padded * 8));
    plan.cuts = (result[1] + plan.rows - 1) / plan.rows;
    const int64_t tasks = shape.images * result[0] * plan.cuts;
    parallel_for(channels && result[2] ? shape.groups * tasks : 0, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t task = i / shape.groups, depth = task / plan.cuts;
            number_part(plan, i % shape.groups, depth / result[0], depth % result[0], task % plan.cuts);
        }
    });
    std::free(phase);
    shared_scratch.trim();
}

}  // namespace

static void convolve_numbers(const float* a, const float* b, const hb_conv_shape* shape, int32_t gradient,
                             int64_t flush, int32_t power, double scales, int32_t twice, float* out) {
    const Finish finish(power, scales, twice);
    if (flush) number_convolution<float>(a, b, *shape, gradient != 0, flush, finish, out);
    else number_convolution<double>(a, b, *shape, gradient != 0, flush, finish, out);
}

}  // namespace HB_NS
}  // namespace hb

// The gradient of a convolution's weight.
//
// The reduction is cut into stretches: some images, or rows of one. Of a stretch, for a panel of input channels, each
// tap would read a matrix of its own. All taps of one place in the kernel's width share one, made of whole rows: what
// lies apart in the height is only rows apart. Where a stride is in the height, so is a matrix for each remainder.
namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t STRETCH = 1024;  // positions of the output that are summed at a time, unless a row is longer
constexpr int64_t TASKS = 8;       // wanted at least: with fewer panels the reduction is cut and its parts are added

constexpr int64_t SPAN_TAPS = 18;  // panels times taps that use a gradient once unpacked

thread_local Scratch gradient_scratch, matrix_scratch;

// All that wgrad knows before the first stretch.
struct WeightPlan {
    const hb_conv_shape *given, *shape;
    Choice how;
    const hb_codes *a, *b;
    int64_t taps, columns, padded;
    int64_t spans, span;      // cuts of the columns, and panels in each but the last
    int64_t *copy, *rows;     // of each tap in the height: which of the matrices, and rows from its beginning
    int64_t copies, reach;    // matrices of each place in depth and width; rows that each has more than the output
    int64_t parts, stretches; // of the reduction
    int64_t image_parts, parts1;
    int64_t planes, plane;    // of the gradient's numbers; sums from one to the next
    int32_t* sums;            // (plane, group, span, part, panel, output channel, tap, panel's columns)
    int64_t* wide;            // the same; null where 32 bits hold every sum

    Part stretch(int64_t i) const {
        const int64_t* out = shape->output;
        if (image_parts) {
            const int64_t image = shape->images * i / image_parts;
            return {image, shape->images * (i + 1) / image_parts - image, {0, 0, 0}, {out[0], out[1], out[2]}};
        }
        const int64_t p1 = i % parts1, d = i / parts1 % out[0];
        return {i / parts1 / out[0], 1, {d, out[1] * p1 / parts1, 0}, {d + 1, out[1] * (p1 + 1) / parts1, out[2]}};
    }
    int64_t width(int64_t panel) const { return least(PANEL, padded - panel * PANEL); }
    // Columns of a span's panels.
    int64_t span_width(int64_t i) const { return least(span * PANEL, padded - i * span * PANEL); }
    // Where a task's sums begin, in those of all.
    int64_t place(int64_t group, int64_t i, int64_t part) const {
        return shape->fan_out * taps * (parts * (group * padded + i * span * PANEL) + part * span_width(i));
    }
};

// Sizes of a stretch: planes (image, depth), rows, groups of a row; bytes of a matrix' row, plane and all.
struct Sizes {
    int64_t planes, height, groups, row, plane, matrix;

    Sizes(const WeightPlan& plan, const Part& part, int64_t width) {
        planes = part.images * part.length(0), height = part.length(1);
        groups = round_up(part.length(2), 4) / group_of(plan.how);
        row = groups * width * 4, plane = (height + plan.reach) * row, matrix = planes * plane;
    }
    int64_t steps() const { return planes * height * groups; }
};

// Makes the matrices of one stretch and panel.
void make_matrices(const WeightPlan& plan, const Part& part, int64_t group, int64_t panel, const Sizes& sizes,
                   char* matrices) {
    const hb_conv_shape& shape = *plan.shape;
    const bool words = plan.how.method == WORDS;
    const int64_t width = plan.width(panel), pitch = width * (words ? 2 : 1), column = panel * PANEL;
    Box box = box_for(shape, false, part, least(width, plan.columns - column), pitch);
    const int64_t bytes = box.bytes(), numbers = box.positions() * width;
    box.data = reinterpret_cast<uint8_t*>(box_scratch.get(static_cast<size_t>(bytes + 64)));
    box.codes = box.data + bytes - numbers;  // the end of the memory: numbers that are longer overwrite codes once read
    std::memset(box.codes, 0, static_cast<size_t>(numbers));
    fill_box(*plan.b, part.image, shape.groups * shape.fan_in, group * shape.fan_in + column, shape.input, box, width);
    if (words)
        read_words(plan.how.b, numbers, box.codes, reinterpret_cast<int16_t*>(box.data));
    else
        read_bytes(plan.how.b, numbers, box.data);
    const int64_t* kernel = shape.kernel;
    const int of = group_of(plan.how);
    for (int64_t t0 = 0; t0 < kernel[0]; t0++)
        for (int64_t t1 = 0; t1 < kernel[1]; t1++) {
            // The tap that names a matrix is the first; how many rows it needs, the last.
            int64_t last = t1;
            for (int64_t t = 0; t < kernel[1]; t++)
                if (plan.copy[t] == plan.copy[t1]) last = t < t1 ? -1 : most(last, t);
            if (last < t1) continue;
            for (int64_t t2 = 0; t2 < kernel[2]; t2++)
                for (int64_t p = 0; p < sizes.planes; p++)
                    for (int64_t y = 0; y < sizes.height + plan.rows[last] - plan.rows[t1]; y++) {
                        const int64_t image = p / part.length(0), depth = part.begin[0] + p % part.length(0);
                        const int64_t d = depth * shape.stride[0] + t0 * shape.dilation[0] - shape.padding[0];
                        const int64_t above = t1 * shape.dilation[1] - shape.padding[1];
                        const int64_t h = (part.begin[1] + y) * shape.stride[1] + above;
                        const int64_t w = t2 * shape.dilation[2] - shape.padding[2];
                        const uint8_t* from = box.data + (box.at(d, h, w) + image) * pitch;
                        const int64_t step = shape.stride[2] * part.images * pitch;
                        auto* to = reinterpret_cast<uint8_t*>(matrices) +
                                   ((t0 * plan.copies + plan.copy[t1]) * kernel[2] + t2) * sizes.matrix +
                                   p * sizes.plane + (y + plan.rows[t1]) * sizes.row;
                        for (int64_t s = 0; s < sizes.groups; s++, to += 4 * width) {
                            const uint8_t* rows[4];  // beyond the width the gradient is zero: any numbers will do
                            for (int k = 0; k < of; k++)
                                rows[k] = s * of + k < part.length(2) ? from + (s * of + k) * step : from;
                            if (words)
                                interleave_words(reinterpret_cast<const int16_t*>(rows[0]),
                                                 reinterpret_cast<const int16_t*>(rows[1]), width, to);
                            else
                                interleave_bytes(rows, width, to);
                        }
                    }
        }
}

// Some output channels of the gradient in one stretch.
struct GradientRows {
    uint8_t* data;
    int64_t rows, pitch; // bytes of a row
    int32_t* start;      // -offset times the row's sum
    Lists lists;         // a line: a row

    void read(const WeightPlan& plan, int64_t plane, const Part& part, int64_t first, int64_t count,
              const Sizes& sizes, const int32_t* places) {
        Choice how = plan.how;
        if (how.a.each) how.a.each += 256 * (plane / 2), how.a.upper = plane % 2 != 0;
        rows = count;
        const hb_conv_shape& shape = *plan.shape;
        const bool words = plan.how.method == WORDS;
        const int64_t n = sizes.steps() * group_of(plan.how), width = shape.output[2], whole = round_up(width, 4);
        const int64_t volume = shape.output[0] * shape.output[1] * width, channels = shape.groups * shape.fan_out;
        pitch = round_up(4 * sizes.steps(), 64) + 64;
        data = reinterpret_cast<uint8_t*>(gradient_scratch.get(static_cast<size_t>(rows * (pitch + 4) + n + 64)));
        start = reinterpret_cast<int32_t*>(data + rows * pitch);
        auto* codes = reinterpret_cast<uint8_t*>(start + rows);
        if (plan.how.method == WINDOW)
            lists.place(list_scratch.get(static_cast<size_t>(2 * Lists::bytes(rows, rows * sizes.steps()))), rows,
                        rows * sizes.steps());
        if (whole != width) std::memset(codes, 0, static_cast<size_t>(n));
        for (int64_t r = 0; r < rows; r++) {
            uint8_t* to = words ? codes : data + r * pitch;
            if (!words && whole != width) std::memset(to, 0, static_cast<size_t>(n));
            for (int64_t p = 0; p < sizes.planes; p++) {
                const int64_t image = part.image + p / part.length(0), d = part.begin[0] + p % part.length(0);
                const int64_t line = d * shape.output[1] + part.begin[1];
                const int64_t at = (image * channels + first + r) * volume + line * width;
                const int64_t lines = whole == width ? 1 : sizes.height, n_line = sizes.height / lines * width;
                for (int64_t y = 0; y < lines; y++)
                    unpack(*plan.a, at + y * width, n_line, to + (p * sizes.height + y) * whole);
            }
            if (plan.how.method == WINDOW) lists.begin_line(r);
            start[r] = -plan.how.offset * read_line(how, to, n, data + r * pitch, places, 0, &lists);
        }
        if (plan.how.method == WINDOW) lists.begin_line(rows);
    }
};

// Rows of the gradient by one tap's panel, t->b.
void multiply_gradient(const WeightPlan& plan, const GradientRows& g, int32_t* sums, int64_t stride, int vectors,
                       RunTile* t) {
#if defined(HB_AVX512VNNI)
    alignas(64) int32_t beyond[2][ROWS * PANEL];
#endif
    for (int64_t row = 0; row < g.rows; row += ROWS) {
        const int n = static_cast<int>(least(ROWS, g.rows - row));
        for (int r = 0; r < n; r++) {
            t->a[r] = reinterpret_cast<const char*>(g.data) + (row + r) * g.pitch;
            t->c[r] = sums + (row + r) * stride;
            t->start[r] = g.start[row + r];
        }
#if defined(HB_AVX512VNNI)
        for (int side = 0; plan.how.method == WINDOW && side < 2; side++) {
            if (!plan.how.used[side]) continue;
            for (int r = 0; r < n; r++) {
                const int32_t* starts = g.lists.starts[side] + row + r;
                const Stretch all{starts[0], starts[1], t->b};
                sparse_runs(g.lists, side, &all, 1, vectors, beyond[side] + r * PANEL);
            }
            (side ? t->last : t->first) = beyond[side];
        }
#endif
        run_tiles(*t, n, vectors, plan.how.method == WORDS);
    }
}

// One stretch of a span: adds to (or begins) the sums (panel, output channel, tap, column).
void weight_stretch(const WeightPlan& plan, int64_t group, int64_t span, const Part& part, int32_t* sums, bool add) {
    const hb_conv_shape& shape = *plan.shape;
    const int64_t first = span * plan.span, panels = (plan.span_width(span) + PANEL - 1) / PANEL;
    const int64_t* kernel = shape.kernel;
    const Sizes most_sizes(plan, part, PANEL);
    const int64_t bytes = kernel[0] * plan.copies * kernel[2] * most_sizes.matrix;
    char* const matrices = matrix_scratch.get(static_cast<size_t>(panels * bytes));
    for (int64_t i = 0; i < panels; i++)
        make_matrices(plan, part, group, first + i, {plan, part, plan.width(first + i)}, matrices + i * bytes);
    const int64_t planes = most_sizes.planes, steps = most_sizes.height * most_sizes.groups;
    char* memory = row_scratch.get(static_cast<size_t>(planes * 16 + (most_sizes.steps() + 16) * 4));
    auto* runs = reinterpret_cast<Run*>(memory);
    auto* places = reinterpret_cast<int32_t*>(runs + planes);
    for (int64_t i = 0, p = 0; p < planes; p++)
        for (int64_t s = 0; s < steps; s++)
            places[i++] = static_cast<int32_t>(p * (most_sizes.height + plan.reach) * most_sizes.groups + s);
    RunTile t{};
    t.runs = runs, t.count = planes, t.steps = steps, t.shift = plan.how.shift, t.add = add;
    if (!plan.reach) t.count = 1, t.steps *= planes;
    const int64_t blocks = (shape.fan_out + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t turn = 0; turn < blocks * plan.planes; turn++) {
        const int64_t block = turn / plan.planes * BLOCK_ROWS, plane = turn % plan.planes;
        const int64_t rows = least(BLOCK_ROWS, shape.fan_out - block);
        GradientRows g{};
        g.read(plan, plane, part, group * shape.fan_out + block, rows, most_sizes, places);
        for (int64_t i = 0; i < panels; i++) {
            const int64_t width = plan.width(first + i);
            const Sizes sizes(plan, part, width);
            for (int64_t p = 0; p < planes; p++) runs[p] = {p * steps * 4, p * sizes.plane};
            for (int64_t tap = 0; tap < plan.taps; tap++) {
                const int64_t t0 = tap / kernel[2] / kernel[1], t1 = tap / kernel[2] % kernel[1], t2 = tap % kernel[2];
                t.b = matrices + i * bytes + plan.rows[t1] * sizes.row +
                      ((t0 * plan.copies + plan.copy[t1]) * kernel[2] + t2) * sizes.matrix;
                int32_t* to = sums + plane * plan.plane + tap * width +
                              (i * shape.fan_out * PANEL + block * width) * plan.taps;
                multiply_gradient(plan, g, to, plan.taps * width, static_cast<int>(width / LANES), &t);
            }
        }
    }
}

// One part of the reduction of a span's sums.
void weight_task(const WeightPlan& plan, int64_t group, int64_t span, int64_t part) {
    const int64_t place = plan.place(group, span, part);
    const int64_t size = plan.shape->fan_out * plan.taps * plan.span_width(span);
    const int64_t begin = plan.stretches * part / plan.parts, end = plan.stretches * (part + 1) / plan.parts;
    int32_t* sums = plan.sums + place;
    int64_t since = 0;  // products in the 32-bit sums
    const auto widen = [&](bool add) {
        for (int64_t p = 0; p < plan.planes; p++)
            widen_row(sums + p * plan.plane, size, add, plan.wide + place + p * plan.plane);
    };
    for (int64_t p = 0; begin == end && p < plan.planes; p++)
        std::memset(sums + p * plan.plane, 0, static_cast<size_t>(size) * 4);
    bool any = false;  // in the 64-bit ones
    for (int64_t i = begin; i < end; i++) {
        const Part stretch = plan.stretch(i);
        const int64_t more = stretch.images * stretch.positions();
        if (plan.wide && since && since + more > plan.how.limit) {
            widen(any);
            any = true, since = 0;
        }
        weight_stretch(plan, group, span, stretch, sums, since > 0);
        since += more;
    }
    if (plan.wide && (since || !any)) widen(any);
}

// Adds the parts of one output channel and writes them: sums or wide as (tap, I), or the scaled result as (I, tap).
template <class T>
void store_weight(const WeightPlan& plan, int64_t o, const T* parts, int32_t* sums, int64_t* wide, const float* scale,
                  float* result) {
    const int64_t group = o / plan.shape->fan_out, row = o % plan.shape->fan_out;
    for (int64_t panel = 0; panel * PANEL < plan.padded; panel++) {
        // Of a fuller group's columns, those of the channel's own group.
        const int64_t fan = plan.given->fan_in, own = o / plan.given->fan_out * fan % plan.columns;
        const int64_t width = plan.width(panel), have = least(width, fan - panel * PANEL);
        const int64_t span = panel / plan.span, in = panel % plan.span * PANEL;
        for (int64_t t = 0; t < plan.taps; t++) {
            int64_t line[PANEL] = {};
            for (int64_t task = 0; task < plan.parts * plan.planes; task++) {
                const int64_t part = task / plan.planes, plane = task % plan.planes;
                const T* from = parts + plan.place(group, span, part) + plane * plan.plane +
                                (plan.shape->fan_out * in + row * width) * plan.taps + t * width;
                for (int64_t i = 0; i < width; i++) line[i] += int64_t{from[i]} * (int64_t{1} << 8 * plane);
            }
            const int64_t by_column = o * fan + panel * PANEL, by_tap = (o * plan.taps + t) * fan + panel * PANEL;
            for (int64_t i = 0; i < have; i++)
                if (scale)
                    result[(by_column + i) * plan.taps + t] = static_cast<float>(line[own + i]) * *scale;
                else if (wide)
                    wide[by_tap + i] = line[own + i];
                else
                    sums[by_tap + i] = static_cast<int32_t>(line[own + i]);
        }
    }
}

}  // namespace

static int32_t convolve_weight(const hb_codes* a, const hb_codes* b, const hb_conv_shape* given, int32_t* sums,
                               int64_t* wide, const float* scale, float* result, int32_t method) {
    hb_conv_shape turned = with_fuller_groups(*given);
    const auto flat = [](const int64_t* lengths) { return lengths[2] == 1; };
    if (flat(turned.input) && flat(turned.output) && flat(turned.kernel) && !turned.padding[2] &&
        turned.output[1] <= STRETCH) {  // one dimension: along the width, which is summed in groups
        int64_t* const all[] = {turned.input,  turned.output,  turned.kernel,
                                turned.stride, turned.padding, turned.dilation};
        for (int64_t* lengths : all) {
            const int64_t height = lengths[1];
            lengths[1] = lengths[2], lengths[2] = height;
        }
    }
    const hb_conv_shape* shape = &turned;
    const int64_t taps = shape->kernel[0] * shape->kernel[1] * shape->kernel[2], columns = shape->fan_in;
    WeightPlan plan{given, shape, choose(*a, *b, most(columns, WINDOW_COLUMNS), method), a, b, taps, columns,
                    padded_columns(columns), 0, 0, nullptr, nullptr, 0, 0, 1, 0, 0, 1, plane_count(a), 0, nullptr,
                    nullptr};
    // So many panels that unpacking the gradient for them pays.
    plan.span = most(1, SPAN_TAPS / most(1, taps));
    plan.spans = (plan.padded + plan.span * PANEL - 1) / (plan.span * PANEL);
    const int64_t tasks = shape->groups * plan.spans, height = shape->kernel[1];
    plan.copy = static_cast<int64_t*>(std::malloc(static_cast<size_t>(2 * height + 1) * 8));
    if (!plan.copy) std::abort();
    plan.rows = plan.copy + height;
    for (int64_t t = 0; t < height; t++) {
        const int64_t at = t * shape->dilation[1], first = at % shape->stride[1];
        plan.rows[t] = at / shape->stride[1];
        plan.reach = most(plan.reach, plan.rows[t]);
        plan.copy[t] = -1;
        for (int64_t s = 0; s < t && plan.copy[t] < 0; s++)
            if (s * shape->dilation[1] % shape->stride[1] == first) plan.copy[t] = plan.copy[s];
        if (plan.copy[t] < 0) plan.copy[t] = plan.copies++;
    }
    const int64_t *out = shape->output, volume = out[0] * out[1] * out[2], all = shape->groups * shape->fan_out;
    if (volume && shape->images && volume <= STRETCH) {
        const int64_t fit = STRETCH / volume;
        plan.stretches = plan.image_parts = (shape->images + fit - 1) / fit;
    } else if (volume) {
        const int64_t rows = most(1, STRETCH / out[2]);
        plan.parts1 = (out[1] + rows - 1) / rows;
        plan.stretches = shape->images * out[0] * plan.parts1;
    }
    plan.parts = most(1, least(plan.stretches, (TASKS + tasks - 1) / most(1, tasks)));
    plan.plane = plan.parts * all * taps * plan.padded;
    const int64_t numbers = plan.planes * plan.plane;
    const bool split = shape->images * volume > plan.how.limit;
    char* memory = shared_scratch.get(static_cast<size_t>(most(1, numbers * (split ? 12 : 4))));
    plan.wide = split ? reinterpret_cast<int64_t*>(memory) : nullptr;
    plan.sums = reinterpret_cast<int32_t*>(memory + (split ? numbers * 8 : 0));
    parallel_for(tasks * plan.parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++)
            weight_task(plan, task / plan.parts / plan.spans, task / plan.parts % plan.spans, task % plan.parts);
    });
    parallel_for(all, 4, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++)
            if (split)
                store_weight(plan, o, plan.wide, sums, wide, scale, result);
            else
                store_weight(plan, o, plan.sums, sums, wide, scale, result);
    });
    std::free(plan.copy);
    shared_scratch.trim();
    return plan.how.method;
}

}  // namespace HB_NS
}  // namespace hb

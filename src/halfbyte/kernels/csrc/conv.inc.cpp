// Convolutions as products of matrices that are never unfolded.
//
// fprop and dgrad: a row of A is a position of the result, along the reduction run taps and channels. What a part of
// the result reads is brought into channels-last numbers in cache-sized memory, with zeros around; a tap is then an
// offset to where a row's numbers begin, and taps that would read nothing but zeros are left out.
// wgrad: a row of A is an output channel, the reduction runs over images and positions, and the columns of B are taps
// and input channels.
#include "conv_tile.inc.cpp"

#include "conv_gather.inc.cpp"

#include "conv_store.inc.cpp"

namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t BOX_BYTES = int64_t{384} << 10;  // of channels-last numbers, wanted at most
constexpr int64_t WINDOW_LENGTH = 512;             // of the reduction: shorter ones do not pay for the lists
constexpr int64_t PART = 1024;                     // positions of the result that are computed at a time, too

thread_local Scratch box_scratch, list_scratch, sums_scratch, row_scratch, weight_scratch, line_scratch;

// What fprop, dgrad and wgrad know before the first image.
struct Plan {
    const hb_conv_shape* shape;
    Choice how;
    bool gradient;
    const hb_codes* a;
    int64_t fan, channels;               // of a group: what is read, and of the result
    int64_t steps, padded, piece;        // groups of a position; columns; groups of a tap that are summed in 32 bits
    const int64_t *source, *result;      // lengths of the images
    const Phase* phases;
    int64_t phase_count;
    const int32_t* places;               // 0, 1, ...: `steps` and 16 more
    char* packed;
    int64_t packed_group;                // bytes of one group's weights

    int64_t pitch() const { return 4 * steps; }
    char* panel(int64_t group, const Phase& phase, int64_t column) const {
        return packed + group * packed_group + phase.packed + phase.all() * steps * column * 4;
    }
};

// A shape with few channels in a group, so many groups taken as one that it fills the lanes of a vector, or nearly: the
// weights between them are zero.
hb_conv_shape with_fuller_groups(const hb_conv_shape& shape) {
    hb_conv_shape fuller = shape;
    int64_t times = most(1, 16 / most(1, most(shape.fan_in, shape.fan_out)));
    while (shape.groups % times) times--;
    fuller.groups /= times, fuller.fan_in *= times, fuller.fan_out *= times;
    return fuller;
}

// The weight's codes, one to a byte, as (output channel, tap, input channel of its fuller group).
void unpack_weight(const hb_codes& q, const hb_conv_shape& given, const hb_conv_shape& shape, int64_t taps,
                   uint8_t* to) {
    const int64_t fan = given.fan_in, length = taps * fan, fuller = taps * shape.fan_in;
    const int64_t times = given.groups / shape.groups;
    parallel_for(given.groups * given.fan_out, 8, [&](int64_t begin, int64_t end) {
        auto* row = reinterpret_cast<uint8_t*>(line_scratch.get(static_cast<size_t>(length)));
        for (int64_t o = begin; o < end; o++) {
            uint8_t* at = to + o * fuller;
            const bool direct = taps == 1 && times == 1;
            unpack(q, o * length, length, direct ? at : row);
            if (direct) continue;
            if (times > 1) std::memset(at, 0, static_cast<size_t>(fuller));
            at += o / given.fan_out % times * fan;
            for (int64_t t = 0; t < taps; t++)
                for (int64_t i = 0; i < fan; i++) at[t * shape.fan_in + i] = row[i * taps + t];
        }
    });
}

// One panel of a group's and a phase's weights: as codes into the end of its memory, then in place to numbers.
void pack_weights(const Plan& plan, const uint8_t* codes, int64_t group, const Phase& phase, int64_t column) {
    static const uint8_t zeros[PANEL] = {};
    const hb_conv_shape& shape = *plan.shape;
    const int64_t of = group_of(plan.how), taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
    const int64_t width = least(PANEL, plan.padded - column), have = least(width, plan.channels - column);
    const int64_t all = phase.all() * plan.steps * width * of;
    char* numbers = plan.panel(group, phase, column);
    auto* to = reinterpret_cast<uint8_t*>(numbers) + (plan.how.method == WORDS ? all : 0);
    std::memset(to, 0, static_cast<size_t>(all));
    codes += group * shape.fan_out * taps * shape.fan_in;
    for (int64_t t = 0; t < phase.all(); t++) {
        const int64_t tap = phase.tap(t, shape.kernel);
        for (int64_t s = 0; s < plan.steps; s++) {
            uint8_t* at = to + (t * plan.steps + s) * width * of;
            const int64_t some = least(of, plan.fan - s * of);
            if (plan.gradient) {
                const uint8_t* rows[4] = {zeros, zeros, zeros, zeros};
                for (int64_t k = 0; k < some; k++)
                    rows[k] = codes + ((s * of + k) * taps + tap) * shape.fan_in + column;
                if (of == 4)
                    interleave_bytes(rows, have, at);
                else
                    for (int64_t j = 0; j < have; j++) at[2 * j] = rows[0][j], at[2 * j + 1] = rows[1][j];
                continue;
            }
            const uint8_t* from = codes + (column * taps + tap) * shape.fan_in + s * of;
            for (int64_t j = 0; j < have; j++, at += of, from += taps * shape.fan_in)
                if (some == 4)
                    std::memcpy(at, from, 4);
                else
                    for (int64_t k = 0; k < some; k++) at[k] = from[k];
        }
    }
    if (plan.how.method == WORDS)
        read_words(plan.how.b, all, to, reinterpret_cast<int16_t*>(numbers));
    else
        read_bytes(plan.how.b, all, to);
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb

#include "conv_rows.inc.cpp"

namespace hb {
namespace HB_NS {
namespace {

// A part of the result of one group.
void convolve_part(const Plan& plan, int64_t group, const Part& part, const Output& to) {
    const hb_conv_shape& shape = *plan.shape;
    Source source{box_for(shape, plan.gradient, part, plan.fan, plan.pitch()), nullptr, {}};
    source.read(plan, part.image, shape.groups * plan.fan, group * plan.fan);
    int64_t taps = 1, pieces = 0;
    bool bare = false;  // a phase without taps, whose sums are zero
    for (int64_t i = 0; i < plan.phase_count; i++) {
        taps = most(taps, plan.phases[i].all());
        pieces = most(pieces, plan.phases[i].all() * ((plan.steps + plan.piece - 1) / plan.piece));
        bare |= plan.phases[i].all() == 0;
    }
    const int64_t positions = part.images * part.positions(), numbers = positions * PANEL;
    char* memory = sums_scratch.get(static_cast<size_t>(numbers * (to.wide ? 12 : 4)));
    auto* sums = reinterpret_cast<int32_t*>(memory);
    auto* wide = reinterpret_cast<int64_t*>(memory + numbers * 4);
    const size_t row_bytes = static_cast<size_t>(positions) * (sizeof(Row) + 4);
    memory = row_scratch.get(row_bytes + static_cast<size_t>(taps) * (sizeof(Run) + sizeof(Stretch)));
    auto* row = reinterpret_cast<Row*>(memory);
    auto* runs = reinterpret_cast<Run*>(row + positions);
    auto* stretches = reinterpret_cast<Stretch*>(runs + taps);
    auto* start = reinterpret_cast<int32_t*>(stretches + taps);
    for (int64_t column = 0; column < plan.channels; column += PANEL) {
        const int64_t have = least(PANEL, plan.channels - column);
        const int vectors = vectors_for(plan.channels - column);
        if (to.wide) std::memset(wide, 0, static_cast<size_t>(numbers) * 8);
        for (int64_t piece = to.wide ? 0 : -1; piece < (to.wide ? pieces : 0); piece++) {
            if (bare || to.wide) std::memset(sums, 0, static_cast<size_t>(numbers) * 4);
            for (int64_t i = 0; i < plan.phase_count; i++) {
                const Phase& phase = plan.phases[i];
                const int64_t its = phase.all() * ((plan.steps + plan.piece - 1) / plan.piece);
                if (piece >= its || !phase.all()) continue;
                Rows rows{&plan, &phase, &source, row, start, runs, stretches, 0, 0};
                rows.set(part);
                rows.multiply(plan.panel(group, phase, column), vectors, piece, sums);
            }
            if (to.wide) widen_row(sums, numbers, true, wide);
        }
        store_part(plan.result, part, shape.groups * plan.channels, group * plan.channels + column, have,
                   vectors * LANES, sums, wide, to);
    }
}

// The image parts of a convolution: as many images or rows as make boxes of a good size, and some for each thread.
struct Parts {
    const int64_t* result;
    int64_t images, image_parts, parts0, parts1;

    Parts(const hb_conv_shape& shape, bool gradient, int64_t pitch) : result(gradient ? shape.input : shape.output) {
        images = shape.images;
        const Part one{0, 1, {0, 0, 0}, {result[0], result[1], result[2]}};
        const int64_t bytes = most(1, box_for(shape, gradient, one, 0, pitch).bytes()), positions = one.positions();
        const int64_t fit = most(1, least(BOX_BYTES / bytes, PART / most(1, positions)));
        image_parts = most((images + fit - 1) / fit, least(images, 8));
        if (image_parts % 2 && image_parts < images) image_parts++;
        const int64_t wanted = most(most(bytes / BOX_BYTES, positions / PART), 8 / most(1, images * shape.groups));
        parts0 = most(1, least(result[0], wanted));
        parts1 = most(1, least(result[1], (wanted + parts0 - 1) / parts0));
    }
    int64_t count() const { return image_parts * parts0 * parts1; }
    Part part(int64_t i) const {
        const int64_t p1 = i % parts1, p0 = i / parts1 % parts0, p = i / parts1 / parts0;
        const int64_t image = images * p / image_parts;
        return {image, images * (p + 1) / image_parts - image,
                {result[0] * p0 / parts0, result[1] * p1 / parts1, 0},
                {result[0] * (p0 + 1) / parts0, result[1] * (p1 + 1) / parts1, result[2]}};
    }
};

}  // namespace

static int32_t convolve(const hb_codes* a, const hb_codes* b, const hb_conv_shape* given, int32_t gradient,
                        int32_t* sums, int64_t* wide, const float* scale, int32_t method) {
    const hb_conv_shape fuller = with_fuller_groups(*given), *shape = &fuller;
    const int64_t taps = shape->kernel[0] * shape->kernel[1] * shape->kernel[2];
    const int64_t fan = gradient ? shape->fan_out : shape->fan_in, channels = gradient ? shape->fan_in : shape->fan_out;
    // Sums that are widened now and then are of words: these have no offset that a piece of the reduction would miss.
    const int64_t phases = gradient ? shape->stride[0] * shape->stride[1] * shape->stride[2] : 1;
    const bool long_enough = channels >= PANEL && taps * fan >= WINDOW_LENGTH * phases;
    const Choice how = choose(*a, *b, long_enough ? WINDOW_COLUMNS : 0, wide ? WORDS : method);
    const int64_t steps = (fan + group_of(how) - 1) / group_of(how);
    const int64_t kernel = shape->kernel[0] + shape->kernel[1] + shape->kernel[2];
    const size_t numbers = static_cast<size_t>(phases * 2 * kernel) * 8, places = static_cast<size_t>(steps + 16) * 4;
    char* memory = static_cast<char*>(std::malloc(static_cast<size_t>(phases) * sizeof(Phase) + numbers + places));
    if (!memory) std::abort();
    auto* phase = reinterpret_cast<Phase*>(memory);
    auto* tap_numbers = reinterpret_cast<int64_t*>(phase + phases);
    auto* place = reinterpret_cast<int32_t*>(tap_numbers + phases * 2 * kernel);
    for (int64_t i = 0; i < steps + 16; i++) place[i] = static_cast<int32_t>(i);
    Plan plan{shape, how, gradient != 0, a, fan, channels, steps, padded_columns(channels), most(1, steps),
              gradient ? shape->output : shape->input, gradient ? shape->input : shape->output, phase, phases, place,
              nullptr, 0};
    if (wide) plan.piece = most(1, least(plan.piece, how.limit / group_of(how)));
    for (int64_t i = 0; i < phases; i++) {
        set_phase(*shape, gradient != 0, i, tap_numbers + i * 2 * kernel, phase + i);
        phase[i].packed = plan.packed_group;
        plan.packed_group += phase[i].all() * steps * plan.padded * 4;
    }
    const int64_t out_channels = shape->groups * shape->fan_out;
    const size_t codes_size = static_cast<size_t>(most(1, out_channels * taps * shape->fan_in));
    auto* codes = reinterpret_cast<uint8_t*>(weight_scratch.get(codes_size));
    unpack_weight(*b, *given, *shape, taps, codes);
    plan.packed = shared_scratch.get(static_cast<size_t>(most(1, shape->groups * plan.packed_group)));
    const int64_t panels = (plan.padded + PANEL - 1) / PANEL;
    parallel_for(shape->groups * phases * panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            pack_weights(plan, codes, i / panels / phases, phase[i / panels % phases], i % panels * PANEL);
    });
    const Parts parts(*shape, gradient != 0, plan.pitch());
    const Output to{sums, wide, scale};
    const int64_t size = shape->images * shape->groups * channels * plan.result[0] * plan.result[1] * plan.result[2];
    if (!wide) prefer_large_pages(sums, size * 4);
    parallel_for(size ? shape->groups * parts.count() : 0, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            convolve_part(plan, i % shape->groups, parts.part(i / shape->groups), to);
    });
    std::free(memory);
    shared_scratch.trim();
    weight_scratch.trim();
    return how.method;
}

}  // namespace HB_NS
}  // namespace hb

#include "conv_weight.inc.cpp"

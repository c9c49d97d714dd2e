// Convolutions as products of matrices whose rows are unfolded a few at a time, never as a whole.
//
// fprop and dgrad: a row of A is a position of the result, along the reduction run taps and channels. An image, or some
// of its rows, is brought into channels-last order in cache-sized memory, and blocks of unfolded rows are made from it.
// wgrad: a row of A is an output channel, the reduction runs over images and positions, and the columns of B are taps
// and input channels.
#include "conv_gather.inc.cpp"

#include "conv_store.inc.cpp"

namespace hb {
namespace HB_NS {
namespace {

constexpr int64_t BOX_BYTES = int64_t{1} << 20;  // of channels-last codes, wanted at most
constexpr int64_t SLAB = 1024;                   // positions of the reduction that wgrad unfolds at a time

thread_local Scratch box_scratch, line_scratch, sums_scratch, weight_scratch;

// The weight's codes, one to a byte, as (output channel, tap, input channel).
struct Weight {
    const uint8_t* codes;
    int64_t fan_in, fan_out, taps;
};

void unpack_weight(const hb_codes& q, const Weight& w, int64_t out_channels, uint8_t* to) {
    const int64_t length = w.taps * w.fan_in;
    parallel_for(out_channels, 8, [&](int64_t begin, int64_t end) {
        auto* row = reinterpret_cast<uint8_t*>(line_scratch.get(static_cast<size_t>(length)));
        for (int64_t o = begin; o < end; o++) {
            uint8_t* at = to + o * length;
            unpack(q, o * length, length, w.taps == 1 ? at : row);
            for (int64_t t = 0; w.taps > 1 && t < w.taps; t++)
                for (int64_t i = 0; i < w.fan_in; i++) at[t * w.fan_in + i] = row[i * w.taps + t];
        }
    });
}

// B of fprop: a line for each output channel of a group.
struct ForwardWeight {
    const uint8_t* codes;
    int64_t length;
    static constexpr bool along = true;

    void fetch(int64_t line, int64_t at, int64_t n, uint8_t* to) const {
        std::memcpy(to, codes + line * length + at, static_cast<size_t>(n));
    }
};

// B of dgrad: a line for each tap of a phase and output channel.
struct BackwardWeight {
    const Weight* weight;
    const uint8_t* codes;
    const Phase* phase;
    const int64_t* kernel;
    static constexpr bool along = false;

    void fetch(int64_t line, int64_t at, int64_t n, uint8_t* to) const {
        const int64_t tap = phase->tap(line / weight->fan_out, kernel), out = line % weight->fan_out;
        std::memcpy(to, codes + (out * weight->taps + tap) * weight->fan_in + at, static_cast<size_t>(n));
    }
};

// All that fprop and dgrad know before the first image.
struct Plan {
    const hb_conv_shape* shape;
    const Choice* how;
    bool gradient;
    const hb_codes* a;
    int64_t channels;                    // of the result, of a group
    const int64_t *source, *result;      // lengths of the images
    const Phase* phases;
    int64_t phase_count, block, padded;
    char* packed;
    int64_t packed_group;                // bytes of one group's weights

    PackedB weights(int64_t group, const Phase& phase) const {
        return {packed + group * packed_group + phase.packed, channels, padded, phase.length, block, group_of(*how)};
    }
};

// The result of one image and group at depths and heights begin ... end.
void convolve_part(const Plan& plan, int64_t image, int64_t group, const int64_t* begin, const int64_t* end,
                   const Output& to) {
    const hb_conv_shape& shape = *plan.shape;
    Box box = box_for(shape, plan.gradient, begin, end);
    box.data = reinterpret_cast<uint8_t*>(box_scratch.get(static_cast<size_t>(box.bytes() + 64)));
    fill_box(*plan.a, (image * shape.groups + group) * box.channels, plan.source, box);
    BlockA block(own_scratch.get(BlockA::BYTES_NEEDED));
    const int64_t stride = round_up(plan.channels, 16), narrow = round_up(BLOCK_ROWS * stride * 4, 64);
    char* memory = sums_scratch.get(static_cast<size_t>(narrow * (to.wide ? 3 : 1)));
    auto* sums = reinterpret_cast<int32_t*>(memory);
    auto* wide = reinterpret_cast<int64_t*>(memory + narrow);
    const int64_t volume = plan.result[0] * plan.result[1] * plan.result[2];
    const int64_t base = (image * shape.groups + group) * plan.channels * volume;
    int64_t places[BLOCK_ROWS];
    for (int64_t number = 0; number < plan.phase_count; number++) {
        const Phase& phase = plan.phases[number];
        Gather rows{&box, &phase, plan.source, {0, 0, 0}, {0, 0, 0}};
        for (int d = 0; d < 3; d++) {
            const int64_t low = d < 2 ? begin[d] : 0, high = d < 2 ? end[d] : plan.result[2];
            const int64_t apart = phase.apart[d], more = apart - 1 - phase.first[d];
            rows.begin[d] = most(0, floor_div(low + more, apart));
            rows.count[d] = most(0, floor_div(high + more, apart) - rows.begin[d]);
        }
        const PackedB b = plan.weights(group, phase);
        for (int64_t row = 0; row < rows.positions(); row += BLOCK_ROWS) {
            block.rows = least(BLOCK_ROWS, rows.positions() - row);
            if (!b.length || to.wide) std::memset(memory, 0, static_cast<size_t>(narrow * (to.wide ? 3 : 1)));
            for (int64_t i = 0; i < b.blocks(); i++) {
                pack_rows(rows, *plan.how, row, i * b.block, least(b.block, b.length - i * b.block), &block);
                multiply(block, *plan.how, b, i, 0, b.columns, sums, stride, i > 0 && !to.wide);
                if (to.wide) widen_row(sums, block.rows * stride, true, wide);
            }
            for (int64_t r = 0; r < block.rows; r++) {
                int64_t j[3];
                rows.place(row + r, j);
                for (int d = 0; d < 3; d++) j[d] = phase.first[d] + j[d] * phase.apart[d];
                places[r] = base + (j[0] * plan.result[1] + j[1]) * plan.result[2] + j[2];
            }
            store_block(sums, wide, stride, block.rows, plan.channels, places, volume, to);
        }
    }
}

// Packs the weights of all groups and phases.
void pack_weights(const Plan& plan, const Weight& weight) {
    const hb_conv_shape& shape = *plan.shape;
    const int64_t rows = weight.fan_out * weight.taps * weight.fan_in;
    const auto one = [&](int64_t task) {
        const int64_t group = task / plan.phase_count;
        const Phase& phase = plan.phases[task % plan.phase_count];
        const PackedB b = plan.weights(group, phase);
        if (!b.length) return;
        if (plan.gradient)
            pack_b(BackwardWeight{&weight, weight.codes + group * rows, &phase, shape.kernel}, *plan.how, 0, 0, b);
        else
            pack_b(ForwardWeight{weight.codes + group * rows, phase.length}, *plan.how, 0, 0, b);
    };
    const int64_t tasks = shape.groups * plan.phase_count;
    if (tasks < 4) {
        for (int64_t task = 0; task < tasks; task++) one(task);
    } else {
        parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; task++) one(task);
        });
    }
}

}  // namespace

static int32_t convolve(const hb_codes* a, const hb_codes* b, const hb_conv_shape* shape, int32_t gradient,
                        int32_t* sums, int64_t* wide, const float* scale, int32_t method) {
    const Choice how = choose(*a, *b, gradient ? shape->fan_in : shape->fan_out, method);
    const int64_t taps = shape->kernel[0] * shape->kernel[1] * shape->kernel[2];
    const int64_t* result = gradient ? shape->input : shape->output;
    const int64_t phases = gradient ? shape->stride[0] * shape->stride[1] * shape->stride[2] : 1;
    const int64_t kernel = shape->kernel[0] + shape->kernel[1] + shape->kernel[2];
    const size_t numbers = static_cast<size_t>(phases * 2 * kernel) * sizeof(int64_t);
    char* memory = static_cast<char*>(std::malloc(static_cast<size_t>(phases) * sizeof(Phase) + numbers));
    if (!memory) std::abort();
    auto* phase = reinterpret_cast<Phase*>(memory);
    auto* tap_numbers = reinterpret_cast<int64_t*>(memory + static_cast<size_t>(phases) * sizeof(Phase));
    Plan plan{shape, &how, gradient != 0, a, gradient ? shape->fan_in : shape->fan_out,
              gradient ? shape->output : shape->input, result, phase, phases, block_length(how), 0, nullptr, 0};
    if (wide) plan.block = least(plan.block, most(group_of(how), how.limit / group_of(how) * group_of(how)));
    plan.padded = padded_columns(plan.channels);
    for (int64_t i = 0; i < phases; i++) {
        set_phase(*shape, gradient != 0, i, tap_numbers + i * 2 * kernel, phase + i);
        phase[i].packed = plan.packed_group;
        plan.packed_group += PackedB::bytes(phase[i].length, plan.padded, group_of(how));
    }
    const Weight unpacked{nullptr, shape->fan_in, shape->fan_out, taps};
    const int64_t out_channels = shape->groups * shape->fan_out;
    auto* codes = reinterpret_cast<uint8_t*>(
        weight_scratch.get(static_cast<size_t>(most(1, out_channels * taps * shape->fan_in))));
    unpack_weight(*b, unpacked, out_channels, codes);
    plan.packed = shared_scratch.get(static_cast<size_t>(most(1, shape->groups * plan.packed_group)));
    pack_weights(plan, {codes, shape->fan_in, shape->fan_out, taps});
    // Parts of an image: so many that their boxes are small and there are some for each thread.
    const int64_t none[3] = {0, 0, 0};
    const int64_t pairs = shape->images * shape->groups;
    const int64_t boxes = box_for(*shape, gradient != 0, none, result).bytes() / BOX_BYTES + 1;
    const int64_t wanted = most(boxes, 8 / most(1, pairs));
    const int64_t parts0 = most(1, least(result[0], wanted));
    const int64_t parts1 = most(1, least(result[1], (wanted + parts0 - 1) / parts0)), parts = parts0 * parts1;
    const Output to{sums, wide, scale};
    const bool empty = result[0] * result[1] * result[2] * plan.channels == 0;
    parallel_for(empty ? 0 : pairs * parts, 1, [&](int64_t from, int64_t until) {
        for (int64_t task = from; task < until; task++) {
            const int64_t pair = task / parts, part0 = task % parts / parts1, part1 = task % parts1;
            const int64_t begin[2] = {result[0] * part0 / parts0, result[1] * part1 / parts1};
            const int64_t end[2] = {result[0] * (part0 + 1) / parts0, result[1] * (part1 + 1) / parts1};
            convolve_part(plan, pair / shape->groups, pair % shape->groups, begin, end, to);
        }
    });
    std::free(memory);
    shared_scratch.trim();
    weight_scratch.trim();
    return how.method;
}

}  // namespace HB_NS
}  // namespace hb

#include "conv_weight.inc.cpp"

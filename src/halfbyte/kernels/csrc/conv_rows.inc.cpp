// The rows of A of fprop and dgrad: positions of the result, and the numbers that they read.
namespace hb {
namespace HB_NS {
namespace {

// A box's numbers, the sums of its positions (if B has an offset) and the lists of what lies outside the window.
struct Source {
    Box box;
    int32_t* sums;  // in the order of the box
    Lists lists;    // a line: a position, in the order (image, depth, height, width); places count from the row's first

    // Channels first ... first + box.channels of the images from `image` on.
    void read(const Plan& plan, int64_t image, int64_t all, int64_t first) {
        const bool words = plan.how.method == WORDS, window = plan.how.method == WINDOW;
        const int64_t positions = box.positions(), bytes = round_up(box.bytes() + 64, 64);
        const int64_t code_pitch = words ? box.channels : box.pitch;
        const size_t size = static_cast<size_t>(bytes + round_up(4 * positions, 64) + positions * box.channels);
        box.data = reinterpret_cast<uint8_t*>(box_scratch.get(size + 64));
        sums = reinterpret_cast<int32_t*>(box.data + bytes);
        box.codes = words ? box.data + bytes + round_up(4 * positions, 64) : box.data;
        std::memset(box.data, 0, static_cast<size_t>(bytes + (plan.how.offset ? 4 * positions : 0)));
        fill_box(*plan.a, image, all, first, plan.source, box, code_pitch);
        if (window) {
            const int64_t groups = positions * plan.steps;
            lists.place(list_scratch.get(static_cast<size_t>(2 * Lists::bytes(positions, groups))), positions, groups);
        }
        int64_t line = 0;
        for (int64_t i = 0; i < box.images; i++)
            for (int64_t d = box.from[0]; d < box.from[0] + box.size[0]; d++)
                for (int64_t h = box.from[1]; h < box.from[1] + box.size[1]; h++) {
                    const bool inside = d >= 0 && d < plan.source[0] && h >= 0 && h < plan.source[1];
                    int64_t p = box.at(d, h, box.from[2]) + i;
                    for (int64_t w = 0; w < box.size[2]; w++, line++, p += box.images) {
                        if (window) lists.begin_line(line);
                        if (!inside || w < -box.from[2] || w >= plan.source[2] - box.from[2]) continue;
                        const int32_t sum = read_line(plan.how, box.codes + p * code_pitch, box.channels,
                                                      box.data + p * box.pitch, plan.places,
                                                      static_cast<int32_t>(w * plan.steps), &lists);
                        if (plan.how.offset) sums[p] = sum;
                    }
                }
        if (window) lists.begin_line(line);
    }
};

// A row of A.
struct Row {
    int64_t a, c;       // bytes from the box's beginning to the first tap's numbers; place among the part's sums
    int32_t line, w;    // of the lists, for the first tap; its place in the box's width
    uint16_t inside[3]; // bit t: tap t of this dimension reads the image. All bits where there are more than 16 taps
};

// The positions of one phase in a part, images innermost, and their multiplication with a panel.
struct Rows {
    const Plan* plan;
    const Phase* phase;
    const Source* source;
    Row* row;
    int32_t* start;      // -offset times the row's sum
    Run* runs;           // memory for phase->all()
    Stretch* stretches;
    int64_t count, line; // rows; those that are cut into tiles together

    int64_t tap_offset(int64_t t0, int64_t t1, int64_t t2) const {
        const Box& box = source->box;
        const auto from_first = [&](int d, int64_t t) { return phase->offset[d][t] - phase->offset[d][0]; };
        return (from_first(0, t0) * box.size[1] + from_first(1, t1)) * box.size[2] + from_first(2, t2);
    }

    void set(const Part& part) {
        const Box& box = source->box;
        int64_t begin[3], size[3];
        for (int d = 0; d < 3; d++) {
            const int64_t apart = phase->apart[d], more = apart - 1 - phase->first[d];
            begin[d] = most(0, floor_div(part.begin[d] + more, apart));
            size[d] = most(0, floor_div(part.end[d] + more, apart) - begin[d]);
        }
        count = 0;
        line = part.images > 1 ? part.images : size[0] * size[1] * size[2];
        const int64_t volume = box.positions() / box.images;
        int64_t s[3], c[3];
        uint16_t inside[3];
        const auto enter = [&](int d, int64_t j) {
            s[d] = (begin[d] + j) * phase->step[d];
            c[d] = phase->first[d] + (begin[d] + j) * phase->apart[d] - part.begin[d];
            inside[d] = phase->taps[d] > 16 ? 0xffff : 0;
            for (int64_t t = 0; t < least(16, phase->taps[d]); t++) {
                const auto at = static_cast<uint64_t>(s[d] + phase->offset[d][t]);
                inside[d] |= static_cast<uint16_t>((at < static_cast<uint64_t>(plan->source[d])) << t);
            }
            s[d] += phase->offset[d][0];
        };
        for (int64_t j0 = 0; j0 < size[0]; j0++) {
            enter(0, j0);
            for (int64_t j1 = 0; j1 < size[1]; j1++) {
                enter(1, j1);
                enter(2, 0);
                if (plan->how.offset) sum_rows(box.at(s[0], s[1], s[2]), size[2]);
                for (int64_t j2 = 0; j2 < size[2]; j2++) {
                    enter(2, j2);
                    const int64_t first = box.at(s[0], s[1], s[2]);
                    const int64_t place = (c[0] * part.length(1) + c[1]) * part.length(2) + c[2];
                    for (int64_t i = 0; i < part.images; i++)
                        row[count++] = {(first + i) * box.pitch, i * part.positions() + place,
                                        static_cast<int32_t>(i * volume + first / box.images),
                                        static_cast<int32_t>(s[2] - box.from[2]), {inside[0], inside[1], inside[2]}};
                }
            }
        }
    }

    // The starts of the rows of one height, from the box's place `first` on.
    void sum_rows(int64_t first, int64_t width) {
        const int64_t images = source->box.images, step = phase->step[2] * images;
        const int64_t times = step == images ? 1 : width, n = step == images ? width * images : images;
        int32_t* to = start + count;
        std::memset(to, 0, static_cast<size_t>(width * images) * 4);
        for (int64_t t0 = 0; t0 < phase->taps[0]; t0++)
            for (int64_t t1 = 0; t1 < phase->taps[1]; t1++)
                for (int64_t t2 = 0; t2 < phase->taps[2]; t2++) {
                    const int32_t* from = source->sums + first + tap_offset(t0, t1, t2) * images;
                    for (int64_t k = 0; k < times; k++)
                        for (int64_t i = 0; i < n; i++) to[k * n + i] -= plan->how.offset * from[k * step + i];
                }
    }

    // Those of tap t's groups from `first` on.
    Run run(int64_t t0, int64_t t1, int64_t t2, int64_t first, int64_t vectors) const {
        const int64_t t = (t0 * phase->taps[1] + t1) * phase->taps[2] + t2;
        return {tap_offset(t0, t1, t2) * source->box.images * source->box.pitch + 4 * first,
                (t * plan->steps + first) * vectors * LANES * 4};
    }

#if defined(HB_AVX512VNNI)
    // The entries of one side of the lists that a row meets, a stretch for all taps in its width where they are dense.
    int64_t meet(const Row& r, int side, const char* b, int64_t vectors) const {
        const int64_t* taps = phase->taps;
        const bool dense = taps[2] == 1 || phase->offset[2][1] - phase->offset[2][0] == 1;
        const int64_t at_a_time = dense ? taps[2] : 1;
        const int32_t* starts = source->lists.starts[side];
        int64_t n = 0;
        for (int64_t t0 = 0; t0 < taps[0]; t0++)
            for (int64_t t1 = 0; t1 < taps[1]; t1++)
                for (int64_t t2 = 0; t2 < taps[2]; t2 += at_a_time) {
                    const int64_t in = r.line + tap_offset(t0, t1, t2);
                    if (starts[in] == starts[in + at_a_time]) continue;
                    const int64_t w = r.w + phase->offset[2][t2] - phase->offset[2][0];
                    const int64_t step = ((t0 * taps[1] + t1) * taps[2] + t2 - w) * plan->steps;
                    stretches[n++] = {starts[in], starts[in + at_a_time], b + step * vectors * 64};
                }
        return n;
    }
#endif

    // The sums of all rows with a panel's columns. `piece`: of the reduction, the first groups of one tap; -1 for all.
    void multiply(const char* b, int vectors, int64_t piece, int32_t* sums) const {
        RunTile t{};
        t.b = b, t.runs = runs, t.shift = plan->how.shift;
        const int64_t pieces = (plan->steps + plan->piece - 1) / plan->piece, *taps = phase->taps;
        if (piece >= 0) {
            const int64_t tap = piece / pieces, first = piece % pieces * plan->piece;
            runs[0] = run(tap / taps[2] / taps[1], tap / taps[2] % taps[1], tap % taps[2], first, vectors);
            t.count = 1, t.steps = least(plan->piece, plan->steps - first);
        }
        uint16_t known[3] = {0, 0, 0};
#if defined(HB_AVX512VNNI)
        alignas(64) int32_t beyond[2][ROWS * PANEL];
#endif
        const int64_t cuts = (line + ROWS - 1) / ROWS;
        for (int64_t begin = 0; begin < count; begin += line)
            for (int64_t cut = 0; cut < cuts; cut++) {
                const int64_t from = begin + line * cut / cuts, until = begin + line * (cut + 1) / cuts;
                const int n = static_cast<int>(until - from);
                uint16_t inside[3] = {0, 0, 0};
                for (int r = 0; r < n; r++) {
                    const Row& one = row[from + r];
                    t.a[r] = reinterpret_cast<const char*>(source->box.data) + one.a;
                    t.c[r] = sums + one.c * vectors * LANES;
                    t.start[r] = plan->how.offset ? start[from + r] : 0;
                    for (int d = 0; d < 3; d++) inside[d] |= one.inside[d];
                }
                if (piece < 0 && std::memcmp(inside, known, sizeof known)) {
                    std::memcpy(known, inside, sizeof known);
                    const auto has = [&](int d, int64_t tap) { return tap > 15 || (inside[d] >> tap & 1); };
                    t.count = 0, t.steps = plan->steps;
                    for (int64_t t0 = 0; t0 < taps[0]; t0++)
                        for (int64_t t1 = 0; has(0, t0) && t1 < taps[1]; t1++)
                            for (int64_t t2 = 0; has(1, t1) && t2 < taps[2]; t2++)
                                if (has(2, t2)) runs[t.count++] = run(t0, t1, t2, 0, vectors);
                }
#if defined(HB_AVX512VNNI)
                for (int side = 0; plan->how.method == WINDOW && side < 2; side++) {
                    if (!plan->how.used[side]) continue;
                    for (int r = 0; r < n; r++) {
                        const int64_t met = meet(row[from + r], side, b, vectors);
                        sparse_runs(source->lists, side, stretches, met, vectors, beyond[side] + r * PANEL);
                    }
                    (side ? t.last : t.first) = beyond[side];
                }
#endif
                run_tiles(t, n, vectors, plan->how.method == WORDS);
            }
    }
};

}  // namespace
}  // namespace HB_NS
}  // namespace hb

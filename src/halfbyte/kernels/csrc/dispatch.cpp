// Chooses the instruction set once, and exports the C functions of halfbyte.h through the table of the chosen one.
//
// The processor is asked by hand (cpuid, xgetbv): the compilers' own __builtin_cpu_supports needs a runtime library
// that not every one of them brings.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "halfbyte.h"
#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hb {

hb_parallel_for parallel = nullptr;

namespace {

#if defined(__x86_64__)

struct Cpu {
    bool avx2 = false, avx512vnni = false;
};

Cpu ask_cpu() {
    Cpu cpu;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx) return cpu;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    // The operating system saves the registers: bits 1 and 2 for SSE and AVX, 5 to 7 for AVX-512.
    const bool saves_avx = (low & 0x06) == 0x06, saves_avx512 = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const bool avx2 = b >> 5 & 1, bmi2 = b >> 8 & 1;
    cpu.avx2 = saves_avx && avx2 && bmi2 && fma && f16c;
    const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
    cpu.avx512vnni = cpu.avx2 && saves_avx512 && f && dq && bw && vl && vnni;
    return cpu;
}

#endif

// The table of that name, or of the best instruction set if the name is null; null if this machine has none.
const Table* find(const char* name) {
#if defined(HB_WITH_X86)
    const Cpu cpu = ask_cpu();
    if (cpu.avx512vnni && (!name || !std::strcmp(name, avx512::table.isa))) return &avx512::table;
    if (cpu.avx2 && (!name || !std::strcmp(name, avx2::table.isa))) return &avx2::table;
#endif
    if (!name || !std::strcmp(name, portable::table.isa)) return &portable::table;
    return nullptr;
}

std::atomic<const Table*> chosen{nullptr};

const Table& current() {
    const Table* table = chosen.load(std::memory_order_acquire);
    if (!table) {
        table = find(nullptr);
        chosen.store(table, std::memory_order_release);
    }
    return *table;
}

}  // namespace
}  // namespace hb

extern "C" {

const char* hb_isa(void) { return hb::current().isa; }

int32_t hb_force_isa(const char* name) {
    const hb::Table* table = hb::find(name);
    if (!table) return 1;
    hb::chosen.store(table, std::memory_order_release);
    return 0;
}

int32_t hb_has_isa(const char* name) { return hb::find(name) != nullptr; }

void hb_set_parallel_for(hb_parallel_for function) { hb::parallel = function; }

#ifndef HB_BUILD
#define HB_BUILD "unknown"
#endif
const char* hb_build(void) { return HB_BUILD; }

#define HB_FUNCTION(result, name, parameters, arguments) \
    result hb_##name parameters { return hb::current().name arguments; }
#include "quantize_table.inc"
#include "gemm_table.inc"
#include "stash_table.inc"
#include "blocks_table.inc"
#undef HB_FUNCTION

}  // extern "C"

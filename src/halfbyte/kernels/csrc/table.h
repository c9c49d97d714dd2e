// The functions that exist once for each instruction set, as a table of pointers.
//
// The lists *_table.inc hold one HB_FUNCTION(result, name, (parameters), (arguments)) for each. From them come this
// struct, the tables that kernels.cpp fills, and the exported functions hb_<name>, which halfbyte.h declares: a list and
// a declaration that disagree do not compile.
#ifndef HB_TABLE_H
#define HB_TABLE_H

#include "halfbyte.h"

namespace hb {

struct Table {
    const char* isa;
#define HB_FUNCTION(result, name, parameters, arguments) result(*name) parameters;
#include "quantize_table.inc"
#include "gemm_table.inc"
#include "stash_table.inc"
#include "blocks_table.inc"
#undef HB_FUNCTION
};

namespace avx512 {
extern const Table table;
}
namespace avx2 {
extern const Table table;
}
namespace portable {
extern const Table table;
}

}  // namespace hb

#endif

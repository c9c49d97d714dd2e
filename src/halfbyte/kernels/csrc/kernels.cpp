// Every kernel for one instruction set: this file is compiled once for each, with the flags of build.py.
#include "halfbyte.h"
#include "isa.h"
#include "table.h"
#include "threads.h"

// The order matters: each uses what the ones above it define.
#include "statistics.inc.cpp"

#include "quantize.inc.cpp"

#include "clip.inc.cpp"

#include "random.inc.cpp"

#include "blocks.inc.cpp"

#include "rotate.inc.cpp"

#include "stash.inc.cpp"

#include "norm.inc.cpp"

#include "gemm.inc.cpp"

#include "conv.inc.cpp"

#include "numbers.inc.cpp"

#define HB_TEXT_(x) #x
#define HB_TEXT(x) HB_TEXT_(x)

namespace hb {
namespace HB_NS {

extern const Table table;
const Table table = {
    HB_TEXT(HB_NS),
#define HB_FUNCTION(result, name, parameters, arguments) &name,
#include "quantize_table.inc"
#include "gemm_table.inc"
#include "stash_table.inc"
#include "blocks_table.inc"
#undef HB_FUNCTION
};

}  // namespace HB_NS
}  // namespace hb

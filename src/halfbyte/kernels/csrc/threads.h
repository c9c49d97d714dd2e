// Loops over torch's own threads. Work is cut by index, never by thread, so that no result depends on their number.
#ifndef HB_THREADS_H
#define HB_THREADS_H

#include "halfbyte.h"
#include "isa.h"

namespace hb {

extern hb_parallel_for parallel;  // dispatch.cpp; null means serial

namespace HB_NS {

// Calls body(begin, end) for stretches that cover 0...n, each of at least `grain` indices but for the last. In a
// thread of torch's pool it runs serially, so kernels may call it without knowing where they are.
template <class Body>
HB_INLINE void parallel_for(int64_t n, int64_t grain, const Body& body) {
    if (n <= 0) return;
    if (!parallel || n <= grain) {
        body(int64_t{0}, n);
        return;
    }
    struct Call {
        static void run(int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); }
    };
    parallel(0, n, grain, &Call::run, const_cast<Body*>(&body));
}

}  // namespace HB_NS
}  // namespace hb

#endif

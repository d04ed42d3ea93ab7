// A persistent pool of plain threads. The project brings its own because an OpenMP runtime beside torch's would
// double the threads and their busy-waiting, and because Apple's compiler ships none.
#pragma once

#include <cstdint>
#include <functional>

namespace d23 {

// Calls body(begin, end) for consecutive pieces of [0, count), at most `grain` long, on up to `num_threads`
// threads, the caller's among them. Pieces are handed out as threads become free; which thread runs which piece is
// not determined, so a body must not let its result depend on it. Nested calls run on the calling thread alone.
void parallel_for(int64_t count, int64_t grain, int64_t num_threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace d23

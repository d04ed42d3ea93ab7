#include "cuda/launch.h"

// The text of the last CUDA error on this thread, for messages.
D23_EXPORT const char* d23_cuda_error_text() { return cudaGetErrorString(d23::last_cuda_error); }

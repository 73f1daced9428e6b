// Attention of many rows on a GPU, for float16.

#include "ops/attention_rows_cuda.hpp"

namespace pympa::cuda {

template void attend_rows<Half>(const AttendArgs& args);
template void fold_scores<Half>(const AttendArgs& args);

}  // namespace pympa::cuda

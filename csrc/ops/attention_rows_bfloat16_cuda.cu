// Attention of many rows on a GPU, for bfloat16.

#include "ops/attention_rows_cuda.hpp"

namespace pympa::cuda {

template void attend_rows<BFloat>(const AttendArgs& args);
template void fold_scores<BFloat>(const AttendArgs& args);

}  // namespace pympa::cuda

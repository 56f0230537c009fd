// Free functions that the run-time compiler looks up by name: one for each kernel and type of the products.
#include "kernels.hpp"

namespace mas_hpc {
inline auto item() { return sycl::ext::oneapi::this_work_item::get_nd_item<1>(); }
} // namespace mas_hpc

#define ENTRY                                                                                                                \
  extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))                        \
      SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::sub_group_size<MAS_HPC_SUB_GROUP_SIZE>)) void

#define ENTRIES(T, R, NAME)                                                                                                  \
  ENTRY row_statistics_##NAME(const T *product_CV, const int64_t *target_C, const R *bias_V, R softcap,                      \
                              R inverse_temperature, R *max_C, R *sum_C, R *weighted_C, R *target_logit_C,                   \
                              int64_t vocabulary) {                                                                          \
    mas_hpc::RowStatistics<T>{product_CV, target_C,   {bias_V, softcap, inverse_temperature}, max_C, sum_C,                  \
                              weighted_C, target_logit_C, vocabulary}(mas_hpc::item());                                      \
  }                                                                                                                          \
  ENTRY product_gradient_##NAME(const T *product_CV, const int64_t *target_C, const R *bias_V, R softcap,                    \
                                R inverse_temperature, const R *max_C, const R *sum_C, const R *weighted_C,                  \
                                const R *logprob_gradient_C, const R *entropy_gradient_C, T *gradient_CV,                    \
                                int64_t vocabulary) {                                                                        \
    mas_hpc::ProductGradient<T>{product_CV, target_C, {bias_V, softcap, inverse_temperature}, max_C, sum_C, weighted_C,      \
                                logprob_gradient_C, entropy_gradient_C, gradient_CV, vocabulary}(mas_hpc::item());           \
  }

ENTRIES(float, float, float32)
ENTRIES(double, double, float64)
ENTRIES(sycl::half, float, float16)
ENTRIES(mas_hpc::Bfloat16, float, bfloat16)

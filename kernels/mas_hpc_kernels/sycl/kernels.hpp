// The two kernels of linear_logprob, once for both routes: entry_points.cpp hands this text to the run-time compiler
// (CPU device), extension.sycl includes it for icpx (XPU). One work-group computes one row of logits.
// Legend: C rows of one chunk, V vocabulary. T is the type of the products, Real<T> the type of the arithmetic.
#pragma once
#include <sycl/sycl.hpp>

#include <cstdint>

namespace mas_hpc {

// The upper half of a float. sycl::ext::oneapi::bfloat16 would pull in a second device image, with which
// PersistentDeviceCodeCache of libsycl 2026.2 crashes (getSortedImages).
struct Bfloat16 {
  uint16_t bits;

  Bfloat16() = default;
  explicit Bfloat16(float value) {
    const uint32_t wide = sycl::bit_cast<uint32_t>(value);
    const uint32_t to_nearest_even = 0x7fff + ((wide >> 16) & 1);
    bits = static_cast<uint16_t>(value != value ? 0x7fc0 : (wide + to_nearest_even) >> 16);
  }
  explicit operator float() const { return sycl::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

template <typename T> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };
template <typename T> using Real = typename RealOf<T>::type;

// Stands for a logit of -inf: its exponential is 0, and its product with 0 is 0 rather than NaN.
constexpr float NEGLIGIBLE = -1e30f;
template <typename R> R finite(R logit) { return logit < NEGLIGIBLE ? NEGLIGIBLE : logit; } // a NaN stays

// From product = hidden @ weight.T to logit = softcap * tanh((product + bias) / softcap) / temperature.
template <typename T> struct Head {
  const Real<T> *bias_V; // null: none
  Real<T> softcap;       // 0: none
  Real<T> inverse_temperature;

  // d logit / d product goes to `slope`.
  Real<T> logit(T product, int64_t column, Real<T> &slope) const {
    Real<T> value = static_cast<Real<T>>(product);
    slope = inverse_temperature;
    if (bias_V != nullptr)
      value += bias_V[column];
    if (softcap > 0) {
      const Real<T> bounded = sycl::tanh(value / softcap);
      slope *= 1 - bounded * bounded;
      value = softcap * bounded;
    }
    return value * inverse_temperature;
  }
};

// Of some logits: the maximum, the sum of exp(logit - maximum), the sum of (logit - maximum) exp(logit - maximum).
template <typename R> struct Softmax {
  R maximum, sum = 0, weighted = 0;

  void move_to(R target) {
    const R shift = maximum - target, scale = sycl::exp(shift);
    weighted = scale * (weighted + shift * sum);
    sum *= scale;
    maximum = target;
  }
  void add(R logit) { // at most the maximum
    const R shift = logit - maximum, weight = sycl::exp(shift);
    sum += weight;
    weighted += shift * weight;
  }
};

// In one pass over the row; each work-item keeps the softmax of its own columns and rescales it once per UNROLL of them.
template <typename T> struct RowStatistics {
  using R = Real<T>;
  static constexpr int UNROLL = 8;
  const T *product_CV;
  const int64_t *target_C; // outside [0, V): in another shard, whose logit is 0 here
  Head<T> head;
  R *max_C, *sum_C, *weighted_C, *target_logit_C;
  int64_t vocabulary;

  void operator()(sycl::nd_item<1> item) const {
    const auto group = item.get_group();
    const int64_t row = group.get_group_linear_id();
    const T *product_V = product_CV + row * vocabulary;
    Softmax<R> softmax = of_columns(product_V, item.get_local_linear_id(), item.get_local_range(0));
    softmax.move_to(sycl::reduce_over_group(group, softmax.maximum, sycl::maximum<R>()));
    const R sum = sycl::reduce_over_group(group, softmax.sum, sycl::plus<R>());
    const R weighted = sycl::reduce_over_group(group, softmax.weighted, sycl::plus<R>());
    if (group.leader()) {
      const int64_t target = target_C[row];
      const bool is_here = 0 <= target && target < vocabulary;
      R slope;
      max_C[row] = softmax.maximum;
      sum_C[row] = sum;
      weighted_C[row] = weighted;
      target_logit_C[row] = is_here ? head.logit(product_V[target], target, slope) : R(0);
    }
  }

  Softmax<R> of_columns(const T *product_V, int64_t column, int64_t stride) const {
    Softmax<R> softmax{NEGLIGIBLE};
    R slope;
    for (; column + (UNROLL - 1) * stride < vocabulary; column += UNROLL * stride) {
      R logits[UNROLL], maximum = softmax.maximum;
      for (int i = 0; i < UNROLL; i++) {
        logits[i] = finite(head.logit(product_V[column + i * stride], column + i * stride, slope));
        maximum = sycl::fmax(maximum, logits[i]);
      }
      softmax.move_to(maximum);
      for (int i = 0; i < UNROLL; i++)
        softmax.add(logits[i]);
    }
    for (; column < vocabulary; column += stride) {
      const R logit = finite(head.logit(product_V[column], column, slope));
      softmax.move_to(sycl::fmax(softmax.maximum, logit));
      softmax.add(logit);
    }
    return softmax;
  }
};

// d loss / d product from the statistics of the whole row, d loss / d logprob and, unless null, d loss / d entropy.
// May overwrite the products.
template <typename T> struct ProductGradient {
  using R = Real<T>;
  const T *product_CV;
  const int64_t *target_C;
  Head<T> head;
  const R *max_C, *sum_C, *weighted_C, *logprob_gradient_C, *entropy_gradient_C;
  T *gradient_CV;
  int64_t vocabulary;

  void operator()(sycl::nd_item<1> item) const {
    const int64_t row = item.get_group(0), target = target_C[row], stride = item.get_local_range(0);
    const R maximum = max_C[row], inverse_sum = 1 / sum_C[row], mean = weighted_C[row] * inverse_sum;
    const R logprob_gradient = logprob_gradient_C[row];
    const R entropy_gradient = entropy_gradient_C == nullptr ? R(0) : entropy_gradient_C[row];
    for (int64_t column = item.get_local_linear_id(); column < vocabulary; column += stride) {
      R slope;
      const R shift = finite(head.logit(product_CV[row * vocabulary + column], column, slope)) - maximum;
      const R probability = sycl::exp(shift) * inverse_sum;
      const R onehot = column == target ? R(1) : R(0);
      const R gradient = logprob_gradient * (onehot - probability) - entropy_gradient * probability * (shift - mean);
      gradient_CV[row * vocabulary + column] = static_cast<T>(gradient * slope);
    }
  }
};

} // namespace mas_hpc

// Activation functions by their names in Python.
#pragma once

#include <string>

#include "core/check.hpp"
#include "ops/linear.hpp"

namespace pympa::bindings {

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  if (name == "swiglu_clamped") return Activation::kSwigluClamped;
  fail(op, "activation", "none, gelu, gelu_tanh, silu or swiglu_clamped", "'" + name + "'");
}

}  // namespace pympa::bindings

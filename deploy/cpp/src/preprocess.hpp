#pragma once

#include "vitprune/vitprune.hpp"

namespace vitprune {

/// Throws InputError, with what would be right, where a value of `preprocess` is out of range.
void check(const Preprocess& preprocess);

}  // namespace vitprune

// Rows of partial sums, bf16 or float, added up in their order as floats: whoever adds, adds alike.
#pragma once

#include <cstddef>

// to[i] += row[i]; the first row is not added to anything: a sum of -0 alone is -0.
void duck_row_add(const void* row, std::size_t count, bool bf16, bool first, float* to);

bool duck_row_is_finite(const float* row, std::size_t count);

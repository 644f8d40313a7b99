#pragma once

namespace magicpig {

/// a / b, rounded up; both positive, or a is 0.
inline int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace magicpig
